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
from lightning_lighthouse.context.queries import chunks_of, num_rows, pieces_of

CHANNELS, BYTES = 128, 2
RANKS = (2, 8, 32, 64, 128, 256)
MODELS = ((8, 8), (32, 8), (64, 64))
LENGTHS = (262_144, 1_048_576)


def sent(rows: float, heads: int, groups: int, ranks: int) -> float:
    """Bytes that a rank sends to exchange heads for `rows` rows of all ranks: q, k and v there, and o back."""
    return 2 * (heads + groups) * CHANNELS * BYTES * rows / ranks * (ranks - 1) / ranks


def sent_with_queries(rows: int, heads: int, groups: int, ranks: int) -> tuple[float, float]:
    """The same for ranks that cannot share the key/value heads: within a group of neighbours, and between groups.

    Keys and values go to all groups, and each query to the one that attends for it; the mean over the ranks, of what
    `exchange_queries` passes on.
    """
    neighbours, count = gcd(ranks, groups), rows // ranks
    chunks = chunks_of(rows, ranks // neighbours)
    # of the queries, those that the group of their rank attends for
    own = sum(num_rows(pieces_of(rank, count, chunks)[rank // neighbours]) for rank in range(ranks))
    kept = own / rows
    q_and_o = 2 * heads * CHANNELS * BYTES * count
    k_and_v = 2 * groups / neighbours * CHANNELS * BYTES * count
    near = (q_and_o * kept / neighbours + k_and_v) * (neighbours - 1)
    return near, q_and_o * (1 - kept) + k_and_v * (ranks - neighbours)


def sent_to_all_groups(tokens: int, entries: int, heads: int, groups: int, ranks: int) -> tuple[float, float]:
    """The same for Lighthouse whose tokens must be exchanged, where tiles do not end with the ranks.

    q, k and v go to all groups, each of which attends for a part of the entries and tells the others what came of it.
    """
    neighbours, count = gcd(ranks, groups), tokens // ranks
    row = CHANNELS * BYTES / neighbours
    near = (heads + 2 * groups + heads) * row * count * (neighbours - 1)
    outer = ranks // neighbours
    return near, (heads + 2 * groups) * row * count * (ranks - neighbours) + heads * row * entries * (1 - 1 / outer)


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
                if groups % ranks == 0:
                    found = {
                        name: (sent(rows, heads, groups, ranks), 0.0)
                        for name, rows in (("tokens", tokens), ("entries", entries))
                    }
                else:
                    found = {
                        "tokens, heads and queries": sent_with_queries(tokens, heads, groups, ranks),
                        "tokens of Lighthouse, to all": sent_to_all_groups(tokens, entries, heads, groups, ranks),
                        "entries, heads and queries": sent_with_queries(entries, heads, groups, ranks),
                    }
                for name, (inner, outer) in found.items():
                    # the groups within a node, and what goes between them over the network
                    at_most = (inner / near + outer / far, (inner + outer) / far)
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
