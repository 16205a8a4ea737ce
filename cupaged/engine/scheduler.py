"""What runs in the next step: continuous batching over a block manager. Host logic only; it sees no tensor.

Each step is put together anew (Yu et al., "Orca", OSDI 2022). First every running sequence that decodes gets a slot for
its next token; then, within the budget of tokens that is left, prompts that are under way are computed on, a chunk at
a time (Agrawal et al., "Sarathi-Serve", OSDI 2024); then waiting requests are admitted as long as their blocks are
there. Who finds no block for a token preempts the sequence that is worth least, possibly itself: its blocks are swapped
to the CPU pool, or freed and computed again later.

The one that is worth most is never preempted, and fits the pool alone: it always gets on, and so every request ends.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable
from dataclasses import dataclass, field

import numpy as np

from cupaged.engine.sequence import Sequence, State
from cupaged.errors import OutOfBlocksError
from cupaged.memory.allocator import whole_number
from cupaged.memory.manager import BlockManager
from cupaged.memory.moves import Move
from cupaged.memory.preemption import CostModel, make_room

__all__ = ["Move", "Scheduler", "Step", "Work"]

ALWAYS_SWAP = CostModel(prefill_tokens_per_s=1.0, link_bytes_per_s=float("inf"), bytes_per_block=0.0)


@dataclass(frozen=True)
class Work:
    """A sequence's part of a step: its tokens at positions `start` to ``start + count - 1``."""

    sequence: Sequence
    start: int
    count: int

    @property
    def stop(self) -> int:
        """One past its last position, and its length once they are computed."""
        return self.start + self.count

    @property
    def samples(self) -> bool:
        """Whether the step computes its last known token, after which the next one is chosen."""
        return self.stop == self.sequence.num_tokens


@dataclass
class Step:
    """What to do in a step: the moves in order, then all of the work together.

    Moves of an earlier step that were not made, because something failed, come first.
    """

    work: list[Work] = field(default_factory=list)
    moves: list[Move] = field(default_factory=list)
    preempted: list[int] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens that are computed."""
        return sum(work.count for work in self.work)

    @property
    def decodes_only(self) -> bool:
        """Whether each sequence has one token."""
        return all(work.count == 1 for work in self.work)


class Scheduler:
    """Requests, and the order in which they use the manager's blocks.

    Parameters
    ----------
    manager : BlockManager
        Whose blocks; nobody else admits sequences to it, or makes its moves.
    max_batch_tokens : int
        The budget: tokens that a step computes at most. At least `max_num_seqs`, so that all that run can decode.
    max_num_seqs : int
        Sequences that run at once.
    preemption : {"recompute", "swap"} or CostModel
        How a sequence gives way. "swap" falls back on "recompute" where the CPU pool is full; a cost model takes the
        cheaper for each.
    spare_blocks : int
        Blocks that admission leaves available for those that run to grow into.
    """

    def __init__(
        self,
        manager: BlockManager,
        *,
        max_batch_tokens: int = 512,
        max_num_seqs: int = 64,
        preemption: str | CostModel = "recompute",
        spare_blocks: int = 1,
    ) -> None:
        costs = {"recompute": None, "swap": ALWAYS_SWAP}
        if not isinstance(preemption, CostModel) and not (isinstance(preemption, str) and preemption in costs):
            raise ValueError(f'preemption must be "recompute", "swap" or a CostModel; got {preemption!r}')
        self.manager = manager
        self.max_num_seqs = whole_number("max_num_seqs", max_num_seqs, at_least=1)
        self.max_batch_tokens = whole_number("max_batch_tokens", max_batch_tokens, at_least=1)
        if max_batch_tokens < max_num_seqs:
            raise ValueError(f"max_batch_tokens must be at least max_num_seqs, {max_num_seqs}; got {max_batch_tokens}")
        self.cost = preemption if isinstance(preemption, CostModel) else costs[preemption]
        self.spare_blocks = whole_number("spare_blocks", spare_blocks, at_least=0)
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.ended: list[Sequence] = []  # those that have ended, for whoever asks to take them out
        self._preempted: list[int] = []
        self._interrupted = False
        manager.moves.collect_all()

    # ---- requests ---------------------------------------------------------------------------------------------------

    @property
    def unfinished(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Let a new request wait for its turn."""
        self.waiting.append(sequence)
        self.waiting.sort(key=lambda waiting: waiting.rank)

    def cancel(self, sequence: Sequence) -> None:
        """End a request wherever it stands, and free its blocks."""
        if sequence.state is not State.FINISHED:
            self._finish(sequence, "cancelled")

    def discard(self, sequence: Sequence) -> None:
        """Forget a request that `cancel` failed to end: it is gone from here whatever the manager does."""
        for queue in (self.waiting, self.running):
            if sequence in queue:
                queue.remove(sequence)
        sequence.state, sequence.finish_reason = State.FINISHED, "cancelled"
        if sequence.seq_id in self.manager.seq_ids:
            self.manager.free(sequence.seq_id)

    def preempt(self, sequence: Sequence, *, swap: bool) -> None:
        """Take a running sequence's blocks away, between two steps: move them to the CPU pool, or free them.

        Raises
        ------
        ValueError
            If it does not run.
        OutOfBlocksError
            If the CPU pool has too little room.
        """
        if sequence.state is not State.RUNNING:
            raise ValueError(f"sequence must be running; {sequence.seq_id} is {sequence.state.value}")
        if swap:
            self.manager.swap_out(sequence.seq_id)
        else:
            self.manager.drop(sequence.seq_id)
        self.manager.counters.preemptions += 1
        self._wait_again(sequence, swapped=swap)

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Let a new request run on from where another stands; they share every block until one of them writes to it.

        Parameters
        ----------
        parent : Sequence
            It runs, and has generated its last token.
        child : Sequence
            New, with the parent's tokens, of which the last may be another.

        Raises
        ------
        ValueError
            If the parent does not decode, or as many run as may.
        """
        if parent.state is not State.RUNNING or not parent.output or not self._decodes(parent):
            raise ValueError(f"parent must be running, between two tokens of its answer; {parent.seq_id} is not")
        if len(self.running) >= self.max_num_seqs:
            raise ValueError(f"parent must be one of fewer than {self.max_num_seqs} that run; so many run already")
        self.manager.fork(parent.seq_id, child.seq_id)
        child.state, child.num_computed = State.RUNNING, parent.num_computed
        self.running.append(child)

    # ---- steps ------------------------------------------------------------------------------------------------------

    def schedule(self) -> Step:
        """Return the next step, with slots for all of its tokens; empty if no request is left.

        Raises
        ------
        OutOfBlocksError
            If a request cannot run though no other does: others hold the manager's blocks.
        """
        if self._interrupted:
            self._recover()
        self._interrupted = True  # until the step is complete
        self._finish_what_ended()
        self.running.sort(key=lambda sequence: sequence.rank)
        decoding = [sequence for sequence in self.running if self._decodes(sequence)]
        prompts = [sequence for sequence in self.running if not self._decodes(sequence)]
        preempted_before = len(self._preempted)
        work = self._decode(decoding) if decoding else []
        budget = self.max_batch_tokens - len(work)
        for sequence in prompts:
            if budget and sequence.state is State.RUNNING:
                work.append(Work(sequence, sequence.num_computed, min(budget, sequence.num_pending)))
                budget -= work[-1].count
        if len(self._preempted) == preempted_before:
            self._admit(work, budget)
        step = Step(work, list(self.manager.moves.pending), self._preempted)
        self._preempted = []
        return step

    def complete(
        self,
        step: Step,
        tokens: Iterable[int],
        end_token: int | None = None,
        *,
        failed: Collection[int] = (),
    ) -> None:
        """Note that a step was computed, its moves before it.

        Parameters
        ----------
        step : Step
            The last that `schedule` returned.
        tokens : iterable of int
            The next token of each of its sequences that samples, in order; below 0 if none could be chosen.
        end_token : int, optional
            The token that ends an answer.
        failed : collection of int
            Sequences whose keys and values proved unusable, whether they sample or not. They end, with the reason
            "error", and no block of theirs can be found by others; neither can that of one without a token.
        """
        self.manager.moves.done(step.moves)
        chosen, computed = iter(list(tokens)), []
        for work in step.work:  # what the sequences say of themselves, whatever fails below
            sequence, samples, full_before = work.sequence, work.samples, self._full_blocks(work.sequence.num_computed)
            token = int(next(chosen)) if samples else None
            if sequence.state is not State.RUNNING:
                continue  # it was cancelled while the step ran
            sequence.num_computed = work.stop
            sequence.finish_reason = self._take_token(sequence, token, end_token, sequence.seq_id in failed)
            computed.append((sequence, self._full_blocks(work.stop) > full_before))
        self._interrupted = False
        for sequence, fills_block in computed:
            if fills_block and sequence.finish_reason != "error":
                self.manager.publish(sequence.seq_id, sequence.num_computed)
        self._finish_what_ended()

    # ---- steps of the above -----------------------------------------------------------------------------------------

    def _full_blocks(self, num_tokens: int) -> int:
        return num_tokens // self.manager.block_size

    @staticmethod
    def _take_token(sequence: Sequence, token: int | None, end_token: int | None, failed: bool) -> str:
        """Give a sequence its next token, if it samples, and return why it ends; empty if it goes on."""
        if failed or (token is not None and token < 0):
            return "error"
        if token is None:
            return ""
        sequence.output.append(token)
        if token == end_token and not sequence.params.ignore_end:
            return "end"
        full = len(sequence.output) >= sequence.params.max_tokens or sequence.num_tokens >= sequence.limit
        return "length" if full else ""

    def _finish_what_ended(self) -> None:
        for sequence in [running for running in self.running if running.finish_reason]:
            self._finish(sequence, sequence.finish_reason)

    def _recover(self) -> None:
        """Bring sequences in line with the manager, after a step that was interrupted anywhere."""
        for sequence in list(self.running):
            if sequence.seq_id not in self.manager:
                self._wait_again(sequence, swapped=False)
            elif self.manager.is_swapped(sequence.seq_id):
                self._wait_again(sequence, swapped=True)
        for sequence in self.waiting:
            if sequence.state is State.WAITING and sequence.seq_id in self.manager:
                self.manager.free(sequence.seq_id, written=False)

    def _decode(self, decoding: list[Sequence]) -> list[Work]:
        """Give each sequence that decodes a slot for its next token, by preempting others if need be."""
        tokens = np.array([sequence.output[-1] for sequence in decoding], np.int32)
        try:
            self.manager.append_batch([sequence.seq_id for sequence in decoding], tokens)
        except OutOfBlocksError:
            return self._decode_one_by_one(decoding)
        return [Work(sequence, sequence.num_computed, 1) for sequence in decoding]

    def _decode_one_by_one(self, decoding: list[Sequence]) -> list[Work]:
        work: list[Work] = []
        for sequence in decoding:  # the first are worth most
            if sequence.state is State.RUNNING and self._make_room(sequence):
                work.append(self._append(sequence))
        return work

    def _append(self, sequence: Sequence) -> Work:
        self.manager.append(sequence.seq_id, sequence.tokens(sequence.num_computed))
        return Work(sequence, sequence.num_computed, 1)

    def _decodes(self, sequence: Sequence) -> bool:
        """Whether its next token has no slot yet; those of prompts were allocated on admission."""
        return sequence.num_computed == self.manager.num_tokens(sequence.seq_id)

    def _make_room(self, sequence: Sequence) -> bool:
        """Preempt what is worth less until a sequence can have a slot; returns False if it had to give way itself."""
        if self.manager.can_append(sequence.seq_id):
            return True
        by_id: dict[Hashable, Sequence] = {running.seq_id: running for running in self.running}
        protect = [seq_id for seq_id, running in by_id.items() if running.rank <= sequence.rank]
        try:
            victims = make_room(self.manager, 1, self.cost, protect=protect)
        except OutOfBlocksError:
            self.preempt(sequence, swap=self._swaps(sequence))
            return False
        for ids, swapped in ((victims.swapped, True), (victims.dropped, False)):
            for seq_id in ids:
                self._wait_again(by_id[seq_id], swapped=swapped)
        return True

    def _swaps(self, sequence: Sequence) -> bool:
        """Whether a sequence that gives way is swapped."""
        manager, seq_id = self.manager, sequence.seq_id
        cheaper = self.cost is not None and self.cost.prefers_swap(
            manager.num_tokens(seq_id), len(manager.blocks(seq_id))
        )
        return cheaper and manager.can_swap_out(seq_id)

    def _admit(self, work: list[Work], budget: int) -> None:
        """Admit waiting requests in order, until one does not fit: those behind it must not overtake it for ever."""
        while self.waiting and budget and len(self.running) < self.max_num_seqs:
            sequence = self.waiting[0]
            alone = not self.running
            if sequence.state is State.SWAPPED:
                if not self._swap_in(sequence, alone):
                    return
            elif not self._allocate(sequence, alone):
                return
            del self.waiting[0]
            sequence.state = State.RUNNING
            self.running.append(sequence)
            if self._decodes(sequence):
                work.append(self._append(sequence))
            else:
                work.append(Work(sequence, sequence.num_computed, min(budget, sequence.num_pending)))
            budget -= work[-1].count

    def _allocate(self, sequence: Sequence, alone: bool) -> bool:
        spare = 0 if alone else self.spare_blocks * self.manager.block_size
        tokens = sequence.tokens()
        if not alone and not self.manager.can_allocate(np.concatenate([tokens, np.zeros(spare, np.int32)])):
            return False
        try:
            self.manager.allocate(
                sequence.seq_id, tokens, priority=sequence.priority, publish=False,
                readmitted=sequence.num_preemptions > 0,
            )  # fmt: skip
        except OutOfBlocksError:
            if alone:
                raise
            return False
        sequence.num_computed = self.manager.cached_tokens(sequence.seq_id)
        if not sequence.num_preemptions:
            sequence.num_cached = sequence.num_computed
        return True

    def _swap_in(self, sequence: Sequence, alone: bool) -> bool:
        """Bring a sequence back, if it and its next token find room."""
        blocks = len(self.manager.blocks(sequence.seq_id))
        if not alone and self.manager.gpu.num_available < blocks + 1 + self.spare_blocks:
            return False
        if self.manager.is_swapped(sequence.seq_id):  # unless a step was interrupted right here
            self.manager.swap_in(sequence.seq_id)
        return True

    def _wait_again(self, sequence: Sequence, *, swapped: bool) -> None:
        self.running.remove(sequence)
        sequence.state = State.SWAPPED if swapped else State.WAITING
        if not swapped:
            sequence.num_computed = 0
        sequence.num_preemptions += 1
        self._preempted.append(sequence.seq_id)
        self.add(sequence)

    def _finish(self, sequence: Sequence, reason: str) -> None:
        """End a sequence; if that fails half-way, it ends with the next step."""
        sequence.finish_reason = reason
        if sequence.seq_id in self.manager:
            if reason == "error":
                self.manager.unpublish(sequence.seq_id)
            self.manager.free(sequence.seq_id)
        (self.running if sequence.state is State.RUNNING else self.waiting).remove(sequence)
        sequence.state = State.FINISHED
        self.ended.append(sequence)
