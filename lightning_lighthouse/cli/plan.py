"""`lighthouse plan`: what a recipe will take, phase by phase, before anything trains."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule

from lightning_lighthouse.attention.layer_types import DENSE, LIGHTHOUSE, spread_over
from lightning_lighthouse.bench.card_speeds import CARDS, CardSpeed
from lightning_lighthouse.bench.step_estimate import LayerPlan, ModelSize, StepEstimate, estimate_step, model_size
from lightning_lighthouse.bench.steps import time_steps
from lightning_lighthouse.checks import is_named, quoted
from lightning_lighthouse.cli.check import RecipeCheck
from lightning_lighthouse.cli.fit import drop_notices
from lightning_lighthouse.cli.parser import Parser
from lightning_lighthouse.cli.recipe import UsageError, split_own
from lightning_lighthouse.cli.recipes import require_recipe
from lightning_lighthouse.huggingface.fused_loss import LACKS, is_fused_on_cuda
from lightning_lighthouse.model.language_model import LanguageModel
from lightning_lighthouse.notices import quiet_lightning
from lightning_lighthouse.phases.phase import Phase
from lightning_lighthouse.phases.plan import resolve_phases
from lightning_lighthouse.routing.targets import choose_routed, find_targets
from lightning_lighthouse.training.callback import LighthouseCallback

DESCRIPTION = (
    "Say what a recipe will take before it trains: parameters, tokens, steps of each phase, and of a step the FLOPs by "
    "part, the time, and the memory; dense training beside it, and from which length on its first phase pays. Times "
    "are estimates from what was measured on a card, or measured here with --probe. Flags with a dot, "
    "--data.seq_len 65536, change the recipe."
)
LENGTHS = [2**power for power in range(10, 21)]
# batches that are timed of each phase
PROBED = 3


class Part(NamedTuple):
    """A phase, or dense training all along.

    Args:
        name: In words.
        layers: How each layer attends.
        steps: Optimizer steps.
        phase: As the settings name it; None for the dense one.
    """

    name: str
    layers: list[LayerPlan]
    steps: int
    phase: Phase | None


class Run(NamedTuple):
    """What a recipe asks for.

    Args:
        module: The model, on the meta device.
        size: Its sizes.
        parts: The phases, the dense one last.
        num_tokens: N, of a sequence.
        batch_size: Sequences of a batch.
        accumulated: Batches of a step.
        devices: Ranks that train.
        shards: Ranks that the parameters are spread over.
        sharers: Ranks that share a sequence.
        recomputes: Whether blocks are computed again in the backward pass.
        is_compiled: Whether they are compiled.
        loss_chunk: Tokens whose logits are in memory at a time; 0: few.
    """

    module: LightningModule
    size: ModelSize
    parts: list[Part]
    num_tokens: int
    batch_size: int
    accumulated: int
    devices: int
    shards: int
    sharers: int
    recomputes: bool
    is_compiled: bool
    loss_chunk: int

    def estimate(self, layers: Sequence[LayerPlan], speed: CardSpeed | None, **changes: Any) -> StepEstimate:
        """A step of these layers."""
        told = {name: getattr(self, name) for name in ("accumulated", "recomputes", "shards", "sharers", "loss_chunk")}
        told |= changes
        num_tokens, batch_size = told.pop("num_tokens", self.num_tokens), told.pop("batch_size", self.batch_size)
        return estimate_step(self.size, layers, num_tokens, batch_size, speed, **told)


class Planned(RecipeCheck):
    """Builds what `fit` would, and trains nothing."""

    def read(self) -> Run:
        """What the recipe asks for.

        Raises:
            UsageError: It leaves open what the plan follows from.
        """
        callback, data, trainer = self.built.lighthouse, self.built.data, self.built.trainer
        num_tokens = getattr(data, "seq_len", None)
        if num_tokens is None:
            raise UsageError("plan needs the length of the sequences: data whose seq_len is known")
        if trainer.max_steps < 1:
            raise UsageError("plan needs the number of steps: set trainer.max_steps")
        try:
            layers = find_targets(self.model, callback.select)
            size = model_size(self.model, list(layers.values()))
        except ValueError as error:
            raise UsageError(f"plan cannot read the model's sizes: {error}") from None
        ranks = _num_devices(trainer.devices) * trainer.num_nodes
        settings = _settings_of(self.model)
        return Run(
            self.model,
            size,
            _parts(callback, layers, trainer.max_steps),
            num_tokens,
            getattr(data, "batch_size", None) or 1,
            trainer.accumulate_grad_batches,
            ranks,
            ranks if _shards(trainer.strategy) else 1,
            _sharers(trainer.strategy, ranks),
            settings.get("checkpoint") == "block" or settings.get("activation_checkpointing") is True,
            bool(settings.get("compile")),
            _loss_chunk(settings),
        )


def _settings_of(module: LightningModule) -> dict[str, Any]:
    """What is in force; a class derived from one of ours records other arguments than those that it passes on."""
    return module.own_settings if isinstance(module, LanguageModel) else dict(module.hparams)


def _loss_chunk(settings: dict[str, Any]) -> int:
    """Tokens whose logits a model of transformers holds at a time, unless its loss is fused; else few are held."""
    backend = settings.get("loss_backend")
    return 0 if backend is None or is_fused_on_cuda(backend) else int(settings["loss_chunk"])


def _num_devices(devices: Any) -> int:
    """How many GPUs of a node `Trainer(devices=...)` means; 1 where that is this machine's matter."""
    # "2" is two of them, and "2," that of this number
    named = devices.split(",") if isinstance(devices, str) and "," in devices else devices
    if isinstance(named, list):
        return sum(bool(str(name).strip()) for name in named)
    text = str(devices)
    return int(text) if text.isdecimal() and int(text) > 0 else 1


def _shards(strategy: Any) -> bool:
    """Whether a strategy, or what the Trainer knows it by, spreads the parameters over the ranks."""
    return is_named(strategy, "ModelParallelStrategy") or any(word in str(strategy) for word in ("FSDP", "ModelPar"))


def _sharers(strategy: Any, ranks: int) -> int:
    sharers: int = getattr(strategy, "context_parallel_size", 1)
    if sharers < 1 or ranks % sharers:
        raise UsageError(f"context_parallel_size must divide the {ranks} ranks, got {sharers}")
    return sharers


def main(argv: Sequence[str]) -> int:
    """Run `lighthouse plan`; returns the exit status."""
    own, overrides = split_own(argv)
    arguments = _parser().parse_args(own)
    recipe = [*(item for file in [*arguments.recipe, *arguments.config] for item in ("-c", file)), *overrides]
    if arguments.repeats < 1:
        raise UsageError(f"--repeats must be at least 1, got {arguments.repeats}")
    drop_notices()
    require_recipe("plan", recipe)
    with quiet_lightning(), torch.device("meta"):
        run = Planned(recipe).read()
    if arguments.probe and run.sharers > 1:
        raise UsageError(f"--probe measures one GPU, and {run.sharers} share each sequence: leave --probe out")
    here = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    card = arguments.card or here
    speed = CARDS.get(card or "")
    if arguments.card is not None and speed is None:
        raise UsageError(f"--card must be one of {', '.join(CARDS)}, got {quoted(arguments.card)}")
    _print_run(run, card, speed, arguments.probe)
    measured = _probe(run, recipe, arguments.repeats) if arguments.probe else {}
    _print_table(run, speed, measured)
    for line in [*_fits(run, card, speed), *_pays(run, speed), *_limits(run, card, speed, bool(measured))]:
        print(line)
    return 0


def _parser() -> Parser:
    parser = Parser(prog="lighthouse plan", description=DESCRIPTION)
    parser.add_argument("recipe", nargs="*", help="a recipe, and what is laid over it")
    parser.add_argument("-c", "--config", action="append", default=[], metavar="RECIPE", help="the same")
    parser.add_argument("--card", help=f"estimate for this one: {', '.join(CARDS)} (default: this machine's)")
    parser.add_argument("--probe", action="store_true", help="measure steps of each phase on this machine's device")
    parser.add_argument("--repeats", type=int, default=PROBED, help=f"batches that --probe times (default: {PROBED})")
    return parser


def _parts(callback: LighthouseCallback, layers: dict[str, Any], max_steps: int) -> list[Part]:
    phases = list(callback.phases_for(layers)) if callback.enabled else []
    routed = choose_routed(layers, callback.dense_layers) if phases else {}
    parts, begun = [], 0
    for phase, planned in zip(phases, resolve_phases(phases, max_steps), strict=True):
        types = spread_over(phase.layer_types, len(layers))
        config = phase.attention or callback.attention
        plans = [
            LayerPlan(kind, config, phase.window, phase.sink_tokens) if name in routed else LayerPlan(DENSE, config)
            for name, kind in zip(layers, types, strict=True)
        ]
        end = min(planned.end, max_steps)
        parts.append(Part(planned.name, plans, max(0, end - begun), phase))
        begun = max(begun, end)
    return [*parts, Part(DENSE, [LayerPlan(DENSE, callback.attention)] * len(layers), max_steps - begun, None)]


def _print_run(run: Run, card: str | None, speed: CardSpeed | None, is_probed: bool) -> None:
    tokens = run.num_tokens * run.batch_size * run.accumulated * run.devices // run.sharers
    steps = sum(part.steps for part in run.parts)
    shared = f", {run.sharers} share each sequence" if run.sharers > 1 else ""
    again = f", {run.accumulated} of them a step" if run.accumulated > 1 else ""
    print(
        f"{type(run.module).__name__}: {run.size.num_parameters / 1e6:,.1f}M parameters, "
        f"{len(run.size.attention)} attention layers; {run.batch_size} x {run.num_tokens:,} tokens a batch{again}, "
        f"{run.devices} GPU{'s' * (run.devices > 1)}{shared}; {steps:,} steps, {steps * tokens / 1e6:,.1f}M tokens"
    )
    if not is_probed:
        how = "estimated from what was measured on it" if speed is not None else "no times: nothing was measured on it"
        print(f"{card}: {how}" if card else f"no GPU here: times with --card {' or '.join(map(repr, CARDS))}")


def _print_table(run: Run, speed: CardSpeed | None, measured: dict[str, tuple[float, float | None]]) -> None:
    head = ["phase", "steps", "products", "attention", "step ms", "hours", "GiB", "of dense"]
    rows, hours = [head], []
    alone = Part("dense all along", run.parts[-1].layers, sum(part.steps for part in run.parts), None)
    dense_seconds = _seconds(run, alone, speed, measured)
    for part in [*run.parts, alone]:
        found = run.estimate(part.layers, speed)
        seconds = _seconds(run, part, speed, measured)
        spent = None if seconds is None else seconds * part.steps / 3600
        if part is not alone:
            hours.append(spent)
        memory = measured.get(_key(part), (0.0, None))[1] or found.memory_gib
        rows.append(
            [
                part.name,
                f"{part.steps:,}",
                f"{(found.flops['blocks'] + found.flops['head']) / 1e12:,.3g}",
                f"{found.flops['attention'] / 1e12:,.3g}",
                _shown(seconds and seconds * 1e3, ",.0f"),
                _shown(spent, ",.3g"),
                f"{memory:,.1f}",
                _shown(seconds and dense_seconds and seconds / dense_seconds, ".2f"),
            ]
        )
    known = [hour for hour in hours if hour is not None]
    share = sum(known) * 3600 / (dense_seconds * alone.steps) if dense_seconds and len(known) == len(hours) else None
    blank = ["", "", ""]
    rows.insert(
        -1, ["in all", f"{alone.steps:,}", *blank, _shown(sum(known) or None, ",.3g"), "", _shown(share, ".2f")]
    )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    print("\nTFLOP a step on a GPU, by products and by attention:")
    for name, *texts in rows:
        cells = [text.rjust(width) for text, width in zip(texts, widths[1:], strict=True)]
        print("  ".join([name.ljust(widths[0]), *cells]))
    print()


def _key(part: Part) -> str:
    return DENSE if part.phase is None else part.name


def _seconds(
    run: Run, part: Part, speed: CardSpeed | None, measured: dict[str, tuple[float, float | None]]
) -> float | None:
    if _key(part) in measured:
        return measured[_key(part)][0] / 1e3 * run.accumulated
    return run.estimate(part.layers, speed).step_seconds


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _fits(run: Run, card: str | None, speed: CardSpeed | None) -> list[str]:
    """Whether it fits, and what would make it fit."""
    if speed is None:
        return []
    need = max(run.estimate(part.layers, speed).memory_gib for part in run.parts if part.steps)
    if need <= speed.memory_gib:
        return [f"fits: {need:,.1f} of {speed.memory_gib:,.1f} GiB"]
    remedies: dict[str, dict[str, Any]] = {
        "blocks recomputed (checkpoint: block, or activation_checkpointing: true)": {"recomputes": True},
        f"batch_size 1 and accumulate_grad_batches {run.batch_size * run.accumulated}": {"batch_size": 1},
        "both": {"recomputes": True, "batch_size": 1},
    }
    lines = [f"does not fit: {need:,.1f} GiB, {card} has {speed.memory_gib:,.1f}"]
    for words, changes in remedies.items():
        least = max(run.estimate(part.layers, speed, **changes).memory_gib for part in run.parts if part.steps)
        if least < need:
            lines.append(f"  with {words}: {least:,.1f} GiB{'' if least <= speed.memory_gib else ', still too much'}")
    return lines


def _pays(run: Run, speed: CardSpeed | None) -> list[str]:
    """From which length on the first phase is faster than dense."""
    first = run.parts[0]
    if speed is None or first.phase is None:
        return []
    for num_tokens in LENGTHS:
        cheap, dense = (
            run.estimate(layers, speed, num_tokens=num_tokens).step_seconds or 0.0
            for layers in (first.layers, run.parts[-1].layers)
        )
        if cheap < 0.95 * dense:
            return [f"{quoted(first.name)} is faster than dense from {num_tokens:,} tokens on, by these estimates"]
    return [f"{quoted(first.name)} is not faster than dense at any length up to {LENGTHS[-1]:,} tokens"]


def _limits(run: Run, card: str | None, speed: CardSpeed | None, is_probed: bool) -> list[str]:
    lines = []
    if speed is not None and not run.is_compiled and not is_probed:
        lines.append("estimates are those of compiled blocks, and this model's are not: expect more, or --probe")
    if run.devices > 1:
        lines.append("what GPUs say to each other is not counted")
    uneven = [heads[1] for heads in run.size.heads if heads is not None and heads[1] % run.sharers]
    if uneven:
        lines.append(
            f"{run.sharers} GPUs cannot share {uneven[0]} key/value heads out: they share out the queries too, and "
            "keep keys and values of the whole sequence"
        )
    if run.loss_chunk and _settings_of(run.module)["loss_backend"] == "auto":
        lines.append(f"the logits of {run.loss_chunk:,} tokens are counted: {LACKS}")
    configs = {layer.config for part in run.parts for layer in part.layers if layer.layer_type == LIGHTHOUSE}
    if not all(config.pyramid(run.num_tokens).compresses for config in configs):
        lines.append(f"Lighthouse gains nothing at {run.num_tokens:,} tokens, and runs dense")
    return lines


def _probe(run: Run, recipe: Sequence[str], repeats: int) -> dict[str, tuple[float, float | None]]:
    """Measured ms of a batch, and memory in GiB, of each phase."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = {}
    for part in run.parts:
        with quiet_lightning():
            built = Planned(recipe)
        callback, trainer = built.built.lighthouse, built.built.trainer
        settings: dict[str, Any] = {"precision": trainer.precision, "gradient_clip_val": trainer.gradient_clip_val}
        how: dict[str, Any] = {"enabled": False}
        if part.phase is not None:
            how = {
                "attention": part.phase.attention or callback.attention,
                "dense_layers": callback.dense_layers,
                "select": callback.select,
                "layer_types": part.phase.layer_types,
                "window": part.phase.window,
                "sink_tokens": part.phase.sink_tokens,
                "hf_assume_causal": callback.hf_assume_causal,
                "rotary": callback.rotary,
            }
        probed = LighthouseCallback(1.0, **how)
        shape = (run.batch_size, run.num_tokens)
        try:
            found[_key(part)] = time_steps(
                built.model, run.size.vocabulary or 256, shape, device, repeats, probed, settings
            )
        except torch.OutOfMemoryError:
            print(f"{part.name}: out of memory here, estimated instead")
        del built
        gc.collect()
    where = torch.cuda.get_device_name() if device.type == "cuda" else "this machine's CPU"
    print(f"measured on {where}: the median of {repeats} batches behind the first")
    return found
