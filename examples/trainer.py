"""Extend a pretrained model with transformers' own Trainer: chunks of its own length first, dense attention at the end.

    pip install 'lightning_lighthouse[hf]' accelerate
    python examples/trainer.py MODEL books.jsonl --length 65536 --rope_theta 3000000 --output extended
    python examples/trainer.py MODEL books.jsonl --length 65536 --rope_theta 3000000 --output extended --resume

MODEL is a folder of transformers, or a name that it can load; books.jsonl has a text in the field "text" of each line.
The last line goes on from the last checkpoint in extended/. What remains, extended/final, is an ordinary model.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from lightning_lighthouse import LighthouseTrainerCallback


def main(argv: Sequence[str] | None = None) -> None:
    """Train, or go on with a training."""
    asked = parse(argv)
    tokenizer = AutoTokenizer.from_pretrained(asked.model)
    # each layer goes on with what it can do: to see as many tokens as the model was made for
    chunks = {"layer_types": ["chunk"], "window": AutoConfig.from_pretrained(asked.model).max_position_embeddings}
    on_gpu = torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=asked.output,
        max_steps=asked.steps,
        per_device_train_batch_size=1,
        learning_rate=asked.learning_rate,
        warmup_steps=asked.warmup_steps,
        lr_scheduler_type="constant_with_warmup",
        save_steps=asked.save_steps,
        logging_steps=10,
        bf16=on_gpu,
        use_cpu=not on_gpu,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        report_to=[],
    )
    # used with `with`, the callback restores the model after an error too
    with LighthouseTrainerCallback(switch_at=asked.switch_at, **chunks) as callback:
        trainer = Trainer(
            load_model(asked.model, asked.length, asked.rope_theta),
            arguments,
            train_dataset=read_rows(asked.texts, tokenizer, asked.length),
            # rows are equally long: nothing is padded, and no mask keeps attention from being routed
            data_collator=default_data_collator,
            processing_class=tokenizer,
            callbacks=[callback],
        )
        trainer.train(resume_from_checkpoint=asked.resume)
    trainer.save_model(str(Path(asked.output) / "final"))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="folder of transformers, or a name that it can load")
    parser.add_argument("texts", help='JSON lines with a field "text"')
    parser.add_argument("--output", required=True, help="folder for checkpoints and the final model")
    parser.add_argument("--length", type=int, default=65536, help="tokens of a sequence")
    parser.add_argument("--rope_theta", type=float, help="base of the rotary frequencies (default: the model's)")
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps")
    parser.add_argument("--switch_at", type=float, default=0.75, help="share of the steps before dense attention")
    parser.add_argument("--learning_rate", type=float, default=2e-5)
    parser.add_argument("--warmup_steps", type=int, default=20)
    parser.add_argument("--save_steps", type=int, default=100, help="steps from one checkpoint to the next")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output")
    return parser.parse_args(argv)


def load_model(name: str, length: int, rope_theta: float | None) -> Any:
    """The model, whose positions reach `length` tokens."""
    config = AutoConfig.from_pretrained(name)
    if rope_theta is not None:
        config.rope_parameters["rope_theta"] = rope_theta
    config.max_position_embeddings = max(length, config.max_position_embeddings)
    # "sdpa" is what can be routed
    return AutoModelForCausalLM.from_pretrained(name, config=config, attn_implementation="sdpa", dtype=torch.float32)


def read_rows(path: str, tokenizer: Any, length: int) -> list[dict[str, torch.Tensor]]:
    """All texts in one stream, cut into rows of `length` tokens."""
    ids: list[int] = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        # the length that a model allows is no limit of a text
        ids += tokenizer(json.loads(line)["text"], add_special_tokens=False, verbose=False)["input_ids"]
        ids.append(tokenizer.eos_token_id)
    rows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    return [{"input_ids": row, "labels": row} for row in rows]


if __name__ == "__main__":
    main()
