"""The orders that a cache's axes can have, by name; `cupaged.layouts` says what they are for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["LAYOUTS", "Kind", "Layout"]

Kind = Literal["key", "value"]


@dataclass(frozen=True)
class Layout:
    """A named order of axes; `fused` layouts keep keys and values in one array, along the axis "kv"."""

    name: str
    key_axes: tuple[str, ...]
    value_axes: tuple[str, ...]
    fused: bool = False

    def axes(self, kind: Kind) -> tuple[str, ...]:
        """Return the axes of the key's or the value's array; of a fused layout, without "kv"."""
        if kind not in ("key", "value"):
            raise ValueError(f"kind must be 'key' or 'value'; got {kind!r}")
        return tuple(axis for axis in (self.key_axes if kind == "key" else self.value_axes) if axis != "kv")


def _layout(name: str, key: str, value: str | None = None) -> Layout:
    key_axes, value_axes = tuple(key.split()), tuple((value or key).split())
    return Layout(name, key_axes, value_axes, fused="kv" in key_axes)


LAYOUTS = {
    layout.name: layout
    for layout in (
        _layout("BSHD", "block slot head dim"),
        _layout("BHSD", "block head slot dim"),
        _layout("HBSD", "head block slot dim"),
        _layout("BS2HD", "block slot kv head dim"),
        _layout("BHDSX", "block head pack slot lane", "block head dim slot"),
    )
}
