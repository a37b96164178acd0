"""The runner of equal time: steps that fill the seconds, flags that the command line takes, rows that are run once."""

from __future__ import annotations

import csv
import fcntl
import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time

import lightning as L
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from places import ROOT

from lightning_lighthouse.cli.plan import Planned
from lightning_lighthouse.data.tokenizers import ByteTokenizer
from lightning_lighthouse.evaluation.passkey import NEEDLE, QUESTION
from lightning_lighthouse.evaluation.samples import Phrases
from lightning_lighthouse.notices import quiet_lightning
from lightning_lighthouse.phases.events import BatchStart, phase_events

STUDY = ROOT / "experiments" / "study"
PARTS = ("extension", "from_nothing", "paper")
FLAGS = (
    "--model.preset toy --model.compile false --trainer.accelerator cpu --trainer.precision 32-true "
    "--lighthouse.attention.top_k 8 --data.num_workers 0"
)


@pytest.fixture
def rows(monkeypatch):
    """The module of the rows, which lies beside the scripts."""
    monkeypatch.syspath_prepend(str(STUDY))
    import equal_time_rows

    return equal_time_rows


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("paces", [(0.25, 1.44), (0.0931, 0.0571)])
def test_the_steps_of_each_arm_fill_its_seconds(rows, name, paces):
    part = rows.read_part(STUDY / "equal_time.yaml", name)
    cheap, dense = paces
    for arm in part.arms:
        row = rows.Row(part, arm, part.seq_len, 120.0, part.learning_rate, 42)
        steps = rows.fill(row, dict.fromkeys(arm.modes(), cheap) | {"dense": dense})
        if arm.steps is not None:
            assert steps.total == arm.steps
            continue
        before = steps.ends[-1] if steps.ends else 0
        # a step more or less, and those that bring the switch to a validation
        slack = dense + cheap * (part.validations + len(arm.phases))
        assert before * cheap + (steps.total - before) * dense == pytest.approx(120, abs=slack)
        if arm.phases:
            share = part.cheap_share if arm.cheap_share is None else arm.cheap_share
            assert before * cheap == pytest.approx(share * 120, abs=slack)
            assert steps.ends[-1] % steps.validate_every == 0
            assert steps.validate_every <= steps.ends[0]
            assert len(steps.ends) == len(arm.phases)
        decay, last = steps.decay_fraction * steps.total, steps.total - before
        if arm.decay_share is None:
            # the decay lies in the dense steps
            assert 1 <= round(decay) <= last
            assert decay * dense == pytest.approx(part.decay_share * 120, abs=dense)
        else:
            assert last * dense + (decay - last) * cheap == pytest.approx(arm.decay_share * 120, abs=dense + cheap)
        assert steps.warmup < steps.total


def test_another_seed_is_one_of_weights_and_of_the_order_of_the_text(rows, monkeypatch):
    # the recipes of an arm are named from there
    monkeypatch.chdir(ROOT)
    part = rows.read_part(STUDY / "equal_time.yaml", "from_nothing")
    for arm in part.arms[:2]:
        row = rows.Row(part, arm, part.seq_len, 120.0, part.learning_rate, 43)
        flags = rows.fit_flags(row, rows.fill(row, dict.fromkeys(arm.modes(), 0.5)), 2)
        with quiet_lightning(), torch.device("meta"):
            built = Planned([*flags, "--data.source", "books"]).built
        # those of a pretrained model follow from the second alone
        assert (built.seed_everything, built.data.seed) == (43, 43)


def test_needles_are_asked_for_as_the_evaluation_asks_and_named_by_their_share(rows):
    from needles import needle

    text = needle("a book of words" * 9, 0.5, 7)
    phrases = Phrases(ByteTokenizer())
    question, candidates = phrases.question(QUESTION)
    asked = torch.cat([question, candidates[7:8]])
    assert bytes(asked.tolist()).decode() + "\n" == text[-len(asked) - 1 :]
    assert text[67 : 67 + len(NEEDLE) + 1].count("7") == NEEDLE.count("{digit}")
    part = rows.read_part(STUDY / "equal_time.yaml", "extension")
    names = {rows.Row(part, part.arms[0], 65536, 80.0, 3e-4, 42, share).name for share in (0.0, 0.01, 0.1)}
    start = "64k-dense"
    assert names == {f"{start}{word}-80s-0.0003-seed42" for word in ("", "-needles0.01", "-needles0.1")}


def test_only_what_is_not_known_is_probed(rows):
    part = rows.read_part(STUDY / "equal_time.yaml", "extension")
    arm = next(arm for arm in part.arms if arm.name == "growing")
    row = rows.Row(part, arm, 65536, 120.0, 3e-4, 42)
    first, *others = arm.modes()
    flags = rows.probe_flags(row, others)
    phases = json.loads(flags[flags.index("--lighthouse.phases") + 1])
    assert [phase["window"] for phase in phases] == [16384, 32768]
    assert flags[flags.index("--trainer.max_steps") + 1] == str(3 * rows.PROBE_STEPS)
    line = {"part": "extension", "seq_len": "65536", "gpu": "card", "mode": first, "step_seconds": "0.5"}
    lines = [line, line | {"gpu": "other", "step_seconds": "9"}, line | {"step_seconds": "0.25"}]
    assert rows.known_steps(lines, "extension", 65536, "card") == {first: 0.25}


def test_steps_of_all_that_is_asked_for_are_timed_in_few_trainings(rows):
    part = rows.read_part(STUDY / "equal_time.yaml", "extension")
    asked = [rows.Row(part, arm, 65536, 120.0, rate, 42) for arm in part.arms for rate in (1e-4, 3e-4)]
    found = rows.probes(asked)
    timed = {mode for row in found for mode in row.arm.modes()}
    assert timed == {mode for row in asked if row.arm.steps is None for mode in row.arm.modes()}
    plain, *others = found
    windows = [phase["window"] for phase in plain.arm.phases if phase["layer_types"] == ["chunk"]]
    assert windows == [8192, 16384, 32768]
    # a theta and attention of its own are timed apart
    assert len(others) == len({(str(row.arm.attention), row.arm.flags) for row in asked if row.arm.steps is None}) - 1
    assert all(row.arm.attention or row.arm.flags for row in others)


class Watch(L.Callback):
    """Three steps of a phase and two of another; notes who holds which lock, frees its own after the first began."""

    def __init__(self, lock, other):
        self.lock, self.is_held, self.may_start = lock, [], []
        self.seconds, self.free = 0.0, threading.Timer(0.3, fcntl.flock, (other, fcntl.LOCK_UN))
        self.forked = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), daemon=True)

    def on_train_batch_start(self, trainer, *_):
        phase = "window" if trainer.global_step < 3 else "dense"
        phase_events(trainer).publish(BatchStart(trainer.global_step, phase))
        self.is_held.append(not is_free(self.lock, fcntl.LOCK_EX))
        self.may_start.append(is_free(f"{self.lock}.starts", fcntl.LOCK_SH))
        if len(self.is_held) == 1:
            self.begin = time.monotonic()
            self.free.start()
        if len(self.is_held) == 2:
            # as loaders fork processes while the lock is held
            self.forked.start()

    def on_train_batch_end(self, *_):
        self.seconds = self.seconds or time.monotonic() - self.begin


def is_free(lock, kind):
    with open(lock, "a") as other:
        try:
            fcntl.flock(other, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


@pytest.mark.parametrize("is_alone", [False, True])
def test_only_steps_that_compile_run_beside_another_training(is_alone, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(STUDY))
    from turns import Turns

    lock = tmp_path / "gpu.lock"
    with lock.open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        watch = Watch(lock, other)
        trainer = L.Trainer(
            max_steps=5, accelerator="cpu", callbacks=[Turns(str(lock), is_alone), watch], logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
        )  # fmt: skip
        trainer.fit(BoringModel())
    # before the first step it is the other one that holds it
    assert watch.is_held == [True, True, True, False, True]
    # others may begin beside steps that compile, and beside those that are timed unless these are few
    assert watch.may_start == [True, not is_alone, not is_alone, True, not is_alone]
    assert watch.seconds >= 0.3
    assert is_free(lock, fcntl.LOCK_EX)
    assert is_free(f"{lock}.starts", fcntl.LOCK_EX)
    assert watch.forked.is_alive()
    watch.forked.kill()


def read(path):
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.slow
def test_a_row_is_probed_trained_and_written_once(tmp_path):
    text = "a rose is a rose is a rose, and a study is what it says it is. " * 200
    (tmp_path / "text.jsonl").write_text('{"text": "%s"}\n' % text * 4)  # noqa: UP031, braces are JSON's
    command = [sys.executable, "experiments/study/equal_time.py", "from_nothing", "--only", "mixed-lighthouse"]
    command += ["--source", tmp_path / "text.jsonl", "--validation_source", tmp_path / "text.jsonl"]
    command += ["--seq_len", "256", "--seconds", "1", "--num_samples", "2", "--num_workers", "0", "--flags", FLAGS]
    command += ["--beside", "2"]
    command += ["--runs", tmp_path / "runs", "--out", tmp_path]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for runs, flags in enumerate((["--probe"], [], []), start=1):
        asked = list(map(str, [*command, *flags]))
        done = subprocess.run(asked, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        # once, and nothing else at first
        assert ("probe-256-" in done.stdout) is bool(flags)
        assert ("from_nothing.csv already" in done.stdout) is (runs == 3)
        assert len(read(tmp_path / "equal_time_steps.csv")) == 2
        assert (tmp_path / "from_nothing.csv").exists() is not bool(flags)
    (row,) = read(tmp_path / "from_nothing.csv")
    assert (row["row"], row["layer_types"]) == (
        "256-mixed-lighthouse-1s-0.002-seed42",
        "window+window+window+lighthouse",
    )
    # as it would be typed elsewhere
    assert "--data.source data-bytes-256 " in row["command"]
    assert str(tmp_path) not in row["command"]
    assert 0 < float(row["cheap_seconds"]) < float(row["seconds"])
    assert 0 < int(row["cheap_steps"]) < int(row["steps"])
    found = read(tmp_path / "from_nothing_measures.csv")
    end = [one for one in found if one["measure"] == "loss_by_position" and one["step"] == row["steps"]]
    # of 256 tokens, the bins hold 64, 64 and 128
    mean = sum(float(one["value"]) * (int(one["until"]) - int(one["position"])) for one in end) / 256
    assert float(row["loss_0_8k"]) == pytest.approx(mean)
    last = [one for one in found if one["measure"] == "validation"][-1]
    assert float(row["val_loss"]) == float(last["value"])
    assert float(row["seconds"]) == pytest.approx(float(last["seconds"]))
    # a training whose rows were lost, and one that never was
    for name in ("from_nothing.csv", "from_nothing_measures.csv"):
        (tmp_path / name).rename(tmp_path / f"lost-{name}")
    asked = list(map(str, [*command, "--collect", "--only", "mixed-lighthouse", "dense"]))
    done = subprocess.run(asked, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "256-dense-1s-0.002-seed42: no training of it has ended in" in done.stdout
    for name in ("from_nothing.csv", "from_nothing_measures.csv"):
        assert (tmp_path / name).read_bytes() == (tmp_path / f"lost-{name}").read_bytes()
    # nor is one taken for it that had other steps than its time has room for
    (tmp_path / "from_nothing.csv").unlink()
    steps = read(tmp_path / "equal_time_steps.csv")
    with (tmp_path / "equal_time_steps.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, steps[0])
        writer.writeheader()
        writer.writerows({**line, "step_seconds": 1e-4} for line in steps)
    asked = list(map(str, [*command, "--collect"]))
    done = subprocess.run(asked, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, (tmp_path / "from_nothing.csv").exists()) == (1, False)
    assert "steps and 2 evaluations were asked of it, got" in done.stdout
