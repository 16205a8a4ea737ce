"""Tokens are drawn as the reference draws them, and as often as their probability says."""

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from scipy import stats

import cupaged as pg
from cupaged.bench.accuracy import FLOAT32_EPS, SAFETY
from cupaged.reference import as_numpy, sampling_probabilities, uniform
from cupaged.runtime import host

CUTS = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.3},
    {"top_k": 1},
    {"top_k": 7, "temperature": 2.0},
    {"top_p": 0.6},
    {"top_p": 1e-6},
    {"top_k": 30, "top_p": 0.9, "temperature": 1.5},
]


def logits_of(rows, vocab_size, seed=0, spread=3.0, dtype=np.float32):
    return (np.random.default_rng(seed).standard_normal((rows, vocab_size)) * spread).astype(dtype)


def allowed(logits, seed, temperature=1.0, top_k=0, top_p=1.0):
    """Return which tokens a right kernel may draw: those whose stretch of the cumulative probability the number meets.

    float32 rounds each weight by some units in the last place of its logit, and cuts off below 2^-44 of the largest.
    """
    largest = 1 + np.abs(logits).max() / max(temperature, 1e-3)
    budget = SAFETY * FLOAT32_EPS * largest + len(logits) * 2.0**-44
    tokens = np.zeros(len(logits), bool)
    for share in (top_p - budget, top_p, top_p + budget) if top_p < 1 else (1.0,):
        probabilities = sampling_probabilities(logits, temperature, top_k, max(share, 1e-12))
        cumulative = np.cumsum(probabilities)
        number = uniform(seed)
        tokens |= (probabilities > 0) & (cumulative + budget > number) & (cumulative - probabilities - budget <= number)
    return tokens


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("vocab_size", [1, 31, 500, 1500, 5003])
def test_the_token_is_where_the_number_falls(xp, vocab_size, cut):
    logits = logits_of(12, vocab_size)
    tokens = as_numpy(pg.sample(xp.asarray(logits), seed=3, **cut))
    for row, token in enumerate(tokens):
        assert allowed(logits[row], 3 + row, **cut)[token]
    assert np.mean(tokens == pg.reference.sample(logits, seed=3, **cut)) > 0.9  # the budget is narrow


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_logits(xp, dtype):
    logits = logits_of(12, 700, dtype=dtype)
    tokens = as_numpy(pg.sample(xp.asarray(logits), 0.8, 50, 0.9, 5))
    for row, token in enumerate(tokens):
        assert allowed(logits[row].astype(np.float64), 5 + row, 0.8, 50, 0.9)[token]


@pytest.mark.parametrize(
    "cut", [{}, {"top_k": 6}, {"top_p": 0.8}, {"temperature": 2.0, "top_k": 12, "top_p": 0.7}], ids=str
)
def test_tokens_come_as_often_as_their_probability_says(xp, cut):
    row, draws = logits_of(1, 40, seed=1, spread=1.5), 4000
    logits = xp.asarray(np.repeat(row, draws, axis=0))
    counts = np.bincount(as_numpy(pg.sample(logits, seed=11, **cut)), minlength=40)
    expected = draws * sampling_probabilities(row[0], **cut)
    assert (counts[expected == 0] == 0).all()
    often = expected >= 5  # what the test wants of a cell
    seldom = (expected > 0) & ~often
    cells = [(counts[often], expected[often])]
    if seldom.any():
        cells.append(([counts[seldom].sum()], [expected[seldom].sum()]))
    observed, wanted = (np.concatenate([cell[i] for cell in cells]) for i in (0, 1))
    assert stats.chisquare(observed, wanted).pvalue > 1e-3


def test_the_numbers_of_neighbouring_seeds_are_uniform():
    numbers = np.array([uniform(seed) for seed in range(5000)])
    assert stats.kstest(numbers, "uniform").pvalue > 1e-3
    assert stats.kstest(np.mod(numbers[1:] - numbers[:-1], 1), "uniform").pvalue > 1e-3


def test_each_row_has_parameters_of_its_own(xp):
    logits = logits_of(4, 300)
    temperature, top_p = np.array([0, 1, 0.5, 2], np.float32), np.array([1, 0.5, 1, 0.9], np.float32)
    top_k, seeds = np.array([0, 0, 3, 50], np.int32), np.array([1, 2**64 - 1, 3, 4], np.uint64)
    tokens = as_numpy(pg.sample(*(xp.asarray(array) for array in (logits, temperature, top_k, top_p, seeds))))
    for i in range(4):
        alone = pg.sample(
            xp.asarray(logits[i : i + 1]), float(temperature[i]), int(top_k[i]), float(top_p[i]), int(seeds[i])
        )
        assert tokens[i] == int(alone[0])


def test_a_row_is_drawn_alike_in_any_batch_and_under_any_schedule():
    logits = logits_of(6, 2100)
    expected = pg.sample(logits, 1.0, 100, 0.9, 7)
    np.testing.assert_array_equal(pg.sample(logits[2:], 1.0, 100, 0.9, 9), expected[2:])
    for seed in range(3):
        with host.schedule(seed):
            np.testing.assert_array_equal(pg.sample(logits, 1.0, 100, 0.9, 7), expected)


def test_ties_stay_and_the_first_is_the_most_likely(xp):
    logits = np.array([[1, 3, 2, 3, 2, 0]], np.float32)
    assert int(pg.sample(xp.asarray(logits), 0.0)[0]) == 1
    many = xp.asarray(np.repeat(logits, 300, axis=0))
    assert set(as_numpy(pg.sample(many, top_k=1)).tolist()) == {1, 3}
    assert set(as_numpy(pg.sample(many, top_k=3)).tolist()) == {1, 2, 3, 4}
    assert set(as_numpy(pg.sample(many, top_p=0.3)).tolist()) == {1, 3}


def test_minus_infinity_rules_a_token_out(xp):
    logits = np.zeros((200, 70), np.float32)
    logits[:, 5:] = -np.inf
    assert set(as_numpy(pg.sample(xp.asarray(logits), 100.0)).tolist()) == {0, 1, 2, 3, 4}
    logits[:, 1:] = -np.inf
    assert set(as_numpy(pg.sample(xp.asarray(logits), 1.0, 30, 0.99)).tolist()) == {0}


def test_rows_without_a_finite_largest_logit_give_no_token(xp):
    logits = np.zeros((4, 40), np.float32)
    logits[0], logits[1, 3], logits[2, 3] = -np.inf, np.nan, np.inf
    for temperature in (0.0, 1.0):
        tokens = as_numpy(pg.sample(xp.asarray(logits), temperature, validate=False))
        assert (tokens[:3] == -1).all() and tokens[3] >= 0


QUIET_NAN, NEGATIVE_NAN = (np.array(bits, np.uint32).view(np.float32) for bits in (0x7FC00000, 0xFFC00000))
SPOILED = {
    "NaN": lambda row: row.__setitem__(7, QUIET_NAN),
    "NaN with the sign bit": lambda row: row.__setitem__(7, NEGATIVE_NAN),
    "NaN first": lambda row: row.__setitem__(0, NEGATIVE_NAN),
    "NaN last": lambda row: row.__setitem__(-1, NEGATIVE_NAN),
    "NaN beside plus infinity": lambda row: row.__setitem__(slice(3, 5), (np.inf, NEGATIVE_NAN)),
    "NaN beside minus infinity": lambda row: row.__setitem__(slice(None), [np.nan] + (len(row) - 1) * [-np.inf]),
    "all NaN": lambda row: row.fill(QUIET_NAN),
    "all NaN with the sign bit": lambda row: row.fill(NEGATIVE_NAN),
    "plus infinity": lambda row: row.__setitem__(11, np.inf),
    "all minus infinity": lambda row: row.fill(-np.inf),
}


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32], ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_an_invalid_row_is_marked_and_the_others_are_drawn_as_ever(xp, cut, dtype):
    """The rows between the spoiled ones have the tokens that they have without them."""
    for vocab_size in (40, 1500):
        logits = logits_of(2 * len(SPOILED), vocab_size, dtype=dtype)
        expected = as_numpy(pg.sample(xp.asarray(logits), seed=3, **cut))
        for row, spoil in zip(logits[::2], SPOILED.values(), strict=True):
            spoil(row)
        for asked in ({"invalid": "mark"}, {"invalid": "mark", "validate": True}, {"validate": False}):
            tokens = as_numpy(pg.sample(xp.asarray(logits), seed=3, **cut, **asked))
            assert dict(zip(SPOILED, tokens[::2].tolist(), strict=True)) == dict.fromkeys(SPOILED, -1)
            np.testing.assert_array_equal(tokens[1::2], expected[1::2])
        np.testing.assert_array_equal(pg.reference.sample(logits, seed=3, **cut)[::2], -1)
        for row in range(0, len(logits), 2):
            with pytest.raises(ValueError, match="logits must have a finite largest entry in each row; that of row 0"):
                pg.sample(xp.asarray(logits[row : row + 1]), seed=3, validate=True, **cut)


def test_a_spoiled_row_holds_nan_with_the_sign_bit():
    row = np.zeros(12, ml_dtypes.bfloat16)
    row[7] = NEGATIVE_NAN
    assert row.view(np.uint16)[7] & 0x8000 and np.signbit(np.float32(NEGATIVE_NAN))


@pytest.mark.parametrize(
    ("name", "dtype", "values"),
    [
        ("temperature", np.float32, (np.nan, -1.0, np.inf)),
        ("top_k", np.int32, (-1, -(2**31))),
        ("top_p", np.float32, (np.nan, 0.0, -0.5, 1.5)),
    ],
)
def test_a_row_with_a_parameter_out_of_range_is_marked_where_nothing_is_checked(xp, name, dtype, values):
    logits = logits_of(len(values) + 1, 70)
    given = xp.asarray(np.array([*values, 1], dtype))
    tokens = as_numpy(pg.sample(xp.asarray(logits), **{name: given}, seed=3, validate=False))
    assert tokens[:-1].tolist() == [-1] * len(values)
    assert tokens[-1] == pg.reference.sample(logits, 1.0, int(name == "top_k"), seed=3)[-1]
    with pytest.raises(ValueError, match=f"{name} must be"):
        pg.sample(xp.asarray(logits), **{name: given}, invalid="mark", validate=True)


def test_extreme_temperatures(xp):
    logits = xp.asarray(logits_of(20, 90))
    greedy = as_numpy(pg.sample(logits, 0.0))
    np.testing.assert_array_equal(as_numpy(pg.sample(logits, 1e-44)), greedy)  # 1 / temperature is infinite
    assert len(set(as_numpy(pg.sample(logits, 1e30)).tolist())) > 10


COLD = [1e-50, 5e-324, 1e-44, 1e-39, np.float64(1e-50), np.longdouble(1e-50), np.float16(6e-8)]
HOT = [1e300, 10**30, 10**400, np.float64(1e300), np.float32(3e38), np.longdouble(1e300)]


@pytest.mark.parametrize("temperature", COLD, ids=repr)
def test_a_temperature_near_0_draws_among_the_most_likely(xp, temperature):
    logits = np.array([[1, 3, 2, 3, 2, -np.inf]], np.float32)
    drawn = set(as_numpy(pg.sample(xp.asarray(np.repeat(logits, 200, axis=0)), temperature)).tolist())
    assert drawn == {1, 3} == set(pg.reference.sample(np.repeat(logits, 200, axis=0), float(temperature)).tolist())


@pytest.mark.parametrize("temperature", HOT, ids=lambda value: f"{type(value).__name__}, {len(str(value))} digits")
def test_an_endless_temperature_draws_among_all_alike(xp, temperature):
    logits = np.repeat(np.array([[1, 30, -20, 3, 2, -np.inf]], np.float32), 1000, axis=0)
    counts = np.bincount(as_numpy(pg.sample(xp.asarray(logits), temperature)), minlength=6)
    assert counts[5] == 0 and stats.chisquare(counts[:5]).pvalue > 1e-3
    kept = as_numpy(pg.sample(xp.asarray(logits), temperature, top_k=2))
    assert set(kept.tolist()) == {1, 3}


@pytest.mark.parametrize("top_p", [1e-50, 5e-324, 1e-40, np.float64(1e-50), np.longdouble(1e-50), np.float16(6e-8)])
def test_a_share_near_0_draws_among_the_most_likely(xp, top_p):
    logits = np.repeat(np.array([[1, 3, 2, 3, 2, 0]], np.float32), 200, axis=0)
    drawn = set(as_numpy(pg.sample(xp.asarray(logits), top_p=top_p)).tolist())
    assert drawn == {1, 3} == set(pg.reference.sample(logits, top_p=float(top_p)).tolist())


@pytest.mark.parametrize(
    "top_k", [2**31, 2**63, 10**400, np.uint64(2**63), np.int64(2**40)], ids=lambda k: type(k).__name__
)
def test_a_top_k_beyond_the_vocabulary_means_all(xp, top_k):
    logits = xp.asarray(logits_of(20, 90))
    np.testing.assert_array_equal(as_numpy(pg.sample(logits, top_k=top_k)), as_numpy(pg.sample(logits)))


def test_numbers_of_numpy_are_numbers(xp):
    logits = xp.asarray(logits_of(20, 90))
    expected = as_numpy(pg.sample(logits, 0.75, 5, 0.5, 2**64 - 3))
    given = np.float32(0.75), np.uint8(5), np.float16(0.5), np.int64(-3)
    np.testing.assert_array_equal(as_numpy(pg.sample(logits, *given)), expected)


def test_out_is_written(xp):
    logits, out = xp.asarray(logits_of(3, 50)), xp.full(3, 99, np.int32)
    assert pg.sample(logits, out=out) is out
    np.testing.assert_array_equal(as_numpy(out), as_numpy(pg.sample(logits)))
    assert len(pg.sample(logits[:0])) == 0


def test_fractions_are_numbers(xp):
    logits = xp.asarray(logits_of(3, 50))
    plain = pg.sample(logits, 0.5, top_p=0.25, seed=5)
    np.testing.assert_array_equal(
        as_numpy(pg.sample(logits, Fraction(1, 2), top_p=Fraction(1, 4), seed=5)), as_numpy(plain)
    )
    coldest = as_numpy(pg.sample(logits, Fraction(1, 10**400), seed=5))
    np.testing.assert_array_equal(coldest, as_numpy(logits).argmax(axis=1))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"logits": np.zeros((2, 3))}, TypeError, "logits must have dtype float16 or bfloat16 or float32; got float64"),
        ({"logits": np.zeros(3, np.float32)}, ValueError, r"logits must have shape .*vocab_size\]; got \[3\]"),
        ({"logits": np.zeros((3, 0), np.float32)}, ValueError, "logits must have at least one token a row"),
        ({"logits": np.zeros((4, 3), np.float32).T}, ValueError, "logits must be C-contiguous"),
        ({"logits": np.zeros((1, 2**19 + 1), np.float32)}, pg.UnsupportedError, "at most 524288 tokens a row"),
        ({"logits": np.full((1, 2), np.nan, np.float32)}, ValueError, "that of row 0 is nan"),
        ({"temperature": -1.0}, ValueError, "temperature must be finite and at least 0; got -1.0"),
        ({"temperature": "hot"}, TypeError, "temperature must be a real number, or an array of float32; got str 'hot'"),
        ({"temperature": np.ones(2)}, TypeError, "temperature must have dtype float32; got float64"),
        ({"temperature": np.array([1, np.nan], np.float32)}, ValueError, "temperature must be finite"),
        ({"top_k": 2.5}, TypeError, "top_k must be an integer, or an array of int32; got float 2.5"),
        ({"top_k": -1}, ValueError, "top_k must be an integer, 0 or more; got -1"),
        ({"top_k": -(10**400)}, ValueError, "top_k must be an integer, 0 or more; got -1000"),
        ({"top_k": np.array([1, -2], np.int32)}, ValueError, "top_k must be an integer, 0 or more; got -2"),
        ({"top_k": np.timedelta64(2)}, TypeError, "top_k must be an integer, or an array of int32; got timedelta64"),
        ({"temperature": np.timedelta64(2)}, TypeError, "temperature must be a real number, .*; got timedelta64"),
        ({"seed": np.timedelta64(2)}, TypeError, "seed must be an integer, or an array of uint64; got timedelta64"),
        ({"top_p": Fraction(10**30 + 1, 10**30)}, ValueError, "top_p must be above 0 and at most 1; got 1000"),
        ({"temperature": Fraction(-1, 10**400)}, ValueError, "temperature must be finite and at least 0; got -1/1000"),
        ({"temperature": -1e-50}, ValueError, "temperature must be finite and at least 0; got -1e-50"),
        ({"temperature": -(10**400)}, ValueError, "temperature must be finite and at least 0; got -1000"),
        ({"temperature": np.inf}, ValueError, "temperature must be finite and at least 0; got inf"),
        ({"temperature": np.nan}, ValueError, "temperature must be finite and at least 0; got nan"),
        ({"top_p": -1e-50}, ValueError, "top_p must be above 0 and at most 1; got -1e-50"),
        ({"top_p": np.nan}, ValueError, "top_p must be above 0 and at most 1; got nan"),
        ({"top_p": 0.0}, ValueError, "top_p must be above 0 and at most 1; got 0.0"),
        ({"top_p": np.array([1, 2], np.float32)}, ValueError, "top_p must be above 0 and at most 1; got 2.0"),
        ({"seed": True}, TypeError, "seed must be an integer"),
        ({"seed": np.zeros(3, np.uint64)}, ValueError, r"seed must have shape \[2\]; got \[3\]"),
        ({"invalid": "drop"}, ValueError, "invalid must be one of raise, mark; got 'drop'"),
        ({"out": np.zeros(2)}, TypeError, "out must have dtype int32; got float64"),
    ],
)  # fmt: skip
def test_mistakes_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        pg.sample(**{"logits": logits_of(2, 5), **arguments})
