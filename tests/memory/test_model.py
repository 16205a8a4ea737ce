"""Random programs of every public operation, held to a dictionary.

The model knows what each sequence says and nothing of blocks. It also plays the GPU: it keeps an array of slots, writes
each token's "keys and values" (a number that stands for the token and everything before it) to the slots that the
manager names, and makes the copies, swaps and transfers that the manager asks for. After every operation each sequence
must read back exactly what it said: a block that was shared wrongly, copied too late, evicted too early or found under
the wrong name reads as something else.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cupaged.errors import OutOfBlocksError
from cupaged.memory.eviction import POLICIES
from cupaged.memory.manager import Appended, BlockManager
from cupaged.memory.preemption import CostModel, make_room
from cupaged.memory.watermark import WatermarkEvictor

NUM_PROGRAMS = 420
OPERATIONS_A_PROGRAM = 700
BYTES_AN_OPERATION = 5
SEQ_IDS = range(8)
UNWRITTEN = -1
COST = CostModel(prefill_tokens_per_s=1e4, link_bytes_per_s=1e9, bytes_per_block=1e5, par_context=8.0)


class Model:
    """Sequences as lists of values, and the memory that they must be read back from."""

    def __init__(self, choices: Iterator[int]) -> None:
        self.choices = choices
        self.block_size = 1 + next(choices) % 4
        names = sorted(POLICIES)
        self.manager = BlockManager(
            num_gpu_blocks=12 + next(choices) % 20,
            num_cpu_blocks=next(choices) % 12,
            block_size=self.block_size,
            order=("lifo", "fifo", "sorted", "random")[next(choices) % 4],
            eviction=names[next(choices) % len(names)],
            on_evict=("drop", "offload")[next(choices) % 2],
            prefix_caching=next(choices) % 8 != 7,
            max_seqs=1,
            max_blocks_per_seq=1,
        )
        self.evictor = WatermarkEvictor(self.manager, high=0.8, low=0.6, blocks_per_step=2)
        self.collected = bool(next(choices) % 2)  # moves come from the manager's list, or from what calls return
        if self.collected:
            self.manager.moves.collect_all()
        self.gpu = np.full(self.manager.gpu.num_blocks * self.block_size, UNWRITTEN, np.int64)
        self.cpu = np.full(self.manager.cpu.num_blocks * self.block_size, UNWRITTEN, np.int64)
        self.texts: dict[int, list[int]] = {}
        self.values: dict[int, list[int]] = {}
        self.roots: dict[int, tuple] = {}
        self.swapped: set[int] = set()
        self.refused = 0
        self.fresh = itertools.count(1000)

    # ---- what a GPU would do

    def move(self, source: np.ndarray, target: np.ndarray, pairs: np.ndarray) -> None:
        """Copy blocks, all read before any is written, as one launch of a copy kernel may."""
        of_block = np.arange(self.block_size)
        if len(pairs):
            read = source[pairs[:, :1] * self.block_size + of_block].copy()
            target[pairs[:, 1:] * self.block_size + of_block] = read

    def transfer(self) -> None:
        """Make the moves on the list, after the evictor's thread had a turn right behind the call that made them."""
        if next(self.choices) % 4 == 0:
            self.evictor.step()
        memories = {"copy": (self.gpu, self.gpu), "out": (self.gpu, self.cpu), "in": (self.cpu, self.gpu)}
        if self.collected:
            moves = self.manager.moves.pending
            if next(self.choices) % 4 == 0:  # a failure half-way: the last one made is not noted, and made again
                moves = moves[: next(self.choices) % (len(moves) + 1)]
                for number, move in enumerate(moves):
                    self.move(*memories[move.kind], move.pairs)
                    self.manager.moves.done(moves[:number])
            for move in self.manager.moves.pending:
                self.move(*memories[move.kind], move.pairs)
                self.manager.moves.done([move])
        else:
            for direction, pairs in self.manager.take_transfers():
                self.move(*memories["out" if direction == "offload" else "in"], pairs)

    def make(self, kind: str, pairs: np.ndarray) -> None:
        """Make the moves on the list, then those that the call returned, unless they are on the list as well."""
        self.transfer()
        if not self.collected:
            self.move(
                *{"copy": (self.gpu, self.gpu), "out": (self.gpu, self.cpu), "in": (self.cpu, self.gpu)}[kind], pairs
            )

    def say(self, seq_id: int, tokens: list[int]) -> list[int]:
        """Add tokens to a sequence's text and return their values, each standing for all the text up to it."""
        text, values = self.texts[seq_id], self.values[seq_id]
        for token in tokens:
            text.append(token)
            values.append(hash((self.roots[seq_id], values[-1] if values else 0, token)) >> 2)
        return values[len(values) - len(tokens) :]

    def written(self, appended: Appended, seq_ids: list[int], tokens: list[list[int]]) -> None:
        self.make("copy", appended.copies)
        values = [value for seq_id, said in zip(seq_ids, tokens, strict=True) for value in self.say(seq_id, said)]
        assert len(set(appended.slots.tolist())) == len(values), "two tokens were given one slot"
        self.gpu[appended.slots] = values

    # ---- the operations

    def tokens(self) -> list[int]:
        """Return a prompt that often begins like others do."""
        base, length, tail = next(self.choices), next(self.choices), next(self.choices)
        return [base % 2] * (length % 24) + [tail % 3] * (1 + tail // 3 % 4)

    def of(self, seq_ids) -> int | None:
        """Choose one of some sequences."""
        choice = next(self.choices)
        ordered = sorted(seq_ids)
        return ordered[choice % len(ordered)] if ordered else None

    def running(self) -> list[int]:
        return sorted(set(self.texts) - self.swapped)

    def allocate(self) -> None:
        seq_id = self.of(set(SEQ_IDS) - set(self.texts))
        tokens, how = self.tokens(), next(self.choices)
        if seq_id is None:
            return
        extra = ("adapter",) if how & 1 else ()
        publish, known = bool(how & 6), bool(how & 24)
        prompt = tokens if known else len(tokens)
        self.attempt(lambda: self.manager.can_allocate(prompt, extra=extra),
                     lambda: self.manager.allocate(seq_id, prompt, extra=extra, priority=how % 3, publish=publish),
                     lambda _: self.admitted(seq_id, tokens, (extra, known or next(self.fresh)), publish))  # fmt: skip

    def admitted(self, seq_id: int, tokens: list[int], root: tuple, publish: bool) -> None:
        self.texts[seq_id], self.values[seq_id], self.roots[seq_id] = [], [], root
        self.transfer()
        values = self.say(seq_id, tokens)
        cached = self.manager.cached_tokens(seq_id)
        assert cached % self.block_size == 0
        assert cached < len(tokens), "nothing is left to compute"
        slots = self.manager.slots(seq_id)
        assert self.gpu[slots[:cached]].tolist() == values[:cached], "a cached prefix holds another text"
        self.gpu[slots[cached:]] = values[cached:]
        if not publish:
            self.manager.publish(seq_id, len(tokens))

    def append(self) -> None:
        seq_id, how = self.of(self.running()), next(self.choices)
        if seq_id is None:
            return
        tokens = [how % 3] * (1 + how // 3 % 9)
        known = how < 200
        self.attempt(lambda: self.manager.can_append(seq_id, len(tokens)),
                     lambda: self.manager.append(seq_id, tokens if known else len(tokens)),
                     lambda appended: self.appended(appended, [seq_id], [tokens], known))  # fmt: skip

    def append_batch(self) -> None:
        how, known = next(self.choices), next(self.choices) < 200
        seq_ids = [seq_id for seq_id in self.running() if how >> seq_id & 1]
        tokens = [[how % 3] for _ in seq_ids]
        ids = np.array(tokens, int).ravel() if known else None
        self.attempt(None,
                     lambda: self.manager.append_batch(seq_ids, ids),
                     lambda appended: self.appended(appended, seq_ids, tokens, known))  # fmt: skip

    def appended(self, appended: Appended, seq_ids: list[int], tokens: list[list[int]], known: bool) -> None:
        if not known:
            tokens = [[next(self.fresh) for _ in said] for said in tokens]
        self.written(appended, seq_ids, tokens)

    def undo(self) -> None:
        """Append, to one or to several, and take it back before anything is written."""
        how, count = next(self.choices), 1 + next(self.choices) % 9
        seq_ids = [seq_id for seq_id in self.running() if how >> seq_id & 1]
        marks = self.manager.mark(seq_ids)
        try:
            if len(seq_ids) == 1:
                self.manager.append(seq_ids[0], [how % 3] * count if how & 64 else count)
            else:
                self.manager.append_batch(seq_ids, np.full(len(seq_ids), how % 3) if how & 64 else None)
        except OutOfBlocksError:
            self.refused += 1
        if next(self.choices) % 2:
            self.transfer()  # the copies were made, or they were not
        assert self.manager.undo(marks) == [], "all readers are there still"
        self.transfer()

    def abandon(self) -> None:
        """Admit a prompt that is never computed, let it move about, and end it: nobody may find it."""
        seq_id = self.of(set(SEQ_IDS) - set(self.texts))
        tokens, how = self.tokens(), next(self.choices)
        if seq_id is None or not self.manager.can_allocate(tokens):
            return
        self.manager.allocate(seq_id, tokens, publish=bool(how & 1))
        if how & 2 and self.manager.can_swap_out(seq_id):
            self.make("out", self.manager.swap_out(seq_id))  # what it shares was written
            if how & 4 and self.manager.can_swap_in(seq_id):
                self.make("in", self.manager.swap_in(seq_id))
        if how & 8 or self.manager.is_swapped(seq_id):
            self.manager.free(seq_id, written=False)
        else:
            self.manager.drop(seq_id)
        self.transfer()

    def fork(self) -> None:
        parent, child = self.of(self.running()), self.of(set(SEQ_IDS) - set(self.texts))
        if parent is not None and child is not None:
            self.manager.fork(parent, child)
            for facts in (self.texts, self.values):
                facts[child] = facts[parent].copy()
            self.roots[child] = self.roots[parent]

    def free(self) -> None:
        seq_id = self.of(self.texts)
        if seq_id is not None:
            self.manager.free(seq_id)
            self.forget(seq_id)

    def forget(self, seq_id: int) -> None:
        for facts in (self.texts, self.values, self.roots):
            del facts[seq_id]
        self.swapped.discard(seq_id)

    def swap_out(self) -> None:
        how = next(self.choices)
        seq_ids = [seq_id for seq_id in self.running() if how >> seq_id & 1]
        self.attempt(lambda: self.manager.can_swap_out(*seq_ids),
                     lambda: self.manager.swap_out(*seq_ids),
                     lambda pairs: self.swapped_out(seq_ids, pairs))  # fmt: skip

    def swapped_out(self, seq_ids: list[int], pairs: np.ndarray) -> None:
        self.make("out", pairs)
        self.swapped |= set(seq_ids)

    def swap_in(self) -> None:
        how = next(self.choices)
        seq_ids = [seq_id for seq_id in sorted(self.swapped) if how >> seq_id & 1]
        self.attempt(lambda: self.manager.can_swap_in(*seq_ids),
                     lambda: self.manager.swap_in(*seq_ids),
                     lambda pairs: self.swapped_in(seq_ids, pairs))  # fmt: skip

    def swapped_in(self, seq_ids: list[int], pairs: np.ndarray) -> None:
        self.make("in", pairs)
        self.swapped -= set(seq_ids)

    def evict(self) -> None:
        evicted = self.manager.evict(next(self.choices) % 4) if next(self.choices) % 2 else self.evictor.step()
        assert evicted >= 0
        self.transfer()

    def preempt(self) -> None:
        needed, how = next(self.choices) % 24, next(self.choices)
        cost = COST if how & 1 else None
        protect = [seq_id for seq_id in SEQ_IDS if how >> 2 == seq_id]
        self.attempt(None,
                     lambda: make_room(self.manager, needed, cost, protect=protect),
                     lambda preemption: self.preempted(preemption, needed))  # fmt: skip

    def preempted(self, preemption, needed: int) -> None:
        self.swapped_out(preemption.swapped, preemption.pairs)
        for seq_id in preemption.dropped:
            self.forget(seq_id)
        assert self.manager.gpu.num_available >= needed

    def attempt(self, can, do, then) -> None:
        """Do something that may find no blocks; in that case nothing may have changed, and `can` must have said so."""
        promised = None if can is None else can()
        before = self.fingerprint()
        try:
            result = do()
        except OutOfBlocksError as error:
            assert promised is not True, "can_… promised what could not be done"
            assert self.fingerprint() == before, "a refused call changed something"
            assert error.needed > error.free + error.evictable or error.needed == 0
            self.refused += 1
        else:
            assert promised is not False, "can_… denied what could be done"
            then(result)

    # ---- what must always hold

    def fingerprint(self) -> tuple:
        manager = self.manager
        pools = [
            (pool.ref_count.tobytes(), pool.allocator.allocated.tobytes(), pool.num_free, len(pool.policy))
            for pool in (manager.gpu, manager.cpu)
        ]
        return pools, manager.tables.ids.tobytes(), manager.tables.room.tobytes(), manager.seq_ids

    def compare(self) -> None:
        """Every sequence reads back what it said, and nobody else holds a block that it may write to."""
        manager, size = self.manager, self.block_size
        assert set(manager.seq_ids) == set(self.texts)
        for seq_id, values in self.values.items():
            memory = self.cpu if seq_id in self.swapped else self.gpu
            blocks = manager.blocks(seq_id)
            assert manager.is_swapped(seq_id) == (seq_id in self.swapped)
            assert manager.num_tokens(seq_id) == len(values)
            assert len(blocks) == -(-len(values) // size)
            slots = (blocks[:, None] * size + np.arange(size)).ravel()[: len(values)]
            assert memory[slots].tolist() == values, f"sequence {seq_id} reads what it did not say"

    def compare_exports(self) -> None:
        running = self.running()
        tables = self.manager.block_tables(running)
        assert self.manager.seq_lens(running).tolist() == [len(self.values[seq_id]) for seq_id in running]
        for seq_id, table in zip(running, tables, strict=True):
            blocks = self.manager.blocks(seq_id).tolist()
            assert table.tolist() == blocks + [-1] * (len(table) - len(blocks))

    OPERATIONS = (
        allocate, append, append_batch, append_batch, fork, free, swap_out, swap_in, evict, preempt, undo, abandon,
    )  # fmt: skip

    def run(self, num_operations: int) -> None:
        for number in range(num_operations):
            operation = self.OPERATIONS[next(self.choices) % len(self.OPERATIONS)]
            operation(self)
            self.compare()
            if number % 8 == 0:
                self.manager.check()
                self.compare_exports()
        self.manager.check()
        for seq_id in list(self.texts):
            self.manager.free(seq_id)
        self.manager.check()
        assert self.manager.gpu.num_used == self.manager.cpu.num_used == 0, "a block was lost"


done = {"operations": 0, "refused": 0, "hits": 0, "copies": 0, "evictions": 0, "restored": 0, "preemptions": 0}


@settings(max_examples=NUM_PROGRAMS, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(st.binary(min_size=64, max_size=64), st.integers(0, 2**32 - 1))
def test_any_program_agrees_with_a_dictionary(head, seed):
    """The first operations are hypothesis's own, so that a failure shrinks; the many that follow come from a seed."""
    rest = np.random.default_rng(seed).integers(0, 256, OPERATIONS_A_PROGRAM * BYTES_AN_OPERATION * 2).tolist()
    model = Model(itertools.chain(head, rest, itertools.repeat(0)))
    model.run(OPERATIONS_A_PROGRAM)
    counters = model.manager.counters
    done["operations"] += OPERATIONS_A_PROGRAM
    done["refused"] += model.refused
    done["hits"] += counters.cached_tokens
    done["copies"] += counters.copies
    done["evictions"] += model.manager.gpu.num_evicted
    done["restored"] += counters.blocks_restored
    done["preemptions"] += counters.preemptions


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.binary(max_size=300))
def test_any_short_program_agrees_with_a_dictionary(program):
    """Hypothesis chooses every byte; what it finds here it shrinks to a few operations."""
    Model(itertools.chain(program, itertools.repeat(0))).run(len(program) // BYTES_AN_OPERATION)


def test_the_programs_reached_every_part():
    """Runs after the two above: 200,000 operations at least, among them many of each rare kind."""
    if not done["operations"]:
        pytest.skip("the programs ran in another process")
    assert done["operations"] >= 200_000
    assert all(count > 1000 for count in done.values()), done
