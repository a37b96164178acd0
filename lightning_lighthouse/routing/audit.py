"""Check that every attention layer that should be routed was.

A layer that silently stays dense is the failure that this file exists for: the run would be slow and nobody would know.
Each call of SDPA in scope leaves a note: "routed", or the reason why it stayed dense. In eager code a note carries its
layer. Under torch.compile a note is left once, when a frame is traced, and layers that share a frame share it. A frame
traced before leaves none: what was once seen to be routed in one is remembered for the life of the module, and for the
next modules of the same code, which use the frame again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from typing import Any
from weakref import WeakSet

import torch
from torch import nn

from lightning_lighthouse.routing.reasons import (
    CHECKPOINT_INSIDE,
    COPIES,
    ENTERED,
    ENTERED_FROZEN,
    ENTERED_WITHOUT_GRADIENTS,
    EXITED,
    FROZEN,
    INFERENCE,
    INSIDE,
    ITSELF,
    NO_CALL,
    NOT_RUN,
    ROUTED,
    TEACHER,
    remedy,
)
from lightning_lighthouse.routing.score_spread import ScoreSpread


class _Memory:
    """What was once seen to be as it should be."""

    def __init__(self) -> None:
        self.layers: WeakSet[nn.Module] = WeakSet()
        # Code of layers that lay inside a traced frame, and of those that ran in eager code around one.
        self.inside: WeakSet[Any] = WeakSet()
        self.around: WeakSet[Any] = WeakSet()


_routed, _in_documents = _Memory(), _Memory()


class Audit:
    """Notes of the first batch in which layers are routed, or of the first one with documents.

    Args:
        targets: The layers by name that should be routed, or stay inside documents.
        told: Names of those of them that an earlier audit has told of: this one says nothing of them.
        of_documents: Ask for a call inside documents, routed or dense.
        may_rest: Ask nothing of layers that do not run where others do: an average of the model stands for it.
    """

    def __init__(
        self,
        targets: dict[str, nn.Module],
        *,
        told: Collection[str] = (),
        of_documents: bool = False,
        may_rest: bool = False,
    ) -> None:
        self.targets, self._told = targets, told
        self._may_rest = may_rest
        self._of_documents = of_documents
        self._memory = _in_documents if of_documents else _routed
        self._by_layer: dict[nn.Module, set[str]] = defaultdict(set)
        self._traced: set[str] = set()
        # what was traced inside a layer that itself runs in eager code, by its class: such layers share frames
        self._traced_in: dict[type, set[str]] = defaultdict(set)
        # layers that a trace has entered and not left: the trace, and whether it has met a call there
        self._open: list[tuple[Any, bool]] = []
        self.spread = ScoreSpread()

    @property
    def saw_a_layer(self) -> bool:
        """Whether any layer ran, or was traced."""
        return bool(self._by_layer or self._traced)

    def add(self, layer: nn.Module | None, note: str) -> None:
        """Record that a layer ran, or what became of its call: `layer` is None while a frame is traced."""
        trace = torch._guards.TracingContext.try_get()
        if trace is not None:
            note = self._follow(trace, note)
        note = self._judged(note)
        if trace is not None and layer is not None:
            self._traced_in[type(layer)].add(note)
        if layer is None:
            self._traced.add(note)
        else:
            self._by_layer[layer].add(note)

    def _judged(self, note: str) -> str:
        """What a note means here: a dense call inside documents is all that documents ask for, and else is none."""
        if self._of_documents and note in (INSIDE, INFERENCE, ENTERED_WITHOUT_GRADIENTS, ENTERED_FROZEN):
            return ROUTED if note == INSIDE else ENTERED
        return ENTERED if note == INSIDE else note

    def _follow(self, trace: Any, note: str) -> str:
        """Notice a layer that a trace leaves without a call; a graph break ends a trace inside the layer."""
        if note == ENTERED:
            self._open.append((trace, False))
        elif note == EXITED:
            entered_in, has_called = self._open.pop() if self._open else (None, True)
            return NO_CALL if entered_in is trace and not has_called else ENTERED
        elif self._open:
            self._open[-1] = (self._open[-1][0], True)
        return note

    def unrouted(self) -> dict[str, str]:
        """The layers that were not routed, with the reason and what to do. Layers that were are remembered."""
        missing = {}
        some_run = self._may_rest and any(ROUTED in notes for notes in self._by_layer.values())
        some_train = self._some_train()
        for name, layer in self.targets.items():
            if name in self._told:
                continue
            notes = self._by_layer.get(layer) or self._traced
            if ENTERED_FROZEN in notes:
                # routed as the others are; `trains_nothing` tells of it
                notes = notes - {ENTERED_FROZEN} | {ENTERED}
            if some_run and not notes:
                continue
            if ENTERED_WITHOUT_GRADIENTS in notes:
                # a layer that never has them does not train; where none has, somebody only looks at the outputs
                if some_train and ENTERED not in notes and ROUTED in notes:
                    missing[name] = _explained(TEACHER, layer)
                    continue
                notes = notes - {ENTERED_WITHOUT_GRADIENTS} | {ENTERED}
            if notes == {ENTERED}:
                notes = notes | self._traced_in[type(layer)]
            reasons = notes - {ENTERED}
            # several layers share a traced frame: one dense call among them leaves all of them in doubt
            doubtful = layer not in self._by_layer and reasons != {ROUTED}
            # routed forward, dense in the recompute of an outer reentrant checkpoint: wrong gradients
            doubtful |= CHECKPOINT_INSIDE in reasons
            if ROUTED in reasons and not doubtful:
                # eager code leaves its notes each time, so that nothing need be remembered
                if layer not in self._by_layer:
                    self._memory.layers.add(layer)
                    self._memory.inside.add(_code(layer))
                elif ROUTED in self._traced_in[type(layer)]:
                    self._memory.layers.add(layer)
                    self._memory.around.add(_code(layer))
            elif reasons:
                missing[name] = "; ".join(_explained(reason, layer) for reason in sorted(reasons - {ROUTED}))
            elif layer not in self._memory.layers and not self._uses_old_frames(layer, notes):
                missing[name] = _explained(NO_CALL if notes else NOT_RUN, layer)
        return missing

    def trains_nothing(self) -> list[str]:
        """A line each on what was routed and trains nothing, where others train, and may be meant so."""
        if not self._some_train():
            return []
        named = {layer: name for name, layer in self.targets.items()}
        frozen, copied = [], []
        for layer, notes in self._by_layer.items():
            # a copy has the name of its original
            name = str(layer.__dict__["_lighthouse_route"].name)
            if ROUTED not in notes or ENTERED in notes or name in self._told:
                continue
            if layer not in named:
                copied.append(name or ITSELF)
            elif ENTERED_FROZEN in notes:
                frozen.append(name or ITSELF)
        return [line.format(", ".join(sorted(names))) for line, names in ((FROZEN, frozen), (COPIES, copied)) if names]

    def _some_train(self) -> bool:
        return any(ENTERED in self._by_layer.get(layer, ()) for layer in self.targets.values())

    def _uses_old_frames(self, layer: nn.Module, notes: set[str]) -> bool:
        """Whether nothing was traced because frames of a former model of the same code serve this one."""
        if notes:
            return not self._traced_in[type(layer)] and _code(layer) in self._memory.around
        return not self.saw_a_layer and _code(layer) in self._memory.inside


def _code(layer: nn.Module) -> Any:
    """The code of a routed layer's former forward."""
    forward = vars(layer).get("_lighthouse_chained") or type(layer).forward
    forward = getattr(forward, "_torchdynamo_orig_callable", forward)
    forward = getattr(forward, "__func__", forward)
    return getattr(forward, "__code__", type(layer))


def _explained(reason: str, layer: nn.Module) -> str:
    advice = remedy(reason, layer)
    return f"{reason} ({advice})" if advice else reason


def explain_documents(missing: dict[str, str], num_layers: int) -> str:
    """One line that names every layer which was not seen to stay inside documents, and why."""
    by_reason = defaultdict(list)
    for name, reason in missing.items():
        by_reason[reason].append(name or ITSELF)
    parts = [f"{', '.join(found)}: {reason}" for reason, found in by_reason.items()]
    return f"{len(missing)} of {num_layers} attention layers were not seen inside documents: {' | '.join(parts)}"


def explain(missing: dict[str, str], num_targets: int) -> str:
    """One line that names every layer that stayed dense, or is a teacher's, and why, grouped by reason."""
    teachers = {name: reason for name, reason in missing.items() if reason.startswith(TEACHER)}
    heads = {
        "attention layers that should be routed to Lighthouse stayed dense": missing.keys() - teachers.keys(),
        "attention layers were routed to Lighthouse and train nothing": teachers.keys(),
    }
    lines = []
    for head, names in heads.items():
        by_reason = defaultdict(list)
        for name, reason in missing.items():
            if name in names:
                by_reason[reason].append(name or ITSELF)
        parts = [f"{', '.join(found)}: {reason}" for reason, found in by_reason.items()]
        lines += [f"{len(names)} of {num_targets} {head}: {' | '.join(parts)}"] if names else []
    return "; ".join(lines)
