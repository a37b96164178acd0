"""What `lighthouse bench` writes: cells of a table, rows of a CSV file, and where they were measured."""

from __future__ import annotations

import csv
import io
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from lightning_lighthouse.bench.timing import Layer


def describe(layer: Layer, commit: str | None) -> dict[str, Any]:
    """What every row says of the machine, the software and the layer.

    Args:
        layer: The layer.
        commit: Of the code that is measured; None: that of this package's own checkout, if there is one.
    """
    on_gpu = layer.device.type == "cuda"
    cpu = f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = None
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit() if commit is None else commit,
        "device": torch.cuda.get_device_name(layer.device) if on_gpu else cpu,
        "torch": torch.__version__,
        "triton": triton,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "heads": layer.heads,
        "kv_heads": layer.kv_heads,
        "head_dim": layer.head_dim,
        "dtype": str(layer.dtype).removeprefix("torch."),
    }


def _commit() -> str | None:
    """The commit of this package's own checkout, with "-dirty" where files differ; None where there is none."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def check_csv(path: Path, columns: Sequence[str]) -> None:
    """Raise ValueError where rows with `columns` cannot be appended to `path`."""
    if not path.parent.is_dir():
        raise ValueError(f"--csv {path}: there is no folder {path.parent}; create it")
    if not path.exists():
        return
    with path.open(newline="") as file:
        header = next(csv.reader(file), None)
    if header is not None and header != list(columns):
        differing = sorted(set(header) ^ set(columns))
        raise ValueError(
            f"--csv {path} has other columns ({', '.join(differing) or 'another order'}); name another file"
        )


def append_csv(path: Path, row: dict[str, Any]) -> None:
    """Append `row` to `path`, under a header where the file is new. None is left blank."""
    text = io.StringIO()
    writer = csv.DictWriter(text, row.keys(), lineterminator="\n")
    if not path.exists() or path.stat().st_size == 0:
        writer.writeheader()
    writer.writerow({name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()})
    # in one write, so that an interrupted run leaves whole rows
    with path.open("a", newline="") as file:
        file.write(text.getvalue())


def ratio(numerator: float | None, denominator: float | None) -> float | None:
    """The quotient; None where one of the two was not measured."""
    return None if numerator is None or denominator is None else numerator / denominator


def line(*values: Any) -> str:
    """One line of a table: "-" where nothing was measured."""
    return " ".join(f"{_cell(value):>10}" for value in values)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else value
