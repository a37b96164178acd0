"""`lighthouse check`: parses and builds what `fit` would, notes every problem, and trains nothing.

Of data that is prepared it also says how long attention is inside its documents, and what Lighthouse can gain there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.strategies import StrategyRegistry

from lightning_lighthouse.attention.layer_types import WINDOW
from lightning_lighthouse.bench.document_estimate import describe, estimate
from lightning_lighthouse.checks import SettingError, quoted
from lightning_lighthouse.cli.fit import LighthouseCLI, drop_notices
from lightning_lighthouse.cli.recipe import HELP_ALL, SWITCHES, UsageError, asks_help
from lightning_lighthouse.cli.recipes import require_recipe
from lightning_lighthouse.data.document_lengths import sampled_documents
from lightning_lighthouse.data.manifest import is_prepared
from lightning_lighthouse.data.module import LighthouseRecipe
from lightning_lighthouse.data.preparing.sources import find_files
from lightning_lighthouse.data.preparing.token_folder import is_token_folder
from lightning_lighthouse.notices import quiet_lightning
from lightning_lighthouse.phases.phase import Phase
from lightning_lighthouse.phases.plan import resolve_phases
from lightning_lighthouse.phases.schedule import check_return
from lightning_lighthouse.training.callback import LighthouseCallback


class RecipeCheck(LighthouseCLI):
    """Parses and builds what `fit` would, notes every problem, and trains nothing."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self.problems: list[str] = []
        # what is no mistake, and fit would warn of
        self.notes: list[str] = []
        super().__init__("fit", arguments)

    def refuse(self, *problems: str) -> None:
        """Note the problems and go on."""
        self.problems.extend(problems)

    def before_instantiate_classes(self) -> None:
        """Look for no checkpoint: which there are is not the recipe's matter."""
        self.built = self.config[self.command].clone()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the Trainer for one CPU: a recipe is right or wrong wherever it is checked."""
        known = {
            "accelerator": {"auto", "gpu", *AcceleratorRegistry.available_accelerators()},
            "strategy": {"auto", *StrategyRegistry.available_strategies()},
        }
        for name, allowed in known.items():
            value = self.built.trainer[name]
            if isinstance(value, str) and value not in allowed:
                self.refuse(f"trainer.{name} must be one of {', '.join(sorted(allowed))}, got {quoted(value)}")
        here = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto"}
        alone = dict.fromkeys(("callbacks", "plugins", "profiler"))
        return Trainer(**{**vars(self.built.trainer), **here, **alone, "logger": False})

    def after_instantiate_classes(self) -> None:
        """Look at what `fit` would refuse once it has begun, and say what was noted."""
        callback = self.built.lighthouse
        if isinstance(callback, LighthouseCallback) and callback.enabled:
            try:
                self._check_switch(callback)
            except SettingError as error:
                self.refuse(str(error))
        keeps_documents = isinstance(callback, LighthouseCallback) and callback.documents is True
        if keeps_documents and isinstance(self.built.data, LighthouseRecipe) and not self.built.data.document_ids:
            self.refuse("data.init_args.document_ids must be true where lighthouse.documents is, got False")
        if self.problems:
            raise UsageError(*self.problems)

    def _check_switch(self, callback: LighthouseCallback) -> None:
        """Refuse a switch that cannot be, as far as the number of steps is known without the data."""
        trainer = self.built.trainer
        if trainer.max_epochs not in (None, -1) or trainer.fast_dev_run:
            return
        # without epochs or steps Lightning's count is infinite
        is_endless = trainer.max_epochs == -1 or trainer.max_time is not None
        if trainer.max_steps > 0 or is_endless:
            planned = resolve_phases(callback.phases_for(), trainer.max_steps if trainer.max_steps > 0 else math.inf)
            begins = planned[-2].end if len(planned) > 1 else 0
            check_return(callback.return_steps, planned[-1].end, begins)
            if 0 < trainer.max_steps <= planned[-1].end:
                self.notes.append(f"{trainer.max_steps:,} steps end before the switch at step {planned[-1].end:,}")

    def fit(self, **kwargs: Any) -> None:
        """Train nothing."""

    def missing_sources(self) -> list[str]:
        """What `fit` would not find here of the text that it is to prepare, a line each.

        No mistake in the recipe, which may be checked where its text is not.
        """
        data = self.built.data
        if not isinstance(data, LighthouseRecipe) or is_prepared(data.folder):
            return []
        lines = []
        sources = [source.path for source in data.sources or ()]
        for path in (*sources, data.source, data.validation_source, data.test_source):
            if path is not None and not is_token_folder(Path(path)):
                try:
                    find_files(path)
                except FileNotFoundError as error:
                    lines.append(f"fit would end here, nothing is prepared in {data.folder}: {error}")
        return lines

    def describe_documents(self) -> list[str]:
        """How long attention is inside the documents of data that is prepared already, and what Lighthouse gains.

        Raises:
            FileNotFoundError: A file of the data is missing.
            ValueError: The data is damaged, of other settings than the recipe's, or too little.
            UsageError: `fit` would refuse their batches.
        """
        callback, data = self.built.lighthouse, self.built.data
        if not isinstance(data, LighthouseRecipe) or not is_prepared(data.folder):
            return []
        # data of other settings is not what a training would get: it is refused as there
        data.setup("fit")
        sequences = sampled_documents(data.folder)
        if callback.documents is False and data.document_ids and any(len(lengths) > 1 for lengths in sequences):
            raise UsageError(
                "lighthouse.documents must be true, or 'ignore' to attend across documents, where "
                "data.init_args.document_ids is true and sequences hold several, got False"
            )
        found = estimate(sequences, callback.attention)
        lines = describe(found, are_kept=callback.documents is True)
        if callback.enabled and callback.documents is True:
            lines += _calls_of_windows(sequences, callback.phases_for())
        return lines


def _calls_of_windows(sequences: Sequence[Sequence[int]], phases: Sequence[Phase]) -> list[str]:
    """What many documents cost the windows, in a line; none where they have few calls, or there are none."""
    spans = [(phase.window or 0) + phase.sink_tokens for phase in phases if WINDOW in phase.layer_types]
    if not spans:
        return []
    calls = sum(length > min(spans) for lengths in sequences for length in lengths) / len(sequences)
    if calls <= 1:
        return []
    return [
        f"windows: {calls:,.1f} documents a sequence are longer than the {min(spans):,} tokens that a window spans "
        "with its sinks, and a call each in every such layer; Lighthouse is one for all "
        "(lighthouse.layer_types=[lighthouse])"
    ]


def check(arguments: Sequence[str]) -> int:
    """Run `check`: print "ok", or raise UsageError with every problem found.

    Args:
        arguments: Recipes, with or without `-c`, and flags.

    Returns:
        0.
    """
    if asks_help(arguments):
        print(
            "usage: lighthouse check RECIPE.yaml [-c MORE.yaml ...] [--KEY VALUE ...]\n\n"
            f"Keys: lighthouse fit --help, and all of them: lighthouse fit {HELP_ALL}."
        )
        return 0
    drop_notices()
    given: list[str] = []
    needs_value = False
    for argument in arguments:
        given += [argument] if needs_value or argument.startswith("-") else ["-c", argument]
        # a value may begin with a dash, as -1 does
        needs_value = not needs_value and argument.startswith("-") and "=" not in argument and argument not in SWITCHES
    require_recipe("check", given)
    # the model is built without memory
    with quiet_lightning(), torch.device("meta"):
        built = RecipeCheck(given)
    for line in [*built.notes, *built.missing_sources(), *built.describe_documents()]:
        print(line)
    print("ok")
    return 0
