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
from lightning_lighthouse.checks import SettingError, check_type
from lightning_lighthouse.notices import shown_notices
from lightning_lighthouse.phases.events import BatchEnd, BatchStart, FitEnd, FitStart, PhaseEvents, Switch, phase_events
from lightning_lighthouse.phases.schedule import (
    DENSE,
    LIGHTHOUSE,
    SwitchState,
    check_switch_at,
    resolve_switch_step,
    resume_switch,
)
from lightning_lighthouse.routing.patch import Patch, patch_attention
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
            training's steps, rounded up.
        attention: Settings of Lighthouse Attention, also as a dictionary.
        dense_layers: Attention layers that stay dense; negative numbers count from the end, None and [] for none.
            "published": the first and last two of 16 or more, else the first and last.
        select: Glob over module names that chooses the attention layers. None finds them.
        on_unroutable: What happens when a layer that should be routed stayed dense in the first routed batch.
        allow_return: Let a resumed run that has switched go back to Lighthouse where a later switch_at says so.
        hf_assume_causal: Your statement that no training batch has padding or packed documents, so that no mask is
            built. A batch that has them is an error.

    Raises:
        TypeError: A value has the wrong type.
        ValueError: A value is out of range. At train begin: no attention to route, or the model is patched already.
        SettingError: At train begin: several GPUs in one process.
        ResumeError: At train begin: the resumed run would return to Lighthouse unasked.
        RuntimeError: After the first routed batch: a layer stayed dense, with the reason.
    """

    def __init__(
        self,
        switch_at: int | float = 0.9,
        attention: LighthouseConfig | dict[str, Any] = LighthouseConfig(),  # noqa: B008, immutable
        dense_layers: DenseLayers = None,
        select: str | None = None,
        on_unroutable: Literal["raise", "warn"] = "raise",
        allow_return: bool = False,
        hf_assume_causal: bool = False,
    ) -> None:
        check_type("attention", attention, LighthouseConfig | dict)
        check_type("select", select, str | None)
        check_type("on_unroutable", on_unroutable, Literal["raise", "warn"])
        check_type("allow_return", allow_return, bool)
        check_type("hf_assume_causal", hf_assume_causal, bool)
        check_layers(dense_layers)
        self.switch_at = check_switch_at(switch_at)
        self.attention = LighthouseConfig(**attention) if isinstance(attention, dict) else attention
        self.dense_layers = dense_layers
        self.select = select
        self.on_unroutable = on_unroutable
        self.allow_return = allow_return
        self.hf_assume_causal = hf_assume_causal

        self._switch: SwitchState | None = None
        self._patch: Patch | None = None
        self._events = PhaseEvents()
        # of the step that runs
        self._phase = DENSE
        self._contexts = ExitStack()

    def state(self) -> dict[str, Any]:
        """The settings and the switch, for the Trainer's checkpoints."""
        settings = {
            "switch_at": self.switch_at,
            "attention": asdict(self.attention),
            "dense_layers": self.dense_layers,
            "select": self.select,
            "on_unroutable": self.on_unroutable,
            "allow_return": self.allow_return,
            "hf_assume_causal": self.hf_assume_causal,
        }
        return {"args": settings, "attributes": {"saved_switch": self._switch.state_dict() if self._switch else None}}

    # Right also in a resumed run: the Trainer has loaded its state.
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        """Patch the model, off, and resolve the switch step."""
        self.restore()
        if args.n_gpu > 1:
            raise SettingError(
                f"{args.n_gpu} GPUs in one process would get copies of the model that cannot be routed: start one "
                "process a GPU (torchrun), or set CUDA_VISIBLE_DEVICES"
            )
        model: nn.Module = others["model"]
        try:
            self._contexts.enter_context(shown_notices())
            check_backend(self.attention, next(model.parameters()).device)
            self._patch = patch_attention(
                model,
                self.attention,
                dense_layers=self.dense_layers,
                select=self.select,
                hf_assume_causal=self.hf_assume_causal,
            )
            self._contexts.callback(self._patch.restore)
            self._contexts.enter_context(sdpa_priority(self.attention.sdpa))
            self._switch = self._resolve_switch(state)
        except BaseException:
            self.restore()
            raise
        phase = self._switch.phase(state.global_step)
        self._events = phase_events(model)
        self._events.publish(FitStart(state.global_step, phase))
        self._say(
            state,
            f"{phase} phase from step {state.global_step}; switch to dense at step {self._switch.switch_step} of "
            f"{state.max_steps}; {len(self._patch.targets)} attention layers routed, {', '.join(self._patch.targets)}",
        )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        """Set the phase by the optimizer step; switch when its time has come."""
        assert self._patch is not None
        assert self._switch is not None
        self._phase = self._switch.phase(state.global_step)
        if self._phase != DENSE:
            self._patch.set_step(state.global_step)
            self._patch.on()
        else:
            if not self._switch.switched:
                self._switch.switched = True
                self._events.publish(Switch(state.global_step, DENSE, LIGHTHOUSE))
                self._say(state, f"switched from Lighthouse to dense attention at step {state.global_step}")
            self._patch.dense()
        self._events.publish(BatchStart(state.global_step, self._phase))

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        """Check that the first batch was routed; the phase goes on to the next batch of the step."""
        self._check()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        """Leave the phase until the next step, and check that the first batch was routed."""
        assert self._patch is not None
        self._patch.off()
        self._check()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        """Tell the listeners."""
        assert self._switch is not None
        self._events.publish(BatchEnd(state.global_step, self._phase, self._switch.phase(state.global_step)))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        """Restore the model."""
        self._events.publish(FitEnd(state.global_step, self._phase))
        self.restore()
        if self._switch is not None and not self._switch.switched:
            logger.warning(
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

    def _check(self) -> None:
        assert self._patch is not None
        try:
            self._patch.check(self.on_unroutable)
        except RuntimeError:
            self.restore()
            raise

    def _resolve_switch(self, state: TrainerState) -> SwitchState:
        asked = SwitchState(self.switch_at, resolve_switch_step(self.switch_at, state.max_steps))
        step = state.global_step
        if step == 0:
            return asked
        name = type(self).__name__
        # by name in a run that goes on
        states: Any = state.stateful_callbacks
        saved = states.get(name, {}).get("attributes", {}).get("saved_switch")
        if saved is not None:
            switch, line = resume_switch(SwitchState(**saved), asked, step, self.allow_return)
            if line:
                logger.warning(f"Lighthouse: {line}")
            return switch
        # the Trainer expects the key when it saves
        states.setdefault(name, self.state())
        logger.warning(
            f"Lighthouse: resumed at step {step} from a checkpoint without Lighthouse state; the phase follows from "
            f"the step: {asked.phase(step)} (switch at step {asked.switch_step})"
        )
        asked.switched = step >= asked.switch_step
        return asked

    def _say(self, state: TrainerState, line: str) -> None:
        if state.is_world_process_zero:
            logger.info(f"Lighthouse: {line}")
