"""NVRTC compiles every kernel, over a covering set of its defines, for every architecture, without a GPU."""

import pytest

import cupaged as pg
from cupaged.attention.choose import KERNELS
from cupaged.runtime import cuda, kernels_folder
from tests.kit.programs import kernel_from_text
from tests.kit.variants import all_variants

try:
    cuda.cuda_headers()
except pg.BackendUnavailableError as error:
    pytest.skip(f"compiling for CUDA is not possible here: {error}", allow_module_level=True)

ARCHITECTURES = ["sm_75", "sm_80", "sm_90", "sm_100", "sm_120"]


def name(source):
    return "-".join([source.entry, *(value.replace(" ", "") for _, value in source.defines)])


def serves(source, architecture):
    """cp.async and bfloat16 on tensor cores came with sm_80, kernels that start early with sm_90."""
    if "LAUNCH_OVERLAP" in dict(source.defines) and architecture in ("sm_75", "sm_80"):
        return False
    copies = any(source.entry == kernel.info.name and kernel.info.serves.capability >= 80 for kernel in KERNELS)
    copies = copies or dict(source.defines).get("LOAD_PATH") == "LOAD_ASYNC_COPY"
    return architecture != "sm_75" or not copies


COMBINATIONS = [(s, architecture) for s in all_variants() for architecture in ARCHITECTURES if serves(s, architecture)]


@pytest.mark.parametrize(("source", "architecture"), COMBINATIONS, ids=lambda v: v if isinstance(v, str) else name(v))
def test_every_kernel_compiles(source, architecture):
    assert cuda.compile_cubin(source, architecture)[:4] == b"\x7fELF"


def test_the_covering_set_leaves_no_kernel_out():
    covered = {source.file for source in all_variants()}
    assert covered == {path.relative_to(kernels_folder()).as_posix() for path in kernels_folder().rglob("*.cu")}


def test_ptx_for_a_gpu_newer_than_the_compiler():
    assert b".target sm_90" in cuda.compile_cubin(all_variants()[0], "compute_90")


def test_a_compiler_error_stands_at_the_line_of_the_cu_file(tmp_path):
    text = '#include "types.cuh"\nextern "C" __global__ void broken(int* out) {\n  out[0] = undefined_name;\n}\n'
    source = kernel_from_text(tmp_path, text, "broken", "host").source
    with pytest.raises(pg.KernelBuildError, match=r"(?s)could not build broken for sm_90:.*broken\.cu\(3\): error"):
        cuda.compile_cubin(source, "sm_90")


def test_a_cubin_is_kept_until_a_header_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("CUPAGED_CACHE_DIR", str(tmp_path / "cache"))
    include = tmp_path / "kernels" / "include"
    include.mkdir(parents=True)
    text = '#include "added.cuh"\nextern "C" __global__ void add(int* out) { out[0] += ADD; }'
    paths = []
    for value in (1, 1, 2):
        (include / "added.cuh").write_text(f"constexpr int ADD = {value};\n")
        paths.append(cuda.cached_cubin(kernel_from_text(tmp_path, text, "add", "host").source, "sm_90"))
    assert paths[0] == paths[1] != paths[2]
    assert all(path.read_bytes()[:4] == b"\x7fELF" for path in paths)


@pytest.mark.parametrize("architecture", ["sm_90", "compute_90"])
@pytest.mark.parametrize("damaged", [b"", b"\x7fELF", None], ids=["empty", "cut", "other bytes"])
def test_a_damaged_cubin_is_compiled_anew(architecture, damaged, tmp_path, monkeypatch):
    monkeypatch.setenv("CUPAGED_CACHE_DIR", str(tmp_path / "cache"))
    text = 'extern "C" __global__ void one(int* out) { out[0] = 1; }'
    source = kernel_from_text(tmp_path, text, "one", "host").source
    path = cuda.cached_cubin(source, architecture)
    good = path.read_bytes()
    path.write_bytes(good[:-1] + b"?" if damaged is None else damaged)
    assert cuda.cached_cubin(source, architecture).read_bytes() == good


def test_missing_headers_say_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(cuda.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(cuda.Path, "is_file", lambda self: False)
    for variable in ("CUDA_PATH", "CUDA_HOME"):
        monkeypatch.delenv(variable, raising=False)
    cuda.cuda_headers.cache_clear()
    try:
        with pytest.raises(
            pg.BackendUnavailableError, match=r"not its headers \(cuda_fp16.h\): pip install nvidia-cuda"
        ):
            cuda.cuda_headers()
    finally:
        cuda.cuda_headers.cache_clear()
