"""Environment variables: a value that is none is an error that names the variable, what it must be and what came."""

import numpy as np
import pytest

import cupaged as pg
from cupaged.runtime import host, kernels_folder, load_kernel
from cupaged.runtime.environment import environment_flag


@pytest.mark.parametrize(("value", "on"), [(None, False), ("", False), ("0", False), ("1", True)])
def test_a_switch_is_0_or_1(value, on, monkeypatch):
    monkeypatch.delenv("CUPAGED_VALIDATE", raising=False)
    if value is not None:
        monkeypatch.setenv("CUPAGED_VALIDATE", value)
    assert environment_flag("CUPAGED_VALIDATE") == on


@pytest.mark.parametrize("value", ["false", "no", "off", "true", "2", "-1", " 1", "1 ", "00"])
def test_a_switch_that_says_neither_is_refused(value, monkeypatch):
    slots, rows = np.zeros(1, np.int32), np.zeros((1, 1, 64), np.float16)
    cache = pg.KVCache(pg.CacheConfig(num_blocks=1, block_size=16, num_kv_heads=1, head_dim=64), backend="host")
    monkeypatch.setenv("CUPAGED_VALIDATE", value)
    with pytest.raises(ValueError, match=f"CUPAGED_VALIDATE must be 0 or 1; got {value!r}"):
        pg.append_kv(cache, rows, rows, slots)
    monkeypatch.setenv("CUPAGED_HOST_SANITIZE", value)
    with pytest.raises(ValueError, match=f"CUPAGED_HOST_SANITIZE must be 0 or 1; got {value!r}"):
        host.sanitizing()


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "many", "1025", " 2", "\u0662", "9" * 5000])
def test_a_number_of_threads_that_is_none_is_refused(value, monkeypatch):
    monkeypatch.setenv("CUPAGED_HOST_THREADS", value)
    with pytest.raises(ValueError, match="CUPAGED_HOST_THREADS must be an integer from 1 to 1024; got '"):
        host.workers()


@pytest.mark.parametrize("value", ["cpu", "Host", "host,cuda", " host"])
def test_a_backend_that_is_none_is_refused(value, monkeypatch):
    monkeypatch.setenv("CUPAGED_BACKEND", value)
    with pytest.raises(ValueError, match=f"CUPAGED_BACKEND must be one of cuda, host; got {value!r}"):
        pg.KVCache(pg.CacheConfig(num_blocks=1, block_size=16, num_kv_heads=1, head_dim=64))


@pytest.mark.parametrize("named", ["missing", "empty", "file"])
def test_a_folder_without_kernels_is_refused(named, monkeypatch, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.setenv("CUPAGED_KERNELS", str(tmp_path / named))
    with pytest.raises(
        pg.KernelBuildError, match=f"CUPAGED_KERNELS must name a copy of kernels_cu.*got '{tmp_path}/{named}'"
    ):
        load_kernel("bench/read_stream.cu", "read_stream", backend="host")


def test_a_folder_of_kernels_may_lie_in_the_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CUPAGED_KERNELS", "~/kernels")
    assert kernels_folder() == tmp_path / "kernels"


def test_a_kernel_file_that_cannot_be_read_is_a_build_error(monkeypatch, tmp_path):
    (tmp_path / "include").mkdir()
    (tmp_path / "folder.cu").mkdir()
    (tmp_path / "bytes.cu").write_bytes(b"\xff\xfe")
    monkeypatch.setenv("CUPAGED_KERNELS", str(tmp_path))
    for name in ("folder", "bytes"):
        with pytest.raises(pg.KernelBuildError, match=f"the kernel file .*{name}.cu or a header of it cannot be read"):
            load_kernel(f"{name}.cu", name, backend="host")
