"""What does a step of decoding with a real model take, and how much of it is attention?

A batch whose sequences all have one new token, through every layer to the chosen token: replayed as one CUDA graph,
with what a server does around it (upload, replay, read the tokens back), and launched one by one; the attention of all
layers alone, as a graph; and the same step in `transformers`, if it is installed, with the same weights and batch, as
it runs if nothing is set: PyTorch's attention, a cache that grows, no compilation; and again without cuDNN's attention,
which makes a new plan for each length. Logits must be as close to those of transformers in float32 as its own are in
half precision. Without a GPU the ways are compared on a small random model, and nothing is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from ml_dtypes import finfo

import cupaged as pg
from cupaged.bench.experiment import Experiment, Row, run_script
from cupaged.bench.report import (
    new_figure,
    save_figure,
)
from cupaged.bench.timing import time_graph, time_launches
from cupaged.engine.decode_step import DecodeStep, shape_class
from cupaged.engine.model import Llama, ModelInput
from cupaged.engine.weights import Checkpoint, LayerWeights, ModelConfig, random_checkpoint, smollm2_or_random
from cupaged.reference import as_numpy

REPEATS = 30
EXPECTATION = (
    "What to expect. A step of a small model is hundreds of small launches: one by one it waits for the CPU, as a "
    "graph for the GPU. With short contexts attention is the smaller part. transformers launches more, one by one, "
    "and copies its cache to append to it."
)
SMALL = ModelConfig(
    num_layers=2, hidden_size=64, intermediate_size=96, vocab_size=97, num_heads=4, num_kv_heads=2, head_dim=32,
    max_tokens=64,
)  # fmt: skip


@dataclass(frozen=True)
class Config:
    """The batch."""

    num_seqs: int
    context: int
    dtype: str
    block_size: int = 16


CONFIGS = {
    ("cuda", False): Config(64, 512, "float16"),
    ("cuda", True): Config(4, 40, "float16"),
    ("host", False): Config(4, 20, "float32"),
    ("host", True): Config(2, 10, "float32"),
}


class Batch:
    """Sequences of one length whose contexts are computed, on blocks at random, and their next tokens."""

    def __init__(self, checkpoint: Checkpoint, config: Config, backend: str) -> None:
        random = np.random.default_rng(0)
        self.checkpoint, self.config = checkpoint, config
        self.texts = random.integers(checkpoint.config.vocab_size, size=(config.num_seqs, config.context))
        self.model = Llama(checkpoint, backend, config.dtype)
        blocks = -(-config.context // config.block_size)
        self.caches = self.model.new_caches(config.num_seqs * blocks, config.block_size)
        self.tables = random.permutation(config.num_seqs * blocks).astype(np.int32).reshape(-1, blocks)
        for i in range(config.num_seqs):  # one at a time: logits of a whole batch of prompts would be large
            self.model.forward(self._input(slice(i, i + 1), 0, config.context - 1), self.caches)

        self._stream = None
        if backend == "cuda":
            self._stream = self.model.xp.cuda.Stream(non_blocking=True)
            self.model.xp.cuda.Device().synchronize()

    def stream(self) -> AbstractContextManager[Any]:
        """Return the stream that steps run on: a capture needs one of its own."""
        return nullcontext() if self._stream is None else self._stream

    def rows(self) -> dict[str, np.ndarray]:
        """Return the next tokens as `DecodeStep.run` takes them."""
        last = np.full(self.config.num_seqs, self.config.context - 1, np.int32)
        within = last % self.config.block_size
        return {
            "tokens": self.texts[:, -1].astype(np.int32),
            "positions": last,
            "seq_lens": last + 1,
            "slots": self.tables[:, -1] * np.int32(self.config.block_size) + within,
            "block_tables": self.tables,
        }

    def next_logits(self) -> np.ndarray:
        """Return the logits after the next tokens, launched one by one, float32 [num_seqs, vocab_size]."""
        xp = self.model.xp
        step = ModelInput(**{name: xp.asarray(array) for name, array in self.rows().items()})
        return as_numpy(self.model.forward(step, self.caches))

    def _input(self, seqs: slice, start: int, stop: int) -> ModelInput:
        xp, size, texts = self.model.xp, self.config.block_size, self.texts[seqs]
        positions = np.tile(np.arange(start, stop, dtype=np.int32), len(texts))
        rows = np.repeat(np.arange(len(texts)), stop - start)
        slots = self.tables[seqs][rows, positions // size] * np.int32(size) + positions % np.int32(size)
        starts = np.arange(len(texts) + 1, dtype=np.int32) * np.int32(stop - start)
        arrays = (texts[:, start:stop].reshape(-1).astype(np.int32), positions, slots, self.tables[seqs],
                  np.full(len(texts), stop, np.int32), starts, starts[1:] - np.int32(1))  # fmt: skip
        return ModelInput(*(xp.asarray(array) for array in arrays))


class ModelStep(Experiment):
    """One step of a batch, in each way."""

    expectation, unit = EXPECTATION, "way"
    place, wants_quiet_cpu = 210, True
    configs = CONFIGS
    failures = (Exception,)  # what a peer may raise is not known

    def prepare(self) -> None:
        checkpoint, self.model = model_of(self.backend, self.smoke)
        self.batch = batch = Batch(checkpoint, self.config, self.backend)
        self.expected = batch.next_logits()
        with batch.stream():
            cells = shape_class(self.config.num_seqs, batch.tables.shape[1])
            self.step = DecodeStep(batch.model, batch.caches, cells)

    def cells(self) -> Sequence[str]:
        return WAYS if self.backend == "cuda" else WAYS[:1]

    def what(self, cell: str) -> Row:
        return {"way": cell}

    def measure(self, cell: str) -> Row:
        batch, step, expected = self.batch, self.step, self.expected
        measures: dict[str, Callable[[], Row]] = {
            GRAPH: lambda: of_graph(batch, step, expected),
            TRANSFORMERS: lambda: of_transformers(batch, expected),
            WITHOUT_CUDNN: lambda: of_transformers(batch, expected, cudnn=False),
            RUN: lambda: of_run(batch, step),
            LAUNCHES: lambda: {"ms": time_launches([step.compute]).median_us / 1e3, "status": "ok"},
            ATTENTION: lambda: of_attention(batch),
        }
        row = measures[cell]()
        if "ms" in row and cell != ATTENTION:
            row["tokens_per_s"] = 1e3 * self.config.num_seqs / row["ms"]
        return row

    def title(self) -> str:
        return f"A step of {self.config.num_seqs} sequences of {self.config.context} tokens, {self.model}"

    def notes(self, rows: list[Row]) -> Row:
        return {**super().notes(rows), "model": self.model}

    def draw(self, rows: list[Row], path: Path) -> None:
        if any("ms" in row for row in rows):
            draw(rows, self.stamp, path)

    def went_well(self, rows: list[Row]) -> bool:
        return all(row["status"] in ("ok", NOT_INSTALLED) for row in rows)


COLUMNS = {"way": "way", "ms": "ms a step|.3f", "tokens_per_s": "tokens a second|.0f", "status": "status"}
NOT_INSTALLED = "not installed"
WAYS = GRAPH, TRANSFORMERS, WITHOUT_CUDNN, RUN, LAUNCHES, ATTENTION = (
    "one graph", "transformers", "transformers without cuDNN", "one graph, uploaded and read back",
    "launched one by one", "attention alone, one graph",
)  # fmt: skip


def model_of(backend: str, smoke: bool) -> tuple[Checkpoint, str]:
    """Return the model, and what to call it."""
    if backend == "host" or smoke:
        return random_checkpoint(SMALL), "a small random model"
    return smollm2_or_random()


# --- measuring ----------------------------------------------------------------------------------------------------


def of_graph(batch: Batch, step: DecodeStep, expected: np.ndarray) -> Row:
    """Run the step, check what it chose, and time the replay of the graph that it was captured in."""
    with batch.stream():
        chosen = step.run(**batch.rows())
    best = expected[np.arange(len(chosen)), chosen]
    row: Row = {"status": agreement(best, expected.max(axis=1), batch.model.storage)}
    if batch.model.backend == "cuda":
        if step.graph is None:
            return {"status": "failed: the step was not captured"}
        row["ms"] = time_launches([step.graph.launch]).median_us / 1e3
    return row


def of_run(batch: Batch, step: DecodeStep) -> Row:
    """Time what a server does for a step, the scheduler left out."""
    times = []
    with batch.stream():
        for _ in range(REPEATS):
            start = perf_counter()
            step.run(**batch.rows())
            times.append(perf_counter() - start)
    return {"ms": 1e3 * float(np.median(times[3:])), "status": "ok"}


def of_attention(batch: Batch) -> Row:
    """Time planning, appending and attending in all layers, without anything else."""
    model, xp, count = batch.model, batch.model.xp, batch.config.num_seqs
    heads, kv_heads, dim = model.config.num_heads, model.config.num_kv_heads, model.config.head_dim
    query, key = xp.ones((count, heads, dim), model.storage), xp.ones((count, kv_heads, dim), model.storage)
    rows = {name: xp.asarray(array) for name, array in batch.rows().items()}
    plan = pg.plan_decode(batch.caches[0], rows["seq_lens"], heads)

    def attend() -> None:
        plan.update(rows["seq_lens"])
        for cache in batch.caches:
            turned = pg.rope_append_kv(
                cache, key, key, rows["slots"], rows["positions"],
                query=query, theta=model.config.rope_base, validate=False,
            )  # fmt: skip
            pg.paged_attention(turned, cache, rows["block_tables"], rows["seq_lens"], plan=plan, validate=False)

    return {"ms": time_graph([attend]).median_us / 1e3, "status": "ok"}


def of_transformers(batch: Batch, ours: np.ndarray, cudnn: bool = True) -> Row:
    """Time the same step in transformers, by events around it, and hold our logits to its own; its cache grows."""
    if find_spec("torch") is None or find_spec("transformers") is None:
        return {"status": NOT_INSTALLED}
    import torch
    import transformers
    from torch.nn.attention import SDPBackend, sdpa_kernel

    texts = torch.from_numpy(batch.texts).to("cuda")

    def step(model: Any, past: Any) -> Any:
        return model(texts[:, -1:], past_key_values=past, use_cache=True)

    def prefilled(dtype: str) -> tuple[Any, Any, np.ndarray]:
        model = as_transformers(batch.checkpoint, dtype, "cuda")
        past = model(texts[:, :-1], use_cache=True, logits_to_keep=1).past_key_values
        return model, past, step(model, past).logits[:, -1].float().cpu().numpy()

    others = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with torch.inference_mode(), nullcontext() if cudnn else sdpa_kernel(others):
        *_, exact = prefilled("float32")
        model, past, theirs = prefilled(batch.config.dtype)
        times = []
        for _ in range(REPEATS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            step(model, past).logits[:, -1].argmax(-1)
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    return {
        "ms": float(np.median(times[3:])),
        "status": as_close(ours, theirs, exact),
        "how": f"{versions}; sdpa, a cache that grows, eager",
    }


def as_close(ours: np.ndarray, theirs: np.ndarray, exact: np.ndarray) -> str:
    """Return "ok" if our logits, [num_seqs, vocab_size], are about as close to the exact ones as a peer's.

    What rounding does to a sequence's logits is a matter of chance, and some sequences magnify it: in the median over
    sequences ours may be twice as far off as those of a peer of the same precision, in one by an order of magnitude.
    """
    lost, peers = (np.abs(found - exact).max(axis=1) for found in (ours, theirs))
    times = lost / np.maximum(peers, np.finfo(np.float32).tiny)
    typical, most = np.median(times), times.max()
    if typical <= 2 and most <= 10:
        return "ok"
    return f"wrong: logits are {typical:.3g} times as far off as the peer's, in a sequence {most:.3g} times"


def agreement(found: np.ndarray, expected: np.ndarray, storage: np.dtype) -> str:
    """Return "ok" if logits agree within what features lose that are rounded to the storage type, layer by layer.

    A hundred roundings by half a unit of the last place, in either direction, add up to about five units; three times
    that is allowed.
    """
    error, budget = (
        float(np.abs(found - expected).max()),
        15 * float(finfo(storage).eps) * float(np.abs(expected).max()),
    )
    return "ok" if error <= budget else f"wrong: logits are {error:.3g} apart, {budget:.3g} allowed"


def as_transformers(checkpoint: Checkpoint, dtype: str, device: str) -> Any:
    """Return the model as transformers has it, with the same weights, and attention by PyTorch's own kernels.

    Only the parameters are rounded to `dtype`, as `from_pretrained` does: `model.half()` would round the frequencies of
    RoPE as well, and turn far tokens by the wrong angle.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = checkpoint.config
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads, head_dim=config.head_dim,
            num_key_value_heads=config.num_kv_heads, rms_norm_eps=config.norm_eps, rope_theta=config.rope_base,
            max_position_embeddings=config.max_tokens, tie_word_embeddings=True, attn_implementation="sdpa",
        )
    )  # fmt: skip
    names = {
        "attention_norm": "input_layernorm", "query": "self_attn.q_proj", "key": "self_attn.k_proj",
        "value": "self_attn.v_proj", "output": "self_attn.o_proj", "mlp_norm": "post_attention_layernorm",
        "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
    }  # fmt: skip
    state = {"model.embed_tokens.weight": checkpoint.embedding, "model.norm.weight": checkpoint.final_norm}
    for i, layer in enumerate(checkpoint.layers):
        for field in fields(LayerWeights):
            state[f"model.layers.{i}.{names[field.name]}.weight"] = getattr(layer, field.name)
    answer = model.load_state_dict({name: torch.tensor(array) for name, array in state.items()}, strict=False)
    assert not answer.unexpected_keys and set(answer.missing_keys) <= {"lm_head.weight"}
    model.tie_weights()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(getattr(torch, dtype))
    return model.to(device).eval()


# --- reporting ----------------------------------------------------------------------------------------------------


def conclusion(rows: list[Row]) -> str:
    """Return what was found, in a sentence."""
    took = {row["way"]: row["ms"] for row in rows if "ms" in row}
    if "one graph" not in took:
        return "Found: every way chooses the same tokens." if rows[0]["status"] == "ok" else "Found: the ways differ."
    text = f"Found: a step takes {took['one graph']:.2f} ms as a graph"
    if "attention alone, one graph" in took:
        text += f", of which attention is {took['attention alone, one graph'] / took['one graph']:.0%}"
    for way in ("launched one by one", TRANSFORMERS, WITHOUT_CUDNN):
        if way in took:
            text += f"; {way}: {took[way] / took['one graph']:.1f} times as long"
    return text + "."


def draw(rows: list[Row], stamp: dict[str, str], path: Path) -> None:
    """Plot the time of each way."""
    figure, axis = new_figure()
    timed = [row for row in rows if "ms" in row]
    bars = axis.barh([row["way"] for row in timed], [row["ms"] for row in timed])
    axis.bar_label(bars, fmt=" %.2f", fontsize=9)
    axis.invert_yaxis()
    axis.set(xlabel="ms a step")
    figure.suptitle(f"A step of decoding, {stamp['device']}")
    save_figure(figure, path)


EXPERIMENT = ModelStep()

if __name__ == "__main__":
    run_script(EXPERIMENT)
