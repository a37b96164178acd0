"""`lighthouse evaluate` on models of transformers: a folder, a name, a GGUF file, a run that trained one further."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gguf_file import save_gguf
from pretrained import RUN, WORDS, load_model, save_model, save_tokenizer, train_run

pytest.importorskip("transformers", reason="needs the extra hf")

from lightning_lighthouse.checks import SettingError
from lightning_lighthouse.cli import commands as cli
from lightning_lighthouse.data.tokenizers import load_tokenizer
from lightning_lighthouse.huggingface.reading import is_name
from lightning_lighthouse.huggingface.tokenizers import check_tokenizer
from lightning_lighthouse.runs.evaluation_record import read_evaluations

PROMPT, ANSWER = "the same text over and", " over again"
ASKED = ["--measures", "loss_by_position", "--own_tasks", "tasks.jsonl", "--num_samples", "2"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The test runs there, beside tasks and text."""
    monkeypatch.chdir(tmp_path)
    write_texts()
    return tmp_path


def write_texts() -> None:
    Path("tasks.jsonl").write_text(json.dumps({"prompt": PROMPT, "answer": ANSWER}) + "\n")
    Path("words.txt").write_text(" ".join(WORDS * 200))


def saved(folder: str, **settings: Any) -> str:
    save_model(Path(folder), **settings)
    save_tokenizer(Path(folder))
    return folder


def task_of(output: Path) -> tuple[float, float]:
    """Loss and exact match of the task in the last evaluation."""
    [row] = read_evaluations(output)[-1]["own_tasks"]
    return row["value"], row["exact_match"]


def by_hand(model: Any) -> float:
    """The mean loss of the answer's tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained("base")
    ids = tokenizer(PROMPT + ANSWER, return_tensors="pt")["input_ids"]
    count = len(tokenizer(ANSWER)["input_ids"])
    with torch.no_grad():
        logits = model(ids[:, :-1]).logits[0, -count:]
    return F.cross_entropy(logits, ids[0, -count:]).item()


def test_a_folder_and_a_name_answer_tasks_of_ones_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved("base")
    text = ["--text", "words.txt", "--lengths", "64", "--accelerator", "cpu"]
    assert cli.main(["evaluate", "base", *ASKED, *text, "--output", "folder"]) == 0
    loss, exact = task_of(folder / "folder")
    assert loss == pytest.approx(by_hand(load_model("base")), abs=1e-4)
    assert exact == 0.0
    # as the hub's own downloads lie, where nothing can be downloaded
    from huggingface_hub import constants

    kept = folder / "hub" / "models--owner--model"
    saved(str(kept / "snapshots" / "1"))
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert cli.main(["evaluate", "owner/model", *ASKED, *text, "--output", "name"]) == 0
    assert task_of(folder / "name") == (loss, exact)
    assert cli.main(["export", "owner/model", "exported"]) == 0
    assert cli.main(["evaluate", "exported", *ASKED, *text, "--output", "again"]) == 0
    assert task_of(folder / "again") == (loss, exact)


def test_a_model_whose_attention_cannot_be_routed_is_evaluated_all_the_same(folder: Path) -> None:
    saved("base", family="Gemma 2")
    text = ["--text", "words.txt", "--lengths", "64", "--accelerator", "cpu"]
    assert cli.main(["evaluate", "base", *ASKED, *text]) == 0
    assert task_of(folder)[0] == pytest.approx(by_hand(load_model("base", attention=None)), abs=1e-4)


def test_a_run_that_trained_one_further_is_evaluated_by_its_folder_alone(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path_factory.mktemp("run")
    monkeypatch.chdir(folder)
    train_run("pretrained")
    write_texts()
    assert cli.main(["evaluate", str(RUN), *ASKED, "--lengths", "64"]) == 0
    [found] = read_evaluations(RUN)
    assert (found["step"], found["training_length"]) == (3, 64)
    assert cli.main(["export", str(RUN), "out"]) == 0
    assert task_of(RUN)[0] == pytest.approx(by_hand(load_model("out")), abs=1e-4)
    # its checkpoint, and the exported folder on the run's own data
    checkpoint = str(RUN / "checkpoints" / "last.ckpt")
    assert cli.main(["evaluate", checkpoint, "-c", str(RUN / "config.yaml"), *ASKED, "--output", "checkpoint"]) == 0
    assert task_of(Path("checkpoint")) == task_of(RUN)
    data = ["-c", str(RUN / "config.yaml"), "--accelerator", "cpu", "--lengths", "64"]
    assert cli.main(["evaluate", "out", *ASKED, *data, "--output", "exported"]) == 0
    [again] = read_evaluations(Path("exported"))
    for name in ("loss_by_position", "own_tasks"):
        values = [[row["value"] for row in rows[name]] for rows in (found, again)]
        assert values[0] == pytest.approx(values[1], abs=1e-4)


def test_what_cannot_be_read_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    save_model(folder / "bare")
    (folder / "code").mkdir()
    remote = {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.Config"}}
    (folder / "code" / "config.json").write_text(json.dumps(remote))
    (folder / "junk.gguf").write_text("no GGUF")
    text = ["--text", "words.txt"]
    cases = {
        ("bare", *text): "bare has no tokenizer to read --text with: give -c RECIPE.yaml",
        ("owner/gone", *text): "model 'owner/gone' is nothing here, and as a name it cannot be read: ",
        ("gone",): "gone: no such run, checkpoint or model; one that transformers loads by that name needs text",
        ("runs/a/gone", *text): "runs/a/gone: no such run, checkpoint or model",
        ("code", *text): "model 'code' cannot be read: ",
        ("junk.gguf", *text): "model 'junk.gguf' cannot be read: ",
    }
    for arguments, words in cases.items():
        capsys.readouterr()
        assert cli.main(["evaluate", *arguments]) == 1, arguments
        # behind the bars of transformers
        *_, line = capsys.readouterr().err.splitlines()
        assert line.startswith(f"lighthouse: {words}"), line
    find_spec = "lightning_lighthouse.huggingface.reading.find_spec"
    for package, extra in (("transformers", "hf"), ("gguf", "gguf")):
        monkeypatch.setattr(find_spec, lambda name, package=package: None if name == package else 1)
        assert cli.main(["evaluate", "junk.gguf", *text]) == 1
        err = capsys.readouterr().err
        assert f"needs the package {package}" in err
        assert f"pip install 'lightning_lighthouse[{extra}]'" in err


@pytest.mark.parametrize(
    ("model", "expected"),
    [("owner/model", True), ("gpt2", True), ("a/b/c", False), ("./run", False), ("x.gguf", False), ("run.ckpt", False)],
)
def test_what_may_be_a_name(folder: Path, model: str, expected: bool) -> None:
    assert is_name(model) == expected
    (folder / "gpt2").mkdir()
    assert not is_name("gpt2")


def test_a_gguf_file_and_the_folder_it_is_exported_to_are_one_model(folder: Path, capsys: Any) -> None:
    pytest.importorskip("gguf")
    file = save_gguf(folder / "tiny.gguf")
    text = ["--text", "words.txt", "--lengths", "64", "--accelerator", "cpu"]
    assert cli.main(["evaluate", file, *ASKED, *text, "--output", "file"]) == 0
    assert cli.main(["export", file, "out"]) == 0
    assert cli.main(["evaluate", "out", *ASKED, *text, "--output", "folder"]) == 0
    assert task_of(folder / "folder") == task_of(folder / "file")
    # nothing is left of the file's own types, and its tokenizer is one for the data
    assert "quantization_config" not in json.loads(Path("out/config.json").read_text())
    assert list(load_tokenizer("out").encode(b"the t\xc3\xa9")) == [257, 32, 116, 195, 169, 258]
    check_tokenizer("out", file)
    with pytest.raises(SettingError, match=r"lighthouse export MODEL FOLDER makes one of a name or a \.gguf file"):
        check_tokenizer("bytes", file)


@pytest.mark.slow
def test_a_gguf_file_answers(folder: Path) -> None:
    file = os.environ.get("LIGHTHOUSE_SMOLLM2")
    if file is None:
        pytest.skip("needs the file of SmolLM2-135M-Instruct in LIGHTHOUSE_SMOLLM2")
    pytest.importorskip("gguf")
    tasks = [{"prompt": "The capital of France is", "answer": " Paris"}, {"prompt": "2, 4, 6, 8,", "answer": " 10"}]
    Path("tasks.jsonl").write_text("\n".join(map(json.dumps, tasks)))
    arguments = ["--text", "words.txt", "--lengths", "128", "--accelerator", "cpu", "--dtype", "float32"]
    assert cli.main(["evaluate", file, *ASKED, *arguments]) == 0
    loss, exact = task_of(folder)
    assert exact == 1.0
    assert loss < 1.0
