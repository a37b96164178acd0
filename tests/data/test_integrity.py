"""The manifest: what is missing, cut or altered is found, and named in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lightning_lighthouse.cli.verify import main
from lightning_lighthouse.data.integrity import check, verify
from lightning_lighthouse.data.manifest import Manifest
from lightning_lighthouse.data.preparing import packing
from lightning_lighthouse.data.preparing.prepare import prepare

SEQ_LEN = 61


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with several chunks."""
    folder = tmp_path_factory.mktemp("prepared")
    for i in range(47):
        (folder / f"{i:02d}.txt").write_text(f"document {i} " * 53)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "CHUNK_BYTES", 101 * (SEQ_LEN + 1))
        prepare(str(folder / "out"), seq_len=SEQ_LEN, source=str(folder))
    return folder / "out"


@pytest.fixture
def folder(prepared: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(prepared, tmp_path / "out"))


def test_an_untouched_folder_passes(folder: Path, capsys: Any) -> None:
    assert check(folder) == Manifest.load(folder)
    assert list(verify(folder)) == []
    assert main([str(folder)]) == 0
    assert f"sha256 {Manifest.load(folder).sha256}" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["train/chunk-0-1.bin", "train/index.json", "validation/chunk-0-0.bin"])
def test_a_missing_or_cut_file_is_found_before_training(folder: Path, name: str) -> None:
    path = folder / name
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"out/{name} has {size - 1:,} bytes, expected {size:,}; copy it again, or"):
        check(folder)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=rf"out/{name} is missing, expected {size:,} bytes; copy it again, or"):
        check(folder)


def test_an_altered_index_is_found_before_training(folder: Path) -> None:
    path = folder / "train" / "index.json"
    path.write_text(path.read_text().replace("chunk-0-1.bin", "chunk-0-2.bin"))
    with pytest.raises(ValueError, match=r"train/index\.json is not the index that was prepared"):
        check(folder)


def test_a_damaged_manifest_is_one_line(folder: Path) -> None:
    path = folder / "manifest.json"
    whole = path.read_text()
    fields = json.loads(whole)
    altered = json.dumps({**fields, "sha256": "0" * 64})
    elsewhere = {**fields, "files": {**fields["files"], "../index.json": {"bytes": 1, "sha256": ""}}}
    damaged = ["", "[]", "{}", whole[:100], altered, json.dumps(elsewhere), json.dumps({**fields, "format": 3})]
    for content in damaged:
        path.write_text(content)
        with pytest.raises(
            ValueError,
            match=r"^.*manifest\.json is cut short or altered \(.*\); prepare the data again, with --overwrite$",
        ):
            check(folder)
    path.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"out holds no manifest\.json: it was not prepared by lighthouse prepare"
    ):
        check(folder)


def damage(content: dict[str, Any], part: str | None, name: str, value: Any) -> dict[str, Any]:
    return {**content, part: {**content[part], name: value}} if part else {**content, name: value}


ALTERED = [
    (None, "end_of_document", 0),
    (None, "vocab_size", 65536),
    ("train", "sequences", 1),
    ("settings", "tokenizer", "sha256:0"),
]


@pytest.mark.parametrize(("part", "name", "value"), ALTERED, ids=[name for _, name, _ in ALTERED])
def test_no_part_of_the_manifest_may_change(folder: Path, capsys: Any, part: str | None, name: str, value: Any) -> None:
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(damage(content, part, name, value)))
    with pytest.raises(ValueError, match=r"manifest\.json is cut short or altered \(its content_sha256 does not fit"):
        check(folder)
    assert main([str(folder)]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    # another layout of the same content
    path.write_text(json.dumps(dict(reversed(content.items()))))
    assert main([str(folder)]) == 0


WRONG_TYPES = [
    ("train", "sequences", "x"),
    ("train", "tokens", None),
    ("settings", "seed", "x"),
    ("settings", "source", 7),
    (None, "vocab_size", 2.5),
    (None, "train", 7),
    (None, "files", {"train/index.json": {"bytes": "x", "sha256": ""}}),
    (None, "files", 7),
    (None, "sources", 7),
]


@pytest.mark.parametrize(("part", "name", "value"), WRONG_TYPES, ids=[f"{name}={v!r}" for _, name, v in WRONG_TYPES])
def test_a_wrong_type_is_one_line(folder: Path, capsys: Any, part: str | None, name: str, value: Any) -> None:
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    # as the folders of before were written
    del content["content_sha256"]
    path.write_text(json.dumps(content))
    assert main([str(folder)]) == 0
    path.write_text(json.dumps(damage(content, part, name, value)))
    capsys.readouterr()
    assert main([str(folder)]) == 1
    line = capsys.readouterr().err
    assert "manifest.json is cut short or altered (" in line
    assert line.count("\n") == 1


def test_verify_names_each_bad_file(folder: Path, capsys: Any) -> None:
    flipped, missing = folder / "train" / "chunk-0-2.bin", folder / "validation" / "chunk-0-0.bin"
    content = bytearray(flipped.read_bytes())
    content[-7] ^= 1
    flipped.write_bytes(content)
    # a flipped bit is not seen without hashing
    check(folder)
    missing.unlink()
    assert main([str(folder)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(f"lighthouse verify: {flipped} has sha256 ")
    assert lines[1] == f"lighthouse verify: {missing} is missing"


def test_verify_of_something_else(tmp_path: Path, capsys: Any) -> None:
    assert main([str(tmp_path)]) == 1
    assert capsys.readouterr().err == (
        f"lighthouse verify: {tmp_path} holds no manifest.json: it was not prepared by lighthouse prepare\n"
    )
    with pytest.raises(SystemExit) as end:
        main([])
    assert end.value.code == 2
    assert capsys.readouterr().err == "lighthouse verify: the following arguments are required: folder\n"


def test_fingerprint_follows_content_and_not_place(prepared: Path, folder: Path, tmp_path: Path) -> None:
    here = Manifest.load(folder)
    assert here.fingerprint == Manifest.load(prepared).fingerprint
    source = str(prepared.parent / "*.txt")
    longer = prepare(str(tmp_path / "longer"), seq_len=SEQ_LEN + 2, source=source)
    again = prepare(str(tmp_path / "again"), seq_len=SEQ_LEN, source=source)
    (tmp_path / "other.txt").write_text("another text " * 999)
    other = prepare(str(tmp_path / "other"), seq_len=SEQ_LEN, source=str(tmp_path / "other.txt"), validation_fraction=0)
    fingerprints = {manifest.fingerprint for manifest in (here, longer, again, other)}
    # chunks of another size hold the same tokens, but litdata shuffles them in another way
    assert len(fingerprints) == 4
