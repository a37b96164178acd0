"""A frozen teacher inside a training: named where it is routed, and dense where it is left out."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from foreign import SelfAttention
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_lighthouse import LighthouseConfig, patch_attention
from lightning_lighthouse.checks import LighthouseWarning

CONFIG = LighthouseConfig(2, 2, 8)
INPUTS = torch.randn(2, 64, 16, generator=torch.Generator().manual_seed(0))


class Distilled(nn.Module):
    """A student that learns a teacher's outputs, the teacher in train mode as it was made."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.student, self.teacher = SelfAttention(16, 2), SelfAttention(16, 2).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.target = self.teacher(x)
        return F.mse_loss(self.student(x), self.target)


MESSAGE = (
    r"^1 of 2 attention layers were routed to Lighthouse and train nothing: teacher: it ran without gradients in train "
    r"mode, while others ran with them \(a frozen teacher's outputs are then not its own: leave it dense with "
    r"dense_layers, or choose the layers to train with select\)$"
)


def test_a_routed_teacher_is_named():
    model = Distilled()
    with pytest.raises(RuntimeError, match=MESSAGE), patch_attention(model, CONFIG):
        model(INPUTS).backward()


def test_or_warned_of():
    model = Distilled()
    with patch_attention(model, CONFIG) as patch:
        model(INPUTS).backward()
        with pytest.warns(LighthouseWarning, match=MESSAGE):
            patch.check("warn")


@pytest.mark.parametrize("settings", [{"select": "student"}, {"dense_layers": [1]}])
def test_a_teacher_that_is_left_out_is_its_own(settings):
    model = Distilled()
    expected = model.teacher(INPUTS)
    with patch_attention(model, CONFIG, **settings) as patch:
        model(INPUTS).backward()
        patch.check()
        assert torch.equal(model.target, expected)


def check_dense_and_named_in_eval_mode(model):
    model.teacher.eval()
    expected = model.teacher(INPUTS)
    words = "stayed dense: teacher: it ran without gradients in eval mode"
    with pytest.raises(RuntimeError, match=words), patch_attention(model, CONFIG):
        model(INPUTS).backward()
    assert torch.equal(model.target, expected)


def test_a_teacher_in_eval_mode_stays_dense_and_is_named():
    check_dense_and_named_in_eval_mode(Distilled())


def test_both_faults_are_named():
    class Three(Distilled):
        def __init__(self):
            super().__init__()
            self.unused = SelfAttention(16, 2)

    model = Three()
    words = r"^1 of 3 .* stayed dense: unused: its forward did not run .*; 1 of 3 .* train nothing: teacher: "
    with pytest.raises(RuntimeError, match=words), patch_attention(model, CONFIG):
        model(INPUTS).backward()


def test_a_layer_that_also_trains_is_no_teacher():
    model = Distilled()
    model.teacher = nn.Identity()
    with patch_attention(model, CONFIG) as patch:
        # as a policy is asked for its old probabilities
        with torch.no_grad():
            model.student(INPUTS)
        model(INPUTS).backward()
        patch.check()


def test_who_only_looks_at_the_outputs_is_told_nothing():
    model = Distilled()
    with patch_attention(model, CONFIG) as patch, torch.no_grad():
        model(INPUTS)
        patch.check()


@pytest.mark.parametrize("reentrant", [True, False])
def test_the_first_forward_of_a_checkpoint_is_no_teachers(reentrant):
    model = Distilled()
    model.teacher = nn.Identity()
    x = INPUTS.clone().requires_grad_()
    with patch_attention(model, CONFIG) as patch:
        checkpoint(model, x, use_reentrant=reentrant).backward()
        patch.check()


class Unguarded(Distilled):
    """The teacher runs with gradients on, of which it needs none."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.target = self.teacher(x)
        return F.mse_loss(self.student(x), self.target)


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_a_frozen_teacher_in_eval_mode_needs_no_grad_to_stay_dense(reentrant):
    class Checkpointed(Unguarded):
        def forward(self, x):
            self.target = self.teacher(x) if reentrant is None else again(self.teacher, x)
            return F.mse_loss(self.student(x), self.target)

    def again(module, x):
        return checkpoint(module, x, use_reentrant=reentrant)

    model = Checkpointed()
    check_dense_and_named_in_eval_mode(model)
    with patch_attention(model, CONFIG, select="student") as patch:
        model(INPUTS).backward()
        patch.check()


def test_one_in_train_mode_is_warned_of():
    model = Unguarded()
    words = r"^routed layers that train nothing, .*: teacher; .*leave it dense with dense_layers"
    with patch_attention(model, CONFIG) as patch:
        model(INPUTS).backward()
        with pytest.warns(LighthouseWarning, match=words):
            patch.check()


class Stack(nn.Module):
    """Two layers, the first one frozen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = SelfAttention(16, 2).requires_grad_(False), SelfAttention(16, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x)).square().mean()


def test_frozen_first_layers_train_on_and_what_passes_gradients_on_is_no_teacher(recwarn):
    def told():
        return [str(warning.message) for warning in recwarn if "that train nothing" in str(warning.message)]

    # frozen, but what comes before it is not: LoRA, prompts, a projection in front
    model = Stack()
    for is_eval in (False, True):
        model.first.train(not is_eval)
        with patch_attention(model, CONFIG) as patch:
            model(INPUTS.clone().requires_grad_()).backward()
            patch.check()
    assert not told()
    model.first.train()
    with patch_attention(model, CONFIG) as patch:
        model(INPUTS).backward()
        patch.check()
    assert [line.partition("gradients: ")[2].partition(";")[0] for line in told()] == ["first"]


@pytest.mark.parametrize("is_eval", [False, True])
def test_a_reference_copied_from_a_patched_model_is_warned_of_or_dense(is_eval, recwarn):
    model = Stack().requires_grad_(True)
    dense = copy.deepcopy(model)(INPUTS)
    with patch_attention(model, CONFIG) as patch:
        reference = copy.deepcopy(model).train(not is_eval)
        with torch.no_grad():
            found = reference(INPUTS)
        (model(INPUTS) + found).backward()
        patch.check()
    told = [str(warning.message) for warning in recwarn if "copies of" in str(warning.message)]
    assert [line.startswith("copies of first, last, made since") for line in told] == ([] if is_eval else [True])
    assert torch.equal(found, dense) is is_eval


def test_an_average_that_runs_in_no_training_batch_is_no_reference(recwarn):
    model = Stack().requires_grad_(True)
    with patch_attention(model, CONFIG) as patch:
        average = copy.deepcopy(model)
        model(INPUTS).backward()
        with patch.paused(), torch.no_grad():
            average(INPUTS)
        patch.check()
    assert not [warning for warning in recwarn if "copies of" in str(warning.message)]
