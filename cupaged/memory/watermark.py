"""Evict ahead of need: a background evictor that keeps blocks free, between a high and a low watermark.

An `allocate` that finds too few free blocks evicts on the spot, and its caller waits. The evictor does that work early:
when the share of blocks that are not free reaches the high mark, it evicts, a few blocks at a time, until the share is
down to the low mark or nothing is left that could go. What it costs is cached content that might have been used again.
"""

from __future__ import annotations

import math
import threading
import time
import warnings
from types import TracebackType
from typing import Any

from cupaged.errors import written
from cupaged.kinds import is_real
from cupaged.memory.allocator import whole_number
from cupaged.memory.manager import BlockManager

__all__ = ["WatermarkEvictor"]


class WatermarkEvictor:
    """Evicts a manager's cached GPU blocks between two watermarks.

    Call `step` from a loop of your own, or use it as a context manager, which runs a thread::

        with WatermarkEvictor(manager, high=0.9, low=0.8):
            serve(manager)

    Parameters
    ----------
    manager : BlockManager
        Whose blocks to keep free.
    high, low : float
        Shares of the pool that are not free, ``0 <= low < high <= 1``: eviction begins at `high` and ends at `low`.
    blocks_per_step : int
        The most that one step evicts; no operation of the manager waits longer than that takes.
    pause : float
        Seconds that the thread sleeps after each step. Without a pause it would take the lock again before a waiting
        thread is awake, and keep the interpreter for as long as that lets it, 5 ms by default.

    Attributes
    ----------
    error : BaseException or None
        What ended the thread early, an eviction policy of one's own for example. It is told by a warning at once, and
        raised by `stop`, and so at the end of a ``with`` block. Until then blocks are evicted when they are needed.
    """

    def __init__(
        self,
        manager: BlockManager,
        high: float = 0.9,
        low: float = 0.8,
        *,
        blocks_per_step: int = 128,
        pause: float = 1e-4,
    ) -> None:
        if not 0 <= low < high <= 1:
            raise ValueError(f"low and high must be shares with 0 <= low < high <= 1, got {low} and {high}")
        self.manager = manager
        self.blocks_per_step = whole_number("blocks_per_step", blocks_per_step, at_least=1)
        self.pause = _checked_pause(pause)
        num_blocks = manager.gpu.num_blocks
        self.start_below = math.floor((1 - high) * num_blocks + 1e-9) + 1
        """Eviction begins when fewer blocks than this are free."""
        self.stop_at = math.ceil((1 - low) * num_blocks - 1e-9)
        """Eviction ends when this many are free."""
        self.evicting = False
        self.error: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._stop = False

    def step(self) -> int:
        """Evict a few blocks if it is time to, and return how many; 0 means that there is nothing to do."""
        pool = self.manager.gpu
        with self.manager.lock:
            self.evicting = self.evicting or pool.num_free < self.start_below
            if not self.evicting:
                return 0
            evicted = self.manager.evict(max(0, min(self.blocks_per_step, self.stop_at - pool.num_free)))
            self.evicting = evicted > 0 and pool.num_free < self.stop_at
            return evicted

    def start(self) -> None:
        """Run in a thread, which sleeps until the pool runs short of free blocks."""
        if self._thread is not None:
            raise RuntimeError("the evictor runs already")
        if self.manager.gpu.pressure_mark:
            raise RuntimeError("manager must have one evictor that runs at most; another one runs already")
        self._stop, self.error = False, None
        self.manager.gpu.pressure_mark = self.start_below
        self.manager.gpu.pressure.set()
        self._thread = threading.Thread(target=self._run, name="cupaged watermark evictor", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread and wait until it has ended.

        Raises
        ------
        RuntimeError
            If it had ended before, from the error that ended it.
        """
        if self._thread is None:
            return
        self._stop = True
        self.manager.gpu.pressure_mark = 0
        self.manager.gpu.pressure.set()
        self._thread.join()
        self._thread = None
        if self.error is not None:
            raise RuntimeError(f"the background evictor had ended early: {self.error!r}") from self.error

    @property
    def running(self) -> bool:
        """Whether the thread runs."""
        return self._thread is not None and self._thread.is_alive()

    def __enter__(self) -> WatermarkEvictor:
        """Start the thread."""
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the thread; what ended it early is raised, or noted at an error that is on its way."""
        try:
            self.stop()
        except RuntimeError as ended:
            if error is None:
                raise
            error.add_note(str(ended))

    def _run(self) -> None:
        try:
            self._evict_until_stopped()
        except BaseException as error:
            self.error = error
            warnings.warn(
                f"the background evictor has ended, as a step raised {error!r}; who needs blocks evicts them now",
                RuntimeWarning,
                stacklevel=1,
            )

    def _evict_until_stopped(self) -> None:
        pressure = self.manager.gpu.pressure
        while not self._stop:
            pressure.wait()
            pressure.clear()
            while not self._stop and self.step():
                time.sleep(self.pause)


def _checked_pause(pause: Any) -> float:
    """Return a pause that a thread can sleep, in seconds, or raise by name."""
    if not is_real(pause):
        raise TypeError(f"pause must be a number of seconds, got {type(pause).__name__} {written(pause)}")
    try:
        seconds = float(pause)
    except OverflowError:  # a whole number or a fraction beyond all floats
        seconds = math.inf
    if not 0 <= seconds <= threading.TIMEOUT_MAX:
        raise ValueError(f"pause must lie in [0, {threading.TIMEOUT_MAX:g}] seconds, got {written(pause)}")
    return seconds
