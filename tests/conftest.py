"""Every test validates its input, on the GPU as on the host, and those marked `gpu` run where one is."""

import os

os.environ.setdefault("CUPAGED_VALIDATE", "1")

import pytest

from cupaged.runtime.select import why_no_gpu


def pytest_collection_modifyitems(config, items):
    """Skip tests marked `gpu` where no GPU answers, with CuPy's own reason, and `slow` ones unless asked for."""
    reason = why_no_gpu()
    asked_for_slow = "slow" in config.option.markexpr
    for item in items:
        if not asked_for_slow and "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="takes minutes: run with -m slow"))
        if reason and "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(params=["host", pytest.param("cuda", marks=pytest.mark.gpu)])
def backend(request):
    """Each test that asks for it runs on both backends."""
    return request.param


@pytest.fixture
def xp(backend):
    """The array module of the backend."""
    if backend == "host":
        import numpy

        return numpy
    import cupy

    return cupy
