"""`HuggingFaceDecoder`: a pretrained model of transformers to train on, at longer sequences, as a LightningModule."""

# B batch, N tokens, W width of the model

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from lightning_lighthouse.checks import SettingError, check_type, quoted
from lightning_lighthouse.context.group import current, local_positions
from lightning_lighthouse.huggingface.fused_loss import LossBackend, check_installed, fused_loss, is_fused
from lightning_lighthouse.huggingface.head import check_head, logits_of, require_base_model
from lightning_lighthouse.huggingface.reading import empty_model, read_config, read_weights
from lightning_lighthouse.huggingface.rope import check_shared, extend_positions
from lightning_lighthouse.huggingface.tokenizers import check_tokenizer
from lightning_lighthouse.model.language_model import LanguageModel, check, tokens_of
from lightning_lighthouse.model.network import chunks_of, total_of_chunks
from lightning_lighthouse.model.targets import mean_of


class HuggingFaceDecoder(LanguageModel):
    """A causal language model of transformers, trained further with `LighthouseCallback`, and handed back.

    The model is built without memory, and its weights are read when the Trainer asks for the model: on each process
    where each holds a copy, on the first alone where FSDP2 shards it. `lighthouse export` writes what became of it as a
    folder of transformers. A batch is that of `LanguageModel`: tokens, labels, documents.

    Args:
        model: A folder that transformers saved, a name that it can load, or a `.gguf` file, which is read as floats.
        sequence_length: Tokens of a sequence; the command line takes the data's. None: the positions are not checked.
        rope_theta: New base of the rotary frequencies; None: the model's.
        rope_parameters: transformers' own, laid over the model's, such as `{"rope_type": "yarn", "factor": 4.0}`; at
            most one of the two.
        precision: Of the weights; the Trainer's `precision` is that of the arithmetic.
        learning_rate: Peak learning rate of AdamW.
        betas: Decay rates of AdamW's two averages.
        eps: AdamW's term against division by zero.
        weight_decay: Weight decay of the matrices; the rest has none.
        warmup_steps: Optimizer steps of linear warm-up.
        schedule: What follows the warm-up. "constant": the peak to the end. "wsd": the peak, then a linear decay
            towards 0.
        decay_fraction: Fraction of all steps that "wsd" decays over.
        loss_chunk: Tokens whose logits are in memory at a time; computed again in the backward pass.
        loss_backend: What computes the training loss without the logits of all tokens. "chunked": this package.
            "liger": liger-kernel's fused linear cross-entropy, on CUDA. "auto": the latter where it is installed.
        compile: Compile each block with torch.compile; worth it on a GPU.
        activation_checkpointing: Compute every block again in the backward pass, to save memory.
        freeze: Patterns of parameter names that are not trained, such as "*embed_tokens*".
        restart_positions: Rotate by the position within the document, not within the sequence.

    Raises:
        ValueError: A value is out of range, the model cannot be read, or its positions do not reach so far.
    """

    def __init__(
        self,
        model: str,
        sequence_length: int | None = None,
        rope_theta: float | None = None,
        rope_parameters: dict[str, Any] | None = None,
        precision: Literal["float32", "bfloat16", "float16"] = "float32",
        learning_rate: float = 2e-5,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        warmup_steps: int = 100,
        schedule: Literal["constant", "wsd"] = "constant",
        decay_fraction: float = 0.2,
        loss_chunk: int = 4096,
        loss_backend: LossBackend = "auto",
        compile: bool = False,
        activation_checkpointing: bool = False,
        freeze: Sequence[str] = (),
        restart_positions: bool = False,
    ) -> None:
        given = dict(locals())
        super().__init__()
        check_type("precision", precision, Literal["float32", "bfloat16", "float16"])
        check_type("loss_backend", loss_backend, LossBackend)
        check_installed(loss_backend)
        check("freeze", freeze, not isinstance(freeze, str), "a list of patterns")
        if sequence_length is not None:
            check("sequence_length", sequence_length, sequence_length >= 1, "at least 1")
        self.save_hyperparameters()
        self.keep_own_settings(given)
        self.check_hyperparameters()
        self.config = read_config(model)
        extend_positions(self.config.get_text_config(), sequence_length, rope_theta, rope_parameters)
        self.config.use_cache = False
        self.model = self._prepared(empty_model(self.config, self._weights_dtype))
        require_base_model(self.model)

    @property
    def _weights_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.own_settings["precision"])
        return dtype

    @property
    def num_vocabulary(self) -> int:
        """Tokens that the model knows."""
        return int(self.config.get_text_config().vocab_size)

    def _prepared(self, model: Any) -> Any:
        """With what the settings change about any copy of it."""
        for pattern in self.own_settings["freeze"]:
            frozen = [p for name, p in model.named_parameters() if fnmatchcase(name, pattern)]
            if not frozen:
                raise ValueError(f"freeze must match names of parameters, got {quoted(pattern)}, which matches none")
            for parameter in frozen:
                parameter.requires_grad_(False)
        if self.own_settings["activation_checkpointing"]:
            # renamed in transformers 5
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        return model.train()

    def setup(self, stage: str) -> None:
        """Refuse a Trainer that would round the rotary frequencies. Raises SettingError."""
        precision = str(self.trainer.precision)
        if precision in ("bf16-true", "16-true"):
            raise SettingError(
                f"trainer.precision must be 32-true or mixed for a model of transformers, got {precision}, which "
                "rounds its rotary frequencies; for weights of 16 bits set the model's precision"
            )
        super().setup(stage)

    def check_data(self, data: Any) -> None:
        """Refuse data whose tokens are not the model's: more of them, or another tokenizer's. Raises SettingError."""
        super().check_data(data)
        given = getattr(data, "tokenizer", None)
        if isinstance(given, str):
            check_tokenizer(given, self.own_settings["model"], getattr(data, "end_of_document", None))

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores of the next token: `[B, N] -> [B, N, V]`, all of them in memory."""
        return logits_of(self.model, self.hidden(tokens))

    def hidden(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """The last hidden states: `[B, N] -> [B, N, W]`.

        Args:
            tokens: `[B, N]`.
            positions: `[B, N]`, of each token; None: from 0 on, or from this rank's first token.
        """
        if current() is not None:
            check_shared(self.config.get_text_config())
        if current() is not None and positions is None:
            # a model of transformers counts from 0, and so would each rank of a sequence
            positions = local_positions(tokens.shape[1], tokens.device).unsqueeze(0)
        told = {} if positions is None else {"position_ids": positions}
        states: Tensor = self.model.base_model(input_ids=tokens, use_cache=False, **told).last_hidden_state
        return states

    def loss(self, batch: Mapping[str, Tensor] | Tensor) -> Tensor:
        """The mean cross-entropy of a batch in nats per token; ValueError where the batch holds no such tokens."""
        tokens = tokens_of(batch)
        self.look_for_documents(batch)
        inputs, (targets, count) = tokens[:, :-1], self.targets(batch)
        x_BNW = self.hidden(inputs, self.positions(batch, inputs))
        # without gradients there is nothing to gain by making them
        if torch.is_grad_enabled() and is_fused(self.own_settings["loss_backend"], x_BNW.device):
            return mean_of(fused_loss(self.model, x_BNW.flatten(0, 1), targets.flatten()), count)
        chunks = chunks_of(x_BNW, targets, self.own_settings["loss_chunk"])
        return mean_of(total_of_chunks(self._chunk_loss, chunks), count)

    def token_losses(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The cross-entropy of each target in nats, all `[B, N]`; what `FutureLeakProbe` asks for."""
        x_BNW = self.hidden(inputs, self.positions_set(inputs))
        chunks = chunks_of(x_BNW, targets, self.own_settings["loss_chunk"])
        parts = [self._chunk_loss(x, y, "none") for x, y in chunks]
        return torch.cat(parts).view_as(targets)

    def next_token_logits(self, inputs: Tensor) -> Tensor:
        """Scores of the token after the last: `[B, N] -> [B, V]`; what `LongContextEvaluation` asks for."""
        return logits_of(self.model, self.hidden(inputs)[:, -1])

    def _chunk_loss(self, x: Tensor, targets: Tensor, reduction: str = "sum") -> Tensor:
        logits = logits_of(self.model, x)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, targets, reduction=reduction)

    def configure_model(self) -> None:
        """Read the weights, where none are there yet; shard under ModelParallelStrategy; compile the blocks in place.

        Raises:
            SettingError: They cannot be read.
        """
        if not any(parameter.is_meta for parameter in self.model.parameters()):
            return
        mesh = self.device_mesh
        if mesh is None:
            self.model = self._prepared(self._read())
        else:
            self._shard(mesh["data_parallel"])
        if self.own_settings["compile"]:
            for block in blocks_of(self.model):
                # fixed lengths: the sizes of the pyramid follow from N
                block.compile(dynamic=False)

    def cpu(self) -> Self:
        """To the CPU, as the Trainer does at the end; a model that was refused before its weights were read stays."""
        return self if any(parameter.is_meta for parameter in self.parameters()) else super().cpu()

    def _read(self) -> Any:
        loaded = read_weights(self.own_settings["model"], self.config, self._weights_dtype)
        check_head(loaded)
        return loaded

    def _shard(self, mesh: DeviceMesh) -> None:
        """FSDP2: a group of parameters for each block, and one for the rest; the first process reads for all."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        for block in blocks_of(self.model):
            fully_shard(block, mesh=mesh)
        fully_shard(self, mesh=mesh)
        # Lightning calls the steps, which call `loss`, not the forward that FSDP2 knows of
        register_fsdp_forward_method(self, "loss")
        register_fsdp_forward_method(self, "token_losses")
        register_fsdp_forward_method(self, "next_token_logits")
        device = self.trainer.strategy.root_device
        self.model.to_empty(device=device)
        loaded = self._read() if self.trainer.is_global_zero else None
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(self.model, {} if loaded is None else loaded.state_dict(), options=options)
        # frequencies and the like are in no state dict
        whole = {} if loaded is None else dict(loaded.named_buffers())
        for name, buffer in self.model.named_buffers():
            if name in whole:
                buffer.copy_(whole[name])
            torch.distributed.broadcast(buffer, src=0)


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """The repeated blocks of a decoder: its longest list of modules.

    Raises:
        SettingError: It has none.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise SettingError(f"{type(model).__name__} has no list of blocks to compile or to shard")
    return max(lists, key=len)
