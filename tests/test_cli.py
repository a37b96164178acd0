"""The command line: one line and status 2 for every mistake, status codes, layers, checkpoints."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from foreign import loader
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_lighthouse import cli


class Model(LightningModule):
    """Any LightningModule: nothing of it is ours."""

    def __init__(self, width: int = 3, num_heads: int = 1, fault: str | None = None, at_step: int = 2) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"width must be at least 1, got {width}")
        self.save_hyperparameters()
        self.width, self.fault, self.at_step = width, fault, at_step
        self.layer = nn.Linear(width, width)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if self.fault is not None and self.global_step == self.at_step and self.global_rank == 0:
            if self.fault.startswith("SIG"):
                os.kill(os.getpid(), getattr(signal, self.fault))
            else:
                raise RuntimeError(self.fault)
        return self.layer(batch).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        # the first validation is the best
        self.log("val/loss", float(self.global_step))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Data(LightningDataModule):
    """Any LightningDataModule, with one required value."""

    def __init__(self, num_batches: int, width: int = 3) -> None:
        super().__init__()
        self.num_batches, self.width = num_batches, width

    def train_dataloader(self) -> DataLoader:
        return DataLoader(list(torch.ones(self.num_batches, self.width)), batch_size=None)

    val_dataloader = train_dataloader


# no attention in Model: nothing to patch
RECIPE = """\
model:
  class_path: test_cli.Model
data:
  class_path: test_cli.Data
  init_args:
    num_batches: 4
trainer:
  accelerator: cpu
  max_steps: 4
  enable_progress_bar: false
lighthouse:
  enabled: false
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LIGHTHOUSE_DEBUG", raising=False)
    Path("recipe.yaml").write_text(RECIPE)
    return tmp_path


def refusal(capsys, *argv: str) -> str:
    """The one line on stderr of a command that ends with status 2 and leaves nothing behind."""
    before = sorted(Path.cwd().rglob("*"))
    status = cli.main(argv)
    out, err = capsys.readouterr()
    assert (status, out) == (2, ""), err
    assert err.endswith("\n")
    assert err.count("\n") == 1, err
    assert sorted(Path.cwd().rglob("*")) == before
    return err.removeprefix("lighthouse: ").rstrip("\n")


def config(capsys, *argv: str) -> dict:
    capsys.readouterr()
    assert cli.main(["fit", *argv, "--print_config"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


def steps(checkpoint: str | Path) -> int:
    return torch.load(checkpoint, weights_only=True)["global_step"]


ATTENTION = "backend, combine, cover_prefix, dilation, num_levels, pooling_factor, scorer, sdpa, seed, selection, top_k"
BAD_FLAGS = {
    "abbreviated key": (
        ["--lighthouse.attention.num_level", "3"],
        f"lighthouse.attention.num_level is not a known key; did you mean num_levels? (known: {ATTENTION})",
    ),
    "abbreviated key of a class": (
        ["--model.widt", "3"],
        "model.init_args.widt is not a known key; did you mean width? (known: at_step, fault, num_heads, width)",
    ),
    "abbreviated key of the trainer": (
        ["--trainer.max_step", "3"],
        "trainer.max_step is not a known key; did you mean max_steps?",
    ),
    "wrong type": (["--model.width", "wide"], "model.init_args.width must be int, got 'wide'"),
    "wrong type, union": (
        ["--lighthouse.switch_at", "ninety"],
        "lighthouse.switch_at must be int or float, got 'ninety'",
    ),
    "wrong choice": (
        ["--lighthouse.attention.combine", "men"],
        "lighthouse.attention.combine must be 'sum' or 'mean', got 'men'; did you mean mean?",
    ),
    "seed out of range": (["--seed_everything", "-1"], "seed_everything must be from 0 to 4294967295, got -1"),
    "Trainer would divide by it": (
        ["--trainer.val_check_interval", "0"],
        "trainer.val_check_interval must be greater than 0, got 0",
    ),
    "Trainer would ignore it": (
        ["--trainer.log_every_n_steps", "-1"],
        "trainer.log_every_n_steps must be at least 0, got -1",
    ),
    "out of range, refused by a dataclass": (
        ["--lighthouse.attention.num_levels", "1"],
        "lighthouse.attention.num_levels must be at least 2, got 1",
    ),
    "out of range, refused by a model": (["--model.width", "0"], "model.init_args.width must be at least 1, got 0"),
    "unknown module": (
        ["--model", "no_such_module.Model"],
        "model must be the import path of a LightningModule, got 'no_such_module.Model': "
        "No module named 'no_such_module'",
    ),
    "unknown class": (
        ["--model.class_path", "test_cli.Modell"],
        "model.class_path must be the import path of a LightningModule, got 'test_cli.Modell'; did you mean Model?",
    ),
    "class of another kind": (
        ["--model", "test_cli.Data"],
        "model must be the import path of a LightningModule, got 'test_cli.Data', which is none",
    ),
    "required value": (
        ["--data.num_batches", "???"],
        "data.init_args.num_batches is required; give --data.init_args.num_batches VALUE, or write it in the recipe",
    ),
    "name that leaves its folder": (
        ["--trainer.logger.init_args.name", "../elsewhere"],
        "trainer.logger.init_args.name must stay inside its folder, got '../elsewhere'",
    ),
    "unsafe checkpoints": (
        ["--weights_only", "false"],
        "weights_only must be true or null, got False: no checkpoint is loaded as code",
    ),
    "value missing": (["--trainer.max_steps"], "--trainer.max_steps needs a value: --trainer.max_steps VALUE"),
    "value without a key": (
        ["more.yaml"],
        "unexpected argument 'more.yaml'; a recipe is given as -c FILE, a value as --KEY VALUE",
    ),
    "no such file": (["-c", "more.yaml"], "more.yaml: cannot be read: No such file or directory"),
    "checkpoint of another command": (
        ["--ckpt_path", "auto"],
        "ckpt_path must be a file, 'last' or 'best' for validate, got 'auto'",
    ),
}


@pytest.mark.parametrize(("flags", "line"), BAD_FLAGS.values(), ids=BAD_FLAGS)
def test_a_bad_flag_is_one_line(capsys, flags, line):
    command = "validate" if "--ckpt_path" in flags else "fit"
    assert refusal(capsys, command, "-c", "recipe.yaml", *flags) == line


BAD_RECIPES = {
    "misspelt key": (
        "lighthouse:\n  swich_at: 0.5\n",
        "bad.yaml:2: lighthouse.swich_at is not a known key; did you mean switch_at?",
    ),
    "abbreviated key": (
        "# comment\nlighthouse:\n  attention:\n    num_level: 3\n",
        "bad.yaml:4: lighthouse.attention.num_level is not a known key; did you mean num_levels?",
    ),
    "misspelt group": ("trainr:\n  max_steps: 3\n", "bad.yaml:1: trainr is not a known key; did you mean trainer?"),
    "key without init_args": (
        "model:\n  class_path: test_cli.Model\n  width: 3\n",
        "bad.yaml:3: model.width is not a known key (known: class_path, init_args, dict_kwargs)",
    ),
    "key of a callback": (
        "trainer:\n  callbacks:\n  - class_path: ModelCheckpoint\n    init_args:\n      moniter: val/loss\n",
        "bad.yaml:5: trainer.callbacks[0].init_args.moniter is not a known key; did you mean monitor?",
    ),
    "wrong type": (
        "lighthouse:\n  attention: {top_k: 1.5}\n",
        "bad.yaml:2: lighthouse.attention.top_k must be int or null, got 1.5",
    ),
    "wrong type in a list": (
        "lighthouse:\n  dense_layers: [0, last]\n",
        "bad.yaml:2: lighthouse.dense_layers must be list of int or null, got [0, 'last']",
    ),
    "bool for int": ("trainer:\n  max_steps: true\n", "bad.yaml:2: trainer.max_steps must be int, got True"),
    "value for a group": ("trainer:\n  [1]\n", "bad.yaml:1: trainer must be a group of keys, got [1]"),
    "tab": (
        "trainer:\n\tmax_steps: 3\n",
        "bad.yaml:2: not readable as YAML: found character '\\t' that cannot start any token; indent with spaces, not "
        "tabs",
    ),
    "not a mapping": ("- trainer\n", "bad.yaml: a recipe must be a mapping of keys to values, got list"),
    "empty": ("", "bad.yaml: a recipe must be a mapping of keys to values, got nothing"),
    "duplicate key": (
        "trainer:\n  max_steps: 3\n  accelerator: cpu\n  max_steps: 5\n",
        "bad.yaml:4: max_steps is given again, first in line 2; keep one",
    ),
    "required value": (
        "data:\n  init_args:\n    num_batches: ???\n",
        "bad.yaml:3: data.init_args.num_batches is required; give --data.init_args.num_batches VALUE, or write "
        "it in the recipe",
    ),
}


@pytest.mark.parametrize(("text", "line"), BAD_RECIPES.values(), ids=BAD_RECIPES)
def test_a_bad_recipe_is_one_line(capsys, text, line):
    Path("bad.yaml").write_text(text)
    found = refusal(capsys, "fit", "-c", "recipe.yaml", "-c", "bad.yaml")
    # a long list of what is known follows in some
    assert found.split(" (known: ")[0] == line.split(" (known: ")[0]
    assert line in found


def test_a_tag_runs_nothing(capsys):
    Path("bad.yaml").write_text("trainer: !!python/object/apply:os.mkdir [made]\n")
    line = refusal(capsys, "fit", "-c", "bad.yaml")
    assert line.startswith("bad.yaml:1: not readable as YAML: could not determine a constructor for the tag")


def test_merged_keys_are_no_duplicates(capsys):
    Path("more.yaml").write_text("trainer:\n  <<: {max_steps: 7, max_epochs: 2}\n  max_steps: 9\n")
    trainer = config(capsys, "-c", "recipe.yaml", "-c", "more.yaml")["trainer"]
    assert (trainer["max_steps"], trainer["max_epochs"]) == (9, 2)


BAD_COMMANDS = {
    "none": ([], "a command is required: fit, validate, test, check, prepare, verify, bench; see lighthouse --help"),
    "unknown": (
        ["chek"],
        "'chek' is not a command; allowed: fit, validate, test, check, prepare, verify, bench; did you mean check?",
    ),
    "option before": (
        ["--trainer.max_steps", "3", "fit"],
        "--trainer.max_steps comes before the command; write lighthouse fit --trainer.max_steps ...",
    ),
}


@pytest.mark.parametrize(("argv", "line"), BAD_COMMANDS.values(), ids=BAD_COMMANDS)
def test_a_bad_command_is_one_line(capsys, argv, line):
    assert refusal(capsys, *argv) == line


def test_check_names_every_problem(capsys):
    Path("bad.yaml").write_text(
        "trainer:\n  max_stepz: 3\n  val_check_interval: 1.5\nmodel:\n  init_args: {width: 0}\n"
    )
    status = cli.main(["check", "recipe.yaml", "-c", "bad.yaml", "--lighthouse.switch_at", "2.5"])
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    assert [re.split(" must | is not | have ", line)[0] for line in err.splitlines()] == [
        "lighthouse: bad.yaml:2: trainer.max_stepz",
        "lighthouse: lighthouse.switch_at",
        "lighthouse: model.init_args.width",
        "lighthouse: trainer: You",
    ]


def test_check_says_ok_and_makes_nothing(capsys, folder):
    assert cli.main(["check", "recipe.yaml", "--model.width", "5"]) == 0
    assert capsys.readouterr() == ("ok\n", "")
    assert [path.name for path in folder.iterdir()] == ["recipe.yaml"]


def test_help_lists_every_command(capsys):
    assert cli.main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for command in ("fit", "validate", "test", "check", "prepare", "verify", "bench"):
        assert sum(line.split()[:1] == [command] for line in lines) == 1


@pytest.mark.parametrize("command", ["fit", "validate", "test", "check", "prepare", "verify"])
def test_each_command_has_help(capsys, command):
    assert cli.main([command, "--help"]) == 0
    usage = capsys.readouterr().out.splitlines()[0]
    assert usage.startswith("usage: lighthouse")
    assert f" {command} " in usage


def test_a_model_has_help(capsys):
    assert cli.main(["fit", "--model.help", "test_cli.Model"]) == 0
    assert "--model.width" in capsys.readouterr().out


def test_later_recipes_win_and_flags_win_over_all(capsys):
    Path("more.yaml").write_text(
        "trainer: {max_steps: 5}\nmodel: {init_args: {width: 7}}\nlighthouse: {switch_at: 0.5}\n"
    )
    flags = ["--lighthouse.switch_at", "0.25", "--lighthouse.attention.top_k=12"]
    layered = config(capsys, *flags, "-c", "recipe.yaml", "--config=more.yaml")
    assert layered["trainer"]["max_steps"] == 5
    assert layered["trainer"]["accelerator"] == "cpu"
    assert layered["model"] == {
        "class_path": "test_cli.Model",
        "init_args": {"width": 7, "num_heads": 1, "fault": None, "at_step": 2},
    }
    assert layered["lighthouse"]["switch_at"] == 0.25
    assert layered["lighthouse"]["attention"]["top_k"] == 12
    # the runs of a layered recipe have their own folder
    assert layered["trainer"]["logger"]["init_args"]["name"] == "recipe-more"


def test_switch_at_keeps_its_type(capsys):
    for text, value in (("1", 1), ("1.0", 1.0), ("300", 300), ("0.9", 0.9)):
        found = config(capsys, "-c", "recipe.yaml", "--lighthouse.switch_at", text)["lighthouse"]["switch_at"]
        assert (found, type(found)) == (value, type(value))


def test_the_printed_config_is_a_recipe(capsys):
    assert cli.main(["fit", "-c", "recipe.yaml", "--print_config"]) == 0
    Path("printed.yaml").write_text(capsys.readouterr().out)
    assert cli.main(["check", "printed.yaml"]) == 0
    first, second = (config(capsys, "-c", name) for name in ("recipe.yaml", "printed.yaml"))
    # the name of the runs is given in one and follows from the file in the other
    assert first == second


def test_a_logger_of_another_class_needs_only_its_name(capsys):
    logger = config(capsys, "-c", "recipe.yaml", "--trainer.logger", "CSVLogger")["trainer"]["logger"]
    assert logger["class_path"].endswith("CSVLogger")
    assert config(capsys, "-c", "recipe.yaml", "--trainer.logger", "false")["trainer"]["logger"] is False


def test_fit_leaves_its_config_and_two_checkpoints():
    assert cli.main(["fit", "-c", "recipe.yaml"]) == 0
    run = Path("runs/recipe/version_0")
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
    assert steps(run / "checkpoints/last.ckpt") == 4
    assert cli.main(["check", str(run / "config.yaml")]) == 0


def test_last_and_auto_continue_the_newest_run(capsys):
    assert cli.main(["fit", "-c", "recipe.yaml", "--ckpt_path", "auto"]) == 0
    assert cli.main(["fit", "-c", "recipe.yaml"]) == 0
    assert cli.main(["fit", "-c", "recipe.yaml", "--ckpt_path", "auto", "--trainer.max_steps", "6"]) == 0
    assert cli.main(["fit", "-c", "recipe.yaml", "--ckpt_path", "last", "--trainer.max_steps", "11"]) == 0
    assert sorted(path.name for path in Path("runs/recipe").iterdir()) == ["version_0", "version_1"]
    first, second = (Path("runs/recipe") / name / "checkpoints" for name in ("version_0", "version_1"))
    assert (steps(first / "last.ckpt"), steps(second / "last.ckpt")) == (4, 11)
    assert sorted(path.name for path in second.iterdir()) == ["best.ckpt", "last.ckpt"]
    written = yaml.safe_load((second.parent / "config.yaml").read_text())
    # what was asked for, so that the file is a recipe for another run
    assert (written["ckpt_path"], written["trainer"]["logger"]["init_args"]["version"]) == ("last", None)
    assert cli.main(["validate", "-c", "recipe.yaml", "--ckpt_path", "best"]) == 0
    assert sorted(path.name for path in Path("runs/recipe").iterdir()) == ["version_0", "version_1"]
    assert yaml.safe_load((second.parent / "config.yaml").read_text()) == written


def test_without_a_logger_no_file_of_the_user_is_written_over(folder):
    Path("recipe.yaml").rename("config.yaml")
    assert cli.main(["fit", "-c", "config.yaml", "--trainer.logger", "false"]) == 0
    assert Path("config.yaml").read_text() == RECIPE
    assert steps("checkpoints/last.ckpt") == 4


def test_the_last_checkpoint_is_of_the_last_validation_also_where_the_loss_got_worse():
    flags = [
        "--trainer.max_steps",
        "100",
        "--trainer.val_check_interval",
        "2",
        "--model.fault",
        "a bug",
        "--model.at_step",
    ]
    assert cli.main(["fit", "-c", "recipe.yaml", *flags, "7"]) == 1
    checkpoints = Path("runs/recipe/version_0/checkpoints")
    assert (steps(checkpoints / "best.ckpt"), steps(checkpoints / "last.ckpt")) == (2, 6)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_checkpoint_cut_short_is_named_with_another_that_is_whole(capsys, share):
    assert cli.main(["fit", "-c", "recipe.yaml"]) == 0
    last = Path("runs/recipe/version_0/checkpoints/last.ckpt")
    last.write_bytes(last.read_bytes()[: int(share * last.stat().st_size)])
    capsys.readouterr()
    assert cli.main(["fit", "-c", "recipe.yaml", "--ckpt_path", "last"]) == 1
    assert capsys.readouterr().err == (
        f"lighthouse: checkpoint {last} is not complete ({last.stat().st_size} bytes); the newest complete one beside "
        f"it is {last.with_name('best.ckpt')}\n"
    )


def test_the_recipe_wins_over_the_hyperparameters_of_a_checkpoint():
    assert cli.main(["fit", "-c", "recipe.yaml"]) == 0
    last = "runs/recipe/version_0/checkpoints/last.ckpt"
    flags = ["--ckpt_path", last, "--model.num_heads", "2", "--trainer.max_steps", "5"]
    assert cli.main(["fit", "-c", "recipe.yaml", *flags]) == 0
    resumed = yaml.safe_load(Path("runs/recipe/version_1/config.yaml").read_text())
    assert resumed["model"]["init_args"]["num_heads"] == 2


class Sentences(LightningDataModule):
    """Sequences that the foreign module learns."""

    seq_len = 128

    def train_dataloader(self) -> DataLoader:
        return loader()


ATTENTIVE = """\
model: foreign.ForeignModule
data: test_cli.Sentences
trainer:
  accelerator: cpu
  max_steps: 6
  enable_progress_bar: false
lighthouse:
  switch_at: 3
  attention:
    num_levels: 2
    top_k: 8
checkpoint:
  monitor: null
"""


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--lighthouse.dense_layers", "[9]"], "lighthouse.dense_layers must be from -4 to 3 for 4 layers, got 9"),
        (["--lighthouse.select", "*.atn"], "lighthouse.select must match the name of a module of ForeignModule"),
        (["--lighthouse.attention.num_levels", "40"], "lighthouse: a pyramid over 128 tokens with num_levels=40"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_anything_is_written(capsys, flags, line):
    Path("attentive.yaml").write_text(ATTENTIVE)
    assert refusal(capsys, "fit", "-c", "attentive.yaml", *flags).startswith(line)
    assert cli.main(["check", "attentive.yaml", *flags]) == 2
    assert line in capsys.readouterr().err


def test_a_refused_resume_leaves_the_run_as_it_is(capsys):
    Path("attentive.yaml").write_text(ATTENTIVE)
    assert cli.main(["fit", "-c", "attentive.yaml"]) == 0
    written = Path("runs/attentive/version_0/config.yaml").read_text()
    capsys.readouterr()
    flags = ["--ckpt_path", "last", "--lighthouse.switch_at", "9", "--trainer.max_steps", "12"]
    assert cli.main(["fit", "-c", "attentive.yaml", *flags]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("lighthouse: switch_at was changed from 3 to 9")
    assert Path("runs/attentive/version_0/config.yaml").read_text() == written


FAILURES = {
    "no checkpoint": (["--ckpt_path", "last"], "ckpt_path last: there is no runs/recipe/*/checkpoints/last.ckpt"),
    "no such checkpoint": (["--ckpt_path", "gone.ckpt"], "gone.ckpt"),
    "no such text": (["--data", "lightning_lighthouse.LighthouseRecipe", "--data.source", "gone"], "'gone'"),
    "no attention to patch": (["--lighthouse.enabled", "true"], "attention"),
}


@pytest.mark.parametrize(("flags", "words"), FAILURES.values(), ids=FAILURES)
def test_what_a_user_can_mend_is_one_line_and_status_1(capsys, flags, words):
    assert cli.main(["fit", "-c", "recipe.yaml", *flags]) == 1
    err = capsys.readouterr().err
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if line.startswith("lighthouse: ")]
    assert len(lines) == 1
    assert words in lines[0]


def test_an_unexpected_error_keeps_its_traceback(capsys):
    assert cli.main(["fit", "-c", "recipe.yaml", "--model.fault", "a bug"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "RuntimeError: a bug" in err


@pytest.mark.parametrize("how", ["flag", "environment"])
def test_debug_shows_where_a_line_comes_from(capsys, monkeypatch, how):
    if how == "environment":
        monkeypatch.setenv("LIGHTHOUSE_DEBUG", "1")
    assert cli.main(["fit", "-c", "gone.yaml", *(["--debug"] if how == "flag" else [])]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith("lighthouse: gone.yaml: cannot be read: No such file or directory\n")


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    paths = [str(Path(__file__).parent), str(Path(cli.__file__).parents[1])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lightning_lighthouse.cli", *argv]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize(("name", "status", "saved"), [("SIGTERM", 143, 3), ("SIGINT", 130, None)])
def test_a_signal_has_its_status_and_sigterm_saves_the_last_step(name, status, saved):
    done = run("fit", "-c", "recipe.yaml", "--model.fault", name)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    last = Path("runs/recipe/version_0/checkpoints/last.ckpt")
    assert (steps(last) if last.exists() else None) == saved


@pytest.mark.slow
def test_a_sigterm_for_one_rank_stops_all_after_the_same_step():
    flags = ["--trainer.devices", "2", "--trainer.max_steps", "1000", "--model.fault", "SIGTERM"]
    done = run("fit", "-c", "recipe.yaml", *flags)
    assert done.returncode == 143, done.stderr
    assert "Traceback" not in done.stderr
    assert steps("runs/recipe/version_0/checkpoints/last.ckpt") == 3


def test_the_process_says_one_line_and_ends_with_status_2():
    done = run("fit", "-c", "recipe.yaml", "--trainer.max_step", "3")
    line = "lighthouse: trainer.max_step is not a known key; did you mean max_steps?\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line)


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom lightning_lighthouse.cli import main\nassert main(['--help']) == 0\n"
        "heavy = {'torch', 'lightning', 'jsonargparse', 'litdata'} & set(sys.modules)\nassert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
