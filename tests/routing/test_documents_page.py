"""The code of docs/use/documents.md runs as it stands."""

from __future__ import annotations

import re

import pytest
import torch
from families import GROUPED, build_transformers
from foreign import GPT, VOCABULARY
from places import DOCS

from lightning_lighthouse.routing.scope import scopes

DOCUMENT = DOCS / "use" / "documents.md"
BLOCKS = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), flags=re.DOTALL)


def run(words, names):
    (block,) = [block for block in BLOCKS if words in block]
    exec(compile(block, str(DOCUMENT), "exec"), names)
    return names


def test_every_block_is_run_here():
    assert len(BLOCKS) == 2


def test_a_loop_of_ones_own():
    torch.manual_seed(0)
    model = GPT()
    before = model.head.weight.clone()
    tokens = torch.randint(VOCABULARY, (2, 100))
    ids = (torch.arange(100) > 40).long().expand(2, -1)
    names = {
        "model": model,
        "loss_of": lambda model, tokens: model(tokens).square().mean(),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "batches": [(tokens, ids)] * 2,
    }
    run("set_documents", names)
    assert not torch.equal(model.head.weight, before)
    assert scopes == []


def test_the_trainer_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate: the extra models")
    settings = {"max_steps": 2, "per_device_train_batch_size": 2, "report_to": [], "save_strategy": "no"}
    names = {
        "model": build_transformers("LlamaConfig", **GROUPED).model,
        "arguments": transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **settings),
        "dataset": [{"input_ids": list(range(1, n))} for n in (9, 20, 30, 25)],
    }
    run("DataCollatorWithFlattening", names)
    assert scopes == []
