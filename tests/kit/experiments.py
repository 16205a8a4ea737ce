"""Run an experiment as a reader would, or load its functions."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(name, *arguments, status=0, **environment):
    """Return what `python experiments/<name>.py` wrote to the terminal, in one line, and to the error stream."""
    command = [sys.executable, str(ROOT / "experiments" / f"{name}.py"), *arguments]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "COLUMNS": "200", **environment}
    answer = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert answer.returncode == status, answer.stdout + answer.stderr
    return " ".join(answer.stdout.split()), answer.stderr


def document(folder, name, *, picture=True):
    """Return the JSON that an experiment wrote, after a look at the other files that belong to it."""
    assert (folder / f"{name}.csv").stat().st_size > 0
    assert not picture or (folder / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def functions(name):
    """Return the names that an experiment defines."""
    return runpy.run_path(str(ROOT / "experiments" / f"{name}.py"))
