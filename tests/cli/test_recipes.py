"""The shipped recipes: each parses through the real command line, every key is explained, and the quickstart runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from places import RECIPES
from pretrained import WORDS
from shipped import REACH, is_pretrained, models, save_base

from lightning_lighthouse.cli import commands as cli
from lightning_lighthouse.cli.fit import MODEL

SHIPPED = sorted(RECIPES.glob("*.yaml"))
# Recipes that stand alone; the others are laid over one of them
COMPLETE = [path for path in SHIPPED if "model" in yaml.safe_load(path.read_text())]
KEY = re.compile(r"^( *)(\w+):(?: (.+))?$")
STRATEGY = "trainer.strategy."
COMMENT = re.compile(r"\(type: .+, default: (.+)\)$")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def base(request, folder):
    """The folder of the pretrained model that a recipe names, where it names one: a tiny one."""
    save_base(request.getfixturevalue("path"))


def names(paths: list[Path]) -> list[str]:
    return [path.stem for path in paths]


def keys(text: str) -> list[tuple[str, str, str | None]]:
    """(dotted key, comment above it, value) of every key of a recipe."""
    found, above, comment = [], [], []
    for line in text.splitlines():
        if line.lstrip().startswith("#"):
            comment.append(line.strip(" #"))
        elif match := KEY.match(line):
            indent, key, value = match.groups()
            above = [*above[: len(indent) // 2], key]
            found.append((".".join(above), " ".join(comment), value))
        if not line.lstrip().startswith("#"):
            comment = []
    return found


def leaves(section: dict, prefix: str = "") -> set[str]:
    return {
        leaf
        for key, value in section.items()
        for leaf in (leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key})
    }


def resolved(capsys, *argv: str) -> dict:
    capsys.readouterr()
    assert cli.main(["fit", *argv, "--print_config"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


def lookup(config: dict, key: str) -> object:
    if key.startswith(STRATEGY) and isinstance(config["trainer"]["strategy"], str):
        # arguments of a class that is not the default have none among the defaults
        return config["trainer"]["strategy"] if key.endswith("class_path") else "none"
    for part in key.split("."):
        config = config[part]
    return config


def test_there_are_recipes():
    extended = {"extend-smollm2-64k-1gpu", "extend-llama-98k"}
    assert {"quickstart", "books-32k-1gpu", "paper-98k-1gpu", "dense", *extended} <= set(names(SHIPPED))


@pytest.mark.parametrize("path", COMPLETE, ids=names(COMPLETE))
@pytest.mark.parametrize("overlay", [[], ["dense"]], ids=["alone", "dense"])
def test_a_recipe_is_right(capsys, path, overlay, folder, monkeypatch):
    save_base(path, **REACH)
    # a theta that is too low would be said once a process
    monkeypatch.setattr("lightning_lighthouse.notices._given", set())
    capsys.readouterr()
    layers = [str(path), *(str(RECIPES / f"{name}.yaml") for name in overlay)]
    Path("text.jsonl").touch()
    assert cli.main(["check", *layers, "--data.source", "text.jsonl"]) == 0
    assert capsys.readouterr() == ("ok\n", "")


ASKING = ["books-32k-1gpu", "books-262k-2gpu", "paper-98k-1gpu", "extend-smollm2-64k-1gpu", "extend-llama-98k"]


@pytest.mark.parametrize("name", ASKING)
def test_text_that_only_the_user_has_is_asked_for(capsys, name):
    path = RECIPES / f"{name}.yaml"
    line = next(n for n, text in enumerate(path.read_text().splitlines(), 1) if text.strip() == "source: ???")
    assert cli.main(["fit", "-c", str(path)]) == 2
    assert capsys.readouterr().err == (
        f"lighthouse: {path}:{line}: data.init_args.source is required; give --data.init_args.source VALUE, or write "
        "it in the recipe\n"
    )


@pytest.mark.parametrize("path", SHIPPED, ids=names(SHIPPED))
def test_every_key_is_explained_with_its_type_and_its_true_default(capsys, path):
    text = path.read_text()
    assert text.startswith("# ")
    explained = keys(text)
    values = {key for key, _, value in explained if value is not None}
    # nothing is hidden from the comments by another way to write YAML
    assert values == leaves(yaml.safe_load(text))
    assert all(comment for _, comment, _ in explained)

    # another class has its own defaults
    defaults = resolved(capsys, *(["--model", models(path)["class_path"]] if is_pretrained(path) else []))
    for key, comment, value in explained:
        if value is None:
            continue
        match = COMMENT.search(comment)
        assert match, f"{key}: no (type: ..., default: ...) at the end of {comment!r}"
        # YAML 1.1 takes 2e-3 for text, jsonargparse for a number
        stated = yaml.safe_load(match[1])
        default = lookup(defaults, key)
        if match[1] == "none, it is required":
            assert default is None
            continue
        if key == "model.class_path":
            default = MODEL
        assert stated == default or float(stated) == default, key


@pytest.mark.parametrize("path", SHIPPED, ids=names(SHIPPED))
def test_paths_are_relative_and_under_data(path):
    for key, _, value in keys(path.read_text()):
        assert not str(value).startswith(("/", "~")), key
        if key.endswith("output_dir"):
            assert value.startswith("data/")


@pytest.mark.parametrize("path", COMPLETE, ids=names(COMPLETE))
def test_a_validation_falls_on_the_switch_and_on_the_end(path):
    recipe = yaml.safe_load(path.read_text())
    trainer = recipe["trainer"]
    switch_step = recipe["lighthouse"]["switch_at"] * trainer["max_steps"]
    assert trainer.get("accumulate_grad_batches", 1) == 1
    assert switch_step % trainer["val_check_interval"] == 0
    assert trainer["max_steps"] % trainer["val_check_interval"] == 0
    assert trainer["check_val_every_n_epoch"] is None


@pytest.mark.parametrize(
    "path",
    [
        RECIPES / "extend-smollm2-64k-1gpu.yaml",
        pytest.param(RECIPES / "extend-llama-98k.yaml", marks=pytest.mark.slow),
    ],
    ids=lambda path: path.stem,
)
def test_a_recipe_extends_a_model_and_hands_it_back(path, base):
    from transformers import AutoModelForCausalLM

    Path("text.txt").write_text(" ".join(WORDS * 400))
    small = ["--data.source", "text.txt", "--data.validation_source", "text.txt", "--data.seq_len", "256"]
    small += ["--data.num_workers", "0", "--lighthouse.window", "64", "--model.compile", "false"]
    # the recipe's own theta lets 160 positions reach so far
    short = ["--trainer.max_steps", "4", "--trainer.val_check_interval", "1", "--trainer.accelerator", "cpu"]
    short += ["--trainer.limit_val_batches", "1", "--trainer.enable_progress_bar", "false"]
    assert cli.main(["fit", "-c", str(path), *small, *short]) == 0
    run = Path("runs") / path.stem / "version_0"
    phases = json.loads((run / "lighthouse.json").read_text())["phases"]
    assert {name: phase["steps"] for name, phase in phases.items()} == {"chunk 64": 3, "dense": 1}
    assert cli.main(["export", str(run), "out"]) == 0
    config = AutoModelForCausalLM.from_pretrained("out").config
    assert config.rope_parameters["rope_theta"] == models(path)["init_args"]["rope_theta"]
    assert config.max_position_embeddings == 256


def test_the_dense_overlay_changes_nothing_but_attention(capsys):
    quickstart, overlay = (["-c", str(RECIPES / f"{name}.yaml")] for name in ("quickstart", "dense"))
    lighthouse, dense = resolved(capsys, *quickstart), resolved(capsys, *quickstart, *overlay)
    assert dense["lighthouse"].pop("enabled") is False
    assert dense["trainer"]["logger"]["init_args"].pop("name") == "quickstart-dense"
    lighthouse["lighthouse"].pop("enabled")
    lighthouse["trainer"]["logger"]["init_args"].pop("name")
    assert dense == lighthouse


def validation_losses(run: Path) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run))
    events.Reload()
    # Lightning counts steps from 0
    return {event.step + 1: event.value for event in events.Scalars("val/loss")}


def test_the_quickstart_crosses_the_switch(capsys):
    Path("text").mkdir()
    for number in range(7):
        Path(f"text/{number}.txt").write_text(f"{number} " + "all work and no play " * 500)
    small = [
        "--data.source",
        "text",
        "--data.seq_len",
        "301",
        "--data.num_workers",
        "0",
        "--data.validation_fraction",
        "0.4",
    ]
    short = ["--trainer.max_steps", "5", "--trainer.val_check_interval", "2", "--trainer.enable_progress_bar", "false"]
    argv = ["fit", "-c", str(RECIPES / "quickstart.yaml"), *small, *short, "--lighthouse.switch_at", "4"]
    assert cli.main(argv) == 0
    run = Path("runs/quickstart/version_0")
    # and one of what the training ends with
    assert list(validation_losses(run)) == [2, 4, 5]
    assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 5
    assert (run / "final.pt").exists()


@pytest.mark.slow
def test_the_quickstart_learns_and_recovers():
    assert cli.main(["fit", "-c", str(RECIPES / "quickstart.yaml"), "--trainer.enable_progress_bar", "false"]) == 0
    losses = validation_losses(Path("runs/quickstart/version_0"))
    assert list(losses) == list(range(50, 501, 50))
    # a uniform guess over bytes costs 5.55 nats
    assert losses[50] < 3.2
    assert losses[400] < losses[50] - 0.4
    assert losses[500] < losses[400] - 0.05
