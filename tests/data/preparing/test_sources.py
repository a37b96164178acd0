"""Sources: every kind of file gives the same documents, and what is damaged or absent is named."""

from __future__ import annotations

import bz2
import codecs
import gzip
import json
import lzma
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from texts import END, optimized, stored_sequences, texts_of, write_jsonl

from lightning_lighthouse import LighthouseWarning
from lightning_lighthouse.data.manifest import Manifest
from lightning_lighthouse.data.preparing.prepare import prepare
from lightning_lighthouse.data.preparing.sources import find_files, read_documents
from lightning_lighthouse.data.tokenizers import load_tokenizer


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


def test_files_of_unknown_kind_are_told_of_or_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.log").write_text("b")
    with pytest.warns(LighthouseWarning, match=r"1 of 2 files are left out, their kind is unknown \(first: b\.log\)"):
        assert find_files(str(tmp_path)) == [tmp_path / "a.txt"]
    documents = read_documents(find_files(str(tmp_path / "**" / "*")), "text")
    assert [document.text for document in documents] == [b"a", b"b"]
    (tmp_path / "a.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no file of a known kind \(\.txt, .*name other text files by"):
        find_files(str(tmp_path))
    (tmp_path / "c.tar").write_bytes(b"c\0c")
    with pytest.raises(ValueError, match=r"c\.tar is binary, not text"):
        list(read_documents(find_files(str(tmp_path / "c.tar")), "text"))


def test_a_path_with_the_characters_of_a_pattern_is_a_path(tmp_path: Path) -> None:
    folder = tmp_path / "books [en]*?"
    (folder / "sub [1]").mkdir(parents=True)
    (tmp_path / "books e").mkdir()
    files = [folder / "[a]*.txt", folder / "b.txt", folder / "sub [1]" / "a.txt"]
    for file in [*files, tmp_path / "books e" / "a.txt"]:
        file.write_text(file.name)
    assert find_files(str(folder)) == files
    assert find_files(str(files[0])) == files[:1]
    # in a pattern the folders that exist are names too
    assert find_files(f"{folder}/*.txt") == files[:2]
    assert find_files(f"{folder}/**/[ab].txt") == files[1:]
    assert find_files(str(tmp_path / "books [e]" / "*.txt")) == [tmp_path / "books e" / "a.txt"]
    with pytest.raises(FileNotFoundError, match="must be a file, a folder or a glob pattern"):
        find_files(f"{folder}/*.md")


def test_a_relative_pattern_gives_relative_files(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    Path("[x]").mkdir()
    Path("[x]/a.txt").write_text("a")
    for pattern in ("[x]/*.txt", "./[x]/*.txt", "**/*.txt", "[[]x]/a*"):
        assert find_files(pattern) == [Path("[x]/a.txt")]


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


@pytest.mark.parametrize("name", ["a.parquet", "A.PARQUET"])
def test_parquet(tmp_path: Path, name: str) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="the pyarrow package is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / name
    parquet.write_table(pyarrow.table({"body": texts_of(131), "id": range(131)}), path, row_group_size=37)
    documents = list(read_documents([path], "body"))
    assert [document.text.decode() for document in documents] == texts_of(131)
    assert sum(document.bytes_read for document in documents) == path.stat().st_size
    with pytest.raises(ValueError, match=rf"{name} has no column 'text', found body, id; set text_field"):
        list(read_documents([path], "text"))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=rf"{name} is damaged or no Parquet file"):
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


BAD_LINES = [
    ('{"text": "a"}\n{"text": \n', r"a\.jsonl, line 2 is not JSON"),
    ('{"text": "a"}\n\n{"body": "b"}\n', r"a\.jsonl, line 3 has no text in field 'text', found body; set text_field$"),
    ('{"text": 7}\n', r"a\.jsonl, line 1 has no text in field 'text', found text; set text_field$"),
    ('["a"]\n', r"a\.jsonl, line 1 has no text in field 'text', found list; set text_field$"),
    ('{"text": "\\ud800"}\n', r"a\.jsonl, line 1 holds half a surrogate pair"),
    ("[" * 10**5 + "\n", r"a\.jsonl, line 1 is nested too deeply$"),
]


@pytest.mark.parametrize(("lines", "message"), BAD_LINES, ids=["cut", "field", "number", "list", "surrogate", "nested"])
def test_a_bad_line_is_named_and_nothing_is_left_behind(tmp_path: Path, lines: str, message: str) -> None:
    good = json.dumps({"text": "x" * 5000}) + "\n"
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text(lines + good)
    with pytest.raises(ValueError, match=message):
        prepare(str(tmp_path / "new" / "out"), seq_len=7, source=str(tmp_path / "in"))
    assert list((tmp_path / "new").iterdir()) == []


def save_as_datasets_does(folder: Path, texts: list[str], num_files: int = 2) -> None:
    """A folder as Hugging Face's `Dataset.save_to_disk` leaves it, with a file that its record does not name."""
    pyarrow = pytest.importorskip("pyarrow", reason="the pyarrow package is not installed")
    folder.mkdir(parents=True)
    table = pyarrow.table({"text": texts, "id": range(len(texts))})
    names = [f"data-{i:05d}-of-{num_files:05d}.arrow" for i in range(num_files)]
    size = -(-len(texts) // num_files)
    for i, name in enumerate(names):
        with pyarrow.OSFile(str(folder / name), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table.slice(i * size, size), max_chunksize=71)
    # the order of the rows is that of the record
    names = names[::-1]
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")
    (folder / "cache-4711.arrow").write_bytes(b"of another program")


def test_a_saved_data_set(tmp_path: Path) -> None:
    texts = texts_of(401)
    save_as_datasets_does(tmp_path / "saved", texts)
    files = find_files(str(tmp_path / "saved"))
    documents = list(read_documents(files, "text"))
    half = -(-401 // 2)
    assert [document.text.decode() for document in documents] == texts[half:] + texts[:half]
    assert documents[0].origin.endswith("data-00001-of-00002.arrow, row 1")
    # the progress bar neither stops short nor runs on
    size = sum(file.stat().st_size for file in files)
    assert 0.8 * size < sum(document.bytes_read for document in documents) < 1.2 * size
    with pytest.raises(ValueError, match=r"00001-of-00002\.arrow has no column 'body', found text, id; set text_field"):
        list(read_documents(files, "body"))


def test_an_arrow_file_with_a_table_of_contents(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="the pyarrow package is not installed")
    table = pyarrow.table({"text": texts_of(131)})
    with pyarrow.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pyarrow.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    documents = read_documents(find_files(str(tmp_path)), "text")
    assert [document.text.decode() for document in documents] == texts_of(131)


@pytest.mark.parametrize("cut", [1, 8, 9, 5000, 10**9])
def test_a_saved_data_set_that_is_cut_short_is_named(tmp_path: Path, cut: int) -> None:
    save_as_datasets_does(tmp_path / "saved", texts_of(401))
    file = tmp_path / "saved" / "data-00000-of-00002.arrow"
    file.write_bytes(file.read_bytes()[:-cut])
    with pytest.raises(ValueError, match=r"data-00000-of-00002\.arrow is damaged"):
        list(read_documents(find_files(str(tmp_path / "saved")), "text"))
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"data-00000-of-00002\.arrow is missing, \S*state\.json names it"):
        find_files(str(tmp_path / "saved"))


def test_the_splits_of_saved_data_sets_are_named(tmp_path: Path) -> None:
    for split in ("train", "test"):
        save_as_datasets_does(tmp_path / "saved" / split, texts_of(31))
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(ValueError, match=r"saved holds several splits, choose one: \S*saved/train or \S*saved/test$"):
        find_files(str(tmp_path / "saved"))
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["tr')
    with pytest.raises(ValueError, match=r"dataset_dict\.json is cut short or altered"):
        find_files(str(tmp_path / "saved"))


MALFORMED = [
    ("state.json", '{"_data_files": [{}]}', "_data_files is no list of filenames"),
    ("state.json", '{"_data_files": null}', "_data_files is no list of filenames"),
    ("state.json", '{"_data_files": [{"filename": 7}]}', "_data_files is no list of filenames"),
    ("state.json", "[" * 10**5, "maximum recursion depth exceeded"),
    ("dataset_dict.json", "[]", "splits is no list of names"),
    ("dataset_dict.json", '{"splits": 7}', "splits is no list of names"),
    (
        "index.json",
        '{"chunks": null, "config": {"data_format": ["no_header_numpy:5"]}}',
        "litdata wrote no such chunks",
    ),
    (
        "index.json",
        '{"chunks": [{}], "config": {"data_format": ["no_header_numpy:5"]}}',
        "litdata wrote no such chunks",
    ),
    ("index.json", '{"chunks": [], "config": null}', "litdata wrote no such chunks or config"),
    ("index.json", '{"chunks": [], "config": {"data_format": ["no_header_numpy:x"]}}', "litdata wrote no such chunks"),
    ("index.json", "[" * 10**5, "maximum recursion depth exceeded"),
]


@pytest.mark.parametrize(("name", "record", "message"), MALFORMED, ids=[f"{n}-{r[:40]}" for n, r, _ in MALFORMED])
def test_a_malformed_record_is_named(tmp_path: Path, name: str, record: str, message: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("x" * 99)
    (tmp_path / "in" / name).write_text(record)
    with pytest.raises(ValueError, match=rf"^\S*in/{re.escape(name)} is cut short or altered: {message}"):
        prepare(str(tmp_path / "out"), seq_len=7, source=str(tmp_path / "in"))


def test_a_text_folder_may_have_such_names_too(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    for name in ("state.json", "index.json"):
        (tmp_path / name).write_text('{"state": "solid"}')
    manifest = prepare(str(tmp_path / "out"), seq_len=1, source=str(tmp_path), validation_fraction=0)
    assert manifest.train.documents == 1


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint16, torch.int64], ids=str)
@pytest.mark.parametrize("ended", [True, False], ids=["ended", "not-ended"])
def test_a_litdata_folder_gives_the_documents_that_were_put_in(tmp_path: Path, dtype: Any, ended: bool) -> None:
    texts = texts_of(53)
    source = str(write_jsonl(tmp_path / "text.jsonl", texts))
    optimized(tmp_path / "optimized", [[*text.encode(), *([END] * ended)] for text in texts], dtype)
    assert len(list((tmp_path / "optimized").glob("*.bin"))) > 3
    for name, given in (("text", source), ("tokens", str(tmp_path / "optimized"))):
        prepare(str(tmp_path / name), seq_len=61, source=given)
    text, tokens = (Manifest.load(tmp_path / name) for name in ("text", "tokens"))
    assert (text.sha256, text.train, text.validation) == (tokens.sha256, tokens.train, tokens.validation)


def test_an_item_of_several_documents_is_split_at_their_ends(tmp_path: Path) -> None:
    optimized(tmp_path / "optimized", [[1, 2, END, 3, END, END, 4], [], [5]])
    manifest = prepare(
        str(tmp_path / "out"), seq_len=1, source=str(tmp_path / "optimized"), validation_fraction=0, documents="pack"
    )
    assert manifest.train.documents == 4
    assert stored_sequences(tmp_path / "out").ravel().tolist() == [1, 2, END, 3, END, 4, END, 5]
    assert manifest.train.dropped_tokens == 1


def test_tokens_of_another_tokenizer_are_refused(tmp_path: Path, tokenizer_file: str) -> None:
    tokenizer = load_tokenizer(tokenizer_file)
    items = [tokenizer.encode(text.encode()).tolist() for text in texts_of(53)]
    optimized(tmp_path / "optimized", items)
    arguments: dict[str, Any] = {"seq_len": 61, "source": str(tmp_path / "optimized")}
    with pytest.raises(
        ValueError, match=r"chunk-0-0\.bin holds token \d+, the tokenizer has 257: set tokenizer to the one that made"
    ):
        prepare(str(tmp_path / "out"), **arguments)
    manifest = prepare(str(tmp_path / "out"), tokenizer=tokenizer_file, **arguments)
    assert manifest.train.tokens + manifest.validation.tokens == sum(map(len, items))
    # how many bytes the tokens stood for is not known
    assert manifest.bytes_per_token is None
    assert "bytes per token" not in manifest.report()


def test_a_damaged_or_unfit_litdata_folder_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "optimized"
    optimized(folder, [[*text.encode(), END] for text in texts_of(53)])
    chunk, index = folder / "chunk-0-3.bin", folder / "index.json"
    whole = chunk.read_bytes()
    for damaged in (whole[:-1], whole[:20], b"", b"\xff" + whole[1:]):
        chunk.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"chunk-0-3\.bin is damaged or cut short"):
            prepare(str(tmp_path / "out"), seq_len=61, source=str(folder))
    chunk.unlink()
    with pytest.raises(FileNotFoundError, match=r"chunk-0-3\.bin is missing, \S*index\.json names it"):
        prepare(str(tmp_path / "out"), seq_len=61, source=str(folder))
    content = index.read_text()
    stored = re.search('"no_header_tensor:[0-9]+"', content)
    assert stored
    for old, new, kind in (
        (stored[0], '"str"', r"data of the format \['str'\], not of plain tokens; give the text instead"),
        ('"compression": null', '"compression": "zstd"', "compressed or encrypted data, not of plain tokens"),
        (stored[0], '"no_header_tensor:0"', "float32, not of tokens; give the text instead"),
    ):
        assert old in content
        index.write_text(content.replace(old, new))
        with pytest.raises(ValueError, match=rf"^source \S*optimized is a litdata folder of {kind}"):
            prepare(str(tmp_path / "out"), seq_len=61, source=str(folder))
    index.write_text(content[:50])
    with pytest.raises(ValueError, match=r"index\.json is cut short or altered"):
        prepare(str(tmp_path / "out"), seq_len=61, source=str(folder))
    prepare(str(tmp_path / "out"), seq_len=61)
    with pytest.raises(ValueError, match=r"source \S*out/train is part of the prepared folder \S*out; give that one"):
        prepare(str(tmp_path / "other"), seq_len=61, source=str(tmp_path / "out" / "train"))


RECORDS = "".join(json.dumps({"id": i, "text": f"document {i}"}) + "\n" for i in range(3)).encode()
TEXTS = [b"document 0", b"document 1", b"document 2"]


def texts(source: Path) -> list[bytes]:
    return [document.text for document in read_documents(find_files(str(source)), "text") if document.text]


@pytest.mark.parametrize(
    "name", ["a.ndjson", "a.jsonlines", "a.JSONL", "a.json", "a.txt", "a.log", "a.json.gz", "a.jsonl.bz2", "a.JSON.xz"]
)
def test_json_lines_are_known_by_their_content(tmp_path: Path, name: str) -> None:
    packed = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}.get(Path(name).suffix, bytes)
    (tmp_path / name).write_bytes(packed(RECORDS))
    assert texts(tmp_path / name) == TEXTS
    (tmp_path / name).write_bytes(packed(codecs.BOM_UTF8 + RECORDS.replace(b"\n", b"\r\n")))
    assert texts(tmp_path / name) == TEXTS


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("a.csv", b"id,text\n0,a\n", "a.csv is CSV, which is not read: convert it to JSON lines or Parquet"),
        ("a.TSV.gz", gzip.compress(b"id\ttext\n", mtime=0), "a.TSV.gz is tab-separated values, which is not read"),
        ("a.json", b'[{"text": "a"}]', "a.json is JSON, but not one object a line: convert it to JSON lines"),
        ("a.json", b'{\n "text": "a"\n}\n', "a.json is JSON, but not one object a line"),
        ("a.txt", codecs.BOM_UTF16_LE + b"a\0b", "a.txt begins with the mark of utf-16 and is not"),
        ("a.jsonl.xz", lzma.compress(RECORDS)[:-9], "a.jsonl.xz is damaged or cut short"),
        ("a.jsonl.bz2", RECORDS, "a.jsonl.bz2 is damaged or cut short: Invalid data stream"),
        ("a.jsonl.gz", RECORDS, "a.jsonl.gz is damaged or cut short: Not a gzipped file"),
    ],
)
def test_what_is_structured_and_not_understood_is_refused(tmp_path: Path, name: str, content: bytes, line: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(line)):
        texts(tmp_path / name)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.txt").write_text("caf\u00e9", encoding=encoding)
    assert texts(tmp_path) == ["caf\u00e9".encode()]


def test_programs_are_text_whatever_they_begin_with(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_bytes(RECORDS)
    assert texts(tmp_path) == [RECORDS]


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    corpus, elsewhere = tmp_path / "corpus", tmp_path / "elsewhere"
    (corpus / "own").mkdir(parents=True)
    elsewhere.mkdir()
    (corpus / "own" / "a.txt").write_text("a")
    (elsewhere / "b.txt").write_text("b")
    (corpus / "linked").symlink_to(elsewhere)
    # and one that leads back
    (elsewhere / "again").symlink_to(corpus)
    assert texts(corpus) == [b"b", b"a"]


def test_null_is_left_out_and_told(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n{"text": null}\n{"text": "c"}\n')
    with pytest.warns(LighthouseWarning, match=r"a.jsonl, line 2: text is null: the document is left out"):
        assert texts(tmp_path) == [b"a", b"c"]


def test_no_message_quotes_a_megabyte(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"x" * 2**20: 1, "text": 5}) + "\n")
    with pytest.raises(ValueError, match=r"line 1 has no text in field 'text', found x+\.\.\. ") as error:
        texts(tmp_path)
    assert len(str(error.value)) < 500
