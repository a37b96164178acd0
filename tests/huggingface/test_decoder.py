"""A model of transformers as a LightningModule: the same losses, gradients and layers; settings; faults in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partialmethod
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from all_lighthouse import all_lighthouse
from places import HELPERS, ROOT
from pretrained import FAMILIES, draw_tokens, load_model, save_model
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.data import DataLoader

from lightning_lighthouse import LighthouseConfig, notices
from lightning_lighthouse.checks import SettingError
from lightning_lighthouse.context.group import Context, entered

pytest.importorskip("transformers", reason="needs the extra hf")

from lightning_lighthouse.huggingface import HuggingFaceDecoder
from lightning_lighthouse.huggingface.export import export
from lightning_lighthouse.huggingface.trained import load_trained

pytestmark = pytest.mark.usefixtures("own_folder")

CONFIG = LighthouseConfig(num_levels=2, pooling_factor=2, top_k=8)
QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
}


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a training leaves goes there."""
    monkeypatch.chdir(tmp_path)


def made(folder: str, **settings: Any) -> HuggingFaceDecoder:
    """A module whose weights are read, as a Trainer has it done."""
    module = HuggingFaceDecoder(folder, **settings)
    module.configure_model()
    return module


def fit(module: pl.LightningModule, steps: int = 4, **settings: Any) -> pl.Trainer:
    trainer = pl.Trainer(max_steps=steps, max_epochs=-1, **{**QUIET, **settings})
    trainer.fit(module, DataLoader([{"tokens": draw_tokens()}] * steps, batch_size=None))
    return trainer


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_all_logits_at_once(tmp_path: Path, family: str) -> None:
    folder = save_model(tmp_path / "model", family)
    module, plain = made(folder, loss_chunk=17), load_model(folder).train()
    tokens = draw_tokens()
    loss = module.loss(tokens)
    logits = plain(input_ids=tokens[:, :-1]).logits
    expected = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    loss.backward()
    expected.backward()
    for (name, ours), (_, theirs) in zip(module.model.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5, msg=name)
    losses = module.token_losses(tokens[:, :-1], tokens[:, 1:])
    assert losses.shape == (2, 96)
    assert losses.mean().item() == pytest.approx(expected.item(), abs=1e-5)


def test_positions_are_those_of_the_whole_sequence_where_ranks_share_it(tmp_path: Path) -> None:
    module, seen = made(save_model(tmp_path / "model")), []
    module.model.base_model.register_forward_pre_hook(
        lambda part, args, kwargs: seen.append(kwargs.get("position_ids")), with_kwargs=True
    )
    # nothing is exchanged, for SDPA is torch's own here
    with entered(Context(2, 4, "no group")):
        module.hidden(draw_tokens(length=5))
    assert seen[0].tolist() == [[10, 11, 12, 13, 14]]
    module.hidden(draw_tokens(length=5))
    assert seen[1] is None


def test_positions_by_the_last_one_are_not_shared(tmp_path: Path) -> None:
    parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    module = made(save_model(tmp_path / "model", rope_parameters=parameters))
    with (
        entered(Context(0, 2, "no group")),
        pytest.raises(SettingError, match="rope_type 'dynamic' rotates by the last"),
    ):
        module.loss(draw_tokens())


def test_a_trainer_that_rounds_the_frequencies_is_refused(tmp_path: Path) -> None:
    module = HuggingFaceDecoder(save_model(tmp_path / "model"))
    with pytest.raises(SettingError, match=r"trainer\.precision must be 32-true or mixed"):
        fit(module, 1, precision="bf16-true")


def test_quantized_weights_are_refused(tmp_path: Path) -> None:
    folder = Path(save_model(tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SettingError, match=r"has quantized weights \(fp8\)"):
        HuggingFaceDecoder(str(folder))


def test_a_training_crosses_the_switch_and_recovers_what_it_learnt(tmp_path: Path) -> None:
    module = HuggingFaceDecoder(save_model(tmp_path / "model"), learning_rate=1e-2, warmup_steps=1)
    before = made(module.hparams["model"]).loss(draw_tokens()).item()
    callback = all_lighthouse(switch_at=0.5, attention=CONFIG)
    trainer = fit(module, 12, callbacks=[callback])
    phases = callback.state_dict()["ledger"]["phases"]
    assert (phases["lighthouse"]["steps"], phases["dense"]["steps"]) == (6, 6)
    assert phases["lighthouse"]["routed_calls"] == 6 * 4
    assert trainer.global_step == 12
    assert module.loss(draw_tokens()).item() < before - 0.5


def test_layers_with_windows_of_their_own_keep_them_beside_others(tmp_path: Path, caplog: Any) -> None:
    notices._given.clear()
    module = HuggingFaceDecoder(save_model(tmp_path / "model", "Gemma 3"))
    callback = all_lighthouse(switch_at=0.5, attention=CONFIG)
    with caplog.at_level("INFO"):
        fit(module, callbacks=[callback])
    # one of six sees all of a sequence
    assert callback.state_dict()["ledger"]["phases"]["lighthouse"]["routed_calls"] == 2
    line = "model.model.layers.0.self_attn and 4 other layers keep their own windows, of 16 tokens"
    assert any(line in message for message in caplog.messages)


def test_a_model_of_windows_alone_is_routed_within_them_and_refused_beyond(tmp_path: Path) -> None:
    short = HuggingFaceDecoder(save_model(tmp_path / "short", "Mistral", sliding_window=128))
    fit(short, 2, callbacks=[all_lighthouse(switch_at=1.0, attention=CONFIG)])
    long = HuggingFaceDecoder(save_model(tmp_path / "long", "Mistral", sliding_window=16))
    with pytest.raises(RuntimeError, match="sequences longer than sliding_window=16 cannot be routed"):
        fit(long, callbacks=[all_lighthouse(switch_at=0.5, attention=CONFIG)])


def assert_changes_no_loss(folder: str, **settings: Any) -> None:
    tokens, expected, module = draw_tokens(), made(folder), made(folder, **settings)
    truth, loss = (each.loss(tokens) for each in (expected, module))
    truth.backward()
    loss.backward()
    torch.testing.assert_close(loss, truth)
    for ours, theirs in zip(module.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5)


def test_activation_checkpointing_changes_no_loss(tmp_path: Path) -> None:
    assert_changes_no_loss(save_model(tmp_path / "model"), activation_checkpointing=True)


# inductor takes half a minute where nothing is cached
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_blocks_change_no_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    counter = CompileCounterWithBackend(backend)
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend=counter))
    torch._dynamo.reset()
    assert_changes_no_loss(save_model(tmp_path / "model"), compile=True)
    # the blocks share one graph
    assert counter.frame_count == 1


def test_what_is_frozen_does_not_move(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    module = HuggingFaceDecoder(folder, freeze=["*embed_tokens*", "*.0.*"], learning_rate=1e-2, warmup_steps=0)
    fit(module)
    before = dict(load_model(folder).named_parameters())
    for name, parameter in module.model.named_parameters():
        is_frozen = "embed_tokens" in name or ".0." in name
        assert torch.equal(parameter, before[name]) == is_frozen, name
    with pytest.raises(ValueError, match=r"freeze must match names of parameters, got '\*\.9\.\*'"):
        HuggingFaceDecoder(folder, freeze=["*.9.*"])


def test_weights_are_read_in_the_precision_asked_for(tmp_path: Path) -> None:
    module = made(save_model(tmp_path / "model"), precision="bfloat16")
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
    assert module.loss(draw_tokens()).dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "theta", "reach"),
    [
        ({}, 10_000.0, 160),
        ({"rope_theta": 5e5, "sequence_length": 1000}, 5e5, 1000),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 8.0}, "sequence_length": 1280}, 10_000.0, 1280),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e5}}, 1e5, 160),
        ({"rope_theta": 5e5, "sequence_length": 64}, 5e5, 160),
    ],
)
def test_positions_reach_as_far_as_they_were_told(tmp_path: Path, settings: dict, theta: float, reach: int) -> None:
    module = HuggingFaceDecoder(save_model(tmp_path / "model"), **settings)
    config = module.config
    assert config.rope_parameters["rope_theta"] == theta
    assert config.max_position_embeddings == reach
    expected = {"rope_type": "default", **settings.get("rope_parameters", {})}
    assert config.rope_parameters.items() >= expected.items()
    module.configure_model()
    assert module.model.config.rope_parameters == config.rope_parameters
    assert module.model.config.max_position_embeddings == reach


def test_a_theta_turns_the_frequencies_and_the_global_layers_alone(tmp_path: Path) -> None:
    plain, turned = (made(save_model(tmp_path / "a"), rope_theta=theta) for theta in (None, 1e6))
    assert not torch.equal(*(dict(m.model.named_buffers())["model.rotary_emb.inv_freq"] for m in (plain, turned)))
    gemma = HuggingFaceDecoder(save_model(tmp_path / "b", "Gemma 3"), rope_theta=7e6)
    assert gemma.config.rope_parameters["full_attention"]["rope_theta"] == 7e6
    assert gemma.config.rope_parameters["sliding_attention"]["rope_theta"] == 10_000.0


FAULTS = {
    "positions": (
        {"sequence_length": 161},
        "sequence_length must be at most the 160 positions that the model was made",
    ),
    "factor": (
        {"sequence_length": 641, "rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
        "sequence_length must be at most 640 with rope_parameters",
    ),
    "both": ({"rope_theta": 1e5, "rope_parameters": {}}, "rope_theta and rope_parameters say the same"),
    "theta": ({"rope_theta": 0.0}, "rope_theta must be a number greater than 0, got 0.0"),
    "type": ({"rope_parameters": {"rope_type": "yarns"}}, "rope_type must be one of default, linear"),
    "keys": ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters: .*factor"),
    "precision": ({"precision": "bf16"}, "precision must be one of 'float32', 'bfloat16'"),
    "freeze": ({"freeze": "*"}, "freeze must be a list of patterns"),
    "rate": ({"learning_rate": 0.0}, "learning_rate must be greater than 0"),
}


@pytest.mark.parametrize(("settings", "line"), FAULTS.values(), ids=FAULTS)
def test_a_wrong_setting_is_one_line(tmp_path: Path, settings: dict, line: str) -> None:
    with pytest.raises(ValueError, match=line) as refused:
        HuggingFaceDecoder(save_model(tmp_path / "model"), **settings)
    assert "\n" not in str(refused.value)


def test_a_gguf_file_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "file.gguf").write_text("no GGUF")
    with pytest.raises(SettingError, match=r"file\.gguf' cannot be read") as refused:
        HuggingFaceDecoder(str(tmp_path / "file.gguf"))
    assert "\n" not in str(refused.value)


def test_without_the_package_that_reads_gguf_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file.gguf").write_text("no GGUF")
    monkeypatch.setattr(
        "lightning_lighthouse.huggingface.reading.find_spec", lambda name: None if name == "gguf" else 1
    )
    with pytest.raises(SettingError, match=r"needs the package gguf.*pip install 'lightning_lighthouse\[gguf\]'"):
        HuggingFaceDecoder(str(tmp_path / "file.gguf"))


def test_a_model_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "t5"}')
    cases = {
        str(tmp_path / "gone"): "got .*gone': no such folder",
        str(tmp_path / "gone.gguf"): "got .*gone.gguf': no such file",
        str(tmp_path / "empty"): "is a folder without config.json",
        str(tmp_path / "other"): "a t5 cannot be trained here",
    }
    for model, line in cases.items():
        with pytest.raises(SettingError, match=line) as refused:
            HuggingFaceDecoder(model)
        assert "\n" not in str(refused.value)
    with pytest.raises(SettingError, match="Gemma2ForCausalLM does not support"):
        HuggingFaceDecoder(save_model(tmp_path / "gemma", "Gemma 2"))
    folder = save_model(tmp_path / "gpt", "GPT-2")
    with pytest.raises(SettingError, match="a gpt2 has no rotary positions"):
        HuggingFaceDecoder(folder, rope_theta=1e5)
    with pytest.raises(SettingError, match=r"160 positions .*: give a model with them"):
        HuggingFaceDecoder(folder, sequence_length=161)
    # weights that lack some
    folder = Path(save_model(tmp_path / "lacking"))
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights.pop("model.layers.2.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(SettingError, match=r"lacks 1 of its weights, the first one model\.layers\.2\.mlp\.up_proj"):
        made(str(folder))


def test_a_family_that_does_more_to_its_logits_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_model(tmp_path / "model")
    from transformers import LlamaForCausalLM

    stock = LlamaForCausalLM.forward

    def doubled(self: Any, *args: Any, **settings: Any) -> Any:
        out = stock(self, *args, **settings)
        out.logits = 2 * out.logits
        return out

    monkeypatch.setattr(LlamaForCausalLM, "forward", doubled)
    with pytest.raises(SettingError, match="does something to its logits that is not known here"):
        made(folder)


def test_a_family_whose_layers_lie_in_no_base_model_is_refused(tmp_path: Path) -> None:
    from transformers import Llama4TextConfig

    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2}
    config = Llama4TextConfig(vocab_size=257, num_hidden_layers=2, head_dim=8, num_local_experts=2, **sizes)
    config.architectures = ["Llama4ForCausalLM"]
    config.save_pretrained(tmp_path)
    with pytest.raises(
        SettingError, match=r"^Llama4ForCausalLM does not keep its layers in a base model \(language_mod"
    ):
        HuggingFaceDecoder(str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_two_processes_that_share_it_train_as_one(tmp_path: Path, tied: bool) -> None:
    folder = save_model(tmp_path / "model", tie_word_embeddings=tied)
    results = []
    for processes in (1, 2):
        output = tmp_path / f"{processes}.pt"
        command = [sys.executable, str(HELPERS / "pretrained_run.py"), folder, str(output), str(processes)]
        environment = os.environ | {"PYTHONPATH": f"{HELPERS}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        results.append(torch.load(output, weights_only=True))
    one, two = results
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-5)
    assert one["losses"][-1] < one["losses"][0] - 0.15
    assert one["weights"].keys() == two["weights"].keys()
    for name, weight in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], weight, rtol=1e-4, atol=1e-4, msg=name)
    # what each left is handed back as the model that it is, the folder of two processes too
    init_args = {"model": folder, "rope_theta": 5e5}
    recipe = {"class_path": "lightning_lighthouse.huggingface.HuggingFaceDecoder", "init_args": init_args}
    (tmp_path / "config.yaml").write_text(json.dumps({"model": recipe}))
    assert (tmp_path / "2.pt.ckpt" / ".metadata").is_file()
    for number, result in zip((1, 2), results, strict=True):
        exported = export(load_trained(tmp_path / f"{number}.pt.ckpt"), tmp_path / f"out{number}")
        loaded = load_model(str(exported))
        assert loaded.config.rope_parameters["rope_theta"] == 5e5
        state = loaded.state_dict()
        assert state.keys() == {name.removeprefix("model.") for name in result["weights"]}
        assert all(torch.equal(state[name.removeprefix("model.")], value) for name, value in result["weights"].items())


class Derived(HuggingFaceDecoder):
    """Passes on other values than it is given, and calls the model otherwise."""

    def __init__(self, folder: str, learning_rate: float = 1e-3) -> None:
        super().__init__(folder, learning_rate=learning_rate / 4, warmup_steps=0, freeze=["*embed_tokens*"])


def test_what_a_derived_class_passes_on_is_in_force(tmp_path: Path, own_folder: None) -> None:
    module = Derived(save_model(tmp_path / "model"))
    trainer = fit(module, steps=1)
    assert trainer.optimizers[0].param_groups[0]["lr"] == 1e-3 / 4
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    restored = Derived.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    assert restored.own_settings == module.own_settings
