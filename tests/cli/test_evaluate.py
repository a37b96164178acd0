"""`lighthouse evaluate`: runs, checkpoints, final weights, models of transformers; pictures; refusals in one line."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from cli_parts import refusal
from lightning.pytorch import Trainer
from long_contexts import Books, text_of
from resume_callbacks import Planted
from torch import nn

from lightning_lighthouse import LongContextEvaluation
from lightning_lighthouse.cli import commands as cli
from lightning_lighthouse.model import Decoder
from lightning_lighthouse.runs.evaluation_record import read_evaluations, write_evaluations

SIZES = {"num_layers": 1, "dim": 16, "num_heads": 2, "ffn_dim": 16}
RECIPE = {
    "model": {"class_path": "lightning_lighthouse.model.Decoder", "init_args": SIZES},
    "data": {"class_path": "long_contexts.Books"},
    "trainer": {"accelerator": "cpu", "devices": 1, "max_steps": 3},
    # of a run with settings of its own
    "lighthouse": {"enabled": False},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What a training leaves: a recipe, a report, final weights and a checkpoint."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    torch.manual_seed(0)
    model = Decoder(**SIZES)
    settings = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = Trainer(accelerator="cpu", max_steps=3, limit_val_batches=0, default_root_dir=folder, **settings)
    trainer.fit(model, datamodule=Books())
    trainer.save_checkpoint(folder / "checkpoints" / "last.ckpt")
    torch.save(model.state_dict(), folder / "final.pt")
    (folder / "config.yaml").write_text(yaml.safe_dump(RECIPE))
    (folder / "lighthouse.json").write_text(json.dumps({"version": 1, "steps": 3}))
    return folder


def evaluated(*arguments: object) -> None:
    assert cli.main(["evaluate", *map(str, arguments), "--num_samples", "2"]) == 0


def rows_of(step: dict) -> dict:
    return {name: value for name, value in step.items() if name not in ("seconds", "seconds_of_all", "model")}


def test_a_run_its_checkpoint_and_its_final_weights_give_the_same_rows(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    # what the run has found before stays
    write_evaluations(run, [{"step": 2, "passkey": []}, {"step": 3, "passkey": []}])
    evaluated(run)
    first, found = read_evaluations(run)
    assert first == {"step": 2, "passkey": []}
    assert (found["step"], found["attention"], found["training_length"]) == (3, "dense", 256)
    assert found["passkey"]
    assert found["copies"]
    assert f"{run / 'evaluation.json'}: 1 evaluation of {run}" in capsys.readouterr().out
    evaluated(run / "final.pt", "--output", "final")
    evaluated(run / "checkpoints" / "last.ckpt")
    [final], [checkpoint] = read_evaluations("final"), read_evaluations(Path())
    assert rows_of(final) == rows_of(checkpoint) == rows_of(found)
    assert not (run / "lightning_logs").exists()
    # the callback finds the same: one code
    model, callback = Decoder(**SIZES), LongContextEvaluation(num_samples=2, output=str(tmp_path / "callback"))
    model.load_state_dict(torch.load(run / "final.pt", weights_only=True))
    Trainer(accelerator="cpu", logger=False, callbacks=[callback]).validate(model, datamodule=Books(), verbose=False)
    assert callback.results[0]["passkey"] == found["passkey"]


def test_other_attention_is_measured_elsewhere_than_in_the_run(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "give --output FOLDER" in refusal(capsys, "evaluate", str(run), "--layer_types", "window", "--window", "8")
    asked = ["--measures", "loss_by_position", "--lengths", "128"]
    evaluated(run, *asked, "--output", "dense")
    evaluated(run, *asked, "--output", "window", "--layer_types", "window", "--window", "64")
    [dense], [window] = read_evaluations("dense"), read_evaluations("window")
    assert window["attention"] == "window 64"
    values = [[row["value"] for row in step["loss_by_position"]] for step in (dense, window)]
    # the first 64 tokens see all that there is
    assert values[0][0] == pytest.approx(values[1][0], rel=1e-6)
    assert values[0][1] != pytest.approx(values[1][1], rel=1e-7)


def test_two_runs_evaluated_into_one_folder_have_an_evaluation_each(run, tmp_path, monkeypatch):
    shutil.copytree(run, tmp_path / "b", ignore=shutil.ignore_patterns("evaluation.json"))
    # the same path from two folders
    for folder, measure in ((run, "copies"), (tmp_path / "b", "loss_by_position"), (run, "loss_by_position")):
        monkeypatch.chdir(folder)
        evaluated("checkpoints/last.ckpt", "--measures", measure, "--lengths", "128", "--output", tmp_path / "both")
    b, a = read_evaluations(tmp_path / "both")
    assert (a["model"], b["model"]) == (str(run / "checkpoints/last.ckpt"), str(tmp_path / "b/checkpoints/last.ckpt"))
    assert all(a[measure] for measure in ("copies", "loss_by_position"))
    assert "copies" not in b


def test_types_of_more_layers_than_the_model_has_are_a_mistake_in_the_arguments(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    types = ["--layer_types", "window", "dense", "--window", "8"]
    assert cli.main(["evaluate", str(run), "--output", "out", *types]) == 2
    line = "lighthouse: layer_types names 2 layers, the model has 1 attention layers"
    assert capsys.readouterr().err.splitlines()[-1] == line
    assert not list(tmp_path.iterdir())


def test_a_picture_is_drawn_of_what_was_found_and_of_what_was_found_before(run, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    evaluated(run, "--output", ".", "--plot", "now.png", "--lengths", "256", "1024", "--own_tasks", _task(tmp_path))
    assert cli.main(["evaluate", "evaluation.json", "--plot", "again.svg"]) == 0
    assert Path("now.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in Path("again.svg").read_text()
    assert not list(tmp_path.glob("*.partial"))
    assert cli.main(["evaluate", "evaluation.json", "--plot", "no.kind"]) == 2


def test_a_picture_that_cannot_be_is_refused_before_anything_is_measured(run, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    said = refusal(capsys, "evaluate", str(run), "--output", ".", "--plot", "no.kind")
    assert said.startswith("--plot must end in one of ")


def test_lengths_that_hold_nothing_of_what_is_asked_for_are_said(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["evaluate", str(run), "--output", ".", "--lengths", "8", "--measures", "passkey"]) == 1
    assert "nothing is measured: what was asked for does not fit into lengths [8]" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_lengths_none_of_which_the_text_fills_are_an_error_that_says_what_fits(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    few = ["--trainer.limit_val_batches", "2", "--measures", "copies"]
    assert cli.main(["evaluate", str(run), "--output", ".", "--lengths", "9000", "100000", *few]) == 1
    line = "lighthouse: lengths must be at most 513 for the 514 tokens of validation text, got [9000, 100000]"
    assert capsys.readouterr().err.splitlines()[-1] == line
    assert not list(tmp_path.iterdir())
    # one that fits is measured without the other
    evaluated(run, "--output", ".", "--lengths", "256", "100000", *few)
    assert "lengths [100000] are left out: there are 514 tokens" in capsys.readouterr().err
    assert read_evaluations(tmp_path)[0]["lengths"] == [256]


@pytest.mark.parametrize("limit", [2, 0.2])
def test_the_limit_of_a_recipe_is_raised_to_what_the_lengths_need(run, tmp_path, monkeypatch, capsys, limit):
    monkeypatch.chdir(tmp_path)
    trainer = {**RECIPE["trainer"], "limit_val_batches": limit}
    Path("limited.yaml").write_text(yaml.safe_dump({**RECIPE, "trainer": trainer}))
    asked = ["-c", "limited.yaml", "--lengths", "1024", "--measures", "copies", "--output", "."]
    evaluated(run, *asked)
    assert read_evaluations(tmp_path)[0]["lengths"] == [1024]
    # the command's own stands
    few = ["--trainer.limit_val_batches", "2"]
    assert cli.main(["evaluate", str(run), *asked, *few]) == 1
    assert "lengths must be at most 513 for the 514 tokens" in capsys.readouterr().err


def _task(folder: Path) -> Path:
    path = folder / "task.jsonl"
    path.write_text('{"prompt": "river ", "answer": "stone"}\n')
    return path


def test_without_matplotlib_one_line_says_what_to_install(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["evaluate", str(run), "--output", ".", "--plot", "a.png"]) == 1
    line = "lighthouse: --plot needs matplotlib, which is not installed: pip install 'lightning_lighthouse[plots]'\n"
    assert capsys.readouterr().err == line
    assert not list(tmp_path.iterdir())


def test_a_model_of_transformers_is_evaluated_as_it_is(tmp_path, monkeypatch, tokenizer_file, capsys):
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=320, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained("model")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=tokenizer_file, eos_token="<|endoftext|>")
    tokenizer.save_pretrained("model")
    Path("books.txt").write_bytes(bytes(text_of(20_000).tolist()))
    capsys.readouterr()
    asked = ["--lengths", "512", "1024", "--accelerator", "cpu"]
    evaluated("model", "--text", "books.txt", *asked)
    # the bars of transformers
    capsys.readouterr()
    [found] = read_evaluations(tmp_path)
    assert (found["step"], found["training_length"], found["dtype"]) == (None, 512, "float32")
    assert {row["length"]: row["beyond_training"] for row in found["passkey"]} == {512: False, 1024: True}
    # random weights: nothing is found, and nothing is copied
    assert all(abs(row["score"]) < 0.02 for row in found["copies"])
    # nobody asked for the usual length, 512, and the text is shorter
    Path("short.txt").write_bytes(bytes(text_of(300).tolist()))
    evaluated("model", "--text", "short.txt", "--accelerator", "cpu", "--measures", "copies", "--output", "short")
    [told] = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    [usual] = read_evaluations("short")
    assert told.endswith(f"; {usual['lengths'][0]:,} tokens are measured instead")
    assert "needs text: --text FILES, or -c RECIPE.yaml" in refusal(capsys, "evaluate", "model")
    line = refusal(capsys, "evaluate", "model", "--text", "books.txt", "--trainer.devices", "2")
    assert line.startswith("--trainer.devices changes a recipe's model or Trainer")
    # a model of which a file is missing
    Path("model/model.safetensors").unlink()
    assert cli.main(["evaluate", "model", "--text", "books.txt"]) == 1
    assert capsys.readouterr().err.startswith("lighthouse: the weights of 'model' cannot be read: ")


def test_mistakes_are_one_line(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "lengths must be at least 8 tokens" in refusal(capsys, "evaluate", str(run), "--lengths", "4")
    assert "own_tasks: none.jsonl cannot be read" in refusal(capsys, "evaluate", str(run), "--own_tasks", "none.jsonl")
    assert "--windw is not an option; did you mean --window?" in refusal(capsys, "evaluate", str(run), "--windw", "3")
    line = refusal(capsys, "evaluate", str(run), "--window", "8")
    assert line == "--window and --sink_tokens belong to --layer_types window"
    assert "'abacus' (choose from" in refusal(capsys, "evaluate", str(run), "--accelerator", "abacus")
    (tmp_path / "lone.pt").write_bytes((run / "final.pt").read_bytes())
    assert "lone.pt names no recipe, and there is no config.yaml" in refusal(capsys, "evaluate", "lone.pt")
    (tmp_path / "empty").mkdir()
    for target, message in (("none", "no such run"), ("empty", "holds neither final.pt nor checkpoints/last.ckpt")):
        assert cli.main(["evaluate", target]) == 1
        assert message in capsys.readouterr().err
    # a file of another kind is never written over
    (tmp_path / "evaluation.json").write_text("[]")
    assert cli.main(["evaluate", str(run), "--output", "."]) == 1
    assert "not a file of LongContextEvaluation" in capsys.readouterr().err


def _cut(run: Path) -> str:
    last = Path("cut/checkpoints/last.ckpt")
    last.parent.mkdir(parents=True)
    last.write_bytes((run / "checkpoints" / "last.ckpt").read_bytes()[:5000])
    return "cut"


def _saved(content: object, name: str) -> str:
    torch.save(content, name)
    return name


def _written(text: str, name: str) -> str:
    Path(name).write_text(text)
    return name


def _sharded(content: object, name: str) -> str:
    Path(name).mkdir()
    Path(name, ".metadata").write_bytes(pickle.dumps(content))
    return name


def _archive(name: str) -> str:
    with zipfile.ZipFile(name, "w") as archive:
        archive.writestr("word.xml", "text")
    return name


BROKEN = {
    "a module": (
        lambda run: _saved(nn.Linear(2, 2), "mod.pt"),
        "mod.pt holds more than tensors and plain values (torch",
    ),
    "planted code": (lambda run: _saved({"x": Planted()}, "bad.ckpt"), "bad.ckpt holds more than tensors and plain"),
    "code planted beside shards": (
        lambda run: _sharded(Planted(), "s.ckpt"),
        "s.ckpt holds more than tensors and plain values",
    ),
    "a run that was cut": (_cut, "cut/checkpoints/last.ckpt is not complete (5000 bytes)"),
    "a report": (lambda run: str(run / "lighthouse.json"), "lighthouse.json is no archive as torch.save writes"),
    "a recipe": (lambda run: _written("data: {}", "my.yaml"), "my.yaml is no archive as torch.save writes, it begins"),
    "nothing": (lambda run: _written("", "empty.pt"), "empty.pt is not complete (0 bytes)"),
    "another archive": (lambda run: _archive("a.docx"), "a.docx cannot be read: "),
    "other tensors": (
        lambda run: _saved([torch.ones(2)], "list.pt"),
        "list.pt holds neither a checkpoint of Lightning",
    ),
}


@pytest.mark.parametrize("has_recipe", [True, False])
@pytest.mark.parametrize(("make", "words"), BROKEN.values(), ids=BROKEN)
def test_a_broken_or_foreign_file_is_one_line_that_names_it(
    run, tmp_path, monkeypatch, capsys, make, words, has_recipe
):
    monkeypatch.chdir(tmp_path)
    recipe = ["-c", str(run / "config.yaml")] if has_recipe else []
    target = make(run)
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(["evaluate", target, *recipe, "--output", "out"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("lighthouse: ")
    assert words in err
    assert err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_recipe_names_the_callback_and_a_tokenizer(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tokenizer = {"class_path": "lightning_lighthouse.data.tokenizers.ByteTokenizer"}
    callback = {"class_path": "lightning_lighthouse.LongContextEvaluation", "init_args": {"tokenizer": tokenizer}}
    recipe = {**RECIPE, "trainer": {**RECIPE["trainer"], "callbacks": [callback]}}
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert cli.main(["check", "recipe.yaml"]) == 0
    assert capsys.readouterr().out == "ok\n"
    callback["init_args"]["num_samples"] = 0
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert "num_samples must be at least 1, got 0" in refusal(capsys, "fit", "-c", "recipe.yaml")
