"""The picture of the answer: which trainings are in it, and in which order."""

from __future__ import annotations

import csv
import subprocess
import sys

import pytest
from places import ROOT

pytest.importorskip("matplotlib")

STUDY = ROOT / "experiments" / "study"
COLUMNS = (
    "arm",
    "seed",
    "seq_len",
    "budget",
    "learning_rate",
    "needles",
    "val_loss",
    "passkey_32k",
    "passkey_up",
)


@pytest.fixture
def answer(monkeypatch):
    """The module of the picture, which lies beside the scripts."""
    monkeypatch.syspath_prepend(str(STUDY))
    import equal_time_answer

    return equal_time_answer


def write(path, *rows):
    with path.open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(COLUMNS)
        table.writerows(rows)


def test_all_seeds_of_the_same_trainings_are_shown_and_the_best_way_first(answer, tmp_path):
    path = tmp_path / "rows.csv"
    write(
        path,
        ("dense", 42, 98304, 115.0, 0.002, "False", 1.9, 0.1, 0.1),
        ("window-512", 42, 98304, 115.0, 0.002, "False", 1.5, 0.1, 0.1),
        ("window-512", 43, 98304, 115.0, 0.002, "False", 1.7, 0.1, 0.1),
        ("window-512", 44, 98304, 230.0, 0.002, "False", 1.1, 0.1, 0.1),
        ("window-512", 44, 98304, 115.0, 0.002, "0.1", 1.1, 0.1, 0.1),
        ("untrained", 42, 98304, 115.0, 0.002, "False", 3.0, 0.1, 0.1),
        ("growing", 42, 98304, 115.0, 0.002, "False", "", 0.1, 0.1),
    )
    found = answer.by_arm(answer.rows(path, seq_len=98304, budget=115), "val_loss")
    assert list(found.items()) == [("window-512", [1.5, 1.7]), ("dense", [1.9])]


def test_the_picture_is_drawn_from_the_tables_that_ship(tmp_path):
    path = tmp_path / "study.png"
    subprocess.run([sys.executable, STUDY / "equal_time_answer.py", path], check=True, capture_output=True)
    assert path.read_bytes().startswith(b"\x89PNG")
