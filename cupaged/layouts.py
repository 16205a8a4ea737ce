"""Where a slot lies: the order of a cache's axes, and the strides that follow from it.

Kernels know no layout by name. They get strides: how many elements apart neighbouring blocks, heads, slots and packs
of dimensions are. Everything else here turns a cache of any layout into the dense order [block, slot, head, dim] and
back, for tests and for people.

======  ===========================================  ========================================================
layout  axes                                         idea
======  ===========================================  ========================================================
BSHD    block, slot, head, dim                       a token's heads lie together: one append is one long write
BHSD    block, head, slot, dim                       a head's tokens lie together within a block
HBSD    head, block, slot, dim                       each head has a pool of its own: easy to shard over GPUs
BS2HD   block, slot, key or value, head, dim         one array for both: a token is one run of bytes
BHDSX   K: block, head, dim / x, slot, x             vLLM's: neighbouring threads read 16 bytes (x elements) of
        V: block, head, dim, slot                    neighbouring tokens
======  ===========================================  ========================================================
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

from cupaged.axes import LAYOUTS, Kind, Layout
from cupaged.config import CacheConfig

__all__ = ["LAYOUTS", "KvStrides", "Layout", "axis_sizes", "from_dense", "kv_strides", "to_dense"]

DENSE_AXES = ("block", "slot", "head", "dim")


class KvStrides(NamedTuple):
    """Element strides of a key or value array, as the kernels take them.

    Attributes
    ----------
    block, head, slot : int
        Elements from one block, head or slot to the next.
    pack : int
        Elements from one pack of neighbouring dimensions to the next.
    pack_size : int
        Dimensions in a pack; the head dimension itself where all of them are neighbours.
    """

    block: int
    head: int
    slot: int
    pack: int
    pack_size: int


def axis_sizes(config: CacheConfig) -> dict[str, int]:
    """Return the size of every axis that a layout can have; "pack" times "lane" is "dim"."""
    lane = 16 // config.numpy_dtype.itemsize
    return {
        "block": config.num_blocks,
        "slot": config.block_size,
        "head": config.num_kv_heads,
        "dim": config.head_dim,
        "pack": config.head_dim // lane,
        "lane": lane,
        "kv": 2,
    }


def shape(config: CacheConfig, axes: Sequence[str]) -> tuple[int, ...]:
    """Return the shape of an array with these axes."""
    sizes = axis_sizes(config)
    return tuple(sizes[axis] for axis in axes)


@cache
def kv_strides(config: CacheConfig, kind: Kind) -> KvStrides:
    """Return the strides at which the kernels find a cache's keys or values."""
    layout = LAYOUTS[config.layout]
    axes = layout.key_axes if kind == "key" else layout.value_axes
    sizes = shape(config, axes)
    strides = {axis: math.prod(sizes[i + 1 :]) for i, axis in enumerate(axes)}
    if "pack" in strides and strides["pack"] != axis_sizes(config)["lane"]:
        pack, pack_size = strides["pack"], axis_sizes(config)["lane"]
    elif "dim" in strides and strides["dim"] != 1:
        pack, pack_size = strides["dim"], 1
    else:  # the dimensions are neighbours, whatever the axes are called
        pack, pack_size = config.head_dim, config.head_dim
    return KvStrides(strides["block"], strides["head"], strides["slot"], pack, pack_size)


def stride_arguments(
    key: KvStrides, value: KvStrides, axes: Sequence[str] = ("block", "head", "slot", "pack")
) -> dict[str, int]:
    """Return the stride parameters of a kernel over a cache; without "pack" where it takes whole rows only."""
    return {
        f"{kind}_{axis}_stride": getattr(strides, axis)
        for kind, strides in (("key", key), ("value", value))
        for axis in axes
    }


def to_dense(array: Any, layout: str, kind: Kind) -> Any:
    """Return a contiguous copy of a cache's key or value array in the order [block, slot, head, dim].

    Parameters
    ----------
    array : ndarray
        NumPy or CuPy, with the axes of `layout`; of a fused layout, the key's or the value's half.
    layout : str
        Its name.
    kind : {"key", "value"}
        Which of the two it is: they differ in BHDSX.

    Raises
    ------
    ValueError
        If `array` has the wrong number of axes.
    """
    axes = _checked_axes(array, layout, kind)
    if "pack" in axes:
        split = array.transpose([axes.index(axis) for axis in ("block", "slot", "head", "pack", "lane")])
        return split.reshape(*split.shape[:3], split.shape[3] * split.shape[4]).copy()
    return array.transpose([axes.index(axis) for axis in DENSE_AXES]).copy(order="C")


def from_dense(dense: Any, layout: str, kind: Kind) -> Any:
    """Return a contiguous copy of a dense array, [block, slot, head, dim], with the axes of `layout`.

    Raises
    ------
    ValueError
        If `dense` does not have four axes.
    """
    axes = LAYOUTS[layout].axes(kind)
    if dense.ndim != 4:
        raise ValueError(f"dense must have axes [block, slot, head, dim]; got shape {dense.shape}")
    if "pack" in axes:
        lane = 16 // dense.dtype.itemsize
        source = ("block", "slot", "head", "pack", "lane")
        split = dense.reshape(*dense.shape[:3], dense.shape[3] // lane, lane)
        return split.transpose([source.index(axis) for axis in axes]).copy(order="C")
    return dense.transpose([DENSE_AXES.index(axis) for axis in axes]).copy(order="C")


def take_blocks(array: Any, layout: str, kind: Kind, block_ids: Any) -> Any:
    """Return the listed blocks of a key or value array, in the dense order [block, slot, head, dim]."""
    axes = _checked_axes(array, layout, kind)
    return to_dense(array.take(block_ids, axis=axes.index("block")), layout, kind)


def _checked_axes(array: Any, layout: str, kind: Kind) -> tuple[str, ...]:
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}; got {layout!r}")
    axes = LAYOUTS[layout].axes(kind)
    if array.ndim != len(axes):
        raise ValueError(f"a {kind} array in {layout} must have axes {list(axes)}; got shape {array.shape}")
    return axes
