"""Small kernels written in a test, run on either backend."""

from __future__ import annotations

import shutil

from cupaged.runtime import kernels_folder, kernels_from, load_kernel


def kernel_from_text(folder, text, entry, backend, defines=None):
    """Return the kernel `entry` of a .cu file with this text, beside a copy of the toolkit's headers."""
    root = folder / "kernels"
    if not root.exists():
        shutil.copytree(kernels_folder() / "include", root / "include")
    (root / f"{entry}.cu").write_text(text, encoding="utf-8")
    with kernels_from(root):
        return load_kernel(f"{entry}.cu", entry, defines, backend)
