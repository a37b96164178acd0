"""The code of docs/use/models.md runs as it stands."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from families import GROUPED, build_transformers
from foreign import GPT, VOCABULARY, ForeignModule, ResumableLoader
from places import DOCS

from lightning_lighthouse import LighthouseCallback, LighthouseConfig
from lightning_lighthouse.attention.sdpa import stock_sdpa

DOCUMENT = DOCS / "use" / "models.md"
BLOCKS = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), flags=re.DOTALL)


@pytest.fixture(autouse=True)
def _nothing_left_behind():
    yield
    assert F.scaled_dot_product_attention is stock_sdpa


def run(words, names):
    """Execute the one block of the page with these words; its names."""
    (block,) = [block for block in BLOCKS if words in block]
    exec(compile(block, str(DOCUMENT), "exec"), names)
    return names


def test_every_block_is_run_here():
    assert len(BLOCKS) == 6


@pytest.mark.parametrize("words", ["with patch_attention(", "patch.on()"], ids=["with", "handle"])
def test_training_without_lightning(words):
    torch.manual_seed(0)
    module = ForeignModule(model=GPT())
    before, keys = module.model.head.weight.clone(), set(vars(module.model.blocks[1].attn))
    names = {
        "model": module.model,
        "loss_of": lambda model, batch: module.loss(batch),
        "optimizer": module.configure_optimizers(),
        "lighthouse_batches": ResumableLoader(count=4),
        "dense_batches": ResumableLoader(count=4),
    }
    run(words, names)
    assert not torch.equal(module.model.head.weight, before)
    assert set(vars(module.model.blocks[1].attn)) == keys


def test_rotary_positions_that_are_given():
    names = {"LighthouseCallback": LighthouseCallback, "LighthouseConfig": LighthouseConfig}
    run('rotate="after"', names)
    with pytest.raises(ValueError, match="rotary must have"):
        LighthouseCallback(rotary={"pairing": "half"})


def test_attention_called_by_itself():
    q, k, v = torch.randn(3, 1, 2, 64, 8)
    y = run("import causal_attention", {"q": q, "k": k, "v": v})["y"]
    assert torch.equal(y, stock_sdpa(q, k, v, is_causal=True))


def test_a_model_made_with_lighthouse_sdpa():
    config = build_transformers("LlamaConfig", **GROUPED).model.config
    model = run("register_lighthouse_sdpa()", {"config": config})["model"]
    assert model.config._attn_implementation == "lighthouse_sdpa"
    assert model(torch.zeros(1, 8, dtype=torch.long)).logits.shape == (1, 8, VOCABULARY)


def test_the_trainer_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate: the extra models")
    model = build_transformers("LlamaConfig", **GROUPED).model
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True
    )
    # long enough for the default settings
    rows = torch.randint(VOCABULARY, (2, 150), generator=torch.Generator().manual_seed(0))
    names = {"model": model, "arguments": arguments, "dataset": [{"input_ids": row, "labels": row} for row in rows]}
    run("LighthouseTrainerCallback(switch_at=0.9)", names)
    assert names["callback"].state()["attributes"]["saved_switch"]["switch_step"] == 2
