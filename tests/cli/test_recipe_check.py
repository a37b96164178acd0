"""The command line: one line and status 2 for every mistake in a recipe or a flag."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from cli_parts import RECIPE, config, refusal, run

from lightning_lighthouse.cli import commands as cli


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LIGHTHOUSE_DEBUG", raising=False)
    Path("recipe.yaml").write_text(RECIPE)
    return tmp_path


ATTENTION = (
    "backend, combine, cover_prefix, dilation, max_documents, num_levels, pooling_factor, rotate, scorer, "
    "sdpa, seed, selection, top_k"
)
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
        "lighthouse.switch_at must be int or float or null, got 'ninety'",
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
    "Trainer would divide by nothing": (
        ["--trainer.accumulate_grad_batches", "0"],
        "trainer.accumulate_grad_batches must be at least 1, got 0",
    ),
    "no devices": (["--trainer.devices", "0"], "trainer.devices must be at least 1, got 0"),
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
        ["--model.class_path", "cli_parts.Modell"],
        "model.class_path must be the import path of a LightningModule, got 'cli_parts.Modell'; did you mean Model?",
    ),
    "class of another kind": (
        ["--model", "cli_parts.Data"],
        "model must be the import path of a LightningModule, got 'cli_parts.Data', which is none",
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
    "brackets left open": (
        ["--trainer.callbacks", "[{class_path: ModelSummary}"],
        "trainer.callbacks not readable as YAML: expected ',' or ']', but got '<stream end>'",
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
        "model:\n  class_path: cli_parts.Model\n  width: 3\n",
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
        "bad.yaml:2: lighthouse.dense_layers must be list of int or 'published' or null, got [0, 'last']",
    ),
    "bool for int": ("trainer:\n  max_steps: true\n", "bad.yaml:2: trainer.max_steps must be int, got True"),
    "value for a group": ("trainer:\n  [1]\n", "bad.yaml:1: trainer must be a group of keys, got [1]"),
    "tab": (
        "trainer:\n\tmax_steps: 3\n",
        "bad.yaml:2: not readable as YAML: found character '\\t' that cannot start any token; indent with spaces, not "
        "tabs",
    ),
    "no such day": (
        "trainer:\n  max_steps: 2024-99-99\n",
        "bad.yaml: not readable as YAML: month must be in 1..12",
    ),
    "brackets without end": (
        "trainer: " + 3000 * "[",
        "bad.yaml: not readable as YAML: maximum recursion depth exceeded while calling a Python object",
    ),
    "callback that saves inside a step": (
        "trainer:\n  callbacks:\n  - class_path: ModelCheckpoint\n    init_args: {save_on_exception: true}\n",
        "trainer.callbacks[0].init_args.save_on_exception must be false, got True: after an exception a step is "
        "incomplete, and a run resumed from it would skip a batch; set checkpoint.every_n_train_steps",
    ),
    "another callback that does": (
        "trainer:\n  callbacks:\n  - class_path: OnExceptionCheckpoint\n    init_args: {dirpath: saved}\n",
        "trainer.callbacks must save nothing on exceptions, got OnExceptionCheckpoint: a step is incomplete then; set "
        "checkpoint.every_n_train_steps",
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


STRAYS = {
    "up": ("trainer.logger.init_args.name", "../elsewhere"),
    "up, deep inside": ("trainer.logger.init_args.name", "a/../../elsewhere"),
    "absolute": ("trainer.logger.init_args.name", "/tmp/elsewhere"),
    "through a link": ("trainer.logger.init_args.name", "link/elsewhere"),
    "a link": ("trainer.logger.init_args.name", "link"),
    "version": ("trainer.logger.init_args.version", "../../elsewhere"),
    "version, through a link": ("trainer.logger.init_args.version", "../link"),
    "checkpoint": ("checkpoint.filename", "../../../../best"),
    "checkpoint, absolute": ("checkpoint.filename", "/tmp/best"),
}


@pytest.mark.parametrize("given_in", ["flag", "recipe"])
@pytest.mark.parametrize(("key", "name"), STRAYS.values(), ids=STRAYS)
def test_a_name_that_leaves_its_folder_is_refused_and_makes_nothing(capsys, tmp_path_factory, key, name, given_in):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    Path("runs").mkdir()
    Path("runs/link").symlink_to(elsewhere)
    flags = [f"--{key}", name]
    if given_in == "recipe":
        group, *parts = key.split(".")
        text = name
        for part in reversed(parts):
            text = f"{{{part}: {text}}}"
        Path("more.yaml").write_text(f"{group}: {text}\n")
        flags = ["-c", "more.yaml"]
    assert refusal(capsys, "fit", "-c", "recipe.yaml", *flags) == f"{key} must stay inside its folder, got {name!r}"
    assert list(elsewhere.iterdir()) == []


LOGGER = "{{class_path: lightning.pytorch.loggers.TensorBoardLogger, init_args: {{save_dir: runs, {}}}}}"
MORE_STRAYS = {
    "one of several loggers": (
        ["--trainer.logger", f"[{LOGGER.format('name: ../../out')}]"],
        "trainer.logger[0].init_args.name must stay inside its folder, got '../../out'",
    ),
    "folder below a run": (
        ["--trainer.logger", LOGGER.format("sub_dir: ../../../../out")],
        "trainer.logger.init_args.sub_dir must stay inside its folder, got '../../../../out'",
    ),
    "file of a callback": (
        ["--trainer.callbacks+", "{class_path: ModelCheckpoint, init_args: {filename: ../../../../../out}}"],
        "trainer.callbacks[0].init_args.filename must stay inside its folder, got '../../../../../out'",
    ),
}


@pytest.mark.parametrize(("flags", "line"), MORE_STRAYS.values(), ids=MORE_STRAYS)
def test_so_is_that_of_any_logger_or_callback(capsys, flags, line):
    assert refusal(capsys, "fit", "-c", "recipe.yaml", *flags) == line


def test_the_folder_of_all_runs_may_be_a_link(tmp_path_factory):
    Path("runs").symlink_to(tmp_path_factory.mktemp("large-disk"))
    assert cli.main(["fit", "-c", "recipe.yaml", "--trainer.max_steps", "1"]) == 0
    assert Path("runs/recipe/version_0/checkpoints/last.ckpt").exists()


BAD_COMMANDS = {
    "none": ([], f"a command is required: {', '.join(cli.COMMANDS)}; see lighthouse --help"),
    "unknown": (
        ["chek"],
        f"'chek' is not a command; allowed: {', '.join(cli.COMMANDS)}; did you mean check?",
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


ONE_SOURCE = "[{path: text.txt, weight: 0.7}, {path: text.txt}]"
CHECKED = {
    "sources": ([f"--data.sources={ONE_SOURCE}"], None),
    "weight": (
        ["--data.sources=[{path: text.txt, weight: 0}]"],
        "data.init_args.sources[0].weight must be greater than 0, got 0.0 for text.txt",
    ),
    "source and sources": (
        [f"--data.sources={ONE_SOURCE}", "--data.source", "text.txt"],
        "data.init_args.source must be left out beside sources, got 'text.txt'",
    ),
    "model": (["--model.learning_rate", "-1"], "model.init_args.learning_rate must be greater than 0, got -1.0"),
    "vocabulary": (
        ["--model.vocab_size", "100"],
        "model.init_args.vocab_size must be at least the 257 of the data's tokenizer, got 100",
    ),
    "fraction of nothing": (
        ["--trainer.max_steps", "-1", "--trainer.max_time", "00:00:00:05"],
        "switch_at=0.9 is a fraction, but the number of steps is unknown: set trainer.max_steps, or give switch_at as "
        "a step (an int)",
    ),
    "return": (
        ["--lighthouse.return_steps", "19"],
        "return_steps=19 must end at the switch, which is at step 18",
    ),
    "accelerator": (["--trainer.accelerator", "gpuu"], "trainer.accelerator must be one of auto, cpu, cuda, gpu"),
    "strategy": (["--trainer.strategy", "dpp"], "trainer.strategy must be one of auto, ddp"),
}


@pytest.mark.parametrize(("flags", "line"), CHECKED.values(), ids=CHECKED)
def test_check_refuses_what_fit_would(capsys, flags, line):
    settings = ["--data.seq_len", "128", "--trainer.max_steps", "20", "--lighthouse.attention.top_k", "8"]
    Path("empty.yaml").write_text("{}\n")
    Path("text.txt").touch()
    status = cli.main(["check", "empty.yaml", *settings, *flags])
    out, err = capsys.readouterr()
    if line is None:
        assert (status, out, err) == (0, "ok\n", "")
    else:
        assert (status, out, err.count("\n")) == (2, "", 1), err
        assert err.startswith(f"lighthouse: {line}")


def test_the_process_says_one_line_and_ends_with_status_2():
    done = run("fit", "-c", "recipe.yaml", "--trainer.max_step", "3")
    line = "lighthouse: trainer.max_step is not a known key; did you mean max_steps?\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line)


ATTENTIVE = """\
model: foreign.ForeignModule
data: cli_parts.Sentences
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
    files = sorted(Path("runs").rglob("*"))
    capsys.readouterr()
    flags = ["--ckpt_path", "last", "--lighthouse.switch_at", "9", "--trainer.max_steps", "12"]
    assert cli.main(["fit", "-c", "attentive.yaml", *flags]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("lighthouse: switch_at was changed from 3 to 9")
    assert Path("runs/attentive/version_0/config.yaml").read_text() == written
    assert sorted(Path("runs").rglob("*")) == files


@pytest.mark.parametrize(
    ("flags", "needed"),
    [((), 257), (("--data.tokenizer", "tokenizer.json"), 304)],
    ids=["bytes", "tokenizer.json"],
)
def test_a_vocabulary_too_small_is_found_before_any_text_is_read(capsys, tokenizer_file, flags, needed):
    Path("empty.yaml").write_text("{}\n")
    shutil.copy(tokenizer_file, "tokenizer.json")
    # a source that does not exist would be the first thing that reading finds
    given = ["--data.source", "absent.txt", "--model.vocab_size", "100", "--lighthouse.enabled", "false", *flags]
    line = f"model.init_args.vocab_size must be at least the {needed} of the data's tokenizer, got 100"
    assert refusal(capsys, "fit", "-c", "empty.yaml", *given) == line
