"""Train a byte-level BPE tokenizer on your text, for recipes/own-tokenizer.yaml.

    python examples/train_tokenizer.py OUT.json [TEXT] [--vocab_size 4096]

TEXT is what `data.source` takes: a file, a folder or a pattern; without it, Python's own source code. Needs
`pip install 'lightning_lighthouse[formats]'`.
"""

from __future__ import annotations

import argparse

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from lightning_lighthouse.data.preparing.sources import find_files, read_documents

END_OF_DOCUMENT = "<|endoftext|>"


def main(arguments: list[str] | None = None) -> None:
    """Train and save it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("text", nargs="?")
    parser.add_argument("--text_field", default="text")
    parser.add_argument("--vocab_size", type=int, default=4096)
    told = parser.parse_args(arguments)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=told.vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        # every byte is a token, so that no text is unknown
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    documents = read_documents(find_files(told.text), told.text_field)
    tokenizer.train_from_iterator((document.text.decode("utf-8", "replace") for document in documents), trainer)
    tokenizer.save(told.out)
    print(f"{told.out}: {tokenizer.get_vocab_size():,} tokens")


if __name__ == "__main__":
    main()
