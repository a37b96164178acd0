"""`documents=True` is refused where more than attention goes from token to token, and nowhere else."""

from __future__ import annotations

import pytest
from families import GROUPED
from fitting import fit
from foreign import GPT, ForeignModule
from torch import nn

from lightning_lighthouse import Documents, LighthouseCallback, patch_attention
from lightning_lighthouse.checks import SettingError
from lightning_lighthouse.cli.layer_check import check_layers
from lightning_lighthouse.routing.scope import scopes

FOUR_LAYERS = GROUPED | {"num_hidden_layers": 4}
LINEAR = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
HYBRIDS = {
    "Qwen3_5TextConfig": {"head_dim": 8, **LINEAR},
    "Qwen3NextConfig": {"head_dim": 8, "num_experts": 2, "moe_intermediate_size": 16, **LINEAR},
    "Lfm2Config": {"layer_types": ["conv", "full_attention"] * 2},
    "MiniMaxConfig": {"head_dim": 8, "num_local_experts": 2},
    "RecurrentGemmaConfig": {"head_dim": 8, "lru_width": 48},
}
# than transformers 5.0, the oldest that is asked for; all others are there
NEWER = {"Qwen3_5TextConfig"}
ALONE = {
    "LlamaConfig": {},
    "MistralConfig": {},
    "Qwen3Config": {"head_dim": 8},
    "Gemma3TextConfig": {"head_dim": 8},
    "Phi3Config": {"pad_token_id": 0},
    "Olmo2Config": {},
    "MixtralConfig": {"num_local_experts": 2},
    "Lfm2Config": {"layer_types": ["full_attention"] * 4},
    # its projections are called Conv1D
    "GPT2Config": {"n_embd": 48, "n_layer": 4, "n_head": 6, "n_positions": 128},
}


def causal_model(config, settings):
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    if config in NEWER and not hasattr(transformers, config):
        pytest.skip(f"this transformers has no {config}")
    if config != "GPT2Config":
        settings = FOUR_LAYERS | settings
    made = getattr(transformers, config)(vocab_size=31, **settings)
    return transformers.AutoModelForCausalLM.from_config(made, attn_implementation="sdpa")


@pytest.mark.parametrize("config", HYBRIDS)
def test_a_hybrid_family_is_refused_and_left_as_it_was(config):
    model = causal_model(config, HYBRIDS[config])
    name = model.config._attn_implementation
    with pytest.raises(SettingError, match=r"documents=True .* carries tokens of one document into the next") as error:
        patch_attention(model, documents=True)
    assert "\n" not in str(error.value)
    assert scopes == []
    assert model.config._attn_implementation == name
    patch_attention(model, documents="ignore").restore()


@pytest.mark.parametrize("config", ALONE)
def test_a_family_of_attention_alone_stays_inside_documents(config):
    model = causal_model(config, ALONE[config])
    patch_attention(model, documents=True).restore()


def test_layers_that_only_a_config_tells_of_are_refused():
    model = causal_model("LlamaConfig", {})
    # as code of other people's, whose classes are called anything
    model.config.layer_types = ["full_attention", "linear_attention"] * 2
    with pytest.raises(SettingError, match=r"has layers of .linear_attention. in layer_types"):
        patch_attention(model, documents=True)


class Beside(GPT):
    """With something beside the attention of its blocks."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.beside = mixer


class GatedLinearAttention(nn.Module):
    """As packages of linear attention have it."""


@pytest.mark.parametrize(
    "mixer",
    [nn.Conv1d(16, 16, 4, padding=3, groups=16), nn.GRU(16, 16), GatedLinearAttention()],
    ids=["convolution", "recurrent", "linear attention"],
)
def test_what_looks_back_beside_attention_is_named(mixer):
    model = Beside(mixer)
    with pytest.raises(SettingError, match=rf"but beside \({type(mixer).__name__}\) carries tokens"):
        patch_attention(model, documents=True)
    with pytest.raises(SettingError, match="beside"):
        check_layers(LighthouseCallback(documents=True), model, None)
    patch_attention(model).restore()
    check_layers(LighthouseCallback(), model, None)


@pytest.mark.parametrize("projection", [nn.Conv1d(16, 16, 1), nn.Conv2d(3, 16, 4)], ids=["of size 1", "of images"])
def test_convolutions_that_are_not_over_tokens_are_none(projection):
    patch_attention(Beside(projection), documents=True).restore()


def test_a_tower_of_sounds_is_passed_over():
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    sound = transformers.WhisperConfig(
        d_model=16, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=16, num_mel_bins=4
    )
    model = nn.ModuleDict({"text": GPT(), "sound": transformers.models.whisper.modeling_whisper.WhisperEncoder(sound)})
    patch_attention(model, documents=True, select="text.*").restore()
    with pytest.raises(SettingError, match=r"sound\.conv1"):
        patch_attention(model, documents=True)


class Told(ForeignModule):
    """Says what documents a batch has."""

    def __init__(self):
        super().__init__()
        self.beside = nn.LSTM(16, 16)

    def documents(self, batch):
        return Documents([[100, 28]] * len(batch))


def test_a_dense_baseline_is_refused_too(tmp_path):
    with pytest.raises(SettingError, match=r"beside \(LSTM\)"):
        fit(tmp_path, [LighthouseCallback(enabled=False, documents=True)], Told(), max_steps=1)
    assert scopes == []
