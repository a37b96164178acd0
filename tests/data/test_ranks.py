"""Several ranks share one prepared folder: each sequence goes to one of them, and all take as many steps."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_lighthouse.data.manifest import Manifest

pytestmark = pytest.mark.slow

SEQ_LEN = 61
SCRIPT = """
import json, logging, os, signal, sys
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.tensor import Replicate, distribute_tensor
from lightning_lighthouse import LighthouseRecipe

options = json.loads(sys.argv[1])
# who prepares says what of
logging.getLogger("lightning_lighthouse").addHandler(logging.StreamHandler(sys.stdout))
logging.getLogger("lightning_lighthouse").setLevel(logging.INFO)


class Recorder(LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def configure_model(self):
        if options["tensor_parallel"]:
            mesh = self.device_mesh["tensor_parallel"]
            self.weight = torch.nn.Parameter(distribute_tensor(self.weight.detach(), mesh, [Replicate()]))

    def training_step(self, batch, batch_idx):
        weight = self.weight.to_local() if options["tensor_parallel"] else self.weight
        loss = weight * batch["tokens"].float().mean() / 257
        with open(f"{options['log']}-{self.global_rank}.jsonl", "a") as log:
            line = {"epoch": self.current_epoch, "tokens": batch["tokens"].tolist(), "loss": loss.item()}
            log.write(json.dumps(line) + "\\n")
        return loss

    def on_train_batch_end(self, *_):
        if self.global_rank == 0 and self.global_step == options.get("kill_at"):
            os.kill(os.getpid(), signal.SIGKILL)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


if __name__ == "__main__":
    recipe = LighthouseRecipe(
        seq_len=SEQ_LEN, source="text.jsonl", output_dir="out", validation_fraction=0, **options["recipe"]
    )
    strategy = "ddp"
    if options["tensor_parallel"]:
        strategy = ModelParallelStrategy(1, options["ranks"], process_group_backend="gloo")
    trainer = Trainer(
        accelerator="cpu", strategy=strategy, devices=options["ranks"], max_epochs=options["epochs"], logger=False,
        enable_progress_bar=False, enable_model_summary=False,
        callbacks=[ModelCheckpoint(options["log"], filename="{step}", every_n_train_steps=1, save_top_k=-1)],
    )
    trainer.fit(Recorder(), datamodule=recipe, ckpt_path=options.get("resume"))
""".replace("SEQ_LEN", str(SEQ_LEN))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with text and the script."""
    rng = np.random.default_rng(42)
    documents = (bytes(rng.integers(32, 127, size=rng.integers(1, 300), dtype=np.uint8)).decode() for _ in range(31))
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    (tmp_path / "script.py").write_text(SCRIPT)
    return tmp_path


def run(
    folder: Path,
    log: str,
    ranks: int,
    epochs: int,
    resume: str | None = None,
    kill_at: int | None = None,
    tensor_parallel: bool = False,
    **recipe: Any,
) -> tuple[subprocess.CompletedProcess[str], list[list[dict[str, Any]]]]:
    """Run the script; its result, and what each rank wrote down."""
    recipe = {"batch_size": 2, "num_workers": 1, **recipe}
    options = {"log": log, "ranks": ranks, "epochs": epochs, "resume": resume, "kill_at": kill_at, "recipe": recipe}
    options["tensor_parallel"] = tensor_parallel
    result = subprocess.run(
        [sys.executable, "script.py", json.dumps(options)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    logs = [folder / f"{log}-{rank}.jsonl" for rank in range(ranks)]
    return result, [[json.loads(line) for line in path.read_text().splitlines()] for path in logs]


def sequences(logs: list[list[dict[str, Any]]], epoch: int) -> Counter[tuple[int, ...]]:
    lines = (line for log in logs for line in log if line["epoch"] == epoch)
    return Counter(tuple(sequence) for line in lines for sequence in line["tokens"])


def test_ranks_share_an_epoch_and_take_as_many_steps(folder: Path) -> None:
    result, logs = run(folder, "run", ranks=2, epochs=2)
    assert result.returncode == 0, result.stderr
    # one rank prepared, both read
    assert result.stdout.count("sha256") == 1
    stored = Manifest.load(folder / "out").train.sequences
    assert len(logs[0]) == len(logs[1]) == stored // 4 * 2
    for epoch in (0, 1):
        shown = sequences(logs, epoch)
        assert max(shown.values()) == 1
        assert len(shown) == stored // 4 * 4


def test_ranks_of_one_model_read_the_same_also_after_a_resume(folder: Path) -> None:
    options = {"ranks": 2, "tensor_parallel": True}
    result, logs = run(folder, "run", epochs=2, **options)
    assert result.returncode == 0, result.stderr
    assert logs[0] == logs[1]
    stored = Manifest.load(folder / "out").train.sequences
    for epoch in (0, 1):
        assert len(sequences(logs[:1], epoch)) == stored // 2 * 2
    result, resumed = run(folder, "resumed", epochs=2, resume="run/step=3.ckpt", **options)
    assert result.returncode == 0, result.stderr
    assert resumed == [log[3:] for log in logs]


def test_a_killed_run_resumes_bit_for_bit_through_the_next_epoch(folder: Path) -> None:
    _, unbroken = run(folder, "unbroken", ranks=2, epochs=3)
    steps = len(unbroken[0]) // 3
    killed, _ = run(folder, "killed", ranks=2, epochs=3, kill_at=steps - 2)
    assert killed.returncode not in (0, -signal.SIGTERM)
    step = max(int(path.stem.removeprefix("step=")) for path in (folder / "killed").glob("*.ckpt"))
    assert step >= steps - 3
    resumed, rest = run(folder, "resumed", ranks=2, epochs=3, resume=f"killed/step={step}.ckpt")
    assert resumed.returncode == 0, resumed.stderr
    assert rest == [log[step:] for log in unbroken]


# litdata counts the sequences of one rank: late in an epoch one of few ranks has had more than one of many ever gets
@pytest.mark.parametrize("step", [5, 12], ids=["early", "late"])
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)], ids=["more", "fewer"])
def test_other_ranks_with_the_same_global_batch(folder: Path, before: int, after: int, step: int) -> None:
    _, first = run(folder, "first", ranks=before, epochs=1, batch_size=4 // before)
    assert len(first[0]) > step
    resume = f"first/step={step}.ckpt"
    result, second = run(folder, "second", ranks=after, epochs=2, batch_size=4 // after, resume=resume)
    assert result.returncode == 0, result.stderr
    assert f"resumed with ranks {before} -> {after}" in result.stderr
    assert len({len(log) for log in second}) == 1
    whole = sequences(first, 0)
    served = sequences([log[:step] for log in first], 0) + sequences(second, 0)
    assert served == whole
    # the next epoch is a whole one
    assert max(sequences(second, 1).values()) == 1
    assert sequences(second, 1).total() == whole.total()


def test_other_ranks_with_another_global_batch_repeat_nothing(folder: Path) -> None:
    _, first = run(folder, "first", ranks=1, epochs=1)
    # an odd number of batches of one rank is no whole number of batches of two
    result, second = run(folder, "second", ranks=2, epochs=1, resume="first/step=5.ckpt")
    assert result.returncode == 0, result.stderr
    assert "the global batch is 4 sequences, no longer 2" in result.stderr
    assert len(second[0]) == len(second[1]) > 0
    served = sequences([log[:5] for log in first], 0) + sequences(second, 0)
    assert max(served.values()) == 1
