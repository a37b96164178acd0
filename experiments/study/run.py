"""Run the rows of `rows.yaml` that `rows.csv` lacks, one training on each GPU at a time, through the command line.

Others may start and compile beside it: all that have the same `--runs` take turns (`turns.py`), those of
`equal_time.py` too.

    python experiments/study/run.py --source books-train.jsonl.gz --validation_source books-val.jsonl.gz

Each finished training appends its row to `rows.csv` and its validations to `validations.csv`; a run that died leaves
nothing there and is done again. Where a training ended and its row was not written, `--collect` writes it from its
logs. `python experiments/study/table.py` makes the tables and plots of `docs/numbers/settings.md` from both.
"""

from __future__ import annotations

import argparse
import csv
import fnmatch
import os
import queue
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from equal_time_results import phase_seconds, seconds_until
from turns import turn_environment, turn_flags

from lightning_lighthouse.runs.comparison import read_report, summarize

HERE = Path(__file__).parent
# every worker appends to the same two files
_lock = threading.Lock()


@dataclass(frozen=True)
class Training:
    """One training of the study.

    Args:
        name: Of its row.
        seed: Of its weights; batches come in one order.
        flags: What `lighthouse fit` is given.
        minutes: It should not take longer, start and validation included.
    """

    name: str
    seed: int
    flags: str
    minutes: float


def read_trainings(path: Path) -> list[Training]:
    """The trainings of `rows.yaml` in their order: `groups` of rows that share flags."""
    trainings = []
    for group in yaml.safe_load(path.read_text())["groups"]:
        for row in group["rows"]:
            flags = " ".join([group["flags"], row.get("flags", "")]).strip()
            minutes = row.get("minutes", group["minutes"])
            trainings += [Training(row["name"], seed, flags, minutes) for seed in row.get("seeds", [42])]
    return trainings


def is_done(training: Training, table: Path) -> bool:
    """Whether the table has the row."""
    if not table.exists():
        return False
    with table.open(newline="") as stream:
        return any((row["name"], row["seed"]) == (training.name, str(training.seed)) for row in csv.DictReader(stream))


def append(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Add rows to a table; the first makes its header. ValueError if the table has other columns, in any order."""
    with _lock, path.open("a+", newline="") as stream:
        stream.seek(0)
        header = next(csv.reader(stream), None)
        columns = list(rows[0])
        if header is not None and sorted(header) != sorted(columns):
            raise ValueError(f"{path}: its columns must be {', '.join(columns)}, got {', '.join(header)}")
        writer = csv.DictWriter(stream, header or columns)
        if header is None:
            writer.writeheader()
        writer.writerows(rows)


def forget(path: Path, key: dict[str, Any]) -> None:
    """Remove the lines of a training that was killed before its row was written."""
    wanted = {name: str(value) for name, value in key.items()}
    with _lock:
        if not path.exists():
            return
        with path.open(newline="") as stream:
            rows = list(csv.DictReader(stream))
        kept = [row for row in rows if not wanted.items() <= row.items()]
        if len(kept) == len(rows):
            return
        partial = path.with_suffix(".partial")
        with partial.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(kept)
        os.replace(partial, path)


def read_probe(report: Mapping[str, Any]) -> dict[str, Any]:
    """The last result of the FutureLeakProbe, which is that right before the switch; empty without one."""
    names = ("leak_nats", "leak_stderr", "lighthouse_loss", "spike_nats")
    last = report["probes"][-1] if report["probes"] else {}
    return {name: last.get(name) for name in names}


def run(training: Training, arguments: argparse.Namespace, gpu: str | None) -> bool:
    """Train, and append what came out; whether it ended well."""
    name = name_of(training)
    where = ["--data.source", arguments.source, "--data.validation_source", arguments.validation_source]
    where += ["--trainer.logger.init_args.save_dir", str(arguments.runs), "--trainer.logger.init_args.name", name]
    where += ["--trainer.logger.init_args.version", "0", *turn_flags(arguments.runs, gpu)]
    arguments.runs.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with (arguments.runs / f"{name}.log").open("w") as log:
        program = [sys.executable, "-m", "lightning_lighthouse.cli", *command_of(training)[1:], *where]
        status = subprocess.run(program, stdout=log, stderr=subprocess.STDOUT, env=turn_environment(gpu)).returncode
    seconds = time.monotonic() - started
    print(f"{name}: status {status} after {seconds:.0f} s", flush=True)
    if status:
        return False
    note(training, arguments)
    return True


def name_of(training: Training) -> str:
    """No other training has it."""
    return f"{training.name}-seed{training.seed}"


def command_of(training: Training) -> list[str]:
    """As its row names it, without what belongs to a machine."""
    return ["lighthouse", "fit", *shlex.split(training.flags), "--seed_everything", str(training.seed)]


def note(training: Training, arguments: argparse.Namespace) -> None:
    """Append the row of a training that has ended, and its validations.

    Its seconds count the first step of each phase as those behind it: it compiles, and waits for its turn.
    """
    name = name_of(training)
    report = read_report(arguments.runs / name / "version_0")
    key = {"name": training.name, "seed": training.seed}
    summary = asdict(summarize(name, report))
    # the table makes the second, against the dense run of the same length; the others are of evaluations
    for column in ("run", "seconds_to_reference", "passkey", "lookups", "copy_gain", "context_gain"):
        del summary[column]
    passed = phase_seconds(report)
    summary |= {f"{phase}_seconds": passed.get(phase, 0.0) for phase in ("lighthouse", "dense")}
    row = {**key, **summary, **read_probe(report), "commit": arguments.commit, "torch": report["versions"]["torch"]}
    validations = [one | {"seconds": seconds_until(report, one["step"])} for one in report["validations"]]
    forget(arguments.out / "validations.csv", key)
    append(arguments.out / "validations.csv", [{**key, **validation} for validation in validations])
    append(arguments.out / "rows.csv", [{**row, "command": shlex.join(command_of(training))}])
    print(f"{name}: final {summary['final_loss']}, at the switch {summary['loss_at_switch']}", flush=True)


def main() -> int:
    """Run what is missing; 1 if a training failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, help="texts to train on")
    parser.add_argument("--validation_source", required=True, help="texts to validate on")
    parser.add_argument("--rows", type=Path, default=HERE / "rows.yaml", help="what to run (default: %(default)s)")
    parser.add_argument("--only", nargs="*", default=["*"], help="patterns of the names of rows to run")
    parser.add_argument("--gpus", nargs="*", default=[None], help="GPUs, one training on each (default: all to one)")
    parser.add_argument("--collect", action="store_true", help="write rows of trainings that ended, and train nothing")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start nothing that would end after this")
    parser.add_argument("--runs", type=Path, default=Path("runs/study"), help="log folders (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the two tables (default: %(default)s)")
    parser.add_argument("--commit", default="", help="what is noted in the table")
    arguments = parser.parse_args()

    deadline = time.monotonic() + 60 * arguments.minutes
    waiting: queue.Queue[Training] = queue.Queue()
    for training in read_trainings(arguments.rows):
        is_asked = any(fnmatch.fnmatch(training.name, pattern) for pattern in arguments.only)
        if is_asked and not is_done(training, arguments.out / "rows.csv"):
            waiting.put(training)
    failed = []
    if arguments.collect:
        for training in waiting.queue:
            try:
                note(training, arguments)
            except FileNotFoundError:
                print(f"{name_of(training)}: no training of it has ended in {arguments.runs}")
                failed.append(training.name)
        return 1 if failed else 0

    def work(gpu: str | None) -> None:
        while True:
            try:
                training = waiting.get_nowait()
            except queue.Empty:
                return
            if time.monotonic() + 60 * training.minutes > deadline:
                print(f"{name_of(training)}: no time left", flush=True)
                continue
            try:
                has_ended_well = run(training, arguments, gpu)
            # one training without a report does not cost the others
            except (OSError, ValueError, KeyError, IndexError) as error:
                print(f"{name_of(training)}: {error!r}", flush=True)
                has_ended_well = False
            if not has_ended_well:
                failed.append(training.name)

    workers = [threading.Thread(target=work, args=(gpu,)) for gpu in arguments.gpus]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
