"""selection="random" draws anew for each training step, and alike within one: compiled, checkpointed, resumed."""

from __future__ import annotations

import pytest
import torch
from all_lighthouse import all_lighthouse
from fitting import fit
from foreign import GPT
from lightning.pytorch.callbacks import Callback
from patching import CheckpointedBlocks, run, same, tokens
from torch._dynamo.testing import CompileCounterWithBackend

from lightning_lighthouse import LighthouseConfig, lighthouse_attention, patch_attention
from lightning_lighthouse.routing.scope import scopes

CONFIG = LighthouseConfig(num_levels=2, pooling_factor=2, top_k=8, selection="random")


@pytest.fixture(autouse=True)
def _dynamo_starts_anew():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def steps(model, numbers, prepare=lambda model: None):
    """Output and gradients of the routed model at each of the steps."""
    with patch_attention(model, CONFIG) as patch:
        prepare(model)
        results = []
        for number in numbers:
            patch.set_step(number)
            results.append(run(model, tokens()))
    return results


def model(kind=GPT):
    torch.manual_seed(0)
    return kind()


def test_a_step_draws_alike_and_the_next_one_anew():
    first, again, second = steps(model(), [3, 3, 4])
    assert same(first, again)
    assert not same(first, second)


def test_the_recomputation_draws_what_the_forward_drew():
    assert all(
        same(*pair, exact=False)
        for pair in zip(steps(model(), [0, 5]), steps(model(CheckpointedBlocks), [0, 5]), strict=True)
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", [GPT, CheckpointedBlocks], ids=["plain", "checkpointed"])
def test_a_compiled_model_draws_for_each_step_without_a_recompilation(kind):
    counter = CompileCounterWithBackend("aot_eager")
    eager = steps(model(kind), range(4))
    compiled = steps(model(kind), range(4), lambda model: model.compile(backend=counter, fullgraph=True))
    assert all(same(*pair, exact=False) for pair in zip(eager, compiled, strict=True))
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_a_compiled_layer_reads_the_step(backend):
    if torch.cuda.is_available() and backend == "reference":
        pytest.skip("the same on the CPU")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = LighthouseConfig(2, 2, 4, selection="random", backend=backend)
    qkv = [torch.randn(1, 1, 41, 3, device=device) for _ in range(3)]
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.tensor(0)

    @torch.compile(backend=counter, fullgraph=True)
    def layer(q, k, v, step):
        return lighthouse_attention(q, k, v, config, step=step)

    outputs = []
    for number in (0, 1, 2**20):
        step.fill_(number)
        outputs.append(layer(*qkv, step))
        assert torch.equal(outputs[-1], lighthouse_attention(*qkv, config, step=torch.tensor(number)))
    assert not torch.equal(outputs[0], outputs[1])
    assert counter.frame_count == 1


class Steps(Callback):
    """The step of the patch in each training batch."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen += [int(scope.step) for scope in scopes]


def test_the_callback_tells_the_optimizer_step_also_after_a_resume(tmp_path):
    steps = Steps()
    # two batches a step
    _, trainer = fit(tmp_path, [all_lighthouse(9, CONFIG), steps], max_steps=3, accumulate_grad_batches=2)
    assert steps.seen == [0, 0, 1, 1, 2, 2]
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    resumed = Steps()
    fit(
        tmp_path,
        [all_lighthouse(9, CONFIG), resumed],
        max_steps=5,
        accumulate_grad_batches=2,
        ckpt_path=tmp_path / "last.ckpt",
    )
    assert resumed.seen == [3, 3, 4, 4]
