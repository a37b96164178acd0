"""`lighthouse bench`: dense SDPA, Lighthouse Attention and its floor, measured in one run on the user's own device.

One layer over lengths and settings, or with `--model` a whole training step under Lightning's Trainer; with `--type`
local attention instead of Lighthouse, with `--documents` inside packed ones. Nothing is timed until the chosen backends
have agreed with the reference on a small case. What cannot be measured is left blank.
"""

from __future__ import annotations

import sys
from argparse import Action, ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, replace
from itertools import product
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_type_hints

import torch

from lightning_lighthouse.attention.backends import check_backend
from lightning_lighthouse.attention.config import LighthouseConfig
from lightning_lighthouse.bench.agreement import disagreement, small_case
from lightning_lighthouse.bench.document_kinds import KINDS
from lightning_lighthouse.bench.documents import DocumentRow, bench_documents, document_disagreement
from lightning_lighthouse.bench.layer import LayerRow
from lightning_lighthouse.bench.rows import append_csv, check_csv, describe
from lightning_lighthouse.bench.steps import StepRow, bench_steps
from lightning_lighthouse.bench.table import bench_layer
from lightning_lighthouse.bench.timing import Layer
from lightning_lighthouse.bench.windows import WindowRow, WindowSetting, bench_windows, window_disagreement
from lightning_lighthouse.checks import quoted
from lightning_lighthouse.cli.parser import DTYPES, Parser
from lightning_lighthouse.routing.targets import choose_routed


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
            columns = [field.name for part in (type(settings[0][1]), _row_class(asked)) for field in fields(part)]
            check_csv(asked.csv, [*described, *columns])
    except (ValueError, TypeError, ImportError, OSError) as error:
        parser.error(str(error))

    versions = [f"{name} {described[name]}" for name in ("torch", "triton", "cudnn", "commit") if described[name]]
    print(", ".join([described["device"], *versions, described["dtype"]]))
    if layer.device.type == "cpu":
        print("on a CPU: these times say nothing about a GPU, and memory is not measured")
    problem = _problem(layer, [setting for _, setting in settings], bool(asked.documents))
    if problem is not None:
        print(f"lighthouse bench: {problem}; nothing was timed", file=sys.stderr)
        return 1
    rows: Iterator[tuple[Any, Any]]
    if asked.model:
        rows = bench_steps(asked.model, layer, settings, asked.dense_layers, asked.compile, asked.repeats)
    elif asked.documents:
        rows = bench_documents(layer, settings, asked.documents, asked.dense_up_to, asked.repeats)
    elif asked.type == "lighthouse":
        rows = bench_layer(layer, settings, asked.dense_up_to, asked.repeats)
    else:
        rows = bench_windows(layer, settings, asked.dense_up_to, asked.repeats)
    for config, row in rows:
        if asked.csv is not None:
            append_csv(asked.csv, {**described, **asdict(config), **asdict(row)})
    return 0


def _row_class(asked: Namespace) -> type:
    if asked.model:
        return StepRow
    if asked.documents:
        return DocumentRow
    return LayerRow if asked.type == "lighthouse" else WindowRow


def _problem(layer: Layer, settings: Sequence[Any], with_documents: bool) -> str | None:
    """What is wrong with the first of the settings that is; None: nothing."""
    lighthouse_disagreement = document_disagreement if with_documents else disagreement
    # the small case has a budget of its own
    cases = [replace(each, top_k=None) if isinstance(each, LighthouseConfig) else each for each in settings]
    for case in dict.fromkeys(cases):
        compare: Any = lighthouse_disagreement if isinstance(case, LighthouseConfig) else window_disagreement
        problem = compare(layer, case)
        if problem is not None:
            return str(problem)
    return None


LENGTHS = {"cuda": [8192, 16384, 32768, 65536, 98304, 131072], "cpu": [512, 1024, 2048, 4096]}
DOCUMENTS_LENGTH = {"cuda": 98304, "cpu": 2048}
MODEL_LENGTH = {"cuda": 98304, "cpu": 1024}
WINDOWS = {"cuda": [512, 1024, 4096], "cpu": [64]}
# Fields of LighthouseConfig that take several values, all of which are measured.
SEVERAL = ("num_levels", "pooling_factor", "top_k", "scorer", "selection", "rotate")
# tokens, levels, pooling factor, top_k: the rows of docs/numbers/benchmarks.md
PRESETS = {
    "published": [
        (32_768, 3, 4, 1024),
        (65_536, 3, 4, 1024),
        (98_304, 3, 4, 1536),
        (131_072, 3, 4, 1024),
        (262_144, 3, 4, 1024),
        (262_144, 3, 4, 2048),
        (524_288, 3, 4, 1024),
        (524_288, 3, 4, 4096),
        (1_048_576, 4, 4, 4096),
    ]
}


class YesNo(Action):
    """`--NAME` sets True, `--no_NAME` False: argparse's own would mix dashes with the underscores of the names."""

    def __init__(self, option_strings: list[str], dest: str, **settings: Any) -> None:
        names = [name for option in option_strings for name in (option, f"--no_{option.removeprefix('--')}")]
        super().__init__(names, dest, nargs=0, **settings)

    def __call__(self, parser: ArgumentParser, asked: Namespace, values: Any, option: str | None = None) -> None:
        """Set the value that the option's spelling says."""
        setattr(asked, self.dest, not str(option).startswith("--no_"))


def make_parser() -> Parser:
    """The parser; what is None in its result is for `complete`."""
    parser = Parser(
        prog="lighthouse bench",
        description="Measure dense and Lighthouse Attention here: one layer, or with --model a whole training step.",
    )
    add = parser.add_argument
    add("what", nargs="?", choices=["layer"], metavar="layer", help="one layer; the same without this word")
    add("--lengths", type=int, nargs="+", metavar="N", help="tokens (default: up to 131072, on a CPU up to 4096)")
    add("--preset", choices=list(PRESETS), help="lengths, levels, factors and budgets of docs/numbers/benchmarks.md")
    add("--heads", type=int, metavar="H", help="query heads of the layer (default: 8)")
    add("--kv_heads", type=int, metavar="G", help="its key/value heads (default: as many)")
    add("--head_dim", type=int, metavar="D", help="its head dim (default: 128)")
    add("--device", choices=["cuda", "cpu"], help="default: cuda where there is one")
    add("--dtype", choices=DTYPES, help="default: bfloat16, on a CPU float32")
    add("--repeats", type=int, metavar="R", help="timed calls of each, at least (default: 20, on a CPU 5)")
    add("--dense_up_to", type=int, metavar="N", help="leave dense attention blank above this length")
    add("--csv", type=Path, metavar="FILE", help="append a row for each line of the table")
    add("--commit", metavar="NAME", help="commit for the rows (default: that of this checkout)")
    add("--model", choices=["toy", "small", "base", "paper"], help="measure a training step of this preset, at one N")
    add("--dense_layers", type=_layer, nargs="*", metavar="L", help="its dense layers, or published (default: none)")
    add("--compile", action=YesNo, help="compile the model (default: on a GPU)")
    add("--documents", choices=list(KINDS), nargs="+", metavar="KIND", help=f"inside packed ones: {', '.join(KINDS)}")
    local = parser.add_argument_group(
        "local attention", "with --type window or chunk, beside what others offer; all combinations are measured"
    )
    local.add_argument("--type", choices=["lighthouse", "window", "chunk"], default="lighthouse", help="of the layer")
    local.add_argument(
        "--window", type=int, nargs="+", metavar="W", help="tokens (default: 512 1024 4096, on a CPU 64)"
    )
    local.add_argument("--sink_tokens", type=int, nargs="+", metavar="S", help="first tokens that all see (default: 0)")
    group = parser.add_argument_group(
        "Lighthouse Attention", "the fields of LighthouseConfig; where several values may be given, all are measured"
    )
    for name, hint in get_type_hints(LighthouseConfig).items():
        default = getattr(LighthouseConfig, name)
        settings: dict[str, Any] = {"default": default, "help": f"default: {default}"}
        if hint is bool:
            settings["action"] = YesNo
        elif isinstance(hint, UnionType) or not get_args(hint):
            settings |= {"type": next(iter(get_args(hint)), hint), "metavar": "VALUE"}
        else:
            settings["choices"] = get_args(hint)
        if name in SEVERAL:
            settings |= {"nargs": "+", "default": None}
        group.add_argument(f"--{name}", **settings)
    return parser


def _layer(text: str) -> int | str:
    try:
        return text if text == "published" else int(text)
    except ValueError:
        raise ArgumentTypeError(f"must be integers or published, got {quoted(text)}") from None


def complete(asked: Namespace) -> tuple[Layer, list[tuple[int, Any]]]:
    """Fill in the defaults that depend on the device and the model.

    Args:
        asked: Of `make_parser`; completed in place.

    Returns:
        The layer, and the lengths with what is measured at each: a LighthouseConfig, or a WindowSetting.

    Raises:
        TypeError: A field of LighthouseConfig has the wrong type.
        ValueError: A value is out of range, or arguments do not go together.
        ImportError: The backend needs a package that is not installed.
    """
    if asked.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda needs a CUDA device, and torch sees none; use --device cpu")
    asked.device = asked.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if asked.type == "lighthouse":
        _refuse(asked, "--type lighthouse", "with", "window", "sink_tokens")
    else:
        _refuse_lighthouse(asked)
    if asked.documents:
        _complete_documents(asked)
    if asked.model:
        _refuse(asked, "--model", "with", "what", "documents", "heads", "kv_heads", "head_dim", "dense_up_to", "preset")
        _complete_model(asked)
    else:
        _refuse(asked, "--model", "without", "dense_layers", "compile")
    if asked.preset:
        _refuse(asked, "--preset", "with", "lengths", "num_levels", "pooling_factor", "top_k")

    asked.heads = 8 if asked.heads is None else asked.heads
    defaults = {
        "kv_heads": asked.heads,
        "head_dim": 128,
        "lengths": LENGTHS[asked.device],
        "dtype": "bfloat16" if asked.device == "cuda" else "float32",
        "repeats": 20 if asked.device == "cuda" else 5,
    }
    for name, default in defaults.items():
        if getattr(asked, name) is None:
            setattr(asked, name, default)
    for name in ("heads", "kv_heads", "head_dim", "repeats", "lengths"):
        smallest = min(asked.lengths) if name == "lengths" else getattr(asked, name)
        if smallest < 1:
            raise ValueError(f"--{name} must be at least 1, got {smallest}")
    if asked.heads % asked.kv_heads:
        raise ValueError(f"--heads must be a multiple of --kv_heads, got {asked.heads} and {asked.kv_heads}")
    layer = Layer(asked.heads, asked.kv_heads, asked.head_dim, getattr(torch, asked.dtype), torch.device(asked.device))
    if asked.type != "lighthouse":
        return layer, _local_settings(asked)
    settings = _settings(asked)
    if asked.head_dim % 2 and any(config.rotate == "after" for _, config in settings):
        raise ValueError(f"--head_dim must be even with --rotate after, got {asked.head_dim}")
    for _, config in settings:
        check_backend(config, layer.device)
        small_case(layer.device, config)
    return layer, settings


def _refuse(asked: Namespace, option: str, how: str, *names: str) -> None:
    for name in names:
        if getattr(asked, name) is not None:
            given = asked.what if name == "what" else f"--{name}"
            raise ValueError(f"{given} does not go {how} {option}; leave it out")


def _refuse_lighthouse(asked: Namespace) -> None:
    """Local attention has none of the settings of Lighthouse but the backend of stock attention."""
    option = f"--type {asked.type}"
    _refuse(asked, option, "with", "model", "preset", "documents", *SEVERAL)
    if asked.type == "chunk":
        _refuse(asked, option, "with", "sink_tokens")
    for field in fields(LighthouseConfig):
        if field.name not in (*SEVERAL, "sdpa") and getattr(asked, field.name) != field.default:
            raise ValueError(f"--{field.name} does not go with {option}; leave it out")


def _complete_documents(asked: Namespace) -> None:
    if "dilated" in (asked.scorer or ()):
        raise ValueError("--scorer dilated does not go with --documents; leave it out")
    if not asked.preset:
        asked.lengths = asked.lengths or [DOCUMENTS_LENGTH[asked.device]]


def _complete_model(asked: Namespace) -> None:
    from lightning_lighthouse.model.network import PRESETS as MODELS

    shape = MODELS[asked.model]
    asked.heads, asked.kv_heads, asked.head_dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
    asked.lengths = asked.lengths or [MODEL_LENGTH[asked.device]]
    if len(asked.lengths) > 1:
        raise ValueError(f"--model takes one length, got {len(asked.lengths)}")
    if asked.dtype == "float16":
        raise ValueError("--dtype float16 does not go with --model; use bfloat16 or float32")
    if asked.dense_layers == ["published"]:
        asked.dense_layers = "published"
    choose_routed({str(layer): torch.nn.Identity() for layer in range(shape.num_layers)}, asked.dense_layers)
    if asked.compile is None:
        asked.compile = asked.device == "cuda"


def _settings(asked: Namespace) -> list[tuple[int, LighthouseConfig]]:
    """Every combination of lengths and values, by ascending length."""
    common = {field.name: getattr(asked, field.name) for field in fields(LighthouseConfig) if field.name not in SEVERAL}
    values = {name: getattr(asked, name) or [getattr(LighthouseConfig, name)] for name in SEVERAL}
    names = ("num_levels", "pooling_factor", "top_k")
    if asked.preset:
        sizes = PRESETS[asked.preset]
    else:
        sizes = list(product(sorted(set(asked.lengths)), *(values[name] for name in names)))
    settings = []
    for num_tokens, *numbers in sizes:
        for scorer, selection, rotate in product(values["scorer"], values["selection"], values["rotate"]):
            chosen: dict[str, Any] = dict(zip(names, numbers, strict=True))
            config = LighthouseConfig(**common, **chosen, scorer=scorer, selection=selection, rotate=rotate)
            # refuses what cannot be numbered
            config.pyramid(num_tokens)
            settings.append((num_tokens, config))
    return settings


def _local_settings(asked: Namespace) -> list[tuple[int, WindowSetting]]:
    """Every combination of lengths, windows and sinks, by ascending length."""
    windows, sinks = asked.window or WINDOWS[asked.device], asked.sink_tokens or [0]
    if min(windows) < 1:
        raise ValueError(f"--window must be at least 1, got {min(windows)}")
    if min(sinks) < 0:
        raise ValueError(f"--sink_tokens must be at least 0, got {min(sinks)}")
    sizes = product(sorted(set(asked.lengths)), windows, sinks)
    return [(num_tokens, WindowSetting(asked.type, window, sink, asked.sdpa)) for num_tokens, window, sink in sizes]
