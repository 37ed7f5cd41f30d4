"""From the reading order to batches, decoded by threads ahead of the step."""

import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from itertools import tee
from typing import Self

import torch

from recsys.data.batch import Batch, Part, build_batch
from recsys.data.features import AS_THEY_STAND, RowOrder
from recsys.data.order import Epoch, Window
from recsys.data.parquet import ParquetShards
from recsys.data.rows import Rows
from recsys.data.shuffling import Shuffle


class Loader:
    """Batches of one rank, epoch after epoch, read ahead in the background.

    Row groups are decoded by `reader_threads` threads, at most one window ahead of the one that batches are being made
    of, so two windows are in memory; batches are built `prefetch_batches` ahead of the step. What comes after the last
    batch of an epoch is read while that is being trained on. How many threads there are changes nothing that is read.

    Use as a context manager: leaving it stops the threads, at any point. Iterating yields the batches of one epoch,
    exactly `num_steps - first_step` of them; iterating again those of the next.

    Args:
        shards: what to read.
        epochs: the orders, one after another; drawn from the background thread, as late as can be.
        rank: whose batches.
        reader_threads: threads that decode.
        prefetch_batches: batches kept ready.
        pin_memory: build batches in page-locked memory.

    Attributes:
        wait_seconds: time the consumer spent waiting for batches, so far.
        counts: sum of the counts of the batches that the consumer has taken, so far.
    """

    def __init__(
        self,
        shards: ParquetShards,
        epochs: Iterable[Epoch],
        rank: int,
        *,
        reader_threads: int = 2,
        prefetch_batches: int = 4,
        pin_memory: bool = False,
    ) -> None:
        self._shards = shards
        self._epochs = epochs
        self._rank = rank
        self._reader_threads = reader_threads
        self._pin_memory = pin_memory
        self._gpu = torch.cuda.current_device() if pin_memory else None
        self._ready: queue.Queue[Batch | BaseException | None] = queue.Queue(prefetch_batches)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._produce, name="loader", daemon=True)
        self.wait_seconds = 0.0
        self.counts: Counter[tuple[str, str]] = Counter()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        with suppress(queue.Empty):  # so that the thread, if it waits for room, sees at once that it is to stop
            self._ready.get_nowait()
        self._thread.join()

    def __iter__(self) -> Iterator[Batch]:
        """The batches of the next epoch; those of the last must all have been taken.

        Raises:
            RuntimeError: the loader is not entered, or its epochs have ended.
        """
        if self._thread.ident is None:
            raise RuntimeError("a Loader yields batches while it is entered as a context manager")
        while True:
            start = time.perf_counter()
            item = self._ready.get()
            self.wait_seconds += time.perf_counter() - start
            if item is None:
                return
            if isinstance(item, BaseException):
                self._put(item)  # whoever asks again must not wait for ever
                raise item
            self.counts.update(item.counts)
            yield item

    def _produce(self) -> None:
        try:
            if self._gpu is not None:  # which is the first one in a new thread, whatever the process's is
                torch.cuda.set_device(self._gpu)
            with closing(self._batches()) as batches:
                for batch in batches:
                    if not self._put(batch):
                        return
            self._put(RuntimeError("the Loader's epochs have ended"))
        except BaseException as error:  # the consumer must see it, whatever it is, or it would wait for ever
            self._put(error)

    def _put(self, item: Batch | BaseException | None) -> bool:
        while not self._stopped.is_set():
            try:
                self._ready.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def _batches(self) -> Generator[Batch | None]:
        """Every epoch's batches, and None after each epoch."""
        to_read, to_deal = tee(self._epochs)
        windows = (piece.window for epoch in to_read for piece in epoch.pieces(self._rank))
        pool = ThreadPoolExecutor(self._reader_threads, thread_name_prefix="reader")
        try:
            decoded = self._decoded(windows, pool)
            for epoch in to_deal:
                yield from self._epoch_batches(epoch, decoded)
                yield None
        finally:
            pool.shutdown(cancel_futures=True)

    def _epoch_batches(self, epoch: Epoch, decoded: Iterator[list[Rows]]) -> Iterator[Batch]:
        held: deque[list[Rows]] = deque()
        first = 0  # number of the window that is held first
        for step, taken in enumerate(epoch.batches(self._rank), start=epoch.first_step):
            loss_scale = epoch.world_size / epoch.global_batch_rows(step)
            parts = []
            for part in taken:
                while part.window >= first + len(held):
                    held.append(next(decoded))
                parts.append(Part(held[part.window - first][part.slice], part.start, part.stop))
            yield build_batch(
                parts,
                self._shards.layout,
                len(self._shards.columns.dense),
                loss_scale=loss_scale,
                pin_memory=self._pin_memory,
            )
            while taken and first < taken[-1].window:
                held.popleft()
                first += 1

    def _decoded(self, windows: Iterator[Window], pool: ThreadPoolExecutor) -> Iterator[list[Rows]]:
        """The slices of each window, the next window always under way."""
        ahead: deque[list[Future[Rows]]] = deque()
        for window in windows:
            ahead.append([pool.submit(self._decode, window, index) for index in range(len(window.slices))])
            if len(ahead) > 1:
                yield [slice_.result() for slice_ in ahead.popleft()]
        while ahead:
            yield [slice_.result() for slice_ in ahead.popleft()]

    def _decode(self, window: Window, index: int) -> Rows:
        def order() -> RowOrder:
            permutation = window.permutation(index)
            return AS_THEY_STAND if permutation is None else Shuffle(permutation)

        return self._shards.read(window.slices[index], order)
