"""What should a user do with equal time? Run the rows of a part of `equal_time.yaml` that its table lacks.

    python experiments/study/equal_time.py extension --model smollm2 --source books-train.jsonl.gz \
        --validation_source books-val.jsonl.gz --seconds 120 --minutes 9 --gpus 0 1
    python experiments/study/equal_time.py from_nothing --source ... --validation_source ...
    python experiments/study/equal_time.py paper --source ... --validation_source ...

Each GPU trains one at a time, through `lighthouse fit`; with `--beside 2` the next one starts and compiles meanwhile,
and waits for its turn (`turns.py`). The steps of each phase are timed once for each length and kind of GPU by a short
training of their own, kept in `equal_time_steps.csv`; how many of them fill a phase's share of the time follows.
`--probe` times those of all that is asked for in one training, and ends. Each training that ends appends its row to
`PART.csv`, and what was measured at its switches and its end to `PART_measures.csv`; one that died leaves nothing there
and is done again. Where a training ended and its row was not written, `--collect` writes it from its logs, also on a
machine without a GPU. `equal_time_table.py` makes tables and plots of both.
"""

from __future__ import annotations

import argparse
import csv
import fnmatch
import queue
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from equal_time_results import device_of, measures, summary, timed_steps
from equal_time_rows import Row, fill, fit_flags, known_steps, probe_flags, probes, read_part
from run import append, forget
from turns import turn_environment, turn_flags

from lightning_lighthouse.cli.fit import drop_notices
from lightning_lighthouse.cli.plan import Planned
from lightning_lighthouse.data.preparing.prepare import prepare
from lightning_lighthouse.notices import quiet_lightning
from lightning_lighthouse.runs.comparison import read_report
from lightning_lighthouse.runs.evaluation_record import read_evaluations

HERE = Path(__file__).parent
STEPS = "equal_time_steps.csv"
# a probe starts, compiles and times a few steps
PROBE_SECONDS = 60
# parsers keep state
_planning = threading.Lock()


def read(path: Path) -> list[dict[str, str]]:
    """The lines of a table; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def name_of_gpu(gpu: str | None, flags: str) -> str:
    """Of the GPU that a training would take, as its report says it."""
    if "--trainer.accelerator cpu" in flags:
        return "cpu"
    asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader", "-i", gpu or "0"]
    return subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()


def peta_flops(flags: Sequence[str]) -> float:
    """Of a whole training, as `lighthouse plan` counts them, in units of 10^15."""
    with _planning, quiet_lightning(), torch.device("meta"):
        drop_notices()
        run = Planned(flags).read()
    return sum(part.steps * sum(run.estimate(part.layers, None).flops.values()) for part in run.parts) / 1e15


class Runner:
    """Runs rows, and appends what came out.

    Args:
        arguments: Of the command line.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.deadline = time.monotonic() + 60 * arguments.minutes
        self.table = arguments.out / f"{arguments.part}.csv"
        self.failed: list[str] = []

    def where(self, row: Row) -> list[str]:
        """Flags that name the files of a row."""
        model = self.arguments.model
        words = ["data", "tokens" if model else "bytes", str(row.seq_len)]
        words += [f"needles{row.needles:g}"] if row.needles else []
        folder = self.arguments.runs / "-".join(words)
        # prepared already: what it was made from no longer matters
        flags = ["--data.source", str(folder), "--data.tokenizer", model or "bytes"]
        return [*flags, "--model.model", model] if model else flags

    def prepared(self, row: Row) -> list[str]:
        """Prepare the data of a row, unless they are; `where` they are."""
        asked, (_, folder, _, tokenizer, *_) = self.arguments, self.where(row)
        texts: dict[str, object] = {"source": asked.source}
        if row.needles:
            weights = {asked.source: 1.0 - row.needles, asked.needles: row.needles}
            texts = {"sources": [{"path": path, "weight": weight} for path, weight in weights.items()]}
        with _planning:
            prepare(
                folder,
                seq_len=row.seq_len,
                validation_source=asked.validation_source,
                tokenizer=tokenizer,
                num_workers=asked.num_workers,
                **texts,
            )
        return self.where(row)

    def fit(self, name: str, flags: Sequence[str], gpu: str | None, is_alone: bool = False) -> Path | None:
        """Train in a process of its own; the folder of its logs, None where it failed.

        Args:
            name: Of its files.
            flags: Of `lighthouse fit`.
            gpu: Where.
            is_alone: Whether no other training may begin beside its timed steps, which are few.
        """
        runs = self.arguments.runs.absolute()
        flags = [*flags, "--trainer.logger.init_args.save_dir", str(runs)]
        flags += ["--trainer.logger.init_args.name", name, "--trainer.logger.init_args.version", "0"]
        flags += turn_flags(runs, gpu, is_alone)
        runs.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        with (runs / f"{name}.log").open("w") as log:
            program = [sys.executable, "-m", "lightning_lighthouse.cli", "fit", *flags]
            status = subprocess.run(program, stdout=log, stderr=subprocess.STDOUT, env=turn_environment(gpu)).returncode
        print(f"{name}: status {status} after {time.monotonic() - started:.0f} s", flush=True)
        return None if status else self.log_folder(name)

    def step_seconds(self, row: Row, gpu: str | None, is_asked: bool = True) -> dict[str, float] | None:
        """Seconds of a step of each of a row's modes, probed where they are not known; None where that failed.

        Args:
            row: What is to be trained.
            gpu: Where.
            is_asked: False: None instead of a probe.
        """
        device = name_of_gpu(gpu, row.part.flags)
        path = self.arguments.out / STEPS
        known = known_steps(read(path), row.part.name, row.seq_len, device)
        unknown = [mode for mode in row.arm.modes() if mode not in known]
        if row.arm.steps is not None or not unknown:
            return known
        if not is_asked:
            return None
        flags = [*probe_flags(row, unknown), *self.prepared(row)]
        folder = self.fit(f"probe-{row.name}", flags, gpu, is_alone=True)
        if folder is None:
            return None
        return known | self.note_steps(row, folder, unknown)

    def note_steps(self, row: Row, folder: Path, modes: Sequence[str]) -> dict[str, float]:
        """Keep what a training took for a step of each mode; a later one of more steps knows better."""
        found, device = timed_steps(folder, modes)
        key = {"part": row.part.name, "seq_len": row.seq_len, "gpu": device}
        lines = [{**key, "mode": mode, "step_seconds": pace} for mode, pace in found.items()]
        if lines:
            append(self.arguments.out / STEPS, lines)
            print(f"{row.arm.name}: {', '.join(f'{pace:.3f} s a step of {mode}' for mode, pace in found.items())}")
        return found

    def has_time(self, row: Row, gpu: str | None) -> bool:
        """Whether a row would end before the deadline."""
        probing = 0 if self.step_seconds(row, gpu, is_asked=False) is not None else PROBE_SECONDS
        # those beside it take turns with it
        return time.monotonic() + probing + self.arguments.beside * row.most_seconds <= self.deadline

    def run(self, row: Row, gpu: str | None) -> bool:
        """Train a row, and append what came out; whether it ended well."""
        paces = self.step_seconds(row, gpu)
        if paces is None:
            return False
        flags = [*fit_flags(row, fill(row, paces), row.part.num_samples), *self.prepared(row)]
        started = time.monotonic()
        folder = self.fit(row.name, flags, gpu)
        if folder is None:
            return False
        wall = time.monotonic() - started
        line = self.note(row, folder, flags)
        # what others ran beside would make the next rows shorter
        if row.arm.steps is None and self.arguments.beside == 1:
            self.note_steps(row, folder, row.arm.modes())
        evaluating = sum(one["seconds"] for one in read_evaluations(folder))
        beside = wall - line["seconds"] - evaluating
        print(
            f"{row.name}: {line['seconds']:.0f} s, validation loss {line['val_loss']}; evaluations {evaluating:.0f} s, "
            f"start, compilation, validations and waiting {beside:.0f} s",
            flush=True,
        )
        return True

    def note(self, row: Row, folder: Path, flags: Sequence[str]) -> dict[str, Any]:
        """Append the row of a training, which is returned, and what was measured.

        Args:
            row: What was trained.
            folder: Of its logs.
            flags: That it was given.
        """
        told = {"pflop": peta_flops(flags), "commit": self.arguments.commit}
        # of places that only this machine has, the name
        shown = [Path(flag).name if Path(flag).is_absolute() else flag for flag in flags]
        line = summary(row, folder) | told | {"command": shlex.join(["lighthouse", "fit", *shown])}
        path = self.table.with_name(f"{self.arguments.part}_measures.csv")
        forget(path, {"row": row.name})
        append(path, measures(row, folder))
        append(self.table, [line])
        return line

    def collect(self, row: Row) -> bool:
        """Append a row whose training ended, and was not noted; whether it ended, as this row would."""
        folder = self.log_folder(row.name)
        try:
            report, evaluations = read_report(folder), read_evaluations(folder)
        except FileNotFoundError:
            print(f"{row.name}: no training of it has ended in {self.arguments.runs}")
            return False
        paces = known_steps(read(self.arguments.out / STEPS), row.part.name, row.seq_len, device_of(report))
        if row.arm.steps is None and not paces.keys() >= set(row.arm.modes()):
            print(f"{row.name}: {STEPS} lacks the steps of {device_of(report)} that say how many it had to train")
            return False
        steps = fill(row, paces)
        if (report["steps"], len(evaluations)) != (steps.total, len(steps.ends) + 1):
            print(
                f"{row.name}: {steps.total} steps and {len(steps.ends) + 1} evaluations were asked of it, got "
                f"{report['steps']} and {len(evaluations)}"
            )
            return False
        line = self.note(row, folder, [*fit_flags(row, steps, row.part.num_samples), *self.where(row)])
        print(f"{row.name}: {line['seconds']:.0f} s, validation loss {line['val_loss']}")
        return True

    def log_folder(self, name: str) -> Path:
        """Where a training writes."""
        return self.arguments.runs.absolute() / name / "version_0"

    def work(self, waiting: queue.Queue[Row], gpu: str | None) -> None:
        """Run what waits, one after the other."""
        while True:
            try:
                row = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                if not self.has_time(row, gpu):
                    print(f"{row.name}: no time left", flush=True)
                    continue
                has_ended_well = self.run(row, gpu)
            # one training without a report does not cost the others
            except Exception as error:
                print(f"{row.name}: {error!r}", flush=True)
                has_ended_well = False
            if not has_ended_well:
                self.failed.append(row.name)


def rows_asked(arguments: argparse.Namespace) -> list[Row]:
    """The rows that the command line asks for, most informative first: all arms of a seed, then the next seed."""
    part = read_part(arguments.rows, arguments.part)
    part = replace(part, flags=f"{part.flags} {arguments.flags}".strip())
    for name in ("num_samples", "start_seconds", "sample_seconds"):
        if (value := getattr(arguments, name)) is not None:
            part = replace(part, **{name: value})
    by_name = {arm.name: arm for arm in part.arms}
    needles = 0.0 if arguments.needles is None else arguments.needles_share
    # each once, those of the first pattern first
    names = dict.fromkeys(name for pattern in arguments.only for name in fnmatch.filter(by_name, pattern))
    return [
        Row(part, arm, seq_len, arguments.seconds or part.seconds, rate, seed, needles)
        for seq_len in arguments.seq_len or [part.seq_len]
        for seed in arguments.seeds
        for arm in map(by_name.__getitem__, names)
        for rate in arguments.learning_rate or [arm.learning_rate or part.learning_rate]
    ]


def main() -> int:
    """Run what is missing; 1 if a training failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("part", choices=["extension", "from_nothing", "paper"])
    add("--source", required=True, help="texts to train on")
    add("--validation_source", required=True, help="texts to validate on")
    add("--model", help="folder of the pretrained model, with its tokenizer")
    add("--needles", help="texts that make up a share of the training data: needles.py writes them")
    add("--needles_share", type=float, default=0.1, help="of the training sequences (default: %(default)s)")
    add("--rows", type=Path, default=HERE / "equal_time.yaml", help="what to run (default: %(default)s)")
    add("--only", nargs="*", default=["*"], help="patterns of the arms to run, in this order")
    add("--seconds", type=float, help="of training, instead of the part's")
    add("--seq_len", type=int, nargs="*", help="tokens of a sequence, instead of the part's")
    add("--learning_rate", type=float, nargs="*", help="instead of the arm's")
    add("--seeds", type=int, nargs="*", default=[42])
    add("--num_samples", type=int, help="of an evaluation, instead of the part's")
    add("--start_seconds", type=float, help="of a row beside training and evaluation, instead of the part's")
    add("--sample_seconds", type=float, help="of one sample of an evaluation, instead of the part's")
    add("--flags", default="", help="what lighthouse fit is given beside, in one word; no row is named by it")
    add("--gpus", nargs="*", default=[None], help="GPUs to train on (default: all to one training)")
    add("--beside", type=int, default=1, help="trainings on a GPU that take turns (default: %(default)s)")
    add("--probe", action="store_true", help="time the steps that are not known, and train nothing")
    add("--collect", action="store_true", help="write rows of trainings that ended without, and train nothing")
    add("--minutes", type=float, default=float("inf"), help="start nothing that would end after this")
    add("--num_workers", type=int, default=4, help="processes that prepare data (default: %(default)s)")
    add("--runs", type=Path, default=Path("runs/equal-time"), help="data and log folders (default: %(default)s)")
    add("--out", type=Path, default=HERE.parent, help="folder of the tables (default: %(default)s)")
    add("--commit", default="", help="what is noted in the table")
    arguments = parser.parse_args()
    if (arguments.part == "extension") == (arguments.model is None):
        parser.error("--model belongs to extension, which needs it")

    runner = Runner(arguments)
    if arguments.probe:
        found = [runner.step_seconds(row, arguments.gpus[0]) for row in probes(rows_asked(arguments))]
        return 1 if None in found else 0
    done = {line["row"] for line in read(runner.table)}
    missing = []
    for row in rows_asked(arguments):
        if row.name in done:
            # also where --flags or the part's settings, which name no row, are others than they were
            print(f"{row.name}: in {runner.table.name} already", flush=True)
        else:
            missing.append(row)
    if arguments.collect:
        collected = [runner.collect(row) for row in missing]
        return 0 if all(collected) else 1
    waiting: queue.Queue[Row] = queue.Queue()
    for row in missing:
        waiting.put(row)
    gpus = [gpu for gpu in arguments.gpus for _ in range(arguments.beside)]
    workers = [threading.Thread(target=runner.work, args=(waiting, gpu)) for gpu in gpus]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return 1 if runner.failed else 0


if __name__ == "__main__":
    sys.exit(main())
