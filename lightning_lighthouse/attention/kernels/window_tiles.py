"""How many queries and keys a program of the window kernels takes at a time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True)
class Tile:
    """Queries and keys of one product, the warps of a program, and how many loads are in flight."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Tiles:
    """Of the forward, of dq, and of dk and dv."""

    forward: Tile
    dq: Tile
    dkdv: Tile


# By the largest head dim they serve, for windows of less than WIDE tokens and for others. Measured on an H100
WIDE = 2048
HOPPER = {
    64: (Tiles(Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 3)),) * 2,
    128: (
        Tiles(Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(32, 64, 4, 3)),
        Tiles(Tile(128, 128, 8, 3), Tile(128, 128, 8, 2), Tile(64, 64, 4, 2)),
    ),
    256: (Tiles(Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(64, 64, 8, 2)),) * 2,
}
# These fit into the shared memory of every GPU from compute capability 8.0 on
SMALL = {
    64: Tiles(Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    128: Tiles(Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), Tile(32, 64, 4, 2)),
    256: Tiles(Tile(64, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
}
# What a block has on a Hopper GPU; it is 163 KiB on an A100, and 99 on the smallest
HOPPER_SHARED_KIB = 227


def tiles_for(head_dim: int, window: int, device: torch.device) -> Tiles:
    """The tiles for a head dim up to 256."""
    serving = next(dim for dim in SMALL if head_dim <= dim)
    if device.type == "cuda" and _is_large(device):
        return HOPPER[serving][window >= WIDE]
    return SMALL[serving]


@lru_cache
def _is_large(device: torch.device) -> bool:
    properties = torch.cuda.get_device_properties(device)
    # torch's type hints lack it
    return properties.shared_memory_per_block_optin >= HOPPER_SHARED_KIB * 1024  # type: ignore[attr-defined]
