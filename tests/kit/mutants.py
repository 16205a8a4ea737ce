"""Kernels with a mistake put in, to see that a test finds it."""

from __future__ import annotations

import shutil

from cupaged.runtime import kernels_folder


def kernels_with(folder, file, right, wrong):
    """Return a copy of the kernels' folder in which the text `right` of a file, there once, reads `wrong`."""
    copy = folder / "kernels_cu"
    shutil.copytree(kernels_folder(), copy)
    text = (copy / file).read_text(encoding="utf-8")
    assert text.count(right) == 1, f"{file} must hold {right!r} once; it does so {text.count(right)} times"
    (copy / file).write_text(text.replace(right, wrong), encoding="utf-8")
    return copy
