"""Evaluations put beside older ones: what was not measured again stays, and nobody's rows are another's."""

from __future__ import annotations

from lightning_lighthouse.runs.evaluation_record import last_of, merged


def test_what_was_not_measured_again_stays():
    of_run = {"step": 40, "phase": "dense", "copies": [1], "passkey": [2]}
    later = {"step": 40, "phase": "dense", "model": "runs/a", "attention": "dense", "passkey": [3]}
    assert merged([of_run], later) == [{**of_run, **later}]
    assert merged([of_run, {"step": 80}], {"step": 60}) == [of_run, {"step": 60}, {"step": 80}]


def test_models_without_steps_and_other_attention_have_rows_of_their_own():
    first, second = ({"step": None, "model": name, "attention": "dense", "copies": [name]} for name in "ab")
    windows = {**first, "attention": "window 512"}
    assert merged(merged([first], second), windows) == [first, second, windows]


def test_evaluations_of_other_models_seeds_and_samples_stay_apart(tmp_path):
    first = {"step": 40, "model": "runs/a", "seed": 0, "num_samples": 10, "copies": ["a"]}
    for other in ({"model": "runs/b"}, {"seed": 1}, {"num_samples": 2}):
        second = {"step": 40, "model": "runs/a", "seed": 0, "num_samples": 10, "passkey": ["b"], **other}
        assert merged([first], second) == [first, second]
        # a further measure finds its own
        third = {**second, "copies": ["b"]}
        assert merged([first, second], third) == [first, third]
    # a run's own evaluations name no model
    own = {"step": 40, "seed": 0, "num_samples": 10, "copies": ["own"]}
    elsewhere, here = ({**first, "model": str(tmp_path / name), "copies": []} for name in ("b/final.pt", "a"))
    assert merged([own], elsewhere, tmp_path / "a") == [own, elsewhere]
    assert merged([own], here, tmp_path / "a") == [here]


def test_the_last_evaluation_is_of_one_model():
    of_run = {"step": 40, "num_samples": 2, "copies": ["run"], "passkey": ["run"]}
    named = {"step": 40, "model": "runs/a", "num_samples": 10, "passkey": ["a"]}
    other = {"step": 40, "model": "runs/b", "lookups": ["b"]}
    assert last_of([{"step": 20, "lookups": []}, of_run, named]) == {**of_run, **named}
    assert last_of([named, other]) == other
    assert last_of([]) == {}
