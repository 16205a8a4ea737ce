"""Time on the GPU: CUDA-graph replay, cold L2, median over repeats; and of the Python that launches."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import ceil
from threading import Event as Flag
from time import perf_counter
from typing import Any

import numpy as np

__all__ = [
    "Replay",
    "Timing",
    "capture",
    "copies_for_cold_l2",
    "time_behind_work",
    "time_graph",
    "time_in_turns",
    "time_launches",
    "time_python",
    "time_until_done",
    "time_until_done_in_turns",
]

REPLAY_US = 5_000  # of a graph's calls: its own launch, some 10 us, is timed with them
LAUNCHES_IN_A_ROW = 8
SLOW_US = 20_000  # a call that takes longer is replayed less often
SLOW_CALL_S = 0.01
HELD_S = 10.0  # at most: a call that waits for the stream that is held would wait for ever


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call: the median over repeats, and the spread between the quartiles."""

    median_us: float
    spread_us: float

    def row(self, nbytes: int, ceiling: float | None) -> dict[str, Any]:
        """Return what a row says of a call that must move `nbytes`: its time, and GB/s beside a ceiling in GB/s."""
        bandwidth = nbytes / self.median_us / 1e3
        return {
            "time_us": self.median_us,
            "spread_us": self.spread_us,
            "gb_s": bandwidth,
            "of_ceiling": bandwidth / ceiling if ceiling else None,
        }


@dataclass(frozen=True)
class Replay:
    """A captured CUDA graph of some calls, to be timed; made by `capture`."""

    graph: Any
    stream: Any
    calls: int
    slow: bool

    def elapsed_us(self) -> float:
        """Replay, and return the microseconds of all calls, by CUDA events."""
        return _elapsed_us(self.stream, lambda: self.graph.launch(self.stream))


def capture(calls: Sequence[Callable[[], Any]]) -> Replay:
    """Capture `calls` in one CUDA graph, on a stream of its own.

    Parameters
    ----------
    calls : sequence of callable
        Each launches the same work on CuPy's current stream, on memory of its own: together they should touch so much
        that the L2 holds nothing of it (`copies_for_cold_l2`). They are captured as many times over as take some
        milliseconds, since the launch of a graph takes 10 us itself. The caller keeps them, and what they use, for as
        long as they are replayed.
    """
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()  # what the calls read was written on other streams
    with stream:
        for call in calls:  # compile, load and set attributes before the capture
            call()
        stream.synchronize()
        one_us = _elapsed_us(stream, calls[0])
        rounds = ceil(REPLAY_US / (one_us * len(calls)))
        replay = _capture(stream, calls, rounds, slow=one_us > SLOW_US)
        replay.elapsed_us()  # the first also moves the graph to the device
        taken_us = replay.elapsed_us()
        if taken_us < REPLAY_US / 2:  # one by one, it was the CPU that took the time
            replay = _capture(stream, calls, ceil(rounds * REPLAY_US / taken_us), replay.slow)
        return replay


def time_in_turns(replays: Sequence[Replay], repeats: int = 7) -> list[Timing]:
    """Return the time of a call of each contender, replayed one after the other in rounds.

    Who is first in a row finds the GPU cool, at a higher clock: each is the first of as many rounds as the others.

    Parameters
    ----------
    replays : sequence of Replay
        The contenders'.
    repeats : int
        Rounds that are timed at least, after three that are not; if a contender is slow three, after one.
    """
    if not replays:
        return []
    warm_ups, repeats = (1, min(3, repeats)) if any(replay.slow for replay in replays) else (3, repeats)
    repeats = -(-repeats // len(replays)) * len(replays)
    times: list[list[float]] = [[] for _ in replays]
    for turn in range(-warm_ups, repeats):
        for place in range(len(replays)):
            number = (turn + place) % len(replays)
            elapsed = replays[number].elapsed_us()
            if turn >= 0:
                times[number].append(elapsed)
    return [_timing(taken, replay.calls) for taken, replay in zip(times, replays, strict=True)]


def time_graph(calls: Sequence[Callable[[], Any]], repeats: int = 7) -> Timing:
    """Capture `calls` in one CUDA graph and return the time of a call when the graph is replayed.

    Parameters
    ----------
    calls : sequence of callable
        As `capture` takes them.
    repeats : int
        Replays that are timed, after three that are not; of slow calls three at most, after one.

    Returns
    -------
    Timing
        Microseconds a call, by CUDA events around each replay.
    """
    (timing,) = time_in_turns([capture(calls)], repeats)
    return timing


def time_launches(calls: Sequence[Callable[[], Any]], repeats: int = 7) -> Timing:
    """Return the time of a call when `calls` are launched one by one, as a program without graphs does.

    Where the GPU is faster than the CPU launches, it is the launching that is timed. Parameters and result are those
    of `time_graph`.
    """
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True)
    rounds = max(1, LAUNCHES_IN_A_ROW // len(calls))

    def launch() -> None:
        for _ in range(rounds):
            for call in calls:
                call()

    cupy.cuda.Device().synchronize()
    with stream:
        times = [_elapsed_us(stream, launch) for _ in range(3 + repeats)][3:]
    return _timing(times, rounds * len(calls))


def time_python(calls: Sequence[Callable[[], Any]], batches: int = 200, batch: int = 20) -> list[Timing]:
    """Return for each call how long the CPU takes to make it, the GPU's work left out.

    The calls take turns, a batch of each, so that a slow spell of the machine falls on all of them. Between batches the
    GPU is waited for, so that no launch waits for room in its queue. Python's garbage collector pauses, as in `timeit`:
    what it finds to do depends on the rest of the program.
    """
    import cupy

    times: list[list[float]] = [[] for _ in calls]
    with _collector_paused():
        for turn in range(-3, batches):
            for call, taken in zip(calls, times, strict=True):
                cupy.cuda.Device().synchronize()
                start = perf_counter()
                for _ in range(batch):
                    call()
                if turn >= 0:
                    taken.append(1e6 * (perf_counter() - start))
    cupy.cuda.Device().synchronize()
    return [_timing(taken, batch) for taken in times]


def time_behind_work(calls: Sequence[Callable[[], Any]], *, repeats: int, warm_ups: int) -> list[float]:
    """Return the median of seconds that the GPU takes for each of several calls, asked for ahead.

    A stream is held, as by work before, until all that a call launches is in its queue, and let go then: what is timed,
    by CUDA events, is the work, and not how fast the CPU asks for it. The calls take turns, so that what slows the link
    for a while slows all of them. Python's garbage collector pauses: what it frees on the thread that holds the stream
    must not wait for the GPU.

    Parameters
    ----------
    calls : sequence of callable
        Each launches its work behind what is on CuPy's current stream, and lets that stream wait for it. It must not
        wait for the GPU itself.
    repeats, warm_ups : int
        Rounds that are timed, and rounds before them that are not.

    Raises
    ------
    RuntimeError
        If a call did not return while the stream was held, for ten seconds.
    """
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()  # what the calls read was written on other streams
    with stream, _collector_paused():
        rounds = [[_behind_work_us(stream, call) for call in calls] for _ in range(warm_ups + repeats)]
    return [1e-6 * float(median) for median in np.median(rounds[warm_ups:], axis=0)]


def _behind_work_us(stream: Any, call: Callable[[], Any]) -> float:
    all_asked, in_time = Flag(), []

    def hold(_: Any) -> None:
        in_time.append(all_asked.wait(HELD_S))

    def asked_for() -> None:
        try:
            call()
        finally:
            all_asked.set()

    stream.launch_host_func(hold, None)  # what is launched on it waits
    elapsed_us = _elapsed_us(stream, asked_for)
    if not in_time[0]:
        raise RuntimeError(f"a call must not wait for the GPU; this one had not returned after {HELD_S:g} s")
    return elapsed_us


def time_until_done(
    call: Callable[[], Any], wait: Callable[[], Any], *, repeats: int, warm_ups: int, repeats_of_slow: int | None = None
) -> float:
    """Return the median of seconds from a call until its work is done, by the CPU's clock.

    Parameters
    ----------
    call, wait : callable
        What starts the work, and what returns once it is done.
    repeats, warm_ups : int
        Calls that are timed, and calls before them that are not.
    repeats_of_slow : int, optional
        As many repeats of what takes more than 10 ms.
    """
    times: list[float] = []
    slow = repeats if repeats_of_slow is None else repeats_of_slow
    while len(times) < warm_ups + (slow if times and min(times) > SLOW_CALL_S else repeats):
        times.append(_until_done(call, wait))
    return float(np.median(times[warm_ups:]))


def time_until_done_in_turns(
    contenders: Sequence[tuple[Callable[[], Any], Callable[[], Any]]], *, repeats: int, warm_ups: int
) -> list[float]:
    """Return the median of seconds of each of several calls, one after the other in rounds.

    What slows the machine for a while slows all of them.

    Parameters
    ----------
    contenders : sequence of (callable, callable)
        `call` and `wait` of each, as `time_until_done` takes them.
    repeats, warm_ups : int
        Rounds that are timed, and rounds before them that are not.
    """
    rounds = [[_until_done(*each) for each in contenders] for _ in range(warm_ups + repeats)]
    return [float(median) for median in np.median(rounds[warm_ups:], axis=0)]


def _until_done(call: Callable[[], Any], wait: Callable[[], Any]) -> float:
    """Return the seconds from a call until its work is done; work before it is done by then."""
    wait()
    start = perf_counter()
    call()
    wait()
    return perf_counter() - start


@contextmanager
def _collector_paused() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _capture(stream: Any, calls: Sequence[Callable[[], Any]], rounds: int, slow: bool) -> Replay:
    """Return a graph of `calls`, some times over; the stream's capture is ended also if a call fails."""
    stream.begin_capture()
    try:
        for _ in range(rounds):
            for call in calls:
                call()
    except BaseException:
        with suppress(Exception):  # what was captured is invalid, and says so once more
            stream.end_capture()
        raise
    return Replay(stream.end_capture(), stream, rounds * len(calls), slow)


def _elapsed_us(stream: Any, launch: Callable[[], Any]) -> float:
    import cupy

    start, end = cupy.cuda.Event(), cupy.cuda.Event()
    start.record(stream)
    launch()
    end.record(stream)
    end.synchronize()
    return 1000 * float(cupy.cuda.get_elapsed_time(start, end))


def _timing(times: Sequence[float], calls: int) -> Timing:
    low, median, high = np.percentile(times, (25, 50, 75)) / calls
    return Timing(float(median), float(high - low))


def copies_for_cold_l2(bytes_per_call: int, fetched_ahead: bool = False) -> int:
    """Return over how many copies of its data a call must rotate, so that none is found in the L2 cache.

    Parameters
    ----------
    bytes_per_call : int
        That a call reads; together the copies are more than twice the L2.
    fetched_ahead : bool
        Whether a kernel fetches lines into the L2 ahead of a stream that is marked to be let go of first. The lines
        are not marked, and outlive it until as many others have been fetched: of one copy of 300 MB, six times the L2,
        the next call finds enough to take 2 to 4 % less time. So copies are 32 times the L2 then, or 16; with more,
        times change no more.
    """
    import cupy

    l2_bytes = cupy.cuda.Device().attributes["L2CacheSize"]
    bytes_per_call = max(1, bytes_per_call)
    copies = max(1, ceil(2 * l2_bytes / bytes_per_call) + (bytes_per_call < 2 * l2_bytes))
    return max(copies, 2, min(16, ceil(32 * l2_bytes / bytes_per_call))) if fetched_ahead else copies
