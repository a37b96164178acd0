"""Models as transformers keeps them: a folder, a name that it can load, or a GGUF file.

transformers is imported when the first one is read; what is wrong with a model is said in one line.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from lightning_lighthouse.checks import SettingError, quoted

GGUF = ".gguf"
# The attention that is routed
ATTENTION = "sdpa"


def read_config(model: str) -> Any:
    """The config of a causal language model, without what its file said of quantized weights.

    Args:
        model: A folder that transformers saved, a name that it can load, or a `.gguf` file.

    Raises:
        SettingError: There is no such model, a package is missing, or it is no language model.
    """
    from transformers import AutoConfig

    place, options = _located(model)
    try:
        config = AutoConfig.from_pretrained(place, **options)
    # whatever transformers, its hub and their parsers raise
    except Exception as error:
        raise SettingError(f"model {quoted(model)} cannot be read: {_line(error)}") from None
    if hasattr(config, "quantization_config"):
        # the weights are read as floats, and saved as such
        del config.quantization_config
    return config


def read_weights(model: str, config: Any, dtype: torch.dtype) -> Any:
    """The model with its weights, on the CPU, whatever the default device is.

    Args:
        model: As in `read_config`.
        config: What to make of it: that of `read_config`, perhaps changed.
        dtype: Of the weights.

    Raises:
        SettingError: They cannot be read, or some are missing.
    """
    from transformers import AutoModelForCausalLM

    place, options = _located(model)
    try:
        with torch.device("cpu"):
            read: Any = AutoModelForCausalLM.from_pretrained(
                place, config=config, dtype=dtype, attn_implementation=ATTENTION, output_loading_info=True, **options
            )
    except Exception as error:
        raise SettingError(f"the weights of {quoted(model)} cannot be read: {_line(error)}") from None
    loaded, report = read
    missing = sorted(report["missing_keys"])
    if missing:
        raise SettingError(f"{quoted(model)} lacks {len(missing)} of its weights, the first one {missing[0]}")
    return loaded


def read_tokenizer(model: str) -> Any:
    """The tokenizer of a model; None where it has none.

    Args:
        model: As in `read_config`.
    """
    from transformers import AutoTokenizer

    place, options = _located(model)
    if not options and Path(place).is_dir() and not list(Path(place).glob("tokenizer*")):
        return None
    try:
        return AutoTokenizer.from_pretrained(place, **options)
    except Exception as error:
        raise SettingError(f"the tokenizer of {quoted(model)} cannot be read: {_line(error)}") from None


def empty_model(config: Any, dtype: torch.dtype) -> Any:
    """The model without memory: on the meta device.

    Raises:
        SettingError: transformers has no causal language model for this config, or none whose attention is SDPA.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=ATTENTION)
    except (ValueError, ImportError) as error:
        raise SettingError(f"a {config.model_type} cannot be trained here: {_line(error)}") from None


def materialized(config: Any, dtype: torch.dtype) -> Any:
    """The model on the CPU, whose weights are still to be loaded: none is drawn, and buffers are right."""
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with torch.device("cpu"), no_init_weights():
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=ATTENTION)


def _located(model: str) -> tuple[str, dict[str, Any]]:
    """What `from_pretrained` is told."""
    if find_spec("transformers") is None:
        raise SettingError("models of transformers need the package: pip install transformers")
    path = Path(model)
    if model.endswith(GGUF):
        if not path.is_file():
            raise SettingError(f"model must be a folder, a name or a {GGUF} file, got {quoted(model)}: no such file")
        if find_spec("gguf") is None:
            raise SettingError(f"model {quoted(model)} needs the package that reads such files: pip install gguf")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise SettingError(f"model {quoted(model)} is a folder without config.json: no model of transformers")
        return model, {"local_files_only": True}
    if path.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise SettingError(f"model must be a folder, a name or a {GGUF} file, got {quoted(model)}: no such folder")
    return model, {}


def _line(error: Exception) -> str:
    """The first sentence of what was raised."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:300]}..."
