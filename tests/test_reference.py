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
