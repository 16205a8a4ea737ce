"""The wheel carries kernels and host headers: installed elsewhere and used from another folder, it works."""

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = """
import numpy as np, cupaged as pg
from cupaged.runtime import kernels_folder
cache = pg.KVCache(pg.CacheConfig(2, 16, 1, 64), "host")
one = np.ones((1, 1, 64), np.float16)
pg.append_kv(cache, one, 3 * one, np.array([17]))
out = pg.paged_attention(one, cache, np.array([[1]], np.int32), np.array([2], np.int32))
assert abs(float(out[0, 0, 0]) - 2.998) < 1e-3
print(kernels_folder())
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(ROOT)]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout[-2000:] + answer.stderr[-2000:]
    (path,) = folder.glob("*.whl")
    return path


def test_it_holds_every_kernel_and_header(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in (ROOT / "kernels_cu").rglob("*.cu*"):
        assert f"cupaged/{path.relative_to(ROOT).as_posix()}" in names
    for path in (ROOT / "cupaged" / "runtime" / "host").iterdir():
        assert f"cupaged/runtime/host/{path.name}" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_it_works_in_another_environment_from_another_folder(wheel, tmp_path):
    """The new environment sees this one's dependencies, and the wheel instead of the checkout."""
    venv.create(tmp_path / "venv", with_pip=False)
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True)
    dependencies = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (site / "dependencies.pth").write_text("\n".join(dependencies) + "\n")
    python = tmp_path / "venv" / "bin" / "python"
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CUPAGED_KERNELS")}
    environment["CUPAGED_CACHE_DIR"] = str(tmp_path / "cache")
    answer = subprocess.run([python, "-c", SCRIPT], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.strip() == str(site / "cupaged" / "kernels_cu")
