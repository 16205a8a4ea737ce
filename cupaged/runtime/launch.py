"""Launches whose arguments were checked, ready to be made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cupaged.runtime.source import KernelSource

__all__ = ["PreparedLaunch"]


def _host_device() -> int:
    return 0


@dataclass(frozen=True)
class PreparedLaunch:
    """A launch whose arguments were checked and typed; calling it launches and does nothing else.

    Attributes
    ----------
    source : KernelSource
        Of the kernel.
    run : callable
        Launches with the values that it is given.
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
    run: Callable[[tuple[Any, ...]], None]
    names: tuple[str, ...]
    values: tuple[Any, ...]
    device: int = 0
    current_device: Callable[[], int] = _host_device

    def __call__(self) -> None:
        """Launch; on the GPU, returns without waiting for it."""
        self.run(self.values)
