"""Ask a trained model, by what `lighthouse generate` does, for a number that was hidden in a long text.

    python experiments/ask_number.py smollm2-64k books-val.jsonl.gz --lengths 2000 8000 16000 32700

The text is the longest one of the source, cut to about so many tokens; a sentence in it names the number, and the
prompt ends with a question for it. The model writes what it finds likeliest. A line tells what it wrote, and counts if
the number is in it; `--prompts` keeps the prompts as files for `lighthouse generate --prompt_file`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_lighthouse.data.preparing.sources import find_files, read_documents
from lightning_lighthouse.huggingface.generation import go_on
from lightning_lighthouse.huggingface.trained import load_trained

NEEDLE = "\nThe special magic number is {number}. Remember that the special magic number is {number}.\n"
QUESTION = "\nQuestion: what is the special magic number? Answer: the special magic number is"
NUMBERS = ("71432", "30958", "52617")
# characters of a token, to begin with
GUESS = 4
# of the length that was asked for
NEAR = 0.005


def prompt_of(text: str, length: int, depth: float, number: str, tokenizer: Any) -> tuple[str, int]:
    """A prompt, and its tokens.

    Args:
        text: To hide the number in.
        length: Tokens of the prompt, about.
        depth: Where the number is, as a share of the text.
        number: To hide.
        tokenizer: Of transformers.

    Raises:
        ValueError: The text is too short.
    """
    characters = GUESS * length
    for _ in range(10):
        if characters > len(text):
            raise ValueError(f"the longest text must have {characters:,} characters for {length:,} tokens")
        # at the end of a word
        place = text.find(" ", int(depth * characters))
        hidden = NEEDLE.format(number=number)
        prompt = text[:place] + hidden + text[place:characters] + QUESTION
        found = len(tokenizer(prompt)["input_ids"])
        if abs(found - length) <= NEAR * length:
            break
        characters = int(characters * length / found)
    return prompt, found


def main(argv: Sequence[str] | None = None) -> int:
    """Ask, and say what came."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("trained", type=Path, help="what lighthouse generate takes")
    add("source", help="texts, with a field text")
    add("--lengths", type=int, nargs="+", default=[2_000, 8_000], help="tokens of prompts (default: %(default)s)")
    add("--depths", type=float, nargs="+", default=[0.1, 0.5, 0.9], help="where numbers are (default: %(default)s)")
    add("--max_new_tokens", type=int, default=8, help="to write (default: %(default)s)")
    add("--prompts", type=Path, help="folder for the prompts")
    asked = parser.parse_args(argv)
    trained = load_trained(asked.trained)
    text = max((document.text.decode() for document in read_documents(find_files(asked.source), "text")), key=len)
    for length in asked.lengths:
        right = 0
        for place, depth in enumerate(asked.depths):
            number = NUMBERS[place % len(NUMBERS)]
            prompt, tokens = prompt_of(text, length, depth, number, trained.tokenizer)
            if asked.prompts is not None:
                asked.prompts.mkdir(parents=True, exist_ok=True)
                (asked.prompts / f"{length}-{depth:g}.txt").write_text(prompt)
            started = time.perf_counter()
            written = go_on(trained, prompt, asked.max_new_tokens)
            seconds = time.perf_counter() - started
            right += number in written
            print(f"{tokens:,} tokens, {number} at {depth:g}: {written!r}, {seconds:.1f} s", flush=True)
        print(f"{length:,}: {right} of {len(asked.depths)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
