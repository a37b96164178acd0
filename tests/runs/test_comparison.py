"""`lighthouse compare`: runs side by side, from what real trainings left behind."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
import torch
from foreign import ForeignModule, Sequences
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from lightning_lighthouse import LighthouseCallback, LighthouseConfig, Phase
from lightning_lighthouse.cli.commands import main
from lightning_lighthouse.cli.compare import table
from lightning_lighthouse.runs.comparison import read_report, summarize
from lightning_lighthouse.runs.evaluation_record import write_evaluations

ATTENTION = LighthouseConfig(num_levels=2, pooling_factor=2, top_k=8)


def train(folder, **settings):
    """A run of six steps, the switch after four, validated every two."""
    torch.manual_seed(0)
    settings = {"switch_at": 4, "attention": ATTENTION} | settings
    trainer = Trainer(
        accelerator="cpu",
        max_steps=6,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        callbacks=[LighthouseCallback(**settings)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(ForeignModule(), DataLoader(Sequences(12).tokens, 2), DataLoader(Sequences(2, seed=1).tokens, 2))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return train(folder / "lighthouse"), train(folder / "dense", enabled=False)


def test_a_run_is_summed_up(runs):
    report = read_report(runs[0])
    run = summarize("a", report)
    assert (run.lighthouse_steps, run.dense_steps) == (4, 2)
    losses = [validation["loss"] for validation in report["validations"]]
    assert [run.loss_at_switch, run.loss_after_switch, run.final_loss] == [losses[1], losses[2], losses[2]]
    assert min(run.lighthouse_seconds, run.dense_seconds) > 0
    assert all(part in run.attention for part in ("switch_at=4", "top_k=8", "num_levels=2"))
    # what is at its default would hide the rest
    assert "combine" not in run.attention

    dense = summarize("b", read_report(runs[1]))
    assert (dense.attention, dense.loss_at_switch, dense.lighthouse_steps, dense.dense_steps) == ("dense", None, 0, 6)


def test_dense_layers_are_told_where_there_are_some(runs):
    report = read_report(runs[0])
    told = []
    for dense_layers in (None, [], [0, -1], "published"):
        report["settings"]["dense_layers"] = dense_layers
        told.append(summarize("a", report).attention.partition("dense_layers")[2])
    assert told == ["", "", "=[0, -1]", "=published"]


def test_the_reference_is_reached_between_two_validations(runs):
    report = read_report(runs[0])
    report["validations"] = [
        {"step": 2, "seconds": 10.0, "phase": "lighthouse", "loss": 5.0},
        {"step": 4, "seconds": 20.0, "phase": "lighthouse", "loss": None},
        {"step": 5, "seconds": 30.0, "phase": "dense", "loss": 3.0},
    ]
    assert summarize("a", report, 3.5).seconds_to_reference == 25.0
    assert summarize("a", report, 5.5).seconds_to_reference == 10.0
    assert summarize("a", report, 2.9).seconds_to_reference is None
    assert "25.0" in table([summarize("a", report, 3.5)])


def test_the_command_prints_a_table_and_csv(runs, capsys):
    assert main(["compare", *map(str, runs), "--reference", str(runs[1])]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert "4 + 2" in lines[1]
    assert str(runs[1]) in lines[2]
    assert main(["compare", *map(str, runs), "--csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["dense_steps"] for row in rows] == ["2", "6"]
    assert float(rows[0]["final_loss"]) == read_report(runs[0])["validations"][-1]["loss"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such file"),
        ("{}", "not a report"),
        ("[1", "not a report"),
        (json.dumps({"version": 0}), "must be 1, got 0"),
    ],
)
def test_what_is_no_report_is_refused_in_a_line(tmp_path, capsys, content, words):
    if content is not None:
        (tmp_path / "lighthouse.json").write_text(content)
    assert main(["compare", str(tmp_path)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert words in lines[0]
    assert "lighthouse.json" in lines[0]


def test_runs_without_a_report_do_not_hide_the_others(runs, tmp_path, capsys):
    unfinished, older, odd = (tmp_path / name for name in ("unfinished", "older", "odd"))
    contents = {unfinished: None, older: {"version": 0}, odd: read_report(runs[0]) | {"validations": [3]}}
    for folder, content in contents.items():
        folder.mkdir()
        if content is not None:
            (folder / "lighthouse.json").write_text(json.dumps(content))
    assert main(["compare", str(unfinished), str(runs[0]), str(older), str(runs[1]), str(odd)]) == 0
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()] == ["run", str(runs[0]), str(runs[1])]
    # the first that is shown is the reference: it reaches its own loss
    assert out.splitlines()[1].split()[-2] != "-"
    for line, folder, words in zip(
        err.splitlines(),
        (unfinished, older, odd),
        ("it is written when a training", "its version must be 1, got 0", "not a report of LighthouseCallback"),
        strict=True,
    ):
        assert line.startswith(f"lighthouse compare: {folder} is left out: ")
        assert words in line


def test_a_reference_without_a_report_is_told(runs, tmp_path, capsys):
    assert main(["compare", str(runs[0]), "--reference", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[1].split()[-2:] == ["-", "-"]
    assert err.count("\n") == 1
    assert f"{tmp_path} is left out: " in err


def test_what_an_older_report_does_not_tell_is_left_open(runs, tmp_path, capsys):
    """Of the same version, for new keys come without one."""
    report = read_report(runs[0])
    whole = summarize("a", report)
    kept = {key: report[key] for key in ("version", "phases", "validations")}
    for phase in kept["phases"].values():
        del phase["waiting_share"], phase["tokens_per_second"]
    (tmp_path / "lighthouse.json").write_text(json.dumps(kept))
    run = summarize("a", read_report(tmp_path))
    assert (run.attention, run.world_size, run.device, run.loss_after_switch) == (None, None, None, None)
    assert (run.lighthouse_steps, run.dense_steps, run.final_loss) == (4, 2, whole.final_loss)
    assert main(["compare", str(tmp_path), str(runs[1])]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.splitlines()[1].split()[1:6] == ["-", "-", "4", "+", "2"]
    (tmp_path / "lighthouse.json").write_text(json.dumps({"version": 1}))
    assert main(["compare", str(tmp_path)]) == 0
    assert set(capsys.readouterr().out.splitlines()[1].split()[1:]) == {"-"}


def test_several_phases_are_named_and_summed_up(tmp_path, capsys):
    phases = [Phase(2, ["chunk"], window=32), Phase(4, ["window", "lighthouse"], window=8)]
    train(tmp_path, switch_at=None, phases=phases)
    run = summarize("run", read_report(tmp_path))
    assert run.attention == "chunk 32, window 8 + lighthouse num_levels=2 pooling_factor=2 top_k=8"
    assert (run.lighthouse_steps, run.dense_steps) == (4, 2)
    assert run.loss_at_switch is not None
    assert main(["compare", str(tmp_path)]) == 0
    assert "4 + 2" in capsys.readouterr().out


def test_what_an_evaluation_found_stands_beside_the_losses(runs, capsys):
    step = {
        "step": 6,
        "passkey": [{"value": 1.0}, {"value": 0.5}],
        "copies": [{"distance": 256, "value": -2.0}, {"distance": 512, "value": -1.5}],
        "context_gain": [{"length": 1024, "value": -0.25}, {"length": 4096, "value": -0.1}],
    }
    assert main(["compare", *map(str, runs)]) == 0
    assert "passkey" not in capsys.readouterr().out
    path = write_evaluations(runs[0], [{"step": 4, "passkey": [{"value": 0.0}]}, step])
    try:
        assert main(["compare", *map(str, runs)]) == 0
        head, first, second = (line.split() for line in capsys.readouterr().out.splitlines())
        assert head[-3:] == ["passkey", "copies", "context"]
        assert first[-3:] == ["0.75", "-1.500", "-0.250"]
        assert second[-3:] == ["-", "-", "-"]
        assert main(["compare", "--csv", str(runs[0])]) == 0
        [row] = csv.DictReader(io.StringIO(capsys.readouterr().out))
        assert (row["passkey"], row["lookups"], row["copy_gain"], row["context_gain"]) == ("0.75", "", "-1.5", "-0.25")
        (runs[0] / "evaluation.json").write_text("{")
        assert main(["compare", *map(str, runs)]) == 0
        out, err = capsys.readouterr()
        assert "passkey" not in out
        assert "evaluation.json: not a file of LongContextEvaluation" in err
    finally:
        Path(path).unlink()
