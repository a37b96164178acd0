"""Batches of other forms than a mapping that is left alone: read as they are when the step runs, or refused."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from all_lighthouse import all_lighthouse
from fitting import trainer
from foreign import TOKENS, VOCABULARY, ForeignModule, forget_places
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BatchSizeFinder
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, IterableDataset

from lightning_lighthouse import Documents, LighthouseConfig
from lightning_lighthouse.checks import SettingError
from lightning_lighthouse.routing.packing import PackedBatchError
from lightning_lighthouse.routing.scope import scopes
from lightning_lighthouse.training.batch_documents import _Batches

LENGTHS = [50, 1, TOKENS - 51]
DOCUMENTS, WHOLE = Documents([LENGTHS] * 2), Documents([[TOKENS]] * 2)
IDS, POSITIONS = DOCUMENTS.document_ids("cpu"), DOCUMENTS.position_ids("cpu")
INPUTS = torch.randint(VOCABULARY, (2, TOKENS), generator=torch.Generator().manual_seed(0))
BATCH = {"tokens": INPUTS, "document_ids": IDS}
# nothing to compress: what is routed equals dense attention
CONFIG = LighthouseConfig(num_levels=2, pooling_factor=2, top_k=64)
STAGES = ["fit", "validate", "predict"]


@dataclass
class Fields:
    tokens: torch.Tensor
    document_ids: torch.Tensor


Named = namedtuple("Named", ["tokens", "document_ids"])


class Reads(ForeignModule):
    """Keeps what its model returns for the tokens of a batch. A document is the same wherever it lies."""

    def __init__(self):
        super().__init__()
        forget_places(self)
        self.outputs = []

    def inside(self):
        """What it should return: each document by itself."""
        with torch.no_grad():
            return torch.cat([self.model(part) for part in INPUTS.split(LENGTHS, 1)], 1)

    def read(self, batch):
        while not hasattr(batch, "tokens") and "tokens" not in batch:
            batch = batch[0]
        outputs = self.model(batch["tokens"] if isinstance(batch, dict) else batch.tokens)
        self.outputs.append(outputs.detach())
        return outputs.logsumexp(-1).mean()

    def training_step(self, batch, batch_idx):
        return self.read(batch)

    def validation_step(self, batch, batch_idx):
        self.read(batch)

    def predict_step(self, batch, batch_idx):
        self.read(batch)


class Listed(IterableDataset):
    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)


def run(tmp_path, how, batch, documents=True, kind=Reads, callbacks=()):
    torch.manual_seed(0)
    model = kind()
    inside = model.inside()
    one = trainer(tmp_path, [*callbacks, all_lighthouse(1, CONFIG, documents=documents)], max_steps=1)
    getattr(one, how)(model, DataLoader(Listed([batch]), batch_size=None, collate_fn=lambda x: x))
    torch.testing.assert_close(model.outputs[0], inside)


FORMS = {
    "object": SimpleNamespace(tokens=INPUTS, document_ids=IDS),
    "dataclass": Fields(INPUTS, IDS),
    "named fields": Named(INPUTS, IDS),
}


@pytest.mark.parametrize("how", STAGES)
@pytest.mark.parametrize("form", FORMS)
def test_whatever_names_its_documents_is_read_and_refused(tmp_path, how, form):
    run(tmp_path, how, FORMS[form])
    with pytest.raises(PackedBatchError, match="document_ids of a sequence differ"):
        run(tmp_path, how, FORMS[form], documents=False)


@pytest.mark.parametrize("how", STAGES)
@pytest.mark.parametrize("batch", [[BATCH], (BATCH, 3), {0: BATCH}], ids=["list", "tuple", "mapping"])
def test_documents_within_a_part_of_a_batch_are_told_by_a_method_or_refused(tmp_path, how, batch):
    with pytest.raises(SettingError, match=r"inside a part of .* add a method documents\(batch\) to Reads"):
        run(tmp_path, how, batch)

    class Tells(Reads):
        def documents(self, batch):
            return batch[0]

    run(tmp_path, how, batch, kind=Tells)


@pytest.mark.parametrize("how", STAGES)
@pytest.mark.parametrize("told", [[LENGTHS] * 2, IDS.numpy(), IDS.double()], ids=["lists", "array", "floats"])
def test_a_method_that_returns_something_else_is_an_error(tmp_path, how, told):
    class Tells(Reads):
        def documents(self, batch):
            return told

    # which the batch seems to answer too
    batch = {"tokens": INPUTS, "position_ids": torch.arange(TOKENS).expand(2, -1)}
    with pytest.raises((TypeError, ValueError), match=r"documents\(batch\) must return .*Documents.*, got "):
        run(tmp_path, how, batch, kind=Tells)


class Packs(Callback):
    """Packs a batch that was not."""

    def pack(self, batch):
        if isinstance(batch, Fields):
            batch.document_ids = IDS.clone()
            return
        packed = {"documents": DOCUMENTS, "document_ids": IDS.clone(), "position_ids": POSITIONS}
        batch |= {name: packed[name] for name in batch if name in packed}

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.pack(batch)

    def on_validation_batch_start(self, trainer, module, batch, batch_idx, dataloader_idx=0):
        self.pack(batch)

    def on_predict_batch_start(self, trainer, module, batch, batch_idx, dataloader_idx=0):
        self.pack(batch)


REPLACED = {
    "documents": lambda: {"tokens": INPUTS, "documents": WHOLE},
    "ids": lambda: {"tokens": INPUTS, "document_ids": torch.zeros_like(IDS)},
    "positions": lambda: {"tokens": INPUTS, "position_ids": torch.arange(TOKENS).expand(2, -1)},
    "dataclass": lambda: Fields(INPUTS, torch.zeros_like(IDS)),
}


@pytest.mark.parametrize("how", STAGES)
@pytest.mark.parametrize("form", REPLACED)
def test_what_a_hook_puts_in_the_place_of_documents_counts(tmp_path, how, form):
    run(tmp_path, how, REPLACED[form](), callbacks=[Packs()])
    with pytest.raises(PackedBatchError):
        run(tmp_path, how, REPLACED[form](), documents=False, callbacks=[Packs()])


def copied(batch):
    """As a move to a device leaves it."""
    if isinstance(batch, torch.Tensor):
        return batch.clone()
    if isinstance(batch, dict):
        return {name: copied(value) for name, value in batch.items()}
    if isinstance(batch, list):
        return [copied(value) for value in batch]
    if isinstance(batch, Fields):
        return Fields(copied(batch.tokens), copied(batch.document_ids))
    return Named(*map(copied, batch)) if isinstance(batch, Named) else batch


@pytest.mark.parametrize("form", ["dict", "list", "dataclass", "named fields"])
def test_what_has_not_changed_since_the_move_is_read_on_the_host(form):
    host = {"dict": dict(BATCH), "list": [dict(BATCH)], **FORMS}[form]
    moved, batches = copied(host), _Batches(trainer=None, module=Reads())

    def ids(batch):
        batch = batch[0] if isinstance(batch, list) else batch
        return batch["document_ids"] if isinstance(batch, dict) else batch.document_ids

    batches.keep(host, moved)
    found = batches.whole(moved)
    assert type(found) is type(moved)
    assert ids(found) is IDS
    # of each batch once
    assert ids(batches.whole(moved)) is ids(moved)
    batches.keep(host, moved)
    ids(moved).add_(1)
    assert ids(batches.whole(moved)) is ids(moved)


class Fetches(Reads):
    """Each step gets its batch by itself."""

    def training_step(self, dataloader_iter):
        return self.read(next(dataloader_iter)[0])

    def validation_step(self, dataloader_iter):
        self.read(next(dataloader_iter)[0])

    def predict_step(self, dataloader_iter):
        self.read(next(dataloader_iter)[0])


@pytest.mark.filterwarnings("ignore:Found `dataloader_iter`")
@pytest.mark.parametrize("how", STAGES)
def test_a_step_that_fetches_its_batch_is_listened_to(tmp_path, how):
    run(tmp_path, how, dict(BATCH), kind=Fetches)
    with pytest.raises(PackedBatchError):
        run(tmp_path, how, dict(BATCH), documents=False, kind=Fetches)


@pytest.mark.parametrize("made", ["before", "within"])
def test_an_average_of_the_model_may_be_validated_in_its_place(tmp_path, made):
    class Averages(Reads):
        def __init__(self):
            super().__init__()
            self.average = AveragedModel(self.model) if made == "before" else None

        def on_train_start(self):
            self.average = self.average or AveragedModel(self.model)

        def validation_step(self, batch, batch_idx):
            self.outputs.append(self.average(batch["tokens"]))

        def configure_optimizers(self):
            return torch.optim.SGD(self.model.parameters(), lr=0.0)

    torch.manual_seed(0)
    model = Averages()
    inside = model.inside()
    callback = all_lighthouse(1, CONFIG, documents=True, select="model.blocks.*.attn")
    batches = DataLoader(Listed([BATCH]), batch_size=None)
    trainer(tmp_path, [callback], max_steps=1).fit(model, batches, batches)
    assert len(model.outputs) == 2
    for outputs in model.outputs:
        torch.testing.assert_close(outputs, inside)


def test_a_search_for_the_batch_size_stays_inside_documents(tmp_path):
    class Searches(Reads):
        batch_size = 2
        # or Lightning asks for its data
        validation_step = None

        def train_dataloader(self):
            return DataLoader(
                [{"tokens": INPUTS[row % 2], "document_ids": IDS[0]} for row in range(16)], self.batch_size
            )

        def configure_optimizers(self):
            return torch.optim.SGD(self.model.parameters(), lr=0.0)

    torch.manual_seed(0)
    model = Searches()
    inside = model.inside()
    finder = BatchSizeFinder(steps_per_trial=1, max_trials=2)
    trainer(tmp_path, [finder, all_lighthouse(1, CONFIG, documents=True)], max_steps=1).fit(model)
    assert [len(outputs) for outputs in model.outputs] == [2, 4, 4]
    for outputs in model.outputs:
        torch.testing.assert_close(outputs[:2], inside)
    assert scopes == []
