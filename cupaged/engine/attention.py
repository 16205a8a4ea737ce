"""PagedAttention as a model uses it: one call that finds room, shares prefixes, writes the cache and attends."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cupaged.attention.api import paged_attention, paged_prefill, why_no_prefill
from cupaged.config import CacheConfig
from cupaged.errors import UnsupportedError
from cupaged.kv_cache import KVCache
from cupaged.memory.manager import NO_PAIRS, BlockManager, Mark
from cupaged.ops.arrays import as_backend_array, like_caller
from cupaged.ops.blocks import copy_blocks
from cupaged.ops.cache import append_kv, checked_rows
from cupaged.ops.checks import check_cache, checked_scale, checked_softcap, checked_window
from cupaged.ops.overlap import check_apart
from cupaged.ops.streams import on_callers_streams
from cupaged.ops.swap import SwapEngine
from cupaged.runtime.captures import refuse_in_capture

__all__ = ["PagedAttention", "PagedStep"]

SeqId = Hashable


@dataclass
class Growth:
    """What a step made room for, to be taken back if it is not computed."""

    marks: list[Mark] = field(default_factory=list)
    admitted: list[SeqId] = field(default_factory=list)
    undone: bool = False

    def undo(self, manager: BlockManager) -> list[SeqId]:
        """Take it back, the last first; returns sequences that could not be brought back whole."""
        self.undone = True
        for name in reversed(self.admitted):
            if name in manager:
                manager.free(name, written=False)
        return manager.undo(self.marks)


@dataclass(frozen=True)
class PagedStep:
    """Where the rows of a step go and what they see; the same for every layer.

    Attributes
    ----------
    is_prompt : bool
        Whether sequences have rows of any number, or one each.
    copies : int32 [num_copies, 2]
        (source, destination) blocks, to be copied in every layer's cache before anything is written.
    slots : int64 [num_rows]
        Where each row's key and value go; -1 where they are there already.
    block_tables, seq_lens, query_start : int32 [num_seqs, max_blocks], [num_seqs], [num_seqs + 1]
        As `cupaged.paged_prefill` takes them.
    """

    is_prompt: bool
    copies: np.ndarray
    slots: np.ndarray
    block_tables: np.ndarray
    seq_lens: np.ndarray
    query_start: np.ndarray
    growth: Growth = field(default_factory=Growth, repr=False, compare=False)


class PagedAttention:
    """A layer's attention over a paged cache.

    Parameters
    ----------
    config : CacheConfig
        Of the layer's cache.
    manager : BlockManager, optional
        Which block holds which token; layers of one model share it. Without it one is made for the config.
    backend : {"cuda", "host"}, optional
        See `KVCache`.
    cache : KVCache, optional
        The layer's cache, of that config; one is made without it.
    swaps : SwapEngine, optional
        Makes the transfers of a manager with ``on_evict="offload"``, which needs one, over this cache and those of all
        other layers.
    scale, window, softcap, alibi_slopes, sinks
        As `cupaged.paged_attention` takes them, for every call.

    Attributes
    ----------
    cache : KVCache
    manager : BlockManager

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came.

    References
    ----------
    .. [1] Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention", SOSP 2023.
    """

    def __init__(
        self,
        config: CacheConfig,
        manager: BlockManager | None = None,
        backend: str | None = None,
        *,
        cache: KVCache | None = None,
        swaps: SwapEngine | None = None,
        scale: float | None = None,
        window: int | None = None,
        softcap: float | None = None,
        alibi_slopes: Any = None,
        sinks: Any = None,
    ) -> None:
        self.cache = KVCache(config, backend) if cache is None else cache
        check_cache(self.cache)
        if self.cache.config != config:
            raise ValueError(f"cache must be of the config; got {self.cache.config} and {config}")
        self.manager = BlockManager(config.num_blocks, block_size=config.block_size) if manager is None else manager
        if self.manager.block_size != config.block_size:
            raise ValueError(
                f"manager must have the cache's block size, {config.block_size}; got {self.manager.block_size}"
            )
        if self.manager.gpu.num_blocks > config.num_blocks:
            raise ValueError(
                f"manager must have no more blocks than the cache's {config.num_blocks}; "
                f"got {self.manager.gpu.num_blocks}"
            )
        if swaps is not None and not any(each is self.cache for each in swaps.caches):
            raise ValueError("swaps must be over this layer's cache among others: make the caches first, and pass them")
        if swaps is None and self.manager.gpu.on_evict is not None:
            raise ValueError('swaps must be given for a manager with on_evict="offload"')
        self.swaps = swaps
        scale, window, softcap = checked_scale(scale, config.head_dim), checked_window(window), checked_softcap(softcap)
        self.options = {
            "scale": scale, "window": window, "softcap": softcap, "alibi_slopes": alibi_slopes, "sinks": sinks,
        }  # fmt: skip

    @on_callers_streams
    def forward(
        self,
        query: Any,
        key: Any,
        value: Any,
        sequence_ids: Sequence[SeqId],
        is_prompt: bool,
        *,
        tokens: Sequence[Any] | None = None,
    ) -> Any:
        """Find room for new tokens, write their keys and values, and attend with their queries.

        Parameters
        ----------
        query : array, [num_rows, H, D]
            Rows of the sequences one behind the other: one each if they decode, any number if they are prompts.
        key, value : array, [num_rows, Hkv, D]
        sequence_ids : sequence of hashable
            The sequences, each once.
        is_prompt : bool
            Whether the rows are prompts, or further chunks of one prompt, or each a sequence's next token.
        tokens : sequence, optional
            Of prompts, for each sequence its token ids, int [num_tokens], by which prefixes are shared, or only their
            number; needed if there are several. A new prompt has a row for each token, or only for those that
            `BlockManager.cached_tokens` does not count: which, the number of rows says. When decoding, the token ids,
            int [num_seqs], by which filled blocks can be found.

        Returns
        -------
        array, [num_rows, H, D]
            Of the kind and dtype of `query`.

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what was expected and what came.
        OutOfBlocksError
            If there is no room; nothing has changed then.

        Notes
        -----
        A call that raises, whatever failed, looks as if it had never been made: no sequence is longer, no slot is
        taken, and no block can be found that was not written.
        """
        self._refuse_in_capture()
        self._check_rows(query, key, value)
        return self.attend(query, key, value, self.step(sequence_ids, is_prompt, query.shape[0], tokens=tokens))

    __call__ = forward

    def step(
        self, sequence_ids: Sequence[SeqId], is_prompt: bool, num_rows: int, *, tokens: Sequence[Any] | None = None
    ) -> PagedStep:
        """Find room for a step's tokens, once for all layers; parameters and errors are those of `forward`."""
        names = list(sequence_ids)
        if len(set(names)) != len(names):
            raise ValueError("sequence_ids must name each sequence once")
        growth = Growth()
        try:
            place = self._place_prompts if is_prompt else self._place_tokens
            step = place(names, num_rows, tokens, growth)
            self._make_moves()
        except BaseException as error:
            self._undo(growth, error)
            raise
        return step

    def undo(self, step: PagedStep) -> None:
        """Take a step back that will not be computed by all layers: no sequence is longer than before it.

        `attend` does so itself where it fails. No other step of these sequences may have been made since.
        """
        self._undo(step.growth)

    @on_callers_streams
    def attend(self, query: Any, key: Any, value: Any, step: PagedStep) -> Any:
        """Write a step's keys and values to this layer's cache, and attend with its queries.

        If that fails, the step is taken back for all layers, and must be asked for again.
        """
        if step.growth.undone:
            raise ValueError("step must not have been taken back, as it is once a layer failed; ask for a new one")
        try:
            return self._attend(query, key, value, step)
        except BaseException as error:
            self._undo(step.growth, error)
            raise

    def free(self, sequence_id: SeqId, *, written: bool = True) -> None:
        """Forget a sequence; see `BlockManager.free`."""
        self.manager.free(sequence_id, written=written)

    def _attend(self, query: Any, key: Any, value: Any, step: PagedStep) -> Any:
        cache, xp = self.cache, self.cache.xp
        self._refuse_in_capture()
        if len(step.copies):
            copy_blocks(cache, step.copies)
        append_kv(cache, key, value, xp.asarray(step.slots))
        tables, lens = xp.asarray(step.block_tables), xp.asarray(step.seq_lens)
        if not step.is_prompt:
            return paged_attention(query, cache, tables, lens, **self.options)
        if why_no_prefill(cache) is None:
            return paged_prefill(query, cache, tables, lens, xp.asarray(step.query_start), **self.options)
        return self._attend_one_by_one(query, step)

    def _undo(self, growth: Growth, error: BaseException | None = None) -> None:
        for name in growth.undo(self.manager):
            if error is not None:
                error.add_note(
                    f"sequence {name!r} was cut to {self.manager.num_tokens(name)} tokens: the block that its last "
                    "tokens were to be copied from was freed by its other readers"
                )

    def _place_prompts(
        self, names: list[SeqId], num_rows: int, tokens: Sequence[Any] | None, growth: Growth
    ) -> PagedStep:
        manager = self.manager
        if tokens is None:
            if len(names) != 1:
                raise ValueError(f"tokens must be given for several prompts; got {len(names)} sequences")
            tokens = [num_rows]
        if len(tokens) != len(names):
            raise ValueError(f"tokens must have an entry for each of {len(names)} sequences; got {len(tokens)}")
        counts = [int(text) if np.ndim(text) == 0 else len(text) for text in tokens]
        continued = [i for i, name in enumerate(names) if name in manager]
        if len(continued) > 1:  # so that a call without room changes nothing
            raise UnsupportedError(f"a call may continue one prompt; got {[names[i] for i in continued]}")
        fresh = [i for i in range(len(names)) if i not in continued]
        copies = NO_PAIRS
        starts = [0] * len(names)
        for i in fresh:
            manager.allocate(names[i], tokens[i])
            growth.admitted.append(names[i])
        cached = [0 if i in continued else manager.cached_tokens(names[i]) for i in range(len(names))]
        whole = sum(counts) == num_rows
        if not whole and sum(counts) - sum(cached) != num_rows:
            raise ValueError(
                f"query must have a row for each of {sum(counts)} tokens, or for the {sum(counts) - sum(cached)} "
                f"that are not cached; got {num_rows}"
            )
        for i in continued:
            starts[i] = manager.num_tokens(names[i])
            growth.marks = manager.mark([names[i]])
            copies = manager.append(names[i], tokens[i]).copies
        slots = []
        for name, start, count, there in zip(names, starts, counts, cached, strict=True):
            first = 0 if whole else there
            mine = manager.slots(name, start + first, start + count)
            mine[: there - first] = -1  # shared: others may be reading them
            slots.append(mine)
        rows = [len(mine) for mine in slots]
        return PagedStep(
            True, copies, np.concatenate([np.empty(0, np.int64), *slots]), manager.block_tables(names),
            manager.seq_lens(names), np.cumsum([0, *rows]).astype(np.int32), growth,
        )  # fmt: skip

    def _place_tokens(
        self, names: list[SeqId], num_rows: int, tokens: Sequence[Any] | None, growth: Growth
    ) -> PagedStep:
        manager = self.manager
        if num_rows != len(names):
            raise ValueError(f"query must have one row for each of {len(names)} sequences; got {num_rows}")
        text = None if tokens is None else np.asarray(tokens)
        growth.marks = manager.mark(names)
        slots, copies = manager.append_batch(names, text)
        starts = np.arange(len(names) + 1, dtype=np.int32)
        return PagedStep(False, copies, slots, manager.block_tables(names), manager.seq_lens(names), starts, growth)

    def _make_moves(self) -> None:
        """Move what the manager offloads and restores; what fails is left to the next call."""
        moves = self.manager.moves
        if self.swaps is not None:
            for move in moves.pending:
                (self.swaps.swap_out if move.kind == "out" else self.swaps.swap_in)(move.pairs)
                self.swaps.wait()
                moves.done([move])
            moves.done([])

    def _refuse_in_capture(self) -> None:
        what = "PagedAttention must be called, as each step uploads where its rows lie"
        refuse_in_capture(self.cache.backend, what)

    def _check_rows(self, query: Any, key: Any, value: Any) -> None:
        """Raise by name what would be refused once the tokens have their places."""
        config = self.cache.config
        query = checked_rows(self.cache, query, "query", "num_rows", "H")
        num_rows, num_heads, _ = query.shape
        key = checked_rows(self.cache, key, "key", num_rows, config.num_kv_heads)
        value = checked_rows(self.cache, value, "value", num_rows, config.num_kv_heads)
        check_apart({"cache": self.cache}, {"query": query, "key": key, "value": value})
        if num_heads % config.num_kv_heads:
            raise ValueError(
                f"query must have a multiple of the cache's {config.num_kv_heads} KV heads; got {num_heads}"
            )

    def _attend_one_by_one(self, query: Any, step: PagedStep) -> Any:
        """Attend with a prompt's tokens as with decode queries of sequences that end there."""
        rows = np.diff(step.query_start)
        seq = np.repeat(np.arange(len(rows)), rows)
        contexts = step.seq_lens[seq] - (step.query_start[1:][seq] - 1 - np.arange(len(seq)))
        xp = self.cache.xp
        given = as_backend_array(query, "query", self.cache.backend)
        tables, lens = xp.asarray(step.block_tables[seq]), xp.asarray(contexts.astype(np.int32))
        return like_caller(paged_attention(given, self.cache, tables, lens, **self.options), query)
