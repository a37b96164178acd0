"""What is asked of a module before its sequences are shared: no part that needs whole ones, and the right positions.

Positions that each rank counts from 0 would train without an error, and wrongly. So the first tokens run twice, whole
on each rank and shared, and the queries and keys that reach attention are compared layer by layer. A layer that never
reaches attention in that is named too: it would see this rank's tokens alone.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn

from lightning_lighthouse.checks import SettingError, is_named
from lightning_lighthouse.context.group import Context, whole_sequences
from lightning_lighthouse.context.heard import Calls, Listener, heard
from lightning_lighthouse.context.slices import num_inputs, shorten, slice_batch
from lightning_lighthouse.evaluation.undisturbed import undisturbed
from lightning_lighthouse.notices import log_once
from lightning_lighthouse.routing.targets import find_targets
from lightning_lighthouse.training.nonfinite import reshard

# Of each rank in the comparison: more than any window of a convolution, and cheap to attend to densely.
CHECKED_TOKENS = 256
# Relative differences above which queries or keys are others: of a layer, and of its worst token. 16 bits and other
# sizes of matrices make some percent in deep layers; positions from 0 and what crosses an edge make about 1.
MOST_OF_LAYER, MOST_OF_TOKEN = 0.05, 0.5
STEPS = {
    RunningStage.TRAINING: "training_step",
    RunningStage.SANITY_CHECKING: "validation_step",
    RunningStage.VALIDATING: "validation_step",
    RunningStage.TESTING: "test_step",
    RunningStage.PREDICTING: "predict_step",
}


def attention_layers(trainer: Trainer, module: LightningModule) -> dict[str, nn.Module]:
    """The attention modules of a model, by name, those that LighthouseCallback was told of included.

    Raises:
        SettingError: There is none.
    """
    selected = {}
    for callback in _callbacks(trainer, "LighthouseCallback"):
        if callback.select is not None:
            selected = find_targets(module, callback.select)
    try:
        return {**selected, **find_targets(module)}
    except ValueError as error:
        if selected:
            return selected
        raise SettingError(f"{type(module).__name__} cannot share sequences: {error}") from None


def check_fits(trainer: Trainer, module: LightningModule, context: Context) -> None:
    """Refuse what cannot run on parts of sequences, before there is a batch.

    Raises:
        SettingError: There is some.
    """
    shared = f"context_parallel_size={context.size}"
    for key in ("FutureLeakProbe", "LongContextEvaluation"):
        if _callbacks(trainer, key):
            raise SettingError(
                f"{key} needs whole sequences and cannot run under {shared}: leave it out, and measure a checkpoint "
                "in one process"
            )
    if any(callback.documents is True for callback in _callbacks(trainer, "LighthouseCallback")):
        raise SettingError(
            f"documents=True cannot keep attention inside documents under {shared} yet: train without context "
            "parallelism, or with documents='ignore'"
        )
    num_tokens = getattr(getattr(trainer, "datamodule", None), "seq_len", None)
    if isinstance(num_tokens, int) and num_tokens % context.size:
        raise SettingError(
            f"{num_tokens:,} tokens cannot be shared by {context.size} ranks; choose seq_len a multiple of "
            f"{context.size}"
        )
    for name in STEPS.values():
        if is_param_in_hook_signature(getattr(module, name), "dataloader_iter", explicit=True):
            raise SettingError(f"{name} takes dataloader_iter, whose batches {shared} cannot cut: let it take a batch")
    _check_modules(module, shared)


def _check_modules(module: LightningModule, shared: str) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    modules = dict(module.named_modules())
    is_compiled = any(_is_compiled(part) for part in modules.values())
    for name, part in modules.items():
        if isinstance(part, FullyShardedDataParallel):
            raise SettingError(
                f"{name or type(module).__name__} is sharded by FSDP1, which {shared} does not know: shard with "
                "fully_shard (FSDP2) under ContextParallelStrategy"
            )
        if isinstance(part, nn.MultiheadAttention) and is_compiled:
            raise SettingError(
                f"{name} is an nn.MultiheadAttention in a compiled model, whose attention {shared} does not see: leave "
                "the model uncompiled, or call scaled_dot_product_attention in a module of your own"
            )


def _is_compiled(part: nn.Module) -> bool:
    return getattr(part, "_compiled_call_impl", None) is not None or isinstance(part, torch._dynamo.OptimizedModule)


def _callbacks(trainer: Trainer, key: str) -> list[Any]:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if callback.state_key == key]


def check_positions(
    trainer: Trainer, module: LightningModule, batch: Any, context: Context, layers: dict[str, nn.Module]
) -> None:
    """Compare queries and keys of the first tokens, whole and shared; every rank calls it.

    Args:
        trainer: About to run a step.
        module: Its step runs twice, in eval mode, without gradients; what it logs is dropped.
        batch: Of a known form, whole.
        context: The ranks that share a sequence.
        layers: The attention modules by name.

    Raises:
        SettingError: They differ, or a layer ran without attending through SDPA.
    """
    stage = trainer.state.stage
    if stage == RunningStage.TRAINING and not module.automatic_optimization:
        log_once("context positions", "positions are not checked: under manual optimization a step would train")
        return
    total = num_inputs(batch)
    assert total is not None
    assert stage is not None
    count = min(CHECKED_TOKENS, total // context.size)
    start = shorten(batch, count * context.size)
    with _apart(trainer, module):
        with whole_sequences(), heard(layers, context.rank * count, count) as whole:
            _step(trainer, module, STEPS[stage], start)
        context.num_tokens = count
        with heard(layers, 0, count) as shared:
            _step(trainer, module, STEPS[stage], slice_batch(start, context))
    _check_all_attend(shared, context)
    _check_same(trainer, whole.calls, shared.calls)


@contextmanager
def _apart(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Leave no trace: of what is logged, of metrics, of gathered weights, of frames to compile."""
    metrics = [part for part in module.modules() if is_named(part, "Metric")]
    states = [_state(metric) for metric in metrics]
    own = {name: value for name, value in vars(module).items() if name in ("log", "log_dict")}
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(undisturbed(trainer, module))
        stack.callback(reshard, module)
        vars(module).update(log=_nothing, log_dict=_nothing)
        try:
            yield
        finally:
            for name in ("log", "log_dict"):
                del vars(module)[name]
            vars(module).update(own)
            for metric, state in zip(metrics, states, strict=True):
                vars(metric).update(state)


def _state(metric: Any) -> dict[str, Any]:
    values = {name: getattr(metric, name) for name in metric._defaults}
    return copy.deepcopy({**values, "_update_count": metric._update_count, "_computed": metric._computed})


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Stands in for `log`."""


def _step(trainer: Trainer, module: LightningModule, name: str, batch: Any) -> None:
    step, strategy = getattr(module, name), trainer.strategy
    # as Lightning calls it where there is one loader
    indices = {"batch_idx": 0} if is_param_in_hook_signature(step, "batch_idx", min_args=2) else {}
    parameter = inspect.signature(step).parameters.get("dataloader_idx")
    if parameter is not None and parameter.default is parameter.empty:
        indices["dataloader_idx"] = 0
    # of the class: what listens to the strategy's steps waits for the batch itself
    getattr(type(strategy), name)(strategy, batch, *indices.values())


def _check_all_attend(listener: Listener, context: Context) -> None:
    silent = [name for name in listener.ran if name not in listener.calls]
    if silent:
        others = f" and {len(silent) - 1} other layers" if len(silent) > 1 else ""
        raise SettingError(
            f"{min(silent)}{others} ran without a call of scaled_dot_product_attention, so that nothing was exchanged "
            f"by {context.size} ranks: choose SDPA (for transformers, attn_implementation='sdpa'), or call "
            "lightning_lighthouse.causal_attention"
        )


def _check_same(trainer: Trainer, whole: Calls, shared: Calls) -> None:
    names = [name for name in shared if len(shared[name]) == len(whole.get(name, ()))]
    if not names:
        return
    differences = torch.stack([_difference(whole[name], shared[name]) for name in names])
    # every rank must stop, and say the same
    differences = trainer.strategy.reduce(differences, reduce_op="max")
    for name, (of_layer, of_token) in zip(names, differences.tolist(), strict=True):
        if of_layer > MOST_OF_LAYER or of_token > MOST_OF_TOKEN:
            raise SettingError(
                f"queries and keys of {name or 'attention'} differ by {max(of_layer, of_token):.0%} once the sequence "
                "is shared: positions are counted from 0 on every rank, or a layer before it looks at neighbouring "
                "tokens; count them by lightning_lighthouse.local_positions(n), or take position_ids of the batch"
            )


def _difference(whole: list[tuple[Tensor, Tensor]], shared: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The largest relative differences of a layer's calls, and of a token in them; NaN is another's fault, and 0."""
    found = []
    for pair, other in zip(whole, shared, strict=True):
        for x, y in zip(pair, other, strict=True):
            # [B, n, H D]
            x, y = (z.double().transpose(1, 2).flatten(2) for z in (x, y))
            error, size = (x - y).norm(dim=-1), x.norm(dim=-1)
            of_layer, of_token = error.norm() / size.norm(), (error / size).nan_to_num(0.0).max()
            found.append(torch.stack([of_layer, of_token]))
    return torch.stack(found).nan_to_num(0.0).amax(0)
