"""What a file needs on disk, said before there is one."""

from __future__ import annotations

import torch

from lightning_lighthouse.runs.saving import count_bytes


def test_the_bytes_of_a_checkpoint_are_those_of_its_file(tmp_path):
    weight = torch.arange(9973.0)
    # a storage that is shared is written once; a range is no list
    content = {"state_dict": {"a": weight, "b": weight[7:]}, "hyper_parameters": {"layers": range(3)}, "names": ["x"]}
    torch.save(content, tmp_path / "file")
    size = (tmp_path / "file").stat().st_size
    # its name stands in the file
    assert abs(count_bytes(content) - size) < 1000
    assert size > weight.nbytes
