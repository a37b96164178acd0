"""LighthouseCallback: the settings, the state in checkpoints, and Lightning's hooks, each calling one thing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lighthouse.attention.config import LighthouseConfig
from lightning_lighthouse.checks import check_count, check_type
from lightning_lighthouse.phases.phase import SWITCH_AT, LayerType, Phase, is_default, phases_asked
from lightning_lighthouse.phases.plateau import PlateauRule
from lightning_lighthouse.phases.run_state import RunState
from lightning_lighthouse.phases.schedule import DENSE
from lightning_lighthouse.routing.default_types import default_layer_types
from lightning_lighthouse.routing.packing import DocumentsSetting, check_documents
from lightning_lighthouse.routing.patch import Patch
from lightning_lighthouse.routing.rotary import RotarySetting, check_rotary
from lightning_lighthouse.routing.targets import DenseLayers, check_layers
from lightning_lighthouse.runs.step_boundary import StepBoundary
from lightning_lighthouse.training.batch_documents import watched_batches
from lightning_lighthouse.training.finders import routed_searches
from lightning_lighthouse.training.phased_fit import PhasedFit

# A Trainer keeps here the run that it trained last, in whose next fit it may go on; so does a copy of it.
RUN = "_lighthouse_run"


class LighthouseCallback(Callback):
    """Train with Lighthouse Attention, then switch to dense attention for good (arXiv 2605.06554, section 4).

        Trainer(callbacks=[LighthouseCallback(switch_at=0.9)])

    The model is patched when a fit starts and restored when it ends, however it ends. Lighthouse Attention runs inside
    training batches only: validation is dense in both phases, and its loss is the one to watch, because the training
    loss of the Lighthouse phase is not that of a language model (docs/understand/design.md). At the end the weights
    are written to `final.pt` in the log folder, beside `lighthouse.json` (docs/use/switch.md); a summary is printed.

    Args:
        switch_at: When to switch: an int is an optimizer step, a float above 0 and up to 1.0 a fraction of the
            training's steps, rounded up. None: at 0.9 of them, or as `phases` say.
        attention: Settings of Lighthouse Attention.
        dense_layers: Attention layers that stay dense; negative numbers count from the end, None and [] for none.
            "published": the first and last two of 16 or more, else the first and last.
        select: Glob over module names that chooses the attention layers, for example "*.attn". None finds them.
        enabled: False trains the dense baseline: nothing is patched, and the curves go to the run `dense`.
        on_unroutable: What happens when a layer stayed dense in the first batch in which it should be routed.
        allow_return: Let a resumed run that has switched, or has begun to hand layers back, go back to Lighthouse
            where changed settings say so.
        validation_metric: Name under which the model logs its validation loss; where it does not log the default one,
            "val_loss" is looked for too.
        plateau: Switch earlier where the dense validation loss stops gaining. None: at `switch_at`.
        return_steps: Hand the routed layers back to dense attention in up to 4 groups, the last layers first, over
            this many optimizer steps before the switch; 0: all of them at the switch.
        rewarm_steps: After the switch raise the learning rate linearly to what the schedule says, over this many
            optimizer steps; 0: none. Every optimizer's groups are scaled during their update alone.
        stop_on_nonfinite: Stop before an optimizer step whose loss or gradients are NaN or infinite on any rank, and
            name the layer (docs/use/reliability.md).
        hf_assume_causal: Your statement that no training batch of a transformers model has padding or packed
            documents, so that no mask is built (docs/use/models.md). A batch that has them is an error.
        layer_types: How the attention layers attend until the switch, as in `Phase`; None: "window" three times, then
            "lighthouse", counted back from the last layer (docs/use/phases.md); ["lighthouse"] is Lighthouse in all.
            `dense_layers` names layers by their place among all of them, and overrides the pattern there.
        window: Tokens, for the types "window" and "chunk"; None: 512 where `layer_types` is None too.
        sink_tokens: First tokens that stay visible to every token of a "window" layer.
        phases: Several phases before the dense one, instead of `switch_at`, `layer_types`, `window` and `sink_tokens`;
            `plateau`, `return_steps` and `rewarm_steps` belong to the last switch (docs/use/phases.md).
        documents: Of batches that pack several: True keeps attention inside each, in every phase and layer, False
            refuses them, "ignore" lets attention go across (docs/use/documents.md).
        rotary: How the model rotates q and k, as in `patch_attention`; None: found, where rotate="after" asks.

    Raises:
        TypeError: A value has the wrong type.
        ValueError: A value is out of range. At fit start: no attention to route, or the model is patched already.
        SettingError: At train start: the switch step cannot be derived, or a resumed run would return unasked.
        RuntimeError: After the first batch in which it should be routed: a layer stayed dense, with the reason.
        NonFiniteError: Before an optimizer step: a loss or a gradient is not finite; a RuntimeError.
    """

    def __init__(
        self,
        switch_at: int | float | None = None,
        attention: LighthouseConfig = LighthouseConfig(),  # noqa: B008, immutable
        dense_layers: DenseLayers = None,
        select: str | None = None,
        enabled: bool = True,
        on_unroutable: Literal["raise", "warn"] = "raise",
        allow_return: bool = False,
        validation_metric: str = "val/loss",
        plateau: PlateauRule | None = None,
        return_steps: int = 0,
        rewarm_steps: int = 0,
        stop_on_nonfinite: bool = True,
        hf_assume_causal: bool = False,
        layer_types: list[LayerType] | None = None,
        window: int | None = None,
        sink_tokens: int = 0,
        phases: list[Phase] | None = None,
        documents: DocumentsSetting = False,
        rotary: RotarySetting | None = None,
    ) -> None:
        check_type("attention", attention, LighthouseConfig)
        check_type("select", select, str | None)
        check_type("on_unroutable", on_unroutable, Literal["raise", "warn"])
        check_type("validation_metric", validation_metric, str)
        check_type("plateau", plateau, PlateauRule | None)
        flags = {"enabled": enabled, "allow_return": allow_return, "stop_on_nonfinite": stop_on_nonfinite}
        for name, flag in (flags | {"hf_assume_causal": hf_assume_causal}).items():
            check_type(name, flag, bool)
        check_layers(dense_layers)
        check_documents(documents, hf_assume_causal)
        check_rotary(rotary)
        phases_asked(switch_at, layer_types, window, sink_tokens, phases)
        self.switch_at = SWITCH_AT if switch_at is None and phases is None else switch_at
        self.layer_types, self.window, self.sink_tokens = layer_types, window, sink_tokens
        self.phases = phases
        self.plateau = plateau
        self.return_steps = check_count("return_steps", return_steps)
        self.rewarm_steps = check_count("rewarm_steps", rewarm_steps)
        self.attention = attention
        self.dense_layers, self.select = dense_layers, select
        self.enabled = enabled
        self.on_unroutable = on_unroutable
        self.allow_return = allow_return
        self.validation_metric = validation_metric
        self.stop_on_nonfinite = stop_on_nonfinite
        self.hf_assume_causal, self.documents, self.rotary = hf_assume_causal, documents, rotary

        self._run = RunState()
        # the checkpoint's, until the Trainer knows its step
        self._loaded: RunState | None = None
        self._is_fitting = True
        self._fit: PhasedFit | None = None
        self._stage = ExitStack()
        # also behind an exception, which closes the fit before checkpoints are written
        self._boundary: StepBoundary | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy: settings and the run, and nothing that belongs to the fit that is under way."""
        return vars(self) | {"_fit": None, "_stage": ExitStack(), "_boundary": None}

    @property
    def has_default_layers(self) -> bool:
        """Whether nothing is said of how the layers attend."""
        return is_default(self.phases, self.layer_types, self.window, self.sink_tokens)

    def phases_for(self, layers: Mapping[str, nn.Module] | None = None) -> Sequence[Phase]:
        """The phases before the dense one, also where one is given by `switch_at`.

        Args:
            layers: The attention layers of the model, which the mixture is counted over; None where only the ends of
                the phases matter.
        """
        short = self.switch_at, self.layer_types, self.window, self.sink_tokens, self.phases
        return phases_asked(*short) if layers is None else phases_asked(*short, default_layer_types(layers))

    # Constant, so that a changed setting still finds the state of the run.
    @property
    def state_key(self) -> str:
        """Key of the state in a checkpoint."""
        return "LighthouseCallback"

    def state_dict(self) -> dict[str, Any]:
        """The switch, None for a dense baseline, the ledger, and the settings shown."""
        # a checkpoint may be written before the training begins: in a sanity check, or by a signal
        return (self._loaded or self._run).state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the checkpoint's state for a fit; a validation or test with a checkpoint leaves the run's own alone."""
        if self._is_fitting:
            self._loaded = RunState.from_state_dict(state_dict)

    def phase_at(self, step: int) -> str:
        """The name of the phase in which the batch trains that begins after `step` optimizer steps."""
        return DENSE if self._fit is None else self._fit.phase_at(step)

    @contextmanager
    def lend_patch(self, trainer: Trainer) -> Iterator[Patch]:
        """Hand out the patch, off, to set the phase by hand outside of training batches; the time is not training's.

        Raises:
            RuntimeError: No model is patched: outside of a fit, or in a dense baseline.
        """
        if self._fit is None:
            raise RuntimeError("there is a patch to lend only while a fit runs")
        with self._fit.lend_patch() as patch:
            yield patch

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Know what a checkpoint is loaded for; see documents outside of a fit too, and in a search for the rate."""
        self._is_fitting, self._loaded = stage == "fit", None
        self._stage.close()
        if stage in ("validate", "test", "predict"):
            self._stage.enter_context(watched_batches(trainer, pl_module, self, None))
        if self._is_fitting:
            trial = partial(self._trial, trainer, pl_module)
            self._stage.enter_context(routed_searches(trainer.callbacks, trial))  # type: ignore[attr-defined]

    # Fit start comes after wrapping and sharding, and before anything is traced.
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Patch the model, off, and prefer the configured SDPA backend in every phase."""
        self._close()
        self._fit = PhasedFit(self, trainer, pl_module)
        self._boundary = StepBoundary(trainer, self)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on with the state of the run, or begin it."""
        continues = vars(trainer).get(RUN) is self._run and trainer.global_step > 0
        if self._loaded is not None:
            self._run = self._loaded
        elif not continues:
            self._run = RunState()
        self._loaded, vars(trainer)[RUN] = None, self._run
        self._running.start(self._run)
        self._step_boundary.mark()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set the phase."""
        self._running.begin_batch(batch, batch_idx)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Note the loss for the check."""
        self._running.note_loss(loss)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Check losses and gradients."""
        self._running.before_optimizer_step(optimizer)
        self._step_boundary.update()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Leave the phase until the next batch."""
        self._running.end_batch(batch, outputs)
        self._step_boundary.mark()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate densely."""
        if self._fit is not None:
            self._fit.begin_validation()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the dense validation loss."""
        if self._fit is not None and self._is_fitting and not trainer.sanity_checking:
            self._fit.end_validation()
            self._step_boundary.mark()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """The time of a checkpoint is not training time; one inside a step goes on behind the step before."""
        if self._fit is not None:
            self._fit.pause()
        if self._boundary is not None:
            self._boundary.rewind(checkpoint)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the phase also where an epoch was cut short."""
        self._running.leave_phase()
        self._running.pause()
        self._step_boundary.mark()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sum up."""
        self._running.end()

    # After the hooks that may change the weights last: averages of weights, the module's own on_train_end.
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the model; write the final weights."""
        fit = self._running
        self._close()
        # still there where no training started: the checkpoint is that of the last step
        if self._loaded is not None and trainer.limit_train_batches != 0:
            self._run, self._loaded = self._loaded, None
            fit.end_untrained(self._run)
        fit.write_final_weights()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the model."""
        if self._boundary is not None:
            self._boundary.break_off(exception)
        self._close()
        self._stage.close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the model."""
        self._stage.close()
        self._close()

    @contextmanager
    def _trial(self, trainer: Trainer, module: LightningModule, is_dense: bool) -> Iterator[None]:
        """Attend as in the first phase inside, or as in the dense one, also before this callback's own fit start."""
        fit = self._fit or PhasedFit(self, trainer, module)
        try:
            with fit.trial(is_dense):
                yield
        finally:
            if fit is not self._fit:
                fit.close()

    @property
    def _running(self) -> PhasedFit:
        assert self._fit is not None, "Lightning calls the hooks of a training inside a fit"
        return self._fit

    @property
    def _step_boundary(self) -> StepBoundary:
        assert self._boundary is not None, "Lightning calls the hooks of a training inside a fit"
        return self._boundary

    def _close(self) -> None:
        fit, self._fit = self._fit, None
        if fit is not None:
            fit.close()
