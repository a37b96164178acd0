"""Preparation: exact packing in document order, the same everywhere, complete or absent."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lighthouse.data import pipeline
from lightning_lighthouse.data import prepare as prepare_module
from lightning_lighthouse.data.integrity import Manifest, verify
from lightning_lighthouse.data.prepare import main, prepare
from lightning_lighthouse.data.sources import find_files, read_documents
from lightning_lighthouse.data.tokenizers import load_tokenizer

END = 256


def write_jsonl(path: Path, texts: Iterable[str], field: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(texts)))
    return path


def stored_sequences(folder: Path, split: str = "train") -> np.ndarray:
    """All sequences of a split in stored order, read by litdata: `[sequences, seq_len + 1]`."""
    from litdata import StreamingDataset, TokensLoader

    block = Manifest.load(folder).settings.seq_len + 1
    dataset = StreamingDataset(str(folder / split), item_loader=TokensLoader(block_size=block))
    return np.stack([dataset[i] for i in range(len(dataset))])


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def texts_of(count: int, seed: int = 42) -> list[str]:
    """Documents of a length between 1 and 700 characters, some of two bytes."""
    rng = np.random.default_rng(seed)
    words = ["pool", "score", "select", "gather", "attend", "scatter", "M\u00fcnchen", "\n", "def f(x):"]
    return [" ".join(rng.choice(words, size=rng.integers(1, 90))) for _ in range(count)]


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small BPE tokenizer with an end-of-document token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=307,
        special_tokens=["<pad>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts_of(50), trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return str(path)


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
        patch.setattr(prepare_module, "CHUNK_BYTES", sequences_per_chunk * block * 2)
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
    def die(_: Any) -> None:
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


def bytes_of(sequences: np.ndarray) -> bytes:
    return b"".join(sequences.ravel().astype(np.uint16).tobytes().split(np.uint16(END).tobytes())).replace(b"\0", b"")


def test_every_kind_of_file_gives_the_same_documents(tmp_path: Path) -> None:
    texts = texts_of(7)
    plain = write_jsonl(tmp_path / "plain" / "a.jsonl", texts)
    (tmp_path / "gzip").mkdir()
    (tmp_path / "gzip" / "a.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    (tmp_path / "text" / "sub").mkdir(parents=True)
    for i, text in enumerate(texts):
        (tmp_path / "text" / ("sub" if i > 4 else "") / f"{i}.txt").write_text(text)
    (tmp_path / "text" / ".hidden.txt").write_text("not for training")
    expected = [text.encode() for text in texts]
    for kind in ("plain", "gzip", "text"):
        documents = list(read_documents(find_files(str(tmp_path / kind)), "text"))
        assert [document.text for document in documents] == expected
        files = find_files(str(tmp_path / kind))
        assert sum(document.bytes_read for document in documents) == sum(file.stat().st_size for file in files)


def test_files_of_unknown_kind_are_told_of_or_asked_for(tmp_path: Path, caplog: Any) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.log").write_text("b")
    assert find_files(str(tmp_path)) == [tmp_path / "a.txt"]
    assert "1 of 2 files are left out, their kind is unknown (first: b.log)" in caplog.text
    documents = read_documents(find_files(str(tmp_path / "**" / "*")), "text")
    assert [document.text for document in documents] == [b"a", b"b"]
    (tmp_path / "a.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no file of a known kind \(\.txt, .*name other text files by"):
        find_files(str(tmp_path))
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"c"))
    with pytest.raises(ValueError, match=r"c\.txt\.gz is binary, not text"):
        list(read_documents(find_files(str(tmp_path / "c.txt.gz")), "text"))


def test_zstandard(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard", reason="the zstandard package is not installed")
    lines = write_jsonl(tmp_path / "a.jsonl", texts_of(997)).read_bytes()
    half = lines.index(b"\n", len(lines) // 2) + 1
    frames = [zstandard.compress(part) for part in (lines[:half], lines[half:])]
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(b"".join(frames))
    texts = [document.text.decode() for document in read_documents([path], "text") if document.text]
    assert texts == texts_of(997)
    path.write_bytes(b"".join(frames)[:-5])
    with pytest.raises(ValueError, match=r"a\.jsonl\.zst is damaged or cut short: the last frame is incomplete"):
        list(read_documents([path], "text"))


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="the pyarrow package is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"body": texts_of(131), "id": range(131)}), path, row_group_size=37)
    documents = list(read_documents([path], "body"))
    assert [document.text.decode() for document in documents] == texts_of(131)
    assert sum(document.bytes_read for document in documents) == path.stat().st_size
    with pytest.raises(ValueError, match=r"a\.parquet has no column 'text', found body, id; set text_field"):
        list(read_documents([path], "text"))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"a\.parquet is damaged or no Parquet file"):
        list(read_documents([path], "body"))


@pytest.mark.parametrize(("name", "package"), [("a.jsonl.zst", "zstandard"), ("a.parquet", "pyarrow")])
def test_an_absent_package_is_named(tmp_path: Path, monkeypatch: Any, name: str, package: str) -> None:
    (tmp_path / name).write_bytes(b"anything")
    # None makes the import fail as if the package were not installed
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=rf"{name} needs the {package} package: pip install {package}$"):
        list(read_documents([tmp_path / name], "text"))


def test_standard_library_is_the_default_source() -> None:
    files = find_files(None)
    assert sum(file.stat().st_size for file in files) > 5_000_000
    assert not any({"test", "tests", "site-packages"} & set(file.parts) for file in files)
    assert "argparse.py" in {file.name for file in files}


def test_tokenizer_file_round_trip(tokenizer_file: str) -> None:
    from tokenizers import Tokenizer

    tokenizer = load_tokenizer(tokenizer_file)
    text = "pool <|endoftext|> M\u00fcnchen <pad>"
    tokens = tokenizer.encode(text.encode())
    assert Tokenizer.from_file(tokenizer_file).decode(tokens[:-1].tolist(), skip_special_tokens=True) == text
    assert tokens.dtype == np.uint16
    assert tokens[-1] == tokenizer.end_of_document == 1
    assert (tokens < tokenizer.vocab_size).all()
    # control tokens written out in the text are text
    assert not {0, 1} & set(tokens[:-1].tolist())
    assert pickle.loads(pickle.dumps(tokenizer)).encode(text.encode()).tolist() == tokens.tolist()


def test_a_tokenizer_that_cuts_or_fills_does_neither(tokenizer_file: str, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(tokenizer_file)
    backend.enable_truncation(5)
    backend.enable_padding(length=97)
    backend.save(str(tmp_path / "tokenizer.json"))
    text = b"pool, score, select, gather, attend, scatter"
    expected = load_tokenizer(tokenizer_file).encode(text)
    assert load_tokenizer(str(tmp_path / "tokenizer.json")).encode(text).tolist() == expected.tolist()


def test_end_of_document_must_be_told_apart(tokenizer_file: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"end_of_document must be a token of .*, got '</doc>'"):
        load_tokenizer(tokenizer_file, "</doc>")
    with pytest.raises(ValueError, match="the text itself contains the end-of-document token 'p'"):
        load_tokenizer(tokenizer_file, "p").encode(b"stop, p")
    with pytest.raises(ValueError, match="end_of_document must be None for byte tokens"):
        load_tokenizer("bytes", "</s>")
    stripped = tmp_path / "tokenizer.json"
    stripped.write_text(Path(tokenizer_file).read_text().replace("<|endoftext|>", "<nothing usual>"))
    with pytest.raises(ValueError, match=r"has none of .*: set end_of_document to the token that ends a document"):
        load_tokenizer(str(stripped))
    stripped.write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is no tokenizer\.json"):
        load_tokenizer(str(stripped))
    with pytest.raises(
        FileNotFoundError, match=r"tokenizer must be 'bytes' or the path of a tokenizer\.json, got 'bite'"
    ):
        load_tokenizer("bite")


BAD_LINES = [
    ('{"text": "a"}\n{"text": \n', r"a\.jsonl, line 2 is not JSON"),
    ('{"text": "a"}\n\n{"body": "b"}\n', r"a\.jsonl, line 3 has no text in field 'text', found body; set text_field$"),
    ('{"text": 7}\n', r"a\.jsonl, line 1 has no text in field 'text', found text; set text_field$"),
    ('["a"]\n', r"a\.jsonl, line 1 has no text in field 'text', found list; set text_field$"),
    ('{"text": "\\ud800"}\n', r"a\.jsonl, line 1 holds half a surrogate pair"),
]


@pytest.mark.parametrize(("lines", "message"), BAD_LINES, ids=["cut", "field", "number", "list", "surrogate"])
def test_a_bad_line_is_named_and_nothing_is_left_behind(tmp_path: Path, lines: str, message: str) -> None:
    good = json.dumps({"text": "x" * 5000}) + "\n"
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text(lines + good)
    with pytest.raises(ValueError, match=message):
        prepare(str(tmp_path / "new" / "out"), seq_len=7, source=str(tmp_path / "in"))
    assert list((tmp_path / "new").iterdir()) == []


def test_text_that_is_not_utf8_is_named_where_it_must_be_decoded(tmp_path: Path, tokenizer_file: str) -> None:
    (tmp_path / "a.txt").write_bytes(b"latin-1: \xe9" * 99)
    with pytest.raises(ValueError, match=r"a\.txt: 'utf-8' codec can't decode byte 0xe9 in position 9"):
        prepare(str(tmp_path / "out"), seq_len=7, source=str(tmp_path / "a.txt"), tokenizer=tokenizer_file)
    # bytes are bytes
    prepare(str(tmp_path / "out"), seq_len=7, source=str(tmp_path / "a.txt"), validation_fraction=0)


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
        r"lighthouse prepare --output_dir .*/out --source .* --seq_len 67 .*--overwrite$",
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
        "from lightning_lighthouse.data import prepare as p\n"
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
    (["--seq_len", "many"], 2, "argument --seq_len: invalid int value: 'many'"),
    (["--seq_len", "61", "--validation_fraction", "1"], 2, "validation_fraction must be in [0, 1), got 1.0"),
    (["--seq_len", "61", "--num_workers", "-1"], 2, "num_workers must be at least 0, got -1"),
    (["--seq_len", "61", "--sourc", "x"], 2, "--sourc is not an option; did you mean --source?"),
    (["--source", "x"], 2, "the following arguments are required: --seq_len"),
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
