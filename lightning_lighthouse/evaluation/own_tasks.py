"""Tasks of the user's own: JSON lines of a prompt and its answer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lightning_lighthouse.checks import SettingError, shown
from lightning_lighthouse.evaluation.measures import Material, Place, Unit, Values
from lightning_lighthouse.evaluation.samples import Phrases
from lightning_lighthouse.evaluation.scoring import Scorer

NAME = "own_tasks"


def read_task(path: str | Path) -> list[tuple[str, str]]:
    """The prompts and answers of a file, one JSON object a line: {"prompt": "...", "answer": "..."}.

    Raises:
        SettingError: It cannot be read, or a line is none of these; the message names file and line.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(f"own_tasks: {path} cannot be read: {error}") from None
    pairs = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise SettingError(f"own_tasks: {path}, line {number} is not JSON: {error}") from None
        prompt, answer = (record.get(key) if isinstance(record, dict) else None for key in ("prompt", "answer"))
        if not (isinstance(prompt, str) and prompt and isinstance(answer, str) and answer):
            raise SettingError(
                f'own_tasks: {path}, line {number} must hold "prompt" and "answer", both text, got {shown(line)}'
            )
        pairs.append((prompt, answer))
    if not pairs:
        raise SettingError(f"own_tasks: {path} holds no prompt")
    return pairs


def units(paths: Sequence[str | Path], phrases: Phrases) -> list[Unit]:
    """One unit a file; its samples are its lines, all of them, one sequence each.

    A row: the mean loss of the answer, in nats per token, of the `task`, the file's name; `exact_match` is the share of
    answers that the model would have given word for word, each token the likeliest, where the module gives logits.
    """
    found = []
    for path in paths:
        samples = [_tokens(phrases, prompt, answer) for prompt, answer in read_task(path)]
        longest = max(len(prompt) + len(answer) for prompt, answer in samples)
        run = partial(_run, Path(path).name, samples)
        found.append(Unit(NAME, longest, longest, run, max_samples=len(samples)))
    return found


def _tokens(phrases: Phrases, prompt: str, answer: str) -> tuple[Tensor, Tensor]:
    """The prompt and the answer in tokens, each at least one; a space that ends the prompt is the answer's business."""
    whole, start = phrases.encode(prompt + answer), phrases.encode(prompt)
    if len(whole) < 2:
        raise SettingError(f"own_tasks: {shown(prompt)} and {shown(answer)} are one token; give a longer prompt")
    same = min(len(start), len(whole) - 1)
    while same > 1 and not torch.equal(whole[:same], start[:same]):
        same -= 1
    return whole[:same], whole[same:]


def _run(
    name: str, samples: Sequence[tuple[Tensor, Tensor]], scorer: Scorer, material: Material, index: int
) -> Iterator[tuple[Place, Values]]:
    prompt, answer = samples[index]
    tokens = torch.cat([prompt, answer])[None]
    found = scorer.predict(tokens[:, :-1], tokens[:, 1:])
    values = {"value": found.losses[0, -len(answer) :].double().mean().item()}
    if found.is_first is not None:
        values["exact_match"] = float(found.is_first[0, -len(answer) :].all())
    yield {"task": name, "reach": max(len(one) + len(other) for one, other in samples)}, values
