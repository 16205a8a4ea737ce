"""What a kernel of attention is: what it serves, as data that calls are held to, and how it answers a call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cupaged import layouts
from cupaged.attention.call import EVEN, AttentionCall
from cupaged.config import DTYPES, CacheConfig
from cupaged.kv_cache import KVCache
from cupaged.runtime.arguments import Strided
from cupaged.runtime.device import compute_capability
from cupaged.runtime.info import KernelInfo
from cupaged.runtime.launch import PreparedLaunch
from cupaged.runtime.select import load_kernel
from cupaged.runtime.source import C_TYPE_OF_DTYPE

__all__ = [
    "Kernel",
    "Launch",
    "Serves",
    "cache_arguments",
    "cache_defines",
    "keeps_rows_together",
    "load",
    "row_defines",
]


@dataclass(frozen=True)
class Serves:
    """What a kernel serves.

    Attributes
    ----------
    dtypes : tuple of str
        Types of the cache.
    head_dims, block_sizes : range
        Of the cache.
    whole_rows : bool
        Whether it needs a layout that keeps a token's row together.
    queries : frozenset of str
        How queries may belong to sequences, see `Pages.queries`.
    mask, logits : frozenset of str
        Those of `MASK_OPTIONS` and `LOGITS_OPTIONS` that it takes.
    shared_prefix : bool
        Whether it reads a shared prefix for all sequences at once; others read it for each.
    capability : int
        The least compute capability, ten times as CUDA writes it.
    """

    dtypes: tuple[str, ...] = tuple(DTYPES)
    head_dims: range = range(32, 257, 8)
    block_sizes: range = range(1, 257)
    whole_rows: bool = False
    queries: frozenset[str] = frozenset({EVEN})
    mask: frozenset[str] = frozenset()
    logits: frozenset[str] = frozenset()
    shared_prefix: bool = False
    capability: int = 0

    @property
    def variants(self) -> frozenset[str]:
        """What it takes besides plain decode."""
        return self.mask | self.logits

    def why_not_cache(self, kernel: str, cache: KVCache) -> str | None:
        """Return None if the cache is served where it lies, else what is not."""
        config = cache.config
        if cache.backend == "cuda" and compute_capability(cache.device) < self.capability:
            return f"{kernel} needs compute capability {self.capability // 10}.{self.capability % 10}"
        if config.dtype not in self.dtypes:
            return f"{kernel} takes {' or '.join(self.dtypes)}; the cache is {config.dtype}"
        if config.head_dim not in self.head_dims:
            step = self.head_dims.step
            return f"{kernel} takes a head_dim that is a multiple of {step}; the cache's is {config.head_dim}"
        if config.block_size not in self.block_sizes:
            return f"{kernel} takes a block size of {_span(self.block_sizes)}; the cache's is {config.block_size}"
        if self.whole_rows and not keeps_rows_together(config):
            return f"{kernel} takes layouts that keep a token's row together; {config.layout} does not"
        return None

    def why_not(self, kernel: str, call: AttentionCall) -> str | None:
        """Return None if the call is served, else what is not."""
        limit = self.why_not_cache(kernel, call.cache)
        if limit is not None:
            return limit
        if call.pages.queries not in self.queries:
            return f"{kernel} does not take {call.pages.queries}"
        missing = sorted(call.options - self.variants)
        return f"{kernel} does not take {' and '.join(missing)}" if missing else None

    def __str__(self) -> str:
        """Return it in words, as `cupaged.kernels` shows it."""
        packed = [name for name, layout in layouts.LAYOUTS.items() if "pack" in layout.key_axes]
        parts = [
            ", ".join(self.dtypes),
            f"D {_span(self.head_dims)}",
            f"block size {_span(self.block_sizes)}",
            "any group and length",
            f"all layouts but {', '.join(packed)}" if self.whole_rows else "any layout",
            ", ".join([*sorted(self.queries - {EVEN}), *sorted(self.variants)]),
            f"compute capability {self.capability // 10}.{self.capability % 10}" if self.capability else "",
        ]
        return "; ".join(part for part in parts if part)


def _span(numbers: range) -> str:
    steps = f" in steps of {numbers.step}" if numbers.step > 1 else ""
    return f"{numbers[0]} to {numbers[-1]}{steps}"


def keeps_rows_together(config: CacheConfig) -> bool:
    """Return whether all dimensions of a token and head are neighbours, of keys and of values."""
    return all(layouts.kv_strides(config, kind).pack_size == config.head_dim for kind in ("key", "value"))


@dataclass(frozen=True)
class Launch:
    """A launch to be made: calling it checks its arguments and launches."""

    kernel: Any
    grid: tuple[int, ...]
    block: tuple[int, ...]
    arguments: dict[str, Any] = field(repr=False)
    shared_bytes: int = 0

    def __call__(self) -> None:
        """Launch on CuPy's current stream."""
        self.kernel(self.grid, self.block, self.shared_bytes, **self.arguments)

    def prepared(self) -> PreparedLaunch:
        """Return it checked, to be launched as often as need be."""
        launch: PreparedLaunch = self.kernel.prepare(self.grid, self.block, self.shared_bytes, **self.arguments)
        return launch


class Kernel:
    """A kernel of attention.

    Attributes
    ----------
    info : KernelInfo
        Its name, file and idea; `info.serves` is the `Serves` that calls are held to.
    helpers : tuple of KernelInfo
        Kernels that it launches besides, and that answer no call by themselves.
    because : str
        Why it is taken where nobody names a kernel.
    takes_plan : bool
        Whether the work of a call is shared out by a plan, and one plan serves several calls.
    """

    info: KernelInfo
    helpers: tuple[KernelInfo, ...] = ()
    because: str = ""
    takes_plan: bool = False

    def why_not_cache(self, cache: KVCache) -> str | None:
        """Return None if the cache is served where it lies, else what is not."""
        limit: str | None = self.info.serves.why_not_cache(self.info.name, cache)
        return limit

    def why_not(self, call: AttentionCall) -> str | None:
        """Return None if the call is served, else what is not."""
        limit: str | None = self.info.serves.why_not(self.info.name, call)
        return self.why_not_cache(call.cache) if limit is None else limit

    def plan(self, call: AttentionCall) -> Any:
        """Return a plan for one call; None from a kernel that takes no plan."""
        return None

    def prepare(self, call: AttentionCall, plan: Any) -> Sequence[Launch]:
        """Return the launches that answer a call, in order; the call has queries, and room for its results."""
        raise NotImplementedError


def load(info: KernelInfo, defines: dict[str, object], backend: str) -> Any:
    """Return a kernel, specialised."""
    return load_kernel(info.file, info.name, defines, backend)


def row_defines(config: CacheConfig) -> dict[str, object]:
    """Return what a kernel that reads whole rows is specialised to."""
    return {
        "STORAGE": C_TYPE_OF_DTYPE[config.numpy_dtype],
        "HEAD_DIM": config.head_dim,
        "BLOCK_SIZE": config.block_size,
    }


def cache_defines(config: CacheConfig) -> dict[str, object]:
    """Return what a kernel that reads packs of dimensions is specialised to."""
    packs = {f"{kind.upper()}_PACK": layouts.kv_strides(config, kind).pack_size for kind in ("key", "value")}
    return {**row_defines(config), **packs}


def cache_arguments(call: AttentionCall, *, packs: bool = True) -> dict[str, Any]:
    """Return the parameters that all kernels of decode take; with `packs`, also the strides between packs."""
    key, value = layouts.kv_strides(call.config, "key"), layouts.kv_strides(call.config, "value")
    axes = ("block", "head", "slot", "pack") if packs else ("block", "head", "slot")
    return {
        "out": call.out,
        "lse": call.lse,
        "query": call.query,
        "key_cache": Strided(call.cache.key),
        "value_cache": Strided(call.cache.value),
        "block_tables": call.pages.block_tables,
        "seq_lens": call.pages.seq_lens,
        "scale": call.logits.scale,
        "group": call.group,
        "max_blocks": call.max_blocks,
        **layouts.stride_arguments(key, value, axes),
    }
