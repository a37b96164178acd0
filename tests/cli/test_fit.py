"""The command line: what a run leaves behind, how it goes on, and how it ends."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from cli_parts import RECIPE, refusal, steps

from lightning_lighthouse.cli import commands as cli


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LIGHTHOUSE_DEBUG", raising=False)
    Path("recipe.yaml").write_text(RECIPE)
    return tmp_path


def test_fit_leaves_its_config_and_two_checkpoints():
    assert cli.main(["fit", "-c", "recipe.yaml"]) == 0
    run = Path("runs/recipe/version_0")
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
    assert steps(run / "checkpoints/last.ckpt") == 4
    assert cli.main(["check", str(run / "config.yaml")]) == 0


@pytest.mark.parametrize("how", ["file", "flags"])
def test_another_class_has_its_own_defaults_of_arguments_that_ours_have_too(capsys, how):
    classes = {"model": "cli_parts.Alike", "data": "cli_parts.AlikeData"}
    Path("other.yaml").write_text(yaml.safe_dump({group: {"class_path": path} for group, path in classes.items()}))
    flags = [item for group, path in classes.items() for item in (f"--{group}", path)]
    assert cli.main(["fit", *(flags if how == "flags" else ["-c", "other.yaml"]), "--print_config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["init_args"] == {"learning_rate": 7.0}
    assert printed["data"]["init_args"] == {"seq_len": 7}


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


@pytest.mark.parametrize("version", ["lr=0.001 [a]", "*", "seed?"])
def test_a_name_is_no_pattern(version):
    """Sweeps put their settings into names."""
    names = ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "all [1]*", "--trainer.logger.name", "what?"]
    flags = ["-c", "recipe.yaml", *names, "--ckpt_path", "auto", "--trainer.logger.version"]
    assert cli.main(["fit", *flags, "a", "--trainer.max_steps", "5"]) == 0
    assert cli.main(["fit", *flags, version]) == 0
    checkpoint = Path("all [1]*") / "what?" / version / "checkpoints/last.ckpt"
    # afresh, although the pattern "*" would find the other run
    assert steps(checkpoint) == 4
    for last, more in ((6, [version]), (7, ["null"])):
        assert cli.main(["fit", *flags, *more, "--trainer.max_steps", str(last)]) == 0
        assert steps(checkpoint) == last
    assert sorted(path.name for path in Path("all [1]*/what?").iterdir()) == sorted(["a", version])


def test_checkpoints_of_a_folder_are_found_by_its_name():
    flags = ["-c", "recipe.yaml", "--checkpoint.dirpath", "[kept]*", "--ckpt_path"]
    assert cli.main(["fit", *flags, "auto"]) == 0
    assert cli.main(["fit", *flags, "last", "--trainer.max_steps", "5"]) == 0
    assert steps("[kept]*/last.ckpt") == 5


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


def test_a_checkpoint_with_a_flipped_byte_is_named(capsys):
    assert cli.main(["fit", "-c", "recipe.yaml"]) == 0
    last = Path("runs/recipe/version_0/checkpoints/last.ckpt")
    whole = last.read_bytes()
    with zipfile.ZipFile(last) as archive:
        # the first byte of the file, of the pickle, of a tensor
        places = [0, *(whole.index(archive.read(name)) for name in archive.namelist() if name.endswith((".pkl", "/0")))]
    assert len(places) == 3
    for place in places:
        last.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        capsys.readouterr()
        assert cli.main(["fit", "-c", "recipe.yaml", "--ckpt_path", "last"]) == 1
        err = capsys.readouterr().err
        assert err.startswith(f"lighthouse: checkpoint {last} is damaged (")
        assert err.endswith(f"; the newest complete one beside it is {last.with_name('best.ckpt')}\n")


def test_a_checkpoint_of_something_else_is_one_line(capsys):
    assert cli.main(["fit", "-c", "recipe.yaml", "--model.width", "5", "--data.width", "5"]) == 0
    torch.save({"weight": torch.zeros(3)}, "weights.ckpt")
    checkpoints = {
        "runs/recipe/version_0/checkpoints/last.ckpt": "does not fit the model: size mismatch for layer.weight: ",
        "weights.ckpt": "holds final weights, 3 numbers, and no training to go on from: give ",
    }
    for path, words in checkpoints.items():
        capsys.readouterr()
        assert cli.main(["fit", "-c", "recipe.yaml", "--ckpt_path", path]) == 1
        err = capsys.readouterr().err
        assert "Traceback" not in err
        assert f"{path} {words}" in err.splitlines()[-1]


def test_the_recipe_wins_over_the_hyperparameters_of_a_checkpoint():
    assert cli.main(["fit", "-c", "recipe.yaml"]) == 0
    last = "runs/recipe/version_0/checkpoints/last.ckpt"
    flags = ["--ckpt_path", last, "--model.num_heads", "2", "--trainer.max_steps", "5"]
    assert cli.main(["fit", "-c", "recipe.yaml", *flags]) == 0
    resumed = yaml.safe_load(Path("runs/recipe/version_1/config.yaml").read_text())
    assert resumed["model"]["init_args"]["num_heads"] == 2


@pytest.mark.parametrize("key", ["checkpoint.dirpath", "trainer.default_root_dir", "trainer.logger.save_dir"])
def test_a_search_at_an_address_is_refused_and_does_not_start_afresh(capsys, key):
    logger = ["--trainer.logger", "false"] if key == "trainer.default_root_dir" else []
    line = refusal(capsys, "fit", "-c", "recipe.yaml", *logger, f"--{key}", "s3://bucket/runs", "--ckpt_path", "auto")
    assert line == "ckpt_path auto searches local folders, got s3://bucket/runs: give a checkpoint's address"


FAILURES = {
    "no checkpoint": (["--ckpt_path", "last"], "ckpt_path last: there is no runs/recipe/*/checkpoints/last.ckpt"),
    "no such checkpoint": (["--ckpt_path", "gone.ckpt"], "checkpoint gone.ckpt does not exist"),
    "no place for checkpoints": (["--checkpoint.dirpath", "/proc/gone"], "nothing can be written to /proc/gone: "),
    "validation beyond an epoch": (["--trainer.val_check_interval", "9"], "`val_check_interval` (9)"),
    "no such text": (["--data", "lightning_lighthouse.LighthouseRecipe", "--data.source", "gone"], "'gone'"),
}


def test_a_model_without_attention_is_a_mistake_in_the_recipe(capsys):
    assert cli.main(["fit", "-c", "recipe.yaml", "--lighthouse.enabled", "true"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("lighthouse: no module calls SDPA in Model: ")


@pytest.mark.parametrize(("flags", "words"), FAILURES.values(), ids=FAILURES)
def test_what_a_user_can_mend_is_one_line_and_status_1(capsys, flags, words):
    assert cli.main(["fit", "-c", "recipe.yaml", *flags]) == 1
    err = capsys.readouterr().err
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if line.startswith("lighthouse: ")]
    assert len(lines) == 1
    assert words in lines[0]
    assert not Path("runs").exists()


def test_a_bad_token_that_a_worker_reads_is_one_line(capsys):
    Path("text.txt").write_text("to be read " * 99)
    settings = {"source": "text.txt", "output_dir": "data", "seq_len": "20", "validation_fraction": "0"}
    assert cli.main(["prepare", *(word for key, value in settings.items() for word in (f"--{key}", value))]) == 0
    chunk = Path("data/train/chunk-0-0.bin")
    content = bytearray(chunk.read_bytes())
    content[301::2] = bytes([0x7F]) * len(content[301::2])
    chunk.write_bytes(content)
    capsys.readouterr()
    data = ["--data", "lightning_lighthouse.LighthouseRecipe", "--data.num_workers", "1"]
    flags = [f"--data.{key}={value}" for key, value in settings.items()]
    assert cli.main(["fit", "-c", "recipe.yaml", *data, *flags, "--model", "cli_parts.Scorer"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert "chunk-0-0.bin holds token" in err.splitlines()[-1]
    assert err.splitlines()[-1].startswith("lighthouse: ")


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


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), pytest.param("SIGINT", 130, marks=pytest.mark.slow)])
def test_a_signal_has_its_status_and_saves_the_last_step(name, status, server, folder):
    ended, err = server.run(folder, "--model.fault", name)
    assert ended == status, err
    assert "Traceback" not in err
    assert steps("runs/recipe/version_0/checkpoints/last.ckpt") == 3


@pytest.mark.slow
def test_a_sigterm_for_one_rank_stops_all_after_the_same_step(server, folder):
    flags = ["--trainer.devices", "2", "--trainer.max_steps", "1000", "--model.fault", "SIGTERM"]
    ended, err = server.run(folder, *flags)
    assert ended == 143, err
    assert "Traceback" not in err
    assert steps("runs/recipe/version_0/checkpoints/last.ckpt") == 3
