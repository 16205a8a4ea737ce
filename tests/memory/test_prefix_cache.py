"""The prefix cache cannot be fooled: a hit is the same text, after the same text, under the same keys."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cupaged.memory.manager import BlockManager
from cupaged.memory.prefix_cache import PrefixCache, chain, root_digest


def manager_of(num_blocks: int = 16, **options) -> BlockManager:
    return BlockManager(num_blocks, block_size=4, **options)


def cached(manager: BlockManager, tokens, **options) -> int:
    """Return how many tokens of a prompt are found, and forget the prompt again."""
    manager.allocate("probe", tokens, publish=False, **options)
    found = manager.cached_tokens("probe")
    manager.free("probe")
    manager.check()
    return found


def test_a_prompt_finds_the_full_blocks_that_it_shares():
    manager = manager_of()
    assert manager.allocate("first", range(10)).tolist() == [0, 1, 2]
    assert manager.allocate("second", [*range(8), 99, 98, 97, 96]).tolist() == [0, 1, 3]
    assert manager.cached_tokens("second") == 8
    assert manager.gpu.ref_count[:4].tolist() == [2, 2, 1, 1]


def test_a_hit_outlives_its_first_owner():
    manager = manager_of()
    manager.allocate("first", range(9))
    manager.free("first")
    assert manager.gpu.num_evictable == 2
    assert manager.allocate("second", range(9)).tolist()[:2] == [0, 1]
    assert manager.gpu.num_evictable == 0
    manager.check()


def test_tokens_whose_python_hashes_collide_are_told_apart():
    """``hash(-1) == hash(-2)``, so ``hash((-1,)) == hash((-2,))``: a cache by `hash` serves another's block."""
    assert hash((-1, 1, 2, 3)) == hash((-2, 1, 2, 3))
    manager = manager_of()
    manager.allocate("first", [-1, 1, 2, 3, 0])
    assert cached(manager, [-2, 1, 2, 3, 0]) == 0
    assert cached(manager, [-1, 1, 2, 3, 0]) == 4


def test_tokens_that_collide_under_xor_and_sum_are_told_apart():
    manager = manager_of()
    manager.allocate("first", [1, 2, 3, 4, 0])
    assert cached(manager, [4, 3, 2, 1, 0]) == 0
    assert cached(manager, [1, 2, 4, 3, 0]) == 0


def test_equal_tokens_after_different_parents_are_different_blocks():
    manager = manager_of()
    manager.allocate("first", [1, 1, 1, 1, 7, 7, 7, 7, 0])
    assert cached(manager, [7, 7, 7, 7, 0]) == 0
    assert cached(manager, [2, 2, 2, 2, 7, 7, 7, 7, 0]) == 0
    assert cached(manager, [1, 1, 1, 1, 7, 7, 7, 7, 0]) == 8


def test_repeated_blocks_have_different_names():
    digests = chain(root_digest(4), np.full(12, 5, np.int32), 4)
    assert len(set(digests)) == 3


def test_a_different_salt_hides_everything():
    first, second = (BlockManager(4, block_size=4, salt=salt) for salt in (b"a", b"b"))
    tokens = np.arange(8, dtype=np.int32)
    for manager in (first, second):
        manager.allocate("x", tokens)
    names = [manager.gpu.cache.digests(np.arange(2)) for manager in (first, second)]
    assert set(names[0]).isdisjoint(names[1])


def test_an_extra_key_separates_adapters_and_tenants():
    manager = manager_of()
    manager.allocate("first", range(9), extra=("lora-a",))
    assert cached(manager, range(9)) == 0
    assert cached(manager, range(9), extra=("lora-b",)) == 0
    assert cached(manager, range(9), extra=("lora-a", 1)) == 0
    assert cached(manager, range(9), extra=("lora-a",)) == 8


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (("ab", "c"), ("a", "bc")),
        (("a",), (b"a",)),
        ((1,), ("1",)),
        (("",), ()),
        (("1:s",), ("1", "s")),
        ((1, 2), (12,)),
        (("ab",), ("a", "b")),
        ((b"ab",), (97, 98)),
        ((-1,), (1,)),
        (("a", "b"), ("b", "a")),
    ],
)
def test_extra_keys_that_read_alike_are_told_apart(left, right):
    assert root_digest(4, b"", left) != root_digest(4, b"", right)
    assert root_digest(4, b"", ("x",)) != root_digest(4, b"x")


def test_the_same_tokens_in_blocks_of_another_size_have_other_names():
    assert root_digest(4) != root_digest(8)


@pytest.mark.parametrize(
    "item",
    [0.5, True, None, np.bool_(True), np.float32(1), np.array(1), np.timedelta64(1), bytearray(b"a"), memoryview(b"a"),
     ("a",), ["a"], {"a": 1}, {"a"}, frozenset("a"), iter("a"), object()],
    ids=lambda item: type(item).__name__,
)  # fmt: skip
def test_an_extra_key_of_another_type_is_refused(item):
    manager = manager_of()
    with pytest.raises(TypeError, match=f"extra must hold str, bytes or int, got {type(item).__name__}"):
        manager.allocate("x", range(9), extra=("a", item))
    with pytest.raises(TypeError, match=f"salt must be str, bytes or int, got {type(item).__name__}"):
        manager_of(salt=item)
    assert manager.seq_ids == []


@pytest.mark.parametrize(
    "extra",
    [
        {"lora": "alpha"}, {"lora": "beta"}, {}, "ab", "", b"ab", b"", bytearray(b"ab"), memoryview(b"ab"), {"a", "b"},
        frozenset(), None, False, True, 0, 7, 0.5, np.array([97, 98]), np.array([]), range(2), iter(("a",)),
        (item for item in ("a", "b")), {"a": 1}.items(), {"a": 1}.keys(),
    ],
    ids=lambda extra: type(extra).__name__,
)  # fmt: skip
def test_extra_keys_that_are_no_list_of_items_are_refused_whole(extra):
    """Iterated, a mapping would be its names alone, a text its characters, and a generator empty the second time."""
    manager = manager_of()
    expected = f"extra must be a list or tuple of str, bytes or int, .*, got {type(extra).__name__}"
    for call in (manager.can_allocate, lambda *args, **options: manager.allocate("x", *args, **options)):
        with pytest.raises(TypeError, match=expected):
            call(range(9), extra=extra)
    assert manager.seq_ids == [] and manager.gpu.num_used == 0


def test_equal_extra_keys_find_each_other_whatever_holds_them():
    manager = manager_of()
    manager.allocate("first", range(9), extra=["lora", 7, b"x"])
    assert cached(manager, range(9), extra=("lora", np.int64(7), np.bytes_(b"x"))) == 8
    assert cached(manager, range(9), extra=(np.str_("lora"), np.uint8(7), b"x")) == 8
    manager.allocate("second", range(9), extra=[])
    assert cached(manager, range(9)) == cached(manager, range(9), extra=()) == 8


def test_any_text_and_any_number_is_a_key():
    names = [root_digest(4, b"", (item,)) for item in ("\udc80", "\udc81", 10**5000, 10**5000 + 1, -(10**5000), -1, 1)]
    assert len(set(names)) == len(names)


def test_salts_of_different_types_are_told_apart():
    salts = [b"1", "1", 1, b"", "", 0, -1]
    assert len({root_digest(4, salt) for salt in salts}) == len(salts)


def test_what_is_unpublished_is_found_no_more_whoever_computed_it():
    manager = manager_of(12)
    manager.allocate("first", [1, 2, 3, 4, 5, 6, 7, 8, 9])
    manager.allocate("reader", [1, 2, 3, 4, 0])
    manager.allocate("other", [1, 2, 3, 4, 9, 9, 9, 9, 9])
    manager.unpublish("reader")
    assert cached(manager, [1, 2, 3, 4, 0]) == cached(manager, [1, 2, 3, 4, 5, 6, 7, 8, 9]) == 0
    assert manager.blocks("first").tolist()[0] == manager.blocks("reader").tolist()[0]  # who reads it keeps it
    for seq_id in ("first", "reader", "other"):
        manager.free(seq_id)
    assert manager.gpu.num_free == 10  # two blocks of others' further text still have names
    manager.check()


def test_unpublished_blocks_that_nobody_reads_are_free():
    manager = manager_of(8)
    for seq_id in ("first", "second"):  # side by side: the first one's blocks have the names
        manager.allocate(seq_id, range(9), publish=False)
    for seq_id in ("first", "second"):
        manager.publish(seq_id, 9)
    manager.free("first")
    assert manager.gpu.num_evictable == 2
    manager.unpublish("second")
    assert manager.gpu.num_evictable == 0 and manager.gpu.num_free == 5
    manager.unpublish("second")  # nothing is left of it
    manager.free("second")
    assert manager.gpu.num_free == 8
    manager.check()


def test_what_is_unpublished_is_not_restored_from_the_cpu():
    manager = BlockManager(4, 8, block_size=4, on_evict="offload")
    manager.allocate("first", range(9))
    manager.free("first")
    assert manager.evict(2) == 2 and len(manager.cpu.cache) == 2
    manager.allocate("second", range(9))
    assert manager.cached_tokens("second") == 8
    manager.swap_out("second")
    manager.unpublish("second")
    assert len(manager.cpu.cache) == len(manager.gpu.cache) == 0
    manager.free("second")
    manager.take_transfers()  # what they read is reserved until then
    assert manager.cpu.num_free == 8 and cached(manager, range(9)) == 0
    with pytest.raises(ValueError, match="seq_id must be a sequence that was admitted and not freed, got 'second'"):
        manager.unpublish("second")


def test_partial_blocks_are_not_found():
    manager = manager_of()
    manager.allocate("first", [1, 2, 3, 4, 5, 6])
    assert cached(manager, [1, 2, 3, 4, 5, 6, 7]) == 4
    assert cached(manager, [1, 2, 3]) == 0
    assert len(manager.gpu.cache) == 1


@pytest.mark.parametrize(("length", "found"), [(1, 0), (4, 0), (5, 4), (7, 4), (8, 4), (9, 8)])
def test_a_fully_cached_prompt_leaves_a_token_to_compute(length, found):
    """nano-vllm 144: a prompt that is cached to its last token left no query."""
    manager = manager_of()
    manager.allocate("first", range(12))
    manager.allocate("second", range(length))
    assert manager.cached_tokens("second") == found < length
    tail_shared = manager.gpu.ref_count[manager.blocks("second")[-1]] > 1
    assert not tail_shared  # the block that the model will write to is the sequence's own
    manager.check()


def test_a_block_that_is_used_again_loses_its_name():
    """nano-vllm 163: the name of a block's old content led to its new content."""
    manager = manager_of(2)
    manager.allocate("old", [1, 2, 3, 4, 5])
    manager.free("old")
    manager.allocate("new", [6, 7, 8, 9, 10])
    assert sorted(manager.blocks("new")) == [0, 1]
    manager.free("new")
    assert cached(manager, [1, 2, 3, 4, 5]) == 0


def test_a_freed_block_without_a_name_is_not_found():
    manager = manager_of(4)
    manager.allocate("a", range(5), publish=False)
    manager.free("a")
    assert manager.gpu.num_free == 4
    assert cached(manager, range(5)) == 0


def test_the_rest_of_a_prompt_is_mapped_after_a_miss():
    manager = manager_of()
    manager.allocate("first", [1] * 12)
    blocks = manager.allocate("second", [*[1] * 4, *[2] * 12])
    assert len(blocks) == 4
    assert len(set(blocks.tolist())) == 4
    assert manager.block_tables(["second"]).min() >= 0


def test_a_hit_after_a_gap_is_not_a_prefix():
    """The second block is known, but the first was evicted: nothing may be skipped."""
    manager = manager_of(4, eviction="fifo")
    manager.allocate("first", range(9), publish=False)
    manager.publish("first", 4)
    manager.publish("first", 8)
    manager.free("first")
    assert manager.gpu.evict(1).tolist() == [0]
    assert len(manager.gpu.cache) == 1
    assert cached(manager, range(9)) == 0


def test_two_prompts_admitted_side_by_side_keep_their_own_blocks():
    manager = manager_of()
    manager.allocate("first", range(9), publish=False)
    second = manager.allocate("second", range(9), publish=False)
    manager.publish("first", 9)
    manager.publish("second", 9)
    assert manager.allocate("third", range(9))[:2].tolist() == manager.blocks("first")[:2].tolist()
    assert not manager.gpu.cache.named[second].any()
    manager.free("second")
    manager.check()


def test_only_what_was_computed_is_published():
    manager = manager_of()
    manager.allocate("first", range(12), publish=False)
    assert cached(manager, range(12)) == 0
    manager.publish("first", 7)
    assert cached(manager, range(12)) == 4
    manager.publish("first", 12)
    assert cached(manager, range(13)) == 12


def test_generated_tokens_are_found_by_the_next_turn():
    manager = manager_of()
    manager.allocate("turn", [1, 2, 3, 4, 5])
    manager.append("turn", [6])
    manager.append("turn", [7, 8, 9, 10, 11, 12, 13])
    assert cached(manager, [*range(1, 14), 99]) == 12


def test_generated_tokens_of_a_batch_are_found_by_the_next_turn():
    manager = manager_of()
    for seq_id in "ab":
        manager.allocate(seq_id, [ord(seq_id)] * 3)
    batch = manager.batch("ab")
    for step in range(6):
        manager.append_batch(batch, tokens=[step, step + 10])
    assert cached(manager, [ord("a")] * 3 + [0, 1, 2, 3, 4, 5]) == 8
    assert cached(manager, [ord("b")] * 3 + [10, 11, 12, 13, 14, 15]) == 8
    assert cached(manager, [ord("b")] * 3 + [0, 1, 2, 3, 4, 5]) == 0


def test_a_sequence_with_an_unknown_token_has_no_further_names():
    manager = manager_of()
    manager.allocate("x", [1, 2, 3])
    manager.append("x", 1)  # some token
    manager.append("x", [5, 6, 7, 8])
    manager.append_batch(["x"], tokens=[9])
    assert len(manager.gpu.cache) == 0
    manager.allocate("y", 9)
    manager.append("y", [1, 2, 3])
    assert len(manager.gpu.cache) == 0


def test_a_fork_continues_its_parents_text():
    manager = manager_of()
    manager.allocate("parent", [1, 2, 3])
    manager.fork("parent", "child")
    manager.append("parent", [4, 5])
    manager.append("child", [9, 5])
    assert cached(manager, [1, 2, 3, 4, 0]) == 4
    assert cached(manager, [1, 2, 3, 9, 0]) == 4


def test_without_prefix_caching_nothing_is_found():
    manager = manager_of(prefix_caching=False)
    manager.allocate("first", range(9))
    manager.append("first", [1, 2, 3, 4])
    assert cached(manager, range(9)) == 0
    assert len(manager.gpu.cache) == 0


@given(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=40), st.integers(0, 40), st.integers(1, 8))
def test_a_chain_can_be_continued_from_any_block(tokens, cut, block_size):
    text = np.array(tokens, np.int32)
    whole = chain(b"root", text, block_size)
    assert len(whole) == len(tokens) // block_size
    cut = min(cut // block_size * block_size, len(tokens) // block_size * block_size)
    head = chain(b"root", text[:cut], block_size)
    assert head + chain(head[-1] if head else b"root", text[cut:], block_size) == whole


def test_names_are_the_same_for_any_integer_type_and_any_stride():
    tokens = np.arange(32)
    expected = chain(b"", tokens.astype(np.int32), 4)
    assert chain(b"", np.arange(0, 64, 2, dtype=np.int32)[:] // 2, 4) == expected
    spread = np.zeros(64, np.int32)
    spread[::2] = tokens
    assert chain(b"", spread[::2], 4) == expected
    managers = [manager_of() for _ in range(3)]
    for manager, text in zip(
        managers, (tokens.tolist(), tokens.astype(np.uint16), tokens.astype(np.int64)), strict=True
    ):
        manager.allocate("x", text)
    names = [manager.gpu.cache.digests(np.arange(8)) for manager in managers]
    assert names[0] == names[1] == names[2]


def test_the_cache_returns_the_longest_run_from_the_start():
    cache = PrefixCache(4)
    cache.publish(np.array([2, 0], np.int32), [b"a", b"c"])
    assert cache.match([b"a", b"b", b"c"]).tolist() == [2]
    assert cache.match([b"b", b"a"]).tolist() == []
    assert cache.match([]).tolist() == []
    assert cache.find([b"a", b"b", b"c"]).tolist() == [2, -1, 0]
    assert cache.forget(np.array([2], np.int32)) == [b"a"]
    assert cache.match([b"a"]).tolist() == []
