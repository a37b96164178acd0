"""A `Decoder` as the model of transformers that it is: a Llama; and its bytes as a tokenizer of theirs."""

# W width of the model

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_lighthouse.data.tokenizers import ByteTokenizer
from lightning_lighthouse.model.decoder import Decoder

END_OF_DOCUMENT = "<|endoftext|>"


def llama_of(decoder: Decoder, state: Mapping[str, Tensor], num_positions: int) -> Any:
    """A LlamaForCausalLM with these weights, on the CPU.

    Args:
        decoder: Of these sizes; its own weights are not read.
        state: The state dict of such a decoder.
        num_positions: Tokens of the sequences that it was trained on.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = decoder.shape
    config = LlamaConfig(
        vocab_size=decoder.num_vocabulary,
        hidden_size=shape.dim,
        intermediate_size=shape.ffn_dim,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=num_positions,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.device("cpu"):
        model: Any = LlamaForCausalLM(config)
    dtypes = {value.dtype for value in state.values()}
    model.to(dtypes.pop() if len(dtypes) == 1 else torch.float32)
    model.load_state_dict(dict(_renamed(decoder, state)))
    return model.eval()


def _renamed(decoder: Decoder, state: Mapping[str, Tensor]) -> Any:
    """The weights by their names in a Llama; what is one matrix here are several there."""
    shape = decoder.shape
    heads = [shape.num_heads, shape.num_kv_heads, shape.num_kv_heads]
    yield "model.embed_tokens.weight", state["embedding.weight"]
    yield "model.norm.weight", state["head.norm.weight"]
    yield "lm_head.weight", state["head.projection.weight"]
    for number in range(shape.num_layers):
        ours, theirs = f"blocks.{number}", f"model.layers.{number}"
        qkv = state[f"{ours}.attention.qkv.weight"].split([count * shape.head_dim for count in heads])
        for name, part in zip("qkv", qkv, strict=True):
            yield f"{theirs}.self_attn.{name}_proj.weight", part
        gate, up = state[f"{ours}.feed_forward.gate_up.weight"].chunk(2)
        yield f"{theirs}.mlp.gate_proj.weight", gate
        yield f"{theirs}.mlp.up_proj.weight", up
        yield f"{theirs}.self_attn.o_proj.weight", state[f"{ours}.attention.out.weight"]
        yield f"{theirs}.mlp.down_proj.weight", state[f"{ours}.feed_forward.down.weight"]
        yield f"{theirs}.input_layernorm.weight", state[f"{ours}.attention_norm.weight"]
        yield f"{theirs}.post_attention_layernorm.weight", state[f"{ours}.feed_forward_norm.weight"]


def byte_tokenizer() -> Any:
    """The tokenizer "bytes" as one of transformers: each byte is a token, and 256 ends a document."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    # the letters that stand for bytes there, in the order of the bytes
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = (byte for byte in range(256) if byte not in shown)
    letters = {byte: chr(byte) for byte in shown} | {byte: chr(256 + place) for place, byte in enumerate(others)}
    end = ByteTokenizer.end_of_document
    by_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    added = {"id": end, "content": END_OF_DOCUMENT, "special": True}
    flags = dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)
    record = {
        "version": "1.0",
        "added_tokens": [added | flags],
        "pre_tokenizer": by_bytes,
        "decoder": by_bytes,
        "model": {"type": "BPE", "vocab": {letters[byte]: byte for byte in range(256)}, "merges": []},
    }
    backend = Tokenizer.from_str(json.dumps(record))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END_OF_DOCUMENT)
