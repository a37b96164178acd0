"""A model is asked for its losses and choices without all of its logits, and the answers are the same."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from foreign import GPT, VOCABULARY, ForeignModule
from long_contexts import Induction
from torch import nn

from lightning_lighthouse.evaluation import scoring
from lightning_lighthouse.evaluation.scoring import Scorer, offers_losses
from lightning_lighthouse.model import Decoder

TOKENS = torch.randint(VOCABULARY, (2, 38), generator=torch.Generator().manual_seed(0))
INPUTS, TARGETS = TOKENS[:, :-1], TOKENS[:, 1:]
CANDIDATES = torch.tensor([3, 17, 5])


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def gpt() -> GPT:
    torch.manual_seed(0)
    return GPT(layers=2).eval()


class Wrapped(nn.Module):
    """A model whose output is changed on its way out."""

    def __init__(self, change) -> None:
        super().__init__()
        self.model, self.change, self.widths = gpt(), change, []
        self.model.head.register_forward_hook(lambda part, args, out: self.widths.append(out.shape[1]))

    def forward(self, inputs):
        return self.change(self.model(inputs))


CHANGES = {
    "logits": lambda x: x,
    "an object with logits": lambda x: SimpleNamespace(logits=x),
    "capped behind the head": lambda x: 3 * torch.tanh(x / 3),
    "all tokens are needed": lambda x: x if x.shape[1] == scoring.SHORT else x.reshape(2, 37, VOCABULARY),
}


@pytest.mark.parametrize("name", CHANGES)
def test_losses_and_choices_are_those_of_all_logits(name, monkeypatch):
    # chunks that do not divide the sequence
    monkeypatch.setattr(scoring, "CHUNK", 10)
    model = Wrapped(CHANGES[name])
    output = model(INPUTS)
    logits = output if isinstance(output, torch.Tensor) else output.logits
    losses = F.cross_entropy(logits.flatten(0, 1), TARGETS.flatten(), reduction="none").view_as(TARGETS)
    model.widths.clear()
    scorer = Scorer(model)
    found = scorer.predict(INPUTS, TARGETS)
    assert torch.allclose(found.losses, losses, atol=1e-6)
    assert torch.equal(found.is_first, logits.argmax(-1) == TARGETS)
    assert torch.equal(scorer.losses(INPUTS, TARGETS), found.losses)
    assert torch.allclose(scorer.choices(INPUTS, CANDIDATES), logits[:, -1, CANDIDATES], atol=1e-6)
    # the head is asked for one token at a time in place of the sequence, or else for all of them
    is_short = name in ("logits", "an object with logits")
    assert (37 in model.widths) == (not is_short)
    assert scorer.num_tokens == 3 * INPUTS.numel()


def test_a_module_that_gives_losses_alone_is_asked_once_for_each_candidate():
    class Losses(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = gpt()

        def token_losses(self, inputs, targets):
            logits = self.model(inputs).flatten(0, 1)
            return F.cross_entropy(logits, targets.flatten(), reduction="none").view_as(targets)

    logits = gpt()(INPUTS)[:, -1].log_softmax(-1)[:, CANDIDATES]
    scorer = Scorer(Losses())
    assert torch.allclose(scorer.choices(INPUTS, CANDIDATES), logits, atol=1e-5)
    assert scorer.predict(INPUTS, TARGETS).is_first is None
    assert offers_losses(Losses())


def test_the_decoder_says_what_comes_next_as_its_forward_does():
    torch.manual_seed(0)
    model = Decoder(num_layers=1, dim=16, num_heads=2, ffn_dim=16).eval()
    found = Scorer(model).choices(INPUTS, CANDIDATES)
    assert torch.allclose(found, model(INPUTS)[:, -1, CANDIDATES], atol=1e-6)
    losses = Scorer(model).losses(INPUTS, TARGETS)
    assert torch.allclose(losses, Scorer(model).predict(INPUTS, TARGETS).losses, atol=1e-5)


def test_a_module_that_gives_neither_is_refused():
    assert not offers_losses(ForeignModule())
    assert not offers_losses(nn.Module())
    assert offers_losses(Induction(8, 8))

    class Strange(nn.Module):
        def forward(self, inputs):
            return torch.zeros(3)

    with pytest.raises(TypeError, match=r"needs a Strange with a method token_losses.*returned a tensor \[3\]"):
        Scorer(Strange()).losses(INPUTS, TARGETS)
