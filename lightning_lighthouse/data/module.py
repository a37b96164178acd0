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

from lightning_lighthouse.checks import warn
from lightning_lighthouse.data.integrity import check
from lightning_lighthouse.data.manifest import Manifest, is_prepared
from lightning_lighthouse.data.preparing.prepare import check_prepared, prepare
from lightning_lighthouse.data.preparing.splits import TEST, TRAIN, VALIDATION
from lightning_lighthouse.data.settings import RECORDED, DataOptions, settings_of
from lightning_lighthouse.data.tokenizers import identify_tokenizer, load_tokenizer
from lightning_lighthouse.data.workers import worker_context

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
        LightningDataModule.__init__(self)
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
        """Prepare the data if that has not been done, and log what there is, at level INFO."""
        if self.source_is_prepared or is_prepared(self.folder):
            logger.info(f"{self.folder}: {check(self.folder).summary()}")
            return
        asked = {name: getattr(self, name) for name in ("output_dir", "num_workers", *RECORDED)}
        manifest = prepare(**asked)
        print(f"{self.folder}\n{manifest.report()}")

    def setup(self, stage: str) -> None:
        """Check that the data is whole, is what was asked for, and suffices for one batch on each rank."""
        self._manifest = self._check_settings()
        splits = {"fit": (TRAIN, VALIDATION), "validate": (VALIDATION,), "test": (TEST,)}
        for name in splits.get(stage, ()):
            sequences = getattr(self._manifest, name).sequences
            # without validation data fit trains without validation, as asked for by validation_fraction=0
            if name == VALIDATION and stage == "fit" and sequences == 0:
                continue
            if name == TEST and sequences == 0:
                raise ValueError(
                    f"{self.folder} has no test data; prepare it with a test_source, or run lighthouse validate"
                )
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

    def test_dataloader(self) -> Any:
        """In document order."""
        return self._loader(TEST, shuffle=False)

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
        settings = settings_of(self, identify_tokenizer(self.tokenizer))
        if self.source_is_prepared:
            # only what the batches must agree with: where the text came from is no longer the recipe's business
            recorded = Manifest.load(self.folder).settings
            # its end of a document goes with its tokenizer, and may not exist in another
            end = recorded.end_of_document if settings.tokenizer == recorded.tokenizer else settings.end_of_document
            settings = replace(recorded, seq_len=settings.seq_len, tokenizer=settings.tokenizer, end_of_document=end)
        return check_prepared(self.folder, settings, self.tokenizer)

    def _loader(self, split: str, *, shuffle: bool, limit: int | float = 1.0) -> Any:
        from lightning_lighthouse.data.loading import SequenceDataset, SequenceLoader

        manifest = self._load_manifest()
        # pinned memory is the loader's own business: what the workers hand over is not what the model gets
        return SequenceLoader(
            SequenceDataset(self.folder / split, manifest, shuffle=shuffle, seed=self.seed),
            end_of_document=manifest.end_of_document if self.document_ids else None,
            limit=limit,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            multiprocessing_context=worker_context() if self.num_workers else None,
            drop_last=True,
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
    warn(
        f"resumed with {', '.join(changed)}: the batches are not those of an unbroken run; no sequence of this epoch "
        f"comes twice, {skipped}"
    )
