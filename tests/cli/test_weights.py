"""What `--ckpt_path` may be: a checkpoint, weights alone, or neither, and what each command does with it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from cli_parts import RECIPE, run

from lightning_lighthouse.cli import commands as cli
from lightning_lighthouse.runs.evaluation_record import read_evaluations

RUN = Path("runs/recipe/version_0")
LAST, FINAL = RUN / "checkpoints/last.ckpt", RUN / "final.pt"
WEIGHED = RECIPE.replace("cli_parts.Model", "cli_parts.Weighed")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LIGHTHOUSE_DEBUG", raising=False)
    Path("recipe.yaml").write_text(WEIGHED)
    return tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The files of a run that has ended."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("trained"))
        Path("recipe.yaml").write_text(WEIGHED)
        assert cli.main(["fit", "-c", "recipe.yaml"]) == 0
        return Path.cwd() / RUN


@pytest.fixture
def files(trained):
    """The same in this test's folder."""
    for path in (LAST, FINAL):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((trained / path.relative_to(RUN)).read_bytes())


def evaluated(capsys, caplog, command: str, *flags: str) -> tuple[float, str]:
    """The metric that a command shows, and what it says of its weights."""
    capsys.readouterr()
    caplog.clear()
    with caplog.at_level("INFO"):
        assert cli.main([command, "-c", "recipe.yaml", *flags]) == 0
    (value,) = re.findall(rf"{command[:4].replace('vali', 'val')}/loss\D+([\d.]+)", capsys.readouterr().out)
    (line,) = [line for line in caplog.messages if line.startswith("ckpt_path")]
    return float(value), line


@pytest.mark.parametrize("command", ["validate", "test"])
def test_final_weights_are_evaluated_like_the_last_checkpoint(capsys, caplog, files, command):
    begun = evaluated(capsys, caplog, command)
    checkpoint = evaluated(capsys, caplog, command, "--ckpt_path", str(LAST))
    final = evaluated(capsys, caplog, command, "--ckpt_path", str(FINAL))
    assert begun[0] != checkpoint[0] == final[0]
    assert begun[1] == "ckpt_path: none is given, the weights are those that the model begins with"
    assert checkpoint[1] == f"ckpt_path {LAST}: a checkpoint of step 4"
    assert final[1] == f"ckpt_path {FINAL}: final weights, 12 numbers"


def test_a_training_does_not_go_on_from_final_weights(capsys, files):
    assert cli.main(["fit", "-c", "recipe.yaml", "--ckpt_path", str(FINAL)]) == 1
    line = (
        f"lighthouse: ckpt_path {FINAL} holds final weights, 12 numbers, and no training to go on from: give {LAST} to "
        "go on with its training, or load the weights in a LightningModule of your own to begin another\n"
    )
    assert capsys.readouterr().err == line
    LAST.unlink()
    assert cli.main(["fit", "-c", "recipe.yaml", "--ckpt_path", str(FINAL)]) == 1
    assert "give a checkpoint, checkpoints/last.ckpt in the folder of its run, to go on" in capsys.readouterr().err
    assert [path.name for path in Path("runs/recipe").iterdir()] == ["version_0"]


def test_a_checkpoint_of_the_weights_alone_is_evaluated_and_not_gone_on_from(capsys, caplog):
    assert cli.main(["fit", "-c", "recipe.yaml", "--checkpoint.save_weights_only", "true"]) == 0
    checkpoint = evaluated(capsys, caplog, "validate", "--ckpt_path", str(LAST))
    assert checkpoint[0] == evaluated(capsys, caplog, "validate", "--ckpt_path", str(FINAL))[0]
    assert checkpoint[1] == f"ckpt_path {LAST}: a checkpoint of the weights alone, of step 4"
    capsys.readouterr()
    assert cli.main(["fit", "-c", "recipe.yaml", "--ckpt_path", "last"]) == 1
    assert f"ckpt_path {LAST} holds a checkpoint of the weights alone, of step 4, and no training" in (
        capsys.readouterr().err
    )


OTHERS = {
    "other weights": (
        {"layer.weight": torch.zeros(5, 5), "layer.bias": torch.zeros(5)},
        "does not fit the model: size",
    ),
    "missing weights": ({"layer.weight": torch.zeros(3, 3)}, "does not fit the model: Missing key(s)"),
    "another library's": (
        {"model": {"layer.weight": torch.zeros(3, 3)}, "step": 3},
        "holds neither a checkpoint of Lightning nor the weights of a LightningModule, but model, step",
    ),
    "nothing": ({}, "holds neither a checkpoint of Lightning nor the weights of a LightningModule, but nothing"),
}


@pytest.mark.parametrize("command", ["validate", "test"])
@pytest.mark.parametrize(("content", "words"), OTHERS.values(), ids=OTHERS)
def test_what_the_model_cannot_take_is_one_line(capsys, command, content, words):
    torch.save(content, "other.pt")
    assert cli.main([command, "-c", "recipe.yaml", "--ckpt_path", "other.pt"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert f"other.pt {words}" in err.splitlines()[-1]
    assert not Path("runs").exists()


def test_a_folder_is_a_sharded_checkpoint_or_refused(capsys):
    Path("some").mkdir()
    for command in ("fit", "validate"):
        assert cli.main([command, "-c", "recipe.yaml", "--ckpt_path", "some"]) == 1
        assert capsys.readouterr().err == (
            "lighthouse: some is a folder and no sharded checkpoint, which has a file .metadata; give a file\n"
        )


SMALL = """\
trainer: {accelerator: cpu, max_steps: 4, enable_progress_bar: false}
lighthouse: {enabled: false}
model: {init_args: {num_layers: 1, dim: 32, num_heads: 2, ffn_dim: 32, learning_rate: 0.1, warmup_steps: 0}}
data:
  init_args: {seq_len: 32, source: text.txt, validation_source: text.txt, num_workers: 0}
"""
SHARDED = """\
trainer:
  devices: 2
  strategy:
    class_path: lightning.pytorch.strategies.ModelParallelStrategy
    init_args:
      process_group_backend: gloo
      data_parallel_size: 2
      tensor_parallel_size: 1
"""


@pytest.mark.slow
def test_a_sharded_checkpoint_is_evaluated_by_however_many_processes(capsys, caplog):
    Path("text.txt").write_text("The same text, over and over. " * 444)
    Path("recipe.yaml").write_text(SMALL.replace("seq_len: 32", "seq_len: 256"))
    Path("two.yaml").write_text(SHARDED)
    done = run("fit", "-c", "recipe.yaml", "-c", "two.yaml")
    assert done.returncode == 0, done.stderr
    folder = Path("runs/recipe-two/version_0")
    last = folder / "checkpoints/last.ckpt"
    assert (last / ".metadata").is_file()
    trained = json.loads((folder / "lighthouse.json").read_text())["final"]["loss"]
    alone, line = evaluated(capsys, caplog, "validate", "--ckpt_path", str(last))
    assert line == f"ckpt_path {last}: a sharded checkpoint"
    # the two leave out the last of 51 sequences
    assert alone == pytest.approx(trained, rel=1e-3)
    asked = ["--measures", "loss_by_position", "--num_samples", "2"]
    done = run("evaluate", str(last), "--output", "two", *asked)
    assert done.returncode == 0, done.stderr
    # said by one of them
    assert done.stdout.count("two/evaluation.json: 1 evaluation of") == 1
    one = ["--trainer.devices", "1", "--trainer.strategy", "auto"]
    assert cli.main(["evaluate", str(last), "--output", "one", *asked, *one]) == 0
    two, one = (read_evaluations(Path(name))[0] for name in ("two", "one"))
    assert two["step"] == one["step"] == 4
    for row, other in zip(two["loss_by_position"], one["loss_by_position"], strict=True):
        # of other text
        assert row["value"] == pytest.approx(other["value"], rel=0.05)
    capsys.readouterr()
    assert cli.main(["fit", "-c", "recipe.yaml", "--ckpt_path", str(last), "--trainer.max_steps", "6"]) == 1
    assert "is a sharded checkpoint, and this strategy goes on from a file alone" in capsys.readouterr().err


@pytest.mark.slow
def test_final_weights_are_evaluated_by_processes_that_share_them(capsys, caplog):
    # an even number of sequences, so that two ranks leave none out
    Path("text.txt").write_text("The same text, over and over. " * 44)
    Path("recipe.yaml").write_text(SMALL)
    Path("two.yaml").write_text(SHARDED)
    assert cli.main(["fit", "-c", "recipe.yaml"]) == 0
    trained, _ = evaluated(capsys, caplog, "validate", "--ckpt_path", str(FINAL))
    assert evaluated(capsys, caplog, "validate")[0] > trained + 1
    done = run("validate", "-c", "recipe.yaml", "-c", "two.yaml", "--ckpt_path", str(FINAL))
    assert done.returncode == 0, done.stderr
    (value,) = re.findall(r"val/loss\D+([\d.]+)", done.stdout)
    assert float(value) == pytest.approx(trained, rel=1e-5)
