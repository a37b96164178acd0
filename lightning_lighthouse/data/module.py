"""LighthouseRecipe: text in, batches of packed sequences out, for any Trainer.

The data is prepared on first use, checked before each run, and streamed by litdata. Trainer itself saves and loads the
position within the data; the recipe sees to it that it is the same data.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn

from lightning_lighthouse.checks import is_of_finder, warn
from lightning_lighthouse.data.integrity import check
from lightning_lighthouse.data.manifest import Manifest, is_prepared
from lightning_lighthouse.data.position import Topology, check_same_data, describe_data, warn_of_topology
from lightning_lighthouse.data.preparing.prepare import check_prepared, prepare
from lightning_lighthouse.data.preparing.splits import TEST, TRAIN, VALIDATION
from lightning_lighthouse.data.settings import RECORDED, DataOptions, check_seed, settings_of
from lightning_lighthouse.data.tokenizers import Tokenizer, identify_tokenizer, load_tokenizer
from lightning_lighthouse.data.workers import worker_context
from lightning_lighthouse.notices import notice_once

logger = logging.getLogger("lightning_lighthouse")
# the options' meaning, with the blank line before it
OPTIONS = (DataOptions.__doc__ or "").partition("\n")[2]


class LighthouseRecipe(DataOptions, LightningDataModule):
    """Batches of long packed sequences: `{"tokens": [batch, seq_len + 1]}`, int64.

    Inputs are `tokens[:, :-1]`, targets `tokens[:, 1:]`. A sequence holds documents one behind the other, each ended by
    one end-of-document token, and long documents go on in the next sequence.
    """

    __doc__ = f"{__doc__}\n{OPTIONS}"
    # a data module is itself, whatever others are asked for
    __eq__, __hash__ = object.__eq__, object.__hash__

    def __post_init__(self) -> None:
        if "pytorch_lightning" in sys.modules:
            warn(
                'pytorch_lightning is imported beside lightning: its Trainer takes no LighthouseRecipe ("Expected a '
                'parent"); import Trainer and LightningModule from lightning.pytorch',
                stacklevel=3,
            )
        # refuses what cannot be; the tokenizer's file is looked at where it is needed
        super().__post_init__()
        check_seed(self.seed)
        LightningDataModule.__init__(self)
        self._manifest: Manifest | None = None
        # those that were found to fill a batch
        self._filled: tuple[str, ...] = ()

    @property
    def source_is_prepared(self) -> bool:
        """Whether `source` is a folder that was prepared before."""
        return self.source is not None and is_prepared(Path(self.source))

    @property
    def folder(self) -> Path:
        """The prepared folder: `source` where that is one, else `output_dir`."""
        return Path(self.source if self.source is not None and self.source_is_prepared else self.output_dir)

    @property
    def vocab_size(self) -> int:
        """Every token is below it."""
        if is_prepared(self.folder):
            return self._load_manifest().vocab_size
        return load_tokenizer(self.tokenizer, self.end_of_document).vocab_size

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes of text that one token stands for, all splits together.

        None before the data is prepared, and where some of the text is unknown.
        """
        return self._load_manifest().bytes_per_token if is_prepared(self.folder) else None

    @property
    def validation_bytes_per_token(self) -> float | None:
        """The same of the validation split alone; also None where there is none."""
        return self._load_manifest().validation.bytes_per_token if is_prepared(self.folder) else None

    @property
    def test_bytes_per_token(self) -> float | None:
        """The same of the test split alone; also None where there is none."""
        return self._load_manifest().test.bytes_per_token if is_prepared(self.folder) else None

    def load_tokenizer(self) -> Tokenizer:
        """What turned the text into tokens; for evaluations that write sentences of their own."""
        return load_tokenizer(self.tokenizer, self.end_of_document)

    def prepare_data(self) -> None:
        """Prepare the data if that has not been done, and log what there is, at level INFO."""
        if self.source_is_prepared or is_prepared(self.folder):
            logger.info(f"{self.folder}: {check(self.folder).summary()}")
            return
        asked = {name: getattr(self, name) for name in ("output_dir", "num_workers", *RECORDED)}
        manifest = prepare(**asked)
        logger.info(f"{self.folder}\n{manifest.report()}")

    def setup(self, stage: str) -> None:
        """Check that the data is whole, is what was asked for, and suffices for one batch on each rank."""
        self._manifest = self._check_settings()
        # without validation data fit trains without validation, as asked for by validation_fraction=0
        fit = (TRAIN, VALIDATION) if self._sequences(VALIDATION) else (TRAIN,)
        self._filled = {"fit": fit, "validate": (VALIDATION,), "test": (TEST,)}.get(stage, ())
        for split in self._filled:
            self._check_enough(split)

    def train_dataloader(self) -> Any:
        """Shuffled anew each epoch; the sequences that fill no batch on all ranks are left out of that epoch."""
        if self.trainer is None:
            return self._loader(TRAIN, shuffle=True)
        # made anew within a run, it goes on with the epoch that is due
        return self._loader(
            TRAIN,
            shuffle=not self.trainer.overfit_batches,  # type: ignore[attr-defined]
            limit=self.trainer.limit_train_batches,
            epochs_done=self.trainer.current_epoch,
        )

    def val_dataloader(self) -> Any:
        """As stored, several workers in turn, each from its own part; empty without validation data."""
        return self._loader(VALIDATION) if self._sequences(VALIDATION) else []

    def test_dataloader(self) -> Any:
        """As stored, several workers in turn, each from its own part."""
        return self._loader(TEST)

    def state_dict(self) -> dict[str, Any]:
        """What decides the batches."""
        return describe_data(self._load_manifest(), self.seed, self._topology())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse to continue on other data than the checkpoint's; warn where its order cannot be kept."""
        # evaluation may use any data
        if self.trainer is not None and self.trainer.state.fn != TrainerFn.FITTING:
            return
        check_same_data(state_dict, self.state_dict(), self.folder)
        # to go back before the first batch is no resume
        if self.trainer is None or (self.trainer.is_global_zero and not is_of_finder(self.trainer.ckpt_path)):
            warn_of_topology(state_dict["topology"], self._topology())

    def _share(self) -> dict[str, int] | None:
        """Of how many groups of processes that read different sequences this process is in which; None: not known.

        Processes that share a model must read the same; which do is the strategy's matter.
        """
        if self.trainer is None:
            return None
        return self.trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}

    def _topology(self) -> Topology:
        ranks = (self._share() or {"num_replicas": 1})["num_replicas"]
        # to litdata no worker is one: the main process
        return Topology(ranks, max(1, self.num_workers), self.batch_size)

    def _sequences(self, split: str) -> int:
        sequences: int = getattr(self._load_manifest(), split).sequences
        return sequences

    def _check_enough(self, split: str) -> None:
        """Raise ValueError where a split does not fill one batch on each rank."""
        sequences, topology = self._sequences(split), self._topology()
        if split == TEST and sequences == 0:
            raise ValueError(
                f"{self.folder} has no test data; prepare it with a test_source, or run lighthouse validate"
            )
        if sequences < topology.stride:
            raise ValueError(
                f"{self.folder} has {sequences} {split} sequences of {self.seq_len} tokens, one batch needs "
                f"{topology.stride} ({topology.ranks} ranks x batch_size {topology.batch_size}); prepare more text, or "
                "lower seq_len or batch_size"
            )

    def _limit_batch_size(self) -> None:
        """Lower a batch size that was raised within a run, as finders of it do, to what every split fills."""
        most = min(self._sequences(split) for split in self._filled) // self._topology().ranks
        if self.batch_size > most:
            notice_once(
                f"batch_size {most}",
                f"batch_size {self.batch_size} is more than the data can fill: {most} is used, as many sequences as "
                f"there are for each of {self._topology().ranks} ranks",
            )
            self.batch_size = most

    def _load_manifest(self) -> Manifest:
        if self._manifest is None:
            self._manifest = Manifest.load(self.folder)
        return self._manifest

    def _check_settings(self) -> Manifest:
        """The manifest; ValueError if the folder was prepared with other settings than the recipe's."""
        settings = settings_of(self, identify_tokenizer(self.tokenizer))
        if self.source_is_prepared:
            # only what the batches must agree with: where the text came from is no longer the recipe's business
            recorded = Manifest.load(self.folder).settings
            # its end of a document goes with its tokenizer, and may not exist in another
            end = recorded.end_of_document if settings.tokenizer == recorded.tokenizer else settings.end_of_document
            settings = replace(recorded, seq_len=settings.seq_len, tokenizer=settings.tokenizer, end_of_document=end)
        return check_prepared(self.folder, settings, self.tokenizer)

    def _loader(self, split: str, *, shuffle: bool = False, limit: int | float = 1.0, epochs_done: int = 0) -> Any:
        from lightning_lighthouse.data.loading import SequenceDataset, SequenceLoader

        if split in self._filled:
            self._limit_batch_size()
        self._check_enough(split)
        manifest = self._load_manifest()
        # pinned memory is the loader's own business: what the workers hand over is not what the model gets
        return SequenceLoader(
            SequenceDataset(self.folder / split, manifest, shuffle=shuffle, seed=self.seed, share=self._share()),
            end_of_document=manifest.end_of_document if self.document_ids else None,
            limit=limit,
            epochs_done=epochs_done,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            multiprocessing_context=worker_context() if self.num_workers else None,
            drop_last=True,
        )
