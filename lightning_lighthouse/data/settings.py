"""What is asked of a preparation, each value checked once."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

BYTES = "bytes"
PACK, WHOLE = "pack", "whole"
# litdata counts the bytes of a chunk in 32 bits; one sequence of 4-byte tokens takes half of them
MAX_SEQ_LEN = 2**29


@dataclass(frozen=True)
class WeightedSource:
    """One of several sources, and how much of the training data it makes up.

    Args:
        path: File, folder or glob pattern, like `source`.
        weight: Share of the training sequences, relative to the other weights.

    Raises:
        ValueError: The path is empty, or the weight is not greater than 0.
    """

    path: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.path, str) or not self.path:
            raise ValueError(f"path must be a file, a folder or a glob pattern, got {self.path!r}")
        if not isinstance(self.weight, int | float) or not 0 < self.weight < math.inf:
            raise ValueError(f"weight must be greater than 0, got {self.weight!r} for {self.path}")


@dataclass(frozen=True)
class Settings:
    """What was asked of the preparation: equal settings and equal text give equal files.

    Args:
        source: As given by the user; None: Python's standard library, or `sources`.
        text_field: Field of JSONL, Parquet and Arrow that holds the text.
        tokenizer: From `identify_tokenizer`.
        end_of_document: As given by the user.
        seq_len: Tokens a model sees of a sequence; one more is stored.
        validation_source: As given by the user; None: `source`.
        validation_fraction: Share of the documents of `source`.
        seed: Of the choice of validation documents.
        sources: Several sources by weight, instead of `source`.
        test_source: As given by the user; None: no test data.
        documents: "pack" or "whole".
        long_fraction: Share of the training sequences that begin with a long document.

    Raises:
        ValueError: A value is out of range, or two of them exclude each other.
    """

    source: str | None
    text_field: str
    tokenizer: str
    end_of_document: str | None
    seq_len: int
    validation_source: str | None
    validation_fraction: float
    seed: int
    sources: tuple[WeightedSource, ...] = ()
    test_source: str | None = None
    documents: str = PACK
    long_fraction: float | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.seq_len <= MAX_SEQ_LEN:
            raise ValueError(f"seq_len must be in [1, {MAX_SEQ_LEN}], got {self.seq_len}")
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"validation_fraction must be in [0, 1), got {self.validation_fraction}")
        if self.tokenizer == BYTES and self.end_of_document is not None:
            raise ValueError(f"end_of_document must be None for byte tokens, got {self.end_of_document!r}")
        if self.documents not in (PACK, WHOLE):
            raise ValueError(f"documents must be {PACK!r} or {WHOLE!r}, got {self.documents!r}")
        if self.long_fraction is not None:
            if not 0 < self.long_fraction <= 1:
                raise ValueError(f"long_fraction must be in (0, 1], got {self.long_fraction}")
            if self.documents != WHOLE:
                raise ValueError(f"long_fraction must be left out with documents {self.documents!r}; use {WHOLE!r}")
        if self.source is not None and self.sources:
            raise ValueError(f"source must be left out beside sources, got {self.source!r}")


def weighted_sources(sources: Sequence[WeightedSource | Mapping[str, Any]] | None) -> tuple[WeightedSource, ...]:
    """Sources as a user gives them, checked.

    Raises:
        ValueError: One is no path with a weight; the message names it.
    """
    if sources is None:
        return ()
    if isinstance(sources, str | Mapping) or not sources:
        raise ValueError(f"sources must be a list of at least one path with a weight, got {sources!r}")
    checked = []
    for number, given in enumerate(sources):
        try:
            checked.append(given if isinstance(given, WeightedSource) else WeightedSource(**given))
        except TypeError:
            known = ", ".join(field.name for field in fields(WeightedSource))
            raise ValueError(f"sources[{number}] must be a mapping of {known}, got {given!r}") from None
        except ValueError as error:
            raise ValueError(f"sources[{number}].{error}") from None
    return tuple(checked)


def prepare_command(settings: Settings, output_dir: Path, tokenizer: str, *, overwrite: bool) -> str:
    """The command line that prepares `output_dir` with these settings, as the user would type it."""
    words = ["lighthouse", "prepare", "--output_dir", str(output_dir)]
    for field in fields(Settings):
        value = tokenizer if field.name == "tokenizer" else getattr(settings, field.name)
        if field.name == "sources":
            weights = [f"{source.path}={source.weight}" for source in settings.sources]
            words += ["--sources", *weights] if weights else []
        # what came later is left out where it is as it was before
        elif value is not None and (field.name != "documents" or value != PACK):
            words += [f"--{field.name}", str(value)]
    return shlex.join([*words, "--overwrite"] if overwrite else words)
