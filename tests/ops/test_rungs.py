"""What the rungs of the decode ladder add: partitions that merge."""

import numpy as np
import pytest

import cupaged as pg
from cupaged.ops import rungs
from tests.kit.cases import DecodeShape, decode_case
from tests.kit.compare import assert_decode_matches_reference


def cut_into(monkeypatch, tokens):
    monkeypatch.setattr(rungs, "split_context", lambda capacity, *_: (tokens, max(1, -(-capacity // tokens))))


@pytest.mark.parametrize("tokens", [1, 7, 32, 100, 10**6])
def test_partitions_of_any_size(tokens, backend, monkeypatch):
    """Contexts that end before, at and behind the end of a partition; more partitions than are merged at once."""
    cut_into(monkeypatch, tokens)
    shape = DecodeShape((0, 1, 6, 7, 8, 31, 32, 33, 99, 100, 101, 300), num_heads=6, block_size=5)
    case = decode_case(shape, backend)
    out, lse = pg.paged_attention(*case.arguments, kernel="paged_attention_v2", return_lse=True)
    assert_decode_matches_reference(case, out, lse, "paged_attention_v2")


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 1), (5, 1), (8, 1), (9, 1), (14, 2)])
def test_heads_that_share_loads_across_partitions(heads, kv_heads, backend, monkeypatch):
    cut_into(monkeypatch, 48)
    case = decode_case(DecodeShape((100, 0, 49), num_heads=heads, num_kv_heads=kv_heads), backend)
    out, lse = pg.paged_attention(*case.arguments, kernel="paged_attention_v2", return_lse=True)
    assert_decode_matches_reference(case, out, lse, "paged_attention_v2")


@pytest.mark.parametrize("unmapped", [0.6, 1.0])
def test_partitions_without_a_mapped_block(unmapped, backend, monkeypatch):
    """Their maximum is -inf, and so is that of two of them merged."""
    cut_into(monkeypatch, 16)
    case = decode_case(DecodeShape((200, 40, 16), unmapped=unmapped), backend)
    out, lse = pg.paged_attention(*case.arguments, kernel="paged_attention_v2", return_lse=True)
    assert_decode_matches_reference(case, out, lse, "paged_attention_v2")


def test_work_space_is_not_read_before_it_is_written(monkeypatch):
    cut_into(monkeypatch, 32)
    case = decode_case(DecodeShape((0, 1, 300, 33)), "host")
    with monkeypatch.context() as patch:
        patch.setattr(np, "empty", lambda shape, dtype: np.ones(shape, np.float32) * np.float32(np.nan))
        out, lse = pg.paged_attention(*case.arguments, kernel="paged_attention_v2", return_lse=True)
    assert_decode_matches_reference(case, out, lse, "paged_attention_v2")


@pytest.mark.parametrize(
    ("capacity", "blocks", "expected"),
    [
        (1024, 1024, (1024, 1)),  # a large batch fills the GPU by itself
        (4096, 512, (1024, 4)),
        (131072, 8, (1024, 128)),  # one sequence is spread over it
        (1024, 64, (128, 8)),  # short ones are not cut finer than is worth it
        (65536, 256, (1024, 64)),
        (0, 8, (128, 1)),
    ],
)
def test_how_contexts_are_cut_on_an_h100(capacity, blocks, expected):
    assert rungs.split_context(capacity, blocks, 132) == expected


@pytest.mark.parametrize("seed", range(200))
def test_partitions_cover_the_context_and_are_not_too_many(seed):
    rng = np.random.default_rng(seed)
    capacity, blocks = (int(2 ** rng.uniform(0, bits)) for bits in (31, 20))
    processors = int(rng.integers(1, 200))
    tokens, partitions = rungs.split_context(capacity, blocks, processors)
    assert (partitions - 1) * tokens < capacity <= partitions * tokens
    assert partitions <= rungs.MAX_PARTITIONS and tokens < 2**31
    fill = rungs.BLOCKS_TO_FILL * processors
    assert partitions == 1 or partitions * blocks <= rungs.MOST_WAVES * fill
    assert partitions * blocks >= fill // 4 or tokens == rungs.MIN_PARTITION_TOKENS
