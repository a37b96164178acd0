"""Preparation: exact packing in document order, the same everywhere, complete or absent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import END, bytes_of, content, stored_sequences, texts_of, write_jsonl

from lightning_lighthouse.cli.prepare import main
from lightning_lighthouse.data.integrity import verify
from lightning_lighthouse.data.manifest import Manifest
from lightning_lighthouse.data.preparing import packing, pipeline
from lightning_lighthouse.data.preparing import prepare as prepare_module
from lightning_lighthouse.data.preparing.prepare import prepare


@given(
    documents=st.lists(st.text(max_size=40), min_size=1, max_size=30),
    seq_len=st.sampled_from([1, 2, 5, 13, 31]),
    sequences_per_chunk=st.sampled_from([1, 3]),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_sequences_cut_the_stream_of_documents(
    documents: list[str], seq_len: int, sequences_per_chunk: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("packing")
    stream = [token for text in documents if text for token in (*text.encode(), END)]
    block = seq_len + 1
    whole = len(stream) // block * block
    write_jsonl(folder / "text.jsonl", documents)
    with pytest.MonkeyPatch.context() as patch:
        # several chunks, also of little text
        patch.setattr(packing, "CHUNK_BYTES", sequences_per_chunk * block * 2)
        arguments: dict[str, Any] = {"source": str(folder / "text.jsonl"), "seq_len": seq_len}
        if not whole:
            with pytest.raises(ValueError, match=r"seq_len .* needs .* give more text or lower seq_len"):
                prepare(str(folder / "out"), validation_fraction=0, **arguments)
            assert not (folder / "out").exists()
            return
        manifest = prepare(str(folder / "out"), validation_fraction=0, **arguments)

    assert stored_sequences(folder / "out").ravel().tolist() == stream[:whole]
    assert manifest.train.documents == sum(bool(text) for text in documents)
    assert manifest.train.tokens == len(stream)
    assert manifest.train.sequences == whole // block
    assert manifest.train.dropped_tokens == len(stream) - whole
    assert manifest.train.longest_document == max(len(text.encode()) + 1 for text in documents if text)
    assert manifest.train.text_bytes == sum(len(text.encode()) for text in documents)
    num_chunks = len(list((folder / "out" / "train").glob("chunk-*.bin")))
    assert num_chunks == -(-manifest.train.sequences // sequences_per_chunk)


def test_number_of_processes_changes_nothing(tmp_path: Path, tokenizer_file: str, monkeypatch: Any) -> None:
    # many tasks, so that processes finish out of order
    monkeypatch.setattr(pipeline, "TASK_BYTES", 500)
    source = str(write_jsonl(tmp_path / "text.jsonl", texts_of(211)))
    folders = [tmp_path / f"workers{n}" for n in (0, 1, 3)]
    for folder, workers in zip(folders, (0, 1, 3), strict=True):
        prepare(str(folder), seq_len=61, source=source, tokenizer=tokenizer_file, num_workers=workers)
    assert content(folders[0]) == content(folders[1]) == content(folders[2])
    assert Manifest.load(folders[0]).validation.sequences > 0


def test_a_tokenizing_process_that_dies_is_told_of(tmp_path: Path, tokenizer_file: str, monkeypatch: Any) -> None:
    def die(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(pipeline, "_start_process", die)
    source = str(write_jsonl(tmp_path / "text.jsonl", texts_of(31)))
    with pytest.raises(ChildProcessError, match=r"one of 2 tokenizing processes died, .*; lower num_workers"):
        prepare(str(tmp_path / "out"), seq_len=61, source=source, tokenizer=tokenizer_file, num_workers=2)
    assert [path.name for path in tmp_path.iterdir()] == ["text.jsonl"]


def test_chunk_names_do_not_depend_on_the_node(tmp_path: Path, monkeypatch: Any) -> None:
    source = str(write_jsonl(tmp_path / "text.jsonl", texts_of(31)))
    prepare(str(tmp_path / "first"), seq_len=61, source=source)
    # litdata reads these to find out its rank
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("GLOBAL_RANK", "8")
    prepare(str(tmp_path / "second"), seq_len=61, source=source)
    assert content(tmp_path / "first") == content(tmp_path / "second")


def test_split_is_by_document_and_follows_the_seed(tmp_path: Path) -> None:
    texts = [f"document {i:04d}." for i in range(401)]
    source = str(write_jsonl(tmp_path / "text.jsonl", texts))
    held_out = []
    for seed in (1, 2):
        folder = tmp_path / f"seed{seed}"
        prepare(str(folder), seq_len=13, source=source, validation_fraction=0.25, seed=seed)
        splits = [bytes_of(stored_sequences(folder, split)) for split in ("train", "validation")]
        found = [{text for text in texts if text.encode() in data} for data in splits]
        assert not found[0] & found[1]
        # at most the incomplete last sequence of each split is missing
        assert len(found[0] | found[1]) >= 399
        assert 60 < len(found[1]) < 140
        held_out.append(found[1])
    assert held_out[0] != held_out[1]


def test_an_existing_output_is_kept_or_refused(tmp_path: Path) -> None:
    source = str(write_jsonl(tmp_path / "text.jsonl", texts_of(31)))
    out = str(tmp_path / "out")
    asked: dict[str, Any] = {"source": source, "seq_len": 61}
    first = prepare(out, **asked)
    stamps = {path: path.stat().st_mtime_ns for path in Path(out).rglob("*")}
    assert prepare(out, **asked) == first
    with pytest.raises(
        ValueError,
        match=r"out was prepared with seq_len=61, asked for 67; keep the former, .*"
        r"lighthouse prepare --output_dir .*/out --seq_len 67 --source .*/text.jsonl --overwrite$",
    ):
        prepare(out, **{**asked, "seq_len": 67})
    assert {path: path.stat().st_mtime_ns for path in Path(out).rglob("*")} == stamps
    assert prepare(out, overwrite=True, **{**asked, "seq_len": 67}).settings.seq_len == 67
    assert list(verify(Path(out))) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "text.jsonl"]


def test_a_folder_of_the_user_is_never_touched(tmp_path: Path) -> None:
    source = str(write_jsonl(tmp_path / "text.jsonl", texts_of(31)))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("irreplaceable")
    # a name that we use as well
    (tmp_path / "out" / "manifest.json").write_text("{}")
    before = content(tmp_path / "out")
    refusals = {False: r"manifest\.json is cut short or altered", True: "holds files not written by lighthouse prepare"}
    for overwrite, refusal in refusals.items():
        with pytest.raises(ValueError, match=refusal):
            prepare(str(tmp_path / "out"), seq_len=61, source=source, overwrite=overwrite)
    assert content(tmp_path / "out") == before


def test_a_folder_without_its_manifest_is_refused_or_replaced(tmp_path: Path, monkeypatch: Any) -> None:
    source = str(write_jsonl(tmp_path / "text.jsonl", texts_of(31)))
    out = tmp_path / "out"
    asked: dict[str, Any] = {"source": source, "seq_len": 61}
    first = prepare(str(out), **asked)
    (out / "manifest.json").unlink()
    before = content(out)
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "write_splits", None)
        with pytest.raises(
            ValueError,
            match=r"output_dir \S*out holds data but no manifest\.json; .*lighthouse prepare .* --overwrite$",
        ):
            prepare(str(out), **asked)
        # a folder of such a name, but not with such files
        (out / "train" / "cat.jpg").write_text("irreplaceable")
        for overwrite in (False, True):
            with pytest.raises(ValueError, match="holds files not written by lighthouse prepare; choose another one"):
                prepare(str(out), overwrite=overwrite, **asked)
        assert content(out).keys() == {*before, "train/cat.jpg"}
        (out / "train" / "cat.jpg").unlink()
    assert prepare(str(out), overwrite=True, **asked) == first
    assert list(verify(out)) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "text.jsonl"]


def test_a_link_stays_and_its_target_is_replaced(tmp_path: Path) -> None:
    source = str(write_jsonl(tmp_path / "text.jsonl", texts_of(31)))
    (tmp_path / "disk").mkdir()
    link = tmp_path / "out"
    link.symlink_to(tmp_path / "disk" / "data")
    for seq_len in (61, 67):
        prepare(str(link), seq_len=seq_len, source=source, overwrite=True)
        assert link.is_symlink()
        assert Manifest.load(tmp_path / "disk" / "data").settings.seq_len == seq_len
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["data"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "out", "text.jsonl"]


def test_the_current_folder_is_refused_before_the_work(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare_module, "write_splits", None)
    with pytest.raises(ValueError, match=r"output_dir /\S* is the current folder, or holds it; run this from"):
        prepare(".", seq_len=61)


def test_of_two_preparations_the_first_to_end_is_kept(tmp_path: Path) -> None:
    source = str(write_jsonl(tmp_path / "text.jsonl", texts_of(31)))
    first = prepare(str(tmp_path / "out"), seq_len=61, source=source)
    before = content(tmp_path / "out")
    for seq_len in (61, 67):
        second = prepare(str(tmp_path / "other"), seq_len=seq_len, source=source)
        partial = (tmp_path / "other").rename(tmp_path / "partial")
        if second == first:
            prepare_module._publish(partial, tmp_path / "out", second, overwrite=False)
        else:
            with pytest.raises(ValueError, match="was written by another process meanwhile, with other content"):
                prepare_module._publish(partial, tmp_path / "out", second, overwrite=False)
        partial.rename(tmp_path / f"done{seq_len}")
    assert content(tmp_path / "out") == before


def test_a_killed_preparation_leaves_nothing_that_is_found(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "text.jsonl", texts_of(31))
    code = (
        "import os, signal\n"
        "from lightning_lighthouse.data.preparing import prepare as p\n"
        "p._publish = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"p.prepare('out', seq_len=61, source={str(source)!r})\n"
    )
    killed = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, timeout=60, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len([path for path in tmp_path.iterdir() if path.name.startswith(".out.partial-")]) == 1
    # of another machine, where the process may live
    (tmp_path / ".out.partial-elsewhere-77").mkdir()
    assert not (tmp_path / "out").exists()
    prepare(str(tmp_path / "out"), seq_len=61, source=str(source))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.partial-elsewhere-77", "out", "text.jsonl"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_parent_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(
        OSError, match=r"output_dir .*out cannot be written: .*Permission denied.*choose a folder that can"
    ):
        prepare(str(tmp_path / "out"), seq_len=61)


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"output_dir .*out cannot be written: .*choose a folder that can"):
        prepare(str(tmp_path / "file" / "out"), seq_len=61)


def test_validation_text_of_its_own(tmp_path: Path) -> None:
    texts = texts_of(67)
    train = write_jsonl(tmp_path / "train.jsonl", texts[:50])
    validation = write_jsonl(tmp_path / "validation.jsonl", texts[50:])
    whole = prepare(str(tmp_path / "out"), seq_len=61, source=str(train), validation_source=str(validation))
    for split, documents, counts in (("train", texts[:50], whole.train), ("validation", texts[50:], whole.validation)):
        stream = [token for text in documents for token in (*text.encode(), END)]
        assert stored_sequences(tmp_path / "out", split).ravel().tolist() == stream[: counts.sequences * 62]
        assert counts.documents == len(documents)


def test_too_little_validation_text_is_an_error(tmp_path: Path) -> None:
    source = str(write_jsonl(tmp_path / "text.jsonl", ["x" * 999, "y" * 9]))
    little = str(write_jsonl(tmp_path / "little.jsonl", ["z" * 9]))
    for asked, found in (
        ({"validation_fraction": 0.01}, r"validation_fraction 0\.01 gave 0 tokens in 0 documents"),
        ({"validation_source": little}, r"validation_source .*little\.jsonl gave 10 tokens in 1 documents"),
    ):
        options: dict[str, Any] = {"seq_len": 61, "source": source, **asked}
        with pytest.raises(
            ValueError, match=rf"^{found}, one sequence needs 62; give more validation text, lower seq_len"
        ):
            prepare(str(tmp_path / "out"), **options)


BAD_ARGUMENTS = [
    (["--seq_len", "0"], 2, "seq_len must be in [1, 536870912], got 0"),
    (["--seq_len", "many"], 2, "seq_len must be int, got 'many'"),
    (["--seq_len", "61", "--validation_fraction", "1"], 2, "validation_fraction must be in [0, 1), got 1.0"),
    (["--seq_len", "61", "--num_workers", "-1"], 2, "num_workers must be at least 0, got -1"),
    (["--seq_len", "61", "--end_of_document", "x"], 2, "end_of_document must be None for byte tokens, got 'x'"),
    (["--seq_len", "61", "--sourc", "x"], 2, "--sourc is not an option; did you mean --source?"),
    (["--source", "x"], 2, "the following arguments are required: --seq_len"),
    (
        ["--seq_len", "61", "--documents", "hole"],
        2,
        "documents must be 'pack' or 'whole', got 'hole'; did you mean whole?",
    ),
    (["--seq_len", "61", "--overwrite=maybe"], 2, "overwrite must be bool, got 'maybe'"),
    (["--seq_len"], 2, "argument --seq_len: expected one argument"),
    (["--seq_len", "61", "stray"], 2, "unrecognized arguments: stray"),
    (
        ["--seq_len", "61", "--source", "x"],
        1,
        "source must be a file, a folder or a glob pattern, got 'x': no such file",
    ),
]


@pytest.mark.parametrize(("arguments", "status", "line"), BAD_ARGUMENTS, ids=lambda value: str(value)[:30])
def test_command_says_what_is_wrong_in_one_line(
    tmp_path: Path, monkeypatch: Any, capsys: Any, arguments: list[str], status: int, line: str
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        found = main(["--output_dir", "out", *arguments])
    except SystemExit as end:
        found = end.code
    assert (found, capsys.readouterr().err) == (status, f"lighthouse prepare: {line}\n")
    assert list(tmp_path.iterdir()) == []


def test_command_reports(tmp_path: Path, capsys: Any) -> None:
    source = write_jsonl(tmp_path / "text.jsonl", ["x" * 9, "y" * 30], field="body")
    arguments = f"--seq_len 7 --text_field body --validation_fraction 0 --source {source} --output_dir {tmp_path}/out"
    assert main(arguments.split()) == 0
    report = capsys.readouterr().out
    for name, value in {
        "documents": 2,
        "tokens": 41,
        "sequences": 5,
        "dropped tokens": 1,
        "longest document": 31,
    }.items():
        assert f"{name:18}{value:16}" in report
    assert "tokenizer bytes: 257 tokens, 256 ends a document" in report
    assert f"sha256 {Manifest.load(tmp_path / 'out').sha256}" in report
