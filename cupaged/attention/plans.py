"""Plans of work, calls that are launched again without checks, and calls that are prepared: once for all kernels."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial, wraps
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np

from cupaged.attention.call import AttentionCall
from cupaged.attention.kernel import Kernel, Launch
from cupaged.kv_cache import KVCache
from cupaged.ops.arrays import array_module
from cupaged.ops.checks import must_validate
from cupaged.ops.overlap import check_apart
from cupaged.ops.streams import callers_streams, foreign_arrays, on_callers_streams
from cupaged.runtime.arguments import byte_bounds
from cupaged.runtime.launch import CheckedCalls, PreparedLaunch

__all__ = ["Answer", "Plan", "PreparedAttention", "answer", "prepared_attention", "remembers_calls"]

NO_CONTEXT = nullcontext()
NAMED_BY_PLACE = 4  # arguments that every call has
MORE_ARRAYS = ("query_start", "query_to_seq", "alibi_slopes", "sinks")
# The parameters of a kernel that each remembered call has arrays of its own for. `out` may be given or not: what is
# written to comes last.
FIRST_NAMES = ("query", "block_tables", "seq_lens")
LAST_NAMES = ("out as it was given", "key_cache", "value_cache", "out", "lse")


class Plan:
    """How the work of calls is shared out: what it was made for, and calls with it that passed their checks.

    Attributes
    ----------
    config, backend, device
        Those of the cache that it was made for.
    window : int or None
        That of the calls.
    calls : CheckedCalls
        Calls that are launched again without checks.
    """

    def __init__(self, cache: KVCache, window: int | None) -> None:
        self.config, self.backend, self.device = cache.config, cache.backend, cache.device
        self.window = window
        self.calls = CheckedCalls(cache.backend)

    @cached_property
    def bounds(self) -> tuple[tuple[int, int], ...]:
        """The addresses between which the plan's own arrays lie: what a call reads of it, and its work space."""
        own = array_module(self.backend).ndarray
        values = vars(self).values()
        inner = [bounds for value in values if isinstance(value, Plan) for bounds in value.bounds]
        return (*(byte_bounds(value) for value in values if isinstance(value, own)), *inner)

    def made_for(self, call: AttentionCall) -> Sequence[tuple[str, Any, Any]]:
        """Return what must be the same: a name, what the plan is for, and what the call has."""
        raise NotImplementedError

    def check_contents(self, call: AttentionCall) -> None:
        """Raise ValueError unless the plan holds what the call's arrays say; reads them."""
        raise NotImplementedError

    def check(self, call: AttentionCall) -> None:
        """Raise ValueError unless the plan was made for calls like this one."""
        capacity = call.max_blocks * call.config.block_size
        window = None if self.window is None or self.window >= capacity else self.window  # as for the call
        for name, planned, given in (
            ("backend", self.backend, call.cache.backend),
            ("device", self.device, call.cache.device),
            *self.made_for(call),
            ("window", window, call.mask.window),
            ("cache", replace(self.config, num_blocks=1), replace(call.config, num_blocks=1)),
        ):
            if planned != given:
                raise ValueError(f"plan must be made for the same {name}: it is for {planned}, the call has {given}")
        pages = call.pages
        given_arrays = {"query": call.query, "block_tables": pages.block_tables, "seq_lens": pages.seq_lens}
        check_apart({"out": call.out}, {"plan": self})
        check_apart({"plan": self}, given_arrays)


@dataclass(frozen=True)
class Answer:
    """The launches that answer a call, and what it returns."""

    launches: Sequence[Launch]
    result: Any


def answer(call: AttentionCall, kernel: Kernel, reason: str, plan: Plan | None, validate: bool | None) -> list[Launch]:
    """Return the launches by which a kernel answers a call; none if there is no query.

    Parameters
    ----------
    call : AttentionCall
        With room for its results.
    kernel : Kernel
        It serves the call.
    reason : str
        Why it was chosen.
    plan : Plan, optional
        The caller's; without it one is made for this call.
    validate : bool, optional
        As `cupaged.paged_attention` takes it.

    Raises
    ------
    ValueError
        If arrays hold what they must not, or the plan does not fit.
    """
    if plan is not None:
        if not kernel.takes_plan:
            raise ValueError(
                f"plan must be left out for {kernel.info.name}, which shares nothing out; it runs as {reason}"
            )
        plan.check(call)
        if must_validate(validate, call.cache.backend):
            plan.check_contents(call)
    if not call.query.size:
        return []
    return list(kernel.prepare(call, kernel.plan(call) if plan is None else plan))


class PreparedAttention:
    """A planned call of `paged_attention` that passed its checks; made by `DecodePlan.prepare`.

    Attributes
    ----------
    launches : sequence of PreparedLaunch
        What a call does, in order; none if there is no query.
    result : array or tuple of array
        What a call returns.
    """

    def __init__(self, launches: Sequence[PreparedLaunch], result: Any, foreign: Sequence[Any] = ()) -> None:
        self.launches = tuple(launches)
        self.result = result
        self._foreign = tuple(foreign)  # arrays of other libraries, by which streams go

    def __call__(self) -> Any:
        """Launch, and return the result: the same arrays each time.

        Raises
        ------
        ValueError
            If another device is current than when it was made.
        """
        with callers_streams(self._foreign) if self._foreign else NO_CONTEXT:
            for launch in self.launches:
                launch()
        return self.result


def prepared_attention(answered: Answer, given: Sequence[Any]) -> PreparedAttention:
    """Return an answer to be launched as often as need be; `given` are the caller's arguments."""
    launches = [launch.prepared() for launch in answered.launches]
    return PreparedAttention(launches, answered.result, foreign_arrays(given))


# --- remembered calls ---------------------------------------------------------------------------------------------


class _Form(NamedTuple):
    """How the rest of a call is written, the arguments besides those that `door` names: by place and by name.

    Attributes
    ----------
    arrays, options : callable
        Return those that are arrays, and the others, of the values that are given.
    names : tuple of str
        Names of the arrays.
    """

    arrays: Callable[[Sequence[Any]], tuple[Any, ...]]
    options: Callable[[Sequence[Any]], tuple[Any, ...]]
    names: tuple[str, ...]


def _form_of(signature: inspect.Signature, count: int, *named: str) -> _Form | None:
    """Return the form of a call with so many more arguments by place, and these by name; None if they do not fit."""
    count += NAMED_BY_PLACE
    try:
        signature.bind(*range(count), **dict.fromkeys(named))
    except TypeError:
        return None
    given = [*list(signature.parameters)[NAMED_BY_PLACE:count], *named]
    arrays, options = (
        [place for place, name in enumerate(given) if (name in MORE_ARRAYS) == wanted] for wanted in (True, False)
    )
    return _Form(_getter(arrays), _getter(options), tuple(given[place] for place in arrays))


def _getter(places: list[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    if len(places) > 1:
        return itemgetter(*places)
    return lambda values: tuple([values[place] for place in places])


def remembers_calls(function: Callable[..., Answer]) -> Callable[..., Any]:
    """Make a function that answers a call into one that launches, and launches calls like earlier ones unchecked.

    Calls are remembered by their plan: one that passed its checks is known by how it was written, its options, and its
    arrays in all but place and content. Another like it is launched at once. Calls whose arrays are read to check them
    are never launched so, nor those of several launches.
    """
    signature, forms = inspect.signature(function), dict[tuple[Any, ...], _Form]()
    nothing_more: tuple[_Form | None, tuple[Any, ...], tuple[Any, ...]] = _form_of(signature, 0), (), ()

    @wraps(function)
    def door(
        query: Any,
        cache: KVCache,
        block_tables: Any,
        seq_lens: Any,
        *more: Any,
        out: Any = None,
        return_lse: bool = False,
        plan: Any = None,
        validate: bool | None = None,
        **named: Any,
    ) -> Any:
        remember = None
        if isinstance(plan, Plan) and isinstance(cache, KVCache):
            form, more_arrays, more_options = split(more, named) if more or named else nothing_more
            arrays = (query, block_tables, seq_lens, *more_arrays, out)
            options = (form, cache.config, cache.device, return_lse, validate, *more_options)
            if validate is False or (validate is None and cache.backend != "host"):
                elsewhere = cache.bounds if out is None else (*cache.bounds, *plan.bounds)
                known = plan.calls.find(options, arrays, elsewhere, len(arrays) - 1)
                if known is not None:
                    result = cache.xp.empty_like(query) if out is None else out
                    lse = cache.xp.empty(query.shape[:-1], dtype=np.float32) if return_lse else None
                    known.launch(*arrays, cache.key, cache.value, result, lse)
                    return (result, lse) if return_lse else result
            if form is not None:
                remember = partial(_remember, plan, options, arrays, form, validate)
        return checked(
            remember, query, cache, block_tables, seq_lens, *more,
            out=out, return_lse=return_lse, plan=plan, validate=validate, **named,
        )  # fmt: skip

    def split(more: tuple[Any, ...], named: dict[str, Any]) -> tuple[_Form | None, tuple[Any, ...], tuple[Any, ...]]:
        written = (len(more), *named)
        form = forms.get(written)
        if form is None:
            form = _form_of(signature, len(more), *named)
            if form is None:  # they do not fit, as the function will say
                return None, (), ()
            forms[written] = form
        values = (*more, *named.values())
        return form, form.arrays(values), form.options(values)

    @on_callers_streams
    def checked(remember: Callable[[PreparedLaunch], None] | None, *arguments: Any, **named: Any) -> Any:
        answered = function(*arguments, **named)
        if remember is not None and len(answered.launches) == 1:
            launch = answered.launches[0].prepared()
            launch()
            remember(launch)
        else:
            for each in answered.launches:
                each()
        return answered.result

    return door


def _remember(
    plan: Plan, options: tuple[Any, ...], arrays: tuple[Any, ...], form: _Form, validate: Any, launch: PreparedLaunch
) -> None:
    """Remember a call, unless calls like it have their arrays read."""
    if not must_validate(validate, plan.backend):
        still_known = None if validate is False else _environment_asks_for_nothing
        plan.calls.add(options, arrays, launch, (*FIRST_NAMES, *form.names, *LAST_NAMES), still_known)


def _environment_asks_for_nothing() -> bool:
    return not must_validate(None, "cuda")
