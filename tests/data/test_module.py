"""LighthouseRecipe in a real Trainer: batches, resume across epochs, refusals."""

from __future__ import annotations

import copy
import inspect
import json
import logging
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from places import DOCS, TESTS
from recorded import Recorder, fit, name_of, trainer
from warned import own_warnings

from lightning_lighthouse import Documents, LighthouseRecipe
from lightning_lighthouse.data.preparing import packing
from lightning_lighthouse.data.preparing.prepare import prepare

SEQ_LEN = 127
END = 256


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of many lengths, no two sequences alike."""
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    rng = np.random.default_rng(42)
    documents = (bytes(rng.integers(32, 127, size=rng.integers(1, 500), dtype=np.uint8)).decode() for _ in range(97))
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return path


@pytest.fixture(scope="module")
def prepared(text: Path) -> str:
    """The same, prepared."""
    prepare(str(text.parent / "prepared"), seq_len=SEQ_LEN, source=str(text), validation_fraction=0.2)
    return str(text.parent / "prepared")


def recipe(source: str, **options: Any) -> LighthouseRecipe:
    return LighthouseRecipe(**{"seq_len": SEQ_LEN, "source": source, "num_workers": 0, "batch_size": 3, **options})


def test_trainer_prepares_trains_and_validates(text: Path, tmp_path: Path, caplog: Any) -> None:
    data = LighthouseRecipe(
        seq_len=SEQ_LEN, batch_size=3, source=str(text), output_dir=str(tmp_path / "out"), validation_fraction=0.2
    )
    assert (data.vocab_size, data.bytes_per_token) == (257, None)
    with caplog.at_level(logging.INFO, "lightning_lighthouse"):
        model = fit(data, max_epochs=2)
    manifest = data.state_dict()
    assert f"sha256 {data._load_manifest().sha256}" in caplog.text
    counts = data._load_manifest()
    assert len(model.seen) == counts.train.sequences // 3 * 2
    # each epoch shows each batch once, in an order of its own
    first, second = model.seen[: len(model.seen) // 2], model.seen[len(model.seen) // 2 :]
    assert set(Counter(model.seen)) >= set(first)
    assert first != second
    assert model.validated == counts.validation.sequences // 3 * 3 * 2
    assert 0.9 < data.bytes_per_token < 1
    assert set(manifest) == {"fingerprint", "seq_len", "tokenizer", "seed", "topology"}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_epoch_is_a_permutation_of_the_stored_sequences(prepared: str, num_workers: int) -> None:
    data = recipe(prepared, num_workers=num_workers, batch_size=1)
    data.setup("fit")
    loader = data.train_dataloader()
    epochs = [[name_of(batch["tokens"]) for batch in loader] for _ in range(2)]
    counts = data._load_manifest().train
    assert Counter(epochs[0]) == Counter(epochs[1])
    assert len(set(epochs[0])) == counts.sequences
    assert epochs[0] != epochs[1]
    batch = next(iter(loader))
    assert batch["tokens"].dtype == torch.int64
    assert batch["tokens"].shape == (1, SEQ_LEN + 1)
    assert set(batch) == {"tokens"}


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_document_ids_and_positions_restart_with_each_document(prepared: str, num_workers: int) -> None:
    data = recipe(prepared, document_ids=True, num_workers=num_workers)
    data.setup("fit")
    for batch in data.val_dataloader():
        documents = batch.pop("documents")
        assert torch.equal(documents.position_ids("cpu"), batch["positions"])
        assert torch.equal(documents.document_ids("cpu"), batch["document_ids"])
        for tokens, document_ids, positions in zip(*(batch[name].tolist() for name in batch), strict=True):
            document, position = 0, 0
            for i, token in enumerate(tokens):
                assert (document_ids[i], positions[i]) == (document, position)
                document, position = (document + 1, 0) if token == END else (document, position + 1)


def test_the_order_does_not_depend_on_the_file_system(text: Path, tmp_path: Path, monkeypatch: Any) -> None:
    # litdata shuffles chunks within a small window on network file systems: many chunks are needed to see it
    monkeypatch.setattr(packing, "CHUNK_BYTES", 1)
    prepare(str(tmp_path / "out"), seq_len=SEQ_LEN, source=str(text), validation_fraction=0)
    orders = []
    for forced in (False, True):
        if forced:
            # litdata's own switch: treat this disk as a network file system
            monkeypatch.setenv("LITDATA_POSIX_FAST", "1")
        data = recipe(str(tmp_path / "out"), batch_size=1)
        data.setup("fit")
        orders.append([name_of(batch["tokens"]) for batch in data.train_dataloader()])
    assert orders[0] == orders[1]
    assert len(set(orders[0])) == data._load_manifest().train.sequences


@pytest.mark.parametrize("tokens", [[END, END, END], [7], [7, END], [1, 2, END, END, 3, 4, 5], [END, 1]])
def test_sequences_full_of_ends_and_without_any(tokens: list[int]) -> None:
    from lightning_lighthouse.data.loading import locate_documents

    found = np.full((2, len(tokens)), -1)
    lengths = locate_documents(np.array(tokens, dtype=np.uint16), END, *found)
    document, position, expected = 0, 0, []
    for token in tokens:
        expected.append([document, position])
        document, position = (document + 1, 0) if token == END else (document, position + 1)
    assert found.T.tolist() == expected
    assert [number for number, length in enumerate(lengths) for _ in range(length)] == found[0].tolist()


def test_ids_of_every_size_are_delivered_as_they_are_stored() -> None:
    from lightning_lighthouse.data.loading import SIGNED, widen

    for dtype in (np.uint16, np.uint32):
        largest = np.iinfo(dtype).max
        stored = np.array([[0, 1, largest // 2, largest // 2 + 1], [5, largest - 1, largest, 5]], dtype=dtype)
        batch = widen(torch.from_numpy(stored.view(SIGNED[stored.dtype.itemsize])), 5)
        assert batch["tokens"].tolist() == stored.tolist()
        assert batch["document_ids"].tolist() == [[0, 0, 0, 0], [0, 1, 1, 1]]
        assert batch["positions"].tolist() == [[0, 1, 2, 3], [0, 0, 1, 2]]
        assert batch["documents"] == Documents([[4], [1, 3]])


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("options", [{}, {"limit_train_batches": 11}], ids=["whole", "limited"])
def test_resume_equals_an_unbroken_run(
    prepared: str, tmp_path: Path, num_workers: int, options: dict[str, Any]
) -> None:
    unbroken = fit(recipe(prepared, num_workers=num_workers), tmp_path / "unbroken", **options)
    batches = len(unbroken.seen) // 3
    # inside an epoch, before, at and behind its end
    for step in (1, batches - 1, batches, batches + 1, 2 * batches - 1):
        checkpoint = tmp_path / "unbroken" / f"step={step}.ckpt"
        resumed = fit(recipe(prepared, num_workers=num_workers), resume=checkpoint, **options)
        assert resumed.seen == unbroken.seen[step:], f"resumed at step {step} of {batches} an epoch"
        assert resumed.weight.item() == unbroken.weight.item()


def test_resume_of_a_resumed_run(prepared: str, tmp_path: Path) -> None:
    unbroken = fit(recipe(prepared), tmp_path / "first")
    batches = len(unbroken.seen) // 3
    for i, step in enumerate((3, 7, batches + 2)):
        checkpoint = tmp_path / ("first" if i == 0 else f"after{i - 1}") / f"step={step}.ckpt"
        resumed = fit(recipe(prepared), tmp_path / f"after{i}", resume=checkpoint)
        assert resumed.seen == unbroken.seen[step:]


def test_a_moved_folder_resumes_exactly(prepared: str, tmp_path: Path) -> None:
    here = shutil.copytree(prepared, tmp_path / "here")
    unbroken = fit(recipe(str(here)), tmp_path / "steps", max_epochs=2)
    there = here.rename(tmp_path / "there")
    resumed = fit(recipe(str(there)), resume=tmp_path / "steps" / "step=5.ckpt", max_epochs=2)
    assert resumed.seen == unbroken.seen[5:]


def test_other_data_under_a_checkpoint_is_refused(text: Path, prepared: str, tmp_path: Path) -> None:
    fit(recipe(prepared), tmp_path / "steps", max_steps=2)
    checkpoint = tmp_path / "steps" / "step=2.ckpt"
    # one letter of one document, nothing of the sizes
    (tmp_path / "text.jsonl").write_text(re.sub('"text": "[a-z]', '"text": "E', text.read_text(), count=1))
    rebuilt = prepare(
        str(tmp_path / "out"), seq_len=SEQ_LEN, source=str(tmp_path / "text.jsonl"), validation_fraction=0.2
    )
    original = recipe(prepared)._load_manifest()
    assert rebuilt.train == original.train
    data = recipe(str(tmp_path / "out"))
    with pytest.raises(ValueError, match=f"fingerprint {rebuilt.fingerprint} .*checkpoint has {original.fingerprint}"):
        fit(data, resume=checkpoint)
    with pytest.raises(ValueError, match="seed is 43, the checkpoint was written with 42"):
        fit(recipe(prepared, seed=43), resume=checkpoint)
    # evaluation on other data is a use of its own
    trainer().validate(Recorder(), datamodule=data, ckpt_path=checkpoint, weights_only=True, verbose=False)


def test_another_topology_warns_and_repeats_nothing(prepared: str, tmp_path: Path) -> None:
    unbroken = fit(recipe(prepared, batch_size=1), tmp_path / "steps", max_epochs=1)
    step = tmp_path / "steps" / "step=5.ckpt"
    with own_warnings() as lines:
        resumed = fit(recipe(prepared, batch_size=1, num_workers=2), resume=step, max_epochs=1)
    (line,) = lines
    assert "resumed with num_workers 1 -> 2: the batches are not those of an unbroken run" in line
    assert "at most 1 global batches are left out" in line
    served = Counter(unbroken.seen[:5] + resumed.seen)
    assert max(served.values()) == 1
    assert 0 <= len(unbroken.seen) - len(served) < 2
    with own_warnings() as lines:
        alone = fit(recipe(prepared, batch_size=1, num_workers=1), resume=step, max_epochs=1)
    # one worker does what the main process would have done
    assert lines == []
    assert alone.seen == unbroken.seen[5:]


@pytest.mark.parametrize("share", [0.25, 0.75])
def test_more_ranks_take_the_rest_of_an_epoch(prepared: str, monkeypatch: Any, share: float) -> None:
    def loader() -> Any:
        data = recipe(prepared, batch_size=1)
        data.setup("fit")
        return data.train_dataloader()

    whole = [name_of(batch["tokens"]) for batch in loader()]
    position = loader()
    done = int(len(whole) * share) // 2 * 2
    served = [name_of(batch["tokens"]) for _, batch in zip(range(done), position, strict=False)]
    state = position.state_dict()
    # litdata reads these to find out its rank
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("GLOBAL_RANK", rank)
        resumed = loader()
        resumed.load_state_dict(copy.deepcopy(state))
        served += [name_of(batch["tokens"]) for batch in resumed]
    assert len(served) == len(whole) // 2 * 2
    assert len(set(served) & set(whole)) == len(served)


@pytest.mark.parametrize("num_workers", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_resume_of_a_run_resumed_with_another_topology(prepared: str, tmp_path: Path, num_workers: int) -> None:
    sequences = recipe(prepared)._load_manifest().train.sequences
    done = sequences - 8
    fit(recipe(prepared, batch_size=1, num_workers=2), tmp_path / "two", max_steps=done)
    options = {"batch_size": 1, "num_workers": num_workers}
    step = tmp_path / "two" / f"step={done}.ckpt"
    resumed = fit(recipe(prepared, **options), tmp_path / "one", resume=step, max_epochs=2)
    assert len(resumed.seen) == 8 + sequences
    # within the epoch, at its end, and within the next
    for more in (3, 8, 13):
        again = fit(recipe(prepared, **options), resume=tmp_path / "one" / f"step={done + more}.ckpt", max_epochs=2)
        assert again.seen == resumed.seen[more:]


def test_checkpoints_load_without_executing_code(prepared: str, tmp_path: Path) -> None:
    fit(recipe(prepared), tmp_path, max_steps=1)
    checkpoint = torch.load(tmp_path / "step=1.ckpt", weights_only=True)
    assert checkpoint["LighthouseRecipe"]["fingerprint"] == recipe(prepared)._load_manifest().fingerprint


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_token_outside_the_vocabulary_is_one_line(prepared: str, tmp_path: Path, num_workers: int) -> None:
    folder = shutil.copytree(prepared, tmp_path / "out")
    chunk = folder / "train" / "chunk-0-0.bin"
    content = bytearray(chunk.read_bytes())
    content[1001] = 0xFF
    chunk.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"out/train/chunk-0-0\.bin holds token 65\d\d\d, the vocabulary has 257"
    ) as error:
        fit(recipe(str(folder), num_workers=num_workers))
    assert "\n" not in str(error.value)


def test_a_cut_chunk_stops_the_run_before_it_starts(prepared: str, tmp_path: Path) -> None:
    folder = shutil.copytree(prepared, tmp_path / "out")
    chunk = folder / "train" / "chunk-0-0.bin"
    chunk.write_bytes(chunk.read_bytes()[:-2])
    model = Recorder()
    with pytest.raises(ValueError, match=r"out/train/chunk-0-0\.bin has .* bytes, expected"):
        trainer().fit(model, datamodule=recipe(str(folder)))
    assert model.seen == []


def test_too_little_data_is_an_error_with_counts(prepared: str) -> None:
    sequences = recipe(prepared)._load_manifest().train.sequences
    with pytest.raises(
        ValueError,
        match=rf"has {sequences} train sequences of 127 tokens, one batch needs 9999 \(1 ranks x "
        r"batch_size 9999\); prepare more text, or lower seq_len or batch_size$",
    ):
        fit(recipe(prepared, batch_size=9999))
    validation = recipe(prepared)._load_manifest().validation.sequences
    assert validation < sequences
    with pytest.raises(ValueError, match=rf"has {validation} validation sequences"):
        fit(recipe(prepared, batch_size=validation + 1))


def test_without_validation_data_training_goes_on_and_validation_does_not(text: Path, tmp_path: Path) -> None:
    data = recipe(str(text), output_dir=str(tmp_path / "out"), validation_fraction=0)
    assert fit(data, max_steps=2).validated == 0
    with pytest.raises(ValueError, match="has 0 validation sequences"):
        trainer().validate(Recorder(), datamodule=data, verbose=False)


def test_a_prepared_source_must_fit_the_recipe(prepared: str) -> None:
    with pytest.raises(
        ValueError, match=r"was prepared with seq_len=127, asked for 131; .*lighthouse prepare .*--seq_len 131"
    ):
        recipe(prepared, seq_len=131).setup("fit")
    # where the text once came from, and how it was split, no longer matters
    recipe(prepared, seed=7, validation_fraction=0.5, text_field="body").setup("fit")


def test_a_prepared_source_of_another_tokenizer(text: Path, tmp_path: Path, tokenizer_file: str) -> None:
    out = str(tmp_path / "out")
    prepare(out, seq_len=SEQ_LEN, source=str(text), tokenizer=tokenizer_file, end_of_document="<|endoftext|>")
    recipe(out, tokenizer=tokenizer_file).setup("fit")
    with pytest.raises(ValueError, match=r"was prepared with tokenizer='sha256:\w+', asked for 'bytes'"):
        recipe(out).setup("fit")


def test_an_output_of_other_settings_is_refused(text: Path, tmp_path: Path) -> None:
    options = {"output_dir": str(tmp_path / "out"), "validation_fraction": 0.2}
    recipe(str(text), **options).prepare_data()
    for changed in ({"seq_len": 131}, {"seed": 7}, {"validation_fraction": 0.3}, {"text_field": "body"}):
        data = recipe(str(text), **{**options, **changed})
        data.prepare_data()
        with pytest.raises(ValueError, match=f"was prepared with {next(iter(changed))}="):
            data.setup("fit")


def test_impossible_arguments() -> None:
    for name, value in {"seq_len": 0, "batch_size": 0, "num_workers": -1, "validation_fraction": 1.0}.items():
        with pytest.raises(ValueError, match=f"{name} must be .*, got {value}"):
            LighthouseRecipe(**{name: value})


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_of_which_no_order_can_be_drawn_is_refused_before_any_text_is_read(tmp_path: Path, seed: int) -> None:
    with pytest.raises(ValueError, match=f"seed must be from 0 to 4294967295, got {seed}"):
        LighthouseRecipe(seed=seed)
    with pytest.raises(ValueError, match=f"seed must be from 0 to 4294967295, got {seed}"):
        prepare(str(tmp_path / "out"), seq_len=7, seed=seed)


def test_yaml_can_hold_every_argument() -> None:
    parameters = inspect.signature(LighthouseRecipe).parameters.values()
    assert all(isinstance(parameter.default, str | int | float | bool | None) for parameter in parameters)
    for parameter in parameters:
        assert f"        {parameter.name}: " in (LighthouseRecipe.__doc__ or "")


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("module", "litdata"),
        ("preparing.prepare", "torch lightning litdata tokenizers pyarrow"),
        ("integrity", "torch numpy"),
    ],
)
def test_importing_stays_light(module: str, absent: str) -> None:
    code = f"import sys, lightning_lighthouse.data.{module}; print(*set({absent.split()}) & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == ""


def test_every_documented_promise_names_a_test() -> None:
    promises = (DOCS / "use" / "data.md").read_text()
    others = {path.stem for path in TESTS.rglob("test_*.py")} | set(inspect.signature(LighthouseRecipe).parameters)
    named = set(re.findall(r"\btest_\w+", promises)) - others
    files = [*(TESTS / "data").rglob("test_*.py"), TESTS / "cli" / "test_trust.py"]
    written = set(re.findall(r"^def (test_\w+)", "".join(path.read_text() for path in files), re.M))
    assert len(named) > 20
    assert named <= written
