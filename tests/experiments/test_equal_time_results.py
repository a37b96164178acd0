"""The tables of equal time: seconds are those of training, and pictures show the seeds of a training together."""

from __future__ import annotations

import csv
import json
import shutil

import pytest
from places import ROOT

STUDY = ROOT / "experiments" / "study"


@pytest.fixture
def study(monkeypatch):
    """The folder of the scripts, whose modules can be imported."""
    monkeypatch.syspath_prepend(str(STUDY))


def phase(steps: int, pace: float, seconds: float) -> dict:
    """Of a report: `pace` seconds each timed step, and `seconds` with what compiled or waited."""
    return {"steps": steps, "seconds": seconds, "tokens": 100 * steps, "tokens_per_second": 100 / pace}


def test_waiting_for_another_training_is_no_training(study):
    from equal_time_results import phase_seconds, seconds_until

    # the first dense step waited for a minute
    report = {
        "phases": {"chunk 64": phase(20, 0.5, 12.0), "window 64": phase(0, 1.0, 0.0), "dense": phase(3, 2.0, 70.0)}
    }
    assert phase_seconds(report) == pytest.approx({"chunk 64": 10.0, "dense": 6.0})
    found = [seconds_until(report, step) for step in (0, 7, 20, 21, 23)]
    assert found == pytest.approx([0.0, 3.5, 10.0, 12.0, 16.0])


def test_a_phase_of_one_step_took_what_it_took(study):
    from equal_time_results import seconds_until

    untimed = {"steps": 1, "seconds": 9.0, "tokens": 100, "tokens_per_second": None}
    assert seconds_until({"phases": {"dense": untimed}}, 1) == 9.0


@pytest.mark.parametrize("part", ["extension", "extension_theta_1m", "from_nothing", "paper"])
def test_the_tables_that_ship_count_the_seconds_of_a_validation_as_those_of_a_row(part):
    def read(name):
        with (ROOT / "experiments" / f"{name}.csv").open(newline="") as stream:
            return list(csv.DictReader(stream))

    measures = [line for line in read(f"{part}_measures") if line["measure"] == "validation"]
    rows = read(part)
    assert rows
    for row in rows:
        (end,) = (line for line in measures if (line["row"], line["step"]) == (row["row"], row["steps"]))
        assert float(end["seconds"]) == pytest.approx(float(row["seconds"]))


@pytest.mark.parametrize("table", ["extension", "from_nothing", "paper"])
def test_what_is_measured_next_fits_into_the_tables_that_ship(table, study, tmp_path):
    from equal_time_results import measures, summary
    from equal_time_rows import Arm, Row, read_part
    from run import append

    report = {
        "version": 1,
        "steps": 3,
        "phases": {"dense": phase(3, 2.0, 70.0)},
        "validations": [{"step": 3, "phase": "dense", "loss": 2.5}],
        "device": {"name": "a GPU", "peak_memory_mib": 1024},
        "versions": {"torch": "2.11.0"},
    }
    place = {"value": 0.5, "standard_error": 0.1, "count": 4, "depth": 0.5, "length": 8192}
    evaluation = {"step": 3, "phase": "dense", "passkey": [place]}
    (tmp_path / "lighthouse.json").write_text(json.dumps(report))
    (tmp_path / "evaluation.json").write_text(json.dumps({"version": 1, "steps": [evaluation]}))
    row = Row(read_part(STUDY / "equal_time.yaml", table), Arm("dense"), 65536, 80.0, 3e-4, 42)
    told = {"pflop": 1.0, "commit": "", "command": ""}
    for name, lines in ((table, [summary(row, tmp_path) | told]), (f"{table}_measures", measures(row, tmp_path))):
        path = tmp_path / f"{name}.csv"
        shutil.copy(ROOT / "experiments" / path.name, path)
        with path.open(newline="") as stream:
            before = list(csv.DictReader(stream))
        append(path, lines)
        with path.open(newline="") as stream:
            after = list(csv.DictReader(stream))
        assert after[: len(before)] == before
        # by their names, whatever the order
        assert after[len(before) :] == [
            {key: "" if value is None else str(value) for key, value in line.items()} for line in lines
        ]


def test_a_table_of_other_columns_is_refused(study, tmp_path):
    from run import append

    path = tmp_path / "table.csv"
    append(path, [{"a": 1, "b": 2}])
    append(path, [{"b": 4, "a": 3}])
    for other in ({"a": 5}, {"a": 5, "b": 6, "c": 7}):
        with pytest.raises(ValueError, match=r"its columns must be a.*, got a, b"):
            append(path, [other])
    assert path.read_bytes() == b"a,b\r\n1,2\r\n3,4\r\n"


def test_seeds_of_a_training_share_a_color_and_a_name(study, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    import equal_time_table

    drawn = []
    subplots = equal_time_table.plt.subplots

    def kept(**settings):
        drawn.append(subplots(**settings))
        return drawn[-1]

    monkeypatch.setattr(equal_time_table.plt, "subplots", kept)
    names = ["chunk, rate 1, seed 42", "chunk, rate 1, seed 43", "chunk, rate 2, seed 42", "dense, seed 43"]
    curves = {name: [(1.0, 2.0), (2.0, 1.0)] for name in names}
    equal_time_table.draw(tmp_path / "a.png", curves, xlabel="s")
    ((_, axes),) = drawn
    colors = [line.get_color() for line in axes.get_lines()]
    assert colors[0] == colors[1]
    assert len(set(colors)) == 3
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["chunk, rate 1", "chunk, rate 2", "dense"]
    assert (tmp_path / "a.png").exists()
