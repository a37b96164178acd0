"""The tables of equal time: seconds are those of training, and pictures show the seeds of a training together."""

from __future__ import annotations

import csv

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


@pytest.mark.parametrize("part", ["extension", "extension_theta_1m", "from_nothing"])
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
