"""The options of the data stand once: what takes them takes the same ones, with the defaults they always had."""

from __future__ import annotations

import inspect
import shlex
from pathlib import Path

import pytest
from texts import write_jsonl

from lightning_lighthouse import LighthouseRecipe, WeightedSource
from lightning_lighthouse.cli.prepare import main
from lightning_lighthouse.data import prepare
from lightning_lighthouse.data.manifest import Manifest
from lightning_lighthouse.data.settings import RECORDED, DataOptions, prepare_command, settings_of

# in the order in which 0.1 took them by position
RECIPE = {
    "seq_len": 8192,
    "batch_size": 1,
    "source": None,
    "output_dir": "data/prepared",
    "text_field": "text",
    "tokenizer": "bytes",
    "end_of_document": None,
    "validation_source": None,
    "validation_fraction": 0.05,
    "seed": 42,
    "num_workers": 2,
    "document_ids": False,
    "sources": None,
    "test_source": None,
    "documents": "pack",
    "long_fraction": None,
}


def test_the_recipe_takes_what_it_always_took() -> None:
    found = inspect.signature(LighthouseRecipe).parameters
    assert {name: parameter.default for name, parameter in found.items()} == RECIPE
    assert list(found) == list(RECIPE)
    assert LighthouseRecipe(61, 2, "text.jsonl", "out").output_dir == "out"


def test_prepare_takes_what_it_always_took() -> None:
    found = inspect.signature(prepare).parameters
    empty = inspect.Parameter.empty
    left_out = {"batch_size", "document_ids"}
    changed = {"output_dir": empty, "seq_len": empty, "num_workers": 0, "overwrite": False}
    expected = {name: value for name, value in {**RECIPE, **changed}.items() if name not in left_out}
    assert {name: parameter.default for name, parameter in found.items()} == expected
    kinds = {name: parameter.kind for name, parameter in found.items()}
    assert kinds.pop("output_dir") == inspect.Parameter.POSITIONAL_OR_KEYWORD
    assert set(kinds.values()) == {inspect.Parameter.KEYWORD_ONLY}
    with pytest.raises(TypeError, match="unexpected keyword argument 'sorce'"):
        prepare("out", seq_len=61, sorce="x")


def test_recipes_are_told_apart_although_they_ask_for_the_same() -> None:
    one, other = LighthouseRecipe(61), LighthouseRecipe(61)
    assert one != other
    assert len({one, other}) == 2


def test_the_command_that_is_printed_prepares_the_same(tmp_path: Path) -> None:
    text = str(write_jsonl(tmp_path / "a b.jsonl", ["x" * 99] * 31))
    asked = DataOptions(
        seq_len=7, sources=[WeightedSource(text, 0.5)], seed=7, documents="whole", long_fraction=0.25, num_workers=9
    )
    command = prepare_command(asked, tmp_path / "out", "bytes")
    assert main(shlex.split(command)[2:]) == 0
    assert Manifest.load(tmp_path / "out").settings == settings_of(asked, "bytes")
    # what does not decide the files is not asked for
    assert "--num_workers" not in command
    assert {"num_workers", "batch_size", "output_dir", "document_ids"}.isdisjoint(RECORDED)


def test_a_switch_needs_no_value(tmp_path: Path) -> None:
    text = str(write_jsonl(tmp_path / "a.jsonl", ["x" * 99] * 31))
    for seq_len, switch in (("7", "--overwrite=false"), ("11", "--overwrite"), ("13", "--overwrite=true")):
        assert main(["--output_dir", str(tmp_path / "out"), "--source", text, "--seq_len", seq_len, switch]) == 0
        assert Manifest.load(tmp_path / "out").settings.seq_len == int(seq_len)
