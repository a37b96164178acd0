"""Documents to token arrays, in this process or in several, always in the order of the documents."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lightning_lighthouse.bars import progress_bar
from lightning_lighthouse.data.preparing.sources import Document, find_files, read_documents
from lightning_lighthouse.data.preparing.token_folder import is_token_folder, read_token_documents, token_files
from lightning_lighthouse.data.tokenizers import ByteTokenizer, Tokenizer
from lightning_lighthouse.data.workers import leave_signals_to, worker_context

# Text that one task hands to a tokenizing process: enough to hide what the hand-over costs
TASK_BYTES = 2**20

# Bytes of a document's text, and its tokens
Tokenized = tuple[int, np.ndarray]


class Processes(NamedTuple):
    """The processes that tokenize, shared by all sources.

    Args:
        executor: Runs tasks in them; None tokenizes in this process.
        num_workers: How many there are.
    """

    executor: ProcessPoolExecutor | None
    num_workers: int


@contextmanager
def start_processes(tokenizer: Tokenizer, num_workers: int) -> Iterator[Processes]:
    """Processes that tokenize with `tokenizer`, none with 0 workers; they end with the context."""
    # byte tokens cost less to make than to hand from process to process
    if num_workers == 0 or isinstance(tokenizer, ByteTokenizer):
        yield Processes(None, 0)
        return
    executor = ProcessPoolExecutor(
        num_workers, mp_context=worker_context(), initializer=_start_process, initargs=(tokenizer, os.getpid())
    )
    others = set(multiprocessing.active_children())
    try:
        yield Processes(executor, num_workers)
    except BaseException:
        # what they are at is of no use any more
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
        raise
    finally:
        executor.shutdown(cancel_futures=True)


def tokenize(source: str | None, text_field: str, tokenizer: Tokenizer, processes: Processes) -> Iterator[Tokenized]:
    """Tokenize the documents of a source that are not empty.

    Args:
        source: As `find_files` takes it.
        text_field: Field of JSONL and tables that holds the text.
        tokenizer: What makes the tokens.
        processes: From `start_processes`.

    Returns:
        For each document the bytes of its text, and its tokens `[n]`. Where the source holds tokens of an unknown
        text, the bytes are 0.
    """
    if source is not None and is_token_folder(Path(source)):
        return _stored_tokens(Path(source), tokenizer)
    documents = _documents(source, text_field)
    if processes.executor is None:
        return (_encode(tokenizer, document) for document in documents)
    return _tokenize_parallel(documents, processes.executor, processes.num_workers)


def _documents(source: str | None, text_field: str) -> Iterator[Document]:
    """All documents that are not empty, under a progress bar of the bytes on disk."""
    files = find_files(source)
    with progress_bar("Preparing", sum(file.stat().st_size for file in files)) as bar:
        for document in read_documents(files, text_field):
            if document.text:
                yield document
            bar.update(document.bytes_read)


def _stored_tokens(folder: Path, tokenizer: Tokenizer) -> Iterator[Tokenized]:
    """All documents of a litdata folder that are not empty."""
    with progress_bar("Preparing", sum(file.stat().st_size for file in token_files(folder))) as bar:
        for tokens, bytes_read in read_token_documents(folder, tokenizer):
            if tokens.size:
                yield tokens.size - 1 if isinstance(tokenizer, ByteTokenizer) else 0, tokens
            bar.update(bytes_read)


def _encode(tokenizer: Tokenizer, document: Document) -> Tokenized:
    try:
        return len(document.text), tokenizer.encode(document.text)
    except ValueError as error:
        raise ValueError(f"{document.origin}: {error}") from None


# The tokenizer of a tokenizing process, set once when it starts
_process_tokenizer: Tokenizer


def _start_process(tokenizer: Tokenizer, parent: int) -> None:
    global _process_tokenizer
    leave_signals_to(parent)
    _process_tokenizer = tokenizer


def _run_task(documents: list[Document]) -> list[Tokenized]:
    return [_encode(_process_tokenizer, document) for document in documents]


def _tokenize_parallel(documents: Iterator[Document], executor: Executor, count: int) -> Iterator[Tokenized]:
    pending: deque[Future[list[Tokenized]]] = deque()
    try:
        for task in _tasks(documents):
            pending.append(executor.submit(_run_task, task))
            # twice as many tasks as processes keep them busy and memory small
            if len(pending) > 2 * count:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    except BrokenExecutor:
        raise ChildProcessError(
            f"one of {count} tokenizing processes died, most likely for lack of memory; lower num_workers"
        ) from None
    finally:
        for future in pending:
            future.cancel()


def _tasks(documents: Iterator[Document]) -> Iterator[list[Document]]:
    task: list[Document] = []
    size = 0
    for document in documents:
        task.append(document)
        size += len(document.text)
        if size >= TASK_BYTES:
            yield task
            task, size = [], 0
    if task:
        yield task
