"""Models that people have, in the modes that they train them in.

As a script, `python tests/test_families.py --table`, it runs every case and writes the table of docs/models.md.
"""

from __future__ import annotations

import copy
import re
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from families import CONFIG, FAMILIES, LAYERS, TRANSFORMERS, Logits, build_transformers, checkpoint_blocks
from foreign import VOCABULARY, ForeignModule, ResumableLoader, loader
from lightning.pytorch import Trainer
from torch._dynamo.testing import CompileCounterWithBackend

from lightning_lighthouse import LighthouseCallback, patch_attention
from lightning_lighthouse.audit import Audit, explain

ROOT = Path(__file__).parent.parent
DOCUMENT, PACKAGE = ROOT / "docs" / "models.md", ROOT / "lightning_lighthouse"
ROUTED_LAYERS = list(range(1, LAYERS - 1))
QUICK = {"transformers Llama", "nn.MultiheadAttention", "nn.TransformerEncoderLayer"}

every_family = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in FAMILIES]
)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    yield
    torch._dynamo.reset()


def tokens(length=97, seed=0):
    return torch.randint(VOCABULARY, (2, length), generator=torch.Generator().manual_seed(seed))


def run(model, x):
    """Logits and all gradients, as two flat tensors."""
    model.zero_grad()
    logits = model(x)
    logits.logsumexp(-1).square().mean().backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return logits.detach().flatten(), torch.cat(gradients)


def quiet_trainer(folder, callback, **settings):
    return Trainer(
        max_steps=4,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[callback],
        **settings,
    )


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def close(first, second, error=1e-5):
    return all(bool((a - b).norm() <= error * b.norm()) for a, b in zip(first, second, strict=True))


def dense_and_by_hand(name):
    """A model of the family, and what it gives dense and with Lighthouse written into its inner layers."""
    family = FAMILIES[name]
    model = family.build()
    dense = run(model, tokens())
    with family.by_hand(model, ROUTED_LAYERS):
        by_hand = run(model, tokens())
    assert not close(by_hand, dense, error=1e-3)
    return model, dense, by_hand


@every_family
def test_routed_equals_lighthouse_written_by_hand(name):
    model, _, by_hand = dense_and_by_hand(name)
    with patch_attention(model, CONFIG) as patch:
        patch.audit = Audit(patch.targets)
        assert close(run(model, tokens()), by_hand)
        assert patch.audit.unrouted() == {}


@every_family
@pytest.mark.parametrize("precision", ["mixed", "true"])
def test_bf16(precision, name):
    family = FAMILIES[name]
    model = family.build()
    if precision == "true":
        model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "mixed"):
        dense = run(model, tokens())
        with family.by_hand(model, ROUTED_LAYERS):
            by_hand = run(model, tokens())
        with patch_attention(model, CONFIG) as patch:
            patch.audit = Audit(patch.targets)
            routed = run(model, tokens())
            assert patch.audit.unrouted() == {}
    assert close(routed, by_hand, error=1e-2)
    assert not close(dense, by_hand, error=1e-2)


@every_family
def test_off_and_restored_are_dense_bit_for_bit(name):
    model = FAMILIES[name].build()
    dense, keys = run(model, tokens()), list(model.state_dict())
    patch = patch_attention(model, CONFIG)
    assert same(run(model, tokens()), dense)
    patch.on()
    assert not same(run(model, tokens()), dense)
    assert list(model.state_dict()) == keys
    patch.off()
    assert same(run(model, tokens()), dense)
    patch.restore()
    assert same(run(model, tokens()), dense)
    assert list(model.state_dict()) == keys


@every_family
def test_training_over_the_switch_equals_two_phases_by_hand(name, tmp_path):
    family = FAMILIES[name]
    module = ForeignModule(model=family.build())
    by_hand = ForeignModule(model=copy.deepcopy(module.model))
    trainer = quiet_trainer(tmp_path, LighthouseCallback(0.5, CONFIG))
    trainer.fit(module, ResumableLoader(count=8))

    optimizer = by_hand.configure_optimizers()
    for step, batch in enumerate(ResumableLoader(count=8)):
        with family.by_hand(by_hand.model, ROUTED_LAYERS if step < 2 else []):
            loss = by_hand.training_step(batch, step)
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
    assert module.losses == pytest.approx(by_hand.losses, rel=1e-5)
    x = tokens()
    assert close(run(module.model, x), run(by_hand.model, x), error=1e-3)


@every_family
def test_checkpointed_blocks(name):
    model, dense, by_hand = dense_and_by_hand(name)
    checkpoint_blocks(FAMILIES[name], model)
    with patch_attention(model, CONFIG) as patch:
        patch.audit = Audit(patch.targets)
        assert close(run(model, tokens()), by_hand)
        assert patch.audit.unrouted() == {}
    assert close(run(model, tokens()), dense)


def follows_the_phase(model, parts, fullgraph, dense, by_hand):
    """Run a compiled model dense, routed, dense, restored; the frames compiled so far after each."""
    counter = CompileCounterWithBackend("aot_eager")
    for part in parts:
        part.compile(backend=counter, fullgraph=fullgraph)
    patch = patch_attention(model, CONFIG)
    assert close(run(model, tokens()), dense)
    frames = [counter.frame_count]
    patch.on()
    patch.audit = Audit(patch.targets)
    assert close(run(model, tokens()), by_hand)
    assert patch.audit.unrouted() == {}
    frames.append(counter.frame_count)
    patch.off()
    assert close(run(model, tokens()), dense)
    frames.append(counter.frame_count)
    patch.restore()
    assert close(run(model, tokens()), dense)
    return frames


def compiled_blocks(name, checkpointed):
    model, dense, by_hand = dense_and_by_hand(name)
    if isinstance(model, Logits):
        # the cache that transformers makes even in training differs from layer to layer: a frame for each
        model.model.config.use_cache = False
    if checkpointed:
        checkpoint_blocks(FAMILIES[name], model)
    frames = follows_the_phase(model, FAMILIES[name].blocks(model), True, dense, by_hand)
    # the dense layers, the routed ones off and on
    assert frames == [2, 3, 3]


@every_family
def test_compiled_blocks(name):
    compiled_blocks(name, checkpointed=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_compiled_and_checkpointed_blocks(name):
    compiled_blocks(name, checkpointed=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_compiled_model(name):
    model, dense, by_hand = dense_and_by_hand(name)
    # a call of the logger in transformers breaks the graph
    fullgraph = name != "transformers GPT-2"
    frames = follows_the_phase(model, [model], fullgraph, dense, by_hand)
    assert frames[2] == frames[1]
    if fullgraph:
        assert frames[:2] == [1, 2]


def llama(attention="sdpa"):
    kind, settings = TRANSFORMERS["Llama"]
    return build_transformers(kind, attention, **settings)


def unrouted(model, *args, **settings):
    """What the model gave in one call while on, and the line of the audit; "" where every layer was routed."""
    with patch_attention(model, CONFIG) as patch:
        patch.audit = Audit(patch.targets)
        out = model(*args, **settings)
        missing = patch.audit.unrouted()
    return out, explain(missing, len(patch.targets)) if missing else ""


def test_a_padding_mask_keeps_the_layers_dense_and_is_named():
    model = llama().model
    x, mask = tokens(), torch.ones(2, 97, dtype=torch.long)
    mask[0, 80:] = 0
    dense = model(x, attention_mask=mask).logits
    out, line = unrouted(model, x, attention_mask=mask)
    assert torch.equal(out.logits, dense)
    assert "model.layers.1.self_attn, model.layers.2.self_attn: attn_mask was given" in line
    assert unrouted(model, x, attention_mask=torch.ones_like(mask))[1] == ""


def test_another_attention_implementation_is_named_with_the_one_to_set(tmp_path):
    trainer = quiet_trainer(tmp_path, LighthouseCallback(2, CONFIG))
    with pytest.raises(RuntimeError, match="made with attn_implementation='eager', make it with 'sdpa'"):
        trainer.fit(ForeignModule(model=llama("eager")), ResumableLoader(count=8))


def test_softcapped_scores_are_named_as_beyond_routing():
    _, settings = TRANSFORMERS["Qwen3"]
    model = build_transformers("Gemma2Config", None, **settings)
    _, line = unrouted(model, tokens())
    assert "attn_logit_softcapping=50.0 is beyond SDPA" in line


def test_a_model_that_never_calls_sdpa_is_refused_with_what_was_found():
    settings = {"n_embd": 24, "n_layer": LAYERS, "n_head": 3, "n_positions": 160, "rotary_dim": 8}
    model = build_transformers("GPTJConfig", None, **settings)
    with pytest.raises(ValueError, match=r"no module calls SDPA .* model\.transformer\.h\.0\.attn \(GPTJAttention\)"):
        patch_attention(model, CONFIG)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointed", [False, True], ids=["no cache", "checkpointed"])
def test_a_compiled_model_that_transformers_gives_a_mask_is_named(checkpointed):
    # without a cache object it looks for packed documents, which it cannot do while a graph is traced
    model = llama()
    if checkpointed:
        checkpoint_blocks(FAMILIES["transformers Llama"], model)
    else:
        model.model.config.use_cache = False
    model.compile(backend="eager")
    _, line = unrouted(model, tokens())
    assert "attn_mask was given" in line


def test_generation_is_dense_while_off():
    model = llama().model.eval()
    prompt = tokens(67)

    def generate():
        return model.generate(
            prompt, max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True
        )

    dense = generate()
    with patch_attention(model, CONFIG) as patch:
        assert not torch.equal(generate().logits[0], dense.logits[0])
        patch.off()
        off = generate()
    assert torch.equal(off.sequences, dense.sequences)
    assert all(torch.equal(a, b) for a, b in zip(off.logits, dense.logits, strict=True))


@pytest.mark.parametrize(
    ("what", "validation", "frames"), [("model", 0, 2), ("model", 1, 3), ("blocks", 0, 3), ("blocks", 1, 5)]
)
def test_recompiles_of_a_fit_are_those_of_the_document(what, validation, frames, tmp_path):
    module = ForeignModule(model=FAMILIES["like nanoGPT"].build())
    counter = CompileCounterWithBackend("eager")
    for part in {"model": [module.model], "blocks": module.model.blocks}[what]:
        part.compile(backend=counter, fullgraph=True)
    for _ in range(2):
        trainer = quiet_trainer(tmp_path, LighthouseCallback(2, CONFIG), val_check_interval=1)
        trainer.fit(module, ResumableLoader(count=8), loader(4) if validation else None)
        assert counter.frame_count == frames
    with torch.no_grad():
        module.model.eval()(tokens(128))
    assert counter.frame_count == frames + 1
    row = {"model": "the whole model", "blocks": "every block"}[what]
    cells = next(line for line in DOCUMENT.read_text().splitlines() if line.startswith(f"| {row} |")).split("|")
    assert int(cells[2 + validation]) == frames


def test_the_reasons_of_the_document_are_those_of_the_code():
    section = DOCUMENT.read_text().split("## Reading the error")[1].split("## ")[0]
    reasons = re.findall(r"^\| `(.*?)` \|", section, flags=re.MULTILINE)
    code = "".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    assert reasons
    assert [reason for reason in reasons if f'"{reason}' not in code] == []


@pytest.mark.parametrize("number", [0, 1], ids=["with", "handle"])
def test_the_code_of_the_document_runs(number):
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), flags=re.DOTALL)
    assert len(blocks) == 2
    module = ForeignModule(model=FAMILIES["like nanoGPT"].build())
    before, keys = run(module.model, tokens()), set(vars(module.model.blocks[1].attn))
    names = {
        "model": module.model,
        "loss_of": lambda model, batch: module.loss(batch),
        "optimizer": module.configure_optimizers(),
        "lighthouse_batches": ResumableLoader(count=4),
        "dense_batches": ResumableLoader(count=4),
    }
    exec(compile(blocks[number], str(DOCUMENT), "exec"), names)
    assert not close(run(module.model, tokens()), before)
    assert set(vars(module.model.blocks[1].attn)) == keys


# Columns of the table: the test that fills it, and its heading.
COLUMNS = {
    "test_routed_equals_lighthouse_written_by_hand": "routed",
    "test_bf16": "bf16",
    "test_off_and_restored_are_dense_bit_for_bit": "off, restored",
    "test_training_over_the_switch_equals_two_phases_by_hand": "Trainer",
    "test_checkpointed_blocks": "checkpointed",
    "test_compiled_blocks": "blocks compiled",
    "test_compiled_and_checkpointed_blocks": "both",
    "test_compiled_model": "model compiled",
}
MARK = "<!-- written by tests/test_families.py --table -->"


class Outcomes:
    """Plugin of pytest: the outcomes of every cell of the table."""

    def __init__(self) -> None:
        self.cells: dict[tuple[str, str], set[str]] = defaultdict(set)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test, _, case = report.location[2].rstrip("]").partition("[")
        name = next((name for name in FAMILIES if case.endswith(name)), None)
        if test in COLUMNS and name and (report.when == "call" or report.failed) and not report.skipped:
            self.cells[name, test].add(report.outcome)

    def table(self) -> str:
        """Markdown, a family a row: "yes" where every test of a cell passed, "no" where one failed, "-" if none ran."""
        words = {frozenset(): "-", frozenset({"passed"}): "yes"}
        rows = [["family", *COLUMNS.values()], ["---"] * (len(COLUMNS) + 1)]
        for name in FAMILIES:
            rows.append([name, *(words.get(frozenset(self.cells[name, test]), "no") for test in COLUMNS)])
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def write_table() -> int:
    """Run the matrix and write its table, with the versions, between the marks of docs/models.md; pytest's status."""
    import transformers

    outcomes = Outcomes()
    status = pytest.main([__file__, "-q", "-m", "", "-k", " or ".join(COLUMNS)], plugins=[outcomes])
    versions = f"torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}, on a CPU:"
    before, _, after = DOCUMENT.read_text().split(MARK)
    DOCUMENT.write_text(f"{before}{MARK}\n{versions}\n\n{outcomes.table()}\n{MARK}{after}")
    return status


if __name__ == "__main__":
    if sys.argv[1:] != ["--table"]:
        sys.exit(f"usage: python {sys.argv[0]} --table")
    sys.exit(write_table())
