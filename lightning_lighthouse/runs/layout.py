"""The names of what a run logs, and TensorBoard's custom layout over them: one for each run."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from lightning_lighthouse.runs.metric_name import metric_names

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

LOSS = "train/loss"
GRAD_NORM = "train/grad_norm"
LEARNING_RATE = "optim/lr"
TOKENS_PER_SECOND = "perf/tokens_per_second"
STEP_SECONDS = "perf/step_seconds"
MFU = "perf/mfu"
MFU_DENSE_EQUIVALENT = "perf/mfu_dense_equivalent"
# of each device
TFLOPS = "perf/tflops"
MEMORY = "perf/memory_gib"
DATA_WAIT = "perf/data_wait_share"
# TensorBoard sorts groups by name: none of ours comes before those that everyone looks at
SCORE_SPREAD = "selection/score_spread"
ROUTED_SHARE = "selection/routed_share"
# with the number of the level behind it
ENTRIES = "selection/entries_level_"
WINDOW = "selection/window"
TOP_K = "selection/top_k"
# Lightning logs `epoch` beside whatever a module logs, and TensorBoard would show it first
EPOCH, EPOCH_AT_THE_END = "epoch", "trainer/epoch"
# what the HPARAMS tab needs of a run: a second validation loss, behind all other groups
ROW = "val_hparams"
EVALUATION = "evaluation"

Charts = dict[str, list[Any]]


def layout(trainer: Trainer, validation_metric: str, *, knows_peak: bool) -> dict[str, Charts]:
    """The tab *Custom Scalars* of a run with LighthouseCallback: category, chart, what it shows.

    Args:
        trainer: Its callbacks say whether long context is evaluated.
        validation_metric: Name of the validation loss.
        knows_peak: Whether the device has a known peak, and so an MFU.
    """
    losses = [LOSS, *metric_names(validation_metric)]
    training = {
        "loss: training by phase, dense validation": losses,
        "learning rate": [LEARNING_RATE],
        "gradient norm, before clipping": [GRAD_NORM],
        "tokens per second": [TOKENS_PER_SECOND],
        **({"MFU": [MFU, MFU_DENSE_EQUIVALENT]} if knows_peak else {"TFLOP/s of a device": [TFLOPS]}),
        "seconds of a step": [STEP_SECONDS],
        "memory, GiB": [MEMORY],
        "share of the time waiting for data": [DATA_WAIT],
    }
    lighthouse = {
        "share of the attention that is not dense": [ROUTED_SHARE],
        "spread of the scores": [SCORE_SPREAD],
        "entries attended to, by level": [f"{ENTRIES}.*"],
        "window, tokens": [WINDOW],
        "winners of a level, k": [TOP_K],
    }
    whole = {"Training": _charts(training), "Lighthouse": _charts(lighthouse)}
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    if any(callback.state_key == "LongContextEvaluation" for callback in callbacks):
        whole |= long_context_layout()
    return whole


def long_context_layout() -> dict[str, Charts]:
    """The category of LongContextEvaluation, which a run may have alone."""
    shown = {
        "loss by position": [f"{EVALUATION}/loss_by_position/.*"],
        "copies": [f"{EVALUATION}/copies/.*"],
        "gain from context": [f"{EVALUATION}/context_gain/.*"],
        "passkey": [f"{EVALUATION}/passkey/.*"],
        "lookups": [f"{EVALUATION}/lookups/.*"],
    }
    return {"Long context": _charts(shown)}


def _charts(shown: dict[str, list[str]]) -> Charts:
    return {title: ["Multiline", [_whole(tag) for tag in tags]] for title, tags in shown.items()}


def _whole(tag: str) -> str:
    """A pattern for TensorBoard, which else takes each tag that begins so."""
    return tag if tag.endswith(".*") else f"{re.escape(tag)}$"
