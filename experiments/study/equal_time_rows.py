"""The rows of `equal_time.yaml`, and how many steps of each phase fill its share of the time."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

DENSE = "dense"
# of each phase that is probed: the first one compiles, and is not timed
PROBE_STEPS = 6
# of the schedule and of the text, so that a row of one step changes nothing
NO_RATE = 1e-12


@dataclass(frozen=True)
class Arm:
    """What is compared.

    Args:
        name: Of it.
        phases: Before the dense one, as `Phase` takes them, without `until`.
        attention: Settings of Lighthouse Attention over the recipe's.
        flags: What `lighthouse fit` is given beside.
        learning_rate: Its own; None: that of the part.
        steps: Train so many steps at no learning rate, instead of filling the time.
        cheap_share: Of the time, its own.
        decay_share: Of the time, its own; longer than the dense steps it begins before the switch.
    """

    name: str
    phases: list[dict[str, Any]] = field(default_factory=list)
    attention: dict[str, Any] = field(default_factory=dict)
    flags: str = ""
    learning_rate: float | None = None
    steps: int | None = None
    cheap_share: float | None = None
    decay_share: float | None = None

    def modes(self) -> list[str]:
        """A key for each phase, the dense one last, that phases with equally fast steps share."""
        return [self._mode(phase) for phase in self.phases] + [DENSE]

    def _mode(self, phase: Mapping[str, Any]) -> str:
        attention = self.attention if "lighthouse" in phase["layer_types"] else {}
        return json.dumps({**phase, **attention}, sort_keys=True)


@dataclass(frozen=True)
class Part:
    """What the rows of a part share; `equal_time.yaml` says what each value is."""

    name: str
    flags: str
    seconds: float
    seq_len: int
    learning_rate: float
    cheap_share: float
    decay_share: float
    warmup_share: float
    validations: int
    lengths: list[int]
    num_samples: int
    measures: list[str]
    start_seconds: float
    sample_seconds: float
    arms: list[Arm]


@dataclass(frozen=True)
class Row:
    """One training.

    Args:
        part: That it belongs to.
        arm: What it trains.
        seq_len: Tokens of a sequence.
        seconds: Of training.
        learning_rate: The peak.
        seed: Of weights, and of the order of the training sequences.
        needles: Share of its training sequences that hold needles.
    """

    part: Part
    arm: Arm
    seq_len: int
    seconds: float
    learning_rate: float
    seed: int
    needles: float = 0.0

    @property
    def name(self) -> str:
        """No other training has it."""
        thousands = f"{self.seq_len // 1024}k" if self.seq_len % 1024 == 0 else str(self.seq_len)
        words = [thousands, self.arm.name, *([f"needles{self.needles:g}"] if self.needles else [])]
        if self.arm.steps is None:
            words += [f"{self.seconds:g}s", f"{self.learning_rate:g}"]
        return "-".join([*words, f"seed{self.seed}"])

    @property
    def most_seconds(self) -> float:
        """It should not take longer, probing left out."""
        samples = (len(self.arm.phases) + 1) * self.part.num_samples
        # dense attention is most of an evaluation
        growth = (self.seq_len / self.part.seq_len) ** 2
        seconds = 0.0 if self.arm.steps else self.seconds
        return 1.05 * seconds + self.part.start_seconds + samples * self.part.sample_seconds * growth


@dataclass(frozen=True)
class Steps:
    """What fills the time.

    Args:
        ends: The first step behind each phase before the dense one.
        total: Of all phases.
        warmup: Of them at the start.
        decay_fraction: Of them at the end, as a share.
        validate_every: Steps from one validation to the next; divides the last of `ends`, and is at most the first.
    """

    ends: list[int]
    total: int
    warmup: int
    decay_fraction: float
    validate_every: int


def read_part(path: Path, name: str) -> Part:
    """A part of `equal_time.yaml`.

    Raises:
        KeyError: There is none of that name.
        TypeError: It has a key that is not known, or lacks one.
    """
    given = yaml.safe_load(path.read_text())[name]
    arms = [Arm(arm, **settings) for arm, settings in given.pop("arms").items()]
    # YAML takes 3e-4 for text
    numbers = {key: float(value) for key, value in given.items() if key in ("learning_rate", "seconds")}
    return Part(name, arms=arms, **{**given, **numbers})


def fill(row: Row, step_seconds: Mapping[str, float]) -> Steps:
    """How many steps of each phase fill its share of the time.

    Args:
        row: What is trained.
        step_seconds: Of a step of each of its modes.
    """
    part, arm = row.part, row.arm
    if arm.steps is not None:
        return Steps([], arm.steps, 0, 1.0, 1)
    *cheap, dense = (step_seconds[mode] for mode in arm.modes())
    share = (part.cheap_share if arm.cheap_share is None else arm.cheap_share) / len(cheap) if cheap else 0.0
    counts = [max(1, round(share * row.seconds / pace)) for pace in cheap]
    last = max(1, round((1.0 - share * len(cheap)) * row.seconds / dense))
    if counts:
        # a validation at the last switch is of the weights that switch, and one comes before the first: its text is
        # what all evaluations are made of
        before = sum(counts)
        parts = max(1, round(part.validations * before / (before + last)), math.ceil(before / counts[0]))
        validate_every = max(1, round(before / parts))
        counts[0] += validate_every * max(1, round(before / validate_every)) - before
    else:
        validate_every = max(1, last // part.validations)
    ends = [sum(counts[: number + 1]) for number in range(len(counts))]
    total = sum(counts) + last
    first = [*cheap, dense][0]
    warmup = min(total, math.ceil(part.warmup_share * row.seconds / first))
    decay_seconds = row.seconds * (part.decay_share if arm.decay_share is None else arm.decay_share)
    decay = min(last, round(decay_seconds / dense))
    if cheap and arm.decay_share is not None:
        decay += min(counts[-1], max(0, round((decay_seconds - last * dense) / cheap[-1])))
    return Steps(ends, total, warmup, min(1.0, max(decay, 1) / total), validate_every)


def arm_flags(arm: Arm, ends: Sequence[int]) -> list[str]:
    """What tells `lighthouse fit` of an arm.

    Args:
        arm: What is trained.
        ends: The first step behind each of its phases.
    """
    flags = shlex.split(arm.flags)
    if not arm.phases:
        return ["-c", "recipes/dense.yaml", *flags]
    phases = [{"until": end, **phase} for end, phase in zip(ends, arm.phases, strict=True)]
    # the short form of the recipe is replaced
    for name, nothing in (("switch_at", "null"), ("layer_types", "null"), ("window", "null"), ("sink_tokens", "0")):
        flags += [f"--lighthouse.{name}", nothing]
    flags += ["--lighthouse.phases", json.dumps(phases)]
    for name, value in arm.attention.items():
        flags += [f"--lighthouse.attention.{name}", str(value)]
    return flags


def fit_flags(row: Row, steps: Steps, num_samples: int) -> list[str]:
    """What `lighthouse fit` is given for a row, but for its files."""
    part = row.part
    flags = [*shlex.split(part.flags), *common_flags(row), *arm_flags(row.arm, steps.ends)]
    rate = NO_RATE if row.arm.steps else row.learning_rate
    flags += ["--model.learning_rate", f"{rate:g}", "--model.warmup_steps", str(steps.warmup)]
    flags += ["--model.decay_fraction", f"{steps.decay_fraction:.6f}", "--trainer.max_steps", str(steps.total)]
    flags += ["--trainer.val_check_interval", str(steps.validate_every)]
    lengths = [*(length for length in part.lengths if length < row.seq_len), row.seq_len]
    flags += ["--trainer.callbacks+=lightning_lighthouse.evaluation.LongContextEvaluation"]
    settings: dict[str, Any] = {"every_n_validations": 0, "lengths": lengths, "num_samples": num_samples}
    names = ("loss_by_position", "context_gain", "copies", "passkey", "lookups")
    settings |= {"max_share": "null"} | {name: "false" for name in names if name not in part.measures}
    for name, value in settings.items():
        flags += [f"--trainer.callbacks.init_args.{name}", str(value)]
    return flags


def probe_flags(row: Row, unknown: Sequence[str]) -> list[str]:
    """What `lighthouse fit` is given to time steps of these modes of a row, one after the other, and nothing else."""
    arm = row.arm
    phases = [phase for phase, mode in zip(arm.phases, arm.modes(), strict=False) if mode in unknown]
    ends = [PROBE_STEPS * (number + 1) for number in range(len(phases))]
    total = PROBE_STEPS * len(set(unknown))
    probed = Arm(arm.name, phases, arm.attention, arm.flags)
    flags = [*shlex.split(row.part.flags), *common_flags(row), *arm_flags(probed, ends)]
    return [*flags, "--trainer.max_steps", str(total), "--trainer.limit_val_batches", "0"]


def probes(rows: Sequence[Row]) -> list[Row]:
    """Rows with all phases of those that share a length and how they attend, to time their steps in one training.

    Args:
        rows: What is to be trained.
    """
    shared: dict[str, list[Row]] = {}
    for row in rows:
        if row.arm.steps is None:
            shared.setdefault(json.dumps([row.seq_len, row.arm.attention, row.arm.flags]), []).append(row)
    found = []
    for first, *others in shared.values():
        phases = {json.dumps(phase): phase for row in (first, *others) for phase in row.arm.phases}
        found.append(replace(first, arm=replace(first.arm, name="probe", phases=list(phases.values()))))
    return found


def common_flags(row: Row) -> list[str]:
    """Flags of a probe and of a training alike."""
    # the data have a seed of their own, and pretrained weights none: without it another seed is the same training again
    flags = ["--data.seq_len", str(row.seq_len), "--seed_everything", str(row.seed), "--data.seed", str(row.seed)]
    for name in ("enable_checkpointing", "enable_progress_bar"):
        flags += [f"--trainer.{name}", "false"]
    return [*flags, "--trainer.num_sanity_val_steps", "0"]


def known_steps(rows: Sequence[Mapping[str, str]], part: str, seq_len: int, device: str) -> dict[str, float]:
    """Seconds of a step by mode, of the rows of `equal_time_steps.csv` that fit; the last of each counts."""
    wanted = {"part": part, "seq_len": str(seq_len), "gpu": device}
    return {row["mode"]: float(row["step_seconds"]) for row in rows if wanted.items() <= row.items()}
