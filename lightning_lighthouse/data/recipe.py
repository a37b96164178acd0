"""LighthouseRecipe: text in, batches of packed sequences out, for any Trainer.

The data is prepared on first use, checked before each run, and streamed by litdata. Trainer itself saves and loads the
position within the data; the recipe sees to it that it is the same data.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn

from lightning_lighthouse.data.integrity import Manifest, Settings, check, is_prepared
from lightning_lighthouse.data.prepare import TRAIN, VALIDATION, check_prepared, check_settings, prepare
from lightning_lighthouse.data.tokenizers import BYTES, identify_tokenizer, load_tokenizer

logger = logging.getLogger("lightning_lighthouse")


class LighthouseRecipe(LightningDataModule):
    """Batches of long packed sequences: `{"tokens": [batch, seq_len + 1]}`, int64.

    Inputs are `tokens[:, :-1]`, targets `tokens[:, 1:]`. A sequence holds documents one behind the other, each ended by
    one end-of-document token, and long documents go on in the next sequence.

    Args:
        seq_len: Tokens of a sequence that the model sees; a property of the prepared data.
        batch_size: Sequences of a batch, on each rank.
        source: Text file, JSONL, Parquet, a folder of these, a glob pattern, or a folder that was prepared before.
            None: the source files of Python's standard library.
        output_dir: Where the prepared data goes, and is found again. Not used if `source` is prepared already.
        text_field: Field of JSONL and Parquet that holds the text.
        tokenizer: "bytes" (256 bytes and id 256 for the end of a document), or the path of a `tokenizer.json`.
        end_of_document: Token of `tokenizer.json` that ends a document; None finds the usual one.
        validation_source: Where validation documents come from, like `source`; None: from `source`.
        validation_fraction: Share of the documents of `source` that become validation data, in [0, 1); 0 for none. Not
            used with a `validation_source`.
        seed: Of the choice of validation documents and of the order of training sequences.
        num_workers: Processes that read batches on each rank, and that tokenize during preparation; 0 for none.
        document_ids: Add "document_ids" and "positions", each `[batch, seq_len + 1]`: the document of a token, counted
            from 0 in each sequence, and the position within that document.

    Raises:
        ValueError: A value is out of range.
    """

    def __init__(
        self,
        seq_len: int = 8192,
        batch_size: int = 1,
        source: str | None = None,
        output_dir: str = "data/prepared",
        text_field: str = "text",
        tokenizer: str = BYTES,
        end_of_document: str | None = None,
        validation_source: str | None = None,
        validation_fraction: float = 0.05,
        seed: int = 42,
        num_workers: int = 2,
        document_ids: bool = False,
    ) -> None:
        super().__init__()
        check_settings(seq_len, validation_fraction, num_workers)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.source = source
        self.output_dir = output_dir
        self.text_field = text_field
        self.tokenizer = tokenizer
        self.end_of_document = end_of_document
        self.validation_source = validation_source
        self.validation_fraction = validation_fraction
        self.seed = seed
        self.num_workers = num_workers
        self.document_ids = document_ids
        self._manifest: Manifest | None = None

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
        """Bytes of text that one token stands for; None before the data is prepared."""
        return self._load_manifest().bytes_per_token if is_prepared(self.folder) else None

    def prepare_data(self) -> None:
        """Prepare the data if that has not been done, and say what there is."""
        if self.source_is_prepared or is_prepared(self.folder):
            print(f"{self.folder}: {check(self.folder).summary()}")
            return
        manifest = prepare(
            self.output_dir,
            seq_len=self.seq_len,
            source=self.source,
            text_field=self.text_field,
            tokenizer=self.tokenizer,
            end_of_document=self.end_of_document,
            validation_source=self.validation_source,
            validation_fraction=self.validation_fraction,
            seed=self.seed,
            num_workers=self.num_workers,
        )
        print(f"{self.folder}\n{manifest.report()}")

    def setup(self, stage: str) -> None:
        """Check that the data is whole, is what was asked for, and suffices for one batch on each rank."""
        self._manifest = self._check_settings()
        splits = {"fit": (TRAIN, VALIDATION), "validate": (VALIDATION,)}
        for name in splits.get(stage, ()):
            sequences = getattr(self._manifest, name).sequences
            # without validation data fit trains without validation, as asked for by validation_fraction=0
            if name == VALIDATION and stage == "fit" and sequences == 0:
                continue
            needed = self._ranks * self.batch_size
            if sequences < needed:
                raise ValueError(
                    f"{self.folder} has {sequences} {name} sequences of {self.seq_len} tokens, one batch needs "
                    f"{needed} ({self._ranks} ranks x batch_size {self.batch_size}); prepare more text, or lower "
                    "seq_len or batch_size"
                )

    def train_dataloader(self) -> Any:
        """Shuffled anew each epoch; the sequences that fill no batch on all ranks are left out of that epoch."""
        limit = 1.0 if self.trainer is None else self.trainer.limit_train_batches
        return self._loader(TRAIN, shuffle=True, limit=limit)

    def val_dataloader(self) -> Any:
        """In document order; empty without validation data."""
        return self._loader(VALIDATION, shuffle=False) if self._load_manifest().validation.sequences else []

    def state_dict(self) -> dict[str, Any]:
        """What decides the batches."""
        manifest = self._load_manifest()
        return {
            "fingerprint": manifest.fingerprint,
            "seq_len": self.seq_len,
            "tokenizer": manifest.settings.tokenizer,
            "seed": self.seed,
            "topology": self._topology(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse to continue on other data than the checkpoint's; warn where its order cannot be kept."""
        # evaluation may use any data
        if self.trainer is not None and self.trainer.state.fn != TrainerFn.FITTING:
            return
        manifest = self._load_manifest()
        if state_dict["fingerprint"] != manifest.fingerprint:
            raise ValueError(
                f"{self.folder} is not the data of the checkpoint: fingerprint {manifest.fingerprint} (seq_len "
                f"{self.seq_len}, tokenizer {manifest.settings.tokenizer}), the checkpoint has "
                f"{state_dict['fingerprint']} (seq_len {state_dict['seq_len']}, tokenizer {state_dict['tokenizer']}); "
                "point the recipe to the data that the run began with, or start a new run"
            )
        if state_dict["seed"] != self.seed:
            raise ValueError(
                f"seed is {self.seed}, the checkpoint was written with {state_dict['seed']}: the order of the data "
                f"would change; set seed to {state_dict['seed']}, or start a new run"
            )
        if self.trainer is None or self.trainer.is_global_zero:
            _warn_of_topology(state_dict["topology"], self._topology())

    @property
    def _ranks(self) -> int:
        return self.trainer.world_size if self.trainer is not None else 1

    def _topology(self) -> dict[str, int]:
        # to litdata no worker is one: the main process
        return {"ranks": self._ranks, "num_workers": max(1, self.num_workers), "batch_size": self.batch_size}

    def _load_manifest(self) -> Manifest:
        if self._manifest is None:
            self._manifest = Manifest.load(self.folder)
        return self._manifest

    def _check_settings(self) -> Manifest:
        """The manifest; ValueError if the folder was prepared with other settings than the recipe's."""
        settings = Settings(
            source=self.source,
            text_field=self.text_field,
            tokenizer=identify_tokenizer(self.tokenizer),
            end_of_document=self.end_of_document,
            seq_len=self.seq_len,
            validation_source=self.validation_source,
            validation_fraction=self.validation_fraction,
            seed=self.seed,
        )
        if self.source_is_prepared:
            # only what the batches must agree with: where the text came from is no longer the recipe's business
            recorded = Manifest.load(self.folder).settings
            settings = replace(recorded, seq_len=settings.seq_len, tokenizer=settings.tokenizer)
        return check_prepared(self.folder, settings, self.tokenizer)

    def _loader(self, split: str, *, shuffle: bool, limit: int | float = 1.0) -> Any:
        from lightning_lighthouse.data.streaming import SequenceDataset, SequenceLoader

        dataset = SequenceDataset(
            self.folder / split,
            self._load_manifest(),
            shuffle=shuffle,
            seed=self.seed,
            document_ids=self.document_ids,
        )
        return SequenceLoader(
            dataset,
            limit=limit,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            drop_last=True,
            pin_memory=torch.cuda.is_available(),
        )


def _warn_of_topology(old: dict[str, int], new: dict[str, int]) -> None:
    changed = [f"{name} {old[name]} -> {new[name]}" for name in new if old[name] != new[name]]
    if not changed:
        return
    batches = [topology["ranks"] * topology["batch_size"] for topology in (old, new)]
    if batches[0] == batches[1]:
        skipped = f"at most {new['num_workers'] - 1} global batches are left out at its end"
    else:
        skipped = (
            f"but the global batch is {batches[1]} sequences, no longer {batches[0]}, and Trainer may end this epoch "
            "early: keep ranks x batch_size to avoid that"
        )
    logger.warning(
        f"resumed with {', '.join(changed)}: the batches are not those of an unbroken run; no sequence of this epoch "
        f"comes twice, {skipped}"
    )
