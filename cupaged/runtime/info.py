"""What a kernel is, for whoever lists kernels: name, file, idea, and what it serves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["KernelInfo"]


@dataclass(frozen=True)
class KernelInfo:
    """One kernel of the toolkit.

    Attributes
    ----------
    name : str
        What ``kernel=`` takes; also the entry point.
    file : str
        The .cu file, under ``kernels_cu``.
    idea : str
        What it adds over the one before it.
    serves : object
        What it serves: a `cupaged.attention.kernel.Serves` where calls are held to it, else words.
    rounds_weights : bool
        Whether it rounds the softmax's weights to the storage type, as tensor cores want them.
    """

    name: str
    file: str
    idea: str
    serves: Any
    rounds_weights: bool = False

    @property
    def constraints(self) -> str:
        """What it serves, in words."""
        return str(self.serves)

    @property
    def variants(self) -> frozenset[str]:
        """What an attention kernel takes besides plain decode, of `cupaged.attention.call.ALL_VARIANTS`."""
        found: frozenset[str] = getattr(self.serves, "variants", frozenset())
        return found
