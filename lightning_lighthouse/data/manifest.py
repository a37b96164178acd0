"""What a prepared folder says about itself: `manifest.json`.

It records the settings, the counts, size and sha256 of every file, and a digest of these records.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path, PurePosixPath
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from lightning_lighthouse.checks import quoted
from lightning_lighthouse.data.settings import DataOptions, record_of

MANIFEST = "manifest.json"
INDEX = "index.json"
# Raised when the layout of the folder changes; 2 records more than 1
FORMAT = 2
READABLE_FORMATS = (1, FORMAT)
# Names the digest of all else in the manifest
CONTENT = "content_sha256"


@dataclass(frozen=True)
class Counts:
    """What one split holds.

    Args:
        documents: Documents that are not empty.
        text_bytes: Bytes of their text, UTF-8; 0 where some of it is unknown, since tokens were read.
        tokens: Tokens of all documents, ends of documents included.
        sequences: Sequences of `seq_len + 1` tokens.
        dropped_tokens: Tokens of the last, incomplete sequence (of each source).
        longest_document: Tokens of the longest document, its end included.
        cut_documents: Documents that would fit into one sequence and are spread over several.
        long_sequences: Sequences that begin with a long document (only with documents "whole").
        left_out_sequences: Sequences that were read and that the proportions of a mix left no place for.
    """

    documents: int = 0
    text_bytes: int = 0
    tokens: int = 0
    sequences: int = 0
    dropped_tokens: int = 0
    longest_document: int = 0
    cut_documents: int = 0
    long_sequences: int = 0
    left_out_sequences: int = 0

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes of text that one token stands for; None where some of the text is unknown, or there is none."""
        return self.text_bytes / self.tokens if self.text_bytes else None


@dataclass(frozen=True)
class SourceCounts:
    """What one of several sources gave to the training split.

    Args:
        path: As given by the user.
        weight: As given by the user.
        documents: Documents that were read.
        tokens: Tokens of these.
        sequences: Sequences that were taken.
        left_out_sequences: Sequences that were read and not taken.
        read_to_end: Whether all of the source was read.
    """

    path: str
    weight: float
    documents: int
    tokens: int
    sequences: int
    left_out_sequences: int
    read_to_end: bool


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and sha256 of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The record of a prepared folder.

    Args:
        settings: What was asked, from `settings_of`.
        vocab_size: Every token id is below it.
        end_of_document: The id behind each document.
        train: Counts of the training split.
        validation: Counts of the validation split, all 0 where there is none.
        files: By path within the folder, "train/index.json".
        test: Counts of the test split, all 0 where there is none.
        sources: Of several sources, what each gave to the training split.
    """

    settings: DataOptions
    vocab_size: int
    end_of_document: int
    train: Counts
    validation: Counts
    files: dict[str, FileRecord]
    test: Counts = field(default_factory=Counts)
    sources: tuple[SourceCounts, ...] = ()

    @property
    def sha256(self) -> str:
        """Of the packed tokens: of the digests of all chunks. The same text and settings give it again anywhere."""
        chunks = {name: record.sha256 for name, record in self.files.items() if not name.endswith(INDEX)}
        return _digest(chunks)

    @property
    def fingerprint(self) -> str:
        """Of all that decides the batches: the tokens, the tokenizer, the sequence length."""
        return _digest([self.sha256, self.settings.tokenizer, self.settings.seq_len])

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes of text that one token stands for, all splits together; None where some of the text is unknown."""
        splits = [split for split in (self.train, self.validation, self.test) if split.tokens]
        if any(split.bytes_per_token is None for split in splits):
            return None
        return sum(split.text_bytes for split in splits) / sum(split.tokens for split in splits)

    def summary(self) -> str:
        """One line."""
        train, validation, test = (f"{split.sequences:,}" for split in (self.train, self.validation, self.test))
        counts = f"{train} training and {validation} validation"
        if self.test.sequences:
            counts = f"{train} training, {validation} validation and {test} test"
        return f"{counts} sequences of {self.settings.seq_len:,} tokens, sha256 {self.sha256}"

    def report(self) -> str:
        """Every count, for the screen."""
        splits = {"training": self.train, "validation": self.validation}
        if self.test.documents:
            splits["test"] = self.test
        lines = [f"{'':18}" + "".join(f"{name:>16}" for name in splits)]
        for count in fields(Counts):
            values = [f"{getattr(split, count.name):,}" for split in splits.values()]
            if count.name == "text_bytes":
                known = [split.bytes_per_token is not None or not split.tokens for split in splits.values()]
                values = [value if is_known else "unknown" for value, is_known in zip(values, known, strict=True)]
            lines.append(f"{count.name.replace('_', ' '):18}" + "".join(f"{value:>16}" for value in values))
        ratios = [split.bytes_per_token for split in splits.values()]
        if any(ratios):
            shown = ("-" if ratio is None else f"{ratio:.4f}" for ratio in ratios)
            lines.append(f"{'bytes per token':18}" + "".join(f"{ratio:>16}" for ratio in shown))
        for source in self.sources:
            share = source.sequences / self.train.sequences
            lines.append(
                f"{source.path}: {share:.1%} of the training sequences, {source.left_out_sequences:,} left out, "
                f"read {'to its end' if source.read_to_end else f'up to document {source.documents:,}'}"
            )
        lines.append(
            f"tokenizer {self.settings.tokenizer}: {self.vocab_size:,} tokens, {self.end_of_document} ends a document"
        )
        return "\n".join([*lines, self.summary()])

    def save(self, folder: Path) -> None:
        """Write it into `folder`."""
        content = {"format": FORMAT, **asdict(self), "settings": record_of(self.settings), "sha256": self.sha256}
        (folder / MANIFEST).write_text(json.dumps({**content, CONTENT: _digest(content)}, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read it from `folder`.

        Raises:
            FileNotFoundError: There is none.
            ValueError: It is cut short, altered, or of another format.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(f"{folder} holds no {MANIFEST}: it was not prepared by lighthouse prepare")
        try:
            content = json.loads(path.read_bytes())
            if content["format"] not in READABLE_FORMATS:
                raise ValueError(f"format {content['format']}, this version reads {FORMAT}")
            # the first folders have none
            digest = content.pop(CONTENT, None)
            if digest is not None and digest != _digest(content):
                raise ValueError(f"its {CONTENT} does not fit the rest of it")
            settings = content["settings"]
            manifest = cls(
                settings=DataOptions(**{**settings, "sources": settings.get("sources") or None}),
                vocab_size=content["vocab_size"],
                end_of_document=content["end_of_document"],
                train=Counts(**content["train"]),
                validation=Counts(**content["validation"]),
                files={_inside(name): FileRecord(**record) for name, record in content["files"].items()},
                test=Counts(**content.get("test", {})),
                sources=tuple(SourceCounts(**source) for source in content.get("sources", ())),
            )
            _check_types(manifest)
            if content["sha256"] != manifest.sha256:
                raise ValueError("its sha256 does not fit its files")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{path} is cut short or altered ({error}); prepare the data again, with --overwrite"
            ) from None
        return manifest


def is_prepared(folder: Path) -> bool:
    """Whether `folder` was prepared by this package."""
    return (folder / MANIFEST).is_file()


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _check_types(record: Any) -> None:
    """Raise TypeError where a value is not of its field's type: the first folders have no digest that would tell."""
    for name, kind in get_type_hints(type(record)).items():
        value = getattr(record, name)
        if not _fits(value, kind):
            raise TypeError(f"{name} is {quoted(value)}")


def _fits(value: Any, kind: Any) -> bool:
    origin, options = get_origin(kind), get_args(kind)
    if origin is UnionType:
        return any(_fits(value, option) for option in options)
    if origin is Literal:
        return value in options
    if origin is dict:
        return isinstance(value, dict) and all(_fits(item, options[1]) for item in value.values())
    if origin is not None:
        return isinstance(value, origin) and all(_fits(item, options[0]) for item in value)
    if is_dataclass(value) and isinstance(value, kind):
        _check_types(value)
    # JSON and users write whole numbers without a point
    return isinstance(value, kind | int if kind is float else kind)


def _inside(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"file {quoted(name)} lies outside the folder")
    return name
