"""`lighthouse bench`: dense SDPA, Lighthouse Attention and its floor, measured in one run on the user's own device.

One layer over lengths and settings, or with `--model` a whole training step under Lightning's Trainer. Nothing is timed
until the chosen backends have agreed with the reference on a small case. What cannot be measured is left blank.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, fields, replace

from lightning_lighthouse.bench.arguments import complete, make_parser
from lightning_lighthouse.bench.check import disagreement
from lightning_lighthouse.bench.layer import LayerRow
from lightning_lighthouse.bench.report import append_csv, check_csv, describe
from lightning_lighthouse.bench.steps import StepRow, bench_steps
from lightning_lighthouse.bench.table import bench_layer
from lightning_lighthouse.config import LighthouseConfig


def main(argv: Sequence[str] | None = None) -> int:
    """`lighthouse bench`.

    Args:
        argv: Arguments after the command's name; None: those of the process.

    Returns:
        Exit status: 0 when measured, 1 when the backend is wrong, 2 for wrong arguments.
    """
    parser = make_parser()
    asked = parser.parse_args(argv)
    try:
        layer, settings = complete(asked)
        described = describe(layer, asked.commit)
        if asked.csv is not None:
            row_class = StepRow if asked.model else LayerRow
            columns = [field.name for part in (LighthouseConfig, row_class) for field in fields(part)]
            check_csv(asked.csv, [*described, *columns])
    except (ValueError, TypeError, ImportError, OSError) as error:
        parser.error(str(error))

    versions = [f"{name} {described[name]}" for name in ("torch", "triton", "cudnn", "commit") if described[name]]
    print(", ".join([described["device"], *versions, described["dtype"]]))
    if layer.device.type == "cpu":
        print("on a CPU: these times say nothing about a GPU, and memory is not measured")
    # the small case has a budget of its own
    for config in dict.fromkeys(replace(config, top_k=None) for _, config in settings):
        problem = disagreement(layer, config)
        if problem is not None:
            print(f"lighthouse bench: {problem}; nothing was timed", file=sys.stderr)
            return 1
    rows = (
        bench_steps(asked.model, layer, settings, asked.dense_layers, asked.compile, asked.repeats)
        if asked.model
        else bench_layer(layer, settings, asked.dense_up_to, asked.repeats)
    )
    for config, row in rows:
        if asked.csv is not None:
            append_csv(asked.csv, {**described, **asdict(config), **asdict(row)})
    return 0
