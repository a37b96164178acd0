"""A run handed back as a folder of transformers: the same logits, whole or not there, and a text from it."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pretrained import RUN, VOCABULARY, draw_tokens, save_model, save_tokenizer, train_run

pytest.importorskip("transformers", reason="needs the extra hf")

from lightning_lighthouse.cli import commands as cli
from lightning_lighthouse.huggingface import HuggingFaceDecoder
from lightning_lighthouse.huggingface.dtypes import dtype_on
from lightning_lighthouse.huggingface.export import _growth, export
from lightning_lighthouse.huggingface.generation import go_on
from lightning_lighthouse.huggingface.llama import byte_tokenizer
from lightning_lighthouse.huggingface.trained import load_trained


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder each with a run of our decoder, and of a pretrained model that reaches 40 positions."""
    folders = {}
    with pytest.MonkeyPatch.context() as patch:
        for name in ("decoder", "pretrained"):
            folders[name] = tmp_path_factory.mktemp(name)
            patch.chdir(folders[name])
            train_run(name)
    return folders


@pytest.fixture(params=["decoder", "pretrained"])
def name(request: pytest.FixtureRequest, runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> str:
    """The test runs where this run is."""
    monkeypatch.chdir(runs[request.param])
    return request.param


def module_logits(name: str, tokens: torch.Tensor) -> torch.Tensor:
    """Those of the LightningModule itself, with the run's final weights."""
    from lightning_lighthouse.model import Decoder

    settings = yaml.safe_load((RUN / "config.yaml").read_text())["model"]["init_args"]
    if name == "pretrained":
        settings["sequence_length"] = 64
    module = Decoder(**settings) if name == "decoder" else HuggingFaceDecoder(**settings)
    module.configure_model()
    module.load_state_dict(torch.load(RUN / "final.pt", weights_only=True))
    with torch.no_grad():
        return module.eval()(tokens)


TEXTS = {"decoder": "th\u00e9\n", "pretrained": "the same text"}
LOAD = """
import sys, torch
sys.modules["lightning_lighthouse"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder, text in zip(sys.argv[1::2], sys.argv[2::2]):
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        logits = model(torch.load("tokens.pt")).logits
    torch.save({"logits": logits, "ids": tokenizer(text)["input_ids"]}, folder + ".pt")
"""


@pytest.fixture(scope="module")
def elsewhere(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with each run's export, and what a process without this package makes of it."""
    folder = tmp_path_factory.mktemp("elsewhere")
    with pytest.MonkeyPatch.context() as patch:
        for name, run in runs.items():
            patch.chdir(run)
            with redirect_stdout(io.StringIO()) as printed:
                assert cli.main(["export", str(RUN), str(folder / name)]) == 0
            assert "LlamaForCausalLM, from" in printed.getvalue()
    torch.save(draw_tokens(2, 64), folder / "tokens.pt")
    command = [sys.executable, "-c", LOAD, *(word for name in runs for word in (name, TEXTS[name]))]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return folder


def test_a_process_without_this_package_loads_the_same_model(name: str, elsewhere: Path) -> None:
    loaded = torch.load(elsewhere / f"{name}.pt")
    expected = module_logits(name, draw_tokens(2, 64))
    if name == "pretrained":
        assert torch.equal(loaded["logits"], expected)
        assert loaded["ids"] == [0, 1, 2]
    else:
        # three products there where one is here
        torch.testing.assert_close(loaded["logits"], expected, rtol=1e-4, atol=1e-5)
        assert loaded["ids"] == list(TEXTS[name].encode())
    config = json.loads((elsewhere / name / "config.json").read_text())
    assert config["max_position_embeddings"] == 64
    assert config["rope_parameters"]["rope_theta"] == (500000.0 if name == "pretrained" else 10000.0)
    assert (elsewhere / name / "generation_config.json").is_file()
    assert not list(elsewhere.glob(".*"))


def test_a_checkpoint_the_final_weights_and_the_run_are_one(name: str, tmp_path: Path) -> None:
    paths = [RUN, RUN / "final.pt", RUN / "checkpoints" / "last.ckpt"]
    states = [load_trained(path).model.state_dict() for path in paths]
    for state in states[1:]:
        assert all(torch.equal(value, state[key]) for key, value in states[0].items())
    # alone somewhere else it says what is missing, and takes it
    shutil.copy(RUN / "final.pt", tmp_path / "lone.pt")
    with pytest.raises(ValueError, match=r"has no config.yaml beside it, or above it: give the run's recipe with -c"):
        load_trained(tmp_path / "lone.pt")
    lone = load_trained(tmp_path / "lone.pt", RUN / "config.yaml").model.state_dict()
    assert all(torch.equal(value, lone[key]) for key, value in states[0].items())


def test_a_sharded_checkpoint_is_gathered(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.distributed.checkpoint import save

    monkeypatch.chdir(runs["pretrained"])
    state = torch.load(RUN / "final.pt", weights_only=True)
    # as Lightning's ModelParallelStrategy keeps it
    folder = Path("runs/sharded/checkpoints/last.ckpt")
    save({"state_dict": state, "optimizer_0": {"state": torch.ones(3)}}, checkpoint_id=folder, no_dist=True)
    shutil.copy(RUN / "config.yaml", "runs/sharded/config.yaml")
    gathered = load_trained(folder).model.state_dict()
    assert all(torch.equal(value, gathered[key.removeprefix("model.")]) for key, value in state.items())


def test_tied_weights_are_written_once_and_what_the_base_says_of_generating_is_kept(tmp_path: Path) -> None:
    from safetensors.torch import load_file
    from transformers import GenerationConfig

    base = save_model(tmp_path / "base", tie_word_embeddings=True)
    GenerationConfig(eos_token_id=[3, 7], temperature=0.6, do_sample=True).save_pretrained(base)
    module = HuggingFaceDecoder(base)
    module.configure_model()
    (tmp_path / "run").mkdir()
    torch.save(module.state_dict(), tmp_path / "run" / "final.pt")
    recipe = {"model": {"class_path": "lightning_lighthouse.huggingface.HuggingFaceDecoder"}}
    recipe["model"]["init_args"] = {"model": base, "activation_checkpointing": True}
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(recipe))
    out = export(load_trained(tmp_path / "run"), tmp_path / "out")
    assert load_file(out / "model.safetensors").keys() == load_file(Path(base) / "model.safetensors").keys()
    kept = json.loads((out / "generation_config.json").read_text())
    assert (kept["eos_token_id"], kept["temperature"]) == ([3, 7], 0.6)


def test_the_readme_says_how_it_was_trained(name: str, tmp_path: Path) -> None:
    text = (export(load_trained(RUN), tmp_path / "out") / "README.md").read_text()
    assert "- sequences of 64 tokens" in text
    assert "- phase lighthouse: 2 steps" in text or "- phase lighthouse: 1 steps" in text
    assert "dense validation loss at step 3: " in text
    assert ("- trained on from: `base`" in text) == (name == "pretrained")


def test_the_weights_are_in_the_type_asked_for(runs: dict[str, Path], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(runs["pretrained"])
    assert cli.main(["export", str(RUN), str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    from safetensors.torch import load_file

    assert {value.dtype for value in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    # others may read all of it, if they may read any
    assert len({file.stat().st_mode for file in (tmp_path / "out").iterdir()}) == 1


def test_nothing_is_written_where_something_is_or_no_room(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(runs["decoder"])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    assert cli.main(["export", str(RUN), str(tmp_path / "full")]) == 1
    assert capsys.readouterr().err.endswith("full exists and is not empty: choose another folder, or remove it\n")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1))
    assert cli.main(["export", str(RUN), str(tmp_path / "out")]) == 1
    assert "out needs 0.05 GiB, and the disk has 0.00 GiB left" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.chdir(runs["decoder"])
    trained = load_trained(RUN)

    def broken(*_: Any, **__: Any) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(trained.tokenizer, "save_pretrained", broken)
    with pytest.raises(OSError, match="the disk is gone"):
        export(trained, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_what_cannot_be_exported_is_one_line(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(runs["decoder"])
    (tmp_path / "empty").mkdir()
    (tmp_path / "junk.pt").write_bytes(b"junk")
    torch.save({"a": 1}, tmp_path / "none.pt")
    own = (RUN / "config.yaml").read_text().replace("lightning_lighthouse.model.Decoder", "os.path.Model")
    (tmp_path / "own.yaml").write_text(own)
    cases = {
        (str(tmp_path / "gone"),): "gone: no such file or folder",
        (str(tmp_path / "empty"),): "holds neither final.pt nor checkpoints/last.ckpt, nor the config.json of a model",
        (str(tmp_path / "junk.pt"), "-c", str(RUN / "config.yaml")): "junk.pt",
        (str(tmp_path / "none.pt"), "-c", str(RUN / "config.yaml")): "none.pt holds no weights",
        (str(RUN), "-c", str(tmp_path / "own.yaml")): "only a Decoder and a HuggingFaceDecoder are known",
    }
    for arguments, words in cases.items():
        assert cli.main(["export", arguments[0], str(tmp_path / "out"), *arguments[1:]]) == 1
        err = capsys.readouterr().err
        assert words in err.replace("\\", "/"), err
        assert err.startswith("lighthouse export: ")
        assert len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_the_weights_of_another_model_are_refused(runs: dict[str, Path], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(runs["decoder"])
    told = yaml.safe_load((RUN / "config.yaml").read_text())
    weights = torch.load(RUN / "final.pt", weights_only=True)
    weights["blocks.9.attention.out.weight"] = torch.zeros(1)
    torch.save(weights, tmp_path / "more.pt")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(told))
    with pytest.raises(ValueError, match=r"weights of another model than its recipe's: blocks\.9"):
        load_trained(tmp_path / "more.pt")
    fewer = {name: value for name, value in weights.items() if not name.startswith(("blocks.9", "blocks.1."))}
    torch.save(fewer, tmp_path / "fewer.pt")
    with pytest.raises(ValueError, match=r"blocks\.1\..* is not there"):
        load_trained(tmp_path / "fewer.pt")


def test_what_the_data_does_not_say_is_not_guessed(runs: dict[str, Path], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(runs["decoder"])
    told = yaml.safe_load((RUN / "config.yaml").read_text())
    shutil.copy(RUN / "final.pt", tmp_path / "final.pt")
    told["data"] = {"class_path": "somewhere.Data", "init_args": {"seq_len": 96}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(told))
    trained = load_trained(tmp_path / "final.pt")
    assert trained.tokenizer is None
    assert trained.model.config.max_position_embeddings == 96
    told["data"]["init_args"] = {}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(told))
    with pytest.raises(ValueError, match="does not say the length of the sequences"):
        load_trained(tmp_path / "final.pt")


def test_a_text_ends_where_its_documents_end(runs: dict[str, Path], monkeypatch: Any) -> None:
    monkeypatch.chdir(runs["decoder"])
    trained = load_trained(RUN)
    assert trained.model.generation_config.eos_token_id == trained.tokenizer.eos_token_id == 256


def test_what_is_said_of_sampling_alone_is_written(runs: dict[str, Path], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(runs["pretrained"])
    trained = load_trained(RUN)
    trained.model.generation_config.temperature = 0.6
    written = json.loads((export(trained, tmp_path / "out") / "generation_config.json").read_text())
    assert (written["temperature"], written["do_sample"]) == (0.6, True)
    # greedy stays greedy
    trained.model.generation_config.do_sample = False
    written = json.loads((export(trained, tmp_path / "greedy") / "generation_config.json").read_text())
    assert not written["do_sample"]
    assert written.get("temperature") is None


def test_bytes_are_the_tokens_of_the_byte_tokenizer() -> None:
    tokenizer = byte_tokenizer()
    text = "Abide with me; 日本\n\t\x00é <|endoftext|>"
    ids = tokenizer("".join(text.split("<|endoftext|>")))["input_ids"]
    assert ids == list("".join(text.split("<|endoftext|>")).encode())
    assert tokenizer.eos_token_id == 256
    assert tokenizer.decode(ids) == "".join(text.split("<|endoftext|>"))


def test_a_text_is_gone_on_with(name: str, tmp_path: Path, capsys: Any) -> None:
    prompt = "the same text over"
    assert cli.main(["generate", str(RUN), "--prompt", prompt, "--max_new_tokens", "5"]) == 0
    from_run = capsys.readouterr().out
    export(load_trained(RUN), tmp_path / "out")
    Path(tmp_path / "prompt.txt").write_text(prompt)
    options = ["--prompt_file", str(tmp_path / "prompt.txt"), "--max_new_tokens", "5"]
    assert cli.main(["generate", str(tmp_path / "out"), *options]) == 0
    assert capsys.readouterr().out == from_run
    # what the model itself finds likeliest
    trained = load_trained(RUN)
    ids = trained.tokenizer(prompt, return_tensors="pt")["input_ids"]
    expected = []
    for _ in range(5):
        with torch.no_grad():
            ids = torch.cat((ids, trained.model(ids).logits[:, -1:].argmax(-1)), 1)
        expected.append(int(ids[0, -1]))
    if trained.tokenizer.eos_token_id not in expected and max(expected) < len(trained.tokenizer):
        assert from_run == trained.tokenizer.decode(expected, skip_special_tokens=True) + "\n"
    texts = []
    sampled = ["generate", str(RUN), "--prompt", prompt, "--max_new_tokens", "9", "--temperature", "2.0"]
    for seed in ("7", "7", "8"):
        assert cli.main([*sampled, "--seed", seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_weights_run_in_16_bits_and_rotary_frequencies_do_not(name: str, tmp_path: Path, capsys: Any) -> None:
    trained = load_trained(RUN)
    frequencies = [buffer.clone() for buffer in trained.model.buffers()]
    assert frequencies
    text = go_on(trained, "the same text over", 5, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in trained.model.parameters()} == {torch.bfloat16}
    assert all(torch.equal(*pair) for pair in zip(trained.model.buffers(), frequencies, strict=True))
    # what export rounds, transformers loads with the frequencies of its own
    export(load_trained(RUN), tmp_path / "out", torch.bfloat16)
    asked = ["--prompt", "the same text over", "--max_new_tokens", "5"]
    assert cli.main(["generate", str(tmp_path / "out"), *asked]) == 0
    assert capsys.readouterr().out == text + "\n"
    assert cli.main(["generate", str(RUN), *asked, "--dtype", "bfloat16"]) == 0
    assert capsys.readouterr().out == text + "\n"


@pytest.mark.parametrize(
    ("device", "weights", "has_bf16", "expected"),
    [
        ("cpu", torch.float32, True, torch.float32),
        ("cuda", torch.float32, True, torch.bfloat16),
        ("cuda", torch.float32, False, torch.float16),
        ("cuda", torch.float16, True, torch.float16),
    ],
)
def test_a_gpu_runs_16_bits(device, weights, has_bf16, expected, monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: has_bf16)
    assert dtype_on(device, weights) == expected


def test_wrong_arguments_of_generate_are_one_line(runs: dict[str, Path], monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(runs["decoder"])
    assert cli.main(["generate", str(RUN)]) == 2
    assert "give one of --prompt and --prompt_file" in capsys.readouterr().err
    assert cli.main(["generate", str(RUN), "--prompt", "a", "--max_new_tokens", "0"]) == 2
    assert "must be at least 1, got 0" in capsys.readouterr().err
    assert cli.main(["generate", str(RUN), "--prompt", "a", "--seed", str(2**64)]) == 2
    assert "--seed must be from 0 to 2^63 - 1" in capsys.readouterr().err
    assert cli.main(["generate", str(RUN), "--prompt", ""]) == 2
    assert "--prompt must hold at least one token, got ''" in capsys.readouterr().err
    assert cli.main(["generate", str(RUN), "--prompt", "a" * 60]) == 2
    assert "must be at most the model's 64 positions, got 60 tokens and 64 to come" in capsys.readouterr().err


def test_the_data_of_another_tokenizer_is_refused(runs: dict[str, Path], monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(runs["pretrained"])
    assert cli.main(["fit", "-c", "recipe.yaml", "--data.tokenizer", "bytes", "--data.output_dir", "bytes"]) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert "vocab_size must be at least the 257" in err or "tokenizer must be that of the model" in err
    assert VOCABULARY < 257
    save_tokenizer(Path("other"))
    record = json.loads(Path("other/tokenizer.json").read_text())
    record["model"]["vocab"]["new"] = len(record["model"]["vocab"])
    Path("other/tokenizer.json").write_text(json.dumps(record))
    assert cli.main(["fit", "-c", "recipe.yaml", "--data.tokenizer", "other", "--data.output_dir", "others"]) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert "tokenizer must be that of the model, got 'other', which makes other tokens than 'base'" in err
    # before any text is read, and without a training
    assert not Path("others").exists()
    assert cli.main(["check", "recipe.yaml", "--data.tokenizer", "other"]) == 2
    assert "got 'other', which makes other tokens than 'base'" in capsys.readouterr().err


def test_the_growth_of_a_folder_is_told_to_the_last_byte(tmp_path: Path) -> None:
    told: list[int] = []
    with _growth(tmp_path / "out", told.append):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "a").write_bytes(bytes(1000))
        deadline = time.monotonic() + 10
        while sum(told) < 1000 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert sum(told) == 1000
        (tmp_path / "out" / "b").write_bytes(bytes(234))
    assert sum(told) == 1234
