"""Documents to packed tokens: one pass, in document order, into litdata chunks.

Each document becomes its tokens and one end-of-document id. The tokens of a split form one stream, cut at each multiple
of `seq_len + 1`; a chunk holds whole sequences, so only the remainder at the very end is dropped. The result does not
depend on the number of processes. It is written to a hidden sibling of the output folder and renamed when complete.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import socket
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np

from lightning_lighthouse.arguments import Parser
from lightning_lighthouse.data.integrity import (
    INDEX,
    MANIFEST,
    Counts,
    Manifest,
    Settings,
    check,
    is_prepared,
    prepare_command,
    record_files,
)
from lightning_lighthouse.data.pipeline import tokenize
from lightning_lighthouse.data.tokenizers import BYTES, Tokenizer, identify_tokenizer, load_tokenizer, token_dtype

# litdata's usual size: large enough to stream, small enough to shuffle
CHUNK_BYTES = 64 * 2**20
# litdata counts the bytes of a chunk in 32 bits; one sequence of 4-byte tokens takes half of them
MAX_SEQ_LEN = 2**29
TRAIN, VALIDATION = "train", "validation"


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
) -> Manifest:
    """Pack documents into sequences of `seq_len + 1` tokens, unless `output_dir` already holds just these.

    Args:
        output_dir: Folder to write, complete or not at all.
        seq_len: Tokens of a sequence that a model sees; one more is stored, the last target.
        source: File, folder or glob pattern; None: the source files of Python's standard library.
        text_field: Field of JSONL and Parquet that holds the text.
        tokenizer: "bytes", or the path of a `tokenizer.json`.
        end_of_document: Token that ends a document; None finds the usual one.
        validation_source: Where validation documents come from, like `source`; None: from `source`.
        validation_fraction: Share of the documents of `source` that become validation data; 0 for none. Not used with a
            `validation_source`.
        seed: Of the choice of those documents.
        num_workers: Processes that tokenize; 0 tokenizes in this one. The result is the same.
        overwrite: Replace a folder that was prepared with other settings.

    Returns:
        The manifest of the folder.

    Raises:
        ValueError: A setting is out of range, `output_dir` holds something else, or the text is too short.
        OSError: The source cannot be read or the folder not written.
    """
    check_settings(seq_len, validation_fraction, num_workers)
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
    )
    if is_prepared(output) and not overwrite:
        return check_prepared(output, settings, tokenizer)
    if _holds_other_files(output):
        raise ValueError(f"output_dir {output} holds files not written by lighthouse prepare; choose another one")

    partial = _make_partial(output)
    try:
        manifest = _write(partial, settings, load_tokenizer(tokenizer, end_of_document), num_workers)
        _publish(partial, output, manifest, overwrite)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def check_settings(seq_len: int, validation_fraction: float, num_workers: int) -> None:
    """Raise ValueError where one of these is out of range."""
    if not 1 <= seq_len <= MAX_SEQ_LEN:
        raise ValueError(f"seq_len must be in [1, {MAX_SEQ_LEN}], got {seq_len}")
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"validation_fraction must be in [0, 1), got {validation_fraction}")
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


def _write(folder: Path, settings: Settings, tokenizer: Tokenizer, num_workers: int) -> Manifest:
    splits = {
        name: SplitWriter(folder / name, settings.seq_len + 1, token_dtype(tokenizer.vocab_size))
        for name in (TRAIN, VALIDATION)
    }
    parts = [(settings.source, settings.validation_fraction)]
    if settings.validation_source is not None:
        parts = [(settings.source, 0.0), (settings.validation_source, 1.0)]
    for source, share in parts:
        stream = tokenize(source, settings.text_field, tokenizer, num_workers)
        for number, (text_bytes, tokens) in enumerate(stream):
            split = VALIDATION if _draw(settings.seed, number) < share else TRAIN
            splits[split].add(text_bytes, tokens)
    counts = {name: split.close() for name, split in splits.items()}
    _check_enough(counts, settings)
    if not counts[VALIDATION].sequences:
        shutil.rmtree(folder / VALIDATION)
    manifest = Manifest(
        settings,
        tokenizer.vocab_size,
        tokenizer.end_of_document,
        counts[TRAIN],
        counts[VALIDATION],
        record_files(folder),
    )
    manifest.save(folder)
    return manifest


class SplitWriter:
    """Packs documents into whole sequences, and sequences into chunks of a litdata folder.

    Args:
        folder: Where chunks and index go.
        block: Tokens of a stored sequence.
        dtype: Of a stored token.
    """

    def __init__(self, folder: Path, block: int, dtype: type[np.unsignedinteger]) -> None:
        from litdata.streaming.item_loader import TokensLoader
        from litdata.streaming.writer import BinaryWriter

        self._folder = folder
        self._block = block
        sequences = max(1, CHUNK_BYTES // (block * np.dtype(dtype).itemsize))
        self._chunk = np.empty(sequences * block, dtype=dtype)
        self._filled = 0
        self._num_chunks = 0
        self._writer = BinaryWriter(str(folder), chunk_size=self._chunk.size, item_loader=TokensLoader())
        # chunk names carry the writer's rank; every node must write the same names
        self._writer._rank = 0
        self._documents = self._text_bytes = self._tokens = self._longest = 0

    def add(self, text_bytes: int, tokens: np.ndarray) -> None:
        """Append one document, `tokens` `[n]`, to the stream."""
        self._documents += 1
        self._text_bytes += text_bytes
        self._tokens += tokens.size
        self._longest = max(self._longest, tokens.size)
        while tokens.size:
            taken = tokens[: self._chunk.size - self._filled]
            self._chunk[self._filled : self._filled + taken.size] = taken
            self._filled += taken.size
            tokens = tokens[taken.size :]
            if self._filled == self._chunk.size:
                self._flush()

    def close(self) -> Counts:
        """Write what is left of whole sequences, and the index."""
        dropped = self._filled % self._block
        self._filled -= dropped
        if self._filled:
            self._flush()
        if self._num_chunks:
            self._writer.done()
            (self._folder / f"0.{INDEX}").rename(self._folder / INDEX)
        sequences = (self._tokens - dropped) // self._block
        return Counts(self._documents, self._text_bytes, self._tokens, sequences, dropped, self._longest)

    def _flush(self) -> None:
        self._writer.add_item(self._num_chunks, self._chunk[: self._filled])
        self._num_chunks += 1
        self._filled = 0


def _draw(seed: int, number: int) -> float:
    """A number in [0, 1) for a document: from a hash, so that no library's generator can change the split."""
    digest = hashlib.blake2b(f"{seed}:{number}".encode(), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48


def _check_enough(counts: dict[str, Counts], settings: Settings) -> None:
    needed = settings.seq_len + 1
    train, validation = counts[TRAIN], counts[VALIDATION]
    if not train.sequences:
        raise ValueError(
            f"seq_len {settings.seq_len} needs {needed:,} training tokens for one sequence, the source gave "
            f"{train.tokens:,} in {train.documents:,} documents; give more text or lower seq_len"
        )
    asked = "validation_fraction" if settings.validation_source is None else "validation_source"
    if getattr(settings, asked) and not validation.sequences:
        raise ValueError(
            f"{asked} {getattr(settings, asked)} gave {validation.tokens:,} tokens in {validation.documents:,} "
            f"documents, one sequence needs {needed:,}; give more validation text, lower seq_len, or train without "
            "(validation_fraction 0)"
        )


def _holds_other_files(output: Path) -> bool:
    if not output.is_dir():
        return output.exists()
    return not {path.name for path in output.iterdir()} <= {MANIFEST, TRAIN, VALIDATION}


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
    if overwrite and is_prepared(output):
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


def main(argv: list[str] | None = None) -> int:
    """`lighthouse prepare`: pack text for training.

    Returns:
        Exit status: 0 when the folder is complete, 1 for the data, 2 for wrong arguments.
    """
    parser = Parser(
        prog="lighthouse prepare",
        description="Pack documents into sequences of tokens. The options are those of LighthouseRecipe.",
    )
    parser.add_argument("--output_dir", required=True, help="folder to write, complete or not at all")
    parser.add_argument("--seq_len", type=int, required=True, help="tokens of a sequence")
    parser.add_argument("--source", help="file, folder or glob pattern (default: Python's standard library)")
    parser.add_argument("--text_field", default="text", help="field of JSONL and Parquet (default: %(default)s)")
    parser.add_argument("--tokenizer", default=BYTES, help="bytes, or a tokenizer.json (default: %(default)s)")
    parser.add_argument("--end_of_document", help="token that ends a document (default: the usual one)")
    parser.add_argument("--validation_source", help="where validation documents come from (default: the source)")
    parser.add_argument(
        "--validation_fraction", type=float, default=0.05, help="share of the documents (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=42, help="of the choice of those (default: %(default)s)")
    parser.add_argument("--num_workers", type=int, default=0, help="processes that tokenize (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace a folder prepared with other settings")
    asked = parser.parse_args(argv)
    try:
        check_settings(asked.seq_len, asked.validation_fraction, asked.num_workers)
    except ValueError as error:
        parser.error(str(error))
    try:
        manifest = prepare(**vars(asked))
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"lighthouse prepare: {error}", file=sys.stderr)
        return 1
    print(f"{asked.output_dir}\n{manifest.report()}")
    return 0
