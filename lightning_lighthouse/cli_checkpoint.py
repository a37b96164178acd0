"""The checkpoints that a training leaves, and the one that it continues from."""

from __future__ import annotations

import os
import pickle
import re
import signal
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from jsonargparse import Namespace
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from lightning_lighthouse.cli_recipe import UsageError
from lightning_lighthouse.saving import WholeCheckpointIO, check_writable, is_remote

# torch.load listens to these
FORCE_DATA, FORCE_CODE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


class Checkpoint(ModelCheckpoint):
    """ModelCheckpoint whose `last.ckpt` is always the last, and always that of a completed optimizer step.

    It is written at each validation, at the end, on SIGTERM, and every `every_n_train_steps` or `train_time_interval`;
    Lightning 2.6 writes it only where the monitored loss has improved. On SIGTERM the step is finished first. After an
    exception nothing is written: a step is incomplete then, and a run resumed from it would skip a batch. `best.ckpt`
    is that of the best validation.
    """

    _received_sigterm = False
    # a last.ckpt that waits for the end of a step
    _is_pending = False
    # step and time of the last.ckpt written last
    _kept_step = 0
    _kept_time = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write files that appear whole or not at all, unless the Trainer has a CheckpointIO of its own.

        Raises:
            SavingError: No file can be written to the folder of the checkpoints.
        """
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and trainer.is_global_zero and self.dirpath is not None and not is_remote(self.dirpath):
            check_writable(Path(self.dirpath))
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = WholeCheckpointIO()

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The first hook after Lightning has set its handler."""
        self._handle_sigterm()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on only note a SIGTERM when it comes."""
        super().on_train_start(trainer, pl_module)
        self._handle_sigterm()
        self._kept_step, self._kept_time = trainer.global_step, time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Behind the last batch of a step: save where it is time, and stop where a rank received SIGTERM."""
        if trainer.fit_loop._should_accumulate():
            return
        if self.monitor is None:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        elif self._is_pending or self._is_due(trainer):
            self._keep_last(trainer)
        self._agree_on_sigterm(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save after a validation, unless the best is saved later, at the epoch's end."""
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        # with every_n_train_steps Lightning would look for the best at those steps only, where no loss is new
        self._defer_save_until_validation |= self.monitor is not None and self._every_n_epochs < 1
        super().on_validation_end(trainer, pl_module)
        if not self._should_save_on_train_epoch_end(trainer):
            self._keep_last(trainer)
        if not trainer.fit_loop._should_accumulate():
            self._agree_on_sigterm(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save at the end of an epoch."""
        super().on_train_epoch_end(trainer, pl_module)
        self._keep_last(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save at the end."""
        if self._kept_step != trainer.global_step:
            self._keep_last(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save on SIGTERM, between two steps."""
        if isinstance(exception, SIGTERMException) and self._kept_step != trainer.global_step:
            self._keep_last(trainer)

    # Lightning's handler calls a collective wherever the signal strikes, and stops between the batches of a step
    def _handle_sigterm(self) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._note_sigterm)

    def _note_sigterm(self, signum: int, frame: FrameType | None) -> None:
        self._received_sigterm = True

    def _agree_on_sigterm(self, trainer: Trainer) -> None:
        received = self._received_sigterm
        if trainer.world_size > 1:
            received = trainer.strategy.reduce_boolean_decision(received, all=False)
        if received:
            # the loop looks at it once this batch is counted as done
            trainer._signal_connector.received_sigterm = True

    def _is_due(self, trainer: Trainer) -> bool:
        if self._every_n_train_steps and trainer.global_step % self._every_n_train_steps == 0:
            return self._kept_step != trainer.global_step
        if self._train_time_interval is None:
            return False
        is_time = time.monotonic() - self._kept_time >= self._train_time_interval.total_seconds()
        return bool(trainer.strategy.broadcast(is_time))

    def _save_last_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        if trainer.fit_loop._should_accumulate():
            self._is_pending = True
        else:
            super()._save_last_checkpoint(trainer, monitor_candidates)
            self._note_kept(trainer)

    def _keep_last(self, trainer: Trainer) -> None:
        # skipped where nothing is to be saved at all, or this step was saved together with the best
        if not self.save_last or self.dirpath is None or self._should_skip_saving_checkpoint(trainer):
            return
        if trainer.fit_loop._should_accumulate():
            # a validation between the batches of a step
            self._is_pending = True
        else:
            last = Path(self.dirpath) / f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}"
            # before saving: it is part of the state
            self.last_model_path = str(last)
            trainer.save_checkpoint(last, self.save_weights_only)
            self._note_kept(trainer)

    def _note_kept(self, trainer: Trainer) -> None:
        self._is_pending = False
        self._kept_step, self._kept_time = trainer.global_step, time.monotonic()


@contextmanager
def loaded_as_data(path: str | None) -> Iterator[None]:
    """Let no checkpoint run code that is loaded inside, by this process or one that it starts.

    Lightning itself would trust one that it downloads; and one that it loads after sharding, where the environment
    says so.

    Args:
        path: What is loaded inside, for the message; None for nothing.

    Raises:
        ValueError: It holds more than data, no training, or the weights of another model.
    """
    kept = {name: os.environ.pop(name, None) for name in (FORCE_DATA, FORCE_CODE)}
    os.environ[FORCE_DATA] = "1"
    try:
        yield
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+)", str(error))
        what = f" ({name[1]})" if name else ""
        raise ValueError(
            f"checkpoint {path} holds more than tensors and plain values{what}: loading it could run code, and is "
            "refused; no setting allows it"
        ) from error
    except RuntimeError as error:
        head, _, problems = str(error).partition("\n")
        if not head.startswith("Error(s) in loading state_dict"):
            raise
        first, *more = problems.strip().splitlines()
        and_more = f", and {len(more)} more such lines" if more else ""
        raise ValueError(f"checkpoint {path} does not fit the model: {first.strip()}{and_more}") from error
    except KeyError as error:
        if error.args != ("pytorch-lightning_version",):
            raise
        raise ValueError(f"{path} is no checkpoint of a training: it holds no state to go on from") from error
    finally:
        del os.environ[FORCE_DATA]
        os.environ.update({name: value for name, value in kept.items() if value is not None})


def resolve_checkpoint(command: str, config: Namespace) -> None:
    """Replace `--ckpt_path` auto, last or best by the newest such file of this recipe's runs, and log to that run.

    Args:
        command: "fit", "validate" or "test".
        config: Its settings, changed in place.

    Raises:
        UsageError: auto, for another command than fit; or the logger's folders are not known here.
        FileNotFoundError: There is no such checkpoint; auto starts afresh instead.
        ValueError: The checkpoint is not complete, or damaged.
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
        _check_complete(str(config.ckpt_path))


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


def _check_complete(path: str) -> None:
    """Refuse a file that was cut short or altered; a folder is the business of its strategy."""
    checkpoint = Path(path)
    if is_remote(path) or checkpoint.is_dir():
        return
    if not checkpoint.is_file():
        raise FileNotFoundError(f"checkpoint {checkpoint} does not exist")
    fault = _fault(checkpoint)
    if not fault:
        return
    others = (path for path in checkpoint.parent.glob("*.ckpt") if path.is_file() and path != checkpoint)
    newest = next((path for path in sorted(others, key=_written, reverse=True) if not _fault(path)), None)
    fix = f"the newest complete one beside it is {newest}" if newest else "there is no complete one beside it"
    raise ValueError(f"checkpoint {checkpoint} is {fault}; {fix}")


def _fault(checkpoint: Path) -> str:
    """What is wrong with the zip archive that torch writes, or nothing. Reads all of it: each part has a checksum."""
    # the table of contents comes last
    if not zipfile.is_zipfile(checkpoint):
        return f"not complete ({checkpoint.stat().st_size} bytes)"
    try:
        with zipfile.ZipFile(checkpoint) as archive:
            bad = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError) as error:
        return f"damaged ({error})"
    return f"damaged (the checksum of {bad} is another)" if bad else ""


def _written(path: Path) -> float:
    return path.stat().st_mtime
