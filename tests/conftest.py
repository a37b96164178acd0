"""Shared by all tests: kernels run under Triton's interpreter where there is no GPU."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
import torch
from interpreter import patch_once_a_launch

# Triton reads this once, when it is first imported
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    patch_once_a_launch()


def pytest_collection_finish() -> None:
    """What the imports and the tests themselves take stays: no later collection need look through it, which took 0.3 s.

    Trainers ask for collections at each end of theirs.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _imports_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """--trusted_classes_only holds for the rest of a process: here for the rest of a test."""
    from jsonargparse import _common

    monkeypatch.setattr(_common, "parsing_settings", dict(_common.parsing_settings))


@pytest.fixture(scope="session", autouse=True)
def _workers_end_soon() -> Iterator[None]:
    """A loader that an exception left behind waits so long for its workers, which never hear of it: 5 s in torch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.5)
        yield


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small BPE tokenizer with an end-of-document token."""
    from texts import texts_of
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=307,
        special_tokens=["<pad>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts_of(50), trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return str(path)


@pytest.fixture(scope="session")
def server():
    """Starts runs of `lighthouse` in processes of their own."""
    from resuming import Server

    one = Server()
    yield one
    one.close()


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """A folder with a recipe and its text, to be copied."""
    from resuming import prepare

    return prepare(tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="session")
def unbroken(prepared, server, tmp_path_factory):
    """What every rank logs in a run that nothing breaks, by flags; each such run is made once."""
    from resuming import copy, steps

    known = {}

    def by_batch(*flags, ranks=1):
        if flags not in known:
            folder = copy(prepared, tmp_path_factory.mktemp("unbroken") / "run")
            status, err = server.run(folder, *flags)
            assert status == 0, err
            known[flags] = [{line["batch"]: line for line in steps(folder, rank)} for rank in range(ranks)]
        return known[flags]

    return by_batch
