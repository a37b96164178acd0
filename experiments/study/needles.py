"""Write training texts with a passkey in each, as JSONL, so that small models may learn to find what they can reach.

    python experiments/study/needles.py books-train.jsonl.gz needles.jsonl

A text is a piece of a book with one sentence in it that names a digit, and a question for it with the answer at its
end, in the words that `LongContextEvaluation` uses. Lengths are drawn evenly on a logarithmic scale, places evenly.

A text is 70,000 characters long on average, so a sequence of 65,536 tokens holds some four: of a training of 140 such
sequences a share of 0.01 is one or two, with five answers in all. Preparation ends where one of its sources runs out:
write that share of all characters, at the share of 0.1 and 106 MB of books 12 million. What is longer than a sequence,
98,304 characters where tokens are bytes, is cut from its needle; so is one text in eight of those that fit.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from pathlib import Path

from lightning_lighthouse.data.preparing.sources import find_files, read_documents
from lightning_lighthouse.evaluation.passkey import NEEDLE, QUESTION


def needle(text: str, place: float, digit: int) -> str:
    """The text with the digit in it at `place`, a share of it, and the question and answer behind it."""
    before = round(place * len(text))
    return text[:before] + NEEDLE.format(digit=digit) + text[before:] + f"{QUESTION} {digit}\n"


def main() -> int:
    """Write, and say how much."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("source", help="texts, with a field text")
    add("output", type=Path, help="JSONL")
    add("--characters", type=int, default=12_000_000, help="of all texts (default: %(default)s)")
    add("--shortest", type=int, default=8_000, help="characters of a text (default: %(default)s)")
    add("--longest", type=int, default=250_000, help="characters of a text (default: %(default)s)")
    arguments = parser.parse_args()
    drawn = random.Random(0)
    books = [document.text.decode() for document in read_documents(find_files(arguments.source), "text")]
    lines, characters = [], 0
    while characters < arguments.characters:
        book = drawn.choice(books)
        length = round(math.exp(drawn.uniform(math.log(arguments.shortest), math.log(arguments.longest))))
        start = drawn.randrange(max(1, len(book) - length))
        text = needle(book[start : start + length], drawn.random(), drawn.randrange(10))
        lines.append(json.dumps({"text": text}))
        characters += len(text)
    arguments.output.write_text("\n".join(lines) + "\n")
    print(f"{arguments.output}: {len(lines)} texts, {characters:,} characters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
