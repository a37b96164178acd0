"""The model of a fit, patched for all of its phases before the first of them begins."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from lightning.pytorch import LightningModule

from lightning_lighthouse.attention.backends import check_backend
from lightning_lighthouse.checks import SettingError
from lightning_lighthouse.phases.phase import Phase
from lightning_lighthouse.phases.schedule import DENSE, RETURN_GROUPS
from lightning_lighthouse.routing.patch import Patch, patch_attention, room_to_recompile
from lightning_lighthouse.training.settings import Settings


def patched_model(settings: Settings, module: LightningModule, contexts: ExitStack) -> tuple[Patch, Sequence[Phase]]:
    """Patch a model, off, attending as in its first phase.

    Args:
        settings: Its phases are tried in turn, so that none fails when it begins.
        module: In training.
        contexts: Restores the model, and torch.compile's limits, when it is closed.

    Returns:
        The patch, and the phases of this model before the dense one.

    Raises:
        SettingError: The settings do not fit the model or the device.
    """
    try:
        patch = patch_attention(
            module,
            settings.attention,
            dense_layers=settings.dense_layers,
            select=settings.select,
            hf_assume_causal=settings.hf_assume_causal,
            documents=settings.documents,
            rotary=settings.rotary,
        )
        contexts.callback(patch.restore)
        phases = settings.phases_for(patch.layers)
        # a frame is compiled once for each type of each phase; one of them, and dense, always had room
        variants = sum(len(set(phase.layer_types) - {DENSE}) for phase in phases)
        if room := max(0, variants - 1) + (RETURN_GROUPS if settings.return_steps else 0):
            contexts.enter_context(room_to_recompile(room))
        for phase in phases:
            check_backend(phase.attention or settings.attention, module.device)
        for phase in reversed(phases):
            attend(patch, phase, settings)
    except ValueError as error:
        raise SettingError(str(error)) from None
    return patch, phases


def attend(patch: Patch, phase: Phase, settings: Settings) -> None:
    """Let the layers attend as a phase says."""
    patch.attend(
        phase.layer_types,
        config=phase.attention or settings.attention,
        window=phase.window,
        sink_tokens=phase.sink_tokens,
    )
