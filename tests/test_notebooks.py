"""The notebooks run from top to bottom, and what is committed is what they show."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.kit.real_model import smollm2

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NEED_THE_MODEL = {"07_request_to_kernel.ipynb"}
SAME_EVERYWHERE = {"01_block_tables.ipynb", "02_sharing_and_eviction.ipynb"}  # the others measure the machine


def printed(cell: nbformat.NotebookNode) -> str:
    """Return what a cell printed, without what went to stderr."""
    return "".join(output["text"] for output in cell.get("outputs", []) if output.get("name") == "stdout")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_prints_what_is_committed(path):
    if path.name in NEED_THE_MODEL:
        smollm2()  # or skip, with what is missing
    committed = nbformat.read(path, as_version=4)
    fresh = nbformat.read(path, as_version=4)
    NotebookClient(fresh, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    for old, new in zip(committed.cells, fresh.cells, strict=True):
        if old.cell_type == "code":
            assert old.execution_count is not None, "the committed notebook has a cell that was not run"
            assert bool(printed(new)) == bool(printed(old))
            assert path.name not in SAME_EVERYWHERE or printed(new) == printed(old)


def test_the_notebooks_that_are_the_same_everywhere_are_there():
    assert {path.name for path in NOTEBOOKS} >= SAME_EVERYWHERE
