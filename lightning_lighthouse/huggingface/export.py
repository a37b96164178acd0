"""A trained model as a folder that transformers loads without this package; whole, or not there."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from lightning_lighthouse.bars import progress_bar
from lightning_lighthouse.checks import shown
from lightning_lighthouse.huggingface.rope import reach_of
from lightning_lighthouse.huggingface.trained import Trained

SHARD = "5GB"
# of a generation config, where sampling is asked for
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p")
# beside the weights there are a config, a tokenizer, and what the file system wants
MARGIN = 50 * 2**20
# from one look at what is written to the next
LOOK_SECONDS = 0.2


def export(trained: Trained, out: Path, dtype: torch.dtype | None = None) -> Path:
    """Write the folder: safetensors of at most 5 GB each, config, generation config, tokenizer, and a README.

    Args:
        trained: From `load_trained`.
        out: Must not exist, or be empty.
        dtype: Of the weights; None: as they are.

    Returns:
        `out`.

    Raises:
        FileExistsError: There is something.
        OSError: The disk has no room for it; nothing was written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not empty: choose another folder, or remove it")
    model = trained.model if dtype is None else trained.model.to(dtype)
    # for those who generate with it
    model.config.use_cache = True
    _settle_sampling(model.generation_config)
    model.config.dtype = model.dtype
    out.parent.mkdir(parents=True, exist_ok=True)
    needed = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()) + MARGIN
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        raise OSError(f"{out} needs {needed / 2**30:.2f} GiB, and the disk has {free / 2**30:.2f} GiB left")
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        with progress_bar(f"Exporting to {out}", needed - MARGIN) as bar, _growth(partial, bar.update):
            model.save_pretrained(partial, max_shard_size=SHARD)
        if trained.tokenizer is not None:
            trained.tokenizer.save_pretrained(partial)
        (partial / "README.md").write_text(readme(trained))
        # safetensors writes files that nobody else may read
        mode = (partial / "README.md").stat().st_mode
        for file in partial.iterdir():
            file.chmod(mode)
        if out.exists():
            out.rmdir()
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def _settle_sampling(settings: Any) -> None:
    """Let a generation config sample, or not: many models have settings of sampling that transformers will not save."""
    given = [name for name in SAMPLING if getattr(settings, name, None) is not None]
    for name in given if settings.do_sample is False else []:
        setattr(settings, name, None)
    if given and settings.do_sample is None:
        settings.do_sample = True


@contextmanager
def _growth(folder: Path, grown: Callable[[int], object]) -> Iterator[None]:
    """Tell, while something writes to a folder, and once more at its end, how many bytes it has grown by."""
    is_written = threading.Event()
    known = 0

    def look() -> None:
        nonlocal known
        # what is there now may be renamed before it is asked for its size
        sizes = [os.path.getsize(path) for path in folder.glob("*") if path.exists()]
        grown(max(0, sum(sizes) - known))
        known = max(known, sum(sizes))

    def watch() -> None:
        while not is_written.wait(LOOK_SECONDS):
            with suppress(OSError):
                look()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        is_written.set()
        watcher.join()
    look()


def readme(trained: Trained) -> str:
    """What the folder is, how it was made, and how to load it."""
    config = trained.model.config.get_text_config()
    number = sum(parameter.numel() for parameter in trained.model.parameters())
    lines = [
        f"# {type(trained.model).__name__}, {number / 1e6:,.1f}M parameters",
        "",
        "An ordinary model of transformers 5, with dense attention:",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")',
        *(['tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")'] if trained.tokenizer is not None else []),
        "```",
        "",
        f"- positions: {reach_of(config) or 'unknown'}",
        f"- rope_parameters: `{getattr(config, 'rope_parameters', None)}`",
        f"- weights from: `{trained.weights.name}`",
        *_training(trained.recipe, trained.report),
    ]
    return "\n".join(lines) + "\n"


def _training(recipe: dict[str, Any], report: dict[str, Any]) -> list[str]:
    lines = []
    if base := ((recipe.get("model") or {}).get("init_args") or {}).get("model"):
        lines.append(f"- trained on from: `{shown(str(base))}`")
    data = (recipe.get("data") or {}).get("init_args") or {}
    if "seq_len" in data:
        lines.append(f"- sequences of {data['seq_len']:,} tokens")
    for name, totals in (report.get("phases") or {}).items():
        if totals.get("steps"):
            lines.append(f"- phase {name}: {totals['steps']:,} steps, {totals['tokens']:,} tokens")
    final = report.get("final")
    if final:
        lines.append(f"- dense validation loss at step {final['step']}: {final['loss']:.4f} nats a token")
    return lines and ["", "Trained with lightning_lighthouse:", "", *lines]
