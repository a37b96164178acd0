"""What can be asked of the data: every option once, with its default and its meaning, each value checked once.

`LighthouseRecipe`, `prepare`, the command `lighthouse prepare` and the manifest of a prepared folder take them from
here.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from lightning_lighthouse.checks import quoted

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
            raise ValueError(f"path must be a file, a folder or a glob pattern, got {quoted(self.path)}")
        if not isinstance(self.weight, int | float) or not 0 < self.weight < math.inf:
            raise ValueError(f"weight must be greater than 0, got {quoted(self.weight)} for {self.path}")


# Options that are compared decide what the prepared files hold: equal ones and equal text give equal files.
@dataclass
class DataOptions:
    """Every option of the data.

    Args:
        seq_len: Tokens of a sequence that the model sees; a property of the prepared data, which stores one more.
        batch_size: Sequences of a batch, on each rank.
        source: Text file, JSONL, Parquet, Arrow, a folder of these, a glob pattern, a data set saved by Hugging Face's
            `datasets`, a litdata folder of tokens, or a folder that was prepared before. None: the source files of
            Python's standard library.
        output_dir: Where the prepared data goes, complete or not at all, and is found again. Not used by a training
            whose `source` is prepared already.
        text_field: Field of JSONL, Parquet and Arrow that holds the text.
        tokenizer: "bytes" (256 bytes and id 256 for the end of a document), or the path of a `tokenizer.json`.
        end_of_document: Token of `tokenizer.json` that ends a document; None finds the usual one.
        validation_source: Where validation documents come from, like `source`; None: from `source`.
        validation_fraction: Share of the documents of `source` that become validation data, in [0, 1); 0 for none. Not
            used with a `validation_source`.
        seed: Of the choice of validation documents and of the order of training sequences.
        num_workers: Processes that read batches on each rank, and that tokenize during preparation; 0 for none. The
            prepared data are the same with any number.
        document_ids: Add "document_ids" and "positions", each `[batch, seq_len + 1]`: the document of a token, counted
            from 0 in each sequence, and the position within that document; and "documents", which attention stays
            inside with documents=True.
        sources: Several sources instead of `source`, each a path and a weight: their shares of the training sequences.
            Nothing comes twice: the data ends where the first of them runs out.
        test_source: Where test documents come from, like `source`; None: there is no test data.
        documents: "pack" cuts the stream of all documents at each `seq_len + 1`; "whole" lets each document of more
            than half a sequence begin one, and fills up with shorter documents.
        long_fraction: Share of the training sequences that begin with such a long document, in (0, 1], with "whole";
            None takes them as they come.

    Raises:
        ValueError: A value is out of range, or two of them exclude each other.
    """

    seq_len: int = 8192
    batch_size: int = field(default=1, compare=False)
    source: str | None = None
    output_dir: str = field(default="data/prepared", compare=False)
    text_field: str = "text"
    tokenizer: str = BYTES
    end_of_document: str | None = None
    validation_source: str | None = None
    validation_fraction: float = 0.05
    seed: int = 42
    num_workers: int = field(default=2, compare=False)
    document_ids: bool = field(default=False, compare=False)
    sources: list[WeightedSource] | None = None
    test_source: str | None = None
    documents: Literal["pack", "whole"] = "pack"
    long_fraction: float | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        if self.num_workers < 0:
            raise ValueError(f"num_workers must be at least 0, got {self.num_workers}")
        if not 1 <= self.seq_len <= MAX_SEQ_LEN:
            raise ValueError(f"seq_len must be in [1, {MAX_SEQ_LEN}], got {self.seq_len}")
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"validation_fraction must be in [0, 1), got {self.validation_fraction}")
        if self.tokenizer == BYTES and self.end_of_document is not None:
            raise ValueError(f"end_of_document must be None for byte tokens, got {quoted(self.end_of_document)}")
        if self.documents not in (PACK, WHOLE):
            raise ValueError(f"documents must be {PACK!r} or {WHOLE!r}, got {quoted(self.documents)}")
        if self.long_fraction is not None:
            if not 0 < self.long_fraction <= 1:
                raise ValueError(f"long_fraction must be in (0, 1], got {self.long_fraction}")
            if self.documents != WHOLE:
                raise ValueError(
                    f"long_fraction must be left out with documents {quoted(self.documents)}; use {WHOLE!r}"
                )
        if self.source is not None and self.sources is not None:
            raise ValueError(f"source must be left out beside sources, got {quoted(self.source)}")
        if self.sources is not None:
            self.sources = weighted_sources(self.sources)


RECORDED = tuple(option.name for option in fields(DataOptions) if option.compare)


@dataclass(kw_only=True)
class Preparation(DataOptions):
    """The options of a preparation, which makes no batches, and is told where it writes and how long sequences are.

    Args:
        overwrite: Replace a folder that was prepared with other settings, or that lost its manifest.
    """

    seq_len: int = field()
    output_dir: str = field()
    num_workers: int = 0
    overwrite: bool = False
    batch_size: int = field(default=1, init=False)
    document_ids: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed(self.seed)


def check_seed(seed: int) -> None:
    """Raise ValueError for a seed of which no order can be drawn. Folders may say that they were made with one."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be from 0 to {2**32 - 1}, got {seed}")


def settings_of(options: DataOptions, tokenizer: str) -> DataOptions:
    """The options that decide the prepared files, all else at its default.

    Args:
        options: As given by the user.
        tokenizer: From `identify_tokenizer`, in place of a path.
    """
    return DataOptions(**{**{name: getattr(options, name) for name in RECORDED}, "tokenizer": tokenizer})


def record_of(settings: DataOptions) -> dict[str, Any]:
    """What a manifest holds of `settings_of`, in JSON's types."""
    record = {name: getattr(settings, name) for name in RECORDED}
    return {**record, "sources": [asdict(source) for source in settings.sources or ()]}


def weighted_sources(sources: Iterable[WeightedSource | Mapping[str, Any]]) -> list[WeightedSource]:
    """Sources as a user gives them, checked.

    Raises:
        ValueError: One is no path with a weight; the message names it.
    """
    if isinstance(sources, str | Mapping) or not sources:
        raise ValueError(f"sources must be a list of at least one path with a weight, got {quoted(sources)}")
    checked = []
    for number, given in enumerate(sources):
        try:
            checked.append(given if isinstance(given, WeightedSource) else WeightedSource(**given))
        except TypeError:
            known = ", ".join(field.name for field in fields(WeightedSource))
            raise ValueError(f"sources[{number}] must be a mapping of {known}, got {quoted(given)}") from None
        except ValueError as error:
            raise ValueError(f"sources[{number}].{error}") from None
    return checked


def prepare_command(settings: DataOptions, output_dir: Path, tokenizer: str, *, overwrite: bool = True) -> str:
    """The command line that prepares `output_dir` anew with these settings, as the user would type it."""
    words = ["lighthouse", "prepare", "--output_dir", str(output_dir)]
    for option in fields(DataOptions):
        value = tokenizer if option.name == "tokenizer" else getattr(settings, option.name)
        if option.name == "sources" and settings.sources:
            words += ["--sources", *(f"{source.path}={source.weight}" for source in settings.sources)]
        # a preparation has no default length
        elif option.name == "seq_len" or (option.name in RECORDED and value != option.default):
            words += [f"--{option.name}", str(value)]
    return shlex.join([*words, "--overwrite"] if overwrite else words)
