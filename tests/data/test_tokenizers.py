"""Tokenizers: text there and back, and an end-of-document token that occurs nowhere else."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from lightning_lighthouse.data.preparing.prepare import prepare
from lightning_lighthouse.data.tokenizers import identify_tokenizer, load_tokenizer


def test_tokenizer_file_round_trip(tokenizer_file: str) -> None:
    from tokenizers import Tokenizer

    tokenizer = load_tokenizer(tokenizer_file)
    text = "pool <|endoftext|> M\u00fcnchen <pad>"
    tokens = tokenizer.encode(text.encode())
    assert Tokenizer.from_file(tokenizer_file).decode(tokens[:-1].tolist(), skip_special_tokens=True) == text
    assert tokens.dtype == np.uint16
    assert tokens[-1] == tokenizer.end_of_document == 1
    assert (tokens < tokenizer.vocab_size).all()
    # control tokens written out in the text are text
    assert not {0, 1} & set(tokens[:-1].tolist())
    assert pickle.loads(pickle.dumps(tokenizer)).encode(text.encode()).tolist() == tokens.tolist()


def test_a_tokenizer_that_cuts_or_fills_does_neither(tokenizer_file: str, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(tokenizer_file)
    backend.enable_truncation(5)
    backend.enable_padding(length=97)
    backend.save(str(tmp_path / "tokenizer.json"))
    text = b"pool, score, select, gather, attend, scatter"
    expected = load_tokenizer(tokenizer_file).encode(text)
    assert load_tokenizer(str(tmp_path / "tokenizer.json")).encode(text).tolist() == expected.tolist()


def test_end_of_document_must_be_told_apart(tokenizer_file: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"end_of_document must be a token of .*, got '</doc>'"):
        load_tokenizer(tokenizer_file, "</doc>")
    with pytest.raises(ValueError, match="the text itself contains the end-of-document token 'p'"):
        load_tokenizer(tokenizer_file, "p").encode(b"stop, p")
    with pytest.raises(ValueError, match="end_of_document must be None for byte tokens"):
        load_tokenizer("bytes", "</s>")
    stripped = tmp_path / "tokenizer.json"
    stripped.write_text(Path(tokenizer_file).read_text().replace("<|endoftext|>", "<nothing usual>"))
    with pytest.raises(ValueError, match=r"has none of .*: set end_of_document to the token that ends a document"):
        load_tokenizer(str(stripped))
    stripped.write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is no tokenizer\.json"):
        load_tokenizer(str(stripped))
    with pytest.raises(
        FileNotFoundError, match=r"tokenizer must be 'bytes' or the path of a tokenizer\.json, got 'bite'"
    ):
        load_tokenizer("bite")


def test_text_that_is_not_utf8_is_named_where_it_must_be_decoded(tmp_path: Path, tokenizer_file: str) -> None:
    (tmp_path / "a.txt").write_bytes(b"latin-1: \xe9" * 99)
    with pytest.raises(ValueError, match=r"a\.txt: 'utf-8' codec can't decode byte 0xe9 in position 9"):
        prepare(str(tmp_path / "out"), seq_len=7, source=str(tmp_path / "a.txt"), tokenizer=tokenizer_file)
    # bytes are bytes
    prepare(str(tmp_path / "out"), seq_len=7, source=str(tmp_path / "a.txt"), validation_fraction=0)


def test_a_tag_of_the_text_is_no_end_of_document(tmp_path, tokenizer_file):
    from tokenizers import AddedToken, Tokenizer

    tokenizer = Tokenizer.from_file(tokenizer_file)
    tokenizer.add_tokens([AddedToken("</s>", normalized=False)])
    path = tmp_path / "tags.json"
    tokenizer.save(str(path))
    loaded = load_tokenizer(str(path))
    assert loaded.end_of_document == tokenizer.token_to_id("<|endoftext|>")
    # asked for, it is taken
    assert load_tokenizer(str(path), "</s>").end_of_document == tokenizer.token_to_id("</s>")


def test_only_ordinary_tokens_of_such_names_are_asked_about(tmp_path, tokenizer_file):
    content = json.loads(Path(tokenizer_file).read_text())
    for token in content["added_tokens"]:
        token["special"] = False
    path = tmp_path / "none.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"among its special tokens \(<\|endoftext\|> is an ordinary token there\)"):
        load_tokenizer(str(path))


@pytest.mark.parametrize("eos", ["<pad>", {"content": "<pad>", "special": True}], ids=["a name", "a token"])
def test_a_folder_of_transformers_is_a_tokenizer(tmp_path, tokenizer_file, eos):
    (tmp_path / "tokenizer.json").write_bytes(Path(tokenizer_file).read_bytes())
    # without a word on its end it is the file in it
    assert identify_tokenizer(str(tmp_path)) == identify_tokenizer(tokenizer_file)
    assert load_tokenizer(str(tmp_path)).end_of_document == load_tokenizer(tokenizer_file).end_of_document
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    assert load_tokenizer(str(tmp_path)).end_of_document == load_tokenizer(tokenizer_file, "<pad>").end_of_document
    assert identify_tokenizer(str(tmp_path)) != identify_tokenizer(tokenizer_file)
    # what is asked for goes first
    asked = load_tokenizer(str(tmp_path), "<|endoftext|>")
    assert asked.end_of_document == load_tokenizer(tokenizer_file).end_of_document


def test_a_folder_that_holds_no_tokenizer_is_named(tmp_path, tokenizer_file):
    with pytest.raises(FileNotFoundError, match=r"tokenizer.json': no such file, nor a folder that holds one"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_bytes(Path(tokenizer_file).read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": ')
    with pytest.raises(ValueError, match=r"tokenizer_config.json is cut short or altered"):
        load_tokenizer(str(tmp_path))
