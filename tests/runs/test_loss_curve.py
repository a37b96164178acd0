"""Losses over seconds and tokens: reports of now and of version 0.1, as a table and as a picture."""

from __future__ import annotations

import csv
import json

import pytest
from places import ROOT

from lightning_lighthouse.cli.commands import main
from lightning_lighthouse.runs.comparison import read_report
from lightning_lighthouse.runs.loss_curve import loss_curve, plot_curves

OLD = ROOT / "tests" / "golden" / "v0_1"


def validation(step, phase, loss):
    return {"step": step, "seconds": 2.0 * step, "phase": phase, "loss": loss}


def report(**changes):
    """Two phases and the dense one, of 10, 20 and 40 tokens a step."""
    phases = {"chunk 8": (2, 20), "lighthouse": (4, 80), "dense": (3, 120)}
    return {
        "version": 1,
        "phases": {
            name: {"steps": steps, "tokens": tokens, "seconds": 1.0} for name, (steps, tokens) in phases.items()
        },
        "validations": [
            validation(2, "chunk 8", 5.0),
            validation(5, "lighthouse", None),
            validation(6, "lighthouse", 4.0),
            validation(9, "dense", 3.0),
        ],
    } | changes


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "new"
    folder.mkdir()
    (folder / "lighthouse.json").write_text(json.dumps(report()))
    return folder


def test_tokens_are_those_of_the_steps_of_each_phase():
    points = loss_curve(report())
    assert [(point.step, point.tokens, point.seconds, point.loss) for point in points] == [
        (2, 20.0, 4.0, 5.0),
        (6, 100.0, 12.0, 4.0),
        (9, 220.0, 18.0, 3.0),
    ]


def test_a_report_without_tokens_has_its_seconds():
    phases = {"dense": {"steps": 9, "tokens": 0}}
    assert [point.tokens for point in loss_curve(report(phases=phases))] == [None] * 3


def test_a_run_of_version_0_1_is_read():
    points = loss_curve(read_report(OLD))
    assert [point.step for point in points] == [4, 8, 12, 16, 20]
    assert points[-1].tokens == 14364 + 6156
    assert points[0].tokens == pytest.approx(4 * 14364 / 14)


def test_runs_of_both_kinds_in_one_table_and_one_picture(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["compare", str(run), str(OLD), "--plot", "out.png", "--csv", "out.csv"]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 3
    assert err.splitlines() == ["lighthouse compare: out.png", "lighthouse compare: out.csv"]
    with open("out.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["run", "step", "seconds", "tokens", "phase", "loss"]
    assert [row["run"] for row in rows] == [str(run)] * 3 + [str(OLD)] * 5
    assert (rows[1]["tokens"], rows[1]["loss"], rows[1]["phase"]) == ("100.0", "4.0", "lighthouse")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_has_each_run_on_both_axes(run, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr("lightning_lighthouse.runs.loss_curve.save_figure", lambda figure, path: figures.append(figure))
    plot_curves({"a": loss_curve(report()), "b": loss_curve(read_report(OLD))}, tmp_path / "out.png")
    seconds, tokens = figures[0].axes
    assert [text.get_text() for text in seconds.get_legend().get_texts()] == ["a", "b"]
    lines = {tuple(line.get_xdata()) for line in tokens.get_lines() if line.get_color() == "C0"}
    # dashed to the first dense point, and from there on, with a dot
    assert lines == {(20.0, 100.0, 220.0), (220.0,)}
    assert tokens.get_xlabel() == "tokens"


def test_what_cannot_be_drawn_is_said_and_nothing_is_written(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["compare", str(run), "--plot", "out.docx"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("lighthouse compare: --plot must end in one of")
    (run / "lighthouse.json").write_text(json.dumps(report(validations=[])))
    assert main(["compare", str(run), "--plot", "out.png"]) == 1
    err = capsys.readouterr().err
    assert f"the curve of {run} is left out: it has no validation" in err
    assert "--plot needs runs with validations" in err
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_csv_without_a_file_stands_anywhere_and_no_run_is_an_error(run, capsys):
    for arguments in (["--csv", str(run)], [str(run), "--csv"]):
        assert main(["compare", *arguments]) == 0
        assert capsys.readouterr().out.startswith("run,attention")
    assert main(["compare", "--csv"]) == 2
    assert "required: runs" in capsys.readouterr().err
