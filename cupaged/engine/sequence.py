"""One request on its way: what it asked for, its tokens so far, and how many of them are in the cache."""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cupaged.kinds import is_integer, is_real
from cupaged.memory.allocator import whole_number
from cupaged.ops.checks import as_real

__all__ = ["SamplingParams", "Sequence", "State"]


@dataclass(frozen=True)
class SamplingParams:
    """How a request's tokens are chosen, and when it ends.

    Parameters
    ----------
    max_tokens : int
        The most tokens that are generated, 1 or more.
    temperature : float
        Divides the logits; 0 takes the most likely token always.
    top_k : int
        Only the `top_k` most likely tokens are drawn from; 0 means all.
    top_p : float
        Only the fewest most likely tokens that together have this probability are drawn from; 1 means all.
    seed : int
        The same seed, modulo 2**64, draws the same tokens for the same prompt, whatever else is in the batch.
    ignore_end : bool
        Whether to go on past the token that ends an answer.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    ignore_end: bool = False

    def __post_init__(self) -> None:
        whole = {
            "max_tokens": whole_number("max_tokens", self.max_tokens, at_least=1),
            "top_k": whole_number("top_k", self.top_k, at_least=0),
        }
        if not is_integer(self.seed):
            raise TypeError(f"seed must be an integer; got {type(self.seed).__name__} {self.seed!r}")
        if not isinstance(self.ignore_end, bool | np.bool_):
            raise TypeError(f"ignore_end must be a bool; got {type(self.ignore_end).__name__} {self.ignore_end!r}")
        real = {"temperature": self._real("temperature", 0.0, math.inf), "top_p": self._real("top_p", 0.0, 1.0)}
        plain = {**whole, **real, "seed": int(self.seed), "ignore_end": bool(self.ignore_end)}
        for name, value in plain.items():  # numbers of NumPy would overflow in what is computed from them
            object.__setattr__(self, name, value)

    def _real(self, name: str, low: float, high: float) -> float:
        given: Any = getattr(self, name)
        if not is_real(given):
            raise TypeError(f"{name} must be a real number; got {type(given).__name__} {given!r}")
        value = as_real(given)
        if not (low <= given <= high and math.isfinite(value)) or (name == "top_p" and value == 0):
            expected = "finite and at least 0" if name == "temperature" else "above 0 and at most 1"
            raise ValueError(f"{name} must be {expected}; got {given!r}")
        return value


class State(Enum):
    """Where a request stands."""

    WAITING = "waiting"  # holds no block: new, or preempted and to be computed again
    SWAPPED = "swapped"  # its blocks lie in the CPU pool
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False)
class Sequence:
    """A request's tokens and progress.

    Attributes
    ----------
    seq_id : int
        Its name, which also tells the order of arrival.
    prompt : int32 [prompt_tokens]
    params : SamplingParams
    priority : int
        The higher goes first, and gives way last; in the range of int32.
    limit : int
        Tokens, prompt included, at which it ends whatever happens: `max_tokens`, the model's or the cache's end.
    output : list of int
        Tokens generated so far. The last of them is not in the cache yet.
    num_computed : int
        First tokens whose keys and values are in the cache.
    num_cached : int
        Tokens of the prompt that were found in the cache when it was first admitted.
    num_preemptions : int
        How often it gave way to others.
    num_forks : int
        Requests that were forked from it so far.
    finish_reason : str
        "end" (the model ended its answer), "length", "cancelled" or "error" (no token could be chosen from its logits);
        empty until then.
    """

    seq_id: int
    prompt: NDArray[np.int32]
    params: SamplingParams = field(default_factory=SamplingParams)
    priority: int = 0
    limit: int = 2**31 - 1
    output: list[int] = field(default_factory=list)
    state: State = State.WAITING
    num_computed: int = 0
    num_cached: int = 0
    num_preemptions: int = 0
    num_forks: int = 0
    finish_reason: str = ""

    def __post_init__(self) -> None:
        self.priority = checked_priority("priority", self.priority)

    @property
    def num_tokens(self) -> int:
        """Tokens known so far, prompt and output."""
        return len(self.prompt) + len(self.output)

    @property
    def num_pending(self) -> int:
        """Tokens known but not computed: 1 while it decodes."""
        return self.num_tokens - self.num_computed

    @property
    def rank(self) -> tuple[int, int]:
        """Sorts requests: the highest priority first, then the first to arrive."""
        return -self.priority, self.seq_id

    def tokens(self, start: int = 0, stop: int | None = None) -> NDArray[np.int32]:
        """Return the tokens at positions `start` to `stop - 1` (default: to the last)."""
        stop = self.num_tokens if stop is None else stop
        cut = len(self.prompt)
        if start >= cut:
            return np.array(self.output[start - cut : stop - cut], np.int32)
        generated: SequenceOf[int] = self.output[: max(0, stop - cut)]
        return np.concatenate([self.prompt[start:stop], np.array(generated, np.int32)])


def checked_priority(name: str, priority: object) -> int:
    """Return a priority as an int, or raise an error that names the argument: blocks keep it as int32."""
    number = whole_number(name, priority, at_least=-(2**31))
    if number >= 2**31:
        raise ValueError(f"{name} must fit in int32, got {number}")
    return number
