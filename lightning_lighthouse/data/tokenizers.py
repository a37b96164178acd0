"""Text to token ids: bytes by default, or any `tokenizer.json`.

A tokenizer turns one document, UTF-8 bytes, into its ids with one end-of-document id behind them. That id occurs
nowhere else, so the boundaries of documents can be read back from the packed tokens.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lightning_lighthouse.checks import quoted, shown
from lightning_lighthouse.data.settings import BYTES

# What transformers calls its files in a folder
FILE, SETTINGS = "tokenizer.json", "tokenizer_config.json"
# What the common tokenizers call the end of a document, tried in this order; the report says which id was taken
END_OF_DOCUMENT_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[EOS]", "[SEP]")


class Tokenizer(Protocol):
    """What preparation needs of a tokenizer."""

    vocab_size: int
    end_of_document: int

    def encode(self, text: bytes) -> np.ndarray:
        """Ids of one document, `end_of_document` last, in `token_dtype(vocab_size)`."""


class ByteTokenizer:
    """Each byte is a token; id 256 ends a document."""

    vocab_size = 257
    end_of_document = 256

    def encode(self, text: bytes) -> np.ndarray:
        """Ids of one document, 256 last: `[len(text) + 1]` uint16."""
        tokens = np.empty(len(text) + 1, dtype=np.uint16)
        tokens[:-1] = np.frombuffer(text, dtype=np.uint8)
        tokens[-1] = self.end_of_document
        return tokens


class FileTokenizer:
    """A `tokenizer.json`, read by the `tokenizers` package.

    Args:
        path: The file.
        end_of_document: The token that ends a document; None: the first of the usual names among the file's special
            tokens.

    Raises:
        ModuleNotFoundError: The `tokenizers` package is absent.
        ValueError: The file is no tokenizer, or has no such token.
    """

    def __init__(self, path: str, end_of_document: str | None = None) -> None:
        try:
            from tokenizers import Tokenizer as Backend
        except ModuleNotFoundError:
            raise ModuleNotFoundError(
                f"tokenizer {path} needs the tokenizers package: pip install tokenizers"
            ) from None
        try:
            self._backend: Any = Backend.from_str(_read(path).decode())
        # the package raises plain Exception for a file that it cannot parse
        except Exception as error:
            if isinstance(error, OSError):
                raise
            raise ValueError(f"tokenizer {path} is no tokenizer.json: {error}") from None
        self._origin = (path, end_of_document)
        # a document's text is never read as a control token, and never cut or filled
        self._backend.encode_special_tokens = True
        self._backend.no_truncation()
        self._backend.no_padding()
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        added = self._backend.get_added_tokens_decoder().values()
        special = [token.content for token in added if token.special]
        # every token, special ones too, and its id
        self.vocabulary: dict[str, int] = vocabulary
        self.vocab_size = max(vocabulary.values()) + 1
        self.end_of_document = vocabulary[_end_of_document(path, vocabulary, special, end_of_document)]
        self._dtype = token_dtype(self.vocab_size)

    def __reduce__(self) -> tuple[Any, ...]:
        # another process loads the file anew: the package's own pickles forget encode_special_tokens
        return FileTokenizer, self._origin

    def encode(self, text: bytes) -> np.ndarray:
        """Ids of one document, `end_of_document` last: `[tokens + 1]` uint16 or uint32."""
        # the batch call is the one that leaves out character offsets, which costs half as much again
        ids = self._backend.encode_batch_fast([text.decode()], add_special_tokens=False)[0].ids
        tokens = np.array([*ids, self.end_of_document], dtype=self._dtype)
        if (tokens[:-1] == self.end_of_document).any():
            name = self._backend.id_to_token(self.end_of_document)
            raise ValueError(f"the text itself contains the end-of-document token {quoted(name)}; choose another one")
        return tokens


def load_tokenizer(tokenizer: str, end_of_document: str | None = None) -> Tokenizer:
    """The tokenizer of that name: "bytes", the path of a `tokenizer.json`, or of a folder that transformers saved."""
    if tokenizer == BYTES:
        if end_of_document is not None:
            raise ValueError(f"end_of_document must be None for byte tokens, got {quoted(end_of_document)}")
        return ByteTokenizer()
    return FileTokenizer(_file(tokenizer), end_of_document or _end_of_sequence(tokenizer))


def identify_tokenizer(tokenizer: str) -> str:
    """A name that changes with the tokenizer's content and not with its path: "bytes", or the hash of the file.

    A folder's differs from that of the file in it where the folder names the end of a document.
    """
    if tokenizer == BYTES:
        return BYTES
    content = _read(_file(tokenizer))
    if end := _end_of_sequence(tokenizer):
        content += b"\0" + end.encode()
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def token_dtype(vocab_size: int) -> type[np.unsignedinteger]:
    """The narrowest type that litdata stores and that holds every id."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def _file(tokenizer: str) -> str:
    return str(Path(tokenizer) / FILE) if Path(tokenizer).is_dir() else tokenizer


def _end_of_sequence(tokenizer: str) -> str | None:
    """What the folder of a transformers tokenizer says ends a text; None for a file, or where it does not say.

    Raises:
        ValueError: Its record is damaged.
    """
    record = Path(tokenizer) / SETTINGS
    if not record.is_file():
        return None
    try:
        token = json.loads(record.read_bytes()).get("eos_token")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{record} is cut short or altered: {shown(str(error))}") from None
    name = token.get("content") if isinstance(token, dict) else token
    return name if isinstance(name, str) else None


def _read(path: str) -> bytes:
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"tokenizer must be {BYTES!r} or the path of a tokenizer.json, got {quoted(path)}: no such file, nor a "
            "folder that holds one"
        )
    return Path(path).read_bytes()


def _end_of_document(path: str, vocabulary: dict[str, int], special: list[str], asked: str | None) -> str:
    if asked is not None:
        if asked not in vocabulary:
            raise ValueError(f"end_of_document must be a token of {path}, got {quoted(asked)}")
        return asked
    # a tag of the text may have such a name too: what is special says the file
    for name in END_OF_DOCUMENT_NAMES:
        if name in special:
            return name
    ordinary = [name for name in END_OF_DOCUMENT_NAMES if name in vocabulary]
    but = f" ({', '.join(ordinary)} is an ordinary token there)" if ordinary else ""
    raise ValueError(
        f"tokenizer {path} has none of {', '.join(END_OF_DOCUMENT_NAMES)} among its special tokens{but}: set "
        "end_of_document to the token that ends a document"
    )
