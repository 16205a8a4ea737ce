"""Swaps on streams of their own: whatever order streams and events permit, every block arrives."""

import gc
from types import SimpleNamespace

import numpy as np
import pytest

import cupaged as pg
from cupaged.ops import swap
from tests.kit.simulated_streams import Stream, Streams

pytest.importorskip("cupy", reason="swaps on streams need CuPy, though no GPU")

CONFIG = pg.CacheConfig(12, 2, 1, 32, "float16", "BSHD")
BLOCK_BYTES = CONFIG.block_size * CONFIG.bytes_per_token
OUT = np.array([[2, 5], [7, 0], [4, 1], [8, 2], [0, 4], [11, 6], [9, 7]])
BACK = np.array([[5, 6], [1, 3], [0, 10], [2, 1], [4, 2], [6, 7], [7, 5]])


def keys_and_values(streams, cache):
    """Return a cache's keys, and its values, as [blocks, elements] of a block."""
    return [streams.seen(array).reshape(12, 64) for array in cache.storage]


def fill(streams, cache, seed=0):
    """Write some keys and values at once, and return them, [blocks, elements] of both."""
    content = np.random.default_rng(seed).random((12, 128)).astype(np.float16)
    for array, half in zip(keys_and_values(streams, cache), np.hsplit(content, 2), strict=True):
        array[...] = half
    return content


class Work:
    """Layers that the current stream writes, swaps out, writes over, swaps in and reads."""

    def __init__(self, monkeypatch, seed, layers=2, at_once=2):
        monkeypatch.setattr(swap, "STAGING_BYTES", at_once * BLOCK_BYTES)
        self.streams = Streams(monkeypatch, seed)
        self.caches = [pg.KVCache(CONFIG, "cuda") for _ in range(layers)]
        self.engine = pg.SwapEngine(self.caches, 8, pinned=False)
        for host in self.engine.host:
            self.streams.pin(host.blocks)

    def write(self):
        self.content = [fill(self.streams, cache, seed) for seed, cache in enumerate(self.caches)]

    def spoil(self):
        for cache in self.caches:
            for array in keys_and_values(self.streams, cache):
                array[...] = -1

    def read(self, into):
        into += [np.concatenate(keys_and_values(self.streams, cache), axis=1)[BACK[:, 1]] for cache in self.caches]

    def comes_back(self, beside=True):
        """Swap out and in, beside other work or at once, and return whether all arrives."""
        current, found = self.streams.current[-1], []
        current.add(self.write)
        self.engine.swap_out(OUT)
        if beside:
            self.engine.wait()
            current.add(self.spoil)
        self.engine.swap_in(BACK)
        self.engine.wait()
        current.add(lambda: self.read(found))
        self.streams.run()
        was = dict(OUT[:, ::-1].tolist())
        sources = [was[place] for place in BACK[:, 0].tolist()]
        return all(np.array_equal(a, content[sources]) for a, content in zip(found, self.content, strict=True))


@pytest.mark.parametrize("at_once", [1, 2, 3, 100])
@pytest.mark.parametrize("seed", range(5))
def test_blocks_come_back_in_every_order(at_once, seed, monkeypatch):
    assert Work(monkeypatch, seed, at_once=at_once).comes_back()
    assert Work(monkeypatch, seed, at_once=at_once).comes_back(beside=False)


@pytest.mark.parametrize(
    "missing", ["current work", "the swap before", "ids", "the other stream's end", "the end before going on"]
)
def test_without_one_of_its_waits_some_order_goes_wrong(missing, monkeypatch):
    streams = swap._Streams
    if missing == "current work":
        monkeypatch.setattr(streams, "wait_for_current", lambda streams: None)
    elif missing == "the swap before":
        plain = streams.wait_for
        monkeypatch.setattr(
            streams, "wait_for", lambda streams, events: plain(streams, [e for e in events if e is streams._asked])
        )
    elif missing == "the end before going on":
        monkeypatch.setattr(streams, "let_current_wait", lambda streams, event: None)
    else:
        event = "_uploaded" if missing == "ids" else "_other_done"
        plain_init = streams.__init__

        def init(streams):
            plain_init(streams)
            setattr(streams, event, SimpleNamespace(record=lambda stream: None, recorded=None))

        monkeypatch.setattr(streams, "__init__", init)
    at_once, beside = (100, False) if missing == "the swap before" else (2, True)
    assert not all(Work(monkeypatch, seed, at_once=at_once).comes_back(beside) for seed in range(30))


def test_what_layers_have_in_common_is_done_once(monkeypatch):
    work = Work(monkeypatch, 0, layers=4, at_once=4)
    checked = []
    plain = swap._checked
    monkeypatch.setattr(swap, "_checked", lambda *arguments: checked.append(arguments) or plain(*arguments))
    prepared = []
    prepare = swap.prepare_move
    monkeypatch.setattr(swap, "prepare_move", lambda *a, **options: prepared.append(a) or prepare(*a, **options))
    for _ in range(2):
        work.engine.swap_out(OUT)
    parts, runs = 3, 1 + 2 + 1  # host blocks 0, then 1, 2, 4, 5, then 6, 7: a quarter of a buffer first
    streams = work.streams
    assert (len(checked), streams.uploads) == (2, 2)
    assert len(prepared) == 3  # one block, four and two; known the second time
    assert (streams.launches, streams.copies) == (2 * 4 * parts, 2 * 4 * runs)
    turns = [stream for stream, before in zip(streams.copied_on, [None, *streams.copied_on], strict=False)
             if stream is not before]  # fmt: skip
    first, other = work.engine._mover.streams.own
    assert turns == 4 * parts * [first, other]  # gathers into one buffer, while the other is on the link


@pytest.mark.parametrize("out", [True, False])
def test_the_link_waits_for_a_quarter_of_a_buffer(out, monkeypatch):
    work = Work(monkeypatch, 0, layers=1, at_once=4)
    sizes, plain = [], swap._Mover.launch
    monkeypatch.setattr(
        swap._Mover, "launch", lambda m, cache, ids, out: sizes.append(len(ids)) or plain(m, cache, ids, out)
    )
    (work.engine.swap_out if out else work.engine.swap_in)(OUT if out else OUT[:, ::-1])
    assert sizes == ([1, 4, 2] if out else [4, 3])


def test_a_mistake_starts_nothing(monkeypatch):
    work = Work(monkeypatch, 0)
    work.streams.run()
    for pairs in ([[0, 8]], [[12, 0]], [[0, 1], [2, 1]]):
        with pytest.raises(ValueError, match="pairs must"):
            work.engine.swap_out(pairs)
    work.engine.swap_out([])
    assert not any(stream.queue for stream in work.streams.all)


@pytest.mark.parametrize("waits", [True, False])
def test_what_others_move_is_waited_for(waits, monkeypatch):
    """Blocks that one mover brings to the host are read there by another, asked for on another stream."""

    def arrives(seed):
        work, found = Work(monkeypatch, seed, layers=1), []
        other = pg.KVCache(CONFIG, "cuda")
        work.streams.current[-1].add(work.write)
        work.engine.swap_out(OUT)
        if not waits:
            work.engine.host[0].moved = None
        with Stream(work.streams):
            pg.swap_blocks(work.engine.host[0], other, BACK)
            work.streams.current[-1].add(
                lambda: found.append(np.concatenate(keys_and_values(work.streams, other), axis=1))
            )
        work.streams.run()
        was = dict(OUT[:, ::-1].tolist())
        return np.array_equal(found[0][BACK[:, 1]], work.content[0][[was[place] for place in BACK[:, 0].tolist()]])

    assert all(arrives(seed) for seed in range(20)) == waits


@pytest.mark.parametrize("waits", [True, False])
def test_what_the_buffers_memory_held_before_is_done_with(waits, monkeypatch):
    """The memory that buffers get may still be written, on the stream that they are made on."""
    plain, made = swap._Streams.wait_for_current, []

    def wait(streams):
        made.append(streams)
        if waits or len(made) > 1:  # the first is made with the buffers
            plain(streams)

    monkeypatch.setattr(swap._Streams, "wait_for_current", wait)

    def arrives(seed):
        made.clear()
        streams = Streams(monkeypatch, seed)
        cache, buffers = pg.KVCache(CONFIG, "cuda"), []
        content = fill(streams, cache)
        streams.current[-1].add(lambda: [streams.seen(buffer).fill(-1) for buffer in buffers])
        engine = pg.SwapEngine([cache], 8, pinned=False)
        buffers += engine._mover.buffers
        with Stream(streams):
            engine.swap_out(OUT)
        streams.run()
        return np.array_equal(engine.host[0].blocks[OUT[:, 1]], content[OUT[:, 0]])

    assert all(arrives(seed) for seed in range(200)) == waits


@pytest.mark.parametrize("at_once", [1, 2, 100])
def test_a_swap_follows_another_with_other_memory(at_once, monkeypatch):
    """One mover, asked on two streams: blocks go to one place before others come over them from a second."""
    monkeypatch.setattr(swap, "STAGING_BYTES", at_once * BLOCK_BYTES)
    for seed in range(40):
        streams = Streams(monkeypatch, seed)
        cache = pg.KVCache(CONFIG, "cuda")
        content = fill(streams, cache)
        first, second = (pg.HostBlocks(CONFIG, 8, pinned=False) for _ in range(2))
        for host in (first, second):
            streams.pin(host.blocks)
            host.blocks[...] = 2
        with Stream(streams):
            pg.swap_blocks(cache, first, OUT)
        with Stream(streams):
            pg.swap_blocks(second, cache, OUT[:, ::-1])
        streams.run()
        assert np.array_equal(first.blocks[OUT[:, 1]], content[OUT[:, 0]])
        assert all((streams.seen(array).reshape(12, 64)[OUT[:, 0]] == 2).all() for array in cache.storage)


def test_room_for_ids_grows_with_swaps(monkeypatch):
    work = Work(monkeypatch, 0, layers=1)
    streams = work.engine._mover.streams
    for few in (2, 7, 3):
        work.engine.swap_in(OUT[:few, ::-1])
        assert len(streams._ids) >= few
        assert work.streams.made_on(streams._ids) is streams.own[0]  # which may give it away, and waits for the other


def test_more_ids_than_the_driver_takes_at_once(monkeypatch):
    monkeypatch.setattr(swap, "UPLOADED_AT_ONCE", 12)
    work = Work(monkeypatch, 0)
    assert work.comes_back()
    assert work.streams.uploads == 2 * 3  # of 28 bytes


def test_ids_are_kept_until_the_swap_is_done(monkeypatch):
    work = Work(monkeypatch, 0)
    kept = work.engine._mover.streams._kept
    work.engine.swap_out(OUT)
    work.engine.swap_in(BACK)
    assert [list(ids) for _, ids in kept] == [
        OUT[np.argsort(OUT[:, 1]), 0].tolist(),
        BACK[np.argsort(BACK[:, 0]), 1].tolist(),
    ]
    work.streams.run()
    work.engine.swap_out(OUT)
    assert len(kept) == 1


def test_an_engine_that_goes_waits_for_its_copies(monkeypatch):
    work = Work(monkeypatch, 0)
    own, hosts = work.engine._mover.streams.own, work.engine.host  # which would wait too if they went
    work.engine.swap_out(OUT)
    assert all(stream.queue for stream in own)
    work.engine = None
    gc.collect()
    assert len(hosts) == 2
    assert not any(stream.queue for stream in own)


@pytest.mark.parametrize("dtype", [np.uint64, np.int8])
def test_pairs_of_any_integers(dtype, monkeypatch):
    work = Work(monkeypatch, 0, layers=1)
    work.write()
    work.engine.swap_out(OUT.astype(dtype))
    work.streams.run()
    assert np.array_equal(work.engine.host[0].blocks[OUT[:, 1]], work.content[0][OUT[:, 0]])


def test_memory_on_the_host_knows_when_its_copies_are_done(monkeypatch):
    work = Work(monkeypatch, 0)
    work.engine.swap_out(OUT)
    for host in work.engine.host:
        assert not host.moved.recorded.done
    work.streams.run()
    assert all(host.moved.recorded.done for host in work.engine.host)


def test_an_edited_kernel_is_launched(monkeypatch):
    """A launch that is kept from an earlier call is made anew when its source is another."""
    work, prepared = Work(monkeypatch, 0), []
    prepare = swap.prepare_move
    monkeypatch.setattr(swap, "prepare_move", lambda *a, **options: prepared.append(a) or prepare(*a, **options))
    work.engine.swap_out(OUT)
    before = len(prepared)
    monkeypatch.setattr("cupaged.runtime.launch.CheckedCall.is_current", lambda call: False)
    work.engine.swap_out(OUT)
    assert len(prepared) > before > 0


@pytest.mark.parametrize("seed", range(5))
def test_a_swap_that_fails_on_its_way_leaves_no_copy_behind(seed, monkeypatch):
    """The link is first on the way in: what it writes to a buffer must be over before others use that."""
    work = Work(monkeypatch, seed)
    work.engine.swap_out(OUT)
    work.streams.run()
    with monkeypatch.context() as broken:
        broken.setattr(swap, "prepare_move", lambda *_, **__: (_ for _ in ()).throw(MemoryError("no room")))
        with pytest.raises(MemoryError, match="no room"):
            work.engine.swap_in(BACK)
    first, other = work.engine._mover.streams.own
    assert len(other.queue) == 1 and len(first.queue) == 2  # the marks of when it was over
    assert work.comes_back()
