"""What is refused before there is a batch, and what the comparison of queries and keys sees."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from foreign import GPT, ForeignModule
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from lightning_lighthouse import FutureLeakProbe, LighthouseCallback, LongContextEvaluation
from lightning_lighthouse.checks import SettingError
from lightning_lighthouse.context.group import Context
from lightning_lighthouse.training.context_check import _apart, _difference, attention_layers, check_fits

CONTEXT = Context(0, 2, "no group")


class Wrapped(FullyShardedDataParallel):
    """FSDP1 without the processes that it needs."""

    def __init__(self) -> None:
        nn.Module.__init__(self)


class Fetching(ForeignModule):
    """Takes its batches itself."""

    def training_step(self, dataloader_iter: Any) -> None:
        """Never called."""


def trainer(*callbacks: Any, seq_len: int | None = None) -> Any:
    return SimpleNamespace(callbacks=list(callbacks), datamodule=SimpleNamespace(seq_len=seq_len))


def with_heads(is_compiled: bool) -> ForeignModule:
    module = ForeignModule()
    module.model.extra = nn.MultiheadAttention(4, 2)
    if is_compiled:
        module.model.blocks[0].compile()
    return module


REFUSED = {
    "probe": (lambda: (trainer(FutureLeakProbe()), ForeignModule()), "FutureLeakProbe needs whole sequences"),
    "evaluation": (lambda: (trainer(LongContextEvaluation()), ForeignModule()), "LongContextEvaluation needs whole"),
    "documents": (lambda: (trainer(LighthouseCallback(documents=True)), ForeignModule()), "documents=True cannot keep"),
    "length": (lambda: (trainer(seq_len=1023), ForeignModule()), "1,023 tokens cannot be shared by 2 ranks; choose"),
    "iterator": (lambda: (trainer(), Fetching()), "training_step takes dataloader_iter, whose batches"),
    "FSDP1": (lambda: (trainer(), ForeignModule(model=Wrapped())), "model is sharded by FSDP1"),
    "compiled": (lambda: (trainer(), with_heads(True)), "model.extra is an nn.MultiheadAttention in a compiled model"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_needs_whole_sequences_is_refused(case):
    given, line = REFUSED[case]
    with pytest.raises(SettingError, match=line):
        check_fits(*given(), CONTEXT)


def test_what_does_not_is_not():
    check_fits(trainer(LighthouseCallback(), seq_len=1024), with_heads(False), CONTEXT)


def test_layers_are_found_with_those_that_the_callback_names():
    module = ForeignModule()
    assert list(attention_layers(trainer(), module)) == [f"model.blocks.{number}.attn" for number in range(4)]
    named = attention_layers(trainer(LighthouseCallback(select="*.mlp")), module)
    assert set(named) == {f"model.blocks.{number}.{part}" for number in range(4) for part in ("attn", "mlp")}
    with pytest.raises(SettingError, match="Embedding cannot share sequences: no module calls SDPA in Embedding"):
        attention_layers(trainer(), nn.Embedding(3, 3))


def test_a_difference_is_that_of_a_layer_and_of_its_worst_token():
    x = torch.randn(2, 3, 100, 5, generator=torch.Generator().manual_seed(42))
    other = x.clone()
    other[1, :, 7] *= 1.6
    of_layer, of_token = _difference([(x, x)], [(x, other)]).tolist()
    assert of_token == pytest.approx(0.6)
    assert of_layer < 0.1
    assert _difference([(x, x)], [(x, x * 1.1)]).tolist() == pytest.approx([0.1, 0.1])
    # a fault of the model's own, of which others tell
    assert _difference([(x * torch.nan, x)], [(x * torch.nan, x)]).tolist() == [0.0, 0.0]


def test_a_step_run_apart_leaves_no_trace():
    from torchmetrics import MeanMetric

    module = ForeignModule(model=GPT(layers=1))
    module.mean = MeanMetric()
    module.mean.update(3.0)
    state = torch.get_rng_state()
    plain = SimpleNamespace(precision_plugin=SimpleNamespace(forward_context=torch.no_grad))
    with _apart(plain, module):
        assert not module.training
        module.log("not", 1.0)
        module.mean.update(5.0)
        torch.rand(3)
    assert module.training
    assert "log" not in vars(module)
    assert module.mean.compute() == 3.0
    assert torch.equal(torch.get_rng_state(), state)
