"""A batch that packs documents is refused by name, wherever it says so, and one that does not is let through."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from families import CONFIG, GROUPED, build_transformers
from foreign import GPT, VOCABULARY

from lightning_lighthouse import Documents, patch_attention
from lightning_lighthouse.checks import SettingError
from lightning_lighthouse.routing.packing import PackedBatchError, PackingCheck, said_of_documents

TOKENS = 97
PLAIN = torch.arange(TOKENS).expand(2, -1)
RESTARTING = torch.cat([torch.arange(40), torch.arange(TOKENS - 40)]).expand(2, -1)
# only the second row, at its last token
AT_THE_END = torch.stack([torch.arange(TOKENS), torch.arange(TOKENS) % (TOKENS - 1)])
ONE = torch.zeros(2, TOKENS, dtype=torch.long)
SEVERAL = (torch.arange(TOKENS) >= 40).long().expand(2, -1)
SEGMENTS = 1 + SEVERAL
RIGHT_PADDED = (torch.arange(TOKENS) < 90).long().expand(2, -1)


@dataclass
class Batch:
    tokens: torch.Tensor
    document_ids: torch.Tensor


class Fields(NamedTuple):
    tokens: torch.Tensor
    document_ids: torch.Tensor


PACKED = {
    "documents": ({"documents": Documents([[40, 57], [97]])}, "documents of a sequence are several"),
    "ids": ({"document_ids": SEVERAL}, "document_ids of a sequence differ"),
    "indices of a collator": ({"seq_idx": SEVERAL}, "seq_idx of a sequence differ"),
    "positions": ({"position_ids": RESTARTING}, "position_ids restart"),
    "positions of one row, at its end": ({"position_ids": AT_THE_END}, "position_ids restart"),
    "positions under a mask of ones": ({"position_ids": RESTARTING, "attention_mask": ONE + 1}, "position_ids restart"),
    "positions of four axes": (
        {"input_ids": ONE, "position_ids": torch.stack([RESTARTING, PLAIN, PLAIN, PLAIN])},
        "position_ids restart",
    ),
    "boundaries of queries": ({"cu_seq_lens_q": torch.tensor([0, 40, 97])}, "cu_seq_lens_q name several documents"),
    "boundaries of keys": ({"cu_seq_lens_k": torch.tensor([0, 40, 97])}, "cu_seq_lens_k name several documents"),
    "boundaries inside a row of several": (
        {"input_ids": ONE, "cu_seq_lens_q": torch.tensor([0, 40, TOKENS, 2 * TOKENS])},
        "cu_seq_lens_q name several documents",
    ),
    "boundaries before padding": ({"cu_seq_lens_q": torch.tensor([0, 40, 90, 90])}, "cu_seq_lens_q name several"),
    "a mask of segments": ({"attention_mask": SEGMENTS}, "attention_mask numbers several segments"),
    "a dataclass": (Batch(ONE, SEVERAL), "document_ids of a sequence differ"),
    "an object": (SimpleNamespace(tokens=ONE, document_ids=SEVERAL), "document_ids of a sequence differ"),
    "ids of floats": ({"document_ids": SEVERAL.float()}, "document_ids of a sequence differ"),
    "ids in an array": ({"document_ids": SEVERAL.numpy()}, "document_ids of a sequence differ"),
    "named fields, in a list": ([Fields(ONE, SEVERAL)], "document_ids of a sequence differ"),
    "a batch within a batch": ([{"x": {"document_ids": SEVERAL}}], "document_ids of a sequence differ"),
}
UNPACKED = {
    "tokens alone": {"tokens": RESTARTING},
    "a tensor": SEVERAL,
    "a dataclass of one document a row": Batch(SEVERAL, ONE),
    "named fields of one document a row": Fields(SEVERAL, ONE),
    "one document a row": {"documents": Documents([[97], [97]])},
    "one id": {"document_ids": ONE},
    "other ids in other rows": {"document_ids": torch.stack([ONE[0], ONE[0] + 1])},
    "positions": {"position_ids": PLAIN},
    "positions from later on": {"position_ids": PLAIN + 5},
    "positions that leave some out": {"position_ids": PLAIN * 2},
    "positions of three axes": {"position_ids": RESTARTING.expand(3, 2, TOKENS)},
    "positions of four axes, of which images restart": {
        "input_ids": ONE,
        "position_ids": torch.stack([PLAIN, RESTARTING, RESTARTING, RESTARTING]),
    },
    # of ChatGLM: within the text, then within what is generated
    "two kinds of positions in a batch of four": {
        "input_ids": torch.zeros(4, TOKENS, dtype=torch.long),
        "position_ids": torch.stack([PLAIN[0], RIGHT_PADDED[0]]).expand(4, 2, TOKENS),
    },
    "positions of padding": {"position_ids": PLAIN * RIGHT_PADDED, "attention_mask": RIGHT_PADDED},
    "padding on the left": {
        "position_ids": (RIGHT_PADDED.flip(1).cumsum(1) - 1).clamp(min=0),
        "attention_mask": RIGHT_PADDED.flip(1),
    },
    "padding on the left, under a mask of floats": {
        "position_ids": (RIGHT_PADDED.flip(1).cumsum(1) - 1).clamp(min=0),
        "attention_mask": RIGHT_PADDED.flip(1).float(),
    },
    "boundaries of one": {"cu_seq_lens_q": torch.tensor([0, 97])},
    "boundaries of one, repeated": {"input_ids": ONE[:1], "cu_seq_lens_q": torch.tensor([0, TOKENS, TOKENS, TOKENS])},
    "boundaries of one, repeated before padding": {"cu_seq_lens_q": torch.tensor([0, 90, 90]), "input_ids": ONE[:1]},
    "boundaries of rows": {"input_ids": ONE, "cu_seq_lens_q": torch.tensor([0, TOKENS, 2 * TOKENS])},
    "boundaries of rows of embeddings": {
        "inputs_embeds": torch.zeros(2, TOKENS, 4),
        "cu_seq_lens_q": torch.tensor([0, TOKENS, 2 * TOKENS]),
    },
    "a mask": {"attention_mask": RIGHT_PADDED},
    "names for other things": {"documents": ["a", "b"], "document_ids": "x", "position_ids": None},
}


@pytest.mark.parametrize(("batch", "sign"), PACKED.values(), ids=PACKED)
def test_a_packed_batch_is_refused_by_its_sign(batch, sign):
    with pytest.raises(PackedBatchError, match=sign) as caught:
        PackingCheck().look(batch)
    line = str(caught.value)
    assert "documents=True" in line
    assert "documents='ignore'" in line
    assert "\n" not in line


@pytest.mark.parametrize("batch", UNPACKED.values(), ids=UNPACKED)
def test_other_batches_are_let_through(batch):
    check = PackingCheck()
    check.look(batch)
    check.finish()


def test_every_batch_is_looked_at_also_positions_that_changed_in_place():
    check, positions = PackingCheck(), PLAIN.clone()
    check.look({"position_ids": positions})
    check.look({"position_ids": positions})
    positions.copy_(RESTARTING)
    with pytest.raises(PackedBatchError):
        check.look({"position_ids": positions})


def test_positions_that_are_known_are_looked_at_again_under_another_mask():
    check = PackingCheck()
    check.look({"position_ids": PLAIN, "attention_mask": RIGHT_PADDED})
    with pytest.raises(PackedBatchError, match="segments"):
        check.look({"position_ids": PLAIN, "attention_mask": SEGMENTS})
    check, padding = PackingCheck(), SEVERAL
    check.look({"position_ids": RESTARTING, "attention_mask": padding})
    with pytest.raises(PackedBatchError, match="restart"):
        check.look({"position_ids": RESTARTING})


def test_a_check_is_copied_and_pickled_without_what_it_waits_for():
    check = PackingCheck()
    check.look({"position_ids": PLAIN})
    for other in (copy.deepcopy(check), pickle.loads(pickle.dumps(check))):
        assert other is not check
        with pytest.raises(PackedBatchError):
            other.look({"position_ids": RESTARTING})


@pytest.mark.parametrize("documents", [None, 1, "yes"])
def test_other_values_of_the_setting_are_refused(documents):
    with pytest.raises(ValueError, match="documents must be true, false or 'ignore'"):
        patch_attention(GPT(), CONFIG, documents=documents)


def test_documents_and_the_statement_that_there_are_none_exclude_each_other():
    with pytest.raises(SettingError, match="exclude each other"):
        patch_attention(GPT(), CONFIG, documents=True, hf_assume_causal=True)


def test_modules_know_what_was_said_until_the_patch_is_undone():
    model = GPT()
    block = model.blocks[0]
    assert said_of_documents(block) is None
    patch = patch_attention(model, CONFIG, documents="ignore")
    assert said_of_documents(block) == "ignore"
    patch.restore()
    assert said_of_documents(block) is None


@pytest.fixture(scope="module")
def llama():
    pytest.importorskip("transformers", reason="needs the extra hf")
    return build_transformers("LlamaConfig", **GROUPED).model


def tokens():
    return torch.randint(VOCABULARY, (2, TOKENS), generator=torch.Generator().manual_seed(0))


# a cache, which is what transformers makes by itself, turns its own look for documents off
@pytest.mark.parametrize("phase", ["on", "dense"])
@pytest.mark.parametrize("call", ["named", "by place", "inner model", "mask of ones"])
def test_a_transformers_model_refuses_packed_positions(llama, phase, call):
    x, ones = tokens(), torch.ones_like(tokens())
    calls = {
        "named": lambda positions: llama(input_ids=x, position_ids=positions),
        "by place": lambda positions: llama(x, None, positions),
        "inner model": lambda positions: llama.model(x, position_ids=positions),
        "mask of ones": lambda positions: llama(x, attention_mask=ones, position_ids=positions),
    }
    patch = patch_attention(llama, CONFIG)
    try:
        getattr(patch, phase)()
        calls[call](PLAIN)
        with pytest.raises(PackedBatchError, match="position_ids restart"):
            calls[call](RESTARTING)
        patch.off()
        calls[call](RESTARTING)
    finally:
        patch.restore()
    # nothing is left behind
    calls[call](RESTARTING)


def wrapped(model):
    """A model of transformers that makes the arguments of the models within it, of which one packs."""
    import transformers

    class Wrapper(transformers.PreTrainedModel):
        config_class = type(model.config)
        _supports_sdpa = True

        def __init__(self):
            super().__init__(model.config)
            self.packs, self.plain = model, copy.deepcopy(model)

        def forward(self, input_ids):
            self.packs(input_ids=input_ids, position_ids=RESTARTING)
            self.plain(input_ids=input_ids, position_ids=PLAIN)

    return Wrapper()


@pytest.mark.parametrize(("select", "packs"), [("packs.*self_attn", True), ("plain.*self_attn", False)])
def test_what_a_model_is_called_with_inside_another_one_is_looked_at_where_layers_are_patched(llama, select, packs):
    model = wrapped(llama)
    patch = patch_attention(model, CONFIG, select=select)
    try:
        patch.on()
        if packs:
            with pytest.raises(PackedBatchError, match="position_ids restart"):
                model(tokens())
        else:
            model(tokens())
            patch.check()
    finally:
        patch.restore()


def test_a_model_that_is_handed_a_mask_of_pairs_by_another_one_is_let_through(llama):
    model = wrapped(llama)
    left = RIGHT_PADDED.flip(1)
    positions = (left.cumsum(1) - 1).masked_fill(left == 0, 1)
    pairs = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril() & (left[:, None, None] != 0)

    def forward(input_ids, position_ids, attention_mask):
        # as models of images and text do
        model.packs(input_ids=input_ids, position_ids=position_ids, attention_mask=pairs)

    model.forward = forward
    patch = patch_attention(model, CONFIG, select="packs.*self_attn")
    try:
        patch.dense()
        model(input_ids=tokens(), position_ids=positions, attention_mask=left)
    finally:
        patch.restore()


def test_ignore_attends_across_documents_where_it_is_said(llama):
    x = tokens()
    patch = patch_attention(llama, CONFIG, documents="ignore")
    try:
        patch.on()
        llama(input_ids=x, position_ids=RESTARTING)
        patch.check()
    finally:
        patch.restore()


@pytest.mark.parametrize("documents", [False, "ignore"])
def test_the_statement_that_masks_are_causal_holds_for_packed_positions_only_with_ignore(llama, documents):
    x = tokens()
    llama.config.use_cache = False
    patch = patch_attention(llama, CONFIG, hf_assume_causal=True, documents=documents)
    try:
        patch.on()
        if documents:
            llama(input_ids=x, position_ids=RESTARTING)
            patch.check()
        else:
            with pytest.raises(ValueError, match="restart"):
                llama(input_ids=x, position_ids=RESTARTING)
    finally:
        patch.restore()
        llama.config.use_cache = True


SHOWN_COMPILED = {
    "positions": {"position_ids": RESTARTING},
    "positions under a mask of ones": {"position_ids": RESTARTING, "attention_mask": ONE + 1},
    "segments": {"position_ids": PLAIN, "attention_mask": SEGMENTS},
    "boundaries": {"cu_seq_lens_q": torch.tensor([0, 40, TOKENS, 2 * TOKENS])},
    "indices": {"seq_idx": SEVERAL},
}


@pytest.mark.parametrize(
    "told",
    [
        pytest.param(told, id=name, marks=() if name == "boundaries" or "mask" in name else pytest.mark.slow)
        for name, told in SHOWN_COMPILED.items()
    ],
)
def test_a_model_compiled_as_a_whole_refuses_what_an_eager_one_does(llama, told):
    torch._dynamo.reset()
    compiled = torch.compile(llama, backend="eager")
    left = RIGHT_PADDED.flip(1)
    patch = patch_attention(llama, CONFIG)
    # as under transformers' Trainer
    patch.documents.watches_evaluation = True
    try:
        with torch.no_grad():
            compiled(tokens(), position_ids=(left.cumsum(1) - 1).masked_fill(left == 0, 1), attention_mask=left)
            # raised in a frame it is an error of the frame
            with pytest.raises((PackedBatchError, RuntimeError), match="this batch packs documents"):
                compiled(tokens(), **told)
    finally:
        patch.restore()
        torch._dynamo.reset()


# a prompt comes in parts, or under a mask of other sizes than its positions
PROMPTED = {"static": {"cache_implementation": "static", "disable_compile": True}, "parts": {"prefill_chunk_size": 4}}


@pytest.mark.parametrize("settings", PROMPTED.values(), ids=PROMPTED)
def test_padding_before_a_prompt_is_no_packing(llama, settings):
    mask = RIGHT_PADDED.flip(1)[:, :20]
    call = {"attention_mask": mask, "max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, **settings}
    llama.eval()
    expected = llama.generate(tokens()[:, :20], **call)
    patch = patch_attention(llama, CONFIG)
    patch.documents.watches_evaluation = True
    try:
        assert torch.equal(llama.generate(tokens()[:, :20], **call), expected)
    finally:
        patch.restore()
        llama.train()
