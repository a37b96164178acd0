"""`lighthouse plan`: a table of what a recipe will take, from estimates or measured; mistakes in one line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from cli_parts import refusal
from places import RECIPES

from lightning_lighthouse.cli import commands as cli

PAPER = str(RECIPES / "paper-98k-1gpu.yaml")
ALL_LIGHTHOUSE = ("--lighthouse.layer_types", "[lighthouse]")
TINY = """\
trainer: {accelerator: cpu, max_steps: 20}
lighthouse:
  dense_layers: [3]
  phases:
    - {until: 0.5, layer_types: [window], window: 32}
    - {until: 18, layer_types: [lighthouse, window], window: 16}
model: {init_args: {num_layers: 4, dim: 32, num_heads: 2, ffn_dim: 48}}
data: {init_args: {seq_len: 256, batch_size: 2}}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LIGHTHOUSE_DEBUG", raising=False)
    Path("tiny.yaml").write_text(TINY)
    return tmp_path


def planned(capsys, *arguments: str) -> tuple[str, dict[str, list[str]]]:
    """All that is printed, and the cells of the table by phase."""
    capsys.readouterr()
    assert cli.main(["plan", *arguments]) == 0
    out = capsys.readouterr().out
    rows = [re.split(r" {2,}", line.strip()) for line in out.splitlines()]
    return out, {cells[0]: cells[1:] for cells in rows if len(cells) > 3}


def test_the_papers_recipe_takes_what_was_measured(capsys):
    out, rows = planned(capsys, PAPER, "--card", "NVIDIA H200", "--data.source", "text", *ALL_LIGHTHOUSE)
    assert (
        "Decoder: 268.0M parameters, 30 attention layers; 1 x 98,304 tokens a batch, 1 GPU; 8,000 steps, 786.4M" in out
    )
    assert "NVIDIA H200: estimated" in out
    # docs/numbers/benchmarks.md: 990 and 4,171 ms, 65.8 and 86.5 GiB
    for name, milliseconds, gib in (("lighthouse", 990, 65.8), ("dense", 4171, 86.5)):
        steps, _, _, step, _, memory, _ = rows[name]
        assert float(step.replace(",", "")) == pytest.approx(milliseconds, rel=0.1)
        assert float(memory) == pytest.approx(gib, rel=0.05)
        assert int(steps.replace(",", "")) == {"lighthouse": 6000, "dense": 2000}[name]
    hours = [float(rows[name][4]) for name in ("lighthouse", "dense")]
    assert float(rows["in all"][1]) == pytest.approx(sum(hours), rel=0.01)
    assert "fits: 86.5 of 139.8 GiB" in out
    assert "'lighthouse' is faster than dense from 32,768 tokens on" in out


def test_what_does_not_fit_is_told_with_what_would_make_it_fit(capsys):
    out, _ = planned(capsys, "-c", PAPER, "--card", "NVIDIA H100 80GB HBM3", "--data.source", "text")
    assert "does not fit: 86.5 GiB, NVIDIA H100 80GB HBM3 has 79.1" in out
    (recomputed,) = re.findall(r"with blocks recomputed .*: ([\d.]+) GiB", out)
    again, _ = planned(
        capsys, "-c", PAPER, "--card", "NVIDIA H100 80GB HBM3", "--data.source", "text",
        "--model.init_args.checkpoint", "block",
    )  # fmt: skip
    assert f"fits: {recomputed} of 79.1 GiB" in again


def test_each_phase_has_its_layers_and_its_steps(capsys):
    out, rows = planned(capsys, "tiny.yaml", "--card", "NVIDIA H200")
    assert [rows[name][0] for name in ("window 32", "lighthouse + window 16", "dense", "in all")] == [
        "10",
        "8",
        "2",
        "20",
    ]
    assert "estimates are those of compiled blocks, and this model's are not" in out
    # three windows of 32 of 256 tokens and a dense layer, against four dense layers
    products, attention = (float(cell) for cell in rows["window 32"][1:3])
    assert products == float(rows["dense"][1])
    assert attention / float(rows["dense"][2]) == pytest.approx((3 * 32 + 256) / (4 * 256), rel=0.01)


def test_without_a_gpu_and_a_card_there_are_no_times(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    out, rows = planned(capsys, "tiny.yaml", "--lighthouse.enabled", "false", "--lighthouse.phases", "null")
    assert "no GPU here: times with --card" in out
    assert rows["dense"][3] == "-"


def test_nothing_said_of_the_layers_is_a_mixture_of_windows_and_lighthouse(capsys):
    nothing = ("tiny.yaml", "--card", "NVIDIA H200", "--lighthouse.phases", "null", "--lighthouse.dense_layers", "[]")
    mixture = ("--lighthouse.layer_types", "[window, window, window, lighthouse]", "--lighthouse.window", "512")
    longer = ("--data.seq_len", "4096")
    _, rows = planned(capsys, *nothing, *longer)
    assert "window 512 \u00d73 + lighthouse" in rows
    assert rows == planned(capsys, *nothing, *longer, *mixture)[1]
    _, rows = planned(capsys, *nothing, *longer, "--model.num_layers", "6")
    assert "window 512 + lighthouse + window 512 \u00d73 + lighthouse" in rows
    _, rows = planned(capsys, *nothing, *longer, *ALL_LIGHTHOUSE)
    assert "lighthouse" in rows


def test_gpus_that_share_a_sequence_have_their_part_of_it_each(capsys):
    recipe = str(RECIPES / "books-262k-2gpu.yaml")
    given = (recipe, "--card", "NVIDIA H200", "--data.source", "text", *ALL_LIGHTHOUSE)
    out, shared = planned(capsys, *given)
    assert "1 x 262,144 tokens a batch, 2 GPUs, 2 share each sequence; 1,000 steps, 262.1M tokens" in out
    assert "what GPUs say to each other is not counted" in out
    alone = ("--trainer.devices", "1", "--trainer.strategy", "auto")
    out, whole = planned(capsys, *given, *alone)
    assert "1 GPU; 1,000 steps, 262.1M tokens" in out
    for name in ("lighthouse", "dense"):
        # products, attention, time, hours, memory
        for one, all_of_it in zip(shared[name][1:6], whole[name][1:6], strict=True):
            ratio = float(one.replace(",", "")) / float(all_of_it.replace(",", ""))
            assert ratio == pytest.approx(0.5, abs=0.02), name
    assert "2 share each sequence: leave --probe out" in refusal(capsys, "plan", *given, "--probe")
    more = ("--trainer.devices", "8", "--trainer.strategy.context_parallel_size", "8")
    assert (
        "8 GPUs cannot share 4 key/value heads out: they share out the queries too" in planned(capsys, *given, *more)[0]
    )
    few = refusal(capsys, "plan", *given, "--trainer.devices", "3")
    assert "context_parallel_size must divide the 3 ranks, got 2" in few


@pytest.mark.parametrize(
    ("devices", "num_gpus"), [("[0, 1]", 2), ("[3]", 1), ("0,1,", 2), ("2,", 1), ("2", 2), ("auto", 1), ("-1", 1)]
)
def test_devices_are_counted_as_the_trainer_does(capsys, devices, num_gpus):
    out, _ = planned(capsys, "tiny.yaml", "--card", "NVIDIA H200", f"--trainer.devices={devices}")
    assert f"tokens a batch, {num_gpus} GPU{'s' * (num_gpus > 1)}; 20 steps" in out


def test_the_attention_that_gains_nothing_is_that_of_the_phase(capsys):
    windows = "{until: 0.5, layer_types: [window], window: 32}"
    for attention, gains in (("{num_levels: 2, pooling_factor: 2, top_k: 4}", True), ("{top_k: 64}", False)):
        phase = f"{{until: 18, layer_types: [lighthouse], attention: {attention}}}"
        Path("phases.yaml").write_text(f"lighthouse: {{phases: [{windows}, {phase}]}}\n")
        out, _ = planned(capsys, "tiny.yaml", "phases.yaml", "--card", "NVIDIA H200", "--data.seq_len", "64")
        assert ("Lighthouse gains nothing at 64 tokens" in out) != gains


def test_a_probe_of_no_batch_is_a_line(capsys):
    said = refusal(capsys, "plan", "tiny.yaml", "--probe", "--repeats", "0")
    assert said == "--repeats must be at least 1, got 0"


@pytest.mark.slow
def test_a_probe_measures_each_phase_on_this_machine(capsys):
    out, rows = planned(capsys, "tiny.yaml", "--probe", "--repeats", "2")
    assert "measured on " in out
    assert all(float(rows[name][3].replace(",", "")) > 0 for name in ("window 32", "lighthouse + window 16", "dense"))
    assert not Path("lightning_logs").exists()
    assert not Path("final.pt").exists()


@pytest.mark.slow
def test_a_pretrained_model_is_planned_without_its_weights(capsys, tmp_path):
    pytest.importorskip("transformers")
    from pretrained import save_model

    model = save_model(tmp_path / "model")
    # with room for the bytes of the data
    config = Path(model, "config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": 300}))
    recipe = {"class_path": "lightning_lighthouse.huggingface.HuggingFaceDecoder", "init_args": {"model": model}}
    Path("pretrained.yaml").write_text(
        f"trainer: {{max_steps: 10}}\nlighthouse: {{}}\nmodel: {recipe}\ndata: {{init_args: {{seq_len: 128}}}}\n"
    )
    for weights in Path(model).glob("*.safetensors"):
        weights.unlink()
    out, _ = planned(capsys, "pretrained.yaml", "--card", "NVIDIA H200")
    assert out.startswith("HuggingFaceDecoder: ")


@pytest.mark.slow
def test_logits_are_counted_where_no_fused_loss_is_installed(capsys, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    from lightning_lighthouse.huggingface import fused_loss

    config = transformers.LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49_152, tie_word_embeddings=True, max_position_embeddings=65_536, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(tmp_path / "model")
    arguments = {"model": str(tmp_path / "model"), "activation_checkpointing": True}
    recipe = {"class_path": "lightning_lighthouse.huggingface.HuggingFaceDecoder", "init_args": arguments}
    Path("pretrained.yaml").write_text(
        f"trainer: {{max_steps: 10}}\nlighthouse: {{}}\nmodel: {recipe}\ndata: {{init_args: {{seq_len: 65536}}}}\n"
    )
    # experiments/extension.csv: GiB with the package, and without it
    for is_installed, measured in ((True, 7.54), (False, 8.80)):
        monkeypatch.setattr(fused_loss, "_is_installed", lambda found=is_installed: found)
        out, rows = planned(capsys, "pretrained.yaml", "--card", "NVIDIA H200")
        assert float(rows["dense"][5]) == pytest.approx(measured, rel=0.05)
        advice = "the logits of 4,096 tokens are counted: liger-kernel is not installed"
        assert (advice in out) is not is_installed
    # whoever asks for that loss needs no advice
    out, _ = planned(capsys, "pretrained.yaml", "--card", "NVIDIA H200", "--model.loss_backend", "chunked")
    assert "liger" not in out


def test_a_mistake_is_one_line(capsys):
    cases = {
        ("tiny.yaml", "--card", "GTX"): "--card must be one of NVIDIA H100 80GB HBM3, NVIDIA H200, got 'GTX'",
        ("tiny.yaml", "--trainer.max_steps", "-1", "--lighthouse.phases", "null"): "set trainer.max_steps",
        (): "plan needs a recipe",
        ("gone.yaml",): "gone.yaml: cannot be read",
        ("tiny.yaml", "--trainer.max_step", "3"): "max_step",
    }
    for arguments, line in cases.items():
        assert line in refusal(capsys, "plan", *arguments)
