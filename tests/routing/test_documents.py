"""Attention stays inside the documents that are set, in every layer and phase, or the call is an error."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from foreign import GPT, VOCABULARY
from patching import CheckpointedBlocks
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from lightning_lighthouse import LighthouseConfig, lighthouse_attention, patch_attention
from lightning_lighthouse.attention.documents import Documents
from lightning_lighthouse.attention.sdpa import stock_sdpa
from lightning_lighthouse.attention.windows import chunk_attention, window_attention
from lightning_lighthouse.routing.reasons import CrossingError
from lightning_lighthouse.routing.scope import scopes

CONFIG = LighthouseConfig(num_levels=2, pooling_factor=2, top_k=8)
TOKENS = 97
LENGTHS = [[40, 57], [1, 13, 83]]
LAYERS = 4


@pytest.fixture(autouse=True)
def _nothing_left_behind():
    yield
    assert F.scaled_dot_product_attention is stock_sdpa
    assert scopes == []


def tokens(seed=0):
    return torch.randint(VOCABULARY, (2, TOKENS), generator=torch.Generator().manual_seed(seed))


class Relative(GPT):
    """Without positions of tokens: a document is the same wherever it lies."""

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def model(kind=Relative, layers=LAYERS):
    torch.manual_seed(0)
    return kind(layers, tokens=TOKENS).double()


def gradients(network):
    return [p.grad.clone() for p in network.parameters() if p.grad is not None]


def run(network, x):
    network.zero_grad()
    out = network(x)
    out.square().sum().backward()
    return [out.detach(), *gradients(network)]


def one_by_one(network, x, lengths=LENGTHS):
    """The same of each document by itself: outputs in one piece, gradients added up."""
    network.zero_grad()
    rows = []
    for row, of_row in zip(x, lengths, strict=True):
        parts = [network(part[None]) for part in row.split(of_row)]
        for part in parts:
            part.square().sum().backward()
        rows.append(torch.cat(parts, 1).detach())
    return [torch.cat(rows), *gradients(network)]


def assert_close(first, second):
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("phase", ["off", "dense"])
@pytest.mark.parametrize("kind", [Relative, CheckpointedBlocks], ids=["plain", "checkpointed"])
def test_a_dense_step_equals_the_documents_one_by_one(phase, kind):
    class Both(Relative if kind is Relative else kind):
        pass

    x, network = tokens(), model(Both)
    if kind is CheckpointedBlocks:
        nn.init.zeros_(network.position.weight)
    expected = one_by_one(network, x)
    patch = patch_attention(network, CONFIG, documents=True)
    getattr(patch, phase)()
    patch.set_documents(Documents(LENGTHS))
    found = run(network, x)
    patch.check()
    patch.set_documents(None)
    patch.off()
    across = network(x)
    patch.restore()
    if kind is CheckpointedBlocks:
        # the positions themselves learn other things
        found, expected = ([part for part in parts if len(part) != TOKENS] for parts in (found, expected))
    assert_close(found, expected)
    assert not torch.allclose(across, expected[0])


ATTENTION = {
    "lighthouse": lambda *qkv, documents: lighthouse_attention(*qkv, CONFIG, documents=documents),
    "window": lambda *qkv, documents: window_attention(*qkv, 7, sink_tokens=2, documents=documents),
    "chunk": lambda *qkv, documents: chunk_attention(*qkv, 7, documents=documents),
}


class Layer(nn.Module):
    """One call of SDPA with whatever a test hands in."""

    def forward(self, q, k, v, **arguments):
        return F.scaled_dot_product_attention(q, k, v, **arguments)


class Layers(nn.ModuleList):
    def forward(self, *qkv, **arguments):
        return [layer(*qkv, **{"is_causal": True, **arguments}) for layer in self]


def heads(count, length=TOKENS, seed=0, dim=8):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, count, length, dim, generator=generator, dtype=torch.float64)


QKV = heads(4), heads(2, seed=1), heads(2, seed=2)


@pytest.mark.parametrize("layer_type", ATTENTION)
def test_a_routed_layer_attends_by_its_type_and_a_dense_one_densely(layer_type):
    network, documents = Layers([Layer(), Layer()]), Documents(LENGTHS)
    sizes = {} if layer_type == "lighthouse" else {"window": 7}
    if layer_type == "window":
        sizes["sink_tokens"] = 2
    with patch_attention(network, CONFIG, layer_types=[layer_type], dense_layers=[1], documents=True, **sizes) as patch:
        patch.set_documents(documents)
        routed, dense = network(*QKV, enable_gqa=True)
        assert patch.count_calls()["routed"] == 1
        # handed back it is dense as the other one is
        patch.hand_back(["0"])
        returned, _ = network(*QKV, enable_gqa=True)
    torch.testing.assert_close(routed, ATTENTION[layer_type](*QKV, documents=documents))
    pieces = [
        torch.cat(
            [
                stock_sdpa(*part, is_causal=True, enable_gqa=True)
                for part in zip(*(x[b : b + 1].split(n, 2) for x in QKV), strict=True)
            ],
            2,
        )
        for b, n in enumerate(LENGTHS)
    ]
    torch.testing.assert_close(dense, torch.cat(pieces))
    assert torch.equal(returned, dense)


def test_nothing_crosses_and_tokens_of_others_move_nothing():
    x, network = tokens(), model()
    documents = Documents([[40, 57], [40, 57]])
    with patch_attention(network, CONFIG, documents=True) as patch:
        patch.set_documents(documents)
        before = network(x)
        other = x.clone()
        other[:, :40] = tokens(1)[:, :40]
        after = network(other)
    assert torch.equal(before[:, 40:], after[:, 40:])
    assert not torch.equal(before[:, :40], after[:, :40])


CROSSING = {
    "mask": (
        {"attn_mask": torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril(), "is_causal": False},
        "attn_mask was given",
    ),
    "not causal": ({"is_causal": False}, "is_causal is False"),
    "dropout": ({"dropout_p": 0.5}, "dropout_p is not 0"),
}


@pytest.mark.parametrize(("arguments", "reason"), CROSSING.values(), ids=CROSSING)
@pytest.mark.parametrize("phase", ["on", "dense", "off"])
def test_a_call_that_cannot_stay_inside_raises_at_once(arguments, reason, phase):
    network = Layers([Layer(), Layer()])
    patch = patch_attention(network, CONFIG, dense_layers=[0], documents=True)
    try:
        getattr(patch, phase)()
        patch.set_documents(Documents(LENGTHS))
        with pytest.raises(CrossingError, match=f"^0 would attend across documents: {reason}; ") as caught:
            network(*QKV, enable_gqa=True, **arguments)
        assert "\n" not in str(caught.value)
        # without documents it is the model's own business
        patch.set_documents(None)
        patch.off()
        network(*QKV, enable_gqa=True, **arguments)
    finally:
        patch.restore()


def test_other_lengths_and_sizes_raise():
    network = Layers([Layer()])
    q, k, v = QKV
    with patch_attention(network, CONFIG, documents=True) as patch:
        patch.set_documents(Documents(LENGTHS))
        with pytest.raises(CrossingError, match="0 would attend across documents: query and key lengths differ"):
            network(q, k[:, :, :50], v[:, :, :50], enable_gqa=True)
        with pytest.raises(
            CrossingError, match=r"documents cover 2 x 97 tokens, attention in 0 sees 2 x 96; .* document_ids\[:, :-1\]"
        ):
            network(*(x[:, :, 1:] for x in QKV), enable_gqa=True)
        network(*QKV, enable_gqa=True)


def test_a_checkpoint_inside_the_attention_raises():
    class Inside(Layer):
        def forward(self, q, k, v, **arguments):
            return torch.utils.checkpoint.checkpoint(
                lambda *qkv: F.scaled_dot_product_attention(*qkv, **arguments), q, k, v, use_reentrant=False
            )

    q = QKV[0].clone().requires_grad_()
    patch = patch_attention(Inside(), CONFIG, documents=True)
    try:
        patch.on()
        patch.set_documents(Documents(LENGTHS))
        with pytest.raises(CrossingError, match=r"checkpoint\(\) inside the attention module"):
            patch.model(q, q, q, is_causal=True)
    finally:
        patch.restore()


@pytest.mark.parametrize("phase", ["on", "dense"])
def test_who_forgets_to_set_documents_is_told(phase):
    network = model()
    patch = patch_attention(network, CONFIG, documents=True)
    try:
        getattr(patch, phase)()
        with pytest.raises(CrossingError, match=r"blocks\.0\.attn was told of no documents.*patch\.set_documents"):
            network(tokens())
        # an evaluation of something else is none that trains
        network.eval()
        with torch.no_grad():
            network(tokens())
    finally:
        patch.restore()


def test_set_documents_needs_the_setting_and_documents():
    with pytest.raises(ValueError, match="needs patch_attention"), patch_attention(GPT(), CONFIG) as patch:
        patch.set_documents(Documents(LENGTHS))
    with patch_attention(GPT(), CONFIG, documents=True) as patch, pytest.raises(TypeError, match="must be Documents"):
        patch.set_documents(torch.zeros(2, 3))
    with pytest.raises(RuntimeError, match="was restored"):
        patch.set_documents(None)


@pytest.mark.parametrize("selection", ["causal", "strided"])
def test_a_scorer_that_knows_no_documents_is_refused(selection):
    config = LighthouseConfig(scorer="dilated", selection=selection)
    if selection == "strided":
        patch_attention(GPT(), config, documents=True).restore()
        return
    with pytest.raises(ValueError, match="scorer='dilated' does not know documents yet"):
        patch_attention(GPT(), config, documents=True)


class Mixed(nn.Module):
    """A layer that calls SDPA, and one whose attention is another method than its forward."""

    def __init__(self):
        super().__init__()
        self.plain, self.odd = Layer(), Layer()

    def forward(self, *qkv):
        return self.plain(*qkv, is_causal=True, enable_gqa=True) + type(self.odd).forward(
            self.odd, *qkv, is_causal=True, enable_gqa=True
        )


@pytest.mark.parametrize("phase", ["on", "dense"])
def test_a_layer_that_was_not_seen_inside_documents_is_an_error_whatever_is_unroutable(phase):
    patch = patch_attention(Mixed(), CONFIG, dense_layers=[1], documents=True)
    try:
        getattr(patch, phase)()
        patch.set_documents(Documents(LENGTHS))
        patch.model(*QKV)
        with pytest.raises(RuntimeError, match="1 of 2 attention layers were not seen inside documents: odd: its forw"):
            patch.check("warn")
    finally:
        patch.restore()


def test_a_layer_that_select_leaves_out_stays_inside_where_it_can_and_is_left_alone_where_it_cannot():
    network, documents = Layers([Layer(), Layer()]), Documents(LENGTHS)
    with patch_attention(network, CONFIG, select="0", documents=True) as patch:
        patch.set_documents(documents)
        _, left_out = network(*QKV, enable_gqa=True)
        alone = network[1](*QKV, is_causal=False, enable_gqa=True)
        short = network[1](*(x[:, :, :50] for x in QKV), is_causal=True, enable_gqa=True)
    with patch_attention(network, CONFIG, dense_layers=[1], documents=True) as patch:
        patch.set_documents(documents)
        assert torch.equal(left_out, network(*QKV, enable_gqa=True)[1])
    assert torch.equal(alone, stock_sdpa(*QKV, enable_gqa=True))
    assert torch.equal(short, stock_sdpa(*(x[:, :, :50] for x in QKV), is_causal=True, enable_gqa=True))


def test_generation_and_pauses_know_none_of_the_documents():
    class Generates(Relative):
        def generate(self, x):
            return self(x)

    x, network = tokens(), model(Generates)
    plain = network(x[:, :30])
    with patch_attention(network, CONFIG, documents=True) as patch:
        documents = Documents(LENGTHS)
        patch.set_documents(documents)
        assert torch.equal(network.generate(x[:, :30]), plain)
        with patch.paused():
            assert torch.equal(network(x[:, :30]), plain)
        assert patch.scope.documents is documents
        network(x)


def test_an_average_of_the_model_follows_it():
    x, network = tokens(), model()
    with patch_attention(network, CONFIG, documents=True) as patch:
        patch.set_documents(Documents(LENGTHS))
        assert torch.equal(copy.deepcopy(network)(x), network(x))


def test_multihead_attention_stays_inside_and_refuses_what_cannot():
    class Multi(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True, dtype=torch.float64)

        def forward(self, x, **arguments):
            mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=torch.float64)
            settings = {"attn_mask": mask, "is_causal": True, "need_weights": False} | arguments
            return self.attention(x, x, x, **settings)[0]

    torch.manual_seed(0)
    network, x = Multi(), torch.randn(2, TOKENS, 16, dtype=torch.float64)
    expected = one_by_one(network, x)
    patch = patch_attention(network, CONFIG, documents=True)
    try:
        patch.set_documents(Documents(LENGTHS))
        assert_close(run(network, x), expected)
        with pytest.raises(CrossingError, match=r"^attention would .* documents: need_weights is True"):
            network(x, need_weights=True)
    finally:
        patch.restore()


def counted(network, fullgraph=True):
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(network, backend=counter, fullgraph=fullgraph, dynamic=False), counter


@pytest.mark.parametrize(
    "kind", [Relative, pytest.param(CheckpointedBlocks, marks=pytest.mark.slow)], ids=["plain", "checkpointed"]
)
def test_compiled_dense_frames_serve_batches_with_other_documents(kind):
    network = model(kind, layers=2)
    compiled, counter = counted(network)
    patch = patch_attention(network, CONFIG, documents=True)
    try:
        patch.dense()
        for lengths in (LENGTHS, [[97], [96, 1]], [[1] * 97, [50, 47]]):
            patch.set_documents(Documents(lengths))
            assert_close(run(compiled, tokens()), run(network, tokens()))
        patch.check()
    finally:
        patch.restore()
        torch._dynamo.reset()
    assert counter.frame_count == 1


def test_a_compiled_call_that_cannot_stay_inside_raises_too():
    network = Layers([Layer()])
    compiled, _ = counted(network)
    patch = patch_attention(network, CONFIG, documents=True)
    try:
        patch.dense()
        patch.set_documents(Documents(LENGTHS))
        with pytest.raises(Exception, match="an attention layer would attend across documents: dropout_p is not 0"):
            compiled(*QKV, enable_gqa=True, dropout_p=0.5)
    finally:
        patch.restore()
        torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("layer_type", ["lighthouse", "window", "chunk"])
@pytest.mark.parametrize("kind", [Relative, CheckpointedBlocks], ids=["plain", "checkpointed"])
def test_compiled_routed_frames_serve_batches_with_other_documents(kind, layer_type):
    network = model(kind, layers=2)
    # the reference leaves its loop over documents to plain Python: there a graph ends
    compiled, counter = counted(network, fullgraph=False)
    sizes = {} if layer_type == "lighthouse" else {"window": 7}
    patch = patch_attention(network, CONFIG, documents=True, layer_types=[layer_type], **sizes)
    try:
        patch.on()
        frames = []
        for lengths in (LENGTHS, [[97], [96, 1]], [[1] * 10 + [87], [50, 47]]):
            patch.set_documents(Documents(lengths))
            assert_close(run(compiled, tokens()), run(network, tokens()))
            frames.append(counter.frame_count)
        patch.check()
    finally:
        patch.restore()
        torch._dynamo.reset()
    assert frames[0] == frames[-1]


@pytest.mark.parametrize("told_first", [False, True])
def test_whether_a_batch_is_better_off_dense_is_settled_before_compiled_code_sees_it(told_first):
    config = LighthouseConfig(num_levels=2, pooling_factor=2, top_k=8, max_documents=2)
    many, few = Documents([[30, 30, 37], [30, 30, 37]]), Documents([[40, 57], [97]])
    network = model()
    patch = patch_attention(network, config, documents=True)
    try:
        for documents, is_dense in ((many, True), (few, False)):
            patch.off()
            if told_first:
                patch.set_documents(documents)
                patch.on()
            else:
                patch.on()
                patch.set_documents(documents)
            assert documents.is_crowded == is_dense
            routed = network(tokens())
            patch.dense()
            assert torch.equal(routed, network(tokens())) == is_dense
    finally:
        patch.restore()
