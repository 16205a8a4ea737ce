"""What the rungs of the decode ladder add: partitions that merge, and queries that share sequences."""

from dataclasses import replace

import numpy as np
import pytest

import cupaged as pg
from cupaged.attention.kernels import batched, partitions
from cupaged.runtime.host import record_traffic
from tests.kit.cases import DecodeShape, decode_case
from tests.kit.compare import assert_decode_matches_reference

OVER_PARTITIONS = pytest.mark.parametrize("kernel", ["paged_attention_v2", "paged_attention_mma"])


def cut_into(monkeypatch, tokens):
    monkeypatch.setattr(partitions, "split_context", lambda capacity, *_: (tokens, max(1, -(-capacity // tokens))))


@OVER_PARTITIONS
@pytest.mark.parametrize("tokens", [1, 7, 32, 100, 10**6])
def test_partitions_of_any_size(tokens, kernel, backend, monkeypatch):
    """Contexts that end before, at and behind the end of a partition; more partitions than are merged at once."""
    cut_into(monkeypatch, tokens)
    shape = DecodeShape((0, 1, 6, 7, 8, 31, 32, 33, 99, 100, 101, 300), num_heads=6, block_size=5)
    case = decode_case(shape, backend)
    out, lse = pg.paged_attention(*case.arguments, kernel=kernel, return_lse=True)
    assert_decode_matches_reference(case, out, lse, kernel)


@OVER_PARTITIONS
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 1), (5, 1), (8, 1), (9, 1), (16, 1), (14, 2), (51, 3)])
def test_heads_that_share_loads_across_partitions(heads, kv_heads, kernel, backend, monkeypatch):
    cut_into(monkeypatch, 48)
    case = decode_case(DecodeShape((100, 0, 49), num_heads=heads, num_kv_heads=kv_heads), backend)
    out, lse = pg.paged_attention(*case.arguments, kernel=kernel, return_lse=True)
    assert_decode_matches_reference(case, out, lse, kernel)


@OVER_PARTITIONS
@pytest.mark.parametrize("unmapped", [0.6, 1.0])
def test_partitions_without_a_mapped_block(unmapped, kernel, backend, monkeypatch):
    """Their maximum is -inf, and so is that of two of them merged."""
    cut_into(monkeypatch, 16)
    case = decode_case(DecodeShape((200, 40, 16), unmapped=unmapped), backend)
    out, lse = pg.paged_attention(*case.arguments, kernel=kernel, return_lse=True)
    assert_decode_matches_reference(case, out, lse, kernel)


@pytest.mark.parametrize("tokens", [1, 7, 32, 10**6])
@pytest.mark.parametrize("window", [None, 1, 31, 33, 100, 300])
def test_partitions_of_a_window(tokens, window, backend, monkeypatch):
    """They begin where the window does, another place for each query token, and a sink joins once for all of them."""
    cut_into(monkeypatch, tokens)
    shape = DecodeShape(
        (0, 1, 2, 3, 33, 40, 300), num_heads=6, block_size=5, window=window, query_tokens=3,
        softcap=3.0, alibi=True, sinks=True, unmapped=0.2,
    )  # fmt: skip
    case = decode_case(shape, backend)
    out, lse = pg.paged_attention(*case.arguments, kernel="paged_attention_v2", return_lse=True, **case.variants)
    assert_decode_matches_reference(case, out, lse, "paged_attention_v2")


def test_no_partition_lies_before_the_window():
    """Of 5000 tokens the 300 that are seen are cut up and read, by one query head of each KV head."""
    case = decode_case(DecodeShape((5000,), num_heads=2, window=300), "host")
    with record_traffic() as log:
        out = pg.paged_attention(*case.arguments, kernel="paged_attention_v2", **case.variants)
    assert_decode_matches_reference(case, out, kernel="paged_attention_v2")
    attention, merge = log
    assert attention.of("key_cache", "value_cache").bytes == 300 * 2 * 64 * 2 * 2
    assert merge.of("partial_out").bytes == 3 * 2 * 64 * 4  # 128 tokens or less in each partition


@OVER_PARTITIONS
def test_work_space_is_not_read_before_it_is_written(kernel, monkeypatch):
    cut_into(monkeypatch, 32)
    case = decode_case(DecodeShape((0, 1, 300, 33)), "host")
    with monkeypatch.context() as patch:
        patch.setattr(np, "empty", lambda shape, dtype: np.full(shape, np.nan, dtype))
        out, lse = pg.paged_attention(*case.arguments, kernel=kernel, return_lse=True)
    assert_decode_matches_reference(case, out, lse, kernel)


@pytest.mark.parametrize("block_size", [1, 7, 16, 256])
@pytest.mark.parametrize("head_dim", [32, 80, 256])
def test_chunks_of_rows_of_any_length_and_blocks_of_any_size(head_dim, block_size, backend):
    """Chunks that lie in many blocks, or share one; tokens that are not there before and behind others."""
    shape = DecodeShape(
        (0, 1, 15, 17, 64, 65, 200), num_heads=18, head_dim=head_dim, block_size=block_size, unmapped=0.2
    )
    case = decode_case(shape, backend)
    out, lse = pg.paged_attention(*case.arguments, kernel="paged_attention_mma", return_lse=True)
    assert_decode_matches_reference(case, out, lse, "paged_attention_mma")


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
    assert partitions.split_context(capacity, blocks, 132) == expected


@pytest.mark.parametrize("seed", range(200))
def test_partitions_cover_the_context_and_are_not_too_many(seed):
    rng = np.random.default_rng(seed)
    capacity, blocks = (int(2 ** rng.uniform(0, bits)) for bits in (31, 20))
    processors = int(rng.integers(1, 200))
    tokens, count = partitions.split_context(capacity, blocks, processors)
    assert (count - 1) * tokens < capacity <= count * tokens
    assert count <= partitions.MAX_PARTITIONS and tokens < 2**31
    fill = partitions.BLOCKS_TO_FILL * processors
    assert count == 1 or count * blocks <= partitions.MOST_WAVES * fill
    assert count * blocks >= fill // 4 or tokens == partitions.MIN_PARTITION_TOKENS


# --- queries that share sequences ------------------------------------------------------------------------------------


def shared_case(backend, query_to_seq, **shape):
    """Return a case whose sequences are those of the queries, one by one, and the call's arguments."""
    sequences = decode_case(DecodeShape((100, 0, 33, 300), **shape), backend)
    xp = sequences.cache.xp
    mapping = xp.asarray(query_to_seq, dtype=xp.int32)
    rng = np.random.default_rng(1)
    query = rng.standard_normal((len(query_to_seq), *sequences.query.shape[1:]))
    query = xp.asarray(query.astype(sequences.cache.config.numpy_dtype))
    one_by_one = replace(
        sequences, query=query, block_tables=sequences.block_tables[mapping], seq_lens=sequences.seq_lens[mapping]
    )
    return one_by_one, (query, *sequences.arguments[1:]), mapping


@pytest.mark.parametrize("query_to_seq", [[0, 1, 2, 3], [3, 3, 0, 1, 2, 0, 3], [2], [1, 1]], ids=str)
def test_queries_read_the_sequence_that_they_are_mapped_to(query_to_seq, backend):
    case, arguments, mapping = shared_case(backend, query_to_seq)
    out, lse = pg.paged_attention(*arguments, query_to_seq=mapping, return_lse=True)
    assert_decode_matches_reference(case, out, lse, "paged_attention_batched")


@pytest.mark.parametrize("blocks", [1, 2, 3, 7, 28, 100])
def test_a_grid_of_any_size_gives_the_same_bits(blocks, backend, monkeypatch):
    """Fewer blocks than (query, head) pairs, as many, and more."""
    case, arguments, mapping = shared_case(backend, [3, 3, 0, 1, 2, 0, 3], block_size=3)
    expected = pg.paged_attention(*arguments, query_to_seq=mapping)
    monkeypatch.setattr(batched, "batched_blocks", lambda *_: blocks)
    out, lse = pg.paged_attention(*arguments, query_to_seq=mapping, return_lse=True)
    assert_decode_matches_reference(case, out, lse, "paged_attention_batched")
    assert (out == expected).all()


def test_auto_takes_the_kernel_that_serves_query_to_seq(backend):
    _, arguments, mapping = shared_case(backend, [3, 3, 0])
    choice = pg.explain(*arguments, query_to_seq=mapping)
    assert choice.kernel == "paged_attention_batched" and "query_to_seq" in choice.reason


def test_a_plan_is_refused_with_query_to_seq(backend, xp):
    case = decode_case(DecodeShape((100, 33)), backend)
    plan = pg.plan_decode(case.cache, case.seq_lens, 4)
    with pytest.raises(ValueError, match="plan must be left out for paged_attention_batched"):
        pg.paged_attention(*case.arguments, plan=plan, query_to_seq=xp.arange(2, dtype=xp.int32))


def test_no_queries_of_some_sequences_give_no_rows(backend, xp):
    _, arguments, _ = shared_case(backend, [0])
    out = pg.paged_attention(arguments[0][:0], *arguments[1:], query_to_seq=xp.zeros(0, dtype=xp.int32))
    assert out.shape == (0, 4, 64)


def test_the_reference_maps_queries_one_by_one():
    case, arguments, mapping = shared_case("host", [3, 3, 0])
    out, lse = pg.reference.paged_attention(*arguments, query_to_seq=mapping, return_lse=True)
    for i in range(3):
        one = slice(i, i + 1)
        alone = pg.reference.paged_attention(
            case.query[one], case.cache, case.block_tables[one], case.seq_lens[one], return_lse=True
        )
        np.testing.assert_array_equal(out[one], alone[0])
        np.testing.assert_array_equal(lse[one], alone[1])


def test_weights_too_small_to_change_a_large_sum_alone_still_count(backend):
    """Rows of 256 float32 are read by a whole warp, so that one sum takes in all weights of a head."""
    shape = DecodeShape((8878,), num_heads=6, num_kv_heads=1, head_dim=256, dtype="float32", spread=2.0)
    case = decode_case(shape, backend)
    out, lse = pg.paged_attention(*case.arguments, kernel="paged_attention_warp", return_lse=True)
    assert_decode_matches_reference(case, out, lse, "paged_attention_warp")
