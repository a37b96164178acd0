"""Bytes per token: each split has its own, and none where part of its text is unknown."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from texts import END, optimized, texts_of, write_jsonl

from lightning_lighthouse import LighthouseRecipe
from lightning_lighthouse.data.manifest import Manifest
from lightning_lighthouse.data.preparing.prepare import prepare
from lightning_lighthouse.data.tokenizers import load_tokenizer
from lightning_lighthouse.model import Decoder

OTHER = "".join(map(chr, range(0x4E00, 0x4E00 + 300)))


@pytest.fixture
def sources(tmp_path: Path, tokenizer_file: str) -> dict[str, str]:
    """Text that the tokenizer knows, text that it does not, and the tokens of a text."""
    tokenizer = load_tokenizer(tokenizer_file)
    optimized(tmp_path / "tokens", [tokenizer.encode(text.encode()).tolist() for text in texts_of(53)])
    return {
        "known": str(write_jsonl(tmp_path / "known.jsonl", texts_of(53))),
        "other": str(write_jsonl(tmp_path / "other.jsonl", [OTHER] * 5)),
        "tokens": str(tmp_path / "tokens"),
    }


def ratio_of(source: str, texts: list[str], tokenizer_file: str) -> float | None:
    tokens = sum(load_tokenizer(tokenizer_file).encode(text.encode()).size for text in texts)
    return None if source == "tokens" else sum(len(text.encode()) for text in texts) / tokens


@pytest.mark.parametrize(
    ("train", "validation", "test"),
    [
        ("known", "other", None),
        ("known", "other", "known"),
        ("known", "known", "other"),
        ("tokens", "other", "known"),
        ("known", "tokens", "known"),
        ("known", "known", "tokens"),
    ],
)
def test_bits_per_byte_are_of_the_split_that_is_evaluated(
    train: str, validation: str, test: str | None, sources: dict[str, str], tmp_path: Path, tokenizer_file: str
) -> None:
    data = LighthouseRecipe(
        seq_len=61,
        source=sources[train],
        validation_source=sources[validation],
        test_source=test and sources[test],
        tokenizer=tokenizer_file,
        output_dir=str(tmp_path / "out"),
        num_workers=0,
    )
    assert (data.validation_bytes_per_token, data.test_bytes_per_token) == (None, None)
    model = Decoder(num_layers=1, dim=16, num_heads=2, ffn_dim=32, vocab_size=data.vocab_size)
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=2
    )
    for stage, source in (("val", validation), ("test", test)):
        if source is None:
            continue
        evaluate = trainer.validate if stage == "val" else trainer.test
        (logged,) = evaluate(model, datamodule=data, verbose=False)
        ratio = ratio_of(source, [OTHER] * 5 if source == "other" else texts_of(53), tokenizer_file)
        expected = None if ratio is None else pytest.approx(logged[f"{stage}/loss"] / math.log(2) / ratio, rel=1e-5)
        assert logged.get(f"{stage}/bits_per_byte") == expected


@pytest.mark.parametrize("split", ["training", "validation"])
def test_a_mix_with_tokens_of_unknown_text_has_no_ratio(
    split: str, sources: dict[str, str], tmp_path: Path, tokenizer_file: str
) -> None:
    mixed: list[Any] = [{"path": sources[name], "weight": 1.0} for name in ("tokens", "known")]
    options: dict[str, Any] = {"sources": mixed, "validation_source": sources["known"]}
    if split == "validation":
        options = {"sources": mixed, "validation_fraction": 0.3}
    prepare(str(tmp_path / "out"), seq_len=61, tokenizer=tokenizer_file, **options)
    manifest = Manifest.load(tmp_path / "out")
    assert manifest.bytes_per_token is None
    assert manifest.train.bytes_per_token is None
    lines = {line[:18].strip(): line[18:].split() for line in manifest.report().splitlines()}
    if split == "validation":
        assert manifest.validation.bytes_per_token is None
        assert lines["text bytes"] == ["unknown", "unknown"]
        assert "bytes per token" not in lines
    else:
        ratio = ratio_of("known", texts_of(53), tokenizer_file)
        assert manifest.validation.bytes_per_token == ratio
        assert lines["text bytes"] == ["unknown", f"{manifest.validation.text_bytes:,}"]
        assert lines["bytes per token"] == ["-", f"{ratio:.4f}"]


def test_byte_tokens_in_a_mix_have_a_ratio(sources: dict[str, str], tmp_path: Path) -> None:
    optimized(tmp_path / "bytes", [[*text.encode(), END] for text in texts_of(53)])
    mixed: list[Any] = [{"path": path, "weight": 1.0} for path in (str(tmp_path / "bytes"), sources["known"])]
    manifest = prepare(str(tmp_path / "out"), seq_len=61, sources=mixed, validation_fraction=0)
    assert manifest.bytes_per_token == manifest.train.bytes_per_token
    assert manifest.train.text_bytes == manifest.train.tokens - manifest.train.documents
    assert manifest.report().split("bytes per token")[1].split()[1] == "-"
