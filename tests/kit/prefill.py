"""Prefill cases under hostile conditions: decode cases whose sequences have new tokens of different numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tests.kit.cases import DecodeCase, DecodeShape, decode_case

TENSOR_CORE_DIMS = (64, 96, 128, 192, 256)


@dataclass(frozen=True)
class PrefillShape:
    """What a prefill case looks like; its name is the test's.

    `decode` says all but the new tokens; its query tokens are how many of each sequence may look through a window.
    """

    decode: DecodeShape
    new_tokens: tuple[int, ...]
    causal: bool = True
    scale: float | None = None

    def __str__(self):
        new = "+".join(map(str, self.new_tokens[:4]))
        return f"{self.decode}-new{new}" + ("" if self.causal else "-full")


@dataclass
class PrefillCase:
    """Arguments of a prefill call, on the backend: `arguments` by position, `options` by name."""

    shape: PrefillShape
    decode: DecodeCase
    query: object
    query_start: object
    options: dict

    @property
    def arguments(self):
        return self.query, self.decode.cache, self.decode.block_tables, self.decode.seq_lens, self.query_start


def prefill_case(shape: PrefillShape, backend: str, seed: int = 0, placement: int | None = None) -> PrefillCase:
    """Build a case; tokens that no query sees are NaN and their blocks' ids illegal, as in `decode_case`."""
    decode = decode_case(shape.decode, backend, seed, placement)
    config, xp = decode.cache.config, decode.cache.xp
    starts = np.cumsum([0, *shape.new_tokens]).astype(np.int32)
    rng = np.random.default_rng([2, seed])
    rows = (int(starts[-1]), shape.decode.num_heads, config.head_dim)
    query = (shape.decode.spread * rng.standard_normal(rows)).astype(config.numpy_dtype)
    options = {**decode.variants, "causal": shape.causal}
    if shape.scale is not None:
        options["scale"] = shape.scale
    return PrefillCase(shape, decode, xp.asarray(query), xp.asarray(starts), options)


def random_prefill_shape(seed: int, specialisations: int) -> PrefillShape:
    """Return a shape that paged_prefill serves; what is compiled comes from a list of `specialisations` entries."""
    compiled = np.random.default_rng([3, seed % specialisations])
    asked = {name for name in ("window", "softcap", "alibi", "sinks") if compiled.random() < 0.3}
    causal = bool(compiled.random() < 0.8)
    if not causal:
        asked.discard("window")
    block_size = int(compiled.choice([1, 2, 7, 8, 16, 16, 24, 32, 64, 100, 128, 256]))
    layout = str(compiled.choice(["BSHD", "BHSD", "HBSD", "BS2HD"]))
    tall = bool(compiled.random() < 0.5)  # rows enough for the shape that tiles have with many
    group = int(compiled.choice([1, 2, 3, 4, 5, 7, 8]))

    rng = np.random.default_rng([4, seed])
    kv_heads = int(rng.integers(1, 4))
    count = int(rng.integers(1, 5))
    lens, new_tokens = [], []
    for _ in range(count):
        most = int(rng.choice([1, 2, 3, 8] if not tall else [1, 20, 70, 100, 130]))
        new = int(rng.integers(0, most + 1)) if rng.random() < 0.5 else most
        prefix = int(rng.choice([0, 1, block_size - 1, block_size, block_size + 1, rng.integers(0, 300)]))
        lens.append(new + prefix if rng.random() < 0.95 else new // 2)
        new_tokens.append(new)
    unseen = max(new_tokens)
    return PrefillShape(
        DecodeShape(
            seq_lens=tuple(lens),
            num_heads=kv_heads * group,
            num_kv_heads=kv_heads,
            head_dim=int(TENSOR_CORE_DIMS[seed % specialisations % 5]),
            block_size=block_size,
            dtype=["float16", "bfloat16"][seed % specialisations % 2],
            layout=layout,
            unmapped=float(rng.choice([0.0, 0.0, 0.3])),
            spread=float(rng.choice([0.3, 1.0, 2.0])),
            query_tokens=max(1, unseen) if "window" in asked else None,
            window=int(rng.choice([1, 2, 63, 64, 65, block_size, rng.integers(1, 300)])) if "window" in asked else None,
            softcap=float(rng.choice([0.5, 5.0, 30.0])) if "softcap" in asked else None,
            alibi="alibi" in asked,
            sinks="sinks" in asked,
        ),
        tuple(new_tokens),
        causal,
        None if rng.random() < 0.8 else float(rng.choice([-0.1, 0.0, 0.3])),
    )
