"""A step in which every sequence decodes: fixed arrays, so that on a GPU it is one CUDA graph, replayed.

A graph replays launches with the arguments that they were captured with. What changes from step to step (tokens,
lengths, tables, how to sample) is therefore written to arrays that stay where they are, packed into one so that one
copy uploads it, and the work is shared out anew on the device, within the graph (`DecodePlan.update`). What cannot
change is the shape: batch and table are rounded up to a class, and rows that are left over have length 0 and slot -1.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np

from cupaged.attention.api import plan_decode, why_no_plan
from cupaged.engine.model import Llama, ModelInput
from cupaged.kv_cache import KVCache
from cupaged.ops.sampling import sample
from cupaged.reference import as_numpy

__all__ = ["DecodeStep", "ShapeClass", "shape_class"]

FIELDS = {
    "seeds": (np.uint64, 0),
    "tokens": (np.int32, 0),
    "positions": (np.int32, 0),
    "seq_lens": (np.int32, 0),
    "slots": (np.int32, -1),
    "top_k": (np.int32, 0),
    "temperature": (np.float32, 0.0),
    "top_p": (np.float32, 1.0),
    "block_tables": (np.int32, -1),
}  # name -> type, and what a row that is left over holds; the widest type first, so that all are aligned
LEAST_BLOCKS = 8


class ShapeClass(NamedTuple):
    """What a captured step serves: so many sequences, of so many blocks each."""

    num_seqs: int
    max_blocks: int


def shape_class(num_seqs: int, max_blocks: int) -> ShapeClass:
    """Return a batch's class: its size rounded up to 1, 2, 3, 4, 6, 8, 12, 16, ..., its table to a power of two."""
    step = 1 << max(0, (num_seqs - 1).bit_length() - 2)
    return ShapeClass(-(-num_seqs // step) * step, max(LEAST_BLOCKS, 1 << (max_blocks - 1).bit_length()))


class DecodeStep:
    """One step of decoding for a class of shapes; on a GPU it is captured at the first run and replayed from then on.

    Parameters
    ----------
    model : Llama
    caches : sequence of KVCache
        One a layer.
    shape : ShapeClass
        What it serves.

    Attributes
    ----------
    graph : cupy.cuda.Graph or None
        The captured step; None on the host, before the first run, and where something in it cannot be captured. Steps
        of the model are launched anew each time then, after a warning.
    """

    def __init__(self, model: Llama, caches: Sequence[KVCache], shape: ShapeClass) -> None:
        self.model, self.caches, self.shape = model, caches, shape
        self.graph: Any = None
        self._memory: Any = None
        sizes = [
            shape.num_seqs * (shape.max_blocks if name == "block_tables" else 1) * np.dtype(dtype).itemsize // 4
            for name, (dtype, _) in FIELDS.items()
        ]
        self._packed, self._device = self._allocate(sum(sizes))
        starts = np.cumsum([0, *sizes])
        self._host_rows, rows = (
            {
                name: array[start : start + size].view(dtype).reshape(shape.num_seqs, -1)
                for (name, (dtype, _)), start, size in zip(FIELDS.items(), starts, sizes, strict=False)
            }
            for array in (self._packed, self._device)
        )
        flat = {name: array if name == "block_tables" else array.reshape(-1) for name, array in rows.items()}
        self._sampling = {name: flat.pop(name) for name in ("temperature", "top_k", "top_p")}
        self._sampling["seed"] = flat.pop("seeds")
        self._input = ModelInput(**flat)
        self._out = model.xp.empty(shape.num_seqs, np.int32)
        self._fill({})
        self._upload()
        served = not model.use_reference and why_no_plan(caches[0]) is None
        self._plan = plan_decode(caches[0], self._input.seq_lens, model.config.num_heads) if served else None

    def run(self, **rows: np.ndarray) -> np.ndarray:
        """Compute the next token of each sequence.

        Parameters
        ----------
        **rows
            What each of `FIELDS` holds for the sequences, [num_seqs], `block_tables` [num_seqs, max_blocks]; at most
            as many as the class serves. On a GPU the current stream must be the same one each time, and not the
            default one. Without any, nothing is computed but what captures the step.

        Returns
        -------
        int32 [num_seqs]
        """
        self._fill(rows)
        self._upload()
        if self.graph is None and self.model.captures:
            try:
                self._capture()
            except (RuntimeError, MemoryError) as error:  # a graph takes memory of its own; else it comes again below
                self.model.captures, self._memory = False, None
                warnings.warn(f"decode steps are launched, not replayed from a graph: {error}", stacklevel=2)
        if self.graph is None:
            self.compute()
        else:
            self.graph.launch(self.model.xp.cuda.get_current_stream())
        return as_numpy(self._out)[: len(rows.get("tokens", ()))].copy()

    def compute(self) -> None:
        """Launch the step on what is filled in, without a graph."""
        if self._plan is not None:
            self._plan.update(self._input.seq_lens)
        logits = self.model.forward(self._input, self.caches, self._plan, validate=False)
        sample(logits, **self._sampling, out=self._out, validate=False, invalid="mark")

    def _capture(self) -> None:
        """Capture the step; what its arrays are allocated from is its own, as a replay writes to them again."""
        cuda = self.model.xp.cuda
        stream = cuda.get_current_stream()
        self.compute()  # compile, and make what is made once: kernels, sines, a handle and workspace for products
        self._memory, held = cuda.MemoryPool(), -1
        with cuda.using_allocator(self._memory.malloc):
            while self._memory.total_bytes() != held:  # until the pool holds all that the captured step will ask for
                held = self._memory.total_bytes()
                self.compute()
            stream.synchronize()
            stream.begin_capture()
            try:
                self.compute()
            except BaseException:
                with suppress(Exception):  # what was captured is invalid, and says so once more
                    stream.end_capture()
                raise
            self.graph = stream.end_capture()

    def _fill(self, rows: dict[str, np.ndarray]) -> None:
        for name, (_, nothing) in FIELDS.items():
            array = self._host_rows[name]
            array[...] = nothing
            if name in rows:
                values = rows[name].reshape(len(rows[name]), -1)
                array[: len(values), : values.shape[1]] = values

    def _allocate(self, size: int) -> tuple[np.ndarray, Any]:
        if self.model.backend == "host":
            packed: np.ndarray = np.zeros(size, np.int32)
            return packed, packed
        cupy = self.model.xp
        memory = cupy.cuda.alloc_pinned_memory(4 * size)
        return np.frombuffer(memory, np.int32, size), cupy.zeros(size, np.int32)

    def _upload(self) -> None:
        """Copy what was filled in; the last step's result has been read, so nothing still reads these arrays."""
        if self.model.backend == "cuda":
            stream = self.model.xp.cuda.get_current_stream()
            self._device.data.copy_from_host_async(self._packed.ctypes.data, self._packed.nbytes, stream)
