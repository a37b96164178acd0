"""How the layers of a model attend by default: by their number, and by the windows that they are made with."""

from __future__ import annotations

import pytest
from torch import nn

from lightning_lighthouse.routing.default_types import default_layer_types


class Layer(nn.Module):
    def __init__(self, sliding_window: int | None = None) -> None:
        super().__init__()
        self.sliding_window = sliding_window


def layers(*windows: int | None) -> dict[str, nn.Module]:
    return {f"layers.{number}": Layer(window) for number, window in enumerate(windows)}


@pytest.mark.parametrize(
    ("windows", "expected"),
    [
        ([None] * 2, ("window", "lighthouse")),
        ([None] * 8, ("window", "window", "window", "lighthouse") * 2),
        # all alike: sequences are within them
        ([4096] * 5, ("lighthouse", "window", "window", "window", "lighthouse")),
        ([512, 512, None], ("lighthouse",)),
        # the last one has a window
        ([512, None, 512, None, 512], ("lighthouse",)),
    ],
)
def test_windows_of_the_models_own_are_the_mixture(windows, expected):
    assert default_layer_types(layers(*windows)) == expected


def test_the_layers_of_a_family_that_mixes_windows_are_found_in_its_config():
    transformers = pytest.importorskip("transformers")
    config = transformers.Gemma3TextConfig(
        vocab_size=31, hidden_size=16, intermediate_size=16, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, sliding_window=16,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    found = {name: part for name, part in model.named_modules() if name.endswith("self_attn")}
    assert len(found) == 4
    assert default_layer_types(found) == ("lighthouse",)
