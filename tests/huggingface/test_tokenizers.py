"""Whether the data's tokenizer is the model's: by what it makes of text, not by its file's bytes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from pretrained import save_model, save_tokenizer

pytest.importorskip("transformers", reason="needs the extra hf")

from lightning_lighthouse.checks import SettingError
from lightning_lighthouse.huggingface.llama import byte_tokenizer
from lightning_lighthouse.huggingface.tokenizers import PretrainedTokenizer, check_tokenizer


@pytest.fixture
def model(tmp_path: Path) -> str:
    folder = save_model(tmp_path / "model")
    save_tokenizer(Path(folder))
    return folder


def changed(model: str, change) -> str:
    """A copy of its tokenizer with another record."""
    folder = Path(model).with_name("changed")
    folder.mkdir()
    for file in Path(model).glob("tokenizer*"):
        shutil.copy(file, folder)
    record = json.loads((folder / "tokenizer.json").read_text())
    change(record)
    (folder / "tokenizer.json").write_text(json.dumps(record))
    return str(folder)


def swap(record) -> None:
    words = record["model"]["vocab"]
    words["the"], words["same"] = words["same"], words["the"]


CHANGES = {
    "a new word": lambda record: record["model"]["vocab"].update(new=40),
    "two words swapped": swap,
}


def test_its_own_is_taken_in_every_form(model: str) -> None:
    check_tokenizer(model, model)
    check_tokenizer(f"{model}/tokenizer.json", model)
    # written anew in another order of keys, and with another end of a document
    other = changed(model, lambda record: record.update(padding=None))
    check_tokenizer(other, model, "over")


@pytest.mark.parametrize("change", CHANGES)
def test_another_is_refused(model: str, change: str) -> None:
    with pytest.raises(SettingError, match=r"tokenizer must be that of the model, got .*changed.*, which makes other"):
        check_tokenizer(changed(model, CHANGES[change]), model)


def test_one_that_cuts_text_elsewhere_is_refused(tokenizer_file: str, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    folder = save_model(tmp_path / "model")
    PreTrainedTokenizerFast(tokenizer_file=tokenizer_file, eos_token="<|endoftext|>").save_pretrained(folder)
    check_tokenizer(tokenizer_file, folder)
    record = json.loads(Path(tokenizer_file).read_text())
    record["pre_tokenizer"]["add_prefix_space"] = True
    (tmp_path / "spaced.json").write_text(json.dumps(record))
    with pytest.raises(SettingError, match="makes other tokens"):
        check_tokenizer(str(tmp_path / "spaced.json"), folder)


def test_bytes_are_the_tokens_of_a_model_of_bytes_alone(model: str, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="got 'bytes'"):
        check_tokenizer("bytes", model)
    folder = save_model(tmp_path / "bytes")
    byte_tokenizer().save_pretrained(folder)
    check_tokenizer("bytes", folder)


def test_a_model_without_a_tokenizer_refuses_none(model: str, tmp_path: Path) -> None:
    check_tokenizer(model, save_model(tmp_path / "bare"))


def test_a_document_is_encoded_with_one_id_behind_it(model: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    assert PretrainedTokenizer(tokenizer).encode(b"the same text") == [0, 1, 2, tokenizer.eos_token_id]
