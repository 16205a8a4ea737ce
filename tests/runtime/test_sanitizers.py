"""Every kernel runs clean: on the host built with the address and undefined-behaviour sanitizers, on the GPU under
compute-sanitizer.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cupaged.runtime import host
from tests.runtime.every_kernel import PARTS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def environment():
    added = host.sanitizer_environment()
    if not Path(added["LD_PRELOAD"]).is_absolute():
        pytest.skip("the C++ compiler comes without the address sanitizer's shared library (Debian: libasan8)")
    return {**os.environ, **added, "PYTHONPATH": str(ROOT)}


def run(environment, *arguments, under=()):
    command = [*under, sys.executable, "-m", "tests.runtime.every_kernel", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=600)


@pytest.mark.parametrize("part", PARTS)
def test_every_kernel_is_clean_on_the_host(part, environment):
    answer = run(environment, "host", part)
    assert answer.returncode == 0 and answer.stdout.endswith("clean\n"), answer.stderr[-3000:]


def test_a_read_past_an_array_is_caught(environment, tmp_path):
    answer = run(environment, "broken", str(tmp_path))
    assert answer.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in answer.stderr
    assert "past.cu:1" in answer.stderr


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("tool", "verdict"), [("memcheck", "ERROR SUMMARY: 0 errors"), ("racecheck", "RACECHECK SUMMARY: 0 hazards")]
)
def test_every_kernel_is_clean_on_the_gpu(tool, verdict):
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not on PATH: it comes with the CUDA toolkit")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    answer = run(environment, "cuda", under=(sanitizer, "--tool", tool, "--error-exitcode", "9"))
    assert answer.returncode == 0 and verdict in answer.stdout, answer.stdout[-3000:] + answer.stderr[-1000:]
