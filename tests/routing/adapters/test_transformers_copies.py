"""A patched model of transformers is copied and pickled in a training, and the copy is a plain model behind it."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from families import CONFIG, GROUPED, build_transformers
from fitting import fit
from foreign import VOCABULARY, ForeignModule
from lightning.pytorch import Callback
from torch.utils.data import DataLoader

from lightning_lighthouse import LighthouseCallback, patch_attention
from lightning_lighthouse.checks import SettingError
from lightning_lighthouse.routing.packing import PackedBatchError

transformers = pytest.importorskip("transformers", reason="needs the extra hf")

TOKENS = 64
POSITIONS = torch.arange(TOKENS // 2).repeat(2)[None]
COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model))}
copies = pytest.mark.parametrize("made", COPIES.values(), ids=COPIES)
settings_of_documents = pytest.mark.parametrize("documents", [False, True, "ignore"])


def llama():
    return build_transformers("LlamaConfig", **GROUPED).model


def tokens(rows=1):
    return torch.randint(VOCABULARY, (rows, TOKENS), generator=torch.Generator().manual_seed(0))


def assert_is_plain(model):
    """Packed, alone and in training, it is what a model that was never patched is with its weights."""
    plain = llama()
    plain.load_state_dict(model.state_dict())
    for inputs in ({}, {"position_ids": POSITIONS}):
        ours, theirs = (m.train()(input_ids=tokens(), use_cache=False, **inputs).logits for m in (model, plain))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
        ours.square().mean().backward()
    assert pickle.dumps(model)


class Copier(transformers.TrainerCallback):
    """Copies the model behind its second step."""

    def __init__(self, made):
        self.made = made

    def on_step_end(self, args, state, control, model=None, **others):
        if state.global_step == 2:
            self.copy = self.made(model)


@copies
@settings_of_documents
def test_a_copy_made_under_the_trainer_is_plain_behind_it(made, documents, tmp_path):
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate: the extra models")
    from lightning_lighthouse.huggingface import LighthouseTrainerCallback

    copier, told = Copier(made), {"position_ids": POSITIONS[0]} if documents else {}
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=4, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True
    )
    rows = [{"input_ids": row, "labels": row, **told} for row in tokens(40)]
    callback = LighthouseTrainerCallback(3, CONFIG, documents=documents, layer_types=["lighthouse"])
    transformers.Trainer(llama(), arguments, train_dataset=rows, callbacks=[callback, copier]).train()
    assert_is_plain(copier.copy)


class Module(ForeignModule):
    """Trains the Llama."""

    def __init__(self):
        super().__init__()
        self.model = llama()

    def training_step(self, batch, index):
        return self.model(**batch, labels=batch["input_ids"]).loss


class Copies(Callback):
    """Copies the model behind its second step."""

    def __init__(self, made):
        self.made = made

    def on_train_batch_end(self, trainer, module, *others):
        if trainer.global_step == 2:
            self.copy = self.made(module.model)


@copies
@settings_of_documents
def test_a_copy_made_under_lightning_is_plain_behind_it(made, documents, tmp_path):
    copier = Copies(made)
    batch = {"input_ids": tokens()} | ({"position_ids": POSITIONS} if documents else {})
    callback = LighthouseCallback(3, CONFIG, documents=documents, layer_types=["lighthouse"])
    fit(tmp_path, [callback, copier], Module(), data=DataLoader([batch] * 4, batch_size=None), max_steps=4)
    assert_is_plain(copier.copy)


def test_a_deep_copy_is_heard_as_the_model_while_that_is_patched():
    model = llama()
    with patch_attention(model, CONFIG):
        follower = copy.deepcopy(model)
        model(input_ids=tokens())
        with pytest.raises(PackedBatchError):
            follower(input_ids=tokens(), position_ids=POSITIONS)
    with patch_attention(llama(), CONFIG, documents=True) as patch:
        follower = copy.deepcopy(patch.model)
        with pytest.raises(SettingError, match="without position_ids"):
            follower(input_ids=tokens())
        patch.model(input_ids=tokens(), position_ids=POSITIONS)


@copies
def test_a_copy_is_patched_generates_and_is_restored_as_any_model(made):
    model = llama()
    with patch_attention(model, CONFIG):
        model(input_ids=tokens())
        copied = made(model)
    prompt = {"inputs": tokens(), "max_new_tokens": 2, "do_sample": False, "pad_token_id": 0}
    expected = model.eval().generate(**prompt)
    with patch_attention(copied, CONFIG) as patch:
        with pytest.raises(PackedBatchError):
            copied(input_ids=tokens(), position_ids=POSITIONS)
        copied.train()(input_ids=tokens())
        patch.check()
        patch.count_calls()
        assert torch.equal(copied.eval().generate(**prompt), expected)
        assert patch.count_calls()["routed"] == 0
    assert_is_plain(copied)


def test_a_pickled_model_loads_without_this_package(tmp_path):
    model = llama()
    with patch_attention(model, CONFIG):
        model(input_ids=tokens())
        (tmp_path / "model").write_bytes(pickle.dumps(model))
    program = (
        "import sys; sys.modules['lightning_lighthouse'] = None; import pickle, torch; "
        f"model = pickle.load(open({str(tmp_path / 'model')!r}, 'rb')); "
        "print(model(input_ids=torch.zeros(1, 8, dtype=torch.long)).logits.shape[1])"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "8", run.stderr
