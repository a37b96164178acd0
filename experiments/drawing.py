"""Draw what a Lighthouse layer does to sixteen tokens, and what a run does over its steps, for the README.

    python experiments/drawing.py docs/lighthouse.svg

The entries that win, and their order, are those of `LighthouseConfig(num_levels=3, pooling_factor=2, top_k=2)` on drawn
q and k. One file for light and for dark pages.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from lightning_lighthouse import LighthouseConfig
from lightning_lighthouse.attention.lighthouse import select_entries

TOKENS = 16
CONFIG = LighthouseConfig(num_levels=3, pooling_factor=2, top_k=2, selection="published")
WIDTH, HEIGHT = 880, 400
# of the pyramid, in which a token is SIDE wide
LEFT, TOP, SIDE, GAP = 40, 64, 25, 3
ROW = 42
STYLE = """
  text { font: 14px system-ui, sans-serif; fill: #24292f }
  .small { font-size: 12px; fill: #57606a }
  .head { font-weight: 600 }
  .entry { fill: none; stroke: #8c959f; stroke-width: 1.2 }
  .line { fill: none; stroke: #57606a; stroke-width: 1.4 }
  .tip { fill: #57606a }
  .l0 { fill: #54aeff; stroke: #0969da } .l1 { fill: #4ac26b; stroke: #1a7f37 } .l2 { fill: #d4a72c; stroke: #9a6700 }
  .dense { fill: #ff8182; stroke: #cf222e }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 } .small { fill: #9198a1 } .entry { stroke: #6e7681 }
    .line { stroke: #9198a1 } .tip { fill: #9198a1 }
    .l0 { fill: #1f6feb; stroke: #79c0ff } .l1 { fill: #238636; stroke: #7ee787 } .l2 { fill: #9e6a03; stroke: #e3b341 }
    .dense { fill: #b62324; stroke: #ff7b72 }
  }
"""


def box(x: float, y: float, width: float, kind: str) -> str:
    return f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{SIDE - GAP}" rx="3"/>'


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{words}</text>'


def arrow(x: float, y: float, to_x: float, to_y: float) -> str:
    """From left to right, or downwards."""
    tip = f"{to_x - 8:g},{to_y - 4:g} {to_x - 8:g},{to_y + 4:g}"
    if to_x == x:
        tip = f"{to_x - 4:g},{to_y - 8:g} {to_x + 4:g},{to_y - 8:g}"
    path = f'<path class="line" d="M{x:g},{y:g} L{to_x:g},{to_y:g}"/>'
    return f'{path}<polygon class="tip" points="{to_x:g},{to_y:g} {tip}"/>'


def draw() -> str:
    """The file."""
    shape = CONFIG.pyramid(TOKENS)
    q, k = torch.randn(2, 1, 1, TOKENS, 4, generator=torch.Generator().manual_seed(5))
    gathered = [divide(int(position), shape) for position in select_entries(q, k, k, CONFIG)[0, 0]]
    parts = [text(LEFT, 34, "In each routed layer", "head")]
    words = ["tokens: q, k, v", "means of 2", "means of 4"]
    for level in range(shape.num_levels):
        y = TOP + (shape.num_levels - 1 - level) * ROW
        width = SIDE * shape.window(level)
        for entry in range(shape.entries(level)):
            kind = f"l{level}" if (level, entry) in gathered else "entry"
            parts.append(box(LEFT + entry * width, y, width - GAP, kind))
        parts.append(text(LEFT + TOKENS * SIDE + 8, y + 16, words[level], "small"))
    x, y = 590, TOP + ROW / 2
    parts += [
        arrow(LEFT + TOKENS * SIDE + 100, y + 32, x - 8, y + 32),
        text(x, 34, f"A short causal sequence: {len(gathered)} entries", "head"),
    ]
    for place, (level, _) in enumerate(gathered):
        parts.append(box(x + place * 20, y + 20, 17, f"l{level}"))
    parts += [
        text(x, y + 2, "the highest norms of q or k, coarse to fine", "small"),
        text(x, y + 66, "stock SDPA, forward and backward", "small"),
        arrow(x + 120, y + 74, x + 120, y + 104),
        text(x, y + 122, "each output goes back to the tokens that may", "small"),
        text(x, y + 138, "know it: those behind what it was pooled from", "small"),
    ]
    y = 290
    parts.append(text(LEFT, y - 14, "Over the steps of a run", "head"))
    cheap, dense = 720, 80
    parts += [
        f'<rect class="l0" x="{LEFT}" y="{y}" width="{cheap}" height="30" rx="3"/>',
        f'<rect class="dense" x="{LEFT + cheap}" y="{y}" width="{dense}" height="30" rx="3"/>',
        text(
            LEFT + cheap / 2,
            y + 20,
            "Lighthouse, windows, chunks: a type for each layer, one phase or several",
            "",
            "middle",
        ),
        text(LEFT + cheap + dense / 2, y + 20, "dense", "", "middle"),
        text(LEFT, y + 50, "step 0", "small"),
        text(LEFT + cheap, y + 50, "switch_at=0.9", "small", "middle"),
        text(LEFT + cheap + dense, y + 50, "end", "small", "end"),
        text(
            LEFT,
            y + 78,
            "Validation is dense all along, and so is the model that is left: the same parameters and keys.",
            "small",
        ),
    ]
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img">\n'
        "<title>A Lighthouse layer: pool q, k and v alike, pick entries, attend on the short sequence, scatter; and "
        f"the phases of a run</title>\n<style>{STYLE}</style>\n{body}\n</svg>\n"
    )


def divide(position: int, shape) -> tuple[int, int]:
    """The level and the number in it of a position in the concatenation of all levels."""
    level = max(level for level in range(shape.num_levels) if shape.start(level) <= position)
    return level, position - shape.start(level)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(draw(), encoding="utf-8")
