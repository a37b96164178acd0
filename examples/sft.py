"""Fine-tune on long conversations with TRL's SFTTrainer: packed, and attention stays inside each of them.

    pip install 'lightning_lighthouse[hf]' trl
    python examples/sft.py MODEL chats.jsonl --length 32768 --output tuned
    python examples/sft.py MODEL chats.jsonl --length 32768 --output tuned --resume

MODEL is a folder of transformers, or a name that it can load, and reaches --length tokens. Each line of chats.jsonl is
what TRL takes: {"messages": [...]}, {"prompt": ..., "completion": ...} or {"text": ...}. TRL packs several of them into
a row; `documents=True` keeps attention inside each, in every phase. The last line goes on from the last checkpoint in
tuned/. What remains, tuned/final, is an ordinary model.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from lightning_lighthouse import LighthouseConfig, LighthouseTrainerCallback

# Three layers see 512 tokens and the first four, on which pretrained models rest; the fourth one sees all, compressed.
# Windows run once for each conversation: where many short ones share a row, "dense" is faster in their place
LAYERS = {"layer_types": ["window", "window", "window", "lighthouse"], "window": 512, "sink_tokens": 4}
# A model that was trained dense is thrown off by the sum of several levels
ATTENTION = LighthouseConfig(combine="mean")


def main(argv: Sequence[str] | None = None) -> None:
    """Train, or go on with a training."""
    asked = parse(argv)
    logging.basicConfig(level=logging.WARNING)
    tokenizer = AutoTokenizer.from_pretrained(asked.model)
    if tokenizer.pad_token is None:
        # packed rows are never padded, and TRL wants one all the same
        tokenizer.pad_token = tokenizer.eos_token
    lines = Path(asked.texts).read_text(encoding="utf-8").splitlines()
    on_gpu = torch.cuda.is_available()
    arguments = SFTConfig(
        output_dir=asked.output,
        max_steps=asked.steps,
        per_device_train_batch_size=1,
        max_length=asked.length,
        # best fit: no conversation is cut that fits into a row, and batches say where each begins
        packing=True,
        packing_strategy="bfd",
        learning_rate=asked.learning_rate,
        warmup_steps=asked.warmup_steps,
        lr_scheduler_type="constant_with_warmup",
        save_steps=asked.save_steps,
        bf16=on_gpu,
        use_cpu=not on_gpu,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        report_to=[],
    )
    # used with `with`, the callback restores the model after an error too
    with LighthouseTrainerCallback(asked.switch_at, ATTENTION, documents=True, **LAYERS) as callback:
        trainer = SFTTrainer(
            # "sdpa" is what can be routed
            AutoModelForCausalLM.from_pretrained(asked.model, attn_implementation="sdpa", dtype=torch.float32),
            arguments,
            train_dataset=Dataset.from_list([json.loads(line) for line in lines]),
            processing_class=tokenizer,
            callbacks=[callback],
        )
        trainer.train(resume_from_checkpoint=asked.resume)
    trainer.save_model(str(Path(asked.output) / "final"))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="folder of transformers, or a name that it can load")
    parser.add_argument("texts", help="JSON lines of conversations or texts")
    parser.add_argument("--output", required=True, help="folder for checkpoints and the final model")
    parser.add_argument("--length", type=int, default=32768, help="tokens of a row")
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps")
    parser.add_argument("--switch_at", type=float, default=0.75, help="share of the steps before dense attention")
    parser.add_argument("--learning_rate", type=float, default=1e-5)
    parser.add_argument("--warmup_steps", type=int, default=20)
    parser.add_argument("--save_steps", type=int, default=100, help="steps from one checkpoint to the next")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
