"""The cells of an experiment, measured one behind the other or spread over processes."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import active_children, get_context
from typing import Any, Protocol

from cupaged.bench.partial import Row
from cupaged.bench.report import measured_row

__all__ = ["Measuring", "each_measured"]


class Measuring(Protocol):
    """What of a `cupaged.bench.experiment.Experiment` measures its cells."""

    options: argparse.Namespace
    failures: tuple[type[Exception], ...]

    def rows(self, cell: Any) -> list[Row]:
        """Measure a cell, and return its rows."""

    def what(self, cell: Any) -> Row:
        """Return what tells a cell's row apart."""


def each_measured(experiment: Measuring, cells: list[tuple[int, Any]]) -> Iterator[tuple[int, list[Row]]]:
    """Yield the rows of each cell with its number, as they are done."""
    workers = min(experiment.options.workers, len(cells))
    if workers < 2:
        for number, cell in cells:
            yield number, rows_of(experiment, cell)
        return
    others = active_children()
    # spawned, not forked: threads of this process may hold locks
    with ProcessPoolExecutor(workers, get_context("spawn"), _begin_worker, (experiment,)) as pool:
        jobs = [pool.submit(_work, number, cell) for number, cell in cells]
        try:
            for job in as_completed(jobs):
                yield job.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in active_children():
                if process not in others:
                    process.terminate()
            raise


def rows_of(experiment: Measuring, cell: Any) -> list[Row]:
    """Return a cell's rows; one that failed, if what its rows share could not be made."""
    try:
        return experiment.rows(cell)
    except experiment.failures as error:
        reason = error

    def fail() -> Row:
        raise reason

    return [measured_row(experiment.what(cell), fail, experiment.failures)]


_in_worker: Measuring


def _begin_worker(experiment: Measuring) -> None:
    """Keep the experiment for the cells that come; Ctrl-C is for the process that spreads them."""
    global _in_worker
    _in_worker = experiment
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _work(number: int, cell: Any) -> tuple[int, list[Row]]:
    return number, rows_of(_in_worker, cell)
