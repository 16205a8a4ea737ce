"""The backend: the argument, then CUPAGED_BACKEND, then the best that runs here."""

import pytest

import cupaged as pg
from cupaged.runtime import available_backends, choose_backend
from cupaged.runtime.select import why_no_gpu


def test_the_argument_comes_first(monkeypatch):
    monkeypatch.setenv("CUPAGED_BACKEND", "cuda")
    assert choose_backend("host") == "host"


def test_then_the_environment(monkeypatch):
    monkeypatch.setenv("CUPAGED_BACKEND", "host")
    assert choose_backend() == "host"
    assert pg.KVCache(pg.CacheConfig(1, 1, 1, 32)).backend == "host"


def test_then_the_best_that_runs(monkeypatch):
    monkeypatch.delenv("CUPAGED_BACKEND", raising=False)
    assert choose_backend() == ("host" if why_no_gpu() else "cuda")
    assert choose_backend() == available_backends()[0]


def test_an_unknown_name_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="backend must be one of cuda, host; got 'tpu'"):
        choose_backend("tpu")
    monkeypatch.setenv("CUPAGED_BACKEND", "rocm")
    with pytest.raises(ValueError, match="CUPAGED_BACKEND must be one of cuda, host; got 'rocm'"):
        choose_backend()


def test_asking_for_a_gpu_without_one_says_why(monkeypatch):
    monkeypatch.setattr("cupaged.runtime.select.why_no_gpu", lambda: "no GPU answers CuPy (for a reason)")
    with pytest.raises(pg.BackendUnavailableError, match=r"backend asks for cuda, but no GPU answers CuPy \(for a"):
        choose_backend("cuda")


def test_without_cupy_everything_on_the_host_works(tmp_path):
    """CuPy cannot be installed everywhere: a process in which importing it fails still attends."""
    import subprocess
    import sys

    (tmp_path / "cupy.py").write_text("raise ImportError('not for this platform')\n")
    script = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy as np, cupaged as pg
assert pg.available_backends() == ("host",), pg.available_backends()
cache = pg.KVCache(pg.CacheConfig(2, 16, 1, 64))
one = np.ones((1, 1, 64), np.float16)
pg.append_kv(cache, one, 3 * one, np.array([17]))
out = pg.paged_attention(one, cache, np.array([[1]], np.int32), np.array([2], np.int32))
print(cache.backend, out.min(), out.max())
try:
    pg.KVCache(pg.CacheConfig(2, 16, 1, 64), "cuda")
except pg.BackendUnavailableError as error:
    print(error)
"""
    answer = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.startswith("host 2.998 2.998"), answer.stdout
    assert "CuPy cannot be imported (not for this platform)" in answer.stdout
