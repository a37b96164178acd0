"""Attention over shared sequences is that of one process: every selection and type of layer, to the same bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from places import HELPERS, ROOT

SCRIPT = HELPERS / "shared_attention.py"
SAID = {
    "mask": "attn_mask was given; pass attn_mask=None and is_causal=True",
    "not causal": "is_causal is False; pass is_causal=True",
    "dropout": "dropout_p is not 0; set the dropout of the attention weights to 0",
    "cache": "query and key lengths differ; a cache or cross-attention cannot be shared; run a prompt",
    "length": "sees 6 tokens, this rank's slice has 4",
}


# of types that exchange what crosses an edge alone, and so compute on other blocks; so do shared queries
LOCAL = {"window", "sinks", "chunk", "wide chunk"}


def shared(folder, ranks: int, cases: str) -> list[dict]:
    settings = {"PYTHONPATH": os.pathsep.join([str(HELPERS), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    environment = os.environ | settings | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, str(SCRIPT), str(folder), str(ranks), cases]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]


# one start of processes for all of it: they are what costs
@pytest.mark.parametrize(
    ("ranks", "cases", "count"),
    [
        (2, "quick", 17),
        pytest.param(2, "all", 23, marks=pytest.mark.slow),
        # as many ranks as key/value heads, and twice as many
        pytest.param(4, "all", 23, marks=pytest.mark.slow),
        pytest.param(4, "grouped", 23, marks=pytest.mark.slow),
        pytest.param(8, "grouped", 9, marks=pytest.mark.slow),
        # two heads that three ranks cannot share out
        pytest.param(3, "grouped", 14, marks=pytest.mark.slow),
    ],
)
def test_shared_attention_is_that_of_one_process(ranks, cases, count, tmp_path):
    for found in shared(tmp_path, ranks, cases):
        said = found.pop("refused")
        assert len(found) == count
        for name, case in found.items():
            assert max(case["errors"]) < 1e-13, (name, case)
            # a quarter of the tokens is projected to q, k and v by other kernels already
            assert case["same"] or name in LOCAL or "kv head" in name or ranks > 2, name
        for name, words in SAID.items():
            assert said[name].startswith("SharedCallError: ")
            assert words in said[name]
        tokens = ranks * 5 + 1
        assert said["uneven"] == (
            f"SettingError: {tokens} tokens cannot be shared by {ranks} ranks; choose seq_len a multiple of {ranks}"
        )


@pytest.mark.slow
def test_the_kernels_share_entries_and_windows(tmp_path):
    for found in shared(tmp_path, 2, "triton"):
        del found["refused"]
        assert set(found) == {"causal", "mean, four levels", "window", "sinks"}
        for name, case in found.items():
            assert case["same"] or name in LOCAL, name
            assert max(case["errors"]) < (4e-6 if name in LOCAL else 1e-6), (name, case)
