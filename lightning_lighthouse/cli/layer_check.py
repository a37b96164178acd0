"""What is refused of the layers at fit start, found before a folder is made or any data prepared."""

from __future__ import annotations

from lightning.pytorch import LightningModule

from lightning_lighthouse.attention.layer_types import spread_over
from lightning_lighthouse.checks import SettingError
from lightning_lighthouse.routing.targets import choose_routed, find_targets
from lightning_lighthouse.routing.token_mixers import require_attention_alone
from lightning_lighthouse.training.callback import LighthouseCallback


def check_layers(callback: LighthouseCallback, model: LightningModule, num_tokens: int | None) -> None:
    """Refuse settings that do not fit the model's layers or the length of its sequences.

    Args:
        callback: The settings.
        model: On any device.
        num_tokens: Of a sequence; None where it is not known.

    Raises:
        ValueError: They do not; begins with the setting. SettingError where it is about the layers.
    """
    own = (phase.attention for phase in callback.phases or ())
    for attention in (callback.attention, *own):
        if num_tokens is not None and attention is not None:
            attention.pyramid(num_tokens)
    try:
        targets = find_targets(model)
    except ValueError:
        # layers that configure_model makes are looked for at fit start
        return
    if callback.select is not None:
        targets = find_targets(model, callback.select)
    if callback.documents is True:
        require_attention_alone(model, targets.values())
    choose_routed(targets, callback.dense_layers)
    for number, phase in enumerate(callback.phases_for(targets)):
        try:
            spread_over(phase.layer_types, len(targets))
        except SettingError as error:
            where = "" if callback.phases is None else f"phases[{number}]."
            raise SettingError(f"{where}{error}") from None
