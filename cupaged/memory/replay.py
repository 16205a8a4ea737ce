"""A trace replayed through a memory: who is admitted, who is refused, and what every slot is used for meanwhile.

This is a serving engine reduced to what its memory sees. Time goes in decode steps: a prompt is written in one, then
its request gains one token a step until it has generated its output and leaves. Requests are admitted first come, first
served. One that finds too many waiting is refused, whatever its size, so that no memory gets easier requests than
another. When a memory runs out in the midst of a step, the request admitted last is preempted; it computes its tokens
again when there is room.
"""

from __future__ import annotations

import math
import numbers
from array import array
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, fields
from itertools import count
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from cupaged.errors import OutOfBlocksError
from cupaged.memory.allocator import whole_number
from cupaged.memory.contiguous import ContiguousAllocator, Usage
from cupaged.memory.manager import BlockManager
from cupaged.memory.sampler import MOST_TOKENS, Trace, exact_sum

__all__ = ["STATES", "ContiguousMemory", "Memory", "PagedMemory", "Replay", "Requests", "replay"]

IntArray = npt.NDArray[np.int64]
SlotStates = npt.NDArray[np.uint8]

STATES = Usage._fields
"""What a slot can be; a painted memory holds indices into this."""
TOKENS, RESERVATION, INTERNAL, EXTERNAL, FREE = range(len(STATES))
MOST_STEPS = 2**53  # beyond it a float64 skips whole numbers


@dataclass(frozen=True, eq=False)
class Requests:
    """A trace in decode steps: one read-only int64 array [num_requests] a property, in order of arrival.

    Parameters
    ----------
    arrival : int64 [num_requests]
        Steps, at least 0, never falling.
    prompt, output : int64 [num_requests]
        Tokens of the prompt and generated tokens, each at least 1, together at most 2**31 - 1.

    Raises
    ------
    TypeError, ValueError
        A column holds something else than such whole numbers. Lists, and floats that are whole, are converted.
    """

    arrival: IntArray
    prompt: IntArray
    output: IntArray

    def __post_init__(self) -> None:
        for field in fields(self):
            column = _whole_numbers(f"requests.{field.name}", getattr(self, field.name))
            column.setflags(write=False)
            object.__setattr__(self, field.name, column)
        shapes = [column.shape for column in (self.arrival, self.prompt, self.output)]
        if len(set(shapes)) > 1:
            raise ValueError(f"requests must have columns of one length, got {shapes}")
        if (self.arrival[1:] < self.arrival[:-1]).any():
            raise ValueError("requests must be in order of arrival, got an arrival that falls")
        if (self.arrival < 0).any():
            raise ValueError(f"requests must have arrivals of at least step 0, got {self.arrival.min()}")
        for name, column in (("prompt", self.prompt), ("output", self.output)):
            if (column < 1).any():
                raise ValueError(f"requests must have {name}s of at least 1 token everywhere, got {column.min()}")
        if (self.prompt > MOST_TOKENS - self.output).any():
            longest = int(np.argmax(self.prompt > MOST_TOKENS - self.output))
            raise ValueError(
                f"requests must have at most {MOST_TOKENS} tokens of prompt and output together, "
                f"got {self.prompt[longest]} and {self.output[longest]} for request {longest}"
            )

    def __len__(self) -> int:
        return len(self.arrival)

    @property
    def final(self) -> IntArray:
        """Tokens that each request holds in the end."""
        return self.prompt + self.output

    @classmethod
    def from_trace(cls, trace: Trace, offered_tokens: float) -> Requests:
        """Return a trace in decode steps of such a length that its requests press on memory as hard as asked.

        Parameters
        ----------
        trace : Trace
            At least two requests that arrive over time, each of which generates something.
        offered_tokens : float
            Tokens that would be held on average if every request ran as soon as it arrives; arrivals keep their
            pattern.

        Raises
        ------
        TypeError, ValueError
            `offered_tokens` is no number; the trace is so short, or so many tokens are offered, that all requests would
            arrive at once; or an arrival would be no exact number of steps.
        """
        if len(trace) < 2 or trace.arrival[-1] == trace.arrival[0]:
            raise ValueError("trace must hold at least two requests that arrive over time")
        if (trace.output_tokens == 0).any():
            raise ValueError("trace must hold requests that generate at least one token, got one that generates none")
        offered_tokens = _real_number("offered_tokens", offered_tokens)
        if not offered_tokens > 0:
            raise ValueError(f"offered_tokens must be positive, got {offered_tokens}")
        elapsed = (trace.arrival - trace.arrival[0]) / (trace.arrival[-1] - trace.arrival[0])
        token_steps = float(exact_sum(trace.token_steps()))
        if token_steps / offered_tokens < 1:
            raise ValueError(
                f"offered_tokens must be at most the {token_steps:.0f} that the trace's {len(trace)} requests hold, "
                f"summed over their decode steps, or all arrive in one step; got {offered_tokens}"
            )
        if token_steps / offered_tokens > MOST_STEPS:
            raise ValueError(
                f"offered_tokens must be at least {token_steps / MOST_STEPS:g}, so that requests arrive within "
                f"{MOST_STEPS} decode steps; got {offered_tokens}"
            )
        arrival = np.floor(elapsed * token_steps / offered_tokens).astype(np.int64)
        return cls(arrival, trace.prompt_tokens, trace.output_tokens)


class Memory(Protocol):
    """What the replay asks of a way to allocate.

    A request is its index in `requests`, those to be replayed. `running` holds those admitted, int64 [num_running], in
    order of admission, `held` the tokens of every request, int64 [num_requests], and `upcoming` is the next request in
    line, if any is left.
    """

    num_slots: int
    requests: Requests

    def admit(self, request: int, tokens: int) -> bool:
        """Write a request's first tokens; return False and change nothing where there is no room."""

    def grow(self, running: IntArray) -> bool:
        """Write one more token of each request; return False and change nothing where there is no room."""

    def release(self, request: int) -> None:
        """Give back all that a request holds."""

    def usage(self, running: IntArray, held: IntArray, upcoming: int | None) -> Usage:
        """Return how the slots are spent."""

    def paint(self, running: IntArray, held: IntArray, upcoming: int | None) -> SlotStates:
        """Return what each slot is, uint8 [num_slots], as an index into `STATES`."""


class ContiguousMemory:
    """One region a request.

    Parameters
    ----------
    allocator : ContiguousAllocator
        Empty.
    requests : Requests
        Those to be replayed.
    reserve : int64 [num_requests]
        Slots that each of them asks for, at least the tokens that it holds in the end.
    """

    def __init__(self, allocator: ContiguousAllocator, requests: Requests, reserve: IntArray) -> None:
        reserve = _whole_numbers("reserve", reserve)
        if len(reserve) != len(requests):
            raise ValueError(f"reserve must hold one number for each of {len(requests)} requests, got {len(reserve)}")
        short = reserve < requests.final
        if short.any():
            first = int(np.argmax(short))
            raise ValueError(
                f"reserve must be at least the {requests.final[first]} tokens that request {first} holds in the end, "
                f"got {reserve[first]}"
            )
        self.num_slots = allocator.num_slots
        self.allocator, self.requests = allocator, requests
        self._reserve, self._final = reserve.tolist(), requests.final.tolist()

    def admit(self, request: int, tokens: int) -> bool:
        if not self.allocator.can_allocate(self._reserve[request]):
            return False
        self.allocator.allocate(request, tokens, self._reserve[request], self._final[request])
        return True

    def grow(self, running: IntArray) -> bool:
        self.allocator.append(running.tolist())
        return True

    def release(self, request: int) -> None:
        self.allocator.free(request)

    def usage(self, running: IntArray, held: IntArray, upcoming: int | None) -> Usage:
        return self.allocator.usage(None if upcoming is None else self._reserve[upcoming])

    def paint(self, running: IntArray, held: IntArray, upcoming: int | None) -> SlotStates:
        slots = np.full(self.num_slots, FREE, np.uint8)
        needed = 0 if upcoming is None else self.allocator.region_size(self._reserve[upcoming])
        for start, size in zip(*self.allocator.holes(), strict=True):
            slots[start : start + size] = EXTERNAL if size < needed else FREE
        for start, size, tokens, final in zip(*self.allocator.regions(), strict=True):
            slots[start : start + size] = INTERNAL
            slots[start : start + final] = RESERVATION
            slots[start : start + tokens] = TOKENS
        return slots


class PagedMemory:
    """Blocks, each taken when a token needs one. No hole is too short for a block: nothing is lost to external waste.

    Parameters
    ----------
    num_slots, block_size : int
        Token slots of the memory, at least a block, and of a block; slots short of a last block stay free.
    requests : Requests
        Those to be replayed.
    kept_free : float
        Share of the blocks that an admission must leave free for the requests that run, at least 0 and below 1.
    """

    def __init__(self, num_slots: int, block_size: int, requests: Requests, kept_free: float = 0.01) -> None:
        self.block_size = whole_number("block_size", block_size, at_least=1)
        self.num_slots = whole_number("num_slots", num_slots, at_least=self.block_size)
        kept_free = _real_number("kept_free", kept_free)
        if not 0 <= kept_free < 1:
            raise ValueError(f"kept_free must be at least 0 and below 1, got {kept_free}")
        self.num_blocks = self.num_slots // self.block_size
        self.manager = BlockManager(num_gpu_blocks=self.num_blocks, block_size=self.block_size)
        self._kept_free = int(kept_free * self.num_blocks)
        self.requests, self._final = requests, requests.final

    def admit(self, request: int, tokens: int) -> bool:
        if self.manager.gpu.num_free - self._blocks(tokens) < self._kept_free:
            return False
        self.manager.allocate(request, tokens)
        return True

    def grow(self, running: IntArray) -> bool:
        try:
            self.manager.append_batch(running.tolist())
        except OutOfBlocksError:
            return False
        return True

    def release(self, request: int) -> None:
        self.manager.free(request)

    def usage(self, running: IntArray, held: IntArray, upcoming: int | None) -> Usage:
        allocated = self.manager.gpu.num_used * self.block_size
        filled = held[running]
        filled_later = np.minimum(self._final[running], self._blocks(filled) * self.block_size) - filled
        tokens, reservation = int(filled.sum()), int(filled_later.sum())
        return Usage(tokens, reservation, allocated - tokens - reservation, 0, self.num_slots - allocated)

    def paint(self, running: IntArray, held: IntArray, upcoming: int | None) -> SlotStates:
        tables = self.manager.block_tables(running.tolist())
        position = np.arange(tables.shape[1] * self.block_size).reshape(-1, self.block_size)
        states = np.full((len(tables), *position.shape), INTERNAL, np.uint8)
        states[position < self._final[running, None, None]] = RESERVATION
        states[position < held[running, None, None]] = TOKENS
        slots = np.full((self.num_blocks, self.block_size), FREE, np.uint8)
        slots[tables[tables >= 0]] = states[tables >= 0]
        return np.pad(slots.ravel(), (0, self.num_slots - slots.size), constant_values=FREE)

    def _blocks(self, tokens: Any) -> Any:
        return -(-tokens // self.block_size)


class Replay(NamedTuple):
    """What there was at the end of every step; the counts are of requests, int64 [num_steps]."""

    usage: IntArray
    """int64 [num_steps, 5]: slots in each of `STATES`."""
    running: IntArray
    """At once."""
    waiting: IntArray
    """In line."""
    refused: IntArray
    """Until then."""
    preempted: IntArray
    """Until then; a request preempted twice counts twice."""
    completed: IntArray
    """Until then."""
    painted: SlotStates
    """uint8 [num_painted, num_slots]: the memory at the steps asked for."""


def replay(
    requests: Requests, memory: Memory, max_waiting: int, paint_at: Collection[int] = (), max_steps: int = 2_000_000
) -> Replay:
    """Replay requests until the last has left.

    Parameters
    ----------
    requests : Requests
        What arrives.
    memory : Memory
        Empty, and made for these requests.
    max_waiting : int
        A request that arrives while so many wait is refused.
    paint_at : collection of int
        Steps at whose end the memory is painted, in order of time; those after the last step are passed over.
    max_steps : int
        The most steps that the replay may take, idle ones too: every step is a row of the result.

    Raises
    ------
    ValueError
        The memory was made for other requests; a request does not fit there although it is alone; or the replay takes
        more than `max_steps`.
    """
    if not isinstance(requests, Requests):
        raise TypeError(f"requests must be Requests, got {type(requests).__name__}")
    if not np.array_equal(memory.requests.final, requests.final):
        raise ValueError(
            f"memory must be made for the {len(requests)} requests to be replayed, "
            f"got one made for {len(memory.requests)} others"
        )
    max_steps = whole_number("max_steps", max_steps, at_least=1)
    if _least_steps(requests) > max_steps:
        raise ValueError(
            f"requests must be replayed within max_steps = {max_steps} decode steps, "
            f"got arrivals and outputs that take at least {_least_steps(requests)}"
        )
    painted_steps = _steps_to_paint(paint_at)
    engine = _Engine(requests, memory, whole_number("max_waiting", max_waiting, at_least=1))
    usage, counts, painted = array("q"), array("q"), []
    for step in count():
        if not engine.busy():
            break
        if step == max_steps:
            raise ValueError(
                f"requests must be replayed within max_steps = {max_steps} decode steps, got {engine.completed} of "
                f"{len(requests)} requests completed and {engine.refused} refused by then"
            )
        if step == 0 or not engine.idle(step):
            engine.decode()
            engine.arrive(step)
            engine.admit()
            slots_now = memory.usage(engine.running, engine.held, engine.upcoming())
        usage.extend(slots_now)
        counts.extend(engine.counts())
        if step in painted_steps:
            painted.append(memory.paint(engine.running, engine.held, engine.upcoming()))
    running, waiting, refused, preempted, completed = np.array(counts, np.int64).reshape(-1, 5).T
    pictures = np.array(painted, np.uint8).reshape(-1, memory.num_slots)
    slots = np.array(usage, np.int64).reshape(-1, len(STATES))
    return Replay(slots, running, waiting, refused, preempted, completed, pictures)


def _least_steps(requests: Requests) -> int:
    """Return a number of steps that no replay can stay below: the last arrives, and the first is never refused."""
    if not len(requests):
        return 0
    return 1 + max(int(requests.arrival[-1]), int(requests.arrival[0] + requests.output[0]))


def _steps_to_paint(paint_at: Collection[int]) -> Collection[int]:
    """Return the steps as something that can be asked for one of them at once."""
    if (
        not isinstance(paint_at, Collection)
        or isinstance(paint_at, str | bytes)
        or getattr(paint_at, "shape", None) == ()
    ):
        raise TypeError(f"paint_at must be a collection of steps, got {type(paint_at).__name__}")
    if isinstance(paint_at, range):
        return paint_at
    return frozenset(whole_number("each step of paint_at", step, at_least=0) for step in paint_at)


def _real_number(name: str, value: Any) -> float:
    """Return `value` as a float, infinite where it is larger than a float can be, or raise an error that names it."""
    if isinstance(value, bool | np.bool_) or not issubclass(type(value), numbers.Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        return math.copysign(math.inf, 1 if value > 0 else -1)


def _whole_numbers(name: str, values: Any) -> IntArray:
    """Return a copy of the values as an int64 vector, or raise an error that names the argument."""
    if np.ma.is_masked(values):
        raise TypeError(f"{name} must be whole numbers, got masked ones")
    try:
        column = np.array(values)
    except (TypeError, ValueError) as error:  # such as lists of several lengths
        raise ValueError(f"{name} must be a vector of whole numbers: {error}") from None
    if column.ndim != 1:
        raise ValueError(f"{name} must have one dimension, got {column.ndim}")
    if not column.size:
        return np.empty(0, np.int64)
    if column.dtype.kind not in "iuf":
        raise TypeError(f"{name} must be whole numbers that fit in int64, got {column.dtype}")
    if column.dtype.kind == "f":
        column = column.astype(np.longdouble)
        exact = np.isfinite(column) & (column == np.floor(column)) & (abs(column) < 2.0**63)
    else:
        exact = column <= np.iinfo(np.int64).max
    if not exact.all():
        first = int(np.argmin(exact))
        raise ValueError(f"{name} must be whole numbers that fit in int64, got {column[first]} for request {first}")
    return column.astype(np.int64)


class _Engine:
    """The requests that wait and those that run; a step is decode, arrive, admit."""

    def __init__(self, requests: Requests, memory: Memory, max_waiting: int) -> None:
        self.memory, self.max_waiting = memory, max_waiting
        self.arrivals, self.output = requests.arrival.tolist(), requests.output
        self.held, self.generated = requests.prompt.copy(), np.zeros_like(requests.prompt)
        self.waiting: deque[int] = deque()
        self.running = np.empty(0, np.int64)
        self.arrived = self.refused = self.preempted = self.completed = 0

    def busy(self) -> bool:
        return self.arrived < len(self.arrivals) or bool(self.waiting) or bool(len(self.running))

    def idle(self, step: int) -> bool:
        """Return whether nothing runs, waits or arrives, so that everything stays as it was."""
        return not (len(self.running) or self.waiting or self.arrivals[self.arrived] <= step)

    def counts(self) -> tuple[int, ...]:
        """Return the counts of `Replay`, in its order."""
        return len(self.running), len(self.waiting), self.refused, self.preempted, self.completed

    def upcoming(self) -> int | None:
        """Return the next request in line, or else the next to arrive."""
        if self.waiting:
            return self.waiting[0]
        return self.arrived if self.arrived < len(self.arrivals) else None

    def decode(self) -> None:
        while len(self.running) and not self.memory.grow(self.running):
            self.preempt(int(self.running[-1]))
        self.held[self.running] += 1
        self.generated[self.running] += 1
        leaves = self.generated[self.running] == self.output[self.running]
        for request in self.running[leaves].tolist():
            self.memory.release(request)
        self.completed += int(leaves.sum())
        self.running = self.running[~leaves]

    def preempt(self, youngest: int) -> None:
        """Release the request admitted last; what it has generated joins its prompt, to be computed again."""
        if len(self.running) == 1:
            raise self.no_room(youngest, int(self.held[youngest]) + 1)
        self.memory.release(youngest)
        self.waiting.appendleft(youngest)
        self.running = self.running[:-1]
        self.preempted += 1

    def arrive(self, step: int) -> None:
        while self.arrived < len(self.arrivals) and self.arrivals[self.arrived] <= step:
            if len(self.waiting) < self.max_waiting:
                self.waiting.append(self.arrived)
            else:
                self.refused += 1
            self.arrived += 1

    def admit(self) -> None:
        admitted: list[int] = []
        while self.waiting and self.memory.admit(self.waiting[0], int(self.held[self.waiting[0]])):
            admitted.append(self.waiting.popleft())
        self.running = np.append(self.running, np.array(admitted, np.int64))
        if self.waiting and not len(self.running):
            raise self.no_room(self.waiting[0], int(self.held[self.waiting[0]]))

    def no_room(self, request: int, held: int) -> ValueError:
        return ValueError(f"memory must have room for request {request} alone, which holds {held} tokens")
