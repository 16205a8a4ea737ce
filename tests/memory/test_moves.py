"""One ordered list of moves: the order in which they are made, what they reserve, and what a failure leaves."""

from __future__ import annotations

import numpy as np
import pytest

from cupaged.memory.manager import BlockManager
from cupaged.memory.moves import Move
from cupaged.memory.watermark import WatermarkEvictor

BLOCK = 4


class Bytes:
    """The content of both pools, one number a block."""

    def __init__(self, manager: BlockManager) -> None:
        self.manager = manager
        self.gpu = np.zeros(manager.gpu.num_blocks, int)
        self.cpu = np.zeros(manager.cpu.num_blocks, int)

    def make(self, kind: str, pairs: np.ndarray) -> None:
        source, target = {"out": (self.gpu, self.cpu), "in": (self.cpu, self.gpu), "copy": (self.gpu, self.gpu)}[kind]
        target[pairs[:, 1]] = source[pairs[:, 0]].copy()

    def transfers(self) -> None:
        for direction, pairs in self.manager.take_transfers():
            self.make({"offload": "out", "restore": "in"}[direction], pairs)

    def all_moves(self) -> list[Move]:
        moves = list(self.manager.moves.pending)
        for move in moves:
            self.make(move.kind, move.pairs)
            self.manager.moves.done([move])
        return moves


def full_cpu_pool() -> tuple[BlockManager, Bytes]:
    """Return 2 evictable cached blocks (101, 102) and "victim" (201, 202), which fills the CPU pool."""
    manager = BlockManager(8, 2, BLOCK, on_evict="offload")
    content = Bytes(manager)
    blocks = manager.allocate("text", np.arange(8))
    content.gpu[blocks] = [101, 102]
    manager.free("text")
    blocks = manager.allocate("victim", np.arange(100, 107))
    content.transfers()
    content.gpu[blocks] = [201, 202]
    pairs = manager.swap_out("victim")
    content.transfers()
    content.make("out", pairs)
    content.gpu[pairs[:, 0]] = 0
    return manager, content


def test_what_an_evictor_offloads_never_lands_on_what_a_swap_is_about_to_read():
    manager, content = full_cpu_pool()
    pairs = manager.swap_in("victim")
    assert WatermarkEvictor(manager, 0.3, 0.1, blocks_per_step=2).step() == 2  # as its thread might, right here
    content.transfers()
    content.make("in", pairs)
    assert content.gpu[manager.blocks("victim")].tolist() == [201, 202]
    assert manager.cpu.num_available == 2, "the blocks are free again once the next transfers were asked for"
    manager.check()


def test_in_one_list_moves_stand_in_the_order_of_the_decisions_whoever_made_them():
    manager, content = full_cpu_pool()
    manager.moves.collect_all()
    manager.swap_in("victim")
    WatermarkEvictor(manager, 0.3, 0.1, blocks_per_step=2).step()
    manager.check()
    assert [move.kind for move in content.all_moves()] == ["in"]
    assert content.gpu[manager.blocks("victim")].tolist() == [201, 202]
    manager.fork("victim", "twin")
    manager.append("twin")
    manager.swap_out("victim")
    kinds = [move.kind for move in content.all_moves()]
    assert kinds == ["copy", "out"]
    assert content.gpu[manager.blocks("twin")].tolist() == [201, 202]
    assert content.cpu[manager.blocks("victim")].tolist() == [201, 202]
    manager.check()


def test_a_restored_block_is_reserved_on_the_cpu_until_it_was_moved():
    manager = BlockManager(2, 2, BLOCK, on_evict="offload")
    manager.moves.collect_all()
    content = Bytes(manager)
    content.gpu[manager.allocate("a", np.arange(8))] = [1, 2]
    manager.free("a")
    manager.allocate("b", 8)
    manager.free("b")
    content.all_moves()
    blocks = manager.allocate("again", np.arange(8))
    assert manager.cpu.num_available == 1, "the block that is to be restored is reserved"
    manager.check()
    content.all_moves()
    assert content.gpu[blocks[0]] == 1
    assert manager.cpu.num_available == 2
    manager.check()


def test_a_move_that_was_not_made_is_there_for_the_next_attempt():
    manager, _ = full_cpu_pool()
    manager.moves.collect_all()
    manager.swap_in("victim")
    assert not manager.can_swap_out("victim"), "what the move reads is reserved"
    (first,) = manager.moves.pending
    assert manager.moves.pending == (first,), "looking does not take it away"
    manager.free("victim")
    assert manager.moves.pending == (first,), "its target may be handed out again, after it"
    assert manager.cpu.num_available == 0
    manager.moves.done([first])
    manager.moves.done([first])
    assert manager.moves.pending == ()
    assert manager.cpu.num_available == 2
    manager.check()


def test_moves_are_noted_in_order_only():
    manager = BlockManager(8, 8, BLOCK)
    manager.moves.collect_all()
    for seq_id in "ab":
        manager.allocate(seq_id, 4)
        manager.swap_out(seq_id)
    first, second = manager.moves.pending
    with pytest.raises(ValueError, match="moves must be made in order"):
        manager.moves.done([second])
    assert manager.moves.pending == (first, second)
    manager.moves.done([first, second])
    with pytest.raises(ValueError, match="take_transfers must not be called where all moves are collected"):
        manager.take_transfers()


def test_a_manager_that_collects_nothing_keeps_nothing_of_copies_and_swaps():
    manager = BlockManager(8, 8, BLOCK)
    manager.allocate("a", 6)
    manager.fork("a", "b")
    assert len(manager.append("a").copies) == 1
    manager.swap_out("a")
    manager.swap_in("a")
    assert manager.moves.pending == () and manager.moves.reserved == []
    assert manager.cpu.num_free == 8
