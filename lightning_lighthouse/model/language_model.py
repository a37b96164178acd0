"""What the language models to train have in common: steps, metrics, optimizer and schedule, as a LightningModule."""

# B batch, N tokens

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torchmetrics import MeanMetric

from lightning_lighthouse.attention.documents import Documents
from lightning_lighthouse.checks import SettingError, is_of_finder, quoted
from lightning_lighthouse.model.resumed_optimizer import tell_kept_settings
from lightning_lighthouse.model.targets import padding, targets_of, tells_documents
from lightning_lighthouse.routing.given_documents import read_documents
from lightning_lighthouse.routing.layers import scope_of
from lightning_lighthouse.routing.packing import POSITIONS, PackingCheck, said_of_documents


class LanguageModel(pl.LightningModule):
    """Predicts the next token: trains with AdamW on the mean loss of a batch, validates in nats per token.

    A batch is `{"tokens": [B, N + 1] int64}` or that tensor alone: the first N tokens are read, the last N predicted.
    Where `labels` lie beside them, as long, these are what is predicted, and nothing where they are -100. An
    `attention_mask` has zeros only where documents are read from it. What else would change the loss in transformers is
    refused. The training loss is returned, not logged; validation logs `val/loss` in nats per token and, where the data
    module has `validation_bytes_per_token`, `val/bits_per_byte`; a test likewise, by `test_bytes_per_token`. A data
    module that tells no splits apart may have `bytes_per_token` for both.

    Where a batch holds documents too, as `LighthouseRecipe` adds them, `documents(batch)` says where those of N lie.

    A derived class keeps `learning_rate`, `betas`, `eps`, `weight_decay`, `warmup_steps`, `schedule`, `decay_fraction`
    and `loss_chunk` in its `hparams`, checked by `check_hyperparameters`, and `restart_positions`. They are read from
    `own_settings`, which `keep_own_settings` separates from those of a further derived class.
    """

    def __init__(self) -> None:
        super().__init__()
        self._own_settings: dict[str, Any] = {}
        self._recorded: dict[str, Any] = {}
        self.bytes_per_token: float | None = None
        self._bytes_per_token: dict[str, float | None] = {}
        # a NaN loss must show; torchmetrics' "disable" would ignore the weights
        self.nats_per_token = MeanMetric(nan_strategy=math.nan)
        self.bits_per_byte = MeanMetric(nan_strategy=math.nan)
        self._packing = PackingCheck()
        self._padding = PackingCheck(SettingError)

    def keep_own_settings(self, given: Mapping[str, Any]) -> None:
        """Keep what a class was given itself, once `save_hyperparameters` has recorded.

        A class derived from it records its own arguments in `hparams`, for a checkpoint to build it anew from; where it
        passes others on under the same names, these are not there.

        Args:
            given: The local variables of its `__init__`, before any but the arguments are made.
        """
        self._own_settings = {name: value for name, value in given.items() if name not in ("self", "__class__")}
        self._recorded = dict(self.hparams)

    @property
    def own_settings(self) -> dict[str, Any]:
        """What is in force: what the class was given, and over it what was set in `hparams` since, as finders do."""
        recorded = self._recorded
        # identity first: what a derived class records may be tensors, which do not compare to one truth
        changed = {
            name: value
            for name, value in self.hparams.items()
            if name not in recorded or (recorded[name] is not value and recorded[name] != value)
        }
        return self._own_settings | changed

    def check_hyperparameters(self) -> None:
        """Raise ValueError for the first one that is out of range."""
        values = self.own_settings
        betas = values["betas"]
        for name, ok, allowed in (
            ("schedule", values["schedule"] in ("constant", "wsd"), "'constant' or 'wsd'"),
            ("learning_rate", values["learning_rate"] > 0, "greater than 0"),
            ("betas", len(betas) == 2 and all(0 <= beta < 1 for beta in betas), "two numbers in [0, 1)"),
            ("eps", values["eps"] > 0, "greater than 0"),
            ("weight_decay", values["weight_decay"] >= 0, "at least 0"),
            ("warmup_steps", values["warmup_steps"] >= 0, "at least 0"),
            ("decay_fraction", 0 < values["decay_fraction"] <= 1, "in (0, 1]"),
            ("loss_chunk", values["loss_chunk"] is None or values["loss_chunk"] >= 1, "at least 1"),
        ):
            check(name, values[name], ok, allowed)

    @property
    @abstractmethod
    def num_vocabulary(self) -> int:
        """Tokens that the model knows."""

    @abstractmethod
    def loss(self, batch: Mapping[str, Tensor] | Tensor) -> Tensor:
        """The mean cross-entropy of a batch in nats per token; ValueError where the batch holds no such tokens."""

    @abstractmethod
    def token_losses(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The cross-entropy of each target in nats, all `[B, N]`; what `FutureLeakProbe` asks for."""

    def setup(self, stage: str) -> None:
        """Ask the data module for its vocabulary, and refuse one too large; and for the bytes of a token."""
        data = getattr(self.trainer, "datamodule", None)
        self.check_data(data)
        self.bytes_per_token = getattr(data, "bytes_per_token", None)
        # a token of one split may stand for more text than one of another
        names = {"val": "validation_bytes_per_token", "test": "test_bytes_per_token"}
        self._bytes_per_token = {stage: getattr(data, name) for stage, name in names.items() if hasattr(data, name)}

    def check_data(self, data: Any) -> None:
        """Refuse a data module, if it is one, whose tokens are not the model's. Raises SettingError."""
        self.check_vocabulary(getattr(data, "vocab_size", None))

    def check_vocabulary(self, needed: int | None) -> None:
        """Refuse data of more tokens than the model has; None: unknown. Raises SettingError."""
        given = self.num_vocabulary
        if needed is not None and needed > given:
            raise SettingError(f"vocab_size must be at least the {needed} of the data's tokenizer, got {given}")

    def training_step(self, batch: Mapping[str, Tensor] | Tensor, batch_idx: int) -> Tensor:
        """Return the loss, and show it in the progress bar."""
        loss = self.loss(batch)
        self.log("loss", loss.detach(), prog_bar=True, logger=False)
        return loss

    def validation_step(self, batch: Mapping[str, Tensor] | Tensor, batch_idx: int) -> None:
        """Log `val/loss` and `val/bits_per_byte`."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Mapping[str, Tensor] | Tensor, batch_idx: int) -> None:
        """Log `test/loss` and `test/bits_per_byte`."""
        self._evaluate(batch, "test")

    def _evaluate(self, batch: Mapping[str, Tensor] | Tensor, stage: str) -> None:
        loss = self.loss(batch)
        _, num_tokens = targets_of(batch, tokens_of(batch), self._reads_mask(batch))
        self.nats_per_token.update(loss, num_tokens)
        self.log(f"{stage}/loss", self.nats_per_token, prog_bar=True)
        bytes_per_token = self._bytes_per_token.get(stage, self.bytes_per_token)
        if bytes_per_token is not None:
            self.bits_per_byte.update(loss / (math.log(2) * bytes_per_token), num_tokens)
            self.log(f"{stage}/bits_per_byte", self.bits_per_byte)

    def on_train_end(self) -> None:
        """Hear what the GPU found in the last batches."""
        self._packing.finish()
        self._padding.finish()

    def on_validation_end(self) -> None:
        """The same."""
        self.on_train_end()

    def on_test_end(self) -> None:
        """The same."""
        self.on_train_end()

    def targets(self, batch: Mapping[str, Any] | Tensor) -> tuple[Tensor, int | Tensor]:
        """What the N tokens of a batch are to predict, `[B, N]`, -100 where nothing; and how many that are.

        Raises:
            SettingError: The batch is padded, or holds what would change the loss and is not read. Of a batch on a GPU
                padding is found with the next one, so that nothing waits; in the first one at once.
        """
        tokens, reads_mask = tokens_of(batch), self._reads_mask(batch)
        if not reads_mask:
            self._padding.refuse(padding(batch, tokens))
        return targets_of(batch, tokens, reads_mask)

    def _reads_mask(self, batch: Mapping[str, Any] | Tensor) -> bool:
        """Whether documents are kept apart, and read from the mask of this batch."""
        return said_of_documents(self) is True and tells_documents(batch)

    def look_for_documents(self, batch: Mapping[str, Any] | Tensor) -> None:
        """Refuse a batch that packs documents where neither a patch nor a callback was told what to do."""
        if not said_of_documents(self):
            self._packing.look(batch)

    def documents(self, batch: Mapping[str, Any] | Tensor) -> Documents | None:
        """Where the documents of the N tokens lie that are read; None where the batch does not say it."""
        if not isinstance(batch, Mapping):
            return None
        documents = read_documents(batch)
        is_whole = documents is not None and documents.num_tokens == tokens_of(batch).shape[1]
        return documents.drop_last() if documents is not None and is_whole else documents

    def positions(self, batch: Mapping[str, Any] | Tensor, inputs: Tensor) -> Tensor | None:
        """The positions of the tokens within their documents, or None where they do not restart."""
        if not self.own_settings["restart_positions"]:
            return None
        for name in ("positions", POSITIONS):
            if isinstance(batch, Mapping) and name in batch:
                return batch[name][:, : inputs.shape[1]]
        documents = self.documents(batch)
        if documents is None:
            raise ValueError(
                "restart_positions=True, but the batch holds no documents: add them, as LighthouseRecipe does with "
                "document_ids=True"
            )
        return documents.position_ids(inputs.device)

    def keeps_documents(self) -> bool:
        """Whether a callback keeps attention inside documents: windows, and the reference, then leave a graph."""
        callbacks = getattr(self._trainer, "callbacks", ())
        return any(getattr(callback, "documents", False) is True for callback in callbacks)

    def positions_set(self, inputs: Tensor) -> Tensor | None:
        """The same where there is no batch: within the documents that attention stays inside."""
        if not self.own_settings["restart_positions"]:
            return None
        scopes = map(scope_of, self.modules())
        documents = next((scope.documents for scope in scopes if scope is not None), None)
        return None if documents is None else documents.position_ids(inputs.device)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with weight decay on the matrices, and the schedule, a step at a time; what is frozen has none."""
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": self.own_settings["weight_decay"]},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        settings = {name: self.own_settings[name] for name in ("betas", "eps")}
        optimizer = torch.optim.AdamW(groups, lr=self.own_settings["learning_rate"], fused=True, **settings)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._schedule())
        tell_kept_settings(optimizer, self._is_resuming)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _is_resuming(self) -> bool:
        """Whether the run goes on from a checkpoint, a given one or that of a cluster's next job."""
        trainer = self._trainer
        if trainer is None or is_of_finder(trainer.ckpt_path):
            return False
        return trainer.ckpt_path is not None or trainer._checkpoint_connector._hpc_resume_path is not None

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as the Trainer says, under bf16-mixed too."""
        plugin = self.trainer.precision_plugin
        if isinstance(plugin, MixedPrecision) and plugin.scaler is None and gradient_clip_val:
            # Lightning refuses a fused optimizer for the sake of float16's loss scale, and bfloat16 has none
            algorithm = GradClipAlgorithmType(gradient_clip_algorithm or "norm")
            Precision.clip_gradients(plugin, optimizer, gradient_clip_val, algorithm)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def _schedule(self) -> Callable[[int], float]:
        """The factor of the learning rate at each optimizer step, counted from 0."""
        warmup_steps = self.own_settings["warmup_steps"]
        if self.own_settings["schedule"] == "constant":
            return lambda step: min(1.0, (step + 1) / max(1, warmup_steps))

        total = self.trainer.estimated_stepping_batches
        # -1 for an iterable data set without max_steps
        if not 0 < total < math.inf:
            raise ValueError(
                f"schedule='wsd' needs a known number of steps, the Trainer estimates {total}; "
                "set trainer.max_steps, or schedule='constant'"
            )
        decay_steps = max(1, round(self.own_settings["decay_fraction"] * total))
        return lambda step: max(0.0, min(1.0, (step + 1) / max(1, warmup_steps), (total - step) / decay_steps))


def tokens_of(batch: Mapping[str, Tensor] | Tensor) -> Tensor:
    """The tokens of a batch, `[B, N + 1]`; ValueError where it holds none."""
    if isinstance(batch, Mapping):
        if "tokens" not in batch:
            raise ValueError(f"the batch must hold 'tokens', got {', '.join(map(repr, batch)) or 'nothing'}")
        batch = batch["tokens"]
    if batch.ndim != 2 or batch.shape[1] < 2:
        raise ValueError(f"tokens must be [batch, at least 2 tokens], got {list(batch.shape)}")
    return batch


def check(name: str, value: Any, ok: bool, allowed: str) -> None:
    """Raise ValueError, quoting `value`, unless it is `ok`."""
    if not ok:
        raise ValueError(f"{name} must be {allowed}, got {quoted(value)}")
