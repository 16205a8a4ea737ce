"""Which blocks are known already: full blocks found again by the text that leads to them.

The keys and values of a token depend on every token before it. A block's name is therefore a digest over its own
tokens and the digest of the block before it, back to a root that holds whatever else they depend on: a salt, an
adapter, a tenant. Equal names mean equal content as far as BLAKE2b [1]_ goes, so a hit needs no second look, and nobody
can make up a prompt that is served another's blocks. Only full blocks have names: a partial one still changes.

BLAKE2b with its native 64-byte digest is the fastest that hashlib has here: parent and 16 tokens are together 128
bytes, one compression (0.38 us a block from Python; SHA-256 takes 0.52 even with SHA instructions).

References
----------
.. [1] RFC 7693, "The BLAKE2 cryptographic hash and message authentication code", 2015.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from cupaged.kinds import is_integer
from cupaged.memory.allocator import NO, YES, as_index

__all__ = ["PrefixCache", "Transcripts", "chain", "root_digest"]

Ids = NDArray[np.int32]
ExtraKey = str | bytes | int
ExtraKeys = list[ExtraKey] | tuple[ExtraKey, ...]


def root_digest(block_size: int, salt: ExtraKey = b"", extra: ExtraKeys = ()) -> bytes:
    """Return the parent of a first block: what its content depends on besides tokens.

    Parameters
    ----------
    block_size : int
        Tokens in a block; the same tokens cut differently are different blocks.
    salt : bytes, str or int
        Separates caches, those of tenants who must not learn from timing what others asked for example.
    extra : list or tuple of str, bytes or int
        Whatever else changes keys and values: the name of a LoRA adapter, the digest of an image. Each item is written
        with its type and length, so that no two sequences of items read alike.

    Raises
    ------
    TypeError
        If `extra` is no list or tuple, or an item or the salt is of another type. A text or a mapping is no sequence of
        items: to iterate it would make different keys equal.
    """
    if not isinstance(extra, list | tuple):
        raise TypeError(
            f'extra must be a list or tuple of str, bytes or int, as in ("lora", "alpha"), got {type(extra).__name__}'
        )
    state = blake2b(person=b"cupaged root")
    for kind, text in (
        _encoded("block_size must be", block_size),
        _encoded("salt must be", salt),
        *(_encoded("extra must hold", item) for item in extra),
    ):
        state.update(b"%c%d:" % (kind, len(text)) + text)
    return state.digest()


def _encoded(expectation: str, item: ExtraKey) -> tuple[bytes, bytes]:
    """Return the kind of an item and its bytes; a text may hold lone surrogates, as file names do."""
    if isinstance(item, bytes):
        return b"b", item
    if isinstance(item, str):
        return b"s", item.encode("utf-8", "surrogatepass")
    if is_integer(item):
        return b"i", b"%x" % int(item)  # hexadecimal has no limit on digits
    raise TypeError(f"{expectation} str, bytes or int, got {type(item).__name__}")


def chain(parent: bytes, tokens: Ids, block_size: int) -> list[bytes]:
    """Return the digest of each full block of `tokens`, int32 [num_tokens], that follows the block named `parent`."""
    num_full = len(tokens) // block_size
    text = np.ascontiguousarray(tokens[: num_full * block_size], "<i4")
    digests = []
    for block in text.view(f"V{4 * block_size}").tolist():  # the bytes of each block: quicker than slicing
        parent = blake2b(parent + block).digest()
        digests.append(parent)
    return digests


class PrefixCache:
    """The content of a pool's blocks, by name: digest -> block, and block -> digest to forget it by.

    The first is a Python dict. A bucketed hash table in NumPy arrays was tried in its place; its dozens of small array
    operations made an admission of 128 blocks slower, with ten thousand blocks and with a million.

    Parameters
    ----------
    num_blocks : int
        Blocks in the pool.

    Attributes
    ----------
    named : bool [num_blocks]
        Blocks whose content can be found.
    """

    def __init__(self, num_blocks: int) -> None:
        self.named = np.zeros(num_blocks, bool)
        self._block_of: dict[bytes, int] = {}
        self._digest_of = np.full(num_blocks, None, object)

    def __len__(self) -> int:
        """Return the number of blocks that can be found."""
        return len(self._block_of)

    def match(self, digests: Sequence[bytes]) -> Ids:
        """Return the blocks of the longest known run from the first digest on, int32 [num_hits]."""
        if not digests or digests[0] not in self._block_of:  # most often all or nothing is new
            return np.empty(0, np.int32)
        found = list(map(self._block_of.get, digests))
        known = found.index(None) if None in found else len(found)
        return np.array(found[:known], np.int32)

    def find(self, digests: Sequence[bytes]) -> Ids:
        """Return the block of each digest, int32 [len(digests)], -1 where it is not known."""
        return np.array([self._block_of.get(digest, -1) for digest in digests], np.int32)

    def publish(self, blocks: Ids, digests: Sequence[bytes]) -> slice | list[int]:
        """Let `blocks` be found by `digests`, and return which of them could not be before, as an index.

        A digest that is known keeps its block: the other one, computed at the same time, stays nameless and is freed
        with its last reader. A block that has its digest already keeps it, and is not new.
        """
        ids = blocks.tolist()
        num_known = len(self._block_of)
        owners = list(map(self._block_of.setdefault, digests, ids))
        new: slice | list[int] = slice(None)
        if len(self._block_of) - num_known < len(ids):
            named = self.named[as_index(blocks)]
            new = [i for i, owner in enumerate(owners) if owner == ids[i] and not named[i]]
            digests = [digests[i] for i in new]
        if digests:
            index = as_index(blocks[new])
            self._digest_of[index] = digests
            self.named[index] = YES
        return new

    def forget(self, blocks: Ids) -> list[bytes]:
        """Make `blocks`, all of them named, unfindable, and return their digests: they will hold something else."""
        index = as_index(blocks)
        digests: list[bytes] = self._digest_of[index].tolist()
        for digest in digests:
            del self._block_of[digest]
        self._digest_of[index] = None
        self.named[index] = NO
        return digests

    def names(self, blocks: Ids) -> list[bytes]:
        """Return the digest of each of `blocks`, all of them named."""
        digests: list[bytes] = self._digest_of[as_index(blocks)].tolist()
        return digests

    def digests(self, blocks: Ids) -> list[bytes | None]:
        """Return the name of each block, None for one without."""
        return self._digest_of[blocks].tolist()


class Transcripts:
    """What is known of each sequence's text: the names of its full blocks, and the tokens of the unfinished one.

    It lets blocks that fill up token by token be named too. A sequence of which a token was stored without its id
    (``append(seq_id, 1)``) has no further names: its count of known tokens stays behind for good.

    Parameters
    ----------
    block_size : int
        Tokens in a block.
    max_rows : int
        Sequences to make room for; it doubles when it runs out.
    """

    def __init__(self, block_size: int, max_rows: int) -> None:
        self.block_size = block_size
        self.num_known = np.full(max_rows, -1, np.int64)
        self.unfinished = np.zeros((max_rows, block_size), np.int32)
        self.root: list[bytes] = [b""] * max_rows
        self.digests: list[list[bytes]] = [[] for _ in range(max_rows)]

    def start(self, row: int, root: bytes, tokens: Ids | None, digests: list[bytes]) -> None:
        """Begin a row with a prompt, or with None if only its length is known."""
        while row >= len(self.num_known):
            self._double()
        self.root[row], self.digests[row] = root, digests
        self.num_known[row] = -1 if tokens is None else len(tokens)
        if tokens is not None:
            rest = tokens[len(digests) * self.block_size :]
            self.unfinished[row, : len(rest)] = rest

    def fork(self, row: int, twin: int) -> None:
        """Let row `twin` continue the text of `row`."""
        self.start(twin, self.root[row], None, self.digests[row].copy())
        self.num_known[twin] = self.num_known[row]
        self.unfinished[twin] = self.unfinished[row]

    def mark(self, row: int) -> tuple[int, int, Ids]:
        """Return what `restore` needs to bring a row's text back to where it is now."""
        return int(self.num_known[row]), len(self.digests[row]), self.unfinished[row].copy()

    def restore(self, row: int, mark: tuple[int, int, Ids]) -> None:
        """Take back by what a row's text was extended since it was marked."""
        self.num_known[row], num_digests, self.unfinished[row] = mark
        del self.digests[row][num_digests:]

    def forget(self, row: int) -> None:
        """Have no further names for a row, whose text is not known any more."""
        self.num_known[row] = -1

    def extend(self, row: int, num_tokens: int, tokens: Ids) -> None:
        """Add `tokens` to a row that stores `num_tokens`."""
        if self.num_known[row] != num_tokens:
            return
        digests = self.digests[row]
        text = np.concatenate([self.unfinished[row, : num_tokens - len(digests) * self.block_size], tokens])
        full = chain(digests[-1] if digests else self.root[row], text, self.block_size)
        rest = text[len(full) * self.block_size :]
        digests.extend(full)
        self.unfinished[row, : len(rest)] = rest
        self.num_known[row] += len(tokens)

    def extend_each(self, rows: NDArray[np.intp], num_tokens: NDArray[np.int64], tokens: Ids) -> NDArray[np.intp]:
        """Add ``tokens[i]`` to ``rows[i]``, which stores ``num_tokens[i]``; return each `i` that finished a block."""
        known = self.num_known[rows] == num_tokens
        offset = num_tokens % self.block_size
        self.unfinished[rows[known], offset[known]] = tokens[known]
        self.num_known[rows[known]] += 1
        finished = np.flatnonzero(known & (offset == self.block_size - 1))
        for row in rows[finished].tolist():
            digests = self.digests[row]
            digests += chain(digests[-1] if digests else self.root[row], self.unfinished[row], self.block_size)
        return finished

    def _double(self) -> None:
        rows = len(self.num_known)
        self.num_known = np.concatenate([self.num_known, np.full(rows, -1, np.int64)])
        self.unfinished = np.concatenate([self.unfinished, np.zeros_like(self.unfinished)])
        self.root += [b""] * rows
        self.digests += [[] for _ in range(rows)]
