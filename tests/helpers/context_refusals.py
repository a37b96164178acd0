"""What a Trainer on two ranks says to that which cannot share sequences, and what it does with other modules.

`context_refusals.py FOLDER` writes `FOLDER/<rank>.json`: by case the message, or what the case returns.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from all_lighthouse import all_lighthouse
from foreign import GPT, TOKENS, VOCABULARY, ForeignModule, Sequences
from forked import run_ranks
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_lighthouse import (
    ContextParallelDDPStrategy,
    FutureLeakProbe,
    LighthouseConfig,
    LongContextEvaluation,
    local_positions,
)

CONFIG = LighthouseConfig(num_levels=2, pooling_factor=2, top_k=8)


class PlacedGPT(GPT):
    """Counts positions over the whole sequence, as the refusal asks for."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position(local_positions(tokens.shape[1], tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Offering(ForeignModule):
    """Has what evaluations ask for."""

    def token_losses(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.model(inputs).mT, targets, reduction="none")


class WrittenOut(nn.Module):
    """Attention by hand, beside layers that call SDPA."""

    def __init__(self) -> None:
        super().__init__()
        self.hand = True

    def forward(self, x: Tensor) -> Tensor:
        if not self.hand:
            return F.scaled_dot_product_attention(x, x, x, is_causal=True)
        logits = (x @ x.mT).masked_fill(torch.ones(x.shape[1], x.shape[1]).triu(1).bool(), -torch.inf)
        return logits.softmax(-1) @ x


class EdgeReader(GPT):
    """A convolution over tokens, which does not see across the edge of a rank."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv1d(16, 16, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position(local_positions(tokens.shape[1]))
        x = x + self.mix(F.pad(x.mT, (2, 0))).mT
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Encoder(nn.Module):
    """torch's own layers, which have a kernel of their own in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 16)
        self.position = nn.Embedding(TOKENS, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position(local_positions(tokens.shape[1]))
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        return self.head(self.layers(x, mask=mask, is_causal=True))


class Dropping(ForeignModule):
    """Attention with dropout, which eval mode does not show."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        q = torch.zeros(1, 2, batch.shape[1] - 1, 4)
        F.scaled_dot_product_attention(q, q, q, dropout_p=0.1 if self.training else 0.0, is_causal=True)
        return super().training_step(batch, batch_idx)


class Paired(ForeignModule):
    """Takes inputs and targets apart, and cuts them itself."""

    def slice_context(self, batch: Any, context: Any) -> Any:
        n = batch[0].shape[1] // context.size
        return [part[:, context.rank * n : (context.rank + 1) * n] for part in batch]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(torch.cat((batch[0], batch[1][:, -1:]), 1), batch_idx)


class Reads(ForeignModule):
    """Takes what transformers names."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.model(batch["input_ids"]).logsumexp(-1).mean()
        self.losses.append(loss.item())
        return loss


def packed_at_the_edge(form: str) -> list[dict[str, Tensor]]:
    """Rows of two documents, of which each rank gets one."""
    told = {"position_ids": torch.arange(TOKENS) % (TOKENS // 2), "document_ids": torch.arange(TOKENS) // (TOKENS // 2)}
    return [{"input_ids": row[:TOKENS], form: told[form]} for row in Sequences(8).tokens]


class Spoiling(ForeignModule):
    """Its second step has no finite loss, on rank 1."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if batch_idx == 1 and self.global_rank == 1 else loss


class Poison(nn.Module):
    """Returns a NaN on rank 1."""

    def forward(self, x: Tensor) -> Tensor:
        return x * float("nan") if os.environ["RANK"] == "1" and self.training else x


class Manual(ForeignModule):
    """Takes its optimizer steps itself."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model=model)
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return loss


def fit(
    folder: Path,
    module: Any,
    rows: Any = None,
    callbacks: tuple[Callback, ...] = (),
    size: int = 2,
    how: str = "fit",
    **options: Any,
) -> dict[str, Any]:
    strategy = ContextParallelDDPStrategy(size, process_group_backend="gloo", find_unused_parameters=True)
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy=strategy, logger=False, enable_checkpointing=False, max_steps=2,
        enable_progress_bar=False, enable_model_summary=False, callbacks=list(callbacks), default_root_dir=folder,
        use_distributed_sampler=False, **options,
    )  # fmt: skip
    data = DataLoader(Sequences(8) if rows is None else rows, 2)
    getattr(trainer, how)(module, data)
    return {"losses": module.losses, "validation": module.validation_losses}


class Pretrained(ForeignModule):
    """A model of transformers as its users train one: `**batch`, and the loss that it returns."""

    def loss(self, batch: Any) -> Tensor:
        return self.model(**batch, use_cache=False).loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.losses.append(float(self.trainer.strategy.reduce(loss.detach().clone(), reduce_op="mean")))
        return loss


def pretrained(folder: Path) -> dict[str, Any]:
    """The loss of the first step, and that of the same batch in one process; one rank has fewer targets."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3)
    model = LlamaForCausalLM(config).double()
    ids = Sequences(2).tokens[:, :TOKENS]
    labels = ids.masked_fill(torch.arange(TOKENS) > 100, -100)
    rows = [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]
    whole = model(input_ids=ids, labels=labels, use_cache=False).loss.item()
    module = Pretrained(model=model)
    seen = fit(folder, module, rows=rows)
    return {"whole": whole, "shared": seen["losses"][2]}


class Losses(Callback):
    """The mean over the ranks of each training loss."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(trainer.strategy.reduce(outputs["loss"].detach().clone(), reduce_op="mean")))


def continued(folder: Path) -> dict[str, float]:
    """The loss of the first step of a `HuggingFaceDecoder`, and that of the same batch in one process."""
    from pretrained import save_model

    from lightning_lighthouse.huggingface import HuggingFaceDecoder

    path = str(folder / "llama")
    # transformers writes on one rank alone; the cases before this one have made the group
    save_model(folder / "llama")
    torch.distributed.barrier()
    tokens = torch.randint(101, (2, 97), generator=torch.Generator().manual_seed(3))
    module, losses = HuggingFaceDecoder(path, loss_chunk=17), Losses()
    module.configure_model()
    # one rank has fewer targets
    labels = tokens.masked_fill(torch.arange(97) > 60, -100)
    whole = module.loss({"tokens": tokens, "labels": labels}).item()
    module.losses, module.validation_losses = losses.losses, []
    rows = [{"tokens": row, "labels": label} for row, label in zip(tokens, labels, strict=True)]
    seen = fit(folder, module, rows=rows, callbacks=(losses,))
    return {"whole": whole, "shared": seen["losses"][0]}


def poisoned() -> ForeignModule:
    """Its second block spoils the tokens of one rank; the third one mixes those of all."""
    module = placed()
    module.model.blocks[1].mlp.append(Poison())
    return module


def placed(**options: Any) -> ForeignModule:
    return ForeignModule(model=PlacedGPT(**options))


def cases(folder: Path) -> dict[str, Callable[[], Any]]:
    rank = int(os.environ["RANK"])
    lighthouse = lambda **options: all_lighthouse(1, CONFIG, **options)  # noqa: E731
    run = partial(fit, folder)
    beside = placed()
    beside.model.blocks[2].attn = nn.Sequential(WrittenOut())
    pairs = [(row[:-1], row[1:]) for row in Sequences(8).tokens]
    return {
        "ranks": lambda: run(placed(), size=4),
        "none": lambda: run(placed(), size=0),
        "positions": lambda: run(ForeignModule(), callbacks=(lighthouse(),)),
        "positions unchecked": lambda: run(placed(), callbacks=(lighthouse(),)),
        "validation": lambda: run(ForeignModule(), how="validate"),
        "convolution": lambda: run(ForeignModule(model=EdgeReader())),
        "odd heads": lambda: run(placed(dim=15, heads=3), callbacks=(lighthouse(),)),
        "uneven": lambda: run(placed(), rows=Sequences(8, 127)),
        "batches": lambda: run(placed(), rows=Sequences(8, seed=rank)),
        "probe": lambda: run(Offering(), callbacks=(lighthouse(), FutureLeakProbe())),
        "evaluation": lambda: run(Offering(), callbacks=(LongContextEvaluation(num_samples=1, passkey=False),)),
        "documents": lambda: run(placed(), callbacks=(lighthouse(documents=True),)),
        "packed ids": lambda: run(
            Reads(model=PlacedGPT()), rows=packed_at_the_edge("document_ids"), callbacks=(lighthouse(),)
        ),
        "packed positions": lambda: run(
            Reads(model=PlacedGPT()), rows=packed_at_the_edge("position_ids"), callbacks=(lighthouse(),)
        ),
        "packed and ignored": lambda: run(
            Reads(model=PlacedGPT()),
            rows=packed_at_the_edge("document_ids"),
            callbacks=(lighthouse(documents="ignore"),),
        ),
        "form": lambda: run(placed(), rows=pairs),
        "own form": lambda: run(Paired(model=PlacedGPT()), rows=pairs),
        "written out": lambda: run(beside),
        "no attention": lambda: run(ForeignModule(model=nn.Embedding(VOCABULARY, VOCABULARY))),
        "dropout": lambda: run(Dropping(model=PlacedGPT())),
        "encoder": lambda: run(ForeignModule(model=Encoder()), callbacks=(lighthouse(),)),
        "encoder validated": lambda: run(ForeignModule(model=Encoder()), how="validate"),
        "manual": lambda: run(Manual(PlacedGPT()), callbacks=(lighthouse(),)),
        "spoilt": lambda: run(
            Spoiling(model=PlacedGPT()), callbacks=(all_lighthouse(2, CONFIG),), accumulate_grad_batches=4
        ),
        "poisoned": lambda: run(poisoned(), callbacks=(all_lighthouse(2, CONFIG),)),
        "alone": lambda: run(placed(), size=1),
        "transformers": lambda: pretrained(folder),
        "decoder of transformers": lambda: continued(folder),
    }


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    said = {}
    for name, case in cases(folder).items():
        torch.manual_seed(0)
        try:
            said[name] = case()
        except (RuntimeError, ValueError, TypeError) as error:
            said[name] = f"{type(error).__name__}: {error}"
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    run_ranks(partial(main, Path(sys.argv[1])), 2)
