"""LighthouseTrainerCallback: the phases and the switch for transformers' own Trainer, without Lightning."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any, Literal

from torch import nn

from lightning_lighthouse.attention.backends import check_backend
from lightning_lighthouse.attention.config import LighthouseConfig
from lightning_lighthouse.attention.sdpa import sdpa_priority
from lightning_lighthouse.checks import SettingError, check_type, warn
from lightning_lighthouse.notices import shown_notices
from lightning_lighthouse.phases.events import BatchEnd, BatchStart, FitEnd, FitStart, PhaseEvents, Switch, phase_events
from lightning_lighthouse.phases.phase import SWITCH_AT, LayerType, Phase, is_default, phases_asked
from lightning_lighthouse.phases.plan import (
    PhasePlan,
    PlannedPhase,
    describe_switch,
    phases_begun,
    resolve_phases,
    resume_phases,
)
from lightning_lighthouse.phases.schedule import DENSE, LIGHTHOUSE, SwitchState, resume_switch
from lightning_lighthouse.routing.call_counts import CallCounts
from lightning_lighthouse.routing.default_types import default_layer_types
from lightning_lighthouse.routing.packing import DocumentsSetting, check_documents
from lightning_lighthouse.routing.patch import Patch, patch_attention
from lightning_lighthouse.routing.rotary import RotarySetting, check_rotary
from lightning_lighthouse.routing.targets import DenseLayers, check_layers

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_callback import ExportableState
except ImportError as error:
    raise ImportError(
        "LighthouseTrainerCallback needs the package transformers: pip install 'lightning_lighthouse[hf]'"
    ) from error

logger = logging.getLogger("lightning_lighthouse")


class LighthouseTrainerCallback(TrainerCallback, ExportableState):
    """Train with Lighthouse Attention, then switch to dense attention for good, in transformers' Trainer.

        Trainer(model, args, train_dataset=data, callbacks=[LighthouseTrainerCallback(switch_at=0.9)]).train()

    The model is patched when a training starts and restored when it ends. Lighthouse Attention runs from the start of
    an optimizer step to its last backward: evaluation is dense. The switch is kept in the Trainer's checkpoints; a
    resumed run that has switched stays dense. transformers does not tell its callbacks of an exception: used as a
    context manager around `train()`, this one restores the model then too.

    Args:
        switch_at: When to switch: an int is an optimizer step, a float above 0 and up to 1.0 a fraction of the
            training's steps, rounded up. None: at 0.9 of them, or as `phases` say.
        attention: Settings of Lighthouse Attention, also as a dictionary.
        dense_layers: Attention layers that stay dense; negative numbers count from the end, None and [] for none.
            "published": the first and last two of 16 or more, else the first and last.
        select: Glob over module names that chooses the attention layers. None finds them.
        on_unroutable: What happens when a layer stayed dense in the first batch in which it should be routed.
        allow_return: Let a resumed run that has switched go back to Lighthouse where a later switch_at says so.
        hf_assume_causal: Your statement that no training batch has padding or packed documents, so that no mask is
            built. A batch that has them is an error.
        layer_types: How the attention layers attend until the switch, as in `Phase`; None: "window" three times, then
            "lighthouse", counted back from the last layer (docs/use/phases.md); ["lighthouse"] is Lighthouse in all.
        window: Tokens, for the types "window" and "chunk"; None: 512 where `layer_types` is None too.
        sink_tokens: First tokens that stay visible to every token of a "window" layer.
        phases: Several phases before the dense one, instead of the four others; also as dictionaries.
        documents: Of batches that pack several, as DataCollatorWithFlattening makes them: True keeps attention inside
            each, by `cu_seq_lens_q` or restarting `position_ids`, in every phase and layer; False refuses them;
            "ignore" lets attention go across documents.
        rotary: How the model rotates q and k, as in `patch_attention`; None: found, where rotate="after" asks.

    Raises:
        TypeError: A value has the wrong type.
        ValueError: A value is out of range. At train begin: no attention to route, or the model is patched already.
        SettingError: At train begin: several GPUs in one process.
        ResumeError: At train begin: the resumed run would return to Lighthouse unasked.
        RuntimeError: After the first batch in which it should be routed: a layer stayed dense, with the reason.
    """

    def __init__(
        self,
        switch_at: int | float | None = None,
        attention: LighthouseConfig | dict[str, Any] = LighthouseConfig(),  # noqa: B008, immutable
        dense_layers: DenseLayers = None,
        select: str | None = None,
        on_unroutable: Literal["raise", "warn"] = "raise",
        allow_return: bool = False,
        hf_assume_causal: bool = False,
        layer_types: list[LayerType] | None = None,
        window: int | None = None,
        sink_tokens: int = 0,
        phases: list[Phase | dict[str, Any]] | None = None,
        documents: DocumentsSetting = False,
        rotary: RotarySetting | None = None,
    ) -> None:
        check_type("attention", attention, LighthouseConfig | dict)
        check_type("select", select, str | None)
        check_type("on_unroutable", on_unroutable, Literal["raise", "warn"])
        check_type("allow_return", allow_return, bool)
        check_type("hf_assume_causal", hf_assume_causal, bool)
        check_layers(dense_layers)
        check_documents(documents, hf_assume_causal)
        check_rotary(rotary)
        self.phases = None if phases is None else [_phase(phase) for phase in phases]
        # until the layers of the model are known
        self._phases = phases_asked(switch_at, layer_types, window, sink_tokens, self.phases)
        self.switch_at = SWITCH_AT if switch_at is None and phases is None else switch_at
        self.layer_types = layer_types
        self.window = window
        self.sink_tokens = sink_tokens
        self.attention = LighthouseConfig(**attention) if isinstance(attention, dict) else attention
        self.dense_layers = dense_layers
        self.select = select
        self.on_unroutable = on_unroutable
        self.allow_return = allow_return
        self.hf_assume_causal = hf_assume_causal
        self.documents = documents
        self.rotary = rotary

        self._plan: PhasePlan | None = None
        # the phase whose attention the patch has
        self._attending = 0
        self._patch: Patch | None = None
        self._counts = CallCounts()
        self._events = PhaseEvents()
        # of the step that runs
        self._phase = DENSE
        self._contexts = ExitStack()

    def state(self) -> dict[str, Any]:
        """The settings and the phases, for the Trainer's checkpoints."""
        settings = {
            "switch_at": self.switch_at,
            "attention": asdict(self.attention),
            "dense_layers": self.dense_layers,
            "select": self.select,
            "on_unroutable": self.on_unroutable,
            "allow_return": self.allow_return,
            "hf_assume_causal": self.hf_assume_causal,
            "layer_types": self.layer_types,
            "window": self.window,
            "sink_tokens": self.sink_tokens,
            "phases": None if self.phases is None else [asdict(phase) for phase in self.phases],
            "documents": self.documents,
            "rotary": self.rotary,
        }
        plan = self._plan
        saved = {
            "saved_switch": self._switch.state_dict() if self._switch else None,
            "saved_phases": plan.state_dict() if plan else None,
        }
        return {"args": settings, "attributes": saved}

    # Right also in a resumed run: the Trainer has loaded its state.
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        """Patch the model, off, and resolve the switch step."""
        self.restore()
        self._counts = CallCounts()
        if args.n_gpu > 1:
            raise SettingError(
                f"{args.n_gpu} GPUs in one process would get copies of the model that cannot be routed: start one "
                "process a GPU (torchrun), or set CUDA_VISIBLE_DEVICES"
            )
        model: nn.Module = others["model"]
        try:
            self._contexts.enter_context(shown_notices())
            device = next(model.parameters()).device
            for phase in self._phases:
                check_backend(phase.attention or self.attention, device)
            self._patch = patch_attention(
                model,
                self.attention,
                dense_layers=self.dense_layers,
                select=self.select,
                hf_assume_causal=self.hf_assume_causal,
                documents=self.documents,
                rotary=self.rotary,
            )
            self._contexts.callback(self._patch.restore)
            self._patch.documents.watches_evaluation = True
            self._contexts.enter_context(sdpa_priority(self.attention.sdpa))
            saved = self._saved(state)
            self._phases = self._phases_for(self._patch, saved)
            # each once, so that no phase fails when it begins
            for phase in reversed(self._phases):
                self._attend(phase)
            self._attending = 0
            self._plan = self._resolve_plan(state, saved)
        except BaseException:
            self.restore()
            raise
        name = self._plan.name(state.global_step)
        self._events = phase_events(model)
        self._events.publish(FitStart(state.global_step, name))
        self._say(
            state,
            f"{name} phase from step {state.global_step}; switch to dense at step {self._plan.switch.switch_step} of "
            f"{state.max_steps}; {len(self._patch.targets)} attention layers routed, {', '.join(self._patch.targets)}",
        )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        """Set the phase by the optimizer step; switch when its time has come."""
        assert self._patch is not None
        assert self._plan is not None
        plan, step = self._plan, state.global_step
        number = plan.number(step)
        self._phase = plan.names[number]
        is_dense = number == len(plan.phases)
        if not plan.switch.switched if is_dense else number != plan.number(max(0, step - 1)):
            plan.switch.switched = is_dense
            self._events.publish(Switch(step, self._phase, plan.names[number - 1]))
            self._say(state, describe_switch(plan, number))
        if is_dense:
            self._patch.dense()
        else:
            if number != self._attending:
                self._attend(self._phases[number])
                self._attending = number
            self._patch.set_step(step)
            self._patch.on()
        self._events.publish(BatchStart(step, self._phase))

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        """Check that what is routed for the first time was; the phase goes on to the next batch of the step."""
        self._check(state)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        """Leave the phase until the next step, and check that what is routed for the first time was."""
        assert self._patch is not None
        self._patch.off()
        self._check(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        """Tell the listeners; let go of the documents of the step."""
        assert self._plan is not None
        if self._patch is not None:
            self._patch.set_documents(None)
        self._events.publish(BatchEnd(state.global_step, self._phase, self._plan.name(state.global_step)))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        """Restore the model."""
        self._events.publish(FitEnd(state.global_step, self._phase))
        self.restore()
        if self._switch is not None and not self._switch.switched:
            warn(
                f"Lighthouse: the training ended at step {state.global_step}, before the switch to dense attention at "
                f"step {self._switch.switch_step}: the model has not recovered from Lighthouse"
            )

    def restore(self) -> None:
        """Undo the patch, as at the end of a training. Harmless at any time."""
        self._patch = None
        self._contexts.close()

    def __enter__(self) -> LighthouseTrainerCallback:
        return self

    def __exit__(self, *exception: object) -> None:
        self.restore()

    def _check(self, state: TrainerState) -> None:
        assert self._patch is not None
        # on every rank: a mask may come to one of them alone
        for line in self._counts.add(self._patch, state.global_step):
            warn(line)
        try:
            self._patch.check(self.on_unroutable)
        except RuntimeError:
            self.restore()
            raise

    @property
    def _switch(self) -> SwitchState | None:
        return self._plan.switch if self._plan else None

    def _attend(self, phase: Phase) -> None:
        assert self._patch is not None
        self._patch.attend(
            phase.layer_types,
            config=phase.attention or self.attention,
            window=phase.window,
            sink_tokens=phase.sink_tokens,
        )

    def _phases_for(self, patch: Patch, saved: PhasePlan | None) -> list[Phase]:
        """The phases before the dense one of this model; those that it began with where nothing is said of them."""
        short = self.window, self.sink_tokens, self.phases
        asked = phases_asked(self.switch_at, self.layer_types, *short, default_layer_types(patch.layers))
        if saved is None or not is_default(self.phases, self.layer_types, self.window, self.sink_tokens):
            return asked
        begun, line = phases_begun(asked, saved)
        if line:
            warn(f"Lighthouse: {line}")
        return begun

    def _saved(self, state: TrainerState) -> PhasePlan | None:
        """What the checkpoint that a run goes on from keeps of its phases; None at its begin."""
        # by name in a run that goes on
        states: Any = state.stateful_callbacks
        attributes = states.get(type(self).__name__, {}).get("attributes", {})
        if state.global_step == 0 or attributes.get("saved_switch") is None:
            return None
        switch = SwitchState(**attributes["saved_switch"])
        # version 0.1 had one phase before the dense one
        whole = [asdict(PlannedPhase(LIGHTHOUSE, switch.switch_at, switch.switch_step))]
        return PhasePlan([PlannedPhase(**phase) for phase in attributes.get("saved_phases") or whole], switch)

    def _resolve_plan(self, state: TrainerState, saved: PhasePlan | None) -> PhasePlan:
        planned = resolve_phases(self._phases, state.max_steps)
        asked = SwitchState(self._phases[-1].until, planned[-1].end)
        step = state.global_step
        if step == 0:
            return PhasePlan(planned, asked)
        if saved is not None:
            switch, line = resume_switch(saved.switch, asked, step, self.allow_return)
            followed, change = resume_phases(saved.phases, planned, step, self.allow_return)
            for words in filter(None, (line, change)):
                warn(f"Lighthouse: {words}")
            return PhasePlan(followed, switch)
        # the Trainer expects the key when it saves
        states: Any = state.stateful_callbacks
        states.setdefault(type(self).__name__, self.state())
        warn(
            f"Lighthouse: resumed at step {step} from a checkpoint without Lighthouse state; the phase follows from "
            f"the step: {PhasePlan(planned, asked).name(step)} (switch at step {asked.switch_step})"
        )
        asked.switched = step >= asked.switch_step
        return PhasePlan(planned, asked)

    def _say(self, state: TrainerState, line: str) -> None:
        if state.is_world_process_zero:
            logger.info(f"Lighthouse: {line}")


def _phase(phase: Phase | dict[str, Any]) -> Phase:
    """A phase, also from a dictionary of its arguments, as checkpoints hold it."""
    if not isinstance(phase, dict):
        return phase
    attention = phase.get("attention")
    config = LighthouseConfig(**attention) if isinstance(attention, dict) else attention
    return Phase(**{**phase, "attention": config})
