"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial"


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file beside `path` to write; it takes the place of `path` where the block ends, and goes where it fails.

    A process killed meanwhile leaves the old file, and `path` with the ending `.partial`, which the next one writes
    over.

    Args:
        path: Local file; its folder is made if it is missing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + PARTIAL)
    try:
        yield partial
        with open(partial, "rb+") as file:
            # the name must not reach the disk before the bytes do
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
