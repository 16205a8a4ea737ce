"""Attention by every path of loads, in every layout that textures can bind, and the textures' limits."""

import numpy as np
import pytest

import cupaged as pg
from cupaged.ops import textures
from cupaged.ops.textures import LOAD_PATHS
from cupaged.runtime import kernels_defining
from tests.kit.cases import DecodeShape, decode_case
from tests.kit.compare import assert_decode_matches_reference, to_numpy
from tests.kit.cuda_stub import CudaStub

KERNEL = "paged_attention_texture"
LAYOUTS = ["BSHD", "BHSD", "HBSD", "BS2HD"]
BY_TEXTURE = [path for path, binding in LOAD_PATHS.items() if binding]


def attend(case, path, **defines):
    with kernels_defining(LOAD_PATH=path, **defines):
        return pg.paged_attention(*case.arguments, kernel=KERNEL, return_lse=True)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("path", LOAD_PATHS)
def test_every_path_in_every_layout(path, layout, dtype, backend):
    case = decode_case(DecodeShape((0, 1, 15, 16, 17, 150), layout=layout, dtype=dtype), backend)
    assert_decode_matches_reference(case, *attend(case, path), KERNEL)


SHAPES = [
    DecodeShape((5, 200), block_size=7, layout="HBSD", head_dim=80, num_kv_heads=1),
    DecodeShape((5, 130), block_size=1, layout="BHSD", head_dim=128, num_kv_heads=1, num_heads=7),
    DecodeShape((37, 0, 255, 257), block_size=256, layout="BS2HD", head_dim=32, unmapped=0.3),
    DecodeShape((60, 100, 2), block_size=4, layout="BSHD", head_dim=72, unmapped=0.5, dtype="float32"),
    DecodeShape((60, 33), layout="BHDSX", block_size=1),  # where a block is one token its row lies together
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("path", LOAD_PATHS)
def test_odd_shapes(path, shape, backend):
    case = decode_case(shape, backend)
    assert_decode_matches_reference(case, *attend(case, path), KERNEL)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("path", BY_TEXTURE)
def test_texels_of_floats(path, layout, dtype, backend):
    """Twice as many texels for halves as without, which the texture units turn into floats."""
    case = decode_case(DecodeShape((0, 1, 40), layout=layout, dtype=dtype, head_dim=72, unmapped=0.2), backend)
    assert_decode_matches_reference(case, *attend(case, path, TEXEL_FLOATS=1), KERNEL)


def test_bfloat16_is_no_format_of_texels(backend):
    case = decode_case(DecodeShape((40,), dtype="bfloat16"), backend)
    with pytest.raises(pg.UnsupportedError, match="texels of floats take float16 or float32.*bfloat16"):
        attend(case, "TEXTURE_LINEAR", TEXEL_FLOATS=1)


@pytest.mark.parametrize("path", BY_TEXTURE)
def test_all_paths_give_the_same_bits(path, backend):
    case = decode_case(DecodeShape((100, 1, 333)), backend)
    expected, actual = attend(case, "LOAD_PLAIN"), attend(case, path)
    for one, other in zip(expected, actual, strict=True):
        np.testing.assert_array_equal(to_numpy(one), to_numpy(other))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("path", BY_TEXTURE)
def test_a_cache_too_long_for_one_texture_is_tiled(path, layout, monkeypatch):
    """Limits so low that each binding takes several objects, the last of them not full."""
    low = {"MaxTexture1DLinearWidth": 300, "MaxTexture2DLinearHeight": 5, "MaxTexture2DWidth": 50}
    monkeypatch.setattr(textures, "H100_LIMITS", textures.TextureLimits(**{**vars(textures.H100_LIMITS), **low}))
    case = decode_case(DecodeShape((0, 1, 15, 16, 17, 150), layout=layout), "host")
    assert_decode_matches_reference(case, *attend(case, path), KERNEL)
    (view,) = case.cache.textures.values()
    assert view.tiles > 2 and view.arguments["key_textures"].shape == (view.tiles,)


@pytest.mark.parametrize(
    ("binding", "low", "message"),
    [
        ("pitch", {"MaxTexture2DLinearWidth": 255},
         "MaxTexture2DLinearWidth of 255; a KV block of 16 tokens is a row of 256 texels"),
        ("pitch", {"MaxTexture2DLinearPitch": 4000},
         "MaxTexture2DLinearPitch of 4000; a KV block of 16 tokens is a row of 4096 bytes"),
        ("array", {"MaxTexture2DHeight": 15}, "MaxTexture2DHeight of 15; a token's row of 2 heads has 16 texels"),
        ("array", {"MaxSurface2DHeight": 15}, "MaxSurface2DHeight of 15; a token's row of 2 heads has 16 texels"),
    ],
)  # fmt: skip
def test_what_no_tiling_can_mend_is_refused_with_the_limit(binding, low, message, monkeypatch):
    monkeypatch.setattr(textures, "H100_LIMITS", textures.TextureLimits(**{**vars(textures.H100_LIMITS), **low}))
    cache = pg.KVCache(pg.CacheConfig(4, 16, 2, 64), "host")
    with pytest.raises(pg.UnsupportedError, match=message):
        pg.bind_textures(cache, binding)
    assert not cache.textures


def test_rows_that_no_pitch_fits_are_refused(backend):
    cache = pg.KVCache(pg.CacheConfig(4, 7, 1, 40), backend)
    with pytest.raises(pg.UnsupportedError, match="multiple of 32 bytes .* 7 tokens is a row of 560"):
        pg.bind_textures(cache, "pitch")
    pg.bind_textures(cache, "linear")


@pytest.mark.parametrize("binding", textures.BINDINGS)
def test_a_layout_without_rows_is_refused(binding, backend):
    case = decode_case(DecodeShape((8,), layout="BHDSX"), backend)
    for call in (lambda: pg.bind_textures(case.cache, binding), lambda: attend(case, "TEXTURE_LINEAR")):
        with pytest.raises(pg.UnsupportedError, match="layouts that keep a token's row together; BHDSX does not"):
            call()


def test_bad_names_are_refused():
    case = decode_case(DecodeShape((8,)), "host")
    with pytest.raises(ValueError, match="binding must be one of linear, pitch, array; got 'cubemap'"):
        pg.bind_textures(case.cache, "cubemap")
    with pytest.raises(ValueError, match="LOAD_PATH must be one of LOAD_PLAIN, .*; got 'TEXTURE'"):
        attend(case, "TEXTURE")
    with pytest.raises(TypeError, match="cache must be a KVCache"):
        pg.bind_textures(case.cache.key)


def test_textures_are_bound_once_for_a_cache(backend):
    case = decode_case(DecodeShape((8,)), backend)
    attend(case, "TEXTURE_PITCH")
    (view,) = case.cache.textures.values()
    attend(case, "TEXTURE_PITCH")
    assert pg.bind_textures(case.cache, "pitch") is view and len(case.cache.textures) == 1


@pytest.mark.parametrize("floats", [0, 1])
@pytest.mark.parametrize("slots_of", [np.int32, np.int64])
@pytest.mark.parametrize("path", BY_TEXTURE)
def test_what_is_appended_is_seen_through_textures(path, slots_of, floats, backend):
    """In memory that they share at once; in an array because appending writes it too, twice by a remembered call."""
    config = pg.CacheConfig(5, 4, 2, 64, "float16", "BHSD")
    cache = pg.KVCache(config, backend)
    xp, rng = cache.xp, np.random.default_rng(0)
    table, query = xp.asarray([[3, 1, 4]], dtype=xp.int32), rng.standard_normal((1, 4, 64)).astype(np.float16)
    for length in range(1, 11):
        rows = [xp.asarray(rng.standard_normal((2, 2, 64)).astype(np.float16)) for _ in "kv"]
        slot = int(table[0, (length - 1) // 4]) * 4 + (length - 1) % 4
        pg.append_kv(cache, *rows, xp.asarray(np.array([-1, slot], dtype=slots_of)), validate=length < 3)
        case = decode_case(DecodeShape((1,)), backend)
        case.cache, case.query, case.block_tables = cache, xp.asarray(query), table
        case.seq_lens = xp.asarray([length], dtype=xp.int32)
        assert_decode_matches_reference(case, *attend(case, path, TEXEL_FLOATS=floats), KERNEL)


@pytest.mark.parametrize("floats", [0, 1])
def test_blocks_that_are_copied_scattered_or_swapped_in_are_seen_through_textures(floats, backend):
    case = decode_case(DecodeShape((40, 23)), backend)
    attend(case, "TEXTURE_ARRAY", TEXEL_FLOATS=floats)
    first, second = (int(row[0]) for row in to_numpy(case.block_tables))
    pg.copy_blocks(case.cache, [[first, second]])
    assert_decode_matches_reference(case, *attend(case, "TEXTURE_ARRAY", TEXEL_FLOATS=floats), KERNEL)
    pg.scatter_blocks(case.cache, [first], pg.gather_blocks(case.cache, [second]) * 2)
    pg.copy_blocks(case.cache, [])
    assert_decode_matches_reference(case, *attend(case, "TEXTURE_ARRAY", TEXEL_FLOATS=floats), KERNEL)
    host = pg.HostBlocks(case.cache.config, 1)
    pg.swap_blocks(case.cache, host, [[second, 0]])
    pg.swap_blocks(host, case.cache, [[0, first]])
    assert_decode_matches_reference(case, *attend(case, "TEXTURE_ARRAY", TEXEL_FLOATS=floats), KERNEL)


def test_another_change_of_the_cache_needs_a_refresh(backend):
    case = decode_case(DecodeShape((40,)), backend)
    attend(case, "TEXTURE_ARRAY")
    case.cache.value[...] = 2 * case.cache.value
    stale = to_numpy(attend(case, "TEXTURE_ARRAY")[0])
    pg.bind_textures(case.cache, "array").refresh()
    result = attend(case, "TEXTURE_ARRAY")
    assert_decode_matches_reference(case, *result, KERNEL)
    np.testing.assert_array_equal(2 * stale, to_numpy(result[0]))


# --- what CUDA is asked for, without a GPU ----------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch):
    """Texture objects that only note the descriptors that they are made from."""
    pytest.importorskip("cupy", reason="CuPy is not installed")
    from cupy.cuda import texture

    stub, made = CudaStub(monkeypatch), []

    class Made:
        def __init__(self, *descriptors):
            self.ptr = 100 + len(made)
            made.append(descriptors)

    for name in ("TextureObject", "SurfaceObject", "CUDAarray"):
        monkeypatch.setattr(texture, name, Made)
    resource = texture.ResourceDescriptor
    monkeypatch.setattr(texture, "ResourceDescriptor", lambda kind, cuArr=None, **rest: cuArr or resource(kind, **rest))
    monkeypatch.setattr(textures, "_device_limits", lambda device: textures.H100_LIMITS)
    monkeypatch.setattr(textures.TextureView, "_table", lambda view, handles: stub.array((len(handles),), np.uint64))
    return stub, made


def test_linear_textures_over_the_cache_itself(asked):
    _, made = asked
    cache = pg.KVCache(pg.CacheConfig(8, 16, 2, 64, "float16", "BS2HD"), "cuda")
    view = pg.bind_textures(cache, "linear")
    ((resource, description),) = made
    asked_for = resource.get_resource_desc()["linear"]
    assert asked_for["devPtr"] == cache.storage[0].data.ptr and asked_for["sizeInBytes"] == cache.nbytes
    assert asked_for["desc"] == {"x": 32, "y": 32, "z": 32, "w": 32, "f": 1}
    assert description.get_texture_desc()["normalizedCoords"] == 0
    assert view.arguments["key_texture"] == view.arguments["value_texture"] == 100
    assert view.arguments["first_value_texel"] == 16  # the keys of two heads, 16 bytes each


def test_pitch_linear_textures_with_a_block_in_a_row(asked):
    _, made = asked
    cache = pg.KVCache(pg.CacheConfig(70000, 16, 2, 64, "float16", "BSHD"), "cuda")
    view = pg.bind_textures(cache, "pitch", floats=True)
    sizes = [resource.get_resource_desc()["pitch2D"] for resource, _ in made]
    assert [size["height"] for size in sizes] == [32768, 32768, 4464] * 2 and view.tiles == 3
    assert {(size["width"], size["pitchInBytes"]) for size in sizes} == {(512, 4096)}
    assert sizes[1]["devPtr"] - sizes[0]["devPtr"] == 32768 * 4096
    assert sizes[0]["desc"] == {"x": 16, "y": 16, "z": 16, "w": 16, "f": 2} and view.arguments["tile_bits"] == 15


def test_an_array_is_filled_by_surface_writes(asked):
    stub, made = asked
    cache = pg.KVCache(pg.CacheConfig(8, 16, 2, 64, "bfloat16", "HBSD"), "cuda")
    view = pg.bind_textures(cache, "array")
    arrays = [descriptors for descriptors in made if len(descriptors) == 5]
    assert [array[1:4] for array in arrays] == [(128, 16, 0)] * 2  # slots along x, a row's vectors along y
    assert view.arguments["key_texture"] != view.arguments["value_texture"]
    assert [launch[:2] for launch in stub.launches] == [((8, 1, 1), (256, 1, 1))] * 2
