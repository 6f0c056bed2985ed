"""Llama-type models on the CPU without PyTorch: tables for `run_pass`, caches, a team of threads."""

from __future__ import annotations

import platform
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch

from specsplit.decoding.tree import ROOT, TokenTree
from specsplit.engines.linears import Linears, embedding_rows, padded, tied
from specsplit.engines.numba_kernels import ARRIVED, FAILED, LANES, NANOSECONDS, SLEEPING, run_pass
from specsplit.engines.passes import EMPTY, Pass, all_or_none
from specsplit.engines.reduced_vocabulary import ReducedEmbedding
from specsplit.engines.token_cache import Slots, tokens_of_pass
from specsplit.engines.transformers import CausalLM
from specsplit.engines.vector_kernels import FEATURES, QUERIES, accumulation, activation, packing, processor_lacks

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
ROTARY = ("default", "linear", "llama3", "yarn")  # position embeddings that do not depend on the length of the text
LONGEST_SLEEP_NS = 20_000_000  # at a meeting, before a thread looks whether another one failed
CHUNK = 64  # tokens of a run: more would push each other out of the processor's caches
Job = Callable[[int, int, np.ndarray], None]


class FusedCache(Slots):
    """Keys and values of one session, float32: keys [layers, kv_heads, capacity / 8, head_dim, 8], so that a vector is
    of eight slots; values [layers, kv_heads, capacity, head_dim rounded up to a multiple of 8].

    The memory is reserved at once; the operating system commits it page by page as it is written.
    """

    def __init__(self, layers: int, kv_heads: int, head_dim: int, capacity: int) -> None:
        self.length = 0
        self.capacity = capacity
        self.slots = _vectors(capacity) * LANES
        self.keys = np.empty((layers, kv_heads, self.slots // LANES, head_dim, LANES), np.float32)
        self.values = np.empty((layers, kv_heads, self.slots, _vectors(head_dim) * LANES), np.float32)

    def keep(self, context: int, path: Sequence[int]) -> None:
        """As KVCache.keep."""
        self.check_keep(context, path)
        end = context + len(path)
        if path and path[-1] != len(path) - 1:
            self.length = context  # as long as the path is being moved, it cannot be relied on
            slots, places = context + np.array(path), np.arange(context, end)
            # The right sides are copies.
            self.keys[:, :, places // LANES, :, places % LANES] = self.keys[:, :, slots // LANES, :, slots % LANES]
            self.values[:, :, context:end] = self.values[:, :, slots]
        self.length = end

    def nbytes(self) -> int:
        """Bytes reserved by this cache."""
        return self.keys.nbytes + self.values.nbytes


@dataclass(frozen=True)
class _Part:
    """Tokens of a pass that are run together with those of others: fed[start:stop]."""

    of: Pass
    fed: Sequence[int]
    start: int
    stop: int

    @property
    def first_wanted(self) -> int:
        return min(max(self.start, self.of.first_wanted), self.stop)

    def visible(self) -> Iterator[tuple[np.ndarray, int]]:
        """For every token the slots that it attends to, in the order of the text, itself last; and how many of them,
        from the first on, are adjacent."""
        linear, tree = len(self.of.tokens), self.of.tree
        context = self.of.cache.length - self.of.cached_nodes + linear
        for i in range(self.start, min(self.stop, linear)):
            yield np.arange(context - linear + i + 1), context - linear + i + 1
        before = np.arange(context)
        for i in range(max(self.start, linear), self.stop):
            path, node = [], i - linear + self.of.cached_nodes
            while node != ROOT:
                path.append(context + node)
                node = tree.parents[node]
            yield np.concatenate([before, path[::-1]]), context


class FusedLM:
    """A Llama-type model on the CPU, with the methods of CausalLM. May be called from any thread, one at a time.

    Logits of a token are bit for bit the same whatever else is in the pass.
    source: taken apart, as its weights move here. threads: that run a pass, the calling one included.
    Raises ValueError where `unsuitable` has a reason.
    """

    batch_tokens = prefill_tokens = CHUNK
    uses_torch_threads = False
    taps = False

    def __init__(self, source: CausalLM, threads: int) -> None:
        if reason := unsuitable(source):
            raise ValueError(reason)
        config = source.model.config.get_text_config()
        self.device = torch.device("cpu")
        self.vocab_size = source.vocab_size
        self.max_context = source.max_context
        self.eos_token_ids = source.eos_token_ids
        self.num_layers = source.num_layers
        self.parameters = source.parameters
        self._kv_heads: int = config.num_key_value_heads
        self._head_dim: int = source.model.model.layers[0].self_attn.head_dim
        self._eps: float = config.rms_norm_eps
        self._rotary = source.model.model.rotary_emb
        self._cos = self._sin = np.zeros((0, self._head_dim // 2), np.float32)
        self._windows = np.array(source.windows(), np.int64)
        norms, is_tied = _norms(source.model), tied(source.model)
        self._linears = Linears(source.model)
        embedding = source.model.get_input_embeddings()
        self._rows = embedding_rows(embedding, self._linears.head_rows if is_tied else None)
        self._row_of = embedding.rows.numpy() if isinstance(embedding, ReducedEmbedding) else None
        self._model = (self._linears.layers, self._linears.head, *norms)
        self._functions = (packing().address, activation().address, accumulation().address)
        self._team = Team(threads)
        self._sizes = _Sizes(
            config.hidden_size, config.num_attention_heads, self._kv_heads, self._head_dim, config.intermediate_size
        )
        self._workspace = Workspace(self._sizes, threads, 0, LANES)

    @property
    def weight_bytes(self) -> int:
        """Memory of the weights that a pass reads."""
        return self._linears.nbytes

    def cache_bytes(self, capacity: int, taps: int = 0) -> int:
        dims = self._head_dim + _vectors(self._head_dim) * LANES  # of keys and values, in float32
        return 4 * self.num_layers * self._kv_heads * dims * _vectors(capacity) * LANES

    def new_cache(self, capacity: int) -> FusedCache:
        """An empty cache for one sequence of at most `capacity` tokens, tree nodes included."""
        if capacity > len(self._cos):
            with torch.inference_mode():
                tables = self._rotary(torch.zeros(1), torch.arange(capacity)[None])
            half = self._head_dim // 2
            self._cos, self._sin = (table[0, :, :half].float().contiguous().numpy() for table in tables)
        return FusedCache(self.num_layers, self._kv_heads, self._head_dim, capacity)

    def step(
        self, cache: FusedCache, tokens: Sequence[int], tree: TokenTree = EMPTY, cached_nodes: int = 0
    ) -> torch.Tensor:
        """One pass, as CausalLM.step. Returns logits [rows, vocab_size], float32."""
        return self.step_many([Pass(cache, tokens, tree, cached_nodes)])[0]

    def step_many(self, passes: Sequence[Pass]) -> list[torch.Tensor]:
        """The passes of several sessions, each of another one, made as one; the logits of each."""
        fed = [tokens_of_pass(p.cache, p.tokens, p.tree, p.cached_nodes) for p in passes]
        rows: list[list[np.ndarray]] = [[] for _ in passes]
        with all_or_none(p.cache for p in passes):
            for parts in _chunks(passes, fed):
                logits, at = self._run(list(parts.values())), 0
                for i, part in parts.items():
                    count = part.stop - part.first_wanted
                    rows[i].append(logits[at : at + count])
                    at += count
            for p, ids in zip(passes, fed, strict=True):
                p.cache.advance(len(ids))
        return [torch.from_numpy(np.concatenate(each) if len(each) > 1 else each[0]) for each in rows]

    def _run(self, parts: Sequence[_Part]) -> np.ndarray:
        """One run of the kernel; the logits of the tokens that are wanted, in order."""
        ids: list[int] = []
        own: list[int] = []  # slots that the tokens go to
        wanted: list[int] = []
        visible: list[np.ndarray] = []
        runs: list[int] = []
        tiles: list[tuple[int, int, int]] = []
        sizes = self._sizes
        group = sizes.heads // sizes.kv_heads
        total = sizes.heads * sum(part.stop - part.start for part in parts)
        together = max(1, min(QUERIES, total // (4 * self._team.threads)))  # so that all threads have some
        addresses: list[tuple[int, int, int]] = []
        for part in parts:
            wanted += range(len(ids) + part.first_wanted - part.start, len(ids) + part.stop - part.start)
            queries = (part.stop - part.start) * group
            tiles += [(len(ids), at, min(together, queries - at)) for at in range(0, queries, together)]
            ids += part.fed[part.start : part.stop]
            cache = part.of.cache
            own += range(cache.length + part.start, cache.length + part.stop)
            for slots, run in part.visible():
                visible.append(slots)
                runs.append(run)
            addresses += [(cache.keys.ctypes.data, cache.values.ctypes.data, cache.slots)] * (part.stop - part.start)
        count = len(ids)
        lengths = np.array([len(seen) for seen in visible], np.int64)
        space = self._workspace = self._workspace.fitting(count, max(own) + 1)
        space.x[:count] = self._rows(ids if self._row_of is None else self._row_of[ids])
        logits = np.empty((len(wanted), self.vocab_size), np.float32)
        keys, values, capacity = np.array(addresses, np.int64).T.copy()
        arguments = (
            *self._model,
            *(self._cos, self._sin, self._windows, self._eps, self._kv_heads, self._head_dim, *self._functions),
            *(count, lengths - 1, keys, values, capacity, np.array(own, np.int64), np.concatenate(visible)),
            *(np.concatenate([[0], lengths.cumsum()]), np.array(runs), np.array(tiles), np.array(wanted, np.int64)),
        )

        def work(thread: int, threads: int, sync: np.ndarray) -> None:
            run_pass(thread, threads, sync, *arguments, *space.of(thread, count), logits)

        self._team.run(work)
        return logits


class Team:
    """Threads that do a job together, the calling one among them. To be used from one thread at a time.

    A job that raises in one thread ends in all: nobody waits for it any more at a meeting, and `run` raises its error.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._sync = np.zeros(16, np.int64)
        self._sync[NANOSECONDS] = LONGEST_SLEEP_NS
        self._errors: list[BaseException] = []
        self._jobs: list[SimpleQueue[Job]] = [SimpleQueue() for _ in range(threads - 1)]
        for number, jobs in enumerate(self._jobs, 1):
            threading.Thread(target=self._work, args=(number, jobs), name=f"pass-{number}", daemon=True).start()

    def run(self, job: Job) -> None:
        """Call job(number, threads, sync) in every thread. The last thing that a job does is to meet the others."""
        for jobs in self._jobs:
            jobs.put(job)
        self._do(job, 0)
        if self._errors:
            ended: SimpleQueue[None] = SimpleQueue()
            for jobs in self._jobs:
                jobs.put(lambda *_: ended.put(None))
            for _ in self._jobs:
                ended.get()
            errors, self._errors = self._errors, []
            self._sync[[ARRIVED, SLEEPING, FAILED]] = 0
            raise errors[0]

    def _do(self, job: Job, number: int) -> None:
        try:
            job(number, self.threads, self._sync)
        except BaseException as error:
            self._errors.append(error)
            self._sync[FAILED] = 1

    def _work(self, number: int, jobs: SimpleQueue[Job]) -> None:
        while True:
            self._do(jobs.get(), number)


@dataclass(frozen=True)
class _Sizes:
    """Of a model. hidden: numbers of a token between layers; inner: in the middle of the MLP."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int


class Workspace:
    """Arrays that the kernel works in, as large as was ever needed. Zero at first, as padding is read."""

    def __init__(self, sizes: _Sizes, threads: int, tokens: int, visible: int) -> None:
        self._sizes, self._threads, self._tokens, self._visible = sizes, threads, tokens, visible
        attended, inner = sizes.heads * sizes.head_dim, padded(sizes.inner)
        self._inputs = max(padded(sizes.hidden), padded(attended))
        self._inner = inner
        self.x = np.zeros((tokens, sizes.hidden), np.float32)
        self._packed = np.zeros((threads, tokens * self._inputs), np.float32)
        self._row = np.zeros((threads, sizes.hidden), np.float32)
        self._projected = np.zeros((tokens, attended + 2 * sizes.kv_heads * sizes.head_dim), np.float32)
        self._attended = np.zeros((tokens, attended), np.float32)
        self._gate, self._up = np.zeros((2, tokens, inner), np.float32)
        self._gated = np.zeros(tokens * inner, np.float32)
        self._queries = np.zeros((threads, QUERIES, sizes.head_dim), np.float32)
        self._scores = np.zeros((threads, QUERIES, visible), np.float32)
        self._out = np.zeros((threads, QUERIES, _vectors(sizes.head_dim) * LANES), np.float32)

    def fitting(self, tokens: int, visible: int) -> Workspace:
        """This one, or a larger one."""
        if tokens <= self._tokens and visible <= self._visible - LANES:
            return self
        # Not a new one for every token, nor rows that lie on each other in the processor's caches.
        visible = -(-max(visible, self._visible - LANES) // 1024) * 1024 + LANES
        return Workspace(self._sizes, self._threads, max(tokens, self._tokens), visible)

    def of(self, thread: int, tokens: int) -> tuple[np.ndarray, ...]:
        return (
            self.x[:tokens],
            self._packed[thread, : tokens * self._inputs],
            self._row[thread],
            self._projected[:tokens],
            self._attended[:tokens],
            self._gate[:tokens],
            self._up[:tokens],
            self._gated[: tokens * self._inner],
            self._queries[thread],
            self._scores[thread],
            self._out[thread],
        )


def _vectors(count: int) -> int:
    """Vectors that hold so many numbers."""
    return -(-count // LANES)


def unsuitable(model: CausalLM) -> str | None:
    """Why a model cannot be run by this engine; None when it can."""
    hf, config = model.model, model.model.config.get_text_config()
    if reason := processor_lacks(platform.machine(), FEATURES):
        return reason
    if model.device.type != "cpu":
        return f"it is on {model.device}"
    if model.dtype not in (torch.float32, torch.bfloat16):
        return f"its type is {model.dtype}"
    if type(hf).__name__ not in ARCHITECTURES:
        return f"{type(hf).__name__} is none of {', '.join(ARCHITECTURES)}"
    rotary = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rotary not in ROTARY:
        return f"its position embedding is {rotary}"
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act}"
    attention, mlp = hf.model.layers[0].self_attn, hf.model.layers[0].mlp
    if any(m.bias is not None for m in (attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)):
        return "it has biases outside the inputs of attention"
    return None


def _chunks(passes: Sequence[Pass], fed: Sequence[Sequence[int]]) -> Iterator[dict[int, _Part]]:
    """What is run together: at most CHUNK tokens at a time, the first passes first; by number of the pass."""
    parts: dict[int, _Part] = {}
    room = CHUNK
    for i, p in enumerate(passes):
        start = 0
        while start < len(fed[i]):
            stop = min(len(fed[i]), start + room)
            parts[i] = _Part(p, fed[i], start, stop)
            room -= stop - start
            start = stop
            if not room:
                yield parts
                parts, room = {}, CHUNK
    if parts:
        yield parts


def _norms(hf: Any) -> tuple[np.ndarray, ...]:
    """Weights of the norms in the order of run_pass, float32: of attention and MLP [layers, hidden], the last [hidden],
    of queries and keys [layers, head_dim], or [layers, 0] when there are none."""
    layers = hf.model.layers
    attention = [layer.self_attn for layer in layers]
    norms = [
        [layer.input_layernorm.weight for layer in layers],
        [layer.post_attention_layernorm.weight for layer in layers],
    ]
    head_norms = [[getattr(a, name).weight for a in attention if hasattr(a, name)] for name in ("q_norm", "k_norm")]
    return (
        *(_stack_floats(each, len(layers)) for each in norms),
        hf.model.norm.weight.detach().float().numpy().copy(),
        *(_stack_floats(each, len(layers)) for each in head_norms),
    )


def _stack_floats(tensors: Sequence[torch.Tensor], layers: int) -> np.ndarray:
    """[layers, size], float32; [layers, 0] when there are none."""
    if not tensors:
        return np.zeros((layers, 0), np.float32)
    return torch.stack(list(tensors)).detach().float().numpy()
