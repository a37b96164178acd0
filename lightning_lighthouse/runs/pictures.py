"""Pictures with matplotlib, which is optional: the extra `plots`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_lighthouse.runs.whole_file import whole_file


def require_matplotlib() -> None:
    """Raise ModuleNotFoundError, with the remedy, where matplotlib is absent."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "--plot needs matplotlib, which is not installed: pip install 'lightning_lighthouse[plots]'"
        ) from None


def check_picture(path: Path) -> None:
    """Refuse a path that no picture can be written to, before what it shows is made. Raises as `new_figure`."""
    new_figure(path, 1.0, 1.0)


def new_figure(path: Path, width: float, height: float) -> Any:
    """A figure to be saved to a path.

    Args:
        path: A file whose ending matplotlib knows, as .png.
        width: In inches.
        height: In inches.

    Raises:
        ModuleNotFoundError: matplotlib is absent.
        ValueError: The ending is none that it knows.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    kinds = figure.canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in kinds:
        raise ValueError(f"--plot must end in one of {', '.join(f'.{kind}' for kind in sorted(kinds))}, got {path}")
    return figure


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure from `new_figure`; the file appears whole."""
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=80, format=path.suffix[1:].lower())
