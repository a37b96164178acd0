"""Evaluations put beside older ones: what was not measured again stays, and nobody's rows are another's."""

from __future__ import annotations

from lightning_lighthouse.runs.evaluation_record import merged


def test_what_was_not_measured_again_stays():
    of_run = {"step": 40, "phase": "dense", "copies": [1], "passkey": [2]}
    later = {"step": 40, "phase": "dense", "model": "runs/a", "attention": "dense", "passkey": [3]}
    assert merged([of_run], later) == [{**of_run, **later}]
    assert merged([of_run, {"step": 80}], {"step": 60}) == [of_run, {"step": 60}, {"step": 80}]


def test_models_without_steps_and_other_attention_have_rows_of_their_own():
    first, second = ({"step": None, "model": name, "attention": "dense", "copies": [name]} for name in "ab")
    windows = {**first, "attention": "window 512"}
    assert merged(merged([first], second), windows) == [first, second, windows]
