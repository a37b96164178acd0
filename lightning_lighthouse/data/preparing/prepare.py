"""Text to a prepared folder: complete or absent, the same files from the same text and settings.

The folder is written as a hidden sibling of the output folder and renamed when complete. The result does not depend on
the number of processes.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
from contextlib import suppress
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Any

from lightning_lighthouse.checks import quoted
from lightning_lighthouse.data.integrity import check
from lightning_lighthouse.data.manifest import INDEX, MANIFEST, Manifest, is_prepared
from lightning_lighthouse.data.preparing.splits import SPLITS, write_splits
from lightning_lighthouse.data.preparing.stopping import stop_on_signals
from lightning_lighthouse.data.settings import DataOptions, Preparation, prepare_command, record_of, settings_of
from lightning_lighthouse.data.tokenizers import identify_tokenizer, load_tokenizer

# What a write fails with where there is no room
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Files of a split, and what litdata puts beside them
WRITTEN = re.compile(re.escape(INDEX) + r"|chunk-\d+-\d+\.bin(\.\w+)*")


def prepare(output_dir: str, **options: Any) -> Manifest:
    """Pack documents into sequences of `seq_len + 1` tokens, unless `output_dir` already holds just these.

    Args:
        output_dir: Folder to write, complete or not at all.
        options: The others of `Preparation`; `seq_len` must be given.

    Returns:
        The manifest of the folder.

    Raises:
        ValueError: An option is out of range, `output_dir` holds something else, or the text is too short.
        OSError: The source cannot be read or the folder not written.
        SystemExit: SIGTERM or Ctrl-C came, with 143 or 130; nothing half is left.
    """
    asked = Preparation(output_dir=output_dir, **options)
    output, tokenizer, overwrite = Path(output_dir), asked.tokenizer, asked.overwrite
    settings = settings_of(asked, identify_tokenizer(tokenizer))
    if is_prepared(output) and not overwrite:
        # of one that was killed when it had put its folder there
        with suppress(OSError):
            _remove_left_over(Path(os.path.realpath(output)))
        return check_prepared(output, settings, tokenizer)
    # a link stays, and what it leads to is replaced
    output = Path(os.path.realpath(output))
    _check_output(output, prepare_command(settings, output, tokenizer), overwrite)

    partial = _sibling(output, "partial")
    again = prepare_command(settings, output, tokenizer, overwrite=overwrite)

    def stopped() -> str:
        if is_published:
            return f"behind the preparation: {output} is complete"
        return f"while preparing {output}, of which nothing is left; to prepare it: {again}"

    is_published = False
    with stop_on_signals(stopped) as wish:
        try:
            with wish.at_once():
                _make_partial(partial, output)
                manifest = write_splits(
                    partial, settings, load_tokenizer(tokenizer, settings.end_of_document), asked.num_workers
                )
            _publish(partial, output, manifest, overwrite)
            is_published = True
        except OSError as error:
            if error.errno not in FULL:
                raise
            # the system names no file
            raise OSError(f"output_dir {output} cannot be written: {error}; make room, or choose another one") from None
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return manifest


def _signature() -> Signature:
    """That of `prepare`, with the options by name."""
    options = signature(Preparation).parameters.values()
    given = [option.replace(kind=Parameter.KEYWORD_ONLY) for option in options if option.name != "output_dir"]
    own = signature(prepare)
    return own.replace(parameters=[own.parameters["output_dir"], *given])


prepare.__signature__ = _signature()  # type: ignore[attr-defined]


def check_prepared(output: Path, settings: DataOptions, tokenizer: str) -> Manifest:
    """The manifest of a complete folder; ValueError if it was prepared with other settings than these."""
    manifest = check(output)
    found, asked = record_of(manifest.settings), record_of(settings)
    for name in asked:
        if asked[name] != found[name]:
            command = prepare_command(settings, output, tokenizer)
            raise ValueError(
                f"{output} was prepared with {name}={quoted(found[name])}, asked for {quoted(asked[name])}; "
                f"keep the former, choose another output_dir, or replace it: {command}"
            )
    return manifest


def _check_output(output: Path, command: str, overwrite: bool) -> None:
    """Raise ValueError where the folder cannot be put there, or would take the place of something else."""
    if _holds_other_files(output):
        raise ValueError(f"output_dir {output} holds files not written by lighthouse prepare; choose another one")
    if not (overwrite or is_prepared(output) or _is_empty(output)):
        raise ValueError(
            f"output_dir {output} holds data but no {MANIFEST}; copy that again, choose another output_dir, or replace "
            f"the folder: {command}"
        )
    # it is replaced as a whole: who stands in it would stand in a folder that is gone
    if Path.cwd().is_relative_to(output):
        raise ValueError(
            f"output_dir {output} is the current folder, or holds it; run this from elsewhere, or choose another one"
        )


def _is_empty(output: Path) -> bool:
    return not output.exists() or not any(output.iterdir())


def _holds_other_files(output: Path) -> bool:
    if not output.is_dir():
        return output.exists()
    found = list(output.iterdir())
    if not {path.name for path in found} <= {MANIFEST, *SPLITS}:
        return True
    if is_prepared(output):
        return False
    # without a manifest a folder of such a name may be the user's own
    inside = [inner for path in found for inner in (path.iterdir() if path.is_dir() else [path])]
    return not all(inner.is_file() and WRITTEN.fullmatch(inner.name) for inner in inside)


def _sibling(output: Path, kind: str) -> Path:
    """A hidden folder beside it, of this process alone: "partial" to write into, "replaced" to move the old one to."""
    return output.parent / f".{output.name}.{kind}-{socket.gethostname()}-{os.getpid()}"


def _make_partial(partial: Path, output: Path) -> None:
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _remove_left_over(output)
        partial.mkdir()
    except OSError as error:
        raise OSError(f"output_dir {output} cannot be written: {error}; choose a folder that can") from None


def _remove_left_over(output: Path) -> None:
    """Remove the hidden siblings that dead processes of this machine have left."""
    host = re.escape(socket.gethostname())
    pattern = re.compile(rf"\.{re.escape(output.name)}\.(partial|replaced)-{host}-(\d+)")
    for left in output.parent.iterdir():
        owner = pattern.fullmatch(left.name)
        if owner and (int(owner[2]) == os.getpid() or not _alive(int(owner[2]))):
            shutil.rmtree(left, ignore_errors=True)


def _alive(pid: int) -> bool:
    with suppress(ProcessLookupError):
        # signal 0 only asks; another user's process refuses, and is alive
        with suppress(PermissionError):
            os.kill(pid, 0)
        return True
    return False


def _publish(partial: Path, output: Path, manifest: Manifest, overwrite: bool) -> None:
    if overwrite and not _is_empty(output) and not _holds_other_files(output):
        replaced = _sibling(output, "replaced")
        output.rename(replaced)
        partial.rename(output)
        shutil.rmtree(replaced)
        return
    try:
        partial.rename(output)
    except OSError:
        if not is_prepared(output):
            raise
        # another node or job was first: all is well if it wrote the same
        if check(output).fingerprint != manifest.fingerprint:
            raise ValueError(
                f"output_dir {output} was written by another process meanwhile, with other content; choose another one"
            ) from None
