"""The checkpoints that a training leaves, and the one that it continues from."""

from __future__ import annotations

import signal
import zipfile
from pathlib import Path
from types import FrameType
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_lighthouse.cli_recipe import UsageError


class Checkpoint(ModelCheckpoint):
    """ModelCheckpoint whose `last.ckpt` is always the last: of each validation, of a SIGTERM, of the end.

    Lightning 2.6 writes it only where the monitored loss has improved. On SIGTERM a run stops between two steps. After
    any other exception a step is incomplete; a run resumed from what `save_on_exception` writes would skip its batch.
    """

    _received_sigterm = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """With several ranks, only note a SIGTERM when it comes."""
        super().on_train_start(trainer, pl_module)
        # Lightning's handler calls a collective wherever the signal strikes: the ranks may then wait for ever
        if trainer.world_size > 1:
            signal.signal(signal.SIGTERM, self._note_sigterm)

    def _note_sigterm(self, signum: int, frame: FrameType | None) -> None:
        self._received_sigterm = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """With several ranks, agree whether one received SIGTERM: all stop after the same step."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if trainer.world_size > 1 and trainer.strategy.reduce_boolean_decision(self._received_sigterm, all=False):
            # the loop looks at it once this batch is counted as done
            trainer._signal_connector.received_sigterm = True

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save after a validation, unless the best is saved later, at the epoch's end."""
        super().on_validation_end(trainer, pl_module)
        if not self._should_save_on_train_epoch_end(trainer):
            self._keep_last(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save at the end of an epoch."""
        super().on_train_epoch_end(trainer, pl_module)
        self._keep_last(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save at the end."""
        self._keep_last(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save on SIGTERM."""
        if isinstance(exception, SIGTERMException):
            self._keep_last(trainer)
        else:
            super().on_exception(trainer, pl_module, exception)

    def _keep_last(self, trainer: Trainer) -> None:
        # skipped where nothing is to be saved at all, or this step was saved
        if self.save_last and self.dirpath is not None and not self._should_skip_saving_checkpoint(trainer):
            last = Path(self.dirpath) / f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}"
            trainer.save_checkpoint(last, self.save_weights_only)
            self._last_global_step_saved = trainer.global_step


def resolve_checkpoint(command: str, config: Namespace) -> None:
    """Replace `--ckpt_path` auto, last or best by the newest such file of this recipe's runs, and log to that run.

    Args:
        command: "fit", "validate" or "test".
        config: Its settings, changed in place.

    Raises:
        UsageError: auto, for another command than fit; or the logger's folders are not known here.
        FileNotFoundError: There is no such checkpoint; auto starts afresh instead.
        ValueError: The checkpoint is not complete.
    """
    asked = config.ckpt_path
    if asked in ("auto", "last", "best"):
        if asked == "auto" and command != "fit":
            raise UsageError(f"ckpt_path must be a file, 'last' or 'best' for {command}, got 'auto'")
        root, pattern = _checkpoints(config)
        pattern += "best.ckpt" if asked == "best" else "last.ckpt"
        found = max(root.glob(pattern), key=_written, default=None)
        config.ckpt_path = None if found is None else str(found)
        if found is not None and pattern.startswith("*"):
            config.trainer.logger.init_args.version = found.parent.parent.name
        elif found is None and asked == "auto":
            rank_zero_info(f"ckpt_path auto: there is no {root / pattern}, the training starts afresh")
        elif found is None:
            raise FileNotFoundError(f"ckpt_path {asked}: there is no {root / pattern}; give a file, or no ckpt_path")
    if config.ckpt_path is not None:
        _check_complete(Path(config.ckpt_path))


def _checkpoints(config: Namespace) -> tuple[Path, str]:
    """Where the checkpoints of a recipe's runs are: a folder, and a pattern under it that lacks the file's name."""
    if config.checkpoint.dirpath is not None:
        return Path(config.checkpoint.dirpath), ""
    logger = config.trainer.logger
    if not logger:
        return Path(config.trainer.default_root_dir or "."), "checkpoints/"
    class_path = str(getattr(logger, "class_path", "")).rpartition(".")[-1]
    if class_path not in ("TensorBoardLogger", "CSVLogger"):
        raise UsageError(
            f"ckpt_path {config.ckpt_path} searches the folders of a TensorBoardLogger or CSVLogger, trainer.logger "
            "is another: give a file, or set checkpoint.dirpath"
        )
    settings = logger.init_args
    version = settings.version if isinstance(settings.version, str | None) else f"version_{settings.version}"
    return Path(settings.save_dir) / (settings.name or ""), f"{version or '*'}/checkpoints/"


def _check_complete(checkpoint: Path) -> None:
    """Refuse a file that was cut short; a folder is the business of its strategy."""
    # torch writes a zip archive, whose table of contents comes last
    if not checkpoint.is_file() or zipfile.is_zipfile(checkpoint):
        return
    others = [path for path in checkpoint.parent.glob("*.ckpt") if path.is_file() and zipfile.is_zipfile(path)]
    newest = max(others, key=_written, default=None)
    fix = f"the newest complete one beside it is {newest}" if newest else "there is no complete one beside it"
    raise ValueError(f"checkpoint {checkpoint} is not complete ({checkpoint.stat().st_size} bytes); {fix}")


def _written(path: Path) -> float:
    return path.stat().st_mtime
