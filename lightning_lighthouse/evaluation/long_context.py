"""LongContextEvaluation: measures, while a run trains, whether the model can use its context."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_lighthouse.checks import LighthouseWarning, SettingError, check_count, check_type, is_named, quoted
from lightning_lighthouse.evaluation.budget import MIN_SAMPLES, Budget
from lightning_lighthouse.evaluation.charts import show
from lightning_lighthouse.evaluation.measures import Material, Unit, lengths_up_to, lengths_within
from lightning_lighthouse.evaluation.measuring import MEASURES, Asked, measure, num_rounds
from lightning_lighthouse.evaluation.samples import Collector, Phrases, Tokenizer
from lightning_lighthouse.evaluation.scoring import Scorer, offers_losses
from lightning_lighthouse.evaluation.undisturbed import Ranks, undisturbed
from lightning_lighthouse.evaluation.validation_count import validation_number
from lightning_lighthouse.phases.events import BatchStart, FitEnd, Switch, phase_events
from lightning_lighthouse.phases.schedule import DENSE
from lightning_lighthouse.runs.evaluation_record import in_words, merged, read_evaluations, write_evaluations
from lightning_lighthouse.runs.run_folder import run_folder

STATE_VERSION = 1
NEEDS_TOKENIZER = ("passkey", "lookups")


class PhasedCallback(Protocol):
    """What the evaluation needs of LighthouseCallback, which it finds in the Trainer by its key."""

    enabled: bool

    def lend_patch(self, trainer: Trainer) -> AbstractContextManager[Any]:
        """The patch, off, outside of training batches."""


class LongContextEvaluation(Callback):
    """Show whether the model can use its context: what it finds, what it copies, and how far back.

        Trainer(callbacks=[LighthouseCallback(switch_at=0.9), LongContextEvaluation()])

    The text is that of the validation, the attention dense, and the samples are the same each time. After every fourth
    validation, right before each switch of the phase and at the end of the training, the rows go to
    `evaluation.json` in the log folder, the scalars `evaluation/*` and a picture of the passkeys to TensorBoard, and a
    line to the log. What is measured: docs/use/evaluation.md. Training and validation are left as they are, random
    numbers included. Under `trainer.validate` it evaluates once. It works without LighthouseCallback, too.

    The module needs `token_losses(inputs, targets)`, all `[batch, tokens]`, in nats, or a `forward(inputs)` that
    returns logits or an object with `.logits`. Validation batches are token ids as `read_text` finds them.

    Args:
        every_n_validations: Validations from one evaluation to the next; 0: only at the switches and at the end.
        lengths: Tokens of the sequences, also more than the model is trained on: such rows are marked. None: 1,024 and
            four times as many again and again, up to the training length. Those that the validation text does not fill
            are left out, with a warning; where it fills none, all of it is a sequence: no training ends for that.
        num_samples: Of each place, all ranks together; ten have all ten digits.
        max_share: Of the run's time that all evaluations together may take. Where `num_samples` would take more, as
            many as fit are taken, and an evaluation for which two are too many is put off; at the switches and at the
            end two are taken whatever they cost. None: no limit.
        loss_by_position: Measure the loss by position.
        context_gain: Measure the loss of a text's end with all text before it, and with less.
        copies: Measure how much cheaper a passage is the second time.
        passkey: Measure whether a digit is found in a long text.
        lookups: Measure whether the right one of 8 numbers is found.
        own_tasks: Files of JSON lines with "prompt" and "answer".
        own_mode: Measure also with the attention of the phase, beside the dense rows, as `own_mode`.
        tokenizer: `encode` turns the bytes of a text into its ids with one behind them that ends a document, as
            `lightning_lighthouse.data.tokenizers.ByteTokenizer` does. None: that of the data module.
        seed: Of what is drawn.
        output: Folder for `evaluation.json`; None: that of the run.

    Raises:
        TypeError: A value has the wrong type.
        ValueError: A value is out of range. During validation: the batches are padded.
        SettingError: At fit start: a module without losses of single tokens, FSDP1, a tokenizer that does not tell
            digits apart, or a file of `own_tasks` that cannot be read.
    """

    def __init__(
        self,
        every_n_validations: int = 4,
        lengths: list[int] | None = None,
        num_samples: int = 10,
        max_share: float | None = 0.03,
        loss_by_position: bool = True,
        context_gain: bool = True,
        copies: bool = True,
        passkey: bool = True,
        lookups: bool = True,
        own_tasks: list[str] | None = None,
        own_mode: bool = False,
        tokenizer: Tokenizer | None = None,
        seed: int = 0,
        output: str | None = None,
    ) -> None:
        asked = (loss_by_position, context_gain, copies, passkey, lookups)
        self.measures = [name for name, is_on in zip(MEASURES, asked, strict=True) if is_on]
        for name, is_on in zip((*MEASURES, "own_mode"), (*asked, own_mode), strict=True):
            check_type(name, is_on, bool)
        check_type("num_samples", num_samples, int)
        check_type("max_share", max_share, int | float | None)
        check_type("seed", seed, int)
        check_type("output", output, str | None)
        self.every_n_validations = check_count("every_n_validations", every_n_validations)
        for name, values, kind in (("lengths", lengths, int), ("own_tasks", own_tasks, str)):
            if values is not None and not (isinstance(values, list) and all(type(item) is kind for item in values)):
                raise TypeError(f"{name} must be a list of {kind.__name__} or None, got {quoted(values)}")
        if lengths is not None and (not lengths or min(lengths) < 8):
            raise ValueError(f"lengths must be at least 8 tokens each, and one of them, got {lengths}")
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}")
        if max_share is not None and not 0 < max_share <= 1:
            raise ValueError(f"max_share must be above 0 and at most 1, got {max_share}")
        if isinstance(tokenizer, str) or (tokenizer and not callable(getattr(tokenizer, "encode", None))):
            raise TypeError(f"tokenizer must have a method encode(text), got {quoted(tokenizer)}")
        if not self.measures and not own_tasks:
            raise ValueError("one of the measures must be on, or own_tasks given")
        self.lengths = None if lengths is None else sorted(set(lengths))
        self.num_samples = num_samples
        self.max_share = max_share
        self.own_tasks = own_tasks
        self.own_mode = own_mode
        self.tokenizer = tokenizer
        self.seed = seed
        self.output = output

        # what `evaluation.json` holds of this run, an evaluation each
        self.results: list[dict[str, Any]] = []
        # of the weights, where no training counts it
        self.step: int | None = None
        # of the model, where the data does not say it
        self.training_length: int | None = None
        # whether it is an error that no length fits: where no training is lost by it
        self.needs_length = False
        # kept beside the rows
        self.notes: dict[str, Any] = {}
        # called behind each sample with how many there are in all
        self.on_sample: Callable[[int], None] = lambda total: None
        self._budget = Budget(max_share)
        self._num_validations = 0
        self._lighthouse: PhasedCallback | None = None
        self._phase = DENSE
        self._phrases: Phrases | None = None
        # of the validation that runs, and that of the first whole one
        self._collecting: Collector | None = None
        self._collected: Collector | None = None
        self._subscriptions: list[Callable[[], None]] = []
        self._stage = "fit"
        self._told: set[str] = set()

    @property
    def state_key(self) -> str:
        """Key of the state in a checkpoint."""
        return "LongContextEvaluation"

    def state_dict(self) -> dict[str, Any]:
        """The evaluations so far, the validations counted, and the time spent."""
        return {
            "version": STATE_VERSION,
            "results": self.results,
            "num_validations": self._num_validations,
            "budget": self._budget.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the evaluations of a resumed run."""
        if self._stage != "fit":
            return
        if (version := state_dict.get("version")) != STATE_VERSION:
            raise ValueError(
                f"the checkpoint's LongContextEvaluation state must have version {STATE_VERSION}, got {version}"
            )
        self.results = list(state_dict["results"])
        self._num_validations = state_dict["num_validations"]
        self._budget.load_state_dict(state_dict["budget"])

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot be measured."""
        self._stage = stage
        self._collecting = self._collected = None
        if stage not in ("fit", "validate"):
            return
        if stage == "fit":
            self._budget = Budget(self.max_share)
            self._num_validations = 0
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        found = [callback for callback in callbacks if callback.state_key == "LighthouseCallback"]
        self._lighthouse = found[0] if found and found[0].enabled and stage == "fit" else None
        if is_named(trainer.strategy, "FSDPStrategy"):
            raise SettingError(
                "LongContextEvaluation cannot run under FSDPStrategy; use ModelParallelStrategy, or no evaluation"
            )
        if not offers_losses(pl_module):
            raise SettingError(
                f"LongContextEvaluation needs the loss of each token: give {type(pl_module).__name__} a method "
                "token_losses(inputs, targets), all [batch, tokens], or a forward(inputs) that returns logits"
            )
        self._phrases = self._load_phrases(trainer)
        # refuses files and tokenizers before any training
        Asked(self._measures, self.lengths or [4096], self.own_tasks or []).units(self._phrases)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to the phases; forget what belongs to another run."""
        self._phase = DENSE
        self._budget.start()
        # behind a resumed run's step, or of a fit before this one
        self.results = [result for result in self.results if result["step"] <= trainer.global_step]
        if not trainer.enable_validation:
            self._tell_once("without validation there is no text to measure on; nothing is measured")
        self._unsubscribe()
        if self._lighthouse is not None:
            events = phase_events(trainer)
            self._subscriptions = [
                events.subscribe(Switch, lambda event: self._evaluate(trainer, pl_module, is_last=True)),
                events.subscribe(BatchStart, self._note_phase),
                events.subscribe(FitEnd, lambda event: self._evaluate(trainer, pl_module, is_last=True)),
            ]

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collect text, once: later validations show the same."""
        # the sanity check sees less, and an evaluation of it would have other samples
        if self._collected is None and not trainer.sanity_checking and self._stage in ("fit", "validate"):
            longest = max(self.lengths) if self.lengths else self._training_length(trainer)
            self._collecting = Collector(self.num_samples, longest)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep the text."""
        if self._collecting is not None and dataloader_idx == 0:
            self._collecting.add(batch)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate at each fourth validation."""
        if self._collecting is not None:
            self._collected, self._collecting = self._collecting, None
        if trainer.sanity_checking or self._stage not in ("fit", "validate"):
            return
        if self._stage == "validate":
            self._evaluate(trainer, pl_module, is_last=True)
            return
        self._num_validations += 1
        number = validation_number(trainer, self._num_validations)
        if self.every_n_validations and number % self.every_n_validations == 0:
            self._evaluate(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate what the training ends with, unless LighthouseCallback says when that is."""
        if self._lighthouse is None:
            self._evaluate(trainer, pl_module, is_last=True)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Listen no more; let go of the text."""
        self._unsubscribe()
        self._collecting = self._collected = None

    def _unsubscribe(self) -> None:
        while self._subscriptions:
            self._subscriptions.pop()()

    def _note_phase(self, event: BatchStart) -> None:
        self._phase = event.phase

    @property
    def _measures(self) -> list[str]:
        return [name for name in self.measures if self._phrases is not None or name not in NEEDS_TOKENIZER]

    def _load_phrases(self, trainer: Trainer) -> Phrases | None:
        load = getattr(getattr(trainer, "datamodule", None), "load_tokenizer", None)
        tokenizer = self.tokenizer or (load() if callable(load) else None)
        if tokenizer is not None:
            return Phrases(tokenizer)
        if self.own_tasks:
            raise SettingError("LongContextEvaluation needs a tokenizer for own_tasks: set tokenizer")
        if left_out := [name for name in self.measures if name in NEEDS_TOKENIZER]:
            if len(left_out) == len(self.measures):
                raise SettingError(f"LongContextEvaluation needs a tokenizer for {', '.join(left_out)}: set tokenizer")
            self._tell_once(f"{' and '.join(left_out)} are left out: the data module names no tokenizer; set tokenizer")
        return None

    def _tell_once(self, line: str) -> None:
        if line and line not in self._told:
            self._told.add(line)
            rank_zero_warn(f"Lighthouse evaluation: {line}", category=LighthouseWarning)

    def _evaluate(self, trainer: Trainer, module: LightningModule, is_last: bool = False) -> None:
        """Measure, unless this step was measured or it is put off; log and write what was found."""
        step = trainer.global_step if self._stage == "fit" else self.step
        if self._stage == "fit" and self.results and self.results[-1]["step"] == step:
            return
        if not trainer.strategy.reduce_boolean_decision(self._collected is not None and self._collected.num_tokens > 0):
            if trainer.enable_validation or self._stage == "validate":
                self._tell_once("no validation text was seen before the first evaluation was due: it is left out")
            return
        start = time.perf_counter()
        result = self._measure(trainer, module, step, is_last)
        if result is None:
            return
        self.results = merged(self.results, result)
        elapsed, share = self._budget.elapsed, ""
        if self._stage == "fit":
            share = f" ({self._budget.spent / elapsed:.1%} of the run for all evaluations)"
        rank_zero_info(
            f"Lighthouse evaluation: {f'step {step}: ' if step is not None else ''}{in_words(result)}; "
            f"{result['num_samples']} samples, {time.perf_counter() - start:.1f} s{share}"
        )
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        show(trainer, result)
        folder = self.output or run_folder(trainer)
        if trainer.is_global_zero:
            # what the run itself has found stays
            steps = self.results if self._stage == "fit" else merged(read_evaluations(folder), result, folder)
            write_evaluations(folder, steps)

    def _measure(
        self, trainer: Trainer, module: LightningModule, step: int | None, is_last: bool
    ) -> dict[str, Any] | None:
        """One evaluation; None where it is put off."""
        assert self._collected is not None
        text = self._collected.haystack(self.seed)
        assert text is not None
        # a compiled model would compile anew for each length, and past torch's limit train uncompiled from then on
        with self._patch(trainer) as patch, undisturbed(trainer, module), torch.compiler.set_stance("force_eager"):
            ranks = Ranks(trainer)
            training_length = self._training_length(trainer)
            num_tokens = int(ranks.reduce([len(text.tokens)], "min")[0])
            asked = self.lengths or lengths_up_to(training_length or self._collected.seq_len)
            lengths = lengths_within(asked, num_tokens, self._tell_once, self.needs_length)
            units = Asked(self._measures, lengths, self.own_tasks or []).units(self._phrases)
            if not units:
                self._tell_once(f"nothing is measured: what was asked for does not fit into lengths {lengths}")
                return None
            scorer = Scorer(module, trainer.strategy.root_device)
            material = Material(text, self._phrases, self.seed)
            modes = 2 if patch is not None and self.own_mode and self._phase != DENSE else 1
            samples = self._num_affordable(ranks, scorer, material, units * modes, is_last)
            if samples == 0:
                return None
            self._tell_once(text.shortage(max(lengths), math.ceil(samples / ranks.num_shares)))
            before = scorer.num_tokens
            ranks.start_clock()
            total = modes * sum(num_rounds(unit, samples, ranks.num_shares) for unit in units)

            def measured() -> dict[str, Any]:
                return measure(scorer, material, units, samples, training_length, ranks, lambda: self.on_sample(total))

            result: dict[str, Any] = {"step": step, "phase": self._phase, **self.notes, "num_samples": samples}
            result |= {"lengths": lengths, "training_length": training_length, "seed": self.seed, **measured()}
            if modes == 2:
                patch.on(inference=True)
                result["own_mode"] = {"phase": self._phase, **measured()}
                patch.off()
            seconds = ranks.seconds()
            self._budget.pace = seconds / (scorer.num_tokens - before)
            self._budget.spent += seconds
        return {**result, "seconds": seconds, "seconds_of_all": self._budget.spent}

    def _training_length(self, trainer: Trainer) -> int | None:
        known: int | None = getattr(getattr(trainer, "datamodule", None), "seq_len", None)
        return self.training_length or known or (self._collected.seq_len if self._collected is not None else None)

    def _num_affordable(
        self, ranks: Ranks, scorer: Scorer, material: Material, units: list[Unit], is_last: bool
    ) -> int:
        """The samples that the time allows; a few forwards say first what they cost."""
        budget = self._budget
        if self._stage != "fit" or self.max_share is None:
            return self.num_samples
        if budget.pace is None:
            ranks.start_clock()
            longest = max(units, key=lambda unit: unit.context)
            # the first one compiles and warms up
            list(longest.run(scorer, material, 0))
            warm, tokens = ranks.seconds(), scorer.num_tokens
            list(longest.run(scorer, material, 0))
            budget.pace = (ranks.seconds() - warm) / (scorer.num_tokens - tokens)
            budget.spent += ranks.seconds()
        elapsed = ranks.broadcast(budget.elapsed)
        samples, seconds = budget.affordable(units, self.num_samples, ranks.num_shares, elapsed, not is_last)
        if samples < self.num_samples:
            does = f"{samples} samples of a place are taken" if samples else "it is put off"
            if is_last and not samples:
                samples, does = min(MIN_SAMPLES, self.num_samples), f"{min(MIN_SAMPLES, self.num_samples)} are taken"
            rank_zero_info(
                f"Lighthouse evaluation: {self.num_samples} samples of each place would take more than "
                f"{self.max_share:.1%} of the run's {elapsed:.0f} s: {does} ({seconds:.1f} s)"
            )
        return samples

    @contextmanager
    def _patch(self, trainer: Trainer) -> Iterator[Any]:
        """The patch of the phases, off; its time is not training's. None without phases."""
        with nullcontext() if self._lighthouse is None else self._lighthouse.lend_patch(trainer) as patch:
            yield patch
