"""The checkpoint that a command starts from: found, complete, and loaded as nothing but data."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from jsonargparse import Namespace
from lightning.pytorch.utilities import rank_zero_info

from lightning_lighthouse.checks import quoted
from lightning_lighthouse.cli.recipe import UsageError
from lightning_lighthouse.cli.weights import VERSION, Contents, look_into
from lightning_lighthouse.runs.saving import is_remote, local_path
from lightning_lighthouse.runs.sharded import OTHERS, is_sharded_checkpoint

# how an archive begins
ZIP = b"PK\x03\x04"
# torch.load listens to these
FORCE_DATA, FORCE_CODE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


@contextmanager
def loaded_as_data(path: Path | str | None) -> Iterator[None]:
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
    except IsADirectoryError as error:
        if path is None or not is_sharded_checkpoint(Path(path)):
            raise
        raise ValueError(
            f"{path} is a sharded checkpoint, and this strategy goes on from a file alone: train on with the strategy "
            "that wrote it, as FSDPStrategy or ModelParallelStrategy, on however many devices"
        ) from error
    except KeyError as error:
        if error.args != (VERSION,):
            raise
        raise ValueError(f"{path} is no checkpoint of a training: it holds no state to go on from") from error
    finally:
        del os.environ[FORCE_DATA]
        os.environ.update({name: value for name, value in kept.items() if value is not None})


def resolve_checkpoint(command: str, config: Namespace) -> Path | None:
    """Replace `--ckpt_path` auto, last or best by the newest such file of this recipe's runs, and log to that run.

    What an evaluation starts from is said in a line.

    Args:
        command: "fit", "validate" or "test".
        config: Its settings, changed in place.

    Returns:
        The file where it holds weights that Lightning cannot load; `config` names none then.

    Raises:
        UsageError: auto, for another command than fit; or the logger's folders are not known here.
        FileNotFoundError: There is no such checkpoint; auto starts afresh instead.
        ValueError: The checkpoint is not complete, or damaged, or nothing that the command can start from.
    """
    asked = config.ckpt_path
    if asked in ("auto", "last", "best"):
        if asked == "auto" and command != "fit":
            raise UsageError(f"ckpt_path must be a file, 'last' or 'best' for {command}, got 'auto'")
        place = _find_runs(config)
        name = "best.ckpt" if asked == "best" else "last.ckpt"
        files = [folder / name for folder in place.folders if (folder / name).exists()]
        found = max(files, key=_written, default=None)
        config.ckpt_path = None if found is None else str(found)
        if found is not None and place.is_any_version:
            config.trainer.logger.init_args.version = found.parent.parent.name
        elif found is None and asked == "auto":
            rank_zero_info(f"ckpt_path auto: there is no {place.shown / name}, the training starts afresh")
        elif found is None:
            raise FileNotFoundError(
                f"ckpt_path {asked}: there is no {place.shown / name}; give a file, or no ckpt_path"
            )
    path = config.ckpt_path
    if path is None and command != "fit":
        rank_zero_info("ckpt_path: none is given, the weights are those that the model begins with")
    if path is None or is_remote(path):
        return None
    contents = contents_of(Path(path))
    if command == "fit":
        if not contents.can_go_on:
            raise ValueError(_no_training(Path(path), contents.words))
        return None
    rank_zero_info(f"ckpt_path {path}: {contents.words}")
    if contents.is_checkpoint:
        return None
    config.ckpt_path = None
    return Path(path)


def contents_of(path: Path) -> Contents:
    """What a file or a sharded checkpoint holds, once it is known to be whole.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is not complete, or damaged, or holds code, or neither a checkpoint nor weights.
    """
    _check_complete(path)
    with loaded_as_data(path):
        return look_into(path)


class _Place(NamedTuple):
    """Where the checkpoints of a recipe's runs are.

    Args:
        folders: Those that may hold them. Names are the user's, and no patterns: "lr=0.1 [a]" is a version.
        shown: How a message names them.
        is_any_version: Whether they are those of all versions of a logger.
    """

    folders: list[Path]
    shown: Path
    is_any_version: bool = False


def _find_runs(config: Namespace) -> _Place:
    if config.checkpoint.dirpath is not None:
        folder = _searched(config, config.checkpoint.dirpath)
        return _Place([folder], folder)
    logger = config.trainer.logger
    if not logger:
        folder = _searched(config, config.trainer.default_root_dir or ".") / "checkpoints"
        return _Place([folder], folder)
    class_path = str(getattr(logger, "class_path", "")).rpartition(".")[-1]
    if class_path not in ("TensorBoardLogger", "CSVLogger"):
        raise UsageError(
            f"ckpt_path {config.ckpt_path} searches the folders of a TensorBoardLogger or CSVLogger, trainer.logger "
            "is another: give a file, or set checkpoint.dirpath"
        )
    settings = logger.init_args
    root = _searched(config, settings.save_dir) / (settings.name or "")
    if settings.version is None:
        runs = root.iterdir() if root.is_dir() else ()
        return _Place([run / "checkpoints" for run in runs], root / "*" / "checkpoints", is_any_version=True)
    version = settings.version if isinstance(settings.version, str) else f"version_{settings.version}"
    folder = root / version / "checkpoints"
    return _Place([folder], folder)


def _searched(config: Namespace, folder: str | Path) -> Path:
    """A folder to look for checkpoints in."""
    if is_remote(folder):
        raise UsageError(
            f"ckpt_path {config.ckpt_path} searches local folders, got {folder}: give a checkpoint's address"
        )
    return local_path(folder)


def _no_training(path: Path, words: str) -> str:
    beside = path.parent / "checkpoints" / "last.ckpt"
    last = str(beside) if beside.is_file() else "a checkpoint, checkpoints/last.ckpt in the folder of its run,"
    return (
        f"ckpt_path {path} holds {words}, and no training to go on from: give {last} to go on with its training, or "
        "load the weights in a LightningModule of your own to begin another"
    )


def _check_complete(checkpoint: Path) -> None:
    """Refuse a file that was cut short or altered; of a folder, what lies beside the shards."""
    if checkpoint.is_dir():
        if (checkpoint / OTHERS).is_file() and (fault := _fault(checkpoint / OTHERS)):
            raise ValueError(f"checkpoint {checkpoint / OTHERS} is {fault}")
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
        with checkpoint.open("rb") as file:
            begins = file.read(len(ZIP))
        if begins and not ZIP.startswith(begins):
            return f"no archive as torch.save writes, it begins with {quoted(begins)}"
        return f"not complete ({checkpoint.stat().st_size} bytes)"
    try:
        with zipfile.ZipFile(checkpoint) as archive:
            bad = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError) as error:
        return f"damaged ({error})"
    return f"damaged (the checksum of {bad} is another)" if bad else ""


def _written(path: Path) -> float:
    return path.stat().st_mtime
