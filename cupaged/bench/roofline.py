"""The roofline: arithmetic against bytes, under the roof that the memory's measured speed builds.

Williams, Waterman, Patterson, "Roofline: An Insightful Visual Performance Model for Multicore Architectures",
Communications of the ACM 52(4), 2009.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cupaged.bench.report import new_figure, save_figure

__all__ = ["draw_roofline"]

MARKERS = "osD^vP*X<>"


def draw_roofline(rows: Iterable[Mapping[str, Any]], ceiling_gb_s: float, title: str, path: Path) -> bool:
    """Draw results under the roof of the read ceiling; returns whether there was one to draw.

    Parameters
    ----------
    rows : iterable of mapping
        Those with ``status`` "ok" are drawn: ``kernel`` gives the marker, ``workload`` the colour, ``flop_per_byte``
        the place (FLOP over bytes of keys and values), ``gflop_s`` the height.
    ceiling_gb_s : float
        Read bandwidth in GB/s: the roof is so many GFLOP/s at one FLOP per byte.
    title : str
        Above the picture.
    path : Path
        The PNG file.
    """
    good = [row for row in rows if row["status"] == "ok" and row.get("gflop_s")]
    if not good:
        return False
    figure, axis = new_figure(width=9, height=5)
    intensities = np.array([row["flop_per_byte"] for row in good])
    roof = np.array([intensities.min() / 2, intensities.max() * 2])
    axis.plot(roof, ceiling_gb_s * roof, color="black", label=f"read ceiling, {ceiling_gb_s:.0f} GB/s")
    kernels, workloads = (list(dict.fromkeys(row[key] for row in good)) for key in ("kernel", "workload"))
    for row in good:
        kernel, workload = kernels.index(row["kernel"]), workloads.index(row["workload"])
        axis.plot(
            row["flop_per_byte"], row["gflop_s"], MARKERS[kernel % len(MARKERS)], color=f"C{workload % 10}", alpha=0.8
        )
    for i, kernel in enumerate(kernels):
        axis.plot([], [], MARKERS[i % len(MARKERS)], color="grey", label=kernel)
    for i, workload in enumerate(workloads):
        axis.plot([], [], "-", color=f"C{i % 10}", linewidth=4, label=workload)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlabel("FLOP per byte of keys and values")
    axis.set_ylabel("GFLOP/s")
    axis.set_title(title, fontsize=11)
    figure.legend(loc="outside right center", fontsize=8)
    save_figure(figure, path)
    return True
