"""Models as transformers keeps them: a folder, a name that it can load, or a GGUF file.

The only file that reads them, for training, export and evaluation alike. transformers is imported when the first one is
read; no code of a model's folder is run; what is wrong with a model is said in one line.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from lightning_lighthouse.checks import SettingError, quoted, shown

CONFIG, GGUF = "config.json", ".gguf"
# The attention that is routed
ATTENTION = "sdpa"
# One of these is in each folder that has a tokenizer
TOKENIZERS = ("tokenizer*", "vocab*", "*.model")
KINDS = f"a folder, a name that transformers can load or a {GGUF} file"


def is_model(path: Path) -> bool:
    """Whether a path is a folder that transformers saved, or a `.gguf` file."""
    return (path / CONFIG).is_file() or (path.suffix == GGUF and path.is_file())


def is_name(model: str) -> bool:
    """Whether `model` can only be a name that transformers may know, as "owner/model": nothing lies there."""
    is_plain = not model.startswith((".", "/", "~")) and model.count("/") <= 1 and bool(model)
    return is_plain and not Path(model).exists() and not model.endswith((GGUF, ".pt", ".ckpt", ".yaml", ".json"))


def read_config(model: str) -> Any:
    """The config of a causal language model, without what its file said of quantized weights.

    Args:
        model: A folder that transformers saved, a name that it can load, or a `.gguf` file.

    Raises:
        SettingError: There is no such model, a package is missing, or it is no language model.
    """
    place, options = _located(model)
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(place, **options)
    # whatever transformers, its hub and their parsers raise
    except Exception as error:
        what = "is nothing here, and as a name it cannot be read" if is_name(model) else "cannot be read"
        raise SettingError(f"model {quoted(model)} {what}: {_line(error)}") from None
    quantized = getattr(config, "quantization_config", None)
    if quantized is not None and "gguf_file" not in options:
        # without its scales transformers would read them as they are
        told = quantized if isinstance(quantized, dict) else vars(quantized)
        kind = getattr(told.get("quant_method"), "value", told.get("quant_method"))
        raise SettingError(
            f"model {quoted(model)} has quantized weights ({kind}): give one whose weights are floats, or save it so"
        )
    if hasattr(config, "quantization_config"):
        # the weights are read as floats, and saved as such
        del config.quantization_config
    return config


def read_weights(model: str, config: Any, dtype: torch.dtype, attention: str | None = ATTENTION) -> Any:
    """The model with its weights, on the CPU, whatever the default device is.

    Args:
        model: As in `read_config`.
        config: What to make of it: that of `read_config`, perhaps changed.
        dtype: Of the weights.
        attention: transformers' name of its implementation; None: transformers chooses.

    Raises:
        SettingError: They cannot be read, or some are missing.
    """
    place, options = _located(model)
    from transformers import AutoModelForCausalLM

    if attention is not None:
        options["attn_implementation"] = attention
    try:
        with torch.device("cpu"):
            read: Any = AutoModelForCausalLM.from_pretrained(
                place, config=config, dtype=dtype, output_loading_info=True, **options
            )
    except Exception as error:
        raise SettingError(f"the weights of {quoted(model)} cannot be read: {_line(error)}") from None
    loaded, report = read
    missing = sorted(report["missing_keys"])
    if missing:
        raise SettingError(f"{quoted(model)} lacks {len(missing)} of its weights, the first one {missing[0]}")
    return _as_floats(loaded)


def read_tokenizer(model: str) -> Any:
    """The tokenizer of a model; None where it has none.

    Args:
        model: As in `read_config`.

    Raises:
        SettingError: It cannot be read.
    """
    place, options = _located(model)
    from transformers import AutoTokenizer

    folder = Path(place)
    is_bare = "gguf_file" not in options and folder.is_dir()
    if is_bare and not any(file for pattern in TOKENIZERS for file in folder.glob(pattern)):
        return None
    try:
        return AutoTokenizer.from_pretrained(place, **options)
    except Exception as error:
        raise SettingError(f"the tokenizer of {quoted(model)} cannot be read: {_line(error)}") from None


def read_generation(model: str) -> Any:
    """What a model's folder says of generating with it, such as all tokens that end a text; None where it says nothing.

    Args:
        model: As in `read_config`.
    """
    place, options = _located(model)
    from transformers import GenerationConfig

    if "gguf_file" in options:
        return None
    options.pop("trust_remote_code")
    try:
        return GenerationConfig.from_pretrained(place, **options)
    except (OSError, ValueError):
        # most base models have none
        return None


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
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=ATTENTION)
    # left out with the drawing: a tied output layer would be saved a second time
    model.tie_weights()
    return model


def _located(model: str) -> tuple[str, dict[str, Any]]:
    """What `from_pretrained` is told."""
    if find_spec("transformers") is None:
        raise SettingError(
            f"model {quoted(model)} needs the package transformers: pip install 'lightning_lighthouse[hf]'"
        )
    path, options = Path(model), {"trust_remote_code": False}
    if model.endswith(GGUF):
        if not path.is_file():
            raise SettingError(f"model must be {KINDS}, got {quoted(model)}: no such file")
        if find_spec("gguf") is None:
            raise SettingError(
                f"model {quoted(model)} needs the package gguf, which reads such files: pip install "
                "'lightning_lighthouse[gguf]'"
            )
        return str(path.parent), {**options, "gguf_file": path.name, "local_files_only": True}
    if path.is_dir():
        if not (path / CONFIG).is_file():
            raise SettingError(f"model {quoted(model)} is a folder without {CONFIG}: no model of transformers")
        return model, {**options, "local_files_only": True}
    if not is_name(model):
        raise SettingError(f"model must be {KINDS}, got {quoted(model)}: no such folder")
    return model, dict(options)


def _as_floats(model: Any) -> Any:
    """Without what transformers keeps of a GGUF file's own types: it would refuse to save the model."""
    for owner, name in ((model, "hf_quantizer"), (model, "quantization_method"), (model.config, "quantization_config")):
        if hasattr(owner, name):
            delattr(owner, name)
    model.is_quantized = False
    return model


def _line(error: Exception) -> str:
    """What was raised, in one line of bearable length."""
    return shown(" ".join(str(error).split()), 300)
