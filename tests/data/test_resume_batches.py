"""A run resumed with another global batch: each epoch has its sequences once, and as many batches as they make."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from recorded import Recorder

from lightning_lighthouse import LighthouseRecipe
from lightning_lighthouse.data.preparing.prepare import prepare
from lightning_lighthouse.runs.resume import mend_resume

SEQ_LEN = 7
SEQUENCES = 12
EPOCHS = 4


class Log(Callback):
    """The numbers of the sequences of each batch, by epoch, and the state after each batch, validation and epoch."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, list[int]]] = []
        self.validations = 0
        self.kept: dict[tuple[str, int], Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        mend_resume(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        numbers = [int(bytes(row[:SEQ_LEN].tolist())) for row in batch["tokens"]]
        self.batches.append((trainer.current_epoch, numbers))

    def keep(self, trainer: Trainer, hook: str) -> None:
        self.kept[hook, len(self.batches)] = copy.deepcopy(trainer._checkpoint_connector.dump_checkpoint())

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.keep(trainer, "batch")

    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        self.validations += 1
        self.keep(trainer, "validation")

    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        self.keep(trainer, "epoch")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sequences that are numbers."""
    folder = tmp_path_factory.mktemp("numbered")
    (folder / "text.txt").write_text("".join(f"{number:07d}|" for number in range(SEQUENCES)))
    (folder / "more.txt").write_text("x" * 100)
    options = {"source": str(folder / "text.txt"), "validation_source": str(folder / "more.txt")}
    prepare(str(folder / "prepared"), seq_len=SEQ_LEN, **options)
    return folder


def fit(prepared: Path, batch_size: int, kept: Any = None, **options: Any) -> Log:
    path = None
    if kept is not None:
        path = prepared / "kept.ckpt"
        torch.save(kept, path)
    log = Log()
    trainer = Trainer(
        accelerator="cpu",
        callbacks=[log],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **{"max_epochs": EPOCHS, **options},
    )
    data = LighthouseRecipe(seq_len=SEQ_LEN, source=str(prepared / "prepared"), batch_size=batch_size, num_workers=0)
    trainer.fit(Recorder(), datamodule=data, ckpt_path=path, weights_only=True)
    return log


def by_epoch(batches: list[tuple[int, list[int]]]) -> dict[int, list[int]]:
    epochs: dict[int, list[int]] = {}
    for epoch, numbers in batches:
        epochs.setdefault(epoch, []).extend(numbers)
    return epochs


# sequences of a batch before a resume, and after it
every_batch_size = pytest.mark.parametrize(
    ("before", "after"), [(3, 2), (1, 3), *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((3, 1), (2, 3)))]
)


@pytest.mark.parametrize("hook", ["batch", "validation", "epoch"])
@every_batch_size
@pytest.mark.filterwarnings("ignore:resumed with batch_size")
def test_a_run_resumed_behind_an_epoch_shows_the_next_one_whole(
    prepared: Path, hook: str, before: int, after: int
) -> None:
    done = SEQUENCES // before
    first = fit(prepared, before, max_epochs=1)
    resumed = fit(prepared, after, first.kept[hook, done])
    whole = by_epoch(fit(prepared, after).batches)
    assert by_epoch(resumed.batches) == {epoch: whole[epoch] for epoch in range(1, EPOCHS)}


@pytest.mark.parametrize("hook", ["batch", "validation"])
@every_batch_size
@pytest.mark.filterwarnings("ignore:resumed with batch_size")
def test_a_run_resumed_within_an_epoch_ends_it_with_its_data_and_can_be_resumed_again(
    prepared: Path, hook: str, before: int, after: int
) -> None:
    options = {"val_check_interval": 1} if hook == "validation" else {}
    done = 2
    first = fit(prepared, before, max_epochs=1, **options)
    resumed = fit(prepared, after, first.kept[hook, done], **options)
    epochs = by_epoch([*first.batches[:done], *resumed.batches])
    # what fills no batch is left out behind those of before, and at the end
    assert len(set(epochs[0])) == len(epochs[0]) > SEQUENCES - 2 * after
    whole = by_epoch(fit(prepared, after).batches)
    assert {epoch: epochs[epoch] for epoch in range(1, EPOCHS)} == {epoch: whole[epoch] for epoch in range(1, EPOCHS)}
    if hook == "batch":
        # the last batch is known as such: every epoch is validated
        assert resumed.validations == EPOCHS
    last = max(count for count in range(len(resumed.batches)) if resumed.batches[count][0] == 0) + 1
    for count in (1, last, last + 1):
        again = fit(prepared, after, resumed.kept[hook, count], **options)
        assert again.batches == resumed.batches[count:], count
