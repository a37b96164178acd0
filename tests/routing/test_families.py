"""Models that people have, in the modes that they train them in.

As a script, `PYTHONPATH=tests/helpers python tests/routing/test_families.py --table`, it runs every case and writes
the table of docs/use/models.md.
"""

from __future__ import annotations

import copy
import sys
from collections import defaultdict
from importlib.metadata import version

import pytest
import torch
from all_lighthouse import all_lighthouse
from families import CONFIG, FAMILIES, LAYERS, Logits, checkpoint_blocks
from foreign import VOCABULARY, ForeignModule, ResumableLoader, loader
from lightning.pytorch import Trainer
from places import DOCS
from torch._dynamo.testing import CompileCounterWithBackend

from lightning_lighthouse import patch_attention

DOCUMENT = DOCS / "use" / "models.md"
ROUTED_LAYERS = list(range(1, LAYERS - 1))
# One case a family is quick; the other modes are quick for these only.
QUICK = {"transformers Llama", "nn.TransformerEncoderLayer"}

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


@pytest.mark.parametrize("name", FAMILIES)
def test_routed_equals_lighthouse_written_by_hand(name):
    model, _, by_hand = dense_and_by_hand(name)
    with patch_attention(model, CONFIG, dense_layers="published") as patch:
        assert close(run(model, tokens()), by_hand)
        assert patch.unrouted() == {}


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
        with patch_attention(model, CONFIG, dense_layers="published") as patch:
            routed = run(model, tokens())
            assert patch.unrouted() == {}
    assert close(routed, by_hand, error=1e-2)
    assert not close(dense, by_hand, error=1e-2)


@every_family
def test_off_and_restored_are_dense_bit_for_bit(name):
    model = FAMILIES[name].build()
    dense, keys = run(model, tokens()), list(model.state_dict())
    patch = patch_attention(model, CONFIG, dense_layers="published")
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
    trainer = quiet_trainer(tmp_path, all_lighthouse(0.5, CONFIG, dense_layers="published"))
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
    with patch_attention(model, CONFIG, dense_layers="published") as patch:
        assert close(run(model, tokens()), by_hand)
        assert patch.unrouted() == {}
    assert close(run(model, tokens()), dense)


def follows_the_phase(model, parts, fullgraph, dense, by_hand):
    """Run a compiled model dense, routed, dense, restored; the frames compiled so far after each."""
    counter = CompileCounterWithBackend("aot_eager")
    for part in parts:
        part.compile(backend=counter, fullgraph=fullgraph)
    patch = patch_attention(model, CONFIG, dense_layers="published")
    assert close(run(model, tokens()), dense)
    frames = [counter.frame_count]
    patch.on()
    assert close(run(model, tokens()), by_hand)
    assert patch.unrouted() == {}
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
    # off is what it was before, also where a hook hears what a patched model of transformers is called with
    assert frames[2] == frames[1]
    if fullgraph:
        assert frames[:2] == [1, 2]


@pytest.mark.parametrize(
    ("row", "validation", "frames"),
    [
        pytest.param("the whole model", 0, 2, marks=pytest.mark.slow),
        pytest.param("the whole model", 1, 3, marks=pytest.mark.slow),
        ("every block", 0, 2),
        pytest.param("every block", 1, 3, marks=pytest.mark.slow),
        ("every block, some of them dense", 0, 3),
        pytest.param("every block, some of them dense", 1, 5, marks=pytest.mark.slow),
    ],
)
def test_recompiles_of_a_fit_are_those_of_the_document(row, validation, frames, tmp_path):
    module = ForeignModule(model=FAMILIES["like nanoGPT"].build())
    counter = CompileCounterWithBackend("eager")
    for part in module.model.blocks if "block" in row else [module.model]:
        part.compile(backend=counter, fullgraph=True)
    for _ in range(2):
        callback = all_lighthouse(2, CONFIG, dense_layers="published" if "dense" in row else None)
        trainer = quiet_trainer(tmp_path, callback, val_check_interval=1)
        trainer.fit(module, ResumableLoader(count=8), loader(4) if validation else None)
        assert counter.frame_count == frames
    with torch.no_grad():
        module.model.eval()(tokens(128))
    assert counter.frame_count == frames + 1
    cells = next(line for line in DOCUMENT.read_text().splitlines() if line.startswith(f"| {row} |")).split("|")
    assert int(cells[2 + validation]) == frames


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
PACKAGES = ["torch", "lightning", "transformers", "litgpt", "x-transformers"]
MARK = "<!-- written by tests/routing/test_families.py --table -->"


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
    """Run the matrix and write its table, with the versions, between the marks of the page; pytest's status."""
    outcomes = Outcomes()
    status = pytest.main([__file__, "-q", "-m", "", "-k", " or ".join(COLUMNS)], plugins=[outcomes])
    versions = ", ".join(f"{name} {version(name).split('+')[0]}" for name in PACKAGES) + ", on a CPU:"
    before, _, after = DOCUMENT.read_text().split(MARK)
    DOCUMENT.write_text(f"{before}{MARK}\n{versions}\n\n{outcomes.table()}\n{MARK}{after}")
    return status


if __name__ == "__main__":
    if sys.argv[1:] != ["--table"]:
        sys.exit(f"usage: python {sys.argv[0]} --table")
    sys.exit(write_table())
