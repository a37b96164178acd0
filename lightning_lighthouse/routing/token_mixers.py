"""What carries tokens into later ones beside attention: convolutions, state spaces, linear attention, recurrences.

Attention is kept inside documents call by call; these keep a state or a few tokens of the document before, and no call
shows it. They are known by torch's classes, by what their own class is called, and by the layer types of a config.
Code that says nothing of the kind, as a running sum in a forward, is not seen.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from torch import nn

from lightning_lighthouse.checks import SettingError, quoted
from lightning_lighthouse.routing.adapters.transformers_inputs import config_of, find_models

# How classes of such modules are called, in transformers and in packages beside it; not "Linear" or "Conv1D" alone,
# which are plain projections, nor "Mixer" or "Recurrent", which may be over experts or over depth.
MIXER_CLASSES = re.compile(
    r"Mamba|StateSpace|SSM|DeltaNet|DeltaAttention|LinearAttention|LightningAttention|RGLRU|Rglru"
    r"|Rwkv|RWKV|Retention|RetNet|ShortConv|CausalConv|Hyena|xLSTM|mLSTM|sLSTM"
)
# What wraps or holds such modules and is called after them: the line is to name the mixer
HOLDERS = re.compile(r"(Model|ForCausalLM|ForConditionalGeneration|RMSNorm|Norm|Output|Cache|DecoderLayer)$")
# Where the configs of transformers say what the layers are
LAYER_TYPES = ("layer_types", "layers_block_type", "block_types")
# Parts of such types that are no attention, or hold more than it
MIXER_TYPES = frozenset({"linear", "conv", "mamba", "mamba2", "recurrent", "ssm", "hybrid", "rwkv", "lightning"})


def require_attention_alone(model: nn.Module, layers: Collection[nn.Module]) -> None:
    """Make sure that nothing but attention hands on something of one token to another.

    Models of transformers within `model` that have none of the layers, as a tower of sounds, are passed over.

    Args:
        model: Searched through.
        layers: The attention layers that must stay inside documents.

    Raises:
        SettingError: There is something else.
    """
    chosen = set(layers)
    towers = [part for part in find_models(model) if chosen.isdisjoint(part.modules())]
    passed = {module for tower in towers for module in tower.modules()}
    searched = {name: module for name, module in model.named_modules() if module not in passed}
    found = {name: module for name, module in searched.items() if _carries_tokens(module)}
    if found:
        name, module = next(iter(found.items()))
        more = f", the first of {len(found)} such modules," if len(found) > 1 else ""
        _refuse(f"{name or type(model).__name__} ({type(module).__name__}){more}")
    for config in map(config_of, searched.values()):
        for field in LAYER_TYPES:
            if kinds := _mixer_types(getattr(config, field, None)):
                _refuse(f"{type(model).__name__}, whose config has layers of {', '.join(kinds)} in {field},")


def _refuse(what: str) -> None:
    raise SettingError(
        f"documents=True keeps attention inside documents, but {what} carries tokens of one document into the next by "
        "other means than attention: train such a model on sequences of one document, or across documents with "
        "documents='ignore'"
    )


def _carries_tokens(module: nn.Module) -> bool:
    if isinstance(module, nn.RNNBase):
        return True
    if isinstance(module, nn.Conv1d | nn.ConvTranspose1d):
        # of size 1 it is a projection
        return module.kernel_size != (1,)
    name = type(module).__name__
    return MIXER_CLASSES.search(name) is not None and HOLDERS.search(name) is None


def _mixer_types(types: Any) -> list[str]:
    """Those of a config's layer types, quoted, that are not attention alone."""
    if not isinstance(types, list | tuple):
        return []
    names = {kind for kind in types if isinstance(kind, str)}
    return [quoted(kind) for kind in sorted(names) if not MIXER_TYPES.isdisjoint(kind.split("_"))]
