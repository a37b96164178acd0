"""Files that appear whole or not at all: checkpoints, final weights, reports; local ones, and those at an address."""

from __future__ import annotations

import io
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from fsspec.core import split_protocol
from fsspec.implementations.local import LocalFileSystem
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import get_filesystem

from lightning_lighthouse.runs.whole_file import PARTIAL, whole_file


class SavingError(OSError):
    """A file could not be written; the one before it, if any, is as it was."""


def save_whole(content: Any, path: str | Path) -> None:
    """Write `content` with torch.save to `path`: a local file by `whole_file`, another in one piece.

    Args:
        content: What torch.save takes.
        path: Local file, or an address that fsspec opens; its folder is made if it is missing.

    Raises:
        SavingError: The disk is full, or the folder cannot be written to; with the size that is needed.
    """
    if is_remote(path):
        # object storage shows a file once all of it is there
        TorchCheckpointIO().save_checkpoint(content, path)
        return
    path = local_path(path)
    try:
        # an open file: torch's own would hide the system's error
        with whole_file(path) as partial, open(partial, "wb") as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:
        # torch may wrap the system's error in one of its own
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        if not isinstance(cause, OSError):
            raise
        raise SavingError(f"{path} could not be written: {_explain(cause, content, path)}") from cause


def save_text(text: str, path: str | Path) -> None:
    """Write a text file whole, to a local path or an address; its folder is made if it is missing."""
    if is_remote(path):
        storage = get_filesystem(path)
        storage.makedirs(os.path.dirname(path), exist_ok=True)
        storage.pipe_file(os.fspath(path), text.encode())
        return
    with whole_file(local_path(path)) as partial:
        partial.write_text(text, encoding="utf-8", newline="")


def check_writable(folder: str | Path) -> None:
    """Make sure that a file can be written to a folder, which may not exist yet; nothing is left there.

    Args:
        folder: Local, or an address.

    Raises:
        SavingError: It cannot.
    """
    if is_remote(folder):
        _check_writable_address(os.fspath(folder))
        return
    folder = local_path(folder)
    made = [part for part in (folder, *folder.parents) if not part.exists()]
    probe = folder / f".probe-{os.getpid()}{PARTIAL}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise SavingError(f"nothing can be written to {folder}: {error.strerror}; choose another folder") from error
    finally:
        for part in made:
            # another rank or run may have begun to use it
            with suppress(OSError):
                part.rmdir()


def _check_writable_address(folder: str) -> None:
    probe = f"{folder.rstrip('/')}/.probe-{os.getpid()}{PARTIAL}"
    try:
        storage = get_filesystem(folder)
        is_new = not storage.exists(folder)
        storage.makedirs(folder, exist_ok=True)
        storage.pipe_file(probe, b"")
        storage.rm_file(probe)
        if is_new:
            with suppress(OSError):
                storage.rmdir(folder)
    # whatever the client of a storage raises, one without its package or the rights among it
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SavingError(f"nothing can be written to {folder}: {reason}; choose another folder") from error


def _explain(error: OSError, content: Any, path: Path) -> str:
    folder = next(folder for folder in path.absolute().parents if folder.is_dir())
    needed, free = count_bytes(content), shutil.disk_usage(folder).free
    kept = "the file of before is kept" if path.exists() else "nothing is left of it"
    return f"{error.strerror} ({needed:,} bytes are needed, {free:,} are free in {folder}); {kept}"


def count_bytes(content: Any) -> int:
    """Bytes of the file that torch.save would write."""
    counter = _Counter()
    torch.save(content, counter)
    return counter.size


class _Counter(io.BytesIO):
    """A file that counts what is written, and keeps nothing."""

    size = 0

    def write(self, data: Any) -> int:
        written = memoryview(data).nbytes
        self.size += written
        return written


class WholeCheckpointIO(TorchCheckpointIO):
    """Lightning's reading and writing of checkpoints, but whole also where the temporary folder is another disk.

    Lightning 2.6 writes to the system's temporary folder and then moves the file; between two disks a move is a copy,
    which a kill cuts short under the final name. It also holds the file twice in memory first.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a local file by `save_whole`; object storage is Lightning's, where a file appears whole anyway."""
        if storage_options is not None or is_remote(path):
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            save_whole(checkpoint, path)


def is_remote(path: str | Path) -> bool:
    """Whether a path is an address, "s3://bucket/last.ckpt", and no local file."""
    return split_protocol(path)[0] not in (None, *LocalFileSystem.protocol)


def local_path(path: str | Path) -> Path:
    """A local path, also of an address as "file:///runs"."""
    return Path(path) if split_protocol(path)[0] is None else Path(LocalFileSystem._strip_protocol(os.fspath(path)))
