"""The module finds room, shares prefixes, writes and attends: held to dense attention over what was given to it."""

import numpy as np
import pytest

import cupaged as pg
from cupaged.bench.accuracy import prefill_budget
from cupaged.reference import attention
from tests.kit.compare import to_numpy

CONFIG = pg.CacheConfig(24, 4, 2, 32, "float16", "BSHD")


class Dense:
    """Keys and values of sequences that lie in one piece, and attention over them in float64."""

    def __init__(self):
        self.rows = {}

    def attend(self, seq_id, query, key, value, already=0):
        old = self.rows.get(seq_id, (key[:0], value[:0]))
        both = tuple(np.concatenate([a[: len(a) - already], b]) for a, b in zip(old, (key, value), strict=True))
        self.rows[seq_id] = both
        length = len(both[0])
        ends = length - len(query) + 1 + np.arange(len(query))
        pairs = zip(query, ends, strict=True)
        return np.stack([attention(q, *(a[:end] for a in both), 32**-0.5)[0] for q, end in pairs])


def rows(count, seed, xp, heads=4, dtype="float16"):
    rng = np.random.default_rng(seed)
    return [xp.asarray(rng.standard_normal((count, n, 32)).astype(dtype)) for n in (heads, 2, 2)]


def assert_close(actual, expected):
    """Within what half precision makes of an output of this size: weights and results are rounded once each."""
    actual = to_numpy(actual).astype(float)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max(initial=0) <= 2 * 2**-10 * max(1.0, np.abs(expected).max(initial=0))


@pytest.mark.parametrize(("dtype", "layout"), [("float16", "BSHD"), ("float32", "BHSD"), ("float16", "BHDSX")])
def test_prompts_then_steps(dtype, layout, backend, xp):
    module = pg.PagedAttention(pg.CacheConfig(24, 4, 2, 32, dtype, layout), backend=backend)
    dense = Dense()
    query, key, value = rows(16, 0, xp, dtype=dtype)
    out = module.forward(query, key, value, ["a", "b", "c"], True, tokens=[9, 1, 6])
    host = [to_numpy(array) for array in (query, key, value)]
    cuts = (slice(0, 9), slice(9, 10), slice(10, 16))
    expected = [dense.attend(s, *(array[cut] for array in host)) for s, cut in zip("abc", cuts, strict=True)]
    assert_close(out, np.concatenate(expected))
    for step in range(6):
        names = ["c", "a", "b"] if step != 3 else ["b"]
        query, key, value = rows(len(names), 1 + step, xp, dtype=dtype)
        out = module.forward(query, key, value, names, False)
        host = [to_numpy(array) for array in (query, key, value)]
        expected = [dense.attend(s, *(array[i : i + 1] for array in host)) for i, s in enumerate(names)]
        assert_close(out, np.concatenate(expected))
    module.free("a")
    assert module.manager.seq_ids == ["b", "c"]


@pytest.mark.parametrize("whole", [True, False])
def test_a_shared_prefix_is_written_once_and_read_by_both(whole, backend, xp):
    module = pg.PagedAttention(CONFIG, backend=backend)
    dense = Dense()
    text = np.arange(11, dtype=np.int32)
    first = rows(11, 0, xp)
    host = [to_numpy(array) for array in first]
    assert_close(module.forward(*first, ["a"], True, tokens=[text]), dense.attend("a", *host))
    before = [to_numpy(array).copy() for array in module.cache.to_dense()]

    other = np.concatenate([text[:9], [70, 71, 72, 73]]).astype(np.int32)
    fresh = rows(13, 1, xp)
    shared = 8
    for array, old in zip(fresh[1:], first[1:], strict=True):
        array[:shared] = old[:shared]  # the same tokens have the same keys and values
    given = [array if whole else xp.ascontiguousarray(array[shared:]) for array in fresh]
    out = module.forward(*given, ["b"], True, tokens=[other])
    assert module.manager.cached_tokens("b") == shared
    expected = dense.attend("b", *(to_numpy(array) for array in fresh))
    assert_close(out, expected if whole else expected[shared:])
    assert (module.manager.blocks("b")[:2] == module.manager.blocks("a")[:2]).all()
    for array, old in zip(module.cache.to_dense(), before, strict=True):
        mine = module.manager.blocks("a")
        np.testing.assert_array_equal(to_numpy(array)[mine], old[mine])


def test_a_fork_copies_the_tail_that_it_writes(backend, xp):
    module = pg.PagedAttention(CONFIG, backend=backend)
    dense = Dense()
    prompt = rows(6, 0, xp)
    module.forward(*prompt, ["a"], True)
    dense.attend("a", *(to_numpy(array) for array in prompt))
    dense.rows["b"] = dense.rows["a"]
    module.manager.fork("a", "b")
    step = rows(2, 1, xp)
    out = module.forward(*step, ["a", "b"], False)
    host = [to_numpy(array) for array in step]
    assert_close(out, np.concatenate([dense.attend(s, *(a[i : i + 1] for a in host)) for i, s in enumerate("ab")]))


def test_a_prompt_in_chunks_is_one_prompt(backend, xp):
    query, key, value = rows(23, 0, xp)
    once = pg.PagedAttention(CONFIG, backend=backend)
    expected = to_numpy(once.forward(query, key, value, ["a"], True)).astype(float)
    manager = once.manager
    budget = prefill_budget(
        query, once.cache, xp.asarray(manager.block_tables(["a"])), xp.asarray(manager.seq_lens(["a"])),
        xp.asarray([0, 23], dtype=xp.int32),
    )  # fmt: skip
    chunked = pg.PagedAttention(CONFIG, backend=backend)
    parts = []
    for cut in (slice(0, 7), slice(7, 8), slice(8, 23)):
        part = [xp.ascontiguousarray(array[cut]) for array in (query, key, value)]
        parts.append(to_numpy(chunked.forward(*part, ["a"], True)))
    assert (np.abs(np.concatenate(parts).astype(float) - expected) <= 2 * budget.out).all()


def test_layers_share_a_step(backend, xp):
    manager = pg.BlockManager(24, block_size=4)
    layers = [pg.PagedAttention(CONFIG, manager, backend) for _ in range(2)]
    step = layers[0].step(["a"], True, 5)
    for seed, layer in enumerate(layers):
        given = rows(5, seed, xp)
        assert_close(layer.attend(*given, step), Dense().attend("a", *(to_numpy(array) for array in given)))
    assert manager.num_tokens("a") == 5


def test_without_room_nothing_changes(backend, xp):
    module = pg.PagedAttention(pg.CacheConfig(4, 4, 2, 32), backend=backend)
    given = rows(20, 0, xp)
    with pytest.raises(pg.OutOfBlocksError):
        module.forward(*given, ["a", "b"], True, tokens=[4, 16])
    assert module.manager.seq_ids == [] and module.manager.can_allocate(16)


@pytest.mark.parametrize(
    ("names", "is_prompt", "tokens", "message"),
    [
        (["a", "a"], True, [1, 2], "sequence_ids must name each sequence once"),
        (["a", "b"], True, None, "tokens must be given for several prompts; got 2 sequences"),
        (["a", "b"], True, [3], "tokens must have an entry for each of 2 sequences; got 1"),
        (["a", "b"], True, [1, 1], "query must have a row for each of 2 tokens, .* got 3"),
        (["old"], False, None, "query must have one row for each of 1 sequences; got 3"),
    ],
)
def test_a_mistake_names_the_argument(names, is_prompt, tokens, message, backend, xp):
    module = pg.PagedAttention(CONFIG, backend=backend)
    module.forward(*rows(2, 0, xp), ["old"], True)
    with pytest.raises(ValueError, match=message):
        module.forward(*rows(3, 1, xp), names, is_prompt, tokens=tokens)
    assert module.manager.seq_ids == ["old"] and module.manager.num_tokens("old") == 2


def test_one_prompt_at_a_time_is_continued(backend, xp):
    module = pg.PagedAttention(CONFIG, backend=backend)
    module.forward(*rows(4, 0, xp), ["a", "b"], True, tokens=[2, 2])
    with pytest.raises(pg.UnsupportedError, match=r"a call may continue one prompt; got \['a', 'b'\]"):
        module.forward(*rows(4, 1, xp), ["a", "b"], True, tokens=[2, 2])


def test_what_a_failed_call_was_to_write_is_not_found(backend, xp):
    texts = [np.arange(9, dtype=np.int32), np.arange(100, 120, dtype=np.int32)]
    given = rows(29, 0, xp)
    module = pg.PagedAttention(pg.CacheConfig(6, 4, 2, 32), backend=backend)
    for tokens, error in ((texts, pg.OutOfBlocksError), ([texts[0], texts[0][:6]], ValueError)):
        with pytest.raises(error):
            module.forward(*given, ["a", "b"], True, tokens=tokens)
        assert module.manager.seq_ids == [] and module.manager.gpu.num_free == 6
    with pytest.raises(TypeError, match="key must have dtype float16"):
        module.forward(given[0][:9], given[1][:9].astype(np.float32), given[2][:9], ["a"], True, tokens=texts[:1])
    assert module.manager.seq_ids == []
    mine = [array[:9] for array in given]
    assert_close(
        module.forward(*mine, ["a"], True, tokens=texts[:1]), Dense().attend("a", *(to_numpy(array) for array in mine))
    )
    assert module.manager.cached_tokens("a") == 0
    module.manager.check()


def test_prompts_that_share_a_prefix_may_come_in_one_call(backend, xp):
    module = pg.PagedAttention(CONFIG, backend=backend)
    text = np.arange(9, dtype=np.int32)
    given = rows(9, 0, xp)
    twice = [xp.concatenate([array, array]) for array in given]
    out = module.forward(*twice, ["a", "b"], True, tokens=[text, text])
    expected = Dense().attend("a", *(to_numpy(array) for array in given))
    assert_close(out, np.concatenate([expected, expected]))
    assert module.manager.cached_tokens("b") == 8


def test_a_module_offloads_what_is_evicted_and_finds_it_again(backend, xp):
    config = pg.CacheConfig(6, 4, 2, 32)
    manager = pg.BlockManager(6, 12, block_size=4, on_evict="offload")
    with pytest.raises(ValueError, match="swaps must be given for a manager"):
        pg.PagedAttention(config, manager, backend)
    cache = pg.KVCache(config, backend)
    with pytest.raises(ValueError, match="swaps must be over this layer's cache"):
        pg.PagedAttention(config, manager, backend, swaps=pg.SwapEngine([cache], 12))
    module = pg.PagedAttention(config, manager, backend, cache=cache, swaps=pg.SwapEngine([cache], 12))
    text, given, dense = np.arange(18, dtype=np.int32), rows(18, 0, xp), Dense()
    expected = dense.attend("a", *(to_numpy(array) for array in given))
    assert_close(module.forward(*given, ["a"], True, tokens=[text]), expected)
    module.free("a")
    module.forward(*rows(20, 1, xp), ["b"], True, tokens=[np.arange(50, 70, dtype=np.int32)])
    module.free("b")
    out = module.forward(*given, ["a"], True, tokens=[text])
    assert manager.cached_tokens("a") == 16
    assert_close(out, expected)


def test_a_cache_of_another_config_is_refused(backend):
    with pytest.raises(ValueError, match="cache must be of the config"):
        pg.PagedAttention(CONFIG, cache=pg.KVCache(pg.CacheConfig(6, 4, 2, 32), backend))
