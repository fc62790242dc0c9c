"""Chunks tokenized by several processes, in their order.

Each worker is a fresh Python that reads chunks from its standard input and writes results to its standard output:
no fork of a process with threads, and no demand on the caller's script to guard its main part. A worker has one chunk
at a time, so no pipe can fill up on both sides, and few wait, so memory stays bounded. A thread for each worker hands
it the next one. Knows processes; knows nothing about rows.

    python -m lora_cli.data.parallel     is a worker
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from queue import SimpleQueue
from types import TracebackType
from typing import IO, Self

import lora_cli
from lora_cli.data.chunks import Chunk, ChunkTokenizer, Job
from lora_cli.data.tokenizing import PlacedRow
from lora_cli.errors import DataError

ROWS_WORTH_A_WORKER = 50_000
"""A worker's start takes a few seconds, in which one process does some 20,000 short rows."""
MOST_WORKERS = 32
_CHUNKS_AHEAD = 2


def workers_for(rows: int) -> int:
    """How many processes to tokenize with; 1 is this one alone, whose tokenizer has threads of its own.

    One core is left to this process, which reads the rows and keeps their account.
    """
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(cores - 1, rows // ROWS_WORTH_A_WORKER, MOST_WORKERS))


def tokenize_in_parallel(chunks: Iterable[list[PlacedRow]], job: Job, workers: int) -> Iterator[Chunk]:
    """The chunks, tokenized, in their order.

    Raises:
        DataError: the first row that can't be used as it is.
    """
    with ExitStack() as stack:
        threads = stack.enter_context(ThreadPoolExecutor(workers))
        idle: SimpleQueue[_Worker] = SimpleQueue()
        for _ in range(workers):
            idle.put(stack.enter_context(_Worker(job)))

        def tokenized(chunk: list[PlacedRow]) -> Chunk:
            worker = idle.get()
            try:
                return worker.tokenize(chunk)
            finally:
                idle.put(worker)

        under_way: deque[Future[Chunk]] = deque()
        # Whoever stops early leaves chunks behind that nobody is to begin.
        stack.callback(lambda: [chunk.cancel() for chunk in under_way])
        for chunk in chunks:
            under_way.append(threads.submit(tokenized, chunk))
            if len(under_way) > _CHUNKS_AHEAD * workers:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()


class _Worker:
    """One process that does a job."""

    def __init__(self, job: Job) -> None:
        package = os.path.dirname(os.path.dirname(lora_cli.__file__))
        path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
        # The tokenizer's own threads would only be in the way of the other workers.
        environment = {**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "lora_cli.data.parallel"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        self._job = job
        self._started = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def tokenize(self, chunk: list[PlacedRow]) -> Chunk:
        assert self._process.stdin is not None and self._process.stdout is not None
        if not self._started:
            self._started = True
            _send(self._process.stdin, self._job)
        _send(self._process.stdin, chunk)
        try:
            result: Chunk | tuple[str, str | None] = pickle.load(self._process.stdout)
        except EOFError as error:
            code = self._process.wait()
            raise DataError(
                f"a process that tokenized rows ended with {code}",
                remedy="It may have been out of memory; its own message stands above, if it had one.",
            ) from error
        if isinstance(result, Chunk):
            return result
        message, remedy = result
        raise DataError(message, remedy=remedy)


def _send(stream: IO[bytes], value: object) -> None:
    try:
        pickle.dump(value, stream, protocol=pickle.HIGHEST_PROTOCOL)
        stream.flush()
    except BrokenPipeError:
        pass  # the worker has ended, and `result` will say so


def _work() -> None:
    """Do the job that stands on standard input, chunk by chunk, until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not come among the results
    tokenizer = ChunkTokenizer(pickle.load(sys.stdin.buffer))
    while True:
        try:
            chunk = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            _send(results, tokenizer.tokenize(chunk))
        except DataError as error:
            _send(results, (error.message, error.remedy))


if __name__ == "__main__":
    _work()
