"""What a prepared folder says about itself, and whether it still holds.

`manifest.json` records the settings, the counts, size and sha256 of every file, and a digest of these records. `check`
compares sizes and takes milliseconds: it runs before each training. `verify` hashes everything again; it is a command.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from lightning_lighthouse.bars import progress_bar
from lightning_lighthouse.checks import quoted
from lightning_lighthouse.data.manifest import INDEX, FileRecord, Manifest


def record_files(folder: Path) -> dict[str, FileRecord]:
    """Size and sha256 of all files beneath `folder`, by path."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): FileRecord(path.stat().st_size, sha256_of_file(path)) for path in paths
    }


def sha256_of_file(path: Path) -> str:
    """Hash of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check(folder: Path) -> Manifest:
    """Compare file sizes and the small index files with the manifest: milliseconds, whatever the amount of data.

    Returns:
        The manifest.

    Raises:
        FileNotFoundError: The manifest or a file is missing.
        ValueError: A file has another size, or an index another content.
    """
    manifest = Manifest.load(folder)
    for name, record in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing, expected {record.bytes:,} bytes; {_fix(folder)}")
        size = path.stat().st_size
        if size != record.bytes:
            raise ValueError(f"{path} has {size:,} bytes, expected {record.bytes:,}; {_fix(folder)}")
        if path.name == INDEX:
            if sha256_of_file(path) != record.sha256:
                raise ValueError(f"{path} is not the index that was prepared; {_fix(folder)}")
            _check_chunks(path, manifest)
    return manifest


def verify(folder: Path) -> Iterator[str]:
    """Hash every file again.

    Returns:
        One line for each file that is missing or altered, while it runs; none if all is well.

    Raises:
        FileNotFoundError: There is no manifest.
        ValueError: The manifest is damaged.
    """
    files = Manifest.load(folder).files
    with progress_bar("Verifying", sum(record.bytes for record in files.values())) as bar:
        for name, record in files.items():
            path = folder / name
            if not path.is_file():
                yield f"{path} is missing"
            elif path.stat().st_size != record.bytes:
                yield f"{path} has {path.stat().st_size:,} bytes, expected {record.bytes:,}"
            elif (found := sha256_of_file(path)) != record.sha256:
                yield f"{path} has sha256 {found}, expected {record.sha256}"
            bar.update(record.bytes)


def _check_chunks(index: Path, manifest: Manifest) -> None:
    """Refuse an index that names other files than the manifest: litdata opens whatever stands there."""
    split = index.parent.name
    for chunk in json.loads(index.read_bytes())["chunks"]:
        if f"{split}/{chunk['filename']}" not in manifest.files:
            raise ValueError(f"{index} names the file {quoted(chunk['filename'])}, which was not prepared")


def _fix(folder: Path) -> str:
    return f"copy it again, or prepare it again with --overwrite (lighthouse verify {folder} names every bad file)"
