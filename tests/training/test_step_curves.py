"""What a step shows of speed, FLOPs and gradients, and that two points share no batch."""

from __future__ import annotations

import math

import pytest
import torch
from fitting import CONFIG, fit, module
from foreign import ForeignModule
from lightning.pytorch import Callback

from lightning_lighthouse import Documents, LighthouseCallback, Phase
from lightning_lighthouse.model.flops import (
    attention_size,
    num_used_parameters,
    pairs_inside,
    pairs_per_token,
    train_flops_per_token,
)
from lightning_lighthouse.phases.ledger import PhaseTotals
from lightning_lighthouse.routing.targets import find_targets
from lightning_lighthouse.training.attention_curves import AttentionCurves
from lightning_lighthouse.training.gradient_norm import gradient_norm
from lightning_lighthouse.training.step_curves import StepCurves, peak_memory


class Trainer:
    """As much of one as the curves ask."""

    log_every_n_steps = 2
    world_size = 2
    datamodule = None

    class strategy:  # noqa: N801
        root_device = torch.device("cpu")

        @staticmethod
        def reduce(value, reduce_op):
            return value


class Points(list):
    def scalars(self, phase, step, values):
        self.append((phase, step, values))

    def join(self, phase, step, values):
        self.append((f"{phase}, joined", step, values))


def walk(peak, batch, *, steps=6, switch=4):
    """Two phases of equal batches, each of which takes a second, half of the first phase's waiting."""
    trainer, points, model = Trainer(), Points(), ForeignModule()
    attention = AttentionCurves(trainer, model, None, None, keeps_documents=False)
    curves = StepCurves(trainer, points, attention, peak)
    totals = {"lighthouse": PhaseTotals(), "dense": PhaseTotals()}
    phase_at = lambda step: "lighthouse" if step < switch else "dense"  # noqa: E731
    for step in range(steps):
        phase, after = phase_at(step), phase_at(step + 1)
        if step == switch:
            curves.meet("lighthouse")
        curves.begin(batch, step, phase, after, totals[phase])
        curves.add_loss(torch.tensor(float(step)))
        curves.read(after, totals[phase])
        # the first batch of a phase is not timed
        if step not in (0, switch):
            totals[phase].paced_tokens += batch.numel()
            totals[phase].paced_seconds += 1.0
            totals[phase].paced_waiting += 0.5 if phase == "lighthouse" else 0.0
        curves.add_time(totals[phase], 1)
        curves.write()
    return model, {(phase, step): values for phase, step, values in points}


def test_points_are_those_asked_for_and_those_around_a_switch():
    batch = torch.zeros(3, 65, dtype=torch.int64)
    _, points = walk(2e9, batch)
    assert list(points) == [
        ("lighthouse", 0),
        ("lighthouse", 2),
        ("lighthouse", 3),
        ("dense", 4),
        ("lighthouse, joined", 4),
    ]
    assert "perf/step_seconds" not in points["lighthouse", 0]
    for key in (("lighthouse", 2), ("lighthouse", 3)):
        assert points[key]["perf/step_seconds"] == 1.0
        assert points[key]["perf/tokens_per_second"] == batch.numel()
        assert points[key]["perf/data_wait_share"] == 0.5
    assert points["lighthouse, joined", 4] == {"train/loss": 4.0}


def test_utilization_is_flops_over_time_peak_and_devices():
    batch = torch.zeros(3, 65, dtype=torch.int64)
    model, points = walk(2e9, batch)
    sizes = [attention_size(layer) for layer in find_targets(model).values()]
    flops = train_flops_per_token(num_used_parameters(model), sizes, [pairs_per_token("dense", 65)] * len(sizes))
    values = points["lighthouse", 2]
    assert values["perf/tflops"] == pytest.approx(flops * batch.numel() / 2 / 1e12)
    assert values["perf/mfu"] == pytest.approx(flops * batch.numel() / 2 / 2e9)
    assert values["perf/mfu"] == values["perf/mfu_dense_equivalent"]


def test_an_unknown_card_has_flops_and_no_utilization():
    _, points = walk(None, torch.zeros(3, 65, dtype=torch.int64))
    assert {name for name in points["lighthouse", 2] if "mfu" in name or "tflops" in name} == {"perf/tflops"}


class Flops(Callback):
    """What the attention of each step is said to cost, a token, before its documents are forgotten."""

    def __init__(self, callback):
        self.callback, self.found = callback, []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        curves = self.callback._fit._steps._attention
        self.found.append(curves._flops_per_token(curves._sizes))


def test_each_phase_counts_its_own_pairs(tmp_path):
    phases = [Phase(2, ["window"], window=16, sink_tokens=2), Phase(6, ["lighthouse", "dense"], attention=CONFIG)]
    callback = LighthouseCallback(phases=phases, return_steps=2)
    flops = Flops(callback)
    model, _ = fit(tmp_path, [callback, flops], module())
    sizes = [attention_size(layer) for layer in find_targets(model).values()]
    parameters = num_used_parameters(model)
    num_tokens = 129

    def expected(*pairs):
        return pytest.approx(train_flops_per_token(parameters, sizes, list(pairs)))

    sparse = pairs_per_token("lighthouse", num_tokens, CONFIG)
    assert sparse < num_tokens
    dense = expected(*[num_tokens] * 4)
    own = [pair[0] for pair in flops.found]
    assert own[:2] == [expected(*[18] * 4)] * 2
    assert own[2:4] == [expected(sparse, num_tokens, sparse, num_tokens)] * 2
    # the last routed layer is handed back first
    assert own[4] == expected(sparse, num_tokens, num_tokens, num_tokens)
    assert own[6:] == [dense] * 4
    assert [pair[1] for pair in flops.found] == [dense] * 10


class Packed(ForeignModule):
    """Two documents in each sequence."""

    def documents(self, batch):
        return Documents([[100, 28]] * len(batch))


@pytest.mark.parametrize("enabled", [True, False], ids=["lighthouse", "baseline"])
def test_inside_documents_each_batch_counts_its_pairs(tmp_path, enabled):
    callback = LighthouseCallback(1, CONFIG, dense_layers=[0], documents=True, enabled=enabled)
    flops = Flops(callback)
    model, _ = fit(tmp_path, [callback, flops], Packed(layers=2), max_steps=2)
    sizes = [attention_size(layer) for layer in find_targets(model).values()]
    documents = model.documents(range(2))
    dense, sparse = (pairs_inside(kind, documents, CONFIG) for kind in ("dense", "lighthouse"))
    assert sparse < dense < 128
    expected = [[dense, sparse if enabled else dense], [dense, dense]]
    parameters = num_used_parameters(model)
    assert [own for own, _ in flops.found] == [train_flops_per_token(parameters, sizes, pairs) for pairs in expected]
    assert {of_dense for _, of_dense in flops.found} == {train_flops_per_token(parameters, sizes, [dense, dense])}


def test_the_gradient_norm_is_that_of_all_parameters():
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Embedding(7, 2, sparse=True))
    layer[0](torch.randn(2, 3)).square().sum().backward()
    # one token twice: a sparse gradient with the same row twice
    layer[1](torch.tensor([1, 1, 4])).sum().backward()
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    squares = sum(p.grad.to_dense().double().square().sum() for p in layer.parameters())
    assert float(gradient_norm(optimizer, Trainer())) == pytest.approx(math.sqrt(squares), rel=1e-6)
    layer.zero_grad()
    assert gradient_norm(optimizer, Trainer()) is None


def test_memory_of_a_cpu_is_the_process():
    assert 2**20 < peak_memory(torch.device("cpu")) < 2**45
