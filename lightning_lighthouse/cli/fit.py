"""The commands `fit`, `validate` and `test`, on top of LightningCLI."""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml  # type: ignore[import-untyped]
from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_lighthouse.cli.checkpoints import loaded_as_data, resolve_checkpoint
from lightning_lighthouse.cli.layer_check import check_layers
from lightning_lighthouse.cli.recipe import HELP_ALL, TRUSTED_ONLY, UsageError, asks_help, read, split
from lightning_lighthouse.cli.recipe_check import Checker
from lightning_lighthouse.cli.refused_logs import no_trace_of_a_refusal
from lightning_lighthouse.cli.trust import classes, deny_imports, strays
from lightning_lighthouse.cli.weights import LoadWeights
from lightning_lighthouse.data.workers import shield_workers
from lightning_lighthouse.model.language_model import LanguageModel
from lightning_lighthouse.notices import shown_notices
from lightning_lighthouse.runs.checkpoint import Checkpoint
from lightning_lighthouse.runs.run_folder import run_folder
from lightning_lighthouse.runs.saving import save_text
from lightning_lighthouse.runs.step_boundary import saves_on_exceptions
from lightning_lighthouse.training.callback import LighthouseCallback

MODEL = "lightning_lighthouse.model.Decoder"
DATA = "lightning_lighthouse.LighthouseRecipe"
LOGGER = "lightning.pytorch.loggers.TensorBoardLogger"
RUNS = "runs"
# what Trainer takes without a word, and then divides by or ignores
TRAINER_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "val_check_interval": (lambda value: not isinstance(value, int | float) or value > 0, "greater than 0"),
    "log_every_n_steps": (lambda value: value >= 0, "at least 0"),
    "gradient_clip_val": (lambda value: value >= 0, "at least 0"),
    "accumulate_grad_batches": (lambda value: value >= 1, "at least 1"),
    "check_val_every_n_epoch": (lambda value: value >= 1, "at least 1"),
    "num_nodes": (lambda value: value >= 1, "at least 1"),
    "devices": (lambda value: value not in (0, "0", []), "at least 1"),
}

# Lightning's and torch's notices that ask nothing of the user, word for word
LOGGED_NOTICES = {
    "\U0001f4a1 Tip: For seamless cloud logging and experiment tracking, try installing "
    "[litlogger](https://pypi.org/project/litlogger/) to enable LitLogger, which logs metrics and artifacts "
    "automatically to the Lightning Experiments platform.",
    "\U0001f4a1 Tip: For seamless cloud uploads and versioning, try installing "
    "[litmodels](https://pypi.org/project/litmodels/) to enable LitModelCheckpoint, which syncs automatically with "
    "the Lightning model registry.",
}
WARNED_NOTICES = (
    "`isinstance(treespec, LeafSpec)` is deprecated, use `isinstance(treespec, TreeSpec) and treespec.is_leaf()` "
    "instead.",
    "Your `IterableDataset` has `__len__` defined. In combination with multi-process data loading (when num_workers > "
    "1), `__len__` could be inaccurate if each worker is not configured independently to avoid having duplicate data.",
)


class SaveRecipe(SaveConfigCallback):
    """Writes the resolved recipe into the log folder of a training run."""

    # until then a run may be refused, and leaves nothing
    has_started = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write nothing yet: a run that is refused leaves the recipe of the one before."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write `config.yaml`."""
        self.has_started = True
        # without a logger the folder is the current one, and config.yaml there is the user's
        if trainer.loggers:
            path = os.path.join(run_folder(trainer), self.config_filename)
            if trainer.is_global_zero:
                save_text(self.parser.dump(self.config, skip_none=False), path)


class Parser(LightningArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise instead of printing the usage."""
        if self.exit_on_error:
            raise UsageError(" ".join(message.split())) from ex
        super().error(message, ex)


class LighthouseCLI(LightningCLI):
    """LightningCLI with the groups `lighthouse` and `checkpoint`, and one line for each mistake.

    Args:
        command: "fit", "validate" or "test".
        arguments: What follows it.
    """

    # weights that Lightning cannot load, for an evaluation
    weights: Path | None = None

    def __init__(self, command: str, arguments: Sequence[str]) -> None:
        # Lightning's Timer has an enum as default, which PyYAML does not know, and jsonargparse writes defaults down
        yaml.SafeDumper.add_multi_representer(Enum, lambda dumper, value: dumper.represent_data(value.value))
        self.command = command
        self.trusted_only = TRUSTED_ONLY in arguments
        arguments = [
            "--help" if argument == HELP_ALL else argument for argument in arguments if argument != TRUSTED_ONLY
        ]
        if self.trusted_only:
            deny_imports()
        files = [] if asks_help(arguments) else split(arguments)[0]
        logger = {
            "class_path": LOGGER,
            "init_args": {
                "save_dir": RUNS,
                "name": "-".join(Path(file).stem for file in files) or "run",
                "default_hp_metric": False,
            },
        }
        # argparse would take any prefix for the key, and a usage of all keys fills two screens
        usage = f"lighthouse {command} [-c RECIPE.yaml ...] [--KEY VALUE ...]"
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=SaveRecipe,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={"logger": logger},
            seed_everything_default=42,
            parser_class=Parser,
            parser_kwargs={
                "prog": "lighthouse",
                "allow_abbrev": False,
                command: {"allow_abbrev": False, "usage": usage},
            },
            auto_configure_optimizers=False,
            args=[command, *arguments],
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The command that was given: a parser of each would take three times as long to make."""
        return {self.command: LightningCLI.subcommands()[self.command]}

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Our groups come first: in `--help`, the Trainer's sixty options would bury them."""
        parser.add_lightning_class_args(LighthouseCallback, "lighthouse")
        super().add_core_arguments_to_parser(parser)
        parser.set_defaults({"model": {"class_path": MODEL}, "data": {"class_path": DATA}})
        parser.add_class_arguments(Checkpoint, "checkpoint")
        parser.set_defaults(
            {
                "checkpoint.monitor": "val/loss",
                "checkpoint.filename": "best",
                "checkpoint.save_last": True,
                # best.ckpt and last.ckpt are written over, not numbered
                "checkpoint.enable_version_counter": False,
            }
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Check every key and value, then parse: recipes first, so that flags win wherever they stand."""
        command, *arguments = args
        if asks_help(arguments):
            self.config = parser.parse_args(args)
            return
        files, flags = split(arguments)
        checker = Checker(self._parser(command), trusted_only=self.trusted_only)
        usual = {group: checker.classes[group] for group in ("model", "data")}
        good: dict[str, Any] = {}
        layers: list[str] = []
        for file in files:
            before = len(checker.lists)
            _merge(good, checker.recipe(read(file)))
            layers += [*_emptied(checker.lists, before), "--config", file]
        for key, text in flags:
            before = len(checker.lists)
            _merge(good, checker.flag(key, text))
            layers += [*(() if key.endswith("+") else _emptied(checker.lists, before)), f"--{key}={text}"]
        for group, cls in checker.classes.items():
            # another class than the usual one has its own defaults, also of arguments that both have
            if group in usual and cls is not usual[group]:
                self._parser(command).set_defaults({group: {"class_path": f"{cls.__module__}.{cls.__qualname__}"}})
        printing = [argument for argument in arguments if argument.startswith("--print_config")]
        if not printing:
            checker.missing()
        self.refuse(*checker.problems)
        if checker.problems:
            # what is right may be built, and then says more
            try:
                self.config = parser.parse_object({command: good})
            except UsageError:
                raise UsageError(*checker.problems) from None
            return
        self.config = parser.parse_args([command, *layers, *printing])
        self.refuse(*strays(self.config[command]), *_risks(self.config[command]))

    def refuse(self, *problems: str) -> None:
        """Stop at the first problem; `check` goes on to the next."""
        if problems:
            raise UsageError(problems[0])

    def _parse_ckpt_path(self) -> None:
        # LightningCLI would let the hyperparameters in a checkpoint win over the recipe
        pass

    def before_instantiate_classes(self) -> None:
        """Find the checkpoint of `--ckpt_path last`, and set what is the command line's business."""
        # a copy: what is written to config.yaml stays as it was asked for
        self.built = self.config[self.command].clone()
        self.weights = resolve_checkpoint(self.command, self.built)
        self.built.weights_only = True
        if torch.cuda.is_available():
            torch.set_float32_matmul_precision("high")

    def instantiate_classes(self) -> None:
        """Build one group after the other, so that a refused value can be named with its group."""
        built = self.built
        for group in ("lighthouse", "checkpoint", "data", "trainer", "model"):
            if group == "model":
                self._tell_length()
            with self._refusals(group):
                alone = Namespace({"subcommand": self.command, self.command: Namespace({group: built[group]})})
                built[group] = _instantiate(self.parser, alone)[self.command][group]
        self.config_init = Namespace({"subcommand": self.command, self.command: built})
        self.model, self.datamodule = built.model, built.data
        with self._refusals("lighthouse"):
            self._check_layers(built.lighthouse)
        with self._refusals("model"):
            self._check_vocabulary()
        with self._refusals("trainer"):
            for name, (is_right, allowed) in TRAINER_RANGES.items():
                value = built.trainer[name]
                if value is not None and not is_right(value):
                    raise ValueError(f"{name} must be {allowed}, got {value}")
            self._check_callbacks(built.trainer.callbacks)
            self.trainer = self.instantiate_trainer()

    def _tell_length(self) -> None:
        """Give a model that asks for the length of its sequences that of the data, unless the recipe says another."""
        settings = self.built.model.get("init_args")
        if settings is not None and "sequence_length" in settings and settings.sequence_length is None:
            settings.sequence_length = getattr(self.built.data, "seq_len", None)

    def _check_callbacks(self, given: Any) -> None:
        for callback in given if isinstance(given, list) else [given]:
            if saves_on_exceptions(callback):
                raise ValueError(
                    f"callbacks must save nothing on exceptions, got {type(callback).__name__}: a step is incomplete "
                    "then; set checkpoint.every_n_train_steps"
                )

    def _check_layers(self, callback: LighthouseCallback) -> None:
        """Refuse before any folder is made what the callback would refuse at fit start."""
        # `check` goes on when the callback or the model was refused
        if not isinstance(callback, LighthouseCallback) or not isinstance(self.model, LightningModule):
            return
        if self.command != "fit" or not callback.enabled:
            return
        check_layers(callback, self.model, getattr(self.datamodule, "seq_len", None))

    def _check_vocabulary(self) -> None:
        """Refuse before any text is read what the model would refuse once the data is prepared."""
        if not isinstance(self.model, LanguageModel):
            return
        can_tell = False
        # what is wrong with a tokenizer or a manifest is said where the data is looked at
        with suppress(OSError, ImportError, ValueError):
            getattr(self.datamodule, "vocab_size", None)
            can_tell = True
        if can_tell:
            self.model.check_data(self.datamodule)

    def _run_subcommand(self, subcommand: str) -> None:
        # also where neither the data nor the callbacks are ours
        shield_workers(self)
        with no_trace_of_a_refusal(self.trainer), loaded_as_data(self.weights or self.built.ckpt_path):
            super()._run_subcommand(subcommand)

    def _set_seed(self) -> None:
        seed = self.config[self.command].seed_everything
        if type(seed) is int and not 0 <= seed < 2**32:
            self.refuse(f"seed_everything must be from 0 to {2**32 - 1}, got {seed}")
        else:
            super()._set_seed()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the Trainer, with a checkpoint callback unless checkpoints are off."""
        given = self.built.trainer.callbacks or []
        callbacks = list(given) if isinstance(given, list) else [given]
        if self.built.trainer.enable_checkpointing is not False:
            callbacks.append(self.built.checkpoint)
        if self.weights is not None:
            callbacks.append(LoadWeights(self.weights))
        return super().instantiate_trainer(**{"callbacks": callbacks, **kwargs})

    @contextmanager
    def _refusals(self, group: str) -> Iterator[None]:
        """Turn a constructor's refusal into a line that begins with the key."""
        try:
            yield
        except Exception as error:
            # jsonargparse wraps what a class in a union raises
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            if not isinstance(cause, (ValueError, TypeError, RuntimeError, MisconfigurationException)):
                raise cause from None
            name, _, rest = " ".join(str(cause).split()).partition(" ")
            settings = self.config[self.command][group]
            # an item of a list is named with its place
            head = name.partition("[")[0]
            keys = [key for key, _ in settings.items() if key.split(".")[-1] == head]
            within = name.removeprefix(head)
            self.refuse(f"{group}.{keys[0]}{within} {rest}" if keys else f"{group}: {name} {rest}")


def run(command: str, arguments: Sequence[str]) -> int:
    """Run `fit`, `validate` or `test`.

    Args:
        command: Which of them.
        arguments: What follows it.

    Returns:
        0; everything else is an exception.
    """
    drop_notices()
    with shown_notices():
        LighthouseCLI(command, arguments)
    return 0


def _instantiate(parser: LightningArgumentParser, config: Namespace) -> Namespace:
    # renamed in jsonargparse 4.49
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    return instantiate(config)


def _risks(config: Namespace) -> Iterator[str]:
    """Settings that would spoil a resumed run, or load code."""
    callbacks = classes("trainer.callbacks", config.trainer.callbacks)
    for key, group in [("checkpoint", config.checkpoint), *callbacks]:
        if group.get("save_on_exception"):
            yield (
                f"{key}.save_on_exception must be false, got True: after an exception a step is incomplete, and a run "
                "resumed from it would skip a batch; set checkpoint.every_n_train_steps"
            )
    if config.get("weights_only") is False:
        yield "weights_only must be true or null, got False: no checkpoint is loaded as code"


def _emptied(lists: Sequence[str], before: int) -> Iterator[str]:
    """Flags that empty the lists of an earlier layer that one from number `before` on is to replace.

    Between lists of equal length jsonargparse would keep what an item of the later one leaves out, as the weight of a
    source: that of another one.
    """
    for key in lists[before:]:
        if "[" not in key and key in lists[:before]:
            yield f"--{key}=[]"


def _merge(base: dict[str, Any], top: dict[str, Any]) -> None:
    """Lay `top` over `base`, key by key."""
    for key, value in top.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            _merge(base[key], value)
        else:
            base[key] = value


def drop_notices() -> None:
    """Keep from the screen what asks nothing of the user."""
    for module in ("pytorch.utilities.rank_zero", "fabric.utilities.rank_zero", "fabric.utilities.seed"):
        logging.getLogger(f"lightning.{module}").addFilter(_is_news)
    for notice in WARNED_NOTICES:
        warnings.filterwarnings("ignore", message=f"{re.escape(notice)}$")


def _is_news(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return message not in LOGGED_NOTICES and not re.fullmatch(r"(\[rank: \d+\] )?Seed set to \d+", message)
