"""cupaged: a research toolkit for PagedAttention.

Hand-written CUDA kernels loaded through CuPy, the same files run on the CPU where there is no GPU, and the memory
manager that feeds them.
"""

from cupaged import reference
from cupaged.attention.api import (
    DecodePlan,
    PrefillPlan,
    merge_states,
    paged_attention,
    paged_prefill,
    plan_decode,
    plan_prefill,
)
from cupaged.attention.choose import explain, kernels
from cupaged.config import CacheConfig
from cupaged.engine.attention import PagedAttention, PagedStep
from cupaged.engine.generate import LLM, Completion, StepReport
from cupaged.engine.sequence import SamplingParams
from cupaged.errors import (
    BackendUnavailableError,
    DoubleFreeError,
    ForeignBlockError,
    InvalidLogitsError,
    KernelBuildError,
    KernelLaunchError,
    OutOfBlocksError,
    UnsupportedError,
)
from cupaged.kv_cache import KVCache
from cupaged.memory.manager import BlockManager
from cupaged.ops.blocks import copy_blocks, gather_blocks, scatter_blocks
from cupaged.ops.cache import Llama3Scaling, append_kv, rope_append_kv
from cupaged.ops.sampling import sample
from cupaged.ops.swap import HostBlocks, SwapEngine, swap_blocks
from cupaged.ops.textures import TextureView, bind_textures
from cupaged.runtime import available_backends, kernels_from

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "BackendUnavailableError",
    "BlockManager",
    "CacheConfig",
    "Completion",
    "DecodePlan",
    "DoubleFreeError",
    "ForeignBlockError",
    "HostBlocks",
    "InvalidLogitsError",
    "KVCache",
    "KernelBuildError",
    "KernelLaunchError",
    "Llama3Scaling",
    "OutOfBlocksError",
    "PagedAttention",
    "PagedStep",
    "PrefillPlan",
    "SamplingParams",
    "StepReport",
    "SwapEngine",
    "TextureView",
    "UnsupportedError",
    "append_kv",
    "available_backends",
    "bind_textures",
    "copy_blocks",
    "explain",
    "gather_blocks",
    "kernels",
    "kernels_from",
    "merge_states",
    "paged_attention",
    "paged_prefill",
    "plan_decode",
    "plan_prefill",
    "reference",
    "rope_append_kv",
    "sample",
    "scatter_blocks",
    "swap_blocks",
]
