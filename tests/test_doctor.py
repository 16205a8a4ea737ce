"""The doctor says what works and what to install; whatever is missing is a line, never a traceback."""

import subprocess
import sys

import pytest

from cupaged import doctor
from cupaged.__main__ import main
from cupaged.runtime.select import why_no_gpu


def test_it_reports_every_part_and_both_backends(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for part in ("CuPy", "NVIDIA driver", "GPU", "NVRTC", "CUDA headers", "C++ compiler", "cache folders"):
        assert part in text
    assert "Kernels run here:" in text
    assert "runs on the CPU" in text.split("Kernels run here:")[1]
    assert ("runs on the GPU" in text.split("Kernels run here:")[1]) == (why_no_gpu() is None)


def test_it_runs_as_a_module():
    answer = subprocess.run([sys.executable, "-m", "cupaged", "doctor"], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert "matches the float64 reference" in " ".join(answer.stdout.split())  # lines may be wrapped


def test_a_missing_compiler_is_a_line_that_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    findings = {finding.what: finding for finding in doctor.examine()}
    assert not findings["C++ compiler"].well
    assert "apt-get install g++" in findings["C++ compiler"].detail


def test_nothing_that_runs_is_exit_status_1(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "_attend", lambda backend: (_ for _ in ()).throw(RuntimeError("broken")))
    assert doctor.doctor() == 1
    assert "nowhere" in capsys.readouterr().out


def test_an_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["nurse"])
    assert "invalid choice: 'nurse'" in capsys.readouterr().err
