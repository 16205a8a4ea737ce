"""Which block holds which token: admit, append, fork, free and swap sequences over a GPU and a CPU pool.

Every operation reads the same way: find out how many blocks it needs, make sure that they can be had, and only then
change anything. What cannot be satisfied raises `OutOfBlocksError` and leaves the manager as it was.

The manager moves no bytes. What must be moved is in `BlockManager.moves`, in order; `cupaged.memory.moves` says how to
work through it. A program of one thread may instead move what each call returns, right after the call: the (src, dst)
copies of copy-on-write from `append`, the pairs of a swap from `swap_out` and `swap_in`, and before these, with
``on_evict="offload"``, what `take_transfers` returns. A background evictor may run beside it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cupaged.errors import OutOfBlocksError
from cupaged.kinds import check_unmasked, holds_integers
from cupaged.memory.allocator import INT32, whole_number
from cupaged.memory.block_table import ONE, BlockTables, Ids, Rows
from cupaged.memory.counters import Counters
from cupaged.memory.eviction import BlockStats, EvictionPolicy
from cupaged.memory.moves import Move, MoveList, Transfer
from cupaged.memory.pool import NO_BLOCKS, BlockPool
from cupaged.memory.prefix_cache import ExtraKeys, Transcripts, chain, root_digest

__all__ = ["Appended", "Batch", "BlockManager", "Mark", "Transfer"]

SeqId = Hashable
Slots = NDArray[np.int64]
Pairs = NDArray[np.int32]

NO_PAIRS: Pairs = np.empty((0, 2), np.int32)
NO_PAIRS.flags.writeable = False
NONE = np.array(0)


class Appended(NamedTuple):
    """What an append asks for: copy blocks ``copies[:, 0]`` to ``copies[:, 1]``, then write new tokens to `slots`."""

    slots: Slots
    """int64 [num_tokens]: ``block id * block_size + offset`` of each new token."""
    copies: Pairs
    """int32 [num_copies, 2]: (source, destination) blocks."""


@dataclass(slots=True)
class SequenceState:
    """What the arrays of `BlockTables` and `Transcripts` do not say about a sequence."""

    row: int
    num_cached: int  # tokens that a cached prefix held when it was admitted
    num_published: int  # leading blocks that can be found by others, as far as we are concerned
    publishes: bool  # whether blocks are published as soon as they are full
    placed: tuple[int, int]  # the positions that the last call for it alone made room for
    cpu_blocks: Ids | None = None  # where it lies while it is swapped out,
    cpu_tokens: int = 0  # and how long it is
    left_blocks: Ids | None = None  # GPU blocks that it had before it was swapped out


@dataclass(slots=True)
class Mark:
    """Where a sequence stood before it grew; see `BlockManager.mark`."""

    seq_id: SeqId
    num_tokens: int
    room: int  # as in `BlockTables`, with its sign
    tail: int  # its last block
    num_published: int
    placed: tuple[int, int]
    text: tuple[int, int, NDArray[np.int32]]  # as `Transcripts.mark` returns it


class Batch:
    """Sequences that take steps together; made by `BlockManager.batch`, which looks their rows up once."""

    __slots__ = ("epoch", "rows", "seq_ids")

    def __init__(self, seq_ids: tuple[SeqId, ...], rows: Rows, epoch: int) -> None:
        self.seq_ids = seq_ids
        self.rows = rows
        self.epoch = epoch

    def __len__(self) -> int:
        """Return the number of sequences."""
        return len(self.seq_ids)


class BlockManager:
    """The memory manager: sequences, their blocks, and what they share.

    All public methods are safe to call from several threads.

    Parameters
    ----------
    num_gpu_blocks, num_cpu_blocks : int
        Sizes of the two pools. Kernels read GPU blocks; CPU blocks hold what was swapped out or offloaded.
    block_size : int
        Token slots in a block.
    order, seed
        The order in which free blocks are handed out; see `BlockAllocator`.
    eviction : {"lru", "fifo", "lfu", "priority", "cost"} or callable
        Which cached block goes first; a callable makes a policy from the pool's `BlockStats`.
    on_evict : {"drop", "offload"}
        What happens to the content of an evicted GPU block: it is computed again when it is wanted again, or it moves
        to the CPU pool, if there is room, and is restored.
    prefix_caching : bool
        Whether full blocks can be found by later prompts.
    salt : bytes, str or int
        Separates this manager's names from those of any other salt.
    bytes_per_block : int
        Keys and values of a block over all layers; metrics count swapped bytes with it.
    max_seqs, max_blocks_per_seq : int
        Rows and columns of the dense block table to start with; they double when they run out.

    Attributes
    ----------
    gpu, cpu : BlockPool
        The pools.
    tables : BlockTables
        The block tables, whose dense form kernels index.
    counters : Counters
        What was counted so far.
    moves : MoveList
        What must be moved, in order, whichever thread asked for it.
    """

    def __init__(
        self,
        num_gpu_blocks: int,
        num_cpu_blocks: int = 0,
        block_size: int = 16,
        *,
        order: str = "lifo",
        seed: int = 0,
        eviction: str | Callable[[BlockStats], EvictionPolicy] = "lru",
        on_evict: str = "drop",
        prefix_caching: bool = True,
        salt: str | bytes | int = b"",
        bytes_per_block: int = 0,
        max_seqs: int = 256,
        max_blocks_per_seq: int = 128,
    ) -> None:
        if on_evict not in ("drop", "offload"):
            raise ValueError(f'on_evict must be "drop" or "offload", got {on_evict!r}')
        self.block_size = whole_number("block_size", block_size, at_least=1)
        self.gpu = BlockPool(whole_number("num_gpu_blocks", num_gpu_blocks, 0), block_size, order, seed, eviction)
        self.cpu = BlockPool(whole_number("num_cpu_blocks", num_cpu_blocks, 0), block_size)
        self.tables = BlockTables(block_size, max_seqs, max_blocks_per_seq)
        self.counters = Counters()
        self.bytes_per_block = whole_number("bytes_per_block", bytes_per_block, 0)
        self.prefix_caching = prefix_caching
        self.lock = threading.RLock()
        self._salt = salt
        self._no_extra = root_digest(block_size, salt)
        self._transcripts = Transcripts(block_size, max_seqs)
        self._sequences: dict[SeqId, SequenceState] = {}
        self.moves = MoveList(self.lock, self.cpu.release)
        self._offloads = on_evict == "offload"
        self._epoch = 0  # grows whenever a sequence may have lost its row, or the row its blocks
        if self._offloads:
            self.gpu.on_evict = self._offload

    # ---- admit and release ------------------------------------------------------------------------------------------

    def can_allocate(self, tokens: int | ArrayLike, *, extra: ExtraKeys = ()) -> bool:
        """Return whether `allocate` would find the blocks that it needs."""
        num_tokens, text = self._text("tokens", tokens)
        digests = self._names(text, self._root(extra))
        with self.lock:
            hits, _ = self._match(digests, num_tokens)
            return self._can_take(self._num_blocks(num_tokens) - len(hits), besides=hits)

    def allocate(
        self,
        seq_id: SeqId,
        tokens: int | ArrayLike,
        *,
        extra: ExtraKeys = (),
        priority: int = 0,
        publish: bool = True,
        readmitted: bool = False,
    ) -> Ids:
        """Admit a sequence with its prompt, and share the longest prefix of it that is cached.

        At least one token of the prompt is left to compute, even if all of it is cached: a model needs a query to
        answer. `cached_tokens` tells how many need not be computed.

        Parameters
        ----------
        seq_id : hashable
            The sequence's name, not in use.
        tokens : int or int [num_tokens]
            Token ids, in the range of int32, or only their number. An int32 array is the fastest form.
        extra : list or tuple of str, bytes or int
            What the keys and values depend on besides tokens; see `root_digest`.
        priority : int
            What the sequence is worth: under pressure the lowest gives way first.
        publish : bool
            Whether the blocks can be found by the next `allocate` at once, as is right when prompts are computed in
            the order of their admission. With False, say by `publish` which of them have been computed.
        readmitted : bool
            Whether the sequence was here before and gave way. What it finds again of its own is no hit: counters, and
            so the hit rate, leave it out.

        Returns
        -------
        int32 [num_blocks]
            The sequence's blocks, shared ones first.

        Raises
        ------
        OutOfBlocksError
            If the blocks that it must have for itself are not to be had.
        """
        num_tokens, text = self._text("tokens", tokens)
        root = self._root(extra)
        digests = self._names(text, root)
        priority = _int32("priority", priority)
        with self.lock:
            self._check_new("seq_id", seq_id)
            hits, on_cpu = self._match(digests, num_tokens)
            num_fresh = self._num_blocks(num_tokens) - len(hits)
            self.gpu.require(num_fresh, besides=hits)

            if len(hits):
                self.gpu.share(hits, priority)
            try:
                fresh = self._acquire_and_restore(num_fresh, on_cpu)
            except BaseException:
                self.gpu.release(hits)
                raise
            blocks = np.concatenate([hits, fresh])

            num_found = len(hits) + len(on_cpu)
            row = self.tables.open(blocks, num_tokens, priority)
            self._transcripts.start(row, root, text if self.prefix_caching else None, digests)
            num_cached = num_found * self.block_size
            self._sequences[seq_id] = SequenceState(row, num_cached, len(hits), publish, (num_cached, num_tokens))
            self._publish(seq_id, len(digests) if publish else num_found)
            if text is not None and self.prefix_caching and not readmitted:
                self.counters.prompt_tokens += num_tokens
                self.counters.cached_tokens += num_found * self.block_size
            return blocks

    def free(self, seq_id: SeqId, *, written: bool = True) -> None:
        """Forget a sequence. Its last readers' blocks become free, or evictable if their content can be found.

        Parameters
        ----------
        seq_id : hashable
            The sequence.
        written : bool
            Whether its tokens were computed. With False, what it was to write cannot be found any more; sequences that
            were admitted after it and share that must be freed likewise.
        """
        with self.lock:
            sequence = self._known(seq_id)
            if not written:
                self._unpublish(sequence, sequence.num_cached // self.block_size)
            del self._sequences[seq_id]
            self._epoch += 1
            self._transcripts.digests[sequence.row] = []
            blocks = self.tables.close(sequence.row)
            if sequence.cpu_blocks is None:
                self.gpu.release(blocks)
            else:
                self.cpu.release(sequence.cpu_blocks)

    def drop(self, seq_id: SeqId) -> None:
        """Forget a sequence that gives way: what it may not have written yet cannot be found any more.

        That is what its last `allocate` or `append` made room for, unless `publish` said that it was computed.
        """
        with self.lock:
            self._unpublish_unwritten(self._known(seq_id))
            self.free(seq_id)

    def fork(self, parent_id: SeqId, child_id: SeqId) -> None:
        """Let a new sequence continue another's tokens. They share every block until one of them writes to it."""
        with self.lock:
            parent = self._resident(parent_id)
            self._check_new("child_id", child_id)
            row = self.tables.fork(parent.row)
            self._transcripts.fork(parent.row, row)
            self.gpu.share(self.tables.blocks(row), int(self.tables.priority[row]))
            num_cached = self.tables.num_tokens(row)
            self._sequences[child_id] = SequenceState(
                row, num_cached, parent.num_published, parent.publishes, parent.placed
            )

    # ---- grow -------------------------------------------------------------------------------------------------------

    def can_append(self, seq_id: SeqId, n: int | ArrayLike = 1) -> bool:
        """Return whether `append` would find the blocks that it needs."""
        count, _ = self._text("n", n)
        with self.lock:
            return self._can_take(self._blocks_to_append(self._resident(seq_id).row, count))

    def append(self, seq_id: SeqId, n: int | ArrayLike = 1) -> Appended:
        """Make room for further tokens of a sequence.

        Parameters
        ----------
        seq_id : hashable
            The sequence.
        n : int or int [num_tokens]
            How many, or their token ids. Only blocks whose token ids are all known can be found by later prompts.

        Returns
        -------
        Appended
            The slots to write them to, and the copies to make before.

        Raises
        ------
        OutOfBlocksError
            If the blocks that they need are not to be had.
        """
        count, text = self._text("n", n)
        with self.lock:
            sequence = self._resident(seq_id)
            row, tables = sequence.row, self.tables
            length = tables.num_tokens(row)
            missing = self._blocks_to_append(row, count)
            blocks = self.gpu.acquire(missing) if missing else NO_BLOCKS  # all at once: what raises changes nothing

            copies = NO_PAIRS
            if tables.room[row] < 0:
                if self._copies_tail(row):
                    copies, blocks = self._copy_tails(np.array([row]), blocks[:1]), blocks[1:]
                else:
                    tables.unguard(np.array([row]))
            if len(blocks):
                tables.push_run(row, blocks)
            slots = tables.advance(row, count)
            sequence.placed = (length, length + count)
            if text is not None:
                self._transcripts.extend(row, length, text)
                self._publish_if_wanted(seq_id)
            return Appended(slots, copies)

    def batch(self, seq_ids: Iterable[SeqId]) -> Batch:
        """Return sequences as a batch for `append_batch` and `block_tables`, good for as long as all of them live."""
        names = tuple(seq_ids)
        if len(set(names)) != len(names):
            raise ValueError("seq_ids must name each sequence once")
        with self.lock:
            return Batch(names, self._rows(names), self._epoch)

    def append_batch(self, seq_ids: Batch | Iterable[SeqId], tokens: ArrayLike | None = None) -> Appended:
        """Make room for one more token of each of many sequences, the decode step of a batch.

        Parameters
        ----------
        seq_ids : Batch or iterable of hashables
            The sequences, each once. A `Batch` is looked up once and then serves every step.
        tokens : int [num_seqs], optional
            The token ids, without which the blocks that they fill cannot be found by later prompts.

        Returns
        -------
        Appended
            The slots, int64 [num_seqs], and the copies to make before.

        Raises
        ------
        OutOfBlocksError
            If one sequence cannot have the block that it needs; none has grown then.
        """
        batch = seq_ids if isinstance(seq_ids, Batch) else self.batch(seq_ids)
        text = None if tokens is None else _token_ids("tokens", tokens, len(batch))
        tables = self.tables
        with self.lock:
            rows = self._current_rows(batch)
            copies = NO_PAIRS
            room = tables.room[rows]
            (blocked,) = (room <= NONE).nonzero()
            if len(blocked):
                copies = self._open_tails(rows[blocked])
                room = tables.room[rows]
            tables.room[rows] = room - ONE
            if text is not None:
                for i in self._transcripts.extend_each(rows, tables.lengths(rows) - 1, text).tolist():
                    self._publish_if_wanted(batch.seq_ids[i])
            return Appended(tables.tail_end[rows] - room, copies)

    def mark(self, seq_ids: Iterable[SeqId]) -> list[Mark]:
        """Return where sequences stand, so that `undo` can take back what they grow by, should it not be computed."""
        with self.lock:
            return [self._mark(seq_id, self._resident(seq_id)) for seq_id in seq_ids]

    def undo(self, marks: Iterable[Mark]) -> list[SeqId]:
        """Take back what sequences grew by since they were marked, as if it had never been asked for.

        Their lengths and slots are those of before; blocks that they took are free again, in their order; what was
        published can no longer be found; and a copy that an append made is given up for the block that it was made of.
        A sequence that was freed or swapped out in the meantime is passed over.

        Parameters
        ----------
        marks : iterable of Mark
            As `mark` returned them, with no other call for these sequences but appends in between.

        Returns
        -------
        list of hashables
            Sequences whose last block's original has been freed by its other readers in the meantime: they end at the
            block before.
        """
        with self.lock:
            return [mark.seq_id for mark in reversed(list(marks)) if not self._undo(mark)]

    # ---- share ------------------------------------------------------------------------------------------------------

    def publish(self, seq_id: SeqId, num_tokens: int) -> None:
        """Let the full blocks among a sequence's first `num_tokens` tokens, all computed now, be found by others."""
        with self.lock:
            sequence = self._resident(seq_id)
            num_tokens = whole_number("num_tokens", num_tokens, at_least=0)
            self._publish(seq_id, num_tokens // self.block_size)
            start, stop = sequence.placed
            sequence.placed = (min(max(start, num_tokens), stop), stop)

    def unpublish(self, seq_id: SeqId) -> None:
        """Let no full block of a sequence's text be found any more, in either pool, whoever computed it.

        For a sequence whose keys and values proved unusable: any block that it read may be the reason. Sequences that
        read the same blocks keep them; what comes next with this text computes it again.
        """
        with self.lock:
            names = self._transcripts.digests[self._known(seq_id).row]
            self.gpu.forget(names)
            self.cpu.forget(names)

    def evict(self, n: int) -> int:
        """Evict up to `n` cached blocks that nobody reads, ahead of need, and return how many were."""
        with self.lock:
            return len(self.gpu.evict(whole_number("n", n, at_least=0)))

    def take_transfers(self) -> list[Transfer]:
        """Return the transfers of cached blocks since the last call, in the order in which they must be made.

        For programs that move what each call returns; see the module's docstring.
        """
        names = {"out": "offload", "in": "restore"}
        return [Transfer(names[move.kind], move.pairs) for move in self.moves.take_cached()]

    # ---- swap -------------------------------------------------------------------------------------------------------

    def can_swap_out(self, *seq_ids: SeqId) -> bool:
        """Return whether the CPU pool has room for these sequences."""
        with self.lock:
            blocks = [self.tables.blocks(self._resident(seq_id).row) for seq_id in seq_ids]
            return _num_distinct(blocks) <= self.cpu.num_available

    def swap_out(self, *seq_ids: SeqId) -> Pairs:
        """Move sequences to the CPU pool; those that share blocks and move in one call go on sharing them.

        Returns
        -------
        int32 [num_blocks, 2]
            (GPU block, CPU block) pairs, to be copied before the GPU blocks are written again.

        Raises
        ------
        OutOfBlocksError
            If the CPU pool has too little room.
        """
        with self.lock:
            sequences = [self._resident(seq_id) for seq_id in dict.fromkeys(seq_ids)]
            on_gpu = [self.tables.blocks(sequence.row) for sequence in sequences]
            pairs, on_cpu = _duplicate(on_gpu, self.cpu)
            self._epoch += 1
            self._note("out", pairs)
            for sequence, source, target in zip(sequences, on_gpu, on_cpu, strict=True):
                self._unpublish_unwritten(sequence)
                sequence.cpu_blocks, sequence.cpu_tokens = target, self.tables.num_tokens(sequence.row)
                sequence.left_blocks = np.union1d(
                    NO_BLOCKS if sequence.left_blocks is None else sequence.left_blocks, source
                )
                self.tables.unmap(sequence.row)
                self.gpu.release(source)
            self.counters.blocks_swapped_out += len(pairs)
            return pairs

    def can_swap_in(self, *seq_ids: SeqId) -> bool:
        """Return whether the GPU pool has room for these sequences."""
        with self.lock:
            return self._can_take(_num_distinct([self._swapped(seq_id)[1] for seq_id in seq_ids]))

    def swap_in(self, *seq_ids: SeqId) -> Pairs:
        """Move sequences back to the GPU pool; the reverse of `swap_out`.

        Returns
        -------
        int32 [num_blocks, 2]
            (CPU block, GPU block) pairs, to be copied before the GPU blocks are read.

        Raises
        ------
        OutOfBlocksError
            If the GPU pool has too little room.
        """
        with self.lock:
            swapped = {seq_id: self._swapped(seq_id) for seq_id in seq_ids}
            pairs, on_gpu = _duplicate([blocks for _, blocks in swapped.values()], self.gpu)
            if len(pairs) and (self._offloads or self.moves.collects_all):
                self.cpu.reserve(pairs[:, 0])
                self._note("in", pairs)
            for (seq_id, (sequence, source)), target in zip(swapped.items(), on_gpu, strict=True):
                self.tables.map(sequence.row, target, sequence.cpu_tokens)
                self.tables.guard(sequence.row)
                self.cpu.release(source)
                sequence.cpu_blocks = None
                published, sequence.num_published = sequence.num_published, 0
                self._publish(seq_id, published)
            self.counters.blocks_swapped_in += len(pairs)
            return pairs

    # ---- look -------------------------------------------------------------------------------------------------------

    @property
    def seq_ids(self) -> list[SeqId]:
        """The sequences, in the order of their admission."""
        with self.lock:
            return list(self._sequences)

    def __contains__(self, seq_id: SeqId) -> bool:
        """Return whether the manager knows a sequence."""
        return seq_id in self._sequences

    def block_tables(self, seq_ids: Batch | Iterable[SeqId]) -> Ids:
        """Return the block tables of some sequences, int32 [num_seqs, max_blocks], -1 where unmapped."""
        batch = seq_ids if isinstance(seq_ids, Batch) else self.batch(seq_ids)
        with self.lock:
            return self.tables.export(self._current_rows(batch))

    def seq_lens(self, seq_ids: Batch | Iterable[SeqId]) -> NDArray[np.int32]:
        """Return the number of tokens that each of some sequences stores, int32 [num_seqs]."""
        batch = seq_ids if isinstance(seq_ids, Batch) else self.batch(seq_ids)
        with self.lock:
            return self.tables.lengths(self._current_rows(batch)).astype(np.int32)

    def blocks(self, seq_id: SeqId) -> Ids:
        """Return the blocks of a sequence in logical order, int32 [num_blocks]: CPU blocks if it is swapped out."""
        with self.lock:
            sequence = self._known(seq_id)
            return self.tables.blocks(sequence.row) if sequence.cpu_blocks is None else sequence.cpu_blocks.copy()

    def slots(self, seq_id: SeqId, start: int = 0, stop: int | None = None) -> Slots:
        """Return the slots of the tokens at positions `start` to `stop - 1` (default: all), int64 [stop - start]."""
        with self.lock:
            row = self._resident(seq_id).row
            length = self.tables.num_tokens(row)
            stop = length if stop is None else stop
            if not 0 <= start <= stop <= length:
                raise ValueError(f"start and stop must lie in 0 to {length}, in this order, got {start} and {stop}")
            return self.tables.slots(row, start, stop)

    def num_tokens(self, seq_id: SeqId) -> int:
        """Return the number of tokens that a sequence stores."""
        with self.lock:
            return self._num_tokens(self._known(seq_id))

    def cached_tokens(self, seq_id: SeqId) -> int:
        """Return how many of a sequence's first tokens were there when it was admitted, or all if it was forked."""
        with self.lock:
            return self._known(seq_id).num_cached

    def unwritten_blocks(self, seq_id: SeqId) -> Ids:
        """Return the GPU blocks that can be found by others though a sequence may not have computed them yet."""
        with self.lock:
            sequence = self._resident(seq_id)
            return self.tables.blocks(sequence.row)[self._num_written(sequence) : sequence.num_published]

    def priority(self, seq_id: SeqId) -> int:
        """Return the priority of a sequence."""
        with self.lock:
            return int(self.tables.priority[self._known(seq_id).row])

    def is_swapped(self, seq_id: SeqId) -> bool:
        """Return whether a sequence lies in the CPU pool."""
        with self.lock:
            return self._known(seq_id).cpu_blocks is not None

    def check(self) -> None:
        """Raise AssertionError unless every block and every count is accounted for. O(num_blocks), for tests."""
        with self.lock:
            for pool, swapped in ((self.gpu, False), (self.cpu, True)):
                pool.check()
                readers = np.zeros(pool.num_blocks, np.int64)
                for seq_id in self._sequences:
                    if self.is_swapped(seq_id) == swapped:
                        readers[self.blocks(seq_id)] += 1
                for blocks in self.moves.reserved if swapped else ():
                    readers[blocks] += 1
                assert np.array_equal(readers, pool.ref_count), "a block is read by other sequences than it counts"
            for seq_id in self._sequences:
                needed = self._num_blocks(self.num_tokens(seq_id))
                assert len(self.blocks(seq_id)) == needed, "a sequence has a block too many or too few"

    # ---- steps of the above -----------------------------------------------------------------------------------------

    def _num_tokens(self, sequence: SequenceState) -> int:
        return self.tables.num_tokens(sequence.row) if sequence.cpu_blocks is None else sequence.cpu_tokens

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _can_take(self, n: int, besides: Ids = NO_BLOCKS) -> bool:
        try:
            self.gpu.require(n, besides)
        except OutOfBlocksError:
            return False
        return True

    def _blocks_to_append(self, row: int, n: int) -> int:
        """Return the blocks that `n` more tokens need, a copy of a shared last block among them."""
        new = self._num_blocks(self.tables.num_tokens(row) + n) - int(self.tables.num_blocks[row])
        return new + int(self._copies_tail(row))

    def _copies_tail(self, row: int) -> bool:
        """Whether others read a row's partial last block, so that it is copied before the row writes to it."""
        return bool(self.tables.room[row] < 0 and self.gpu.ref_count[self.tables.ids[row, self._last(row)]] > 1)

    def _last(self, row: int) -> int:
        return int(self.tables.num_blocks[row]) - 1

    def _open_tails(self, rows: Rows) -> Pairs:
        """Let each of `rows` write its next token: map a block past a full one, copy a partial one that others read."""
        tables = self.tables
        room = tables.room[rows]
        if not np.count_nonzero(room):
            tables.push(rows, self.gpu.acquire(len(rows)))
            return NO_PAIRS

        full = room == 0
        tails = tables.tails(rows)
        readers_left = self.gpu.ref_count[tails] - _occurrences_before(tails)  # the last one may keep the block
        copied = ~full & (readers_left > 1)
        wanting = full | copied
        blocks = np.empty(len(rows), np.int32)
        blocks[wanting] = self.gpu.acquire(int(np.count_nonzero(wanting)))

        tables.unguard(rows[~wanting])
        if full.any():
            tables.push(rows[full], blocks[full])
        return self._copy_tails(rows[copied], blocks[copied])

    def _copy_tails(self, rows: Rows, blocks: Ids) -> Pairs:
        """Put `blocks` in the place of the last ones of `rows`, which others read, and return the copies to make."""
        tails = self.tables.tails(rows)
        self.tables.replace_tail(rows, blocks)
        self.gpu.leave(tails)
        self.counters.copies += len(rows)
        pairs = np.stack([tails, blocks], axis=1)
        self._note("copy", pairs)
        return pairs

    def _note(self, kind: str, pairs: Pairs) -> None:
        """Put a move that its caller is told of on the list, where it has a reader there, or reserves what it reads."""
        if len(pairs) and (self.moves.collects_all or kind == "in"):
            self.moves.add(Move(kind, pairs), returned=True)

    def _match(self, digests: list[bytes], num_tokens: int) -> tuple[Ids, Ids]:
        """Return the GPU blocks of the longest cached prefix, and the CPU blocks that continue it."""
        findable = digests[: (num_tokens - 1) // self.block_size]  # the last token is always computed
        hits = self.gpu.cache.match(findable)
        return hits, self.cpu.cache.match(findable[len(hits) :])

    def _publish(self, seq_id: SeqId, num_blocks: int) -> None:
        """Let a sequence's first `num_blocks` blocks, as far as they have names, be found."""
        sequence = self._sequences[seq_id]
        start = sequence.num_published
        digests = self._transcripts.digests[sequence.row][start:num_blocks]
        if digests:
            stop = start + len(digests)
            depth = np.arange(start, stop)
            priority = int(self.tables.priority[sequence.row])
            self.gpu.publish(self.tables.ids[sequence.row, start:stop], digests, depth, priority)
            sequence.num_published = stop

    def _unpublish_unwritten(self, sequence: SequenceState) -> None:
        """Let what a sequence may not have written yet not be found, if it was published ahead of that."""
        self._unpublish(sequence, self._num_written(sequence))

    def _num_written(self, sequence: SequenceState) -> int:
        """Return how many of a sequence's blocks were computed for certain, or are not published before they are."""
        if not sequence.publishes:
            return sequence.num_published
        num_tokens = self._num_tokens(sequence)
        start, stop = sequence.placed
        written = start if num_tokens == stop else num_tokens - 1  # of a batch's step, the last token
        return written // self.block_size

    def _unpublish(self, sequence: SequenceState, start: int) -> None:
        """Let a sequence's blocks from `start` on, wherever copies of them lie, not be found.

        A block of another sequence that has the same name, because it was there first, keeps it.
        """
        digests = self._transcripts.digests[sequence.row][start : sequence.num_published]
        if not digests:
            return
        mine = self.tables.blocks(sequence.row)
        if sequence.left_blocks is not None:
            mine = np.concatenate([mine, sequence.left_blocks])
        found = self.gpu.cache.find(digests)
        self.gpu.unpublish(found[np.isin(found, mine) & (found >= 0)])
        self.cpu.forget(digests)

    def _publish_if_wanted(self, seq_id: SeqId) -> None:
        if self._sequences[seq_id].publishes:
            self._publish(seq_id, self.tables.max_blocks)

    def _offload(self, blocks: Ids, digests: list[bytes]) -> None:
        """Keep what GPU blocks held in the CPU pool, as far as it is not there and finds room."""
        there = self.cpu.cache.find(digests)
        self.cpu.touch(there[there >= 0])
        new = np.flatnonzero(there < 0)[: self.cpu.num_available]
        if len(new):
            names = [digests[i] for i in new]
            source, target = blocks[new], self.cpu.acquire(len(new))
            self.cpu.publish(target, names, self.gpu.stats.depth[source])
            self.cpu.release(target)
            self.moves.add(Move("out", np.stack([source, target], axis=1), cached=True))
            self.counters.blocks_offloaded += len(new)

    def _mark(self, seq_id: SeqId, sequence: SequenceState) -> Mark:
        tables, row = self.tables, sequence.row
        return Mark(
            seq_id, tables.num_tokens(row), int(tables.room[row]), int(tables.ids[row, self._last(row)]),
            sequence.num_published, sequence.placed, self._transcripts.mark(row),
        )  # fmt: skip

    def _undo(self, mark: Mark) -> bool:
        """Bring a sequence back to its mark; returns whether it has all its tokens."""
        sequence = self._sequences.get(mark.seq_id)
        if sequence is None or sequence.cpu_blocks is not None or self._num_tokens(sequence) == mark.num_tokens:
            return True
        row, kept = sequence.row, self._num_blocks(mark.num_tokens)
        self._unpublish(sequence, mark.num_published)
        sequence.num_published, sequence.placed = mark.num_published, mark.placed
        self._transcripts.restore(row, mark.text)
        blocks = self.tables.cut(row, kept, mark.room)
        if blocks[kept - 1] == mark.tail:
            self.gpu.release(blocks[kept:])
            return True
        self.gpu.release(blocks[kept - 1 :])
        if self.gpu.ref_count[mark.tail] > 0:
            self.gpu.reserve(np.array([mark.tail], np.int32))
            self.tables.set_tail(row, mark.tail)
            return True
        self.tables.cut(row, kept - 1, 0)
        self._transcripts.forget(row)
        return False

    def _acquire_and_restore(self, n: int, on_cpu: Ids) -> Ids:
        """Take `n` GPU blocks, of which the first receive what the blocks `on_cpu` hold."""
        if not len(on_cpu):
            return self.gpu.acquire(n)
        self.cpu.share(on_cpu)  # until they are restored: taking blocks may evict, and so offload
        try:
            blocks = self.gpu.acquire(n)
        except BaseException:
            self.cpu.release(on_cpu)
            raise
        self.moves.add(Move("in", np.stack([on_cpu, blocks[: len(on_cpu)]], axis=1), cached=True))
        self.counters.blocks_restored += len(on_cpu)
        return blocks

    def _root(self, extra: ExtraKeys) -> bytes:
        nothing = isinstance(extra, tuple) and not extra
        return self._no_extra if nothing else root_digest(self.block_size, self._salt, extra)

    def _names(self, text: Ids | None, root: bytes) -> list[bytes]:
        """Return the names of a text's full blocks; none if the text is not known or not to be cached."""
        if text is None or not self.prefix_caching:
            return []
        return chain(root, text, self.block_size)

    def _text(self, name: str, tokens: int | ArrayLike) -> tuple[int, Ids | None]:
        """Return the number of tokens, at least one, and their ids if these were given."""
        if np.ndim(tokens) == 0:
            return whole_number(name, tokens, at_least=1), None
        text = _token_ids(name, tokens)
        if not len(text):
            raise ValueError(f"{name} must hold at least one token, got none")
        return len(text), text

    def _rows(self, seq_ids: tuple[SeqId, ...]) -> Rows:
        return np.array([self._resident(seq_id).row for seq_id in seq_ids], np.intp)

    def _current_rows(self, batch: Batch) -> Rows:
        if batch.epoch != self._epoch:
            batch.rows, batch.epoch = self._rows(batch.seq_ids), self._epoch
        return batch.rows

    def _check_new(self, name: str, seq_id: SeqId) -> None:
        if seq_id in self._sequences:
            raise ValueError(f"{name} must be new, but sequence {seq_id!r} is there already")

    def _known(self, seq_id: SeqId) -> SequenceState:
        sequence = self._sequences.get(seq_id)
        if sequence is None:
            raise ValueError(f"seq_id must be a sequence that was admitted and not freed, got {seq_id!r}")
        return sequence

    def _resident(self, seq_id: SeqId) -> SequenceState:
        sequence = self._known(seq_id)
        if sequence.cpu_blocks is not None:
            raise ValueError(f"seq_id must be a sequence on the GPU, but {seq_id!r} is swapped out")
        return sequence

    def _swapped(self, seq_id: SeqId) -> tuple[SequenceState, Ids]:
        sequence = self._known(seq_id)
        if sequence.cpu_blocks is None:
            raise ValueError(f"seq_id must be a sequence that is swapped out, but {seq_id!r} is on the GPU")
        return sequence, sequence.cpu_blocks


def _num_distinct(tables: list[Ids]) -> int:
    return len(np.unique(np.concatenate(tables))) if tables else 0


def _duplicate(tables: list[Ids], pool: BlockPool) -> tuple[Pairs, list[Ids]]:
    """Take blocks of `pool` for the distinct blocks in `tables`; return the pairs and the same tables over `pool`."""
    if not tables:
        return NO_PAIRS, []
    joined = np.concatenate(tables)
    distinct, first, place = np.unique(joined, return_index=True, return_inverse=True)
    appearance = np.argsort(first)
    twin_of = np.empty_like(distinct)
    twin_of[appearance] = pool.acquire(len(distinct))
    pool.ref_count[twin_of] = np.bincount(place)
    pairs = np.stack([distinct[appearance], twin_of[appearance]], axis=1)
    return pairs, np.split(twin_of[place], np.cumsum([len(table) for table in tables])[:-1])


def _occurrences_before(values: NDArray[Any]) -> NDArray[np.intp]:
    """Return how many earlier entries equal each entry."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    index = np.arange(len(values))
    is_first = np.append(True, ordered[1:] != ordered[:-1])
    before = np.empty_like(index)
    before[order] = index - np.maximum.accumulate(np.where(is_first, index, 0))
    return before


def _token_ids(name: str, tokens: ArrayLike, count: int | None = None) -> Ids:
    """Return token ids as an int32 vector, or raise an error that names the argument."""
    check_unmasked(tokens, name)
    text = np.asarray(tokens)
    if text.ndim != 1 or (count is not None and len(text) != count):
        expected = "a vector" if count is None else f"of shape ({count},)"
        raise ValueError(f"{name} must be token ids, {expected}, got shape {text.shape}")
    if text.dtype == INT32:
        return text
    if len(text):
        if not holds_integers(text):
            raise TypeError(f"{name} must be integers, got {text.dtype}")
        _int32(name, int(text.min()))
        _int32(name, int(text.max()))
    return text.astype(np.int32)


def _int32(name: str, value: int) -> int:
    if not -(2**31) <= whole_number(name, value, at_least=-(2**63)) < 2**31:
        raise ValueError(f"{name} must fit in int32, got {value}")
    return int(value)
