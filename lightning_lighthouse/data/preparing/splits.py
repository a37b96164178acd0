"""Documents to the splits of a prepared folder: which document goes where, and what is counted.

Documents become tokens, tokens whole sequences, sequences chunks of litdata; one pass, in the order of the documents.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lightning_lighthouse.data.integrity import record_files
from lightning_lighthouse.data.manifest import Counts, Manifest, SourceCounts
from lightning_lighthouse.data.preparing.mixing import MixedSource, mix, shares_of
from lightning_lighthouse.data.preparing.packing import ChunkWriter, Packed, make_packer
from lightning_lighthouse.data.preparing.pipeline import Processes, Tokenized, start_processes, tokenize
from lightning_lighthouse.data.settings import DataOptions
from lightning_lighthouse.data.tokenizers import Tokenizer, token_dtype

TRAIN, VALIDATION, TEST = SPLITS = "train", "validation", "test"


class Part:
    """The documents of one source in one split: packed and counted.

    Args:
        settings: What was asked.
        dtype: Of a stored token.
    """

    def __init__(self, settings: DataOptions, dtype: type[np.unsignedinteger]) -> None:
        self.packer = make_packer(settings.documents, settings.seq_len + 1, dtype)
        self.documents = self.text_bytes = self.tokens = self.longest = 0

    def add(self, text_bytes: int, tokens: np.ndarray) -> list[Packed]:
        """Take one document, `[n]`; return the sequences that are complete now."""
        self.documents += 1
        self.text_bytes += text_bytes
        self.tokens += tokens.size
        self.longest = max(self.longest, tokens.size)
        return self.packer.add(tokens)


class SourceReader:
    """A source, read as far as it is asked for: training sequences are returned, validation sequences written.

    Args:
        stream: Its documents.
        train: Where training documents go.
        validation: Where validation documents go; None leaves them out.
        writer: Of validation sequences.
        fraction: Share of the documents that are for validation.
        seed: Of the choice of these.
    """

    def __init__(
        self,
        stream: Iterator[Tokenized],
        train: Part,
        validation: Part | None,
        writer: ChunkWriter,
        fraction: float,
        seed: int,
    ) -> None:
        self.train = train
        self.ended = False
        self._documents = enumerate(stream)
        self._validation = validation
        self._writer = writer
        self._fraction = fraction
        self._seed = seed

    def read(self) -> list[Packed] | None:
        """Training sequences of the next documents; None behind the last."""
        if self.ended:
            return None
        for number, (text_bytes, tokens) in self._documents:
            if self._fraction and draw(self._seed, number) < self._fraction:
                if self._validation is not None:
                    self._write(self._validation.add(text_bytes, tokens))
            elif packed := self.train.add(text_bytes, tokens):
                return packed
        self.ended = True
        return self.close()

    def close(self) -> list[Packed]:
        """Read no further; return the training sequences of the documents that were read."""
        if self._validation is not None:
            self._write(self._validation.packer.close())
        return self.train.packer.close()

    def _write(self, packed: list[Packed]) -> None:
        for sequences in packed:
            self._writer.add(sequences)


def write_splits(folder: Path, settings: DataOptions, tokenizer: Tokenizer, num_workers: int) -> Manifest:
    """Write all splits and the manifest into `folder`.

    Returns:
        The manifest.

    Raises:
        ValueError: The text is too short, or damaged; the message names it.
        OSError: A source cannot be read or the folder not written.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    writers = {name: ChunkWriter(folder / name, settings.seq_len + 1, dtype) for name in SPLITS}
    parts: dict[str, list[Part]] = {name: [] for name in SPLITS}
    with start_processes(tokenizer, num_workers) as processes:
        sources = _write_train(folder, settings, tokenizer, processes, parts, writers)
        for split, source in ((VALIDATION, settings.validation_source), (TEST, settings.test_source)):
            if source is not None:
                parts[split].append(part := Part(settings, dtype))
                for text_bytes, tokens in tokenize(source, settings.text_field, tokenizer, processes):
                    for packed in part.add(text_bytes, tokens):
                        writers[split].add(packed)
                for packed in part.packer.close():
                    writers[split].add(packed)
    left_out = sum(source.left_out_sequences for source in sources)
    counts = {name: _count(parts[name], writers[name], left_out if name == TRAIN else 0) for name in SPLITS}
    _check_enough(counts, settings)
    for name, writer in writers.items():
        writer.close()
        if not writer.sequences:
            shutil.rmtree(folder / name)
    manifest = Manifest(
        settings,
        tokenizer.vocab_size,
        tokenizer.end_of_document,
        counts[TRAIN],
        counts[VALIDATION],
        record_files(folder),
        counts[TEST],
        sources if settings.sources else (),
    )
    manifest.save(folder)
    return manifest


def _write_train(
    folder: Path,
    settings: DataOptions,
    tokenizer: Tokenizer,
    processes: Processes,
    parts: dict[str, list[Part]],
    writers: dict[str, ChunkWriter],
) -> tuple[SourceCounts, ...]:
    """Write the training split and what `validation_fraction` takes from it; say what each source gave."""
    dtype = token_dtype(tokenizer.vocab_size)
    paths: list[str | None] = [source.path for source in settings.sources or ()] or [settings.source]
    weights = [source.weight for source in settings.sources or ()] or [1.0]
    fraction = settings.validation_fraction if settings.validation_source is None else 0.0
    readers = []
    for number, path in enumerate(paths):
        parts[TRAIN].append(Part(settings, dtype))
        # a source that is listed twice has the same validation documents again
        validation = None if path in paths[:number] else Part(settings, dtype)
        parts[VALIDATION] += [validation] if validation else []
        stream = tokenize(path, settings.text_field, tokenizer, processes)
        train = parts[TRAIN][-1]
        readers.append(SourceReader(stream, train, validation, writers[VALIDATION], fraction, settings.seed))

    if not settings.sources and settings.long_fraction is None:
        while (read := readers[0].read()) is not None:
            for packed in read:
                writers[TRAIN].add(packed)
        return ()
    by_length = settings.long_fraction is not None
    mixed = [MixedSource(reader.read, folder, by_length) for reader in readers]
    shares = shares_of(weights, settings.long_fraction)
    taken = [0] * len(paths)
    try:
        for share, packed in mix(mixed, shares):
            writers[TRAIN].add(packed)
            taken[share.source] += 1
    except LookupError as error:
        share = error.args[0]
        raise ValueError(_why_no_mix(paths[share.source], share.is_long, settings)) from None
    counts = []
    for path, weight, reader, source, sequences in zip(paths, weights, readers, mixed, taken, strict=True):
        unread = 0 if reader.ended else sum(len(packed.sequences) for packed in reader.close())
        left_out = source.waiting + unread
        part = reader.train
        counts.append(SourceCounts(str(path), weight, part.documents, part.tokens, sequences, left_out, reader.ended))
    return tuple(counts)


def _why_no_mix(path: str | None, is_long: bool, settings: DataOptions) -> str:
    name = "source" if path is None else f"source {path}"
    needed = settings.seq_len + 1
    if settings.long_fraction is None:
        return f"{name} gave less than one sequence of {needed:,} training tokens; give more text or lower seq_len"
    kind = f"a document of more than {needed // 2:,} tokens" if is_long else f"{needed:,} tokens of shorter documents"
    return f"{name} does not give {kind} for long_fraction {settings.long_fraction}; leave it out or lower seq_len"


def _count(parts: list[Part], writer: ChunkWriter, left_out: int) -> Counts:
    # the bytes of some sources over the tokens of all would pass for bytes per token
    is_known = all(part.text_bytes or not part.tokens for part in parts)
    return Counts(
        documents=sum(part.documents for part in parts),
        text_bytes=sum(part.text_bytes for part in parts) if is_known else 0,
        tokens=sum(part.tokens for part in parts),
        sequences=writer.sequences,
        dropped_tokens=sum(part.packer.waiting_tokens for part in parts),
        longest_document=max((part.longest for part in parts), default=0),
        cut_documents=sum(part.packer.cut_documents for part in parts),
        long_sequences=writer.long_sequences,
        left_out_sequences=left_out,
    )


def draw(seed: int, number: int) -> float:
    """A number in [0, 1) for a document: from a hash, so that no library's generator can change the split."""
    digest = hashlib.blake2b(f"{seed}:{number}".encode(), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48


def _check_enough(counts: dict[str, Counts], settings: DataOptions) -> None:
    needed = settings.seq_len + 1
    train = counts[TRAIN]
    if not train.sequences:
        raise ValueError(
            f"seq_len {settings.seq_len} needs {needed:,} training tokens for one sequence, the source gave "
            f"{train.tokens:,} in {train.documents:,} documents; give more text or lower seq_len"
        )
    asked_for = {VALIDATION: "validation_source", TEST: "test_source"}
    if settings.validation_source is None:
        asked_for[VALIDATION] = "validation_fraction"
    for split, asked in asked_for.items():
        found = counts[split]
        if getattr(settings, asked) and not found.sequences:
            without = " (validation_fraction 0)" if split == VALIDATION else ""
            raise ValueError(
                f"{asked} {getattr(settings, asked)} gave {found.tokens:,} tokens in {found.documents:,} documents, "
                f"one sequence needs {needed:,}; give more {split} text, lower seq_len, or do without{without}"
            )
