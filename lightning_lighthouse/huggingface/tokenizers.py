"""Tokenizers of transformers as the data's are; and whether data were made with the tokenizer of a model."""

from __future__ import annotations

from typing import Any

from lightning_lighthouse.checks import SettingError, quoted
from lightning_lighthouse.data.tokenizers import FileTokenizer, identify_tokenizer, load_tokenizer
from lightning_lighthouse.huggingface.reading import read_tokenizer

# Words, numbers, code, spaces and other scripts: two tokenizers that cut all of it alike are one
SAMPLE = "The 1,024th light-house isn't dark:\n\tdef f(x): return x**2  # naïve façade, 灯台, маяк, 🗼\r\n" * 2


class PretrainedTokenizer:
    """A tokenizer of transformers, as the data's tokenizers are: bytes to ids, one id behind them.

    Args:
        tokenizer: From `AutoTokenizer`.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    @property
    def vocabulary(self) -> dict[str, int]:
        """Every token and its id."""
        known: dict[str, int] = self._tokenizer.get_vocab()
        return known

    def encode(self, text: bytes) -> list[int]:
        """Ids of one document, without a begin and with an end."""
        # the length that a model allows is no limit of a text
        ids = self._tokenizer(text.decode(), add_special_tokens=False, verbose=False)["input_ids"]
        end = self._tokenizer.eos_token_id
        return [*ids, 0 if end is None else end]


def check_tokenizer(tokenizer: str, model: str, end_of_document: str | None = None) -> None:
    """Refuse data whose tokens are another model's, as far as this model has a tokenizer to compare.

    Args:
        tokenizer: That of the data: "bytes", a `tokenizer.json`, or a folder of transformers.
        model: A folder, a name or a `.gguf` file.
        end_of_document: What the data were told of it.

    Raises:
        SettingError: It is another one.
    """
    if _is_same_file(tokenizer, model):
        return
    try:
        own = read_tokenizer(model)
    except SettingError:
        # some folders lack what their tokenizer needs: weights alone say nothing of it
        return
    if own is None:
        return
    theirs, ours = load_tokenizer(tokenizer, end_of_document), PretrainedTokenizer(own)
    # what transformers adds to a file's tokens occurs in no text
    is_known = not isinstance(theirs, FileTokenizer) or theirs.vocabulary.items() <= ours.vocabulary.items()
    sample = SAMPLE.encode()
    # the id that ends a document is the data's business
    if not is_known or list(theirs.encode(sample))[:-1] != ours.encode(sample)[:-1]:
        raise SettingError(
            f"tokenizer must be that of the model, got {quoted(tokenizer)}, which makes other tokens than "
            f"{quoted(model)}: set data.tokenizer to the model's folder; lighthouse export MODEL FOLDER makes one of a "
            "name or a .gguf file"
        )


def _is_same_file(tokenizer: str, model: str) -> bool:
    """Whether the model's folder holds the very file."""
    try:
        return identify_tokenizer(tokenizer) == identify_tokenizer(model)
    except (OSError, ValueError):
        return False
