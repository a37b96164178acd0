"""Print the bytes of shared memory that the window kernels need with each tile of a table, as a JSON list.

    python window_memory.py HOPPER 90

The kernels are compiled for the compute capability that is named; no GPU is needed. It runs in a process of its own,
without Triton's interpreter.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lightning_lighthouse.attention.kernels import window, window_gradients, window_tiles


def main() -> None:
    table, capability = getattr(window_tiles, sys.argv[1]), int(sys.argv[2])
    used = []
    for dim, tiles in table.items():
        for each in tiles if isinstance(tiles, tuple) else (tiles,):
            sizes = {"R": 1, "D": dim, "BLOCK_D": dim, "UPCAST": False}
            queries = {**sizes, "H": 8, "SINKS": True, "BLOCK_S": window.BLOCK_SINKS}
            keys = {**sizes, "G": 8}
            sinks = {**keys, "PART": window_gradients.PART}
            used += [
                shared_bytes(window._window_fwd_kernel, queries, each.forward, capability),
                shared_bytes(window_gradients._window_dq_kernel, queries, each.dq, capability),
                shared_bytes(window_gradients._window_dk_dv_kernel, keys, each.dkdv, capability),
                shared_bytes(window_gradients._sink_dk_dv_kernel, sinks, each.dkdv, capability),
            ]
    print(json.dumps(used))


def shared_bytes(kernel: Any, constants: dict[str, Any], tile: window_tiles.Tile, capability: int) -> int:
    constants = {**constants, "BLOCK_Q": tile.queries, "BLOCK_K": tile.keys}
    types, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        types[name] = "constexpr" if name in constants else _type(name)
        if name.startswith(("p_", "stride_")):
            # as in memory of real models; wide loads need more of it
            attributes[(position,)] = [["tt.divisibility", 16]]
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    source = ASTSource(kernel, types, places, attributes)
    return int(triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).metadata.shared)


def _type(name: str) -> str:
    if name.startswith("p_"):
        # sums over parts are in fp32; for the memory that makes no difference
        return "*fp32" if name in ("p_lse", "p_delta") else "*bf16"
    return "fp32" if name.startswith("scale") else "i32"


if __name__ == "__main__":
    main()
