"""What ranks that share a sequence send around attention, and how long that takes beside it: calculated, not measured.

    python experiments/context_costs.py

One layer's forward pass, one sequence, bf16, heads of 128 channels; a backward pass sends as much again, and blocks
that are computed again once more. W ranks share a sequence, however many groups of them there are: 256 ranks with W = 8
send what 8 do. Rates are assumptions: change them to those of a machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from math import gcd

from lightning_lighthouse import LighthouseConfig

CHANNELS, BYTES = 128, 2
RANKS = (2, 8, 32, 64, 128, 256)
MODELS = ((8, 8), (32, 8), (64, 64))
LENGTHS = (262_144, 1_048_576)


def sent(rows: float, heads: int, groups: int, ranks: int) -> float:
    """Bytes that a rank sends to exchange heads for `rows` rows of all ranks: q, k and v there, and o back."""
    return 2 * (heads + groups) * CHANNELS * BYTES * rows / ranks * (ranks - 1) / ranks


def sent_beyond_heads(rows: float, heads: int, groups: int, ranks: int) -> tuple[float, float]:
    """The same for more ranks than key/value heads: within groups as large as heads allow, and between those groups.

    Between them keys and values are gathered and queries moved for balance. This form is not built.
    """
    inner = gcd(ranks, groups)
    outer = ranks // inner
    gathered = 2 * groups / inner * CHANNELS * BYTES * rows * (outer - 1) / outer
    moved = 2 * heads / inner * CHANNELS * BYTES * rows / outer * (outer - 1) / outer
    return sent(rows / outer, heads, groups, inner), gathered + moved


def attention_seconds(rows: float, heads: int, ranks: int, rate: float) -> float:
    """Causal attention over `rows` rows, its heads or queries shared evenly."""
    return 2 * rows**2 * CHANNELS * heads / ranks / rate


def table(arguments: argparse.Namespace) -> Iterator[str]:
    """The rows, as Markdown."""
    near, far = arguments.near * 1e9, arguments.far * 1e9
    yield "| heads | tokens | W | exchanged | sent, MiB | ms, near | ms, far | attention, ms: Lighthouse | dense |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for heads, groups in MODELS:
        for tokens in LENGTHS:
            entries = LighthouseConfig().pyramid(tokens).num_gathered
            lighthouse, dense = arguments.lighthouse * 1e12, arguments.dense * 1e12
            for ranks in RANKS:
                times = [
                    f"{1e3 * attention_seconds(rows, heads, ranks, rate):,.2f}"
                    for rows, rate in ((entries, lighthouse), (tokens, dense))
                ]
                for name, rows in (("tokens", tokens), ("entries", entries)):
                    if groups % ranks == 0:
                        inner, outer = sent(rows, heads, groups, ranks), 0.0
                        at_most = (inner / near, inner / far)
                    else:
                        inner, outer = sent_beyond_heads(rows, heads, groups, ranks)
                        # the groups within a node, and what goes between them over the network
                        at_most = (inner / near + outer / far, (inner + outer) / far)
                        name = f"{name}, heads and queries"
                    milliseconds = " | ".join(f"{1e3 * seconds:,.2f}" for seconds in at_most)
                    yield (
                        f"| {heads}/{groups} | {tokens:,} | {ranks} | {name} | {(inner + outer) / 2**20:,.0f} | "
                        f"{milliseconds} | {' | '.join(times)} |"
                    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--near", type=float, default=450, help="GB/s of a GPU within a node, one direction")
    parser.add_argument("--far", type=float, default=50, help="GB/s of a GPU between nodes, one direction")
    parser.add_argument("--lighthouse", type=float, default=500, help="TFLOP/s of attention over the entries")
    parser.add_argument("--dense", type=float, default=550, help="TFLOP/s of attention over the tokens")
    print("\n".join(table(parser.parse_args())))


if __name__ == "__main__":
    main()
