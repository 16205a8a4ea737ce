"""The comparison with others: each adapter hands a peer what the peer's interface asks for, and the rows add up.

Peers are played by stand-ins with their interfaces, which attend in float64 by the pages that they are given.
"""

import sys
from types import ModuleType

import numpy as np
import pytest

from cupaged import reference
from cupaged.bench.workload import DecodeStep
from tests.kit.experiments import document, functions, run

STEP = DecodeStep("test", 4, 2, (33, 48, 1), head_dim=64)


@pytest.fixture
def script():
    return functions("peers")


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="torch is not installed; peers take its tensors")


def attend(query, pages, tables, lens):
    """Attend over lists of pages, everything as torch tensors; tables are rows of page ids."""
    torch = sys.modules["torch"]
    key, value = (part.double().reshape(-1, *part.shape[2:]) for part in pages)
    page, group, out = pages[0].shape[1], query.shape[1] // pages[0].shape[2], torch.empty_like(query)
    for i, (row, length) in enumerate(zip(tables, lens, strict=True)):
        token = torch.arange(int(length))
        slot = torch.as_tensor(row).long()[token // page] * page + token % page
        for head in range(query.shape[1]):
            logits = key[slot, head // group] @ query[i, head].double() * query.shape[2] ** -0.5
            out[i, head] = (torch.softmax(logits, 0) @ value[slot, head // group]).to(out.dtype)
    return out


class Wrapper:
    """FlashInfer's BatchDecodeWithPagedKVCacheWrapper, as far as the adapter uses it."""

    made = ()

    def __init__(self, workspace, kv_layout, use_tensor_cores=False, backend="auto"):
        assert workspace.numel() >= 128 << 20 and kv_layout == "NHD"
        Wrapper.made = (*Wrapper.made, (use_tensor_cores, backend))

    def plan(self, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size, *,
             q_data_type, kv_data_type):  # fmt: skip
        torch = sys.modules["torch"]
        assert {values.dtype for values in (indptr, indices, last_page_len)} == {torch.int32}
        assert (indices >= 0).all() and len(indices) == indptr[-1]
        assert q_data_type == kv_data_type == torch.bfloat16
        self.shape = (num_qo_heads, num_kv_heads, head_dim, page_size)
        self.tables = [indices[indptr[i] : indptr[i + 1]] for i in range(len(last_page_len))]
        self.lens = [(len(row) - 1) * page_size + int(n) for row, n in zip(self.tables, last_page_len, strict=True)]

    def run(self, q, paged_kv_cache, *, out):
        pages = paged_kv_cache
        assert self.shape == (q.shape[1], pages[0].shape[2], q.shape[2], pages[0].shape[1])
        return out.copy_(attend(q, pages, self.tables, self.lens))


def xqa_batch_decode_with_kv_cache(query, kv_cache, workspace_buffer, block_tables, seq_lens, max_seq_len, *,
                                   bmm1_scale, bmm2_scale, out, kv_layout):  # fmt: skip
    assert not workspace_buffer.any() and seq_lens.dtype == sys.modules["torch"].uint32 and (block_tables >= 0).all()
    assert (bmm1_scale, bmm2_scale, kv_layout) == (query.shape[2] ** -0.5, 1.0, "NHD")
    assert max_seq_len == max(seq_lens.tolist())
    return out.copy_(attend(query, kv_cache, block_tables, seq_lens.tolist()))


def flash_attn_with_kvcache(q, k_cache, v_cache, *, cache_seqlens, block_table=None, page_table=None):
    tables = page_table if block_table is None else block_table
    assert q.ndim == 4 and q.shape[1] == 1 and (tables >= 0).all()
    return attend(q[:, 0], (k_cache, v_cache), tables, cache_seqlens)[:, None]


def flash_attn_varlen_func(*, q, k, v, max_seqlen_q, cu_seqlens_q, max_seqlen_k, seqused_k, block_table, out):
    assert max_seqlen_q == 1 and cu_seqlens_q.tolist() == list(range(len(q) + 1)) and max_seqlen_k == max(seqused_k)
    return out.copy_(attend(q, (k, v), block_table, seqused_k))


@pytest.fixture
def stand_ins(monkeypatch):
    modules = {
        "flashinfer": {"BatchDecodeWithPagedKVCacheWrapper": Wrapper, "__version__": "0.0"},
        "flashinfer.decode": {"xqa_batch_decode_with_kv_cache": xqa_batch_decode_with_kv_cache},
        "flash_attn": {"flash_attn_with_kvcache": flash_attn_with_kvcache},
        "flash_attn_interface": {"flash_attn_with_kvcache": flash_attn_with_kvcache},
        "vllm": {},
        "vllm.vllm_flash_attn": {"flash_attn_varlen_func": flash_attn_varlen_func},
    }
    for name, content in modules.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("family", ["FlashInfer", "FlashAttention", "vLLM"])
def test_an_adapter_hands_its_peer_the_same_memory(script, torch, stand_ins, family):
    work = STEP.build("host")
    peers = [peer for peer in script["PEERS"] if peer.family == family]
    assert peers
    for peer in peers:
        assert script["why_not"](peer) is None
        row = script["measure_peer"](peer, [work], None)
        assert row["status"] == "ok" and row["error_of_budget"] > 0, peer.name
    if family == "FlashInfer":
        assert set(Wrapper.made) == {(False, "auto"), (True, "fa2"), (True, "fa3")}


@pytest.mark.parametrize("length", [48, 33])
def test_torch_attends_over_the_tokens_in_one_piece(script, torch, length):
    work = DecodeStep("equal", 4, 2, (length, length), head_dim=64).build("host")
    (peer,) = (peer for peer in script["PEERS"] if peer.name == "SDPA")
    assert script["measure_peer"](peer, [work], None)["status"] == "ok"
    with pytest.raises(ValueError, match="contexts of one length"):
        peer.prepare(STEP.build("host"))


def test_xqa_is_not_asked_for_pages_that_it_does_not_serve(script, torch, stand_ins):
    (peer,) = (peer for peer in script["PEERS"] if peer.name == "FlashInfer, XQA")
    with pytest.raises(ValueError, match="pages of 16, 32, 64 or 128; got 24"):
        peer.prepare(DecodeStep("odd", 2, 2, (5,), 64, block_size=24).build("host"))


def test_memory_is_shared_not_copied(script, torch):
    work = STEP.build("host")
    tensor = script["as_torch"](work.cache.key)
    assert tensor.dtype == torch.bfloat16 and tuple(tensor.shape) == work.cache.key.shape
    work.cache.key[0, 0, 0, 0] = 42
    assert tensor[0, 0, 0, 0] == 42


def test_page_lists_name_every_token_once(script):
    tables = np.array([[7, 3, -1], [5, -1, -1], [2, 9, 4]], np.int32)
    indptr, indices, last = script["page_lists"](tables, np.array([17, 16, 33], np.int32), 16)
    assert (indptr.tolist(), indices.tolist(), last.tolist()) == ([0, 2, 3, 6], [7, 3, 5, 2, 9, 4], [1, 16, 1])


def test_a_peer_that_fails_or_is_wrong_is_a_row(script):
    """A stand-in needs of a tensor what NumPy has not: reshape is enough, the rest is played."""

    class Result:
        def __init__(self, array):
            self.array = array

        def reshape(self, shape):
            return Result(self.array.reshape(shape))

        def __getitem__(self, which):
            return Result(self.array[which])

        def __getattr__(self, name):
            return (lambda: self) if name in ("float", "cpu") else lambda: self.array.astype(np.float32)

    def exact(work):
        return lambda: Result(reference.paged_attention(*work.arguments))

    def wrong(work):
        return lambda: Result(1.1 * reference.paged_attention(*work.arguments))

    def broken(work):
        raise KeyError("no such\n backend")

    peers = [script["Peer"](f.__name__, "others", ("numpy",), f, ("host",)) for f in (exact, wrong, broken)]
    rows = script["measure"](STEP, peers, "host", None)
    assert [row["peer"] for row in rows] == ["cupaged auto", "exact", "wrong", "broken"]
    assert [row["status"][:6] for row in rows] == ["ok", "ok", "wrong:", "failed"]
    assert rows[3]["status"] == "failed: 'no such\\n backend'"
    assert "wrong on test is wrong: error is" in script["conclusion"](rows)


def test_what_cannot_be_imported_is_named_with_the_reason(script):
    peer = script["Peer"]("x", "x", ("no_such_package",), lambda work: None)
    assert script["why_not"](peer).startswith("no_such_package cannot be imported (ModuleNotFoundError: ")
    found, missing = script["find_peers"]("host", ["FlashInfer", "FlashAttention 2"])
    assert not found and len(missing) == 5
    assert all("it is for the cuda backend" in peer["why"] for peer in missing)


def results(name, ours, *others):
    row = {"workload": name, "status": "ok", "gb_s": 1.0, "of_ceiling": 0.5}
    rows = [{**row, "peer": "cupaged auto", "family": "cupaged", "time_us": ours}]
    return rows + [
        {**row, "peer": peer, "family": peer.split(",")[0], "time_us": t, "status": "ok" if t else "failed: x"}
        for peer, t in others
    ]


def test_ratios_are_to_the_best_of_each_family(script):
    rows = script["with_ratios"](
        results("a", 10.0, ("FlashInfer, fa2", 30.0), ("FlashInfer, fa3", 20.0), ("SDPA", 9.0))
    )
    rows += script["with_ratios"](results("b", 10.0, ("FlashInfer, fa2", 5.0), ("FlashInfer, fa3", None)))
    assert [row.get("ratio") for row in rows] == [None, 3.0, 2.0, 0.9, None, 0.5, None]
    a, b = script["summary"](rows)
    assert (a["over FlashInfer"], a["over SDPA"], b["over FlashInfer"]) == (2.0, 0.9, 0.5)
    assert a["FlashInfer"].endswith("fa3") and b["FlashInfer"].endswith("fa2") and "SDPA" not in b
    text = script["conclusion"](rows)
    assert "2 of 2 results of the toolkit match the reference." in text
    assert "Against the best of FlashInfer it is 1.00 times as fast in the geometric mean of 2 workloads" in text
    assert "from 0.50 (b) to 2.00 (a)" in text and "best of SDPA it is 0.90 times as fast" in text


def test_a_result_of_ours_that_is_wrong_counts_for_nothing(script):
    rows = results("a", 10.0, ("FlashInfer, fa2", 30.0))
    rows[0]["status"] = "wrong: error is 3 times the budget"
    text = script["conclusion"](script["with_ratios"](rows))
    assert "0 of 1 results" in text and "times as fast" not in text


def test_more_shapes_are_what_they_promise(script):
    steps = script["workloads"]("cuda", smoke=False, everything=True, dtype="float16")
    assert len({step.name for step in steps}) == len(steps) and {step.dtype for step in steps} == {"float16"}
    assert {step.num_heads // step.num_kv_heads for step in steps} >= {1, 4, 5, 7, 8, 12}
    assert {step.head_dim for step in steps} == {64, 128, 256}
    assert {step.block_size for step in steps} == {1, 16, 24, 64, 128}
    assert {len(step.seq_lens) for step in steps} >= {1, 512}
    nbytes = [sum(s.seq_lens) * s.num_kv_heads * s.head_dim * 4 for s in script["MORE_WORKLOADS"]]
    assert sum(n > 200e6 for n in nbytes) >= 10 and max(nbytes) < 8e9


def test_a_smoke_run_checks_and_does_not_time(tmp_path):
    printed, _ = run("peers", "--smoke", "--backend", "host", "--out", str(tmp_path))
    result = document(tmp_path, "peers", picture=False)
    ours = [row for row in result["rows"] if row["peer"] == "cupaged auto"]
    assert len(ours) == 2 and all(row["status"] == "ok" and "time_us" not in row for row in ours)
    assert "not compared: FlashInfer, CUDA cores; FlashInfer, fa2;" in printed and "GB/s" not in printed


@pytest.mark.parametrize("measured", [0, 1])
def test_what_was_measured_before_a_stop_is_written(measured, script, tmp_path, monkeypatch):
    plain, seen = script["measure"], []

    def measure(step, *rest):
        if len(seen) == measured:
            raise KeyboardInterrupt
        seen.append(step.name)
        return plain(step, *rest)

    monkeypatch.setitem(script["measure"].__globals__, "measure", measure)
    arguments = ["--backend", "host", "--peers", "none", "--out", str(tmp_path)]
    if not measured:
        with pytest.raises(KeyboardInterrupt):
            script["EXPERIMENT"].main(arguments)
        return
    assert script["EXPERIMENT"].main(arguments) == 1
    assert not (tmp_path / "peers.json").exists()
    result = document(tmp_path, "peers_stopped", picture=False)
    assert [step["name"] for step in result["workloads"]] == seen
    assert {row["workload"] for row in result["rows"]} == set(seen)


def test_help_tells_the_question():
    assert "How does decode attention here compare with what others ship?" in run("peers", "--help")[0]


def test_a_picture_shows_the_best_of_each(script, tmp_path):
    rows = script["with_ratios"](results("a", 10.0, ("FlashInfer, fa2", 30.0), ("SDPA", None)))
    script["draw"](rows, {"device": "a GPU"}, tmp_path / "peers.png")
    assert (tmp_path / "peers.png").stat().st_size > 0


@pytest.mark.gpu
def test_on_a_gpu_every_right_result_is_timed(tmp_path):
    run("peers", "--smoke", "--backend", "cuda", "--out", str(tmp_path))
    for row in document(tmp_path, "peers")["rows"]:
        assert row["status"] != "ok" or 0 < row["of_ceiling"] < 1.1


def test_many_workloads_are_drawn_in_several_lines(script, tmp_path):
    from matplotlib.image import imread

    heights = []
    for count in (8, 20):
        rows = [
            {"workload": f"w{n}", "family": family, "status": "ok", "time_us": 1.0, "of_ceiling": 0.9}
            for n in range(count)
            for family in ("cupaged", "FlashInfer")
        ]
        script["draw"](rows, {"device": "a GPU"}, tmp_path / f"{count}.png")
        heights.append(imread(tmp_path / f"{count}.png").shape[0])
    assert heights[1] == pytest.approx(2.2 * heights[0])  # 5 inches, and 3 for each further line
