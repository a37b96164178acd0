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


# Llama 3.1: made for 8,192, taken to 131,072 by a factor of 8 and a training
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 16.0}
PHI = {"rope_type": "longrope", "short_factor": [1.0] * 32, "long_factor": [1.0 + 0.5 * i for i in range(32)]}
LINEAR = {"rope_type": "linear", "factor": 4.0}


def scaled(parameters: dict[str, Any], reach: int = 131072) -> Any:
    original = {} if parameters["rope_type"] in ("linear", "dynamic") else {"original_max_position_embeddings": 8192}
    return transformers.LlamaConfig(
        hidden_size=128, num_attention_heads=2, num_hidden_layers=1, max_position_embeddings=reach, pad_token_id=None,
        rope_parameters={"rope_theta": 5e5, **parameters, **original},
    )  # fmt: skip


def frequencies(config: Any, length: int) -> tuple[torch.Tensor, float]:
    """Those of transformers, of the last position of a sequence; and the scale of attention."""
    make = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS.get(config.rope_parameters["rope_type"])
    if make is None:
        channels = config.hidden_size // config.num_attention_heads
        pairs = torch.arange(0, channels, 2) / channels
        return config.rope_parameters["rope_theta"] ** -pairs.double(), 1.0
    found, scale = make(config, device="cpu", seq_len=length)
    return found.double(), scale


@pytest.mark.parametrize("parameters", [LLAMA3, YARN, PHI, LINEAR], ids=lambda given: given["rope_type"])
@pytest.mark.parametrize("inside", [False, True], ids=["rope_theta", "rope_parameters"])
def test_a_scaled_model_reaches_further_by_a_theta_that_is_judged_as_any_other(
    parameters: dict[str, Any], inside: bool, recwarn: pytest.WarningsRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    reach, length = 131072, 262144
    turned, scale = frequencies(scaled(parameters), length)
    had_not = turned * reach < 2 * torch.pi
    assert 0 < had_not.sum() < len(had_not)
    said = []
    for theta in (5e5, 1e6, 4e6, 3e7):
        monkeypatch.setattr("lightning_lighthouse.notices._given", set())
        recwarn.clear()
        config = scaled(parameters)
        # told again or not, what is the model's has not changed
        given = {"rope_theta": theta, "rope_type": parameters["rope_type"]}
        extend_positions(config, length, *((None, given) if inside else (theta, None)))
        assert reach_of(config) == length
        assert config.rope_parameters["rope_theta"] == theta
        turns, new_scale = frequencies(config, length)
        is_said = any(f"is low for {length:,} tokens" in str(warning.message) for warning in recwarn)
        assert is_said == bool((turns * length > turned * reach * (1 + 1e-6))[had_not].any())
        assert new_scale == scale
        said.append(is_said)
    assert said[0]
    assert not said[-1]


@pytest.mark.parametrize(
    ("parameters", "given", "furthest"),
    [
        (LLAMA3, {"factor": 16.0}, 262144),
        (LLAMA3, {"factor": 4.0}, 131072),
        (LLAMA3, {"factor": 8.0, "low_freq_factor": 2.0}, 131072),
        (YARN, {"factor": 32.0}, 262144),
        (YARN, {"factor": 32.0, "rope_theta": 1e6}, 262144),
        (PHI, {"long_factor": [40.0] * 32}, 131072),
        (PHI, {"factor": 32.0}, 262144),
        ({"rope_type": "dynamic", "factor": 2.0}, {"factor": 4.0}, 524288),
        ({"rope_type": "dynamic", "factor": 2.0}, {"rope_theta": 1e7}, 262144),
    ],
)
def test_a_line_names_what_the_factor_reaches_and_no_less_than_the_model_does(
    parameters: dict[str, Any], given: dict[str, Any], furthest: int
) -> None:
    extend_positions(scaled(parameters), furthest, None, given)
    line = rf"sequence_length must be at most {furthest:,} with rope_parameters .*, got {furthest + 1:,}: raise the fac"
    with pytest.raises(SettingError, match=line):
        extend_positions(scaled(parameters), furthest + 1, None, given)


def test_without_a_setting_a_model_reaches_what_it_was_made_for() -> None:
    for parameters, reach, kind in (
        (LLAMA3, 131072, "rope_theta or rope_parameters"),
        ({"rope_type": "dynamic", "factor": 2.0}, 262144, "rope_parameters with a greater factor"),
    ):
        extend_positions(scaled(parameters), reach, None, None)
        with pytest.raises(SettingError, match=rf"at most the {reach:,} positions .* got {reach + 1:,}: give {kind}"):
            extend_positions(scaled(parameters), reach + 1, None, None)
