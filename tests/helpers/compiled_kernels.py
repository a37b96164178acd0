"""Compiles kernels for compute capability 9.0, which needs no GPU: those with tables of documents, those that rotate.

It prints a line for each.

In a process of its own, for Triton interprets or compiles all kernels of a process.
"""

from __future__ import annotations

from importlib import import_module

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

KERNELS = "lightning_lighthouse.attention.kernels"
POINTERS = dict.fromkeys(("p_slots", "p_index", "p_scratch", "p_windows", "p_tiles"), "*i32")
ROWS = {"G": 2, "R": 2, "L": 3, "W": 4, "D": 24, "BLOCK_E": 16, "BLOCK_D": 32, "TABLE": True}
TILES = {"L": 3, "W": 4, "CHUNK": 128, "TABLE": True}


def compiled(module: str, name: str, **constants) -> None:
    kernel = getattr(import_module(f"{KERNELS}.{module}"), name)
    types = {"p_scores": "*fp32", "p_turns": "*fp32", **POINTERS}
    signature = {
        arg: "constexpr" if arg in constants else types.get(arg, "*bf16" if arg.startswith("p_") else "i32")
        for arg in kernel.arg_names
    }
    source = ASTSource(kernel, signature, constants)
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    print(name, flush=True)


for kernel in ("_collect_kernel", "_spread_kernel"):
    compiled("rows", kernel, **ROWS, SHIFT=0, MEAN=False, PAIR=0)
    compiled("rows", kernel, **ROWS, SHIFT=1, MEAN=True, PAIR=0)
    for pair in (12, 8, 1):
        compiled("rows", kernel, **ROWS, SHIFT=0, MEAN=False, PAIR=pair)
for kernel in ("_score_kernel", "_score_first_kernel"):
    compiled("score", kernel, **ROWS)
for rule in ("published", "strided", "random"):
    compiled("select", "_select_kernel", **TILES, RULE=rule, COVER=True, IN_PART=rule != "strided")
for level in (3, 2, 1):
    compiled("select_causal", "_causal_kernel", **TILES, LEVEL=level)
