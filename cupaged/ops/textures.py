"""Texture objects over a cache: bound once, in one of three ways, and kept with it.

Linear and pitch-linear textures read the cache's own memory, so that the next launch sees what is appended to it. An
array is block-linear, which only the GPU can address: it is a copy, filled by surface writes when it is bound, and kept
up to date by whatever of `cupaged` appends, copies or scatters; after any other change, call `TextureView.refresh`.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache as remember
from typing import Any

import numpy as np

from cupaged import layouts
from cupaged.config import CacheConfig
from cupaged.errors import UnsupportedError, written
from cupaged.kv_cache import KVCache, aligned_zeros
from cupaged.ops.arrays import as_backend_array
from cupaged.ops.checks import check_cache, check_contiguous, check_dtype, check_shape, checked_flag
from cupaged.ops.streams import on_callers_streams
from cupaged.runtime.arguments import Strided
from cupaged.runtime.captures import refuse_in_capture
from cupaged.runtime.select import load_kernel
from cupaged.runtime.source import C_TYPE_OF_DTYPE, added_defines

__all__ = [
    "BINDINGS",
    "H100_LIMITS",
    "LOAD_PATHS",
    "TextureLimits",
    "TextureView",
    "bind_textures",
    "load_path",
    "refresh_blocks",
    "refresh_slots",
    "why_no_textures",
]

BINDINGS = ("linear", "pitch", "array")
# The paths of kernels_cu/include/load_path.cuh, and how a texture is bound for those that need one.
LOAD_PATHS = {
    "LOAD_PLAIN": None, "LOAD_READ_ONLY": None, "LOAD_NO_ALLOCATE": None, "LOAD_ASYNC_COPY": None,
    "TEXTURE_LINEAR": "linear", "TEXTURE_PITCH": "pitch", "TEXTURE_ARRAY": "array",
}  # fmt: skip
NO_TEXTURES: dict[str, Any] = {
    "key_texture": 0, "value_texture": 0, "key_textures": None, "value_textures": None, "tile_bits": 0,
    "first_key_texel": 0, "first_value_texel": 0, "head_rows": 0,
}  # fmt: skip
VECTOR_BYTES = 16
WRITE_THREADS = 256
ALL_BITS = 62  # of a coordinate, where there is one tile


@dataclass(frozen=True)
class TextureLimits:
    """What a device allows a texture object, in texels unless said otherwise; names as CUDA has them."""

    MaxTexture1DLinearWidth: int
    MaxTexture2DLinearWidth: int
    MaxTexture2DLinearHeight: int
    MaxTexture2DLinearPitch: int  # bytes
    TexturePitchAlignment: int  # bytes
    MaxTexture2DWidth: int
    MaxTexture2DHeight: int
    MaxSurface2DWidth: int
    MaxSurface2DHeight: int


H100_LIMITS = TextureLimits(2**28, 131072, 65000, 2097120, 32, 131072, 65536, 131072, 65536)  # the host backend's too


@remember
def _device_limits(device: int) -> TextureLimits:
    import cupy

    attributes = cupy.cuda.Device(device).attributes
    return TextureLimits(**{name: int(attributes[name]) for name in TextureLimits.__dataclass_fields__})


def _limits(cache: KVCache) -> TextureLimits:
    return H100_LIMITS if cache.backend == "host" else _device_limits(cache.device)


class HostTexture(ctypes.Structure):
    """The mirror of ``cupaged::HostTexture`` in runtime/host/texture.cuh; its address is the handle."""

    _fields_ = (
        ("memory", ctypes.c_void_p),
        ("pitch_bytes", ctypes.c_int64),
        ("width", ctypes.c_int32),
        ("height", ctypes.c_int32),
        ("texel_bytes", ctypes.c_int32),
        ("halves", ctypes.c_int32),
    )


def why_no_textures(config: CacheConfig) -> str | None:
    """Return None if textures can be bound to a cache of this shape, else what stands against it."""
    if any(layouts.kv_strides(config, kind).pack_size != config.head_dim for kind in ("key", "value")):
        return f"textures take layouts that keep a token's row together; {config.layout} does not"
    return None


def bind_textures(cache: KVCache, binding: str = "linear", *, floats: bool = False) -> TextureView:
    """Return the textures over a cache's keys and values; the same ones whenever they are asked for again.

    Parameters
    ----------
    cache : KVCache
        The cache.
    binding : {"linear", "pitch", "array"}
        Linear memory, for ``tex1Dfetch``; pitch-linear memory, a row of which is a KV block (in HBSD a head's part of
        one); or a block-linear array with the slot along x and the row's vectors along y.
    floats : bool
        Whether the texture units turn half precision into floats, four to a texel; else a texel is 16 bytes as they
        are.

    Raises
    ------
    ValueError
        If there is no such binding.
    UnsupportedError
        If the layout, the dtype or a limit of the device does not allow it; the message names it. What is only too
        long for one texture object is tiled over several.
    """
    check_cache(cache)
    if not isinstance(binding, str):
        raise TypeError(f"binding must be a name; got {type(binding).__name__} {written(binding)}")
    if binding not in BINDINGS:
        raise ValueError(f"binding must be one of {', '.join(BINDINGS)}; got {binding!r}")
    floats = checked_flag(floats, "floats")
    key = binding, floats
    if key not in cache.textures:
        refuse_in_capture(cache.backend, "bind_textures must be called for this cache once before")
        cache.textures.setdefault(key, TextureView(cache, binding, floats))
    return cache.textures[key]


def load_path(cache: KVCache) -> tuple[dict[str, object], dict[str, Any]]:
    """Return the defines and the arguments of a kernel that includes ``load_path.cuh``, for a cache.

    The path is that of ``kernels_defining(LOAD_PATH=..., TEXEL_FLOATS=...)`` around the caller; without it, a texture
    over linear memory.

    Raises
    ------
    ValueError
        If there is no such path; besides, what `bind_textures` raises.
    """
    asked = added_defines()
    path, floats = asked.get("LOAD_PATH", "TEXTURE_LINEAR"), asked.get("TEXEL_FLOATS", "0") == "1"
    if path not in LOAD_PATHS:
        raise ValueError(f"LOAD_PATH must be one of {', '.join(LOAD_PATHS)}; got {path!r}")
    binding, tiles, arguments = LOAD_PATHS[path], 1, NO_TEXTURES
    if binding is not None:
        view = bind_textures(cache, binding, floats=floats)
        tiles, arguments = view.tiles, view.arguments
    return {"LOAD_PATH": path, "TEXEL_FLOATS": int(floats), "TEXTURE_TILES": tiles}, arguments


def refresh_slots(cache: KVCache, slot_mapping: Any) -> None:
    """Write what the slots hold by now to the arrays that textures read, where there are any."""
    for view in cache.textures.values():
        view.refresh(slot_mapping)


def refresh_blocks(cache: KVCache, block_ids: Any) -> None:
    """The same for all slots of some blocks, int32 on the cache's backend."""
    if cache.textures:
        size = cache.config.block_size
        within = cache.xp.arange(size, dtype=block_ids.dtype)
        refresh_slots(cache, (block_ids[:, None] * size + within).reshape(-1))


class TextureView:
    """The texture objects over one cache, by `bind_textures`.

    Attributes
    ----------
    binding, floats
        As asked for.
    tiles : int
        Texture objects that the keys take, and the values.
    arguments : dict
        What kernels that include ``load_path.cuh`` take, by the parameter's name.
    """

    def __init__(self, cache: KVCache, binding: str, floats: bool) -> None:
        limit = why_no_textures(cache.config)
        if limit is None and floats and cache.config.dtype == "bfloat16":
            limit = "texels of floats take float16 or float32, which texture units know; the cache is bfloat16"
        if limit is not None:
            raise UnsupportedError(limit)
        self.binding, self.floats = binding, floats
        self._config, self._backend, self._xp = cache.config, cache.backend, cache.xp
        self._key, self._value, self._storage = cache.key, cache.value, cache.storage
        self._texel_bytes = 4 * cache.config.numpy_dtype.itemsize if floats else VECTOR_BYTES
        self._kept: list[Any] = []  # what the handles refer to
        self._surfaces: list[Any] = []
        bind = {"linear": self._bind_linear, "pitch": self._bind_pitch, "array": self._bind_array}[binding]
        bits, handles = bind(_limits(cache))
        self.tiles = len(handles[0])
        fused = len(self._storage) == 1
        tables = [self._table(each) if self.tiles > 1 else None for each in handles]
        in_row = self._config.num_kv_heads * self._config.head_dim * self._config.numpy_dtype.itemsize
        self.arguments: dict[str, Any] = {
            "key_texture": handles[0][0],
            "value_texture": handles[-1][0],
            "key_textures": tables[0],
            "value_textures": tables[-1],
            "tile_bits": bits,
            "first_key_texel": 0,
            "first_value_texel": in_row // self._texel_bytes if fused and binding != "array" else 0,
            "head_rows": self._rows()[2] if binding == "pitch" else 0,
        }
        self.refresh()

    @on_callers_streams
    def refresh(self, slot_mapping: Any = None) -> None:
        """Copy the cache, or the slots of a slot mapping, to the arrays; does nothing where there are none.

        Parameters
        ----------
        slot_mapping : array, int32 or int64 [num_tokens], optional
            Slots to copy, -1 skips; as `cupaged.append_kv` takes it.
        """
        if not self._surfaces:
            return
        config = self._config
        if slot_mapping is not None:
            slot_mapping = as_backend_array(slot_mapping, "slot_mapping", self._backend)
            check_dtype(slot_mapping, "slot_mapping", np.dtype(np.int32), np.dtype(np.int64))
            check_shape(slot_mapping, "slot_mapping", ("num_tokens",))
            check_contiguous(slot_mapping, "slot_mapping")
        tokens = config.num_slots if slot_mapping is None else len(slot_mapping)
        if not tokens:
            return
        kernel = load_kernel(
            "cache/write_texture.cu",
            "write_texture",
            {
                "STORAGE": C_TYPE_OF_DTYPE[config.numpy_dtype],
                "SLOT": "int" if slot_mapping is None else C_TYPE_OF_DTYPE[slot_mapping.dtype],
                "HEAD_DIM": config.head_dim,
                "BLOCK_SIZE": config.block_size,
                "TEXEL_BYTES": self._texel_bytes,
            },
            self._backend,
        )
        threads = tokens * config.bytes_per_token // 2 // self._texel_bytes
        kinds: tuple[Any, ...] = (("key", self._key), ("value", self._value))
        for (kind, array), surfaces in zip(kinds, self._surfaces, strict=True):
            strides = layouts.kv_strides(config, kind)
            kernel(
                (-(-threads // WRITE_THREADS),),
                (WRITE_THREADS,),
                surfaces=surfaces,
                cache=Strided(array),
                slot_mapping=slot_mapping,
                num_tokens=tokens,
                num_kv_heads=config.num_kv_heads,
                tile_bits=self.arguments["tile_bits"],
                block_stride=strides.block,
                head_stride=strides.head,
                slot_stride=strides.slot,
            )

    # --- the three bindings: the bits of a coordinate within a tile, and handles of keys and values (or of both) ----

    def _bind_linear(self, limits: TextureLimits) -> tuple[int, list[list[int]]]:
        bits, most = _tile(self._storage[0].nbytes // self._texel_bytes, limits.MaxTexture1DLinearWidth)
        step = most * self._texel_bytes
        return bits, [
            [
                self._texture(memory[i : i + step], min(step, len(memory) - i) // self._texel_bytes, 1, 0)
                for i in range(0, len(memory), step)
            ]
            for memory in map(_bytes_of, self._storage)
        ]

    def _bind_pitch(self, limits: TextureLimits) -> tuple[int, list[list[int]]]:
        pitch, rows, _ = self._rows()
        width = pitch // self._texel_bytes
        of_block = f"a KV block of {self._config.block_size} tokens is a row of"
        _check_limit(limits, "MaxTexture2DLinearWidth", width, f"{of_block} {width} texels")
        _check_limit(limits, "MaxTexture2DLinearPitch", pitch, f"{of_block} {pitch} bytes")
        if pitch % limits.TexturePitchAlignment:
            raise UnsupportedError(
                f"a pitch-linear texture takes rows of a multiple of {limits.TexturePitchAlignment} bytes "
                f"(TexturePitchAlignment); {of_block} {pitch}"
            )
        bits, most = _tile(rows, limits.MaxTexture2DLinearHeight)
        return bits, [
            [
                self._texture(memory[i * pitch : (i + most) * pitch], width, min(most, rows - i), pitch)
                for i in range(0, rows, most)
            ]
            for memory in map(_bytes_of, self._storage)
        ]

    def _bind_array(self, limits: TextureLimits) -> tuple[int, list[list[int]]]:
        config = self._config
        slots, height = config.num_slots, config.bytes_per_token // 2 // self._texel_bytes
        for name in ("MaxTexture2DHeight", "MaxSurface2DHeight"):
            _check_limit(limits, name, height, f"a token's row of {config.num_kv_heads} heads has {height} texels")
        bits, most = _tile(slots, min(limits.MaxTexture2DWidth, limits.MaxSurface2DWidth))
        handles = []
        for _ in "kv":
            pairs = [self._array(min(most, slots - i), height) for i in range(0, slots, most)]
            handles.append([texture for texture, _ in pairs])
            self._surfaces.append(self._table([surface for _, surface in pairs]))
        return bits, handles

    def _rows(self) -> tuple[int, int, int]:
        """Return the bytes of a pitch-linear row, how many there are, and how many lie between a head and the next."""
        strides, itemsize = layouts.kv_strides(self._config, "key"), self._config.numpy_dtype.itemsize
        pitch = strides.block * itemsize
        head_rows = strides.head // strides.block  # 0 where the heads of a block share its row
        return pitch, self._storage[0].nbytes // pitch, head_rows

    # --- texture objects ------------------------------------------------------------------------------------------

    def _texture(self, memory: Any, width: int, height: int, pitch: int) -> int:
        """Return a handle to a texture over linear (pitch 0) or pitch-linear memory, a flat array of bytes."""
        if self._backend == "host":
            return self._host_texture(memory, width, height, pitch)
        from cupy.cuda import runtime, texture

        if pitch:
            resource = texture.ResourceDescriptor(
                runtime.cudaResourceTypePitch2D, arr=memory, chDesc=self._format(), width=width, height=height,
                pitchInBytes=pitch,
            )  # fmt: skip
        else:
            resource = texture.ResourceDescriptor(
                runtime.cudaResourceTypeLinear, arr=memory, chDesc=self._format(), sizeInBytes=memory.nbytes
            )
        return self._texture_object(resource)

    def _array(self, width: int, height: int) -> tuple[int, int]:
        """Return handles to a texture and a surface over a new two-dimensional array."""
        if self._backend == "host":
            pitch = width * self._texel_bytes
            handle = self._host_texture(aligned_zeros((height * pitch,), np.dtype(np.uint8)), width, height, pitch)
            return handle, handle
        from cupy.cuda import runtime, texture

        array = texture.CUDAarray(self._format(), width, height, 0, runtime.cudaArraySurfaceLoadStore)
        resource = texture.ResourceDescriptor(runtime.cudaResourceTypeArray, cuArr=array)
        surface = texture.SurfaceObject(resource)
        self._kept.append(surface)
        return self._texture_object(resource), int(surface.ptr)

    def _texture_object(self, resource: Any) -> int:
        from cupy.cuda import runtime, texture

        outside = (runtime.cudaAddressModeBorder,) * 2
        description = texture.TextureDescriptor(outside, runtime.cudaFilterModePoint, runtime.cudaReadModeElementType)
        made = texture.TextureObject(resource, description)
        self._kept.append(made)
        return int(made.ptr)

    def _host_texture(self, memory: np.ndarray, width: int, height: int, pitch: int) -> int:
        halves = self.floats and self._config.dtype == "float16"
        made = HostTexture(memory.ctypes.data, pitch, width, height, self._texel_bytes, halves)
        self._kept += [memory, made]
        return ctypes.addressof(made)

    def _format(self) -> Any:
        """Return four channels: of the storage type where texels are floats, else of integers."""
        from cupy.cuda import runtime, texture

        bits = 2 * self._texel_bytes
        kind = runtime.cudaChannelFormatKindFloat if self.floats else runtime.cudaChannelFormatKindUnsigned
        return texture.ChannelFormatDescriptor(bits, bits, bits, bits, kind)

    def _table(self, handles: list[int]) -> Any:
        return self._xp.asarray(np.array(handles, dtype=np.uint64))


def _tile(count: int, limit: int) -> tuple[int, int]:
    """Return how many of `count` texels or rows a texture object takes, as bits of a coordinate and as a number.

    They are all, or the largest power of two up to `limit`.
    """
    if count <= limit:
        return ALL_BITS, count
    bits = limit.bit_length() - 1
    return bits, 1 << bits


def _check_limit(limits: TextureLimits, name: str, value: int, what: str) -> None:
    limit = getattr(limits, name)
    if value > limit:
        raise UnsupportedError(f"this device allows a texture a {name} of {limit}; {what}")


def _bytes_of(array: Any) -> Any:
    return array.reshape(-1).view(np.uint8)
