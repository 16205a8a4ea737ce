"""Launches by the driver, without a GPU: what it is told and answers, and where kernels start early."""

from types import SimpleNamespace

import numpy as np
import pytest

from cupaged.runtime import driver, load_kernel

cupy = pytest.importorskip("cupy", reason="the launch needs CuPy, though no GPU")


class Driver:
    """Stands for cuLaunchKernelEx; answers with the codes that it is given, then 0."""

    def __init__(self, monkeypatch, *codes):
        self.codes, self.told, self.contexts, self.stream = list(codes), [], 0, 7
        monkeypatch.setattr(driver, "_launch_function", lambda: self)
        monkeypatch.setattr(cupy.cuda, "get_current_stream", lambda: SimpleNamespace(ptr=self.stream))
        monkeypatch.setattr(cupy.cuda.runtime, "free", self.make_context)

    def make_context(self, pointer):
        assert pointer == 0
        self.contexts += 1

    def __call__(self, config, kernel, arguments, extra):
        told = driver._Config.from_address(config)
        attribute = driver._Attribute.from_address(told.attributes) if told.num_attributes else None
        places = (driver.ctypes.c_void_p * 3).from_address(arguments)
        words = tuple(driver.ctypes.c_uint64.from_address(place).value for place in places)
        early = attribute is not None and (attribute.id, attribute.value[0]) == (driver.MAY_START_EARLY, 1)
        self.told.append((tuple(told.grid), tuple(told.block), told.shared_bytes, told.stream, early, words))
        assert (kernel, extra) == (99, None)
        return self.codes.pop(0) if self.codes else 0


def array_at(address):
    memory = cupy.cuda.UnownedMemory(address, 64, None, 0)
    return cupy.ndarray((8,), np.float32, memptr=cupy.cuda.MemoryPointer(memory, 0))


def launch_of(*values, overlaps=False):
    kernel = SimpleNamespace(kernel=SimpleNamespace(ptr=99))
    return driver.DriverLaunch(kernel, (4, 3, 2), (64, 2, 1), 2048, values, overlaps)


VALUES = array_at(1 << 20), np.int32(-5), np.float32(0.5)
WORDS = 1 << 20, 2**32 - 5, int(np.float32(0.5).view(np.uint32))


@pytest.mark.parametrize("early", [False, True])
def test_the_driver_is_told_all_of_a_launch(early, monkeypatch):
    told = Driver(monkeypatch)
    launch = launch_of(*VALUES, overlaps=early)
    launch()
    told.stream = 8  # another is current by now
    launch()
    assert told.told == [((4, 3, 2), (64, 2, 1), 2048, stream, early, WORDS) for stream in (7, 8)]


def test_other_arrays_go_to_an_open_launch_and_to_no_other(monkeypatch):
    told = Driver(monkeypatch)
    launch = launch_of(*VALUES, overlaps=True)
    opened = launch.open_for([0])
    opened([array_at(1 << 21)])
    launch()
    opened([array_at(1 << 22)])
    assert [words for *_, words in told.told] == [(1 << 21, *WORDS[1:]), WORDS, (1 << 22, *WORDS[1:])]
    assert all(early for *_, early, _ in told.told)


def test_a_thread_without_a_context_gets_one_and_launches(monkeypatch):
    told = Driver(monkeypatch, driver.INVALID_CONTEXT)
    monkeypatch.setattr("cupy_backends.cuda.api.driver.check_status", lambda status: None)
    launch_of(*VALUES)()
    assert told.contexts == 1 and len(told.told) == 2


@pytest.mark.parametrize("codes", [(700,), (driver.INVALID_CONTEXT, driver.INVALID_CONTEXT)])
def test_what_the_driver_refuses_is_raised(codes, monkeypatch):
    told, refused = Driver(monkeypatch, *codes), []
    monkeypatch.setattr("cupy_backends.cuda.api.driver.check_status", refused.append)
    launch_of(*VALUES)()
    assert refused == [codes[-1]] and len(told.told) == len(codes)


@pytest.mark.parametrize(
    ("capability", "version", "early"),
    [("80", 13000, False), ("89", 13000, False), ("90", 12020, False), ("90", 12030, True), ("120", 13000, True)],
)
def test_which_gpus_have_kernels_that_start_early(capability, version, early, monkeypatch):
    monkeypatch.setattr(cupy.cuda, "Device", lambda device: SimpleNamespace(compute_capability=capability))
    monkeypatch.setattr(cupy.cuda.runtime, "driverGetVersion", lambda: version)
    assert driver.can_overlap_launches.__wrapped__("cuda", 0) == early
    assert driver.can_overlap_launches.__wrapped__("host", 0)


@pytest.mark.parametrize(
    ("file", "entry"),
    [
        ("attention/paged_attention_persistent.cu", True),
        ("attention/paged_prefill.cu", True),
        ("attention/plan_decode.cu", False),
        ("cache/append_kv.cu", False),
    ],
)
def test_only_kernels_that_wait_may_start_early(file, entry):
    """A define that a kernel does not read makes none of it start before the kernel before it has ended."""
    name = file.split("/")[1].removesuffix(".cu")
    for asked in (0, 1):
        source = load_kernel(file, name, {"LAUNCH_OVERLAP": asked}, backend="host").source
        assert source.waits_for_kernel_before == (entry and asked == 1)
    assert not load_kernel(file, name, {}, backend="host").source.waits_for_kernel_before
