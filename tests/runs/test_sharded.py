"""Checkpoints of torch.distributed: their weights and steps, brought into a model or refused in one line."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from resume_callbacks import Planted
from torch import nn
from torch.distributed.checkpoint import save

from lightning_lighthouse.runs.sharded import is_sharded_checkpoint, load_weights, read_weights, step_of


def model(width: int = 3) -> nn.Module:
    torch.manual_seed(width)
    return nn.Sequential(nn.Linear(2, width), nn.LayerNorm(width))


# under FSDP2, and under FSDP1
@pytest.fixture(params=["state_dict", "model"])
def folder(request, tmp_path) -> Path:
    torch.manual_seed(7)
    state = {name: torch.randn_like(value) for name, value in model().state_dict().items()}
    path = tmp_path / "last.ckpt"
    save({request.param: state, "optimizer_0": {"state": torch.ones(3)}}, checkpoint_id=path, no_dist=True)
    torch.save({"global_step": 5}, path / "meta.pt")
    torch.save(state, tmp_path / "whole.pt")
    return path


def test_its_weights_come_into_a_model(folder, recwarn):
    assert is_sharded_checkpoint(folder)
    assert step_of(folder) == 5
    whole = torch.load(folder.parent / "whole.pt", weights_only=True)
    other = model()
    load_weights(folder, other)
    for found in (read_weights(folder), other.state_dict()):
        assert found.keys() == whole.keys()
        assert all(torch.equal(found[name], value) for name, value in whole.items())
    assert not [str(warning.message) for warning in recwarn if "torch.distributed" in str(warning.message)]


OTHERS = {
    "wider": (model(4), r"0\.weight is \[3, 2\] and not \[4, 2\], and 3 more such"),
    "longer": (nn.Sequential(*model(), nn.Linear(3, 3)), r"it has no 2\.weight, and 1 more such"),
    "shorter": (model()[:1], r"the model has no 1\.\w+, and 1 more such"),
}


@pytest.mark.parametrize(("other", "line"), OTHERS.values(), ids=OTHERS)
def test_what_the_model_cannot_take_is_one_line_and_changes_nothing(folder, other, line):
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(ValueError, match=f"does not fit the model: {line}$") as refused:
        load_weights(folder, other)
    assert "\n" not in str(refused.value)
    assert all(torch.equal(before[name], value) for name, value in other.state_dict().items())


def test_a_checkpoint_without_a_model_is_refused(tmp_path):
    save({"other": torch.ones(2)}, checkpoint_id=tmp_path, no_dist=True)
    with pytest.raises(ValueError, match="holds no model"):
        read_weights(tmp_path)
    assert step_of(tmp_path) is None


def test_code_planted_beside_the_shards_never_runs(folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / ".metadata").write_bytes(pickle.dumps(Planted()))
    torch.save(Planted(), folder / "meta.pt")
    for read in (lambda: read_weights(folder), lambda: load_weights(folder, model()), lambda: step_of(folder)):
        with pytest.raises(pickle.UnpicklingError, match="GLOBAL"):
            read()
    assert not (folder / "planted").exists()


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_a_folder_whose_file_was_cut_is_named(folder, name):
    (folder / name).write_bytes((folder / name).read_bytes()[:100])
    place = folder / name if name == ".metadata" else folder
    with pytest.raises(ValueError, match=f"^{place} cannot be read: "):
        load_weights(folder, model())


def test_another_pickle_is_no_table_of_contents(folder):
    (folder / ".metadata").write_bytes(pickle.dumps({"state_dict": 3}))
    with pytest.raises(ValueError, match="is no table of contents of a sharded checkpoint, but dict"):
        read_weights(folder)
