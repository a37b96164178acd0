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
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning_lighthouse.data.integrity import check
from lightning_lighthouse.data.manifest import INDEX, MANIFEST, Manifest, is_prepared
from lightning_lighthouse.data.preparing.splits import SPLITS, write_splits
from lightning_lighthouse.data.settings import (
    BYTES,
    PACK,
    Settings,
    WeightedSource,
    prepare_command,
    weighted_sources,
)
from lightning_lighthouse.data.tokenizers import identify_tokenizer, load_tokenizer

# What a write fails with where there is no room
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Files of a split, and what litdata puts beside them
WRITTEN = re.compile(re.escape(INDEX) + r"|chunk-\d+-\d+\.bin(\.\w+)*")


def prepare(
    output_dir: str,
    *,
    seq_len: int,
    source: str | None = None,
    text_field: str = "text",
    tokenizer: str = BYTES,
    end_of_document: str | None = None,
    validation_source: str | None = None,
    validation_fraction: float = 0.05,
    seed: int = 42,
    num_workers: int = 0,
    overwrite: bool = False,
    sources: Sequence[WeightedSource | Mapping[str, Any]] | None = None,
    test_source: str | None = None,
    documents: str = PACK,
    long_fraction: float | None = None,
) -> Manifest:
    """Pack documents into sequences of `seq_len + 1` tokens, unless `output_dir` already holds just these.

    Args:
        output_dir: Folder to write, complete or not at all.
        seq_len: Tokens of a sequence that a model sees; one more is stored, the last target.
        source: File, folder or glob pattern; None: the source files of Python's standard library.
        text_field: Field of JSONL, Parquet and Arrow that holds the text.
        tokenizer: "bytes", or the path of a `tokenizer.json`.
        end_of_document: Token that ends a document; None finds the usual one.
        validation_source: Where validation documents come from, like `source`; None: from `source`.
        validation_fraction: Share of the documents of `source` that become validation data; 0 for none. Not used with a
            `validation_source`.
        seed: Of the choice of those documents.
        num_workers: Processes that tokenize; 0 tokenizes in this one. The result is the same.
        overwrite: Replace a folder that was prepared with other settings, or that lost its manifest.
        sources: Several sources with weights, instead of `source`.
        test_source: Where test documents come from, like `source`; None: no test data.
        documents: "pack" cuts the stream of all documents; "whole" lets each document of more than half a sequence
            begin one, and fills up with shorter ones.
        long_fraction: Share of the training sequences that begin with such a long document, in (0, 1], with "whole";
            None takes them as they come.

    Returns:
        The manifest of the folder.

    Raises:
        ValueError: A setting is out of range, `output_dir` holds something else, or the text is too short.
        OSError: The source cannot be read or the folder not written.
    """
    check_workers(num_workers)
    output = Path(output_dir)
    settings = Settings(
        source=source,
        text_field=text_field,
        tokenizer=identify_tokenizer(tokenizer),
        end_of_document=end_of_document,
        seq_len=seq_len,
        validation_source=validation_source,
        validation_fraction=validation_fraction,
        seed=seed,
        sources=weighted_sources(sources),
        test_source=test_source,
        documents=documents,
        long_fraction=long_fraction,
    )
    if is_prepared(output) and not overwrite:
        return check_prepared(output, settings, tokenizer)
    # a link stays, and what it leads to is replaced
    output = Path(os.path.realpath(output))
    _check_output(output, prepare_command(settings, output, tokenizer, overwrite=True), overwrite)

    partial = _make_partial(output)
    try:
        manifest = write_splits(partial, settings, load_tokenizer(tokenizer, end_of_document), num_workers)
        _publish(partial, output, manifest, overwrite)
    except OSError as error:
        if error.errno not in FULL:
            raise
        # the system names no file
        raise OSError(f"output_dir {output} cannot be written: {error}; make room, or choose another one") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def check_workers(num_workers: int) -> None:
    """Raise ValueError where there can be no such number of processes."""
    if num_workers < 0:
        raise ValueError(f"num_workers must be at least 0, got {num_workers}")


def check_prepared(output: Path, settings: Settings, tokenizer: str) -> Manifest:
    """The manifest of a complete folder; ValueError if it was prepared with other settings than these."""
    manifest = check(output)
    found, asked = asdict(manifest.settings), asdict(settings)
    for name in asked:
        if asked[name] != found[name]:
            command = prepare_command(settings, output, tokenizer, overwrite=True)
            raise ValueError(
                f"{output} was prepared with {name}={found[name]!r}, asked for {asked[name]!r}; keep the former, "
                f"choose another output_dir, or replace it: {command}"
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


def _make_partial(output: Path) -> Path:
    """A hidden sibling to write into; what dead processes left of theirs is removed."""
    host = socket.gethostname()
    pattern = re.compile(re.escape(f".{output.name}.partial-{host}-") + r"(\d+)")
    partial = output.parent / f".{output.name}.partial-{host}-{os.getpid()}"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        for left in output.parent.iterdir():
            owner = pattern.fullmatch(left.name)
            if owner and (left == partial or not _alive(int(owner[1]))):
                shutil.rmtree(left, ignore_errors=True)
        partial.mkdir()
    except OSError as error:
        raise OSError(f"output_dir {output} cannot be written: {error}; choose a folder that can") from None
    return partial


def _alive(pid: int) -> bool:
    with suppress(ProcessLookupError):
        # signal 0 only asks; another user's process refuses, and is alive
        with suppress(PermissionError):
            os.kill(pid, 0)
        return True
    return False


def _publish(partial: Path, output: Path, manifest: Manifest, overwrite: bool) -> None:
    if overwrite and not _is_empty(output) and not _holds_other_files(output):
        replaced = output.with_name(f".{output.name}.replaced-{os.getpid()}")
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
