"""Torch as the toolkit sees it, on a simulated device: tensors over its memory, and a current stream."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import numpy as np

from cupaged.ops import streams as call_streams
from tests.kit.simulated_streams import Stream, Streams


class Tensor:
    """A tensor over the memory of a simulated device's array."""

    is_cuda = True
    device = SimpleNamespace(type="cuda", index=0)

    def __init__(self, array):
        self.array, self.dtype, self.shape = array, f"torch.{array.dtype.name}", array.shape

    def data_ptr(self):
        return self.array.data.ptr

    def numel(self):
        return self.array.size

    def stride(self):
        return tuple(stride // self.array.dtype.itemsize for stride in self.array.strides)

    def detach(self):
        return self

    def view(self, shape):
        return Tensor(self.array.reshape(shape))


class FakeTorch:
    """The module, and `stream`, torch's current one."""

    def __init__(self, monkeypatch, streams: Streams):
        self.streams, self.stream = streams, Stream(streams)
        module = ModuleType("torch")
        module.Tensor = Tensor
        module.cuda = SimpleNamespace(current_stream=lambda device: SimpleNamespace(cuda_stream=self.stream.ptr))
        for dtype in ("float16", "float32", "int32", "int64"):
            setattr(module, dtype, dtype)
        module.empty = lambda shape, dtype, device: self.tensor(np.empty(shape, dtype))
        monkeypatch.setitem(sys.modules, "torch", module)
        monkeypatch.setattr(call_streams, "_stream_at", lambda address: streams.all[address])
        monkeypatch.setattr(call_streams, "_events", SimpleNamespace())

    def tensor(self, content):
        """Return a tensor that holds the content already."""
        array = self.streams.array(content.shape, content.dtype)
        self.streams.seen(array)[...] = content
        return Tensor(array)

    def seen(self, tensor):
        """Return a tensor as a NumPy array, over the same memory."""
        return self.streams.seen(tensor.array)
