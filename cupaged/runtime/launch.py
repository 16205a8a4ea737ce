"""Launches whose arguments were checked before: made again at once, with the same arrays or with others like them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from cupaged.runtime.arguments import NULL, address_of, byte_bounds
from cupaged.runtime.source import KernelSource, asked_for, kernels_folder

__all__ = ["CheckedCall", "CheckedCalls", "Launcher", "PreparedLaunch", "remembered"]

KEPT_CALLS = 8
LOOK_SECONDS = 0.01  # an edited file is noticed this late at most: asking for eight files takes as long as a launch
VECTOR_BYTES = 16  # the strictest alignment that is checked


def _host_device() -> int:
    return 0


class Launcher(Protocol):
    """Makes one launch over and over; a backend's own. Whoever has it keeps the arrays that it was made with."""

    def __call__(self) -> None:
        """Launch with the values that it was made with."""

    def open_for(self, places: Sequence[int]) -> Callable[[Sequence[Any]], None]:
        """Return what launches with other arrays in these places of the values, in their order."""


@dataclass(frozen=True)
class PreparedLaunch:
    """A launch whose arguments were checked and typed; calling it launches and does nothing else.

    Attributes
    ----------
    source : KernelSource
        Of the kernel.
    launcher : Launcher
        Makes the launch.
    names : tuple of str
        The kernel's parameters.
    values : tuple
        What the kernel gets for each of them; arrays are held.
    device : int
        The device that was current, and must be at the launch.
    current_device : callable
        Returns the device that is current now.
    """

    source: KernelSource
    launcher: Launcher
    names: tuple[str, ...]
    values: tuple[Any, ...]
    device: int = 0
    current_device: Callable[[], int] = _host_device

    def __call__(self) -> None:
        """Launch; on the GPU, returns without waiting for it.

        Raises
        ------
        ValueError
            If another device is current.
        """
        if self.current_device() != self.device:
            raise ValueError(
                f"{self.source.entry} was prepared for device {self.device}; "
                f"the current device is {self.current_device()}"
            )
        self.launcher()


class CheckedCall:
    """A launch that passed its checks, open for other arrays that are like those that were checked."""

    def __init__(
        self,
        signature: tuple[Any, ...],
        launch: PreparedLaunch,
        arrays: Sequence[str],
        still_known: Callable[[], bool] | None = None,
        reaches: Sequence[tuple[int, int] | None] = (),
    ) -> None:
        self.signature = signature
        self._still_known, self._reaches = still_known, reaches
        self._source, self._device, self._current_device = launch.source, launch.device, launch.current_device
        given = {
            place: arrays.index(name)
            for place, (name, value) in enumerate(zip(launch.names, launch.values, strict=True))
            if name in arrays and value is not NULL
        }
        self._launch, self._order = launch.launcher.open_for(tuple(given)), tuple(given.values())
        self._held = [value for place, value in enumerate(launch.values) if place not in given]  # the launcher may not
        self._asked_for = asked_for()
        self._look_again = time.monotonic() + LOOK_SECONDS

    def launch(self, *arrays: Any) -> None:
        """Launch with these arrays, in the order of the names that it was made with; None where there was none."""
        self._launch([arrays[index] for index in self._order])

    def lies_apart(self, addresses: Sequence[int], memory: Sequence[tuple[int, int]], written: int | None) -> bool:
        """Whether what a call with arrays at these addresses writes overlaps nothing else; see `CheckedCalls.find`."""
        results = memory
        if written is not None:
            reach = self._reaches[written]
            if reach is None:
                return True
            low, high = addresses[written] + reach[0], addresses[written] + reach[1]
            results = ((low, high),)
            for begin, end in memory:
                if low < end and begin < high:
                    return False
        for at, reach in enumerate(self._reaches):
            if reach is not None and at != written:
                low, high = addresses[at] + reach[0], addresses[at] + reach[1]
                for begin, end in results:
                    if low < end and begin < high:
                        return False
        return True

    def is_current(self) -> bool:
        """Whether the same kernel, of an unchanged source, would be launched on the same device now.

        Files, the folder that CUPAGED_KERNELS names and what `still_known` says are looked at again after LOOK_SECONDS.
        """
        if self._current_device() != self._device or asked_for() != self._asked_for:
            return False
        now = time.monotonic()
        if now >= self._look_again:
            if self._source.folder != kernels_folder() or not self._source.is_unchanged():
                return False
            if self._still_known is not None and not self._still_known():
                return False
            self._look_again = now + LOOK_SECONDS
        return True


class CheckedCalls:
    """Calls that passed their checks, so that calls like them need none.

    What a call's checks go by is the values of its options, and of its arrays all but where they lie and what they
    hold. Whoever also checks the latter must do so for each call. The arrays themselves are not held.

    Threads may share it: of two calls that are added at once, one may be forgotten, and is checked again.

    Parameters
    ----------
    backend : {"cuda", "host"}
        Where the kernels run. Calls with arrays of another library than its own are not remembered.
    """

    def __init__(self, backend: str) -> None:
        self._calls: tuple[CheckedCall, ...] = ()
        self._kind = _kind_of_numpy if backend == "host" else _kind_of_cupy()

    def find(
        self,
        options: tuple[Any, ...],
        arrays: Sequence[Any],
        memory: Sequence[tuple[int, int]] = (),
        written: int | None = None,
    ) -> CheckedCall | None:
        """Return a call that passed the checks with the same options and with arrays like these, or None.

        Parameters
        ----------
        options, arrays
            What the checks go by.
        memory : sequence of (int, int)
            Addresses between which the call uses other memory, a cache's: it writes there, or, with `written`, reads.
        written : int, optional
            The place among `arrays` of the one that is written; None may stand there.

        Returns
        -------
        CheckedCall or None
            None also where what is written now overlaps what is read: the checks will name it.
        """
        if not self._calls:
            return None
        addresses: list[int] = []
        signature = self._signature(options, arrays, addresses)
        for call in self._calls:
            if call.signature == signature and call.is_current():
                return call if call.lies_apart(addresses, memory, written) else None
        return None

    def add(
        self,
        options: tuple[Any, ...],
        arrays: Sequence[Any],
        launch: PreparedLaunch,
        names: Sequence[str],
        still_known: Callable[[], bool] | None = None,
    ) -> None:
        """Remember a call that passed its checks.

        Parameters
        ----------
        options, arrays
            As `find` will get them.
        launch : PreparedLaunch
            What came of it.
        names : sequence of str
            The parameters that every call has arrays of its own for.
        still_known : callable, optional
            Asked every LOOK_SECONDS at most: whether a call like this one still needs no checks.
        """
        signature = self._signature(options, arrays, [])
        if signature is not None:
            reaches = tuple(map(_reach, arrays))
            call = CheckedCall(signature, launch, names, still_known, reaches)
            self._calls = (call, *self._calls[: KEPT_CALLS - 1])

    def _signature(
        self, options: tuple[Any, ...], arrays: Sequence[Any], addresses: list[int]
    ) -> tuple[Any, ...] | None:
        """Return what the checks go by, types first: only options of the same types can be compared safely.

        `addresses` receives where each array lies, 0 where there is none.
        """
        kind = self._kind
        kinds = [kind(array, addresses) for array in arrays]
        return None if False in kinds else (*map(type, options), options, kinds)


def remembered(name: str, backend: str) -> CheckedCalls:
    """Return the calls of a function that is told all its arrays: what one layer checked, the next layers launch."""
    known = _remembered.get((name, backend))
    return known if known is not None else _remembered.setdefault((name, backend), CheckedCalls(backend))


_remembered: dict[tuple[str, str], CheckedCalls] = {}


def _reach(array: Any) -> tuple[int, int] | None:
    """Return from where to where an array lies, seen from its first element; None if it holds nothing."""
    if array is None or array.size == 0:
        return None
    low, high = byte_bounds(array)
    start = address_of(array)
    return low - start, high - start


def _kind_of_numpy(array: Any, addresses: list[int]) -> Any:
    """Return what checks of an array, or None, go by; False if it is not NumPy's own. Note where it lies."""
    if type(array) is np.ndarray:
        address = array.ctypes.data
        addresses.append(address)
        return array.dtype, array.shape, array.strides, array.flags.writeable, address % VECTOR_BYTES
    addresses.append(0)
    return None if array is None else False


def _kind_of_cupy() -> Callable[[Any, list[int]], Any]:
    import cupy

    own = cupy.ndarray

    def kind(array: Any, addresses: list[int]) -> Any:
        if type(array) is own:
            memory = array.data
            address = memory.ptr
            addresses.append(address)
            return array.dtype, array.shape, array.strides, memory.device_id, address % VECTOR_BYTES
        addresses.append(0)
        return None if array is None else False

    return kind
