"""How fast text is prepared and sequences are read on this machine: the numbers of docs/use/data.md.

    python experiments/data_speed.py prepare books.jsonl.gz    at least 200 MB of text, repeated until there is as much
    python experiments/data_speed.py read data/books-98k
    python experiments/data_speed.py stream data/books-98k --minutes 10

`prepare` counts the CPU time of preparing, without start-up. `read` counts byte tokens of one worker over at least two
seconds. `stream` reads epoch after epoch and prints the memory of the process and its worker each 30 seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from lightning_lighthouse import LighthouseRecipe
from lightning_lighthouse.data.manifest import Manifest
from lightning_lighthouse.data.preparing.prepare import prepare
from lightning_lighthouse.data.preparing.sources import find_files, read_documents

MB = 1e6
# Batches at both ends of an epoch that are not measured
EDGE = 50


def measure_prepare(source: str, megabytes: int, seq_len: int, documents: str) -> None:
    """Print MB of text a second of CPU time."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "text.jsonl")
        size = 0
        with path.open("w") as file:
            while size < megabytes * MB:
                for document in read_documents(find_files(source), "text"):
                    file.write(json.dumps({"text": document.text.decode()}) + "\n")
                    size += len(document.text)
        # litdata and its imports are start-up
        prepare(str(Path(folder, "warm-up")), seq_len=64, source=__file__, validation_fraction=0)
        cpu, wall = time.process_time(), time.perf_counter()
        manifest = prepare(str(Path(folder, "out")), seq_len=seq_len, source=str(path), documents=documents)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        text = (manifest.train.text_bytes + manifest.validation.text_bytes) / MB
        print(f"{text:.0f} MB of text in {cpu:.2f} s of CPU time, {wall:.2f} s: {text / cpu:.1f} MB/s of one core")


def open_loader(folder: str, document_ids: bool, num_workers: int) -> Any:
    """The training batches of a prepared folder, one sequence each."""
    settings = Manifest.load(Path(folder)).settings
    data = LighthouseRecipe(settings.seq_len, source=folder, document_ids=document_ids, num_workers=num_workers)
    data.setup("fit")
    return data.train_dataloader()


def cpu_seconds(pid: int) -> float:
    """CPU time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def children_of(pid: int) -> list[int]:
    """The processes that a process started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def measure_read(folder: str, num_workers: int, seconds: float) -> None:
    """Print byte tokens a second of wall time, and of the CPU time of the worker and of the process that trains."""
    for document_ids in (False, True):
        loader = open_loader(folder, document_ids, num_workers)
        tokens, wall = 0, 0.0
        cpu = [0.0] * (1 + num_workers)
        while wall < seconds:
            # the first batches of an epoch pay for the start of its worker, the last ones were read ahead
            for number, batch in enumerate(loader):
                if number in (EDGE, len(loader) - EDGE):
                    sign = -1 if number == EDGE else 1
                    wall += sign * time.perf_counter()
                    for i, process in enumerate([os.getpid(), *children_of(os.getpid())]):
                        cpu[i] += sign * cpu_seconds(process)
                if EDGE < number <= len(loader) - EDGE:
                    tokens += batch["tokens"].numel()
        rates = [f"{tokens / wall / MB:.0f} M tokens/s of wall time"]
        for used, process in zip(cpu, ["here", *(["of a worker"] * num_workers)], strict=True):
            rates.append(f"{tokens / used / MB:.0f} of CPU time {process}")
        print(f"document_ids={document_ids}:", ", ".join(rates))


def resident(pid: int) -> float:
    """Memory of a process and its children, in MB."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    # what is mapped from a file belongs to the system's cache
    own = int(status["RssAnon"].split()[0]) * 1024 / MB
    return own + sum(resident(child) for child in children_of(pid))


def measure_stream(folder: str, num_workers: int, minutes: float) -> None:
    """Print the memory, and how much was read by then."""
    begin = shown = time.perf_counter()
    tokens = 0
    loader = open_loader(folder, True, num_workers)
    for batch in (batch for _ in range(10**9) for batch in loader):
        tokens += batch["tokens"].numel()
        now = time.perf_counter()
        if now - shown > 30:
            shown = now
            memory = resident(os.getpid())
            print(f"{(now - begin) / 60:5.1f} min  {tokens / 1e9:7.2f} G tokens  {memory:7.1f} MB", flush=True)
        if now - begin > minutes * 60:
            return


def main() -> None:
    """Run one of the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("prepare", "read", "stream"))
    parser.add_argument("path", help="text to prepare, or a prepared folder")
    parser.add_argument("--seq_len", type=int, default=98304)
    parser.add_argument("--megabytes", type=int, default=200, help="text to prepare")
    parser.add_argument("--documents", default="pack")
    parser.add_argument("--num_workers", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20, help="of reading")
    parser.add_argument("--minutes", type=float, default=10, help="of streaming")
    asked = parser.parse_args()
    if asked.what == "prepare":
        measure_prepare(asked.path, asked.megabytes, asked.seq_len, asked.documents)
    elif asked.what == "read":
        measure_read(asked.path, asked.num_workers, asked.seconds)
    else:
        measure_stream(asked.path, asked.num_workers, asked.minutes)


if __name__ == "__main__":
    main()
