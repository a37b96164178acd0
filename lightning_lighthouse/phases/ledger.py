"""What each phase of a run cost and reached: steps, seconds, tokens, dense validation losses."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple

from lightning_lighthouse.attention.layer_types import DENSE, LIGHTHOUSE


@dataclass
class PhaseTotals:
    """Sums over one phase, all ranks.

    Args:
        steps: Optimizer steps.
        seconds: Training time, validation and checkpoints left out.
        tokens: Tokens of all batches.
        paced_tokens: Tokens of the batches whose time counts for throughput: all but the first of a phase and of a
            run, which compile.
        paced_seconds: Time of those batches.
        paced_waiting: What of that went by before the loader handed the batch out; on rank 0, the others' differs.
        routed_calls: Calls of the routed layers that attended as their type says, on this rank.
        dense_calls: Those that stayed dense, as one with a mask does. Compiled frames count as when they were traced.
    """

    steps: int = 0
    seconds: float = 0.0
    tokens: int = 0
    paced_tokens: int = 0
    paced_seconds: float = 0.0
    paced_waiting: float = 0.0
    routed_calls: int = 0
    dense_calls: int = 0

    @property
    def tokens_per_second(self) -> float | None:
        """None before a batch was timed."""
        return self.paced_tokens / self.paced_seconds if self.paced_seconds > 0 else None

    @property
    def seconds_per_step(self) -> float | None:
        """Of an optimizer step, compilation left out where tokens are counted; None before a step was timed."""
        if not self.steps or not self.seconds:
            return None
        rate = self.tokens_per_second
        return self.tokens / self.steps / rate if rate else self.seconds / self.steps

    @property
    def waiting_share(self) -> float | None:
        """Share of the timed batches' time that the process waited for data; None before a batch was timed.

        A GPU that still has work meanwhile loses less.
        """
        return self.paced_waiting / self.paced_seconds if self.paced_seconds > 0 else None

    @property
    def in_words(self) -> str:
        """Time, steps and speed, and what was lost of it."""
        words = [f"{self.steps} steps"]
        if self.tokens_per_second is not None:
            words += [f"{self.tokens_per_second:,.0f} tokens/s", f"{self.waiting_share:.1%} of it waiting for data"]
        if self.dense_share:
            words.append(f"{self.dense_share:.1%} of the attention calls stayed dense")
        return f"{self.seconds:.1f} s ({', '.join(words)})"

    @property
    def dense_share(self) -> float | None:
        """Share of the routed layers' calls that stayed dense; None where none was counted, as in a dense phase."""
        calls = self.routed_calls + self.dense_calls
        return self.dense_calls / calls if calls else None


class Validation(NamedTuple):
    """One dense validation.

    Args:
        step: Optimizer steps done.
        seconds: Training time spent until then, both phases.
        phase: Phase of the last training batch.
        loss: Validation loss.
    """

    step: int
    seconds: float
    phase: str
    loss: float


@dataclass
class Ledger:
    """Totals of every phase, by its name, and every dense validation."""

    phases: dict[str, PhaseTotals] = field(default_factory=dict)
    validations: list[Validation] = field(default_factory=list)

    def totals(self, phase: str) -> PhaseTotals:
        """The totals of a phase."""
        return self.phases.setdefault(phase, PhaseTotals())

    @property
    def seconds(self) -> float:
        """Training time of all phases."""
        return sum(totals.seconds for totals in self.phases.values())

    @property
    def validations_of_this_phase(self) -> list[Validation]:
        """The newest ones, all of one phase."""
        phase = self.validations[-1].phase if self.validations else DENSE
        others = [index for index, validation in enumerate(self.validations) if validation.phase != phase]
        return self.validations[others[-1] + 1 if others else 0 :]

    @property
    def before_switch(self) -> Validation | None:
        """The last validation before the dense phase."""
        return next((v for v in reversed(self.validations) if v.phase != DENSE), None)

    @property
    def after_switch(self) -> Validation | None:
        """The first validation after that with dense training behind it; None for a dense baseline."""
        before = self.before_switch
        if before is None:
            return None
        return next((v for v in self.validations[self.validations.index(before) :] if v.phase == DENSE), None)

    @property
    def last_validation(self) -> Validation | None:
        """The newest."""
        return self.validations[-1] if self.validations else None

    def add_validation(self, step: int, phase: str, loss: float) -> None:
        """Record a dense validation after `step` optimizer steps, the last of them in `phase`."""
        self.validations.append(Validation(step, self.seconds, phase, loss))

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {
            "phases": {phase: asdict(totals) for phase, totals in self.phases.items()},
            "validations": [tuple(validation) for validation in self.validations],
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Ledger:
        """The ledger of a checkpoint; those of version 0.1 knew two phases, and had a key for each."""
        phases = state.get("phases") or {phase: state[phase] for phase in (LIGHTHOUSE, DENSE) if phase in state}
        validations = [Validation(*values) for values in state.get("validations", [])]
        names = {entry.name for entry in fields(PhaseTotals)}
        # what an earlier version kept beside them is left out
        kept = {phase: {name: totals[name] for name in totals if name in names} for phase, totals in phases.items()}
        return cls({phase: PhaseTotals(**totals) for phase, totals in kept.items()}, validations)

    def summary(self, step: int) -> list[str]:
        """The run in two lines: dense validation losses, and time by phase.

        Args:
            step: Optimizer steps done at its end.
        """
        found = [(self.before_switch, "before the switch"), (self.after_switch, "after it"), (self.last_validation, "")]
        # the first of the dense phase may be the last of all
        shown = [
            (what, where) for what, where in found if what is not None and (what != self.last_validation or not where)
        ]
        losses = [f"{what.loss:.4f} {where or 'at the end'} (step {what.step})" for what, where in shown]
        if self.last_validation is not None and self.last_validation.step != step:
            losses[-1] += f"; the final weights are those of step {step}"
        lines = [f"dense validation loss: {', '.join(losses)}"] if losses else []
        times = [f"{phase} {totals.in_words}" for phase, totals in self.phases.items() if totals.steps]
        return [*lines, *([f"training time: {', '.join(times)}"] if times else [])]
