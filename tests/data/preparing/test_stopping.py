"""Preparation that signals break off at random moments: nothing half, nothing left over, the same files afterwards."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from places import HELPERS, ROOT
from resuming import still_left_over
from texts import content, texts_of, write_jsonl

SEQ_LEN = 61
STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGKILL: -signal.SIGKILL}
FIT = """\
model:
  class_path: lightning_lighthouse.model.Decoder
  init_args: {vocab_size: 307, num_layers: 1, dim: 16, num_heads: 2, ffn_dim: 16}
data:
  class_path: lightning_lighthouse.LighthouseRecipe
  init_args: {seq_len: 61, source: text.jsonl, output_dir: out, tokenizer: tokenizer.json}
trainer: {accelerator: cpu, max_steps: 1, enable_progress_bar: false}
lighthouse: {enabled: false}
"""

pytestmark = pytest.mark.skipif(
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN, reason="started where SIGINT is ignored, as nohup and & do"
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: str) -> tuple[Path, float]:
    """A folder with text, a tokenizer and what an unbroken preparation makes of them, and the seconds it took."""
    folder = tmp_path_factory.mktemp("whole")
    write_jsonl(folder / "text.jsonl", texts_of(10_000))
    (folder / "recipe.yaml").write_text(FIT)
    shutil.copy(tokenizer_file, folder / "tokenizer.json")
    run = start(folder, prepare_command(0))
    began = when_begun(folder, run)
    assert run.wait(120) == 0
    return folder, time.monotonic() - began


def prepare_command(workers: int) -> list[str]:
    options = f"prepare --output_dir out --seq_len {SEQ_LEN} --source text.jsonl --tokenizer tokenizer.json"
    return [*options.split(), "--num_workers", str(workers)]


def fit_command(workers: int) -> list[str]:
    return ["fit", "-c", "recipe.yaml", "--data.num_workers", str(workers)]


def start(folder: Path, command: list[str]) -> subprocess.Popen[bytes]:
    """Start `lighthouse` in a group of its own, with SIGINT as a terminal has it."""
    environment = os.environ | {"PYTHONPATH": f"{HELPERS}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-m", "lightning_lighthouse.cli", *command]
    with open(folder / "err", "w") as err:
        return subprocess.Popen(
            program, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=err, start_new_session=True
        )


def when_begun(folder: Path, run: subprocess.Popen[bytes]) -> float:
    """Wait until its hidden folder is there; the moment."""
    while not list(folder.glob(f".out.partial-*-{run.pid}")):
        assert run.poll() is None, (folder / "err").read_text()
        time.sleep(0.005)
    return time.monotonic()


def copy_text(whole: Path, folder: Path) -> Path:
    return Path(shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("out", "err", "runs")))


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def break_off(folder: Path, command: list[str], signum: signal.Signals, seconds: float) -> bool:
    """Whether a signal for the whole group, so long after the beginning, has come before the folder was complete."""
    run = start(folder, command)
    when_begun(folder, run)
    time.sleep(seconds)
    os.killpg(run.pid, signum)
    status, err = run.wait(60), (folder / "err").read_text()
    assert "Traceback" not in err, err
    assert not still_left_over(folder)
    if signum == signal.SIGKILL:
        return not (folder / "out").exists()
    assert not hidden(folder), err
    if (folder / "out").exists():
        return False
    assert status == STATUS[signum], err
    stopped = [line for line in err.splitlines() if line.startswith("Lighthouse: stopped")]
    assert len(stopped) == 1, err
    assert "nothing is left; to prepare it: lighthouse prepare --output_dir " in stopped[0]
    assert not (folder / "runs").exists()
    return True


def check_random_kills(whole: tuple[Path, float], tmp_path: Path, seed: int, kills: list[tuple]) -> None:
    print(f"seed {seed}")
    draw = random.Random(seed)
    unbroken, seconds = whole
    folder = copy_text(unbroken, tmp_path / "broken")
    broken = 0
    for command, workers, signum in kills:
        # where a signal came too late, a fit went on to train
        for left in ("out", "runs"):
            shutil.rmtree(folder / left, ignore_errors=True)
        broken += break_off(folder, command(workers), signum, draw.uniform(0, 0.8 * seconds))
    assert broken >= len(kills) / 2
    shutil.rmtree(folder / "out", ignore_errors=True)
    assert start(folder, prepare_command(4)).wait(120) == 0, (folder / "err").read_text()
    assert not hidden(folder)
    assert content(folder / "out") == content(unbroken / "out")


@pytest.mark.slow
def test_a_preparation_stopped_at_random_is_made_again(whole: tuple[Path, float], tmp_path: Path) -> None:
    kills = [
        (prepare_command, 4, signal.SIGTERM),
        (prepare_command, 0, signal.SIGINT),
        (prepare_command, 4, signal.SIGKILL),
    ]
    check_random_kills(whole, tmp_path, random.randrange(2**32), kills)


@pytest.mark.slow
def test_so_is_one_inside_a_fit(whole: tuple[Path, float], tmp_path: Path) -> None:
    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGKILL)
    kills = [(command, n, kind) for command in (prepare_command, fit_command) for n in (0, 4) for kind in signals]
    check_random_kills(whole, tmp_path, random.randrange(2**32), kills)


def test_a_second_ctrl_c_is_immediate_and_leaves_no_process(whole: tuple[Path, float], tmp_path: Path) -> None:
    folder = copy_text(whole[0], tmp_path / "broken")
    run = start(folder, prepare_command(4))
    when_begun(folder, run)
    # the tokenizing processes run
    time.sleep(0.3)
    os.killpg(run.pid, signal.SIGINT)
    time.sleep(0.15)
    os.killpg(run.pid, signal.SIGINT)
    # where Python is already ending it dies of the signal itself, which a shell shows as 130 too
    assert run.wait(10) in (130, -signal.SIGINT)
    assert "Traceback" not in (folder / "err").read_text()
    assert not (folder / "out").exists()
    assert not still_left_over(folder)


WORK = """\
import time
from lightning_lighthouse.data.preparing.stopping import stop_on_signals

with stop_on_signals(lambda: "here") as wish, wish.at_once():
    import library
    for _ in range(1000):
        time.sleep(0.01)
print("too late")
"""
LIBRARY = """\
import os, pathlib, signal, threading, time

pathlib.Path("begun").touch()
for number in {signals}:
    {send}
    time.sleep(0.2)
pathlib.Path("whole").touch()
"""
SENT = {
    "inside": "os.kill(os.getpid(), number)",
    "behind": "threading.Timer(0.5, os.kill, (os.getpid(), number)).start()",
}


@pytest.mark.parametrize("program", [["work.py"], ["-c", "import work"]], ids=["a script", "itself imported"])
@pytest.mark.parametrize("when", SENT)
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_an_import_is_not_broken_off_and_what_follows_is(
    tmp_path: Path, signum: signal.Signals, when: str, program: list[str]
) -> None:
    (tmp_path / "work.py").write_text(WORK)
    (tmp_path / "library.py").write_text(LIBRARY.format(signals=[int(signum)], send=SENT[when]))
    began = time.monotonic()
    done = run_in(tmp_path, program)
    assert done.returncode == STATUS[signum], done.stderr
    assert done.stderr == "Lighthouse: stopped here\n"
    assert (tmp_path / "whole").exists()
    # of the ten seconds of its work
    assert "too late" not in done.stdout
    assert time.monotonic() - began < 8


def test_a_second_ctrl_c_breaks_off_an_import_too(tmp_path: Path) -> None:
    (tmp_path / "work.py").write_text(WORK)
    (tmp_path / "library.py").write_text(LIBRARY.format(signals=[int(signal.SIGINT)] * 2, send=SENT["inside"]))
    done = run_in(tmp_path, ["work.py"])
    assert done.returncode in (130, -signal.SIGINT)
    assert (tmp_path / "begun").exists()
    assert not (tmp_path / "whole").exists()


def run_in(folder: Path, program: list[str]) -> subprocess.CompletedProcess[str]:
    """Run Python there, with SIGINT as a terminal has it."""
    environment = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
    return subprocess.run(
        [sys.executable, *program], cwd=folder, env=environment, capture_output=True, text=True, timeout=60
    )
