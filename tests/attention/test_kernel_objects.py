"""A kernel of attention says by itself what it serves, and nothing else names it or tells kernels apart by name."""

import ast
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import cupaged as pg
from cupaged.attention import choose, kernel
from cupaged.attention.call import ALL_VARIANTS, EVEN, Pages, checked_call
from cupaged.attention.choose import DECODING, KERNELS
from cupaged.attention.kernel import Kernel, Serves
from cupaged.attention.logits import Logits
from cupaged.attention.mask import Mask
from cupaged.runtime import kernels_folder
from tests.kit.cases import DecodeShape, decode_case

ATTENTION = Path(choose.__file__).parent
DOORS = {"paged_attention", "paged_prefill", "explain", "plan_decode", "plan_prefill"}


def call_of(shape):
    case = decode_case(shape, "host")
    pages, mask = Pages(case.block_tables, case.seq_lens), Mask(window=shape.window)
    return checked_call(case.query, case.cache, pages, mask, Logits(softcap=shape.softcap))


class Only(Kernel):
    """A kernel that serves what it is told to."""

    def __init__(self, **serves):
        self.info = replace(DECODING[0].info, name="only", serves=Serves(**serves))


@pytest.mark.parametrize(
    ("serves", "shape", "limit"),
    [
        ({}, DecodeShape((20,)), None),
        ({"dtypes": ("float32",)}, DecodeShape((20,)), "only takes float32; the cache is float16"),
        ({"head_dims": range(32, 257, 24)}, DecodeShape((20,)), "only takes a head_dim .* of 24; the cache's is 64"),
        (
            {"block_sizes": range(16, 65, 16)},
            DecodeShape((20,), block_size=24),
            "size of 16 to 64 in steps of 16",
        ),
        ({"block_sizes": range(16, 65, 16)}, DecodeShape((20,), block_size=48), None),
        ({"whole_rows": True}, DecodeShape((20,), layout="BHDSX"), "keep a token's row together; BHDSX does not"),
        ({"whole_rows": True}, DecodeShape((20,), layout="BHDSX", block_size=1), None),
        ({"queries": frozenset({"query_to_seq"})}, DecodeShape((20,)), f"only does not take {EVEN}"),
        ({"mask": frozenset({"window"})}, DecodeShape((20,), window=5), None),
        ({"mask": frozenset({"window"})}, DecodeShape((20,), window=5, query_tokens=2), "not take query_tokens"),
        ({}, DecodeShape((20,), window=5, softcap=3.0), "only does not take softcap and window"),
    ],
)
def test_a_call_is_held_to_what_a_kernel_serves(serves, shape, limit):
    found = Only(**serves).why_not(call_of(shape))
    assert found is None if limit is None else re.search(limit, found)


def test_an_older_gpu_is_refused_by_name(monkeypatch):
    call = call_of(DecodeShape((20,)))
    monkeypatch.setattr(call.cache, "backend", "cuda")
    monkeypatch.setitem(vars(call.cache), "device", 0)
    monkeypatch.setattr(kernel, "compute_capability", lambda device: 75)
    assert Only(capability=80).why_not_cache(call.cache) == "only needs compute capability 8.0"
    assert Only(capability=75).why_not_cache(call.cache) is None


def test_constraints_are_made_from_what_is_served():
    words = str(Serves(("float16",), range(64, 129, 64), whole_rows=True, mask=frozenset({"window"}), capability=90))
    assert words == (
        "float16; D 64 to 128 in steps of 64; block size 1 to 256; any group and length; all layouts but BHDSX; "
        "window; compute capability 9.0"
    )
    for info in (each.info for each in KERNELS):
        assert info.constraints == str(info.serves) and info.variants == info.serves.variants <= ALL_VARIANTS


def test_a_line_in_the_list_is_all_that_a_new_kernel_needs(monkeypatch):
    """It can be named, is explained, and answers."""
    new = type(DECODING[0])(replace(DECODING[0].info, idea="new"))
    new.info = replace(new.info, name="new_kernel")
    answered = []
    monkeypatch.setattr(new, "prepare", lambda call, plan: answered.append(call) or [])
    monkeypatch.setitem(choose.BY_NAME, "new_kernel", new)
    case = decode_case(DecodeShape((20, 3)), "host")
    assert pg.explain(*case.arguments, kernel="new_kernel").reason == "it was named"
    pg.paged_attention(*case.arguments, kernel="new_kernel")
    assert answered[0].query.shape == case.query.shape
    with pytest.raises(ValueError, match="plan must be left out for new_kernel"):
        pg.paged_attention(*case.arguments, kernel="new_kernel", plan=pg.plan_decode(case.cache, case.seq_lens, 4))


def test_every_kernel_has_its_file_and_every_file_a_kernel():
    files = {info.file for each in KERNELS for info in (each.info, *each.helpers)} | {"attention/merge_states.cu"}
    assert files == {f"attention/{path.name}" for path in (kernels_folder() / "attention").glob("*.cu")}
    assert len({each.info.name for each in KERNELS}) == len(KERNELS)


def test_no_kernel_is_told_apart_by_its_name():
    names = set(pg.kernels()) | {"paged_attention"}
    for path in (*ATTENTION.rglob("*.py"), *(ATTENTION.parent / "engine").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            compared = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "startswith":
                compared = node.args
            for each in compared:
                texts = {part.value for part in ast.walk(each) if isinstance(part, ast.Constant)}
                assert not texts & names, f"{path}:{node.lineno}"


def test_only_the_doors_have_more_than_8_parameters():
    for path in ATTENTION.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name not in DOORS:
                given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                assert len([each for each in given if each.arg != "self"]) <= 8, f"{path}: {node.name}"


# --- calls that are remembered --------------------------------------------------------------------------------------


def planned_prefill(new_tokens=(2, 2)):
    case = decode_case(DecodeShape((20, 33), query_tokens=2), "host")
    query = np.concatenate(list(case.query))
    starts = np.cumsum([0, *new_tokens]).astype(np.int32)
    return case, (query, case.cache, case.block_tables, case.seq_lens, starts)


@pytest.mark.parametrize("made_by", ["plan_prefill", "plan_decode"])
def test_a_prefill_like_one_before_is_launched_at_once(made_by, monkeypatch):
    case, arguments = planned_prefill()
    if made_by == "plan_prefill":
        plan = pg.plan_prefill(case.cache, case.seq_lens, arguments[-1], 4, 4)
    else:
        plan = pg.plan_decode(case.cache, case.seq_lens, 4, query_tokens=2)
    first = pg.paged_prefill(*arguments, plan=plan, return_lse=True, validate=False)
    expected = pg.reference.paged_prefill(*arguments, return_lse=True)
    with monkeypatch.context() as patch:
        patch.setattr("cupaged.attention.api.checked_call", None)
        second = pg.paged_prefill(*arguments, plan=plan, return_lse=True, validate=False)
        with pytest.raises(TypeError):
            pg.paged_prefill(*arguments, plan=plan, return_lse=True, scale=0.5, validate=False)
    for one, other, right in zip(first, second, expected, strict=True):
        np.testing.assert_array_equal(one, other)
        np.testing.assert_allclose(one, right, atol=3e-3)


def test_a_plan_that_serves_both_doors_keeps_their_calls_apart():
    """Of one shape, a decode call needs no `query_start`; a prefill does, also after it."""
    case = decode_case(DecodeShape((20, 33)), "host")
    plan = pg.plan_decode(case.cache, case.seq_lens, 4)
    pg.paged_attention(*case.arguments, plan=plan, validate=False)
    with pytest.raises(TypeError, match="query_start"):
        pg.paged_prefill(*case.arguments, plan=plan, validate=False)
    starts = np.arange(3, dtype=np.int32)
    pg.paged_prefill(*case.arguments, starts, plan=plan, validate=False)
    with pytest.raises(TypeError, match="kernel must be a name|scale must be a real number"):
        pg.paged_attention(*case.arguments, starts, plan=plan, validate=False)


def test_a_call_written_in_another_way_is_the_same_call():
    case = decode_case(DecodeShape((20, 33), sinks=True, softcap=3.0), "host")
    plan = pg.plan_decode(case.cache, case.seq_lens, 4)
    query, cache, tables, lens = case.arguments
    sinks, slopes = case.variants["sinks"], np.array([0.5, 0.25, 0.1, 0.3], np.float32)
    common = {"plan": plan, "validate": False}
    expected = pg.reference.paged_attention(*case.arguments, 0.3, softcap=3.0, sinks=sinks, alibi_slopes=slopes)
    for _ in range(2):
        for result in (
            pg.paged_attention(query, cache, tables, lens, 0.3, softcap=3.0, sinks=sinks, alibi_slopes=slopes,
                               **common),
            pg.paged_attention(query, cache, tables, lens, alibi_slopes=slopes, sinks=sinks, softcap=3.0, scale=0.3,
                               **common),
            pg.paged_attention(seq_lens=lens, block_tables=tables, cache=cache, query=query, kernel="auto", scale=0.3,
                               sinks=sinks, softcap=3.0, alibi_slopes=slopes, **common),
        ):  # fmt: skip
            np.testing.assert_allclose(result, expected, atol=3e-3)
        with pytest.raises(TypeError, match="unexpected keyword argument 'softcaps'"):
            pg.paged_attention(query, cache, tables, lens, softcaps=3.0, **common)
        with pytest.raises(TypeError, match="multiple values for argument 'scale'"):
            pg.paged_attention(query, cache, tables, lens, 0.3, scale=0.3, **common)
