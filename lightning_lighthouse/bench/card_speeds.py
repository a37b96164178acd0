"""What a card does in a second of a training step: the constants that `estimate_step` calculates with.

Fitted to rows of docs/numbers: one layer of attention at 98,304 tokens (`layer.csv`, `windows.csv`), and the steps of
the 41M- and the 268M-parameter model (`step.csv`, `study/rows.csv`), and those of SmolLM2-135M
(`equal_time_steps.csv`). `tests/bench/test_step_estimate.py` holds them against these rows. Of cards that nothing was
measured on there is nothing here.
"""

from __future__ import annotations

from typing import NamedTuple


class CardSpeed(NamedTuple):
    """Of one card, in bf16, forward and backward together.

    Args:
        memory_gib: What a process can use of it.
        products: FLOP/s of the products with the parameters.
        attention: FLOP/s of dense attention, counted as `attention_flops_per_token` does.
        copied: Bytes/s of a copy.
        narrow: Times as long that dense attention and chunks take for the same work in heads of up to 64 channels.
        stage_seconds: Of all stages of a Lighthouse layer but attention, whatever the length.
        stage_share: What these stages reach of `copied`.
        window_token: Seconds a token and unit of width of a window layer, whatever the window.
        window_pair: Seconds a token, unit of width and token of the window.
        chunk_token: As `window_token`, of chunks.
        chunk_pair: As `window_pair`, of chunks.
        elementwise: Seconds a token, layer and unit of width of the feed-forward, of a compiled block: norms, rotation,
            activation, residuals.
        wide_stream: Times as long that they take where the stream between the blocks is in float32.
        launch: Seconds a layer that the CPU needs to issue a step of compiled blocks: no step is faster.
        launch_stages: Seconds that it needs beyond that for a Lighthouse layer.
    """

    memory_gib: float
    products: float
    attention: float
    copied: float
    narrow: float = 1.24
    stage_seconds: float = 80e-6
    stage_share: float = 0.78
    window_token: float = 1.158e-11
    window_pair: float = 3.52e-14
    chunk_token: float = 1.275e-11
    chunk_pair: float = 1.11e-14
    elementwise: float = 2.2e-11
    wide_stream: float = 1.35
    launch: float = 4.4e-3
    launch_stages: float = 1.2e-3


# by the name that torch.cuda.get_device_name gives
CARDS = {
    "NVIDIA H100 80GB HBM3": CardSpeed(79.1, products=700e12, attention=911e12, copied=3.0e12),
    "NVIDIA H200": CardSpeed(139.8, products=700e12, attention=911e12, copied=4.2e12),
}
