"""Where a run stands in its data, and what a run that is resumed under other conditions makes of it.

| what differs from the checkpoint | what happens |
|---|---|
| the data, the tokenizer, `seq_len`: the fingerprint | refused: the sequences would be others |
| `seed` | refused: the order would be another |
| ranks, workers or `batch_size` | a warning; the rest of the epoch is shared out anew, none of it twice |
| the folder's path | nothing: the fingerprint says that it is the same |

The recipe asks `check_same_data` and `warn_of_topology`; the loader hands on litdata's position by `move_position`.
What Lightning itself counts wrongly is mended in `runs/resume.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning_lighthouse.checks import warn
from lightning_lighthouse.data.manifest import Manifest


@dataclass(frozen=True)
class Topology:
    """Among whom the sequences of an epoch are shared out.

    Args:
        ranks: Groups of processes that read different sequences: all processes, unless several share a model.
        num_workers: Processes that read for one rank; the rank's own counts as one.
        batch_size: Sequences of a batch, on each rank.
    """

    ranks: int
    num_workers: int
    batch_size: int

    @property
    def stride(self) -> int:
        """Sequences of a batch of all ranks."""
        return self.ranks * self.batch_size

    def changes(self, old: Mapping[str, int]) -> list[str]:
        """What differs from `old`, "ranks 1 -> 2"."""
        return [f"{name} {old[name]} -> {new}" for name, new in asdict(self).items() if old[name] != new]


def describe_data(manifest: Manifest, seed: int, topology: Topology) -> dict[str, Any]:
    """What decides the batches, for a checkpoint."""
    return {
        "fingerprint": manifest.fingerprint,
        "seq_len": manifest.settings.seq_len,
        "tokenizer": manifest.settings.tokenizer,
        "seed": seed,
        "topology": asdict(topology),
    }


def check_same_data(saved: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    """Raise ValueError where `now` has other data, or another order of it, than the checkpoint.

    Args:
        saved: From `describe_data`, when the checkpoint was written.
        now: The same, now.
        folder: The prepared data.
    """
    if saved["fingerprint"] != now["fingerprint"]:
        raise ValueError(
            f"{folder} is not the data of the checkpoint: fingerprint {now['fingerprint']} (seq_len {now['seq_len']}, "
            f"tokenizer {now['tokenizer']}), the checkpoint has {saved['fingerprint']} (seq_len {saved['seq_len']}, "
            f"tokenizer {saved['tokenizer']}); point the recipe to the data that the run began with, or start a new run"
        )
    if saved["seed"] != now["seed"]:
        raise ValueError(
            f"seed is {now['seed']}, the checkpoint was written with {saved['seed']}: the order of the data would "
            f"change; set seed to {saved['seed']}, or start a new run"
        )


def warn_of_topology(saved: Mapping[str, int], topology: Topology) -> None:
    """Say what becomes of the batches where the sequences are shared out among others than before."""
    changed = topology.changes(saved)
    if not changed:
        return
    if Topology(**saved).stride == topology.stride:
        skipped = f"at most {topology.num_workers - 1} global batches are left out at its end"
    else:
        skipped = (
            f"but the global batch is {topology.stride} sequences, no longer {Topology(**saved).stride}: what does not "
            "fill one is left out where the run goes on"
        )
    warn(
        f"resumed with {', '.join(changed)}: the batches are not those of an unbroken run; no sequence of this epoch "
        f"comes twice, {skipped}"
    )


def move_position(position: Mapping[str, Any], topology: Topology, path: str) -> dict[str, Any]:
    """litdata's position within an epoch, for other ranks, workers and another folder.

    Args:
        position: The state of litdata's data set.
        topology: Who goes on from there.
        path: Where the data lies now.
    """
    moved = {**position, "input_dir_path": path}
    # under other ranks litdata rounds the position down to a global batch, which would repeat sequences
    moved["sample_in_epoch"] = -(-moved["sample_in_epoch"] // topology.stride) * topology.stride
    old = {"ranks": moved["world_size"], "num_workers": moved["num_workers"], "batch_size": moved["batch_size"]}
    if topology.changes(old) or is_shared_anew(moved):
        # litdata's workers note that for themselves alone: a run resumed once more would repeat what came before
        moved["resume_mode"] = "elastic"
        # sample_in_epoch tells all: the count of one rank may be more than a rank has now, which litdata refuses
        moved["num_samples_yielded"] = 0
    return moved


def is_shared_anew(position: Mapping[str, Any]) -> bool:
    """Whether the rest of the epoch was, or is to be, shared out anew."""
    return position.get("resume_mode") == "elastic"
