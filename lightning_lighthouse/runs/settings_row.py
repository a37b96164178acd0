"""The HPARAMS tab of TensorBoard: a row for each run, with its settings and its newest validation loss.

TensorBoard shows the first settings that it finds in a run, and looks for metrics there and below. So a row stands
beside the dense run, for the logger's own settings, written before, would hide it in the run above; a copy of the
validation loss goes there too. Settings that were changed before a resume get a run, and a row, of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from lightning_lighthouse.phases.schedule import DENSE
from lightning_lighthouse.runs.layout import ROW

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class SettingsRow:
    """The row of one fit.

    Args:
        writer: Gives the writer of a run by its name.
        metric: Name of the validation loss.
    """

    def __init__(self, writer: Callable[[str], SummaryWriter], metric: str) -> None:
        self._writer, self._metric = writer, metric
        self._run = DENSE

    def choose(self, values: Mapping[str, Any], told: Mapping[str, Any] | None, step: int) -> dict[str, Any]:
        """Decide for the run's row, or for a new one, `dense/from_step_<n>`, where the settings have changed.

        Args:
            values: The settings by name.
            told: What this method returned to the part of the run before; None at its start.
            step: Where this part begins.

        Returns:
            What a checkpoint should keep.
        """
        shown = {name: _shown(value) for name, value in values.items()}
        self._run = told["run"] if told else DENSE
        if told and told["values"] != shown:
            self._run = f"{DENSE}/from_step_{step}"
        return {"run": self._run, "values": shown}

    def write(self, values: Mapping[str, Any]) -> None:
        """Write all settings of the row, the logger's own too."""
        # not its api module, which wants TensorFlow
        from tensorboard.plugins.hparams import summary_v2 as hparams

        every = {name: _shown(value) for name, value in values.items()}
        names = [hparams.HParam(name) for name in every]
        metric = hparams.Metric(f"{ROW}/{self._metric}", display_name=self._metric)
        file_writer: Any = self._writer(self._run).file_writer
        file_writer.add_summary(hparams.hparams_config_pb(names, metrics=[metric]))
        file_writer.add_summary(hparams.hparams_pb(every))

    def add_loss(self, loss: float, step: int) -> None:
        """The newest validation loss."""
        self._writer(self._run).add_scalar(f"{ROW}/{self._metric}", loss, step)


def _shown(value: Any) -> bool | int | float | str:
    """A setting as the HPARAMS tab can hold it."""
    return value if isinstance(value, bool | int | float | str) else str(value)
