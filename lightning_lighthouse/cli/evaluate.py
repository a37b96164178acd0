"""`lighthouse evaluate`: what a model can do with long context, by the same code as `LongContextEvaluation`."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_lighthouse.attention.layer_types import DENSE, in_words
from lightning_lighthouse.bars import progress_bar
from lightning_lighthouse.checks import warn
from lightning_lighthouse.cli.checkpoints import contents_of
from lightning_lighthouse.cli.fit import LighthouseCLI, drop_notices
from lightning_lighthouse.cli.parser import DTYPES, Parser
from lightning_lighthouse.cli.recipe import UsageError, plain, read, split_own
from lightning_lighthouse.cli.weights import look_into
from lightning_lighthouse.data.module import LighthouseRecipe
from lightning_lighthouse.data.preparing.sources import find_files, read_documents
from lightning_lighthouse.evaluation.long_context import LongContextEvaluation
from lightning_lighthouse.evaluation.measures import lengths_up_to
from lightning_lighthouse.evaluation.measuring import MEASURES
from lightning_lighthouse.evaluation.plots import plot
from lightning_lighthouse.evaluation.samples import enough
from lightning_lighthouse.huggingface.dtypes import dtype_on
from lightning_lighthouse.huggingface.pretrained import load_pretrained
from lightning_lighthouse.huggingface.reading import is_model, is_name
from lightning_lighthouse.huggingface.tokenizers import PretrainedTokenizer, check_tokenizer
from lightning_lighthouse.notices import quiet_lightning, shown_notices
from lightning_lighthouse.routing.patch import Patch, patch_attention
from lightning_lighthouse.runs.evaluation_record import EVALUATION, model_name, read_evaluations
from lightning_lighthouse.runs.final_weights import FINAL
from lightning_lighthouse.runs.pictures import check_picture
from lightning_lighthouse.runs.record import REPORT
from lightning_lighthouse.runs.saving import check_writable
from lightning_lighthouse.runs.sharded import is_sharded_checkpoint

DESCRIPTION = (
    "Measure what a model can do with long context: loss by position, gain from context, copies, passkey, key-value "
    "lookups, and tasks of your own; written to evaluation.json. The model is that of a run's folder, a checkpoint "
    "(sharded ones too), final.pt, a folder that transformers saved, a name that it can load, or a .gguf file; an "
    "evaluation.json is drawn with --plot. Flags with a dot, --trainer.devices 1, change the recipe."
)
RECIPE = "config.yaml"
CHECKPOINT = Path("checkpoints") / "last.ckpt"


class Target(NamedTuple):
    """What is evaluated.

    Args:
        weights: A checkpoint or final weights; None: `path` is a model of transformers.
        recipe: That of its run, if it is known.
        output: Where the rows belong, if it is a run.
    """

    weights: Path | None
    recipe: Path | None
    output: Path | None


class AttendAs(Callback):
    """Lets the layers attend in one way while the model is evaluated.

    Args:
        settings: Of `patch_attention`.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self._patch: Patch | None = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Patch the model, on."""
        self._patch = patch_attention(pl_module, **self.settings)
        self._patch.on(inference=True)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore it, and say which layers stayed dense."""
        if self._patch is not None:
            missing = self._patch.unrouted()
            self._patch.restore()
            if missing:
                name, reason = next(iter(missing.items()))
                raise RuntimeError(f"--layer_types: {len(missing)} layers stayed dense, the first is {name}: {reason}")


class EvaluateCLI(LighthouseCLI):
    """Builds what `validate` would, and validates with the evaluation alone, on as much text as it needs.

    Args:
        arguments: Recipes and flags.
        callbacks: The evaluation, and what else is to happen.
        target: The weights.
    """

    def __init__(self, arguments: Sequence[str], callbacks: Sequence[Callback], target: Path) -> None:
        self.callbacks = list(callbacks)
        self.evaluation = next(callback for callback in callbacks if isinstance(callback, LongContextEvaluation))
        self.target = target
        self.is_limited = any(item.partition("=")[0] == "--trainer.limit_val_batches" for item in arguments)
        super().__init__("validate", arguments)

    def before_instantiate_classes(self) -> None:
        """Find the weights; log nothing, and keep no other callback of the recipe."""
        super().before_instantiate_classes()
        # they are known to be whole now
        self.evaluation.step = _step(self.target)
        self.built.verbose = False
        self.built.trainer.logger = False
        self.built.trainer.callbacks = self.callbacks
        self.built.trainer.enable_checkpointing = False
        self.built.trainer.enable_progress_bar = False
        self.built.trainer.enable_model_summary = False

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the Trainer, which validates what the evaluation needs: a recipe's limit is its training's."""
        seq_len, batch_size = (getattr(self.datamodule, name, None) for name in ("seq_len", "batch_size"))
        limit = self.built.trainer.limit_val_batches
        is_all = isinstance(limit, float) and limit == 1.0
        if isinstance(seq_len, int) and isinstance(batch_size, int) and not self.is_limited and not is_all:
            longest = max(self.evaluation.lengths or lengths_up_to(seq_len))
            needed = math.ceil(enough(longest, self.evaluation.num_samples) / (seq_len + 1) / batch_size)
            kwargs["limit_val_batches"] = max(needed, limit if isinstance(limit, int) else 0)
        return super().instantiate_trainer(**kwargs)


def main(argv: Sequence[str]) -> int:
    """Run `lighthouse evaluate`; returns the exit status."""
    own, overrides = split_own(argv)
    arguments = _parser().parse_args(own)
    target_path = Path(arguments.target)
    if arguments.plot is not None:
        with _refused_as_usage():
            check_picture(arguments.plot)
    if target_path.name == EVALUATION and target_path.is_file():
        if arguments.plot is None:
            raise UsageError(f"{target_path} is evaluated already: --plot OUT.png draws it")
        found = read_evaluations(target_path)
        plot(found, arguments.plot, _caption(found, target_path.absolute().parent.name))
        return 0
    target = _find(target_path)
    attention = _attention(arguments)
    output = arguments.output or target.output or Path()
    if attention and target.output is not None and arguments.output is None:
        raise UsageError(
            "--layer_types measures another attention than the run's own rows: give --output FOLDER for these"
        )
    check_writable(output)
    read_evaluations(output)
    with _refused_as_usage():
        evaluation = _evaluation(arguments, output)
    evaluation.needs_length = arguments.lengths is not None
    evaluation.notes = {"model": model_name(target_path), "attention": _in_words(attention)}
    callbacks: list[Callback] = [evaluation, *([AttendAs(attention)] if attention else [])]
    drop_notices()
    with shown_notices(), _progress(evaluation):
        if target.weights is None:
            _evaluate_pretrained(target_path, arguments, overrides, evaluation, callbacks)
        else:
            _evaluate_recipe(target.weights, target.recipe, arguments, overrides, callbacks)
    # why there are none was said
    if not evaluation.results:
        return 1
    _finish(evaluation.results, output, target_path, arguments.plot)
    return 0


@rank_zero_only
def _finish(results: Sequence[dict[str, Any]], output: Path, target: Path, picture: Path | None) -> None:
    """Say where it is, and draw it."""
    print(f"{output / EVALUATION}: {len(results)} evaluation of {target}")
    if picture is not None:
        plot(results, picture, _caption(results, target.name))
        print(picture)


def _parser() -> Parser:
    parser = Parser(prog="lighthouse evaluate", description=DESCRIPTION)
    add = parser.add_argument
    add("target", help=f"a run, a checkpoint, {FINAL}, a folder or name of transformers, a .gguf file, or {EVALUATION}")
    add("-c", "--config", action="append", default=[], metavar="RECIPE", help="instead of the run's own config.yaml")
    add("--output", type=Path, help=f"folder for {EVALUATION} (default: the run's, else the current folder)")
    add("--text", help="file, folder or pattern of text, for a model of transformers (default: the recipe's)")
    add("--text_field", default="text", help="the field that holds the text, in JSONL and tables (default: text)")
    lengths = "tokens, those that the text fills (default: 1024, 4096, ... up to the training length)"
    add("--lengths", type=int, nargs="+", help=lengths)
    add("--num_samples", type=int, default=10, help="of each place (default: 10)")
    add("--measures", nargs="+", choices=MEASURES, help="(default: all)")
    add("--own_tasks", nargs="+", metavar="FILE", help='JSON lines with "prompt" and "answer"')
    add("--seed", type=int, default=0, help="of what is drawn (default: 0)")
    add("--layer_types", nargs="+", help="evaluate with other attention than dense, as in phases: window, chunk, ...")
    add("--window", type=int, help="tokens, for window and chunk")
    add("--sink_tokens", type=int, default=0, help="for window")
    add("--dtype", choices=DTYPES, help="of a model of transformers (default: float32; 16 bits on a GPU)")
    known = ("auto", "gpu", *AcceleratorRegistry.available_accelerators())
    add("--accelerator", choices=known, default="auto", help="for a model of transformers (default: auto)")
    add("--plot", type=Path, metavar="OUT.png", help="draw what was found; needs matplotlib")
    return parser


def _find(path: Path) -> Target:
    """What a path holds.

    Raises:
        FileNotFoundError: There is no such path, or a run has no weights yet.
    """
    if is_model(path) or is_name(str(path)):
        return Target(None, None, None)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such run, checkpoint or model")
    is_run = path.is_dir() and not is_sharded_checkpoint(path)
    if not is_run:
        folders = (path.parent, path.parent.parent)
        recipe = next((folder / RECIPE for folder in folders if (folder / RECIPE).is_file()), None)
        return Target(path, recipe, None)
    found = next((path / name for name in (FINAL, CHECKPOINT) if (path / name).exists()), None)
    if found is None:
        raise FileNotFoundError(
            f"{path} holds neither {FINAL} nor {CHECKPOINT}, as a run does, nor config.json, as a model of transformers"
        )
    recipe = path / RECIPE
    return Target(found, recipe if recipe.is_file() else None, path)


def _step(weights: Path) -> int | None:
    """Optimizer steps of a checkpoint, or of final weights by the report beside them; None where neither says."""
    step = look_into(weights).step
    if step is not None or weights.name != FINAL:
        return step
    try:
        step = json.loads((weights.parent / REPORT).read_text(encoding="utf-8")).get("steps")
    except (OSError, ValueError, AttributeError):
        return None
    return step if isinstance(step, int) else None


def _evaluation(arguments: argparse.Namespace, output: Path) -> LongContextEvaluation:
    measures: dict[str, Any] = {name: name in (arguments.measures or MEASURES) for name in MEASURES}
    return LongContextEvaluation(
        lengths=arguments.lengths,
        num_samples=arguments.num_samples,
        own_tasks=arguments.own_tasks,
        seed=arguments.seed,
        output=str(output),
        **measures,
    )


def _attention(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings of `patch_attention`; {} for dense."""
    if arguments.layer_types is None:
        if arguments.window is not None or arguments.sink_tokens:
            raise UsageError("--window and --sink_tokens belong to --layer_types window")
        return {}
    with _refused_as_usage():
        from lightning_lighthouse.attention.layer_types import check_layer_types

        check_layer_types(arguments.layer_types, arguments.window, arguments.sink_tokens)
    return {name: getattr(arguments, name) for name in ("layer_types", "window", "sink_tokens")}


def _in_words(attention: dict[str, Any]) -> str:
    return in_words(**attention) if attention else DENSE


def _caption(evaluations: Sequence[dict[str, Any]], otherwise: str) -> str:
    """What a picture is of: the model and its attention, where the last evaluation says so."""
    last = evaluations[-1] if evaluations else {}
    name = Path(last["model"]).name if last.get("model") else otherwise
    return f"{name}, attention: {last.get('attention', DENSE)}"


def _evaluate_recipe(
    weights: Path,
    recipe: Path | None,
    arguments: argparse.Namespace,
    overrides: list[str],
    callbacks: Sequence[Callback],
) -> None:
    recipes = arguments.config or [recipe]
    if recipes == [None]:
        # of what is no weights a recipe would make none
        contents_of(weights)
        raise UsageError(f"{weights} names no recipe, and there is no {RECIPE} beside it: give -c RECIPE.yaml")
    if arguments.text is not None:
        raise UsageError("--text is for a model of transformers; that of a recipe is --data.source")
    layers = [item for recipe in recipes for item in ("-c", str(recipe))]
    EvaluateCLI([*layers, "--ckpt_path", str(weights), *overrides], callbacks, weights)


def _evaluate_pretrained(
    path: Path,
    arguments: argparse.Namespace,
    overrides: list[str],
    evaluation: LongContextEvaluation,
    callbacks: Sequence[Callback],
) -> None:
    if overrides:
        raise UsageError(f"{overrides[0]} changes a recipe's model or Trainer, and {path} is a model of transformers")
    if (arguments.text is None) == (not arguments.config):
        if is_name(str(path)):
            raise FileNotFoundError(
                f"{path}: no such run, checkpoint or model; one that transformers loads by that name needs text: "
                "--text FILES, or -c RECIPE.yaml"
            )
        raise UsageError("a model of transformers needs text: --text FILES, or -c RECIPE.yaml whose data is read")
    is_on_cpu = arguments.accelerator == "cpu" or not torch.cuda.is_available()
    usual = dtype_on("cpu" if is_on_cpu else "cuda", torch.float32)
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else usual
    evaluation.notes["dtype"] = str(dtype).removeprefix("torch.")
    model, tokenizer = load_pretrained(str(path), dtype)
    evaluation.tokenizer = tokenizer
    evaluation.training_length = model.training_length
    if evaluation.lengths is None:
        evaluation.lengths = lengths_up_to(model.training_length or 4096)
    with quiet_lightning():
        trainer = Trainer(
            accelerator=arguments.accelerator,
            devices=1,
            logger=False,
            callbacks=list(callbacks),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
    if arguments.text is not None:
        if tokenizer is None:
            raise ValueError(f"{path} has no tokenizer to read --text with: give -c RECIPE.yaml whose data has one")
        needed = enough(max(evaluation.lengths), evaluation.num_samples)
        tokens = _tokens(arguments.text, arguments.text_field, tokenizer, needed)
        one: Any = [{"tokens": tokens[None]}]
        trainer.validate(model, DataLoader(one, batch_size=None), verbose=False)
        return
    data = _data(arguments.config)
    if data.vocab_size > model.vocab_size:
        raise ValueError(f"the recipe's data have {data.vocab_size} tokens, {path} knows {model.vocab_size}")
    check_tokenizer(data.tokenizer, str(path), data.end_of_document)
    trainer.validate(model, datamodule=data, verbose=False)


def _tokens(source: str, text_field: str, tokenizer: PretrainedTokenizer, needed: int) -> Tensor:
    """The first tokens of a source, document after document."""
    ids: list[int] = []
    for document in read_documents(find_files(source), text_field):
        # what one token stands for is not known, but hardly less than a byte or more than 16
        ids += tokenizer.encode(document.text[: 16 * needed].decode(errors="ignore").encode())
        if len(ids) >= needed:
            break
    else:
        warn(f"{source} holds {len(ids):,} tokens; {needed:,} would give samples that hardly overlap")
    return torch.tensor(ids[:needed])


def _data(recipes: Sequence[str]) -> LighthouseRecipe:
    """The data of recipes, later ones over earlier ones, for a model that no recipe describes."""
    settings: dict[str, Any] = {}
    for recipe in recipes:
        group = plain(read(recipe)).get("data") or {}
        class_path = group.get("class_path", "LighthouseRecipe")
        if class_path.rpartition(".")[-1] != "LighthouseRecipe":
            raise UsageError(f"{recipe}: data must be a LighthouseRecipe for a model of transformers, got {class_path}")
        settings |= group.get("init_args") or {}
    with _refused_as_usage():
        return LighthouseRecipe(**settings)


@contextmanager
def _refused_as_usage() -> Iterator[None]:
    """What a constructor refuses is a mistake in the arguments."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise UsageError(" ".join(str(error).split())) from None


@contextmanager
def _progress(evaluation: LongContextEvaluation) -> Iterator[None]:
    """Show how many of all samples are done."""
    with progress_bar("Evaluating", unit=" samples") as bar:

        def step(total: int) -> None:
            bar.total = total
            bar.update()

        evaluation.on_sample = step
        yield
