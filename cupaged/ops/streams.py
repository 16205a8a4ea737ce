"""On which stream a call works: CuPy's current one, or that of the library whose arrays it was given.

Other libraries have current streams of their own, and expect their arrays to be read and written there. So

- a call with torch tensors works on torch's current stream of their device, as torch's own functions do. It begins
  after the work that is on CuPy's current stream, and what follows on CuPy's current stream waits for it: a `KVCache`
  is CuPy's memory, and may be used from both sides;
- a call with arrays of another library works on CuPy's current stream. It waits for the stream that
  ``__cuda_array_interface__`` names, or exchanges streams by DLPack, and afterwards that stream waits for it. Where a
  library does not say its stream, the device's default stream stands for it.

Order is kept by events, on the device; the host waits for nothing. Where all streams are the same one, as torch's and
CuPy's default streams are, there is nothing to do. While a CUDA graph is captured, a call works on the stream that is
captured, and only streams that take part in the capture are brought in order.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache, wraps
from typing import Any, TypeVar

import numpy as np

from cupaged.ops.arrays import DLPACK_CUDA, is_torch
from cupaged.runtime.captures import captured, is_capturing, keep_for_graph, release_dropped

__all__ = ["callers_streams", "foreign_arrays", "on_callers_streams"]

LEGACY, PER_THREAD = 1, 2  # streams as ``__cuda_array_interface__`` numbers them; CuPy has 0 for the first
NO_ARRAYS = (np.ndarray, int, float, str, tuple, list, dict, type(None))  # never another library's array on a GPU

Function = TypeVar("Function", bound=Callable[..., Any])


def on_callers_streams(function: Function) -> Function:
    """Let a function work on the stream of the arrays that it is given, in order with the work around it.

    While a graph is captured from that stream, what the function allocates and does not return is kept for the graph.
    """

    @wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        values = (*arguments, *named.values())
        foreign = foreign_arrays(values)
        if not foreign and not _on_gpu(values):
            return function(*arguments, **named)
        release_dropped()
        with ExitStack() as stack:
            if foreign:
                stack.enter_context(callers_streams(foreign))
            stream = _current_stream()
            if not is_capturing(stream):
                return function(*arguments, **named)
            allocated, result = stack.enter_context(captured(stream)), None
            try:
                result = function(*arguments, **named)
            finally:  # after an error too: something may have been captured before it
                kept = _without(allocated, result)
                if kept:
                    keep_for_graph(stream, kept)
            return result

    return call  # type: ignore[return-value]


def foreign_arrays(values: Iterable[Any]) -> list[Any]:
    """Return those of `values` that are arrays on a GPU of a library other than CuPy."""
    return [value for value in values if not isinstance(value, NO_ARRAYS) and _is_foreign(value)]


@contextmanager
def callers_streams(arrays: Sequence[Any]) -> Iterator[None]:
    """Make CuPy's current stream, within, the one that arrays of other libraries ask for.

    Parameters
    ----------
    arrays : sequence of array
        On a GPU, and not CuPy's.

    Raises
    ------
    ValueError
        If CuPy's current stream is being captured, and the arrays belong on another.
    """
    cuda, tensor = _cupy().cuda, next(filter(is_torch, arrays), None)
    device = cuda.runtime.getDevice() if tensor is None else tensor.device.index
    with ExitStack() as stack:
        if device != cuda.runtime.getDevice():
            stack.enter_context(cuda.Device(device))
        current = _current_stream()
        stream = current if tensor is None else torch_stream(device)
        around = {other.ptr: other for other in (stream_of(array) for array in arrays if not is_torch(array))}
        around = {current.ptr: current, **around}
        around.pop(stream.ptr, None)
        for other in _in_the_same_capture(stream, around.values()):
            _let_wait(stream, other, device)
            stack.callback(_let_wait, other, stream, device)
        if stream.ptr != current.ptr:
            stack.enter_context(stream)
        yield


def torch_stream(device: int) -> Any:
    """Return torch's current stream of a device, as a CuPy stream."""
    return _stream_at(int(sys.modules["torch"].cuda.current_stream(device).cuda_stream))


def stream_of(array: Any) -> Any:
    """Return the stream that an array says its work is on, as a CuPy stream; the default stream if it says none."""
    interface = getattr(array, "__cuda_array_interface__", None)
    number = interface.get("stream") if interface is not None else None
    return _stream_at(0 if number is None or number == LEGACY else int(number))


class _Address:
    """A stream by its address, as CuPy asks for it."""

    def __init__(self, address: int) -> None:
        self._address = address

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._address


@lru_cache(maxsize=256)
def _stream_at(address: int) -> Any:
    """Return a CuPy stream over a stream that others own; one object for each, as CuPy notes things by it."""
    stream = _cupy().cuda.Stream
    if address == 0:
        return stream.null
    return stream.ptds if address == PER_THREAD else stream.from_external(_Address(address))


def _in_the_same_capture(stream: Any, others: Iterable[Any]) -> list[Any]:
    """Return the streams that events can bring in order with `stream`.

    Raises
    ------
    ValueError
        If another is being captured, and `stream` is not: the graph would lack the call.
    """
    capturing, found = is_capturing(stream), []
    for other in others:
        if is_capturing(other) == capturing:
            found.append(other)
        elif not capturing:
            raise ValueError(
                "the stream that is being captured must be the current one of the library whose arrays the call has: "
                "for torch tensors capture with torch.cuda.graph, or make the captured stream torch's own current "
                "stream by torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr))"
            )
    return found


_events = threading.local()


def _let_wait(stream: Any, other: Any, device: int) -> None:
    """Let what follows on a stream wait for what is on another now."""
    event = getattr(_events, str(device), None)
    if event is None:
        event = _cupy().cuda.Event(disable_timing=True)
        setattr(_events, str(device), event)  # a wait goes by what was recorded when it was asked for
    event.record(other)
    stream.wait_event(event)


def _is_foreign(value: Any) -> bool:
    """Whether a value is an array on a GPU, and not CuPy's."""
    if is_torch(value):
        return bool(value.is_cuda)
    if _is_cupy(value):
        return False
    if hasattr(value, "__cuda_array_interface__"):
        return True
    return hasattr(value, "__dlpack_device__") and value.__dlpack_device__()[0] == DLPACK_CUDA


def _on_gpu(values: Iterable[Any]) -> bool:
    """Whether any of the values is CuPy's, or lies on a GPU as a cache or a plan does."""
    return any(
        not isinstance(value, NO_ARRAYS) and (_is_cupy(value) or getattr(value, "backend", None) == "cuda")
        for value in values
    )


def _is_cupy(value: Any) -> bool:
    cupy = sys.modules.get("cupy")
    return cupy is not None and isinstance(value, cupy.ndarray)


def _without(allocated: list[Any], result: Any) -> list[Any]:
    """Return the memory that was allocated for other things than a function's result."""
    arrays = result if isinstance(result, tuple) else (result,)
    returned = {id(array.data.mem) for array in arrays if _is_cupy(array)}
    return [memory for memory in allocated if id(memory.mem) not in returned]


def _current_stream() -> Any:
    return _cupy().cuda.get_current_stream()


def _cupy() -> Any:
    import cupy

    return cupy
