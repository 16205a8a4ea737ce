"""The reference is checked against plain Python sums and against properties of the softmax."""

import math

import numpy as np
import pytest

import cupaged as pg
from tests.kit.cases import DecodeShape, decode_case


def test_attention_against_plain_python():
    rng = np.random.default_rng(0)
    query, key, value = rng.standard_normal((4, 8)), rng.standard_normal((5, 2, 8)), rng.standard_normal((5, 2, 8))
    out, lse = pg.reference.attention(query, key, value, scale=0.3)
    for head in range(4):
        kv_head = head // 2
        logits = [0.3 * sum(q * k for q, k in zip(query[head], key[t, kv_head], strict=True)) for t in range(5)]
        weights = [math.exp(logit) for logit in logits]
        assert lse[head] == pytest.approx(math.log(sum(weights)), rel=1e-12)
        for dim in range(8):
            expected = sum(w * value[t, kv_head, dim] for t, w in enumerate(weights)) / sum(weights)
            assert out[head, dim] == pytest.approx(expected, rel=1e-12)


def test_every_variant_against_plain_python():
    """Two query tokens at positions 3 and 4 of a sequence of five tokens in blocks of two; a window of three."""
    rng = np.random.default_rng(0)
    cache = pg.KVCache(pg.CacheConfig(4, 2, 2, 32, "float32"), "host")
    cache.fill_from_dense(*(rng.standard_normal((4, 2, 2, 32)).astype(np.float32) for _ in "kv"))
    tables, lens = np.array([[3, 0, 2]], np.int32), np.array([5], np.int32)
    query = rng.standard_normal((1, 2, 4, 32)).astype(np.float32)
    slopes, sinks = (rng.random(4).astype(np.float32) for _ in "as")
    out, lse = pg.reference.paged_attention(
        query, cache, tables, lens, 0.7, window=3, softcap=2.0, alibi_slopes=slopes, sinks=sinks, return_lse=True
    )
    keys, values = cache.to_dense()
    for i, position in enumerate((3, 4)):
        for head in range(4):
            logits, rows = [], []
            for token in range(position - 2, position + 1):
                place = tables[0, token // 2], token % 2, head // 2
                x = 0.7 * sum(float(q) * float(k) for q, k in zip(query[0, i, head], keys[place], strict=True))
                logits.append(2.0 * math.tanh(x / 2.0) + float(slopes[head]) * (token - position))
                rows.append(values[place])
            total = sum(math.exp(logit) for logit in logits) + math.exp(sinks[head])
            assert lse[0, i, head] == pytest.approx(math.log(total), rel=1e-12)
            for dim in range(32):
                expected = (
                    sum(math.exp(logit) * float(row[dim]) for logit, row in zip(logits, rows, strict=True)) / total
                )
                assert out[0, i, head, dim] == pytest.approx(expected, rel=1e-10)


def test_what_sees_nothing_has_output_zero_and_the_sink_or_minus_infinity():
    cache = pg.KVCache(pg.CacheConfig(1, 4, 1, 32, "float32"), "host")
    arguments = np.ones((2, 3, 1, 32), np.float32), cache, np.zeros((2, 1), np.int32), np.array([0, 2])
    out, lse = pg.reference.paged_attention(*arguments, return_lse=True)
    assert not out.any() and np.isneginf(lse[0]).all() and np.isneginf(lse[1, 0]) and np.isfinite(lse[1, 1:]).all()
    _, lse = pg.reference.paged_attention(*arguments, sinks=np.array([0.5]), return_lse=True)
    assert (lse[0] == 0.5).all() and lse[1, 0] == 0.5 and (lse[1, 1:] > 0.5).all()


def test_equal_keys_give_the_mean_and_the_logarithm_of_the_count():
    out, lse = pg.reference.attention(np.zeros((1, 8)), np.ones((7, 1, 8)), np.arange(56.0).reshape(7, 1, 8), 1.0)
    np.testing.assert_allclose(out[0], np.arange(56.0).reshape(7, 8).mean(axis=0))
    assert lse[0] == pytest.approx(math.log(7))


def test_an_unmapped_block_is_as_if_its_tokens_were_not_there():
    case = decode_case(DecodeShape((48,)), "host")
    case.block_tables[0, 1] = -1
    holed = pg.reference.paged_attention(*case.arguments)
    shorter = case.block_tables.copy()
    shorter[0, 1] = shorter[0, 2]
    np.testing.assert_allclose(
        holed, pg.reference.paged_attention(case.query, case.cache, shorter, np.array([32], dtype=np.int32)), rtol=1e-12
    )


def test_parts_of_a_context_merge_by_their_log_sum_exp():
    rng = np.random.default_rng(1)
    query, key, value = rng.standard_normal((2, 8)), rng.standard_normal((9, 1, 8)), rng.standard_normal((9, 1, 8))
    whole, _ = pg.reference.attention(query, key, value, 1.0)
    (a, lse_a), (b, lse_b) = (pg.reference.attention(query, key[s], value[s], 1.0) for s in (slice(4), slice(4, 9)))
    share = 1 / (1 + np.exp(lse_b - lse_a))[:, None]
    np.testing.assert_allclose(share * a + (1 - share) * b, whole, rtol=1e-12)
