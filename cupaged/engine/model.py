"""A Llama whose attention goes through the toolkit; all else is a matrix product, a norm or a gate.

RMSNorm, rotary angles (RoPE) and SwiGLU are those of Touvron et al., "LLaMA: Open and Efficient Foundation Language
Models", arXiv 2302.13971. Residuals, norms and angles are float32; matrices are of the cache's type on the GPU, and
float32 on the host, where NumPy has no other products.

A layer is nine launches, as that is what a step of decoding, captured in a graph, is made of: norm, one product for
query, key and value, RoPE with the append, attention, a product added to the residual; norm, one product for gate and
up, SwiGLU, a product added to the residual.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cupaged import reference
from cupaged.attention.api import (
    DecodePlan,
    paged_attention,
    paged_prefill,
    plan_decode,
    plan_prefill,
    why_no_plan,
)
from cupaged.config import CacheConfig
from cupaged.engine.elementwise import rms_norm, swiglu
from cupaged.engine.products import add_product, product
from cupaged.engine.weights import Checkpoint
from cupaged.kv_cache import KVCache
from cupaged.ops.arrays import array_module
from cupaged.ops.cache import append_kv, frequencies, rope_append_kv

__all__ = ["Llama", "ModelInput"]

DENSE_LAYOUTS = ("BSHD", "BS2HD")  # whose keys and values are seen as [blocks, slots, heads, dim]
Attend = Callable[[Any, KVCache], Any]


@dataclass(frozen=True)
class ModelInput:
    """The tokens of one step, one sequence behind the other; arrays of the model's backend.

    Attributes
    ----------
    tokens, positions : int32 [total_tokens]
        Token ids, and where each stands in its sequence.
    slots : int32 or int64 [total_tokens]
        Where its keys and values go; -1 for a token that is only there to fill up a batch.
    block_tables : int32 [num_seqs, max_blocks]
    seq_lens : int32 [num_seqs]
        Tokens of each sequence, those of this step included; 0 for one that only fills up a batch.
    query_start : int32 [num_seqs + 1], optional
        Where each sequence's tokens begin. None: each sequence has one token.
    wanted : int32 [num_wanted], optional
        Tokens whose logits are wanted. None: all.
    """

    tokens: Any
    positions: Any
    slots: Any
    block_tables: Any
    seq_lens: Any
    query_start: Any = None
    wanted: Any = None


@dataclass(frozen=True)
class _Layer:
    """A layer's weights as products want them: [in features, out features], neighbours side by side."""

    attention_norm: Any
    query_key_value: Any
    output: Any
    mlp_norm: Any
    gate_up: Any
    down: Any


class Llama:
    """A Llama on one backend.

    Parameters
    ----------
    checkpoint : Checkpoint
        Shape and weights.
    backend : {"cuda", "host"}
        CuPy or NumPy.
    dtype : {"float32", "float16", "bfloat16"}
        What keys and values are stored in; on the GPU also what matrices are.
    use_reference : bool
        Compute with `cupaged.reference` instead of the kernels, on the host only, where it is faster.

    Attributes
    ----------
    attention_seconds : float
        Time spent in attention and appending; on the GPU only counted while `timing` is set.
    captures : bool
        Whether a step may be captured in a CUDA graph: on the GPU, until that was refused (`DecodeStep`).
    timing : bool
        Wait for the GPU before and after each attention, so that its time can be told from the rest's.
    """

    def __init__(self, checkpoint: Checkpoint, backend: str, dtype: str, *, use_reference: bool = False) -> None:
        if use_reference and backend != "host":
            raise ValueError(f"use_reference must be left out on the GPU, whose memory it does not read; got {backend}")
        config, xp = checkpoint.config, array_module(backend)
        self.config, self.backend, self.dtype, self.xp = config, backend, dtype, xp
        self.use_reference, self.timing = use_reference, False
        self.captures = backend == "cuda"
        self.attention_seconds = 0.0
        self.storage = CacheConfig(1, 1, config.num_kv_heads, config.head_dim, dtype).numpy_dtype
        self.compute = np.dtype(np.float32) if backend == "host" else self.storage

        def matrix(*weights: np.ndarray) -> Any:
            return xp.asarray(np.ascontiguousarray(np.concatenate(weights).T)).astype(self.compute, copy=False)

        self._layers = [
            _Layer(
                xp.asarray(layer.attention_norm),
                matrix(layer.query, layer.key, layer.value),
                matrix(layer.output),
                xp.asarray(layer.mlp_norm),
                matrix(layer.gate, layer.up),
                matrix(layer.down),
            )
            for layer in checkpoint.layers
        ]
        self._embedding = xp.asarray(checkpoint.embedding).astype(self.compute, copy=False)
        tied = checkpoint.unembedding is checkpoint.embedding
        self._unembedding = self._embedding.T if tied else matrix(checkpoint.unembedding)
        self._final_norm = xp.asarray(checkpoint.final_norm)
        if use_reference:
            angles = np.arange(config.max_tokens)[:, np.newaxis] * frequencies(config.head_dim, config.rope_base)
            self._cos, self._sin = (f(angles).astype(np.float32)[:, np.newaxis] for f in (np.cos, np.sin))

    def new_caches(
        self, num_blocks: int, block_size: int, layout: str = "BSHD", backend: str | None = None
    ) -> list[KVCache]:
        """Return a cache for each layer, on the model's backend if none is named."""
        config = CacheConfig(num_blocks, block_size, self.config.num_kv_heads, self.config.head_dim, self.dtype, layout)
        return [KVCache(config, backend or self.backend) for _ in self._layers]

    def forward(
        self,
        step: ModelInput,
        caches: Sequence[KVCache],
        plan: DecodePlan | None = None,
        *,
        validate: bool | None = None,
    ) -> Any:
        """Return the logits after some of a step's tokens, whose keys and values are written to the caches.

        Parameters
        ----------
        step : ModelInput
            The tokens.
        caches : sequence of KVCache
            One a layer.
        plan : DecodePlan, optional
            Made for the step's lengths, where each sequence has one token; without it the step plans for itself.
        validate : bool, optional
            As `cupaged.paged_attention` takes it.

        Returns
        -------
        float32 [num_wanted, vocab_size]
        """
        config, total = self.config, len(step.tokens)
        heads, kv_heads = config.num_heads, config.num_kv_heads
        attend = self._attention(step, caches[0], plan, validate)
        x = self._embedding[step.tokens].astype(np.float32)
        for layer, cache in zip(self._layers, caches, strict=True):
            rows = product(self._normed(x, layer.attention_norm), layer.query_key_value)
            rows = rows.astype(self.storage, copy=False).reshape(total, heads + 2 * kv_heads, config.head_dim)
            query, key, value = rows[:, :heads], rows[:, heads:-kv_heads], rows[:, -kv_heads:]
            out = self._timed(self._append_and_attend, step, attend, query, key, value, cache, validate)
            add_product(x, out.reshape(total, -1).astype(self.compute, copy=False), layer.output)
            gate_up = product(self._normed(x, layer.mlp_norm), layer.gate_up)
            add_product(x, self._gated(gate_up), layer.down)
        if step.wanted is not None:
            x = x[step.wanted]
        return product(self._normed(x, self._final_norm), self._unembedding, np.float32)

    def _normed(self, x: Any, weight: Any) -> Any:
        """Return RMSNorm of float32 features, as products take it."""
        if self.use_reference:
            return reference.rms_norm(x, weight, self.config.norm_eps, np.float32)
        return rms_norm(x, weight, self.config.norm_eps, self.compute)

    def _gated(self, gate_up: Any) -> Any:
        return reference.swiglu(gate_up, np.float32) if self.use_reference else swiglu(gate_up)

    def _append_and_attend(
        self,
        step: ModelInput,
        attend: Attend,
        query: Any,
        key: Any,
        value: Any,
        cache: KVCache,
        validate: bool | None,
    ) -> Any:
        if self.use_reference:
            cos, sin = self._cos[step.positions], self._sin[step.positions]
            query, key = (rotated(x, cos, sin).astype(self.storage) for x in (query, key))
            if cache.config.layout in DENSE_LAYOUTS:
                reference.append_kv(cache.key, cache.value, key, value, step.slots)
            else:
                append_kv(cache, key, np.ascontiguousarray(value), step.slots)
        else:
            query = rope_append_kv(
                cache, key, value, step.slots, step.positions,
                query=query, theta=self.config.rope_base, validate=validate,
            )  # fmt: skip
        return attend(query, cache)

    def _attention(self, step: ModelInput, cache: KVCache, plan: DecodePlan | None, validate: bool | None) -> Attend:
        """Return how every layer of this step attends: planned once, by the kernels that serve the cache."""
        tables, lens, starts = step.block_tables, step.seq_lens, step.query_start
        if self.use_reference:
            every = np.arange(len(lens) + 1) if starts is None else starts
            return lambda query, cache: reference.paged_prefill(query, cache, tables, lens, every, dtype=np.float32)
        heads, served = self.config.num_heads, why_no_plan(cache) is None
        if starts is None:
            decode = (plan or plan_decode(cache, lens, heads)) if served else None
            return lambda query, cache: paged_attention(query, cache, tables, lens, plan=decode, validate=validate)
        if served:
            prefill = plan_prefill(cache, lens, starts, len(step.tokens), heads)
            return lambda query, cache: paged_prefill(
                query, cache, tables, lens, starts, plan=prefill, validate=validate
            )
        # Where there is no prefill, each token is a sequence of its own, as long as it sees.
        rows = self.xp.asarray(np.repeat(np.arange(len(lens)), np.diff(reference.as_numpy(starts))))
        own_tables, own_lens = tables[rows], step.positions + np.int32(1)
        return lambda query, cache: paged_attention(query, cache, own_tables, own_lens, validate=validate)

    def _timed(self, work: Callable[..., Any], *arguments: Any) -> Any:
        wait = self.timing and self.backend == "cuda"
        if wait:
            self.xp.cuda.get_current_stream().synchronize()
        start = time.perf_counter()
        result = work(*arguments)
        if wait:
            self.xp.cuda.get_current_stream().synchronize()
        self.attention_seconds += time.perf_counter() - start
        return result


def rotated(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Turn dimension i of each head together with dimension i + D / 2.

    Parameters
    ----------
    x : ndarray, [tokens, heads, D]
    cos, sin : ndarray, float32 [tokens, 1, D / 2]
        Of each token's angles.

    Returns
    -------
    ndarray, float32 [tokens, heads, D]
    """
    first, second = np.split(x.astype(np.float32, copy=False), 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
