"""Rotary positions that are made to reach further: what belongs to the model stays, and they really change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pretrained import save_model

pytest.importorskip("transformers", reason="needs the extra hf")

import transformers

from lightning_lighthouse.checks import SettingError
from lightning_lighthouse.huggingface import HuggingFaceDecoder
from lightning_lighthouse.huggingface.rope import extend_positions, least_theta, reach_of


def config_of(**settings: Any) -> Any:
    return transformers.GPTNeoXConfig(
        hidden_size=64, num_attention_heads=2, num_hidden_layers=1, max_position_embeddings=64, **settings
    )


@pytest.mark.parametrize(
    "given", [{"rope_type": "linear", "factor": 2.0}, {"rope_type": "yarn", "factor": 2.0}, {"rope_theta": 5e4}]
)
def test_the_share_of_channels_that_are_rotated_stays(given: dict[str, Any]) -> None:
    config = config_of()
    share = config.rope_parameters["partial_rotary_factor"]
    assert share < 1
    theta = given.get("rope_theta")
    extend_positions(config, 128, theta, None if theta else given)
    assert config.rope_parameters["partial_rotary_factor"] == share
    assert config.max_position_embeddings == reach_of(config) == 128


def test_of_one_way_of_scaling_nothing_is_left_beside_another() -> None:
    config = config_of()
    extend_positions(config, 128, None, {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16.0})
    extend_positions(config, 128, None, {"rope_type": "linear", "factor": 3.0})
    assert "beta_fast" not in config.rope_parameters
    assert config.rope_parameters["factor"] == 3.0


@pytest.mark.parametrize(("theta", "reach", "channels"), [(1e5, 8192, 64), (5e5, 8192, 128), (1e4, 2048, 80)])
@pytest.mark.parametrize("times", [2, 3, 8, 32])
def test_from_the_least_theta_on_no_channel_turns_further_than_it_has(
    theta: float, reach: int, channels: int, times: int
) -> None:
    pairs = torch.arange(0, channels, 2, dtype=torch.float64) / channels
    turned = reach * theta**-pairs
    had_not = turned < 2 * torch.pi
    assert had_not.any()
    for factor, is_enough in ((1.0001, True), (0.98, False)):
        turns = times * reach * (factor * least_theta(theta, reach, times * reach, channels)) ** -pairs
        assert bool((turns[had_not] <= turned[had_not]).all()) is is_enough


def test_where_no_theta_helps_or_none_is_needed_it_stays() -> None:
    # all channels have come full circle; and the first never depends on theta
    assert least_theta(10.0, 8192, 65536, 64) == 10.0
    assert least_theta(1e4, 6, 64, 64) == 1e4


def test_a_theta_that_is_too_low_is_said(recwarn: pytest.WarningsRecorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_lighthouse.notices._given", set())
    settings: dict[str, Any] = {"hidden_size": 576, "num_attention_heads": 9, "max_position_embeddings": 8192}
    for theta, is_said in ((3e6, False), (1e6, True)):
        config = transformers.LlamaConfig(**settings, rope_parameters={"rope_type": "default", "rope_theta": 1e5})
        extend_positions(config, 65536, theta, None)
        said = [str(warning.message) for warning in recwarn if "theta" in str(warning.message)]
        assert len(said) == int(is_said)
    assert "rope_theta 1,000,000 is low for 65,536 tokens" in said[0]
    assert "made for 8,192 with 100,000" in said[0]
    assert "from 2,785,762 on" in said[0]


def test_dynamic_frequencies_change_beyond_what_the_model_was_made_for(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    reach = HuggingFaceDecoder(folder).config.max_position_embeddings
    module = HuggingFaceDecoder(folder, 2 * reach, rope_parameters={"rope_type": "dynamic", "factor": 4.0})
    assert reach_of(module.config) == 4 * reach
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(module.config)
    x = torch.zeros(1, 2 * reach, 8)
    rotary(x, torch.arange(reach)[None])
    before = rotary.inv_freq.clone()
    rotary(x, torch.arange(2 * reach)[None])
    assert (rotary.inv_freq[1:] < before[1:]).all()
    with pytest.raises(SettingError, match="at most"):
        HuggingFaceDecoder(folder, 5 * reach, rope_parameters={"rope_type": "dynamic", "factor": 4.0})
