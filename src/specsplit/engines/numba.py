"""Llama-type models on the CPU without PyTorch: weights laid out for `kernels.run_pass`, caches, a team of threads."""

from __future__ import annotations

import ctypes
import mmap
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from torch import nn

from specsplit.decoding.tree import ROOT, TokenTree
from specsplit.engines.numba_kernels import run_pass
from specsplit.engines.passes import EMPTY, Pass
from specsplit.engines.quantise import Int8Linear
from specsplit.engines.reduced_vocabulary import ReducedEmbedding
from specsplit.engines.token_cache import Slots, tokens_of_pass
from specsplit.engines.transformers import CausalLM

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
ROTARY = ("default", "linear", "llama3", "yarn")  # position embeddings that do not depend on the length of the text
CHUNK = 64  # tokens of a run: more would push each other out of the processor's caches
NOTHING = np.zeros(0, np.float32)
Job = Callable[[int, int, np.ndarray], None]


class FusedCache(Slots):
    """Keys and values of one session, float32 [layers, kv_heads, capacity, head_dim].

    The memory is reserved at once; the operating system commits it page by page as it is written.
    """

    def __init__(self, layers: int, kv_heads: int, head_dim: int, capacity: int) -> None:
        self.length = 0
        self.capacity = capacity
        self.keys = np.empty((layers, kv_heads, capacity, head_dim), np.float32)
        self.values = np.empty_like(self.keys)

    def keep(self, context: int, path: Sequence[int]) -> None:
        """As KVCache.keep."""
        self.check_keep(context, path)
        end = context + len(path)
        if path and path[-1] != len(path) - 1:
            self.length = context  # as long as the path is being moved, it cannot be relied on
            slots = [context + node for node in path]
            for states in (self.keys, self.values):
                states[:, :, context:end] = states[:, :, slots]  # the right side is a copy
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

    def visible(self) -> Iterator[np.ndarray]:
        """For every token the slots that it attends to, in the order of the text, itself last."""
        linear, tree = len(self.of.tokens), self.of.tree
        context = self.of.cache.length - self.of.cached_nodes + linear
        for i in range(self.start, min(self.stop, linear)):
            yield np.arange(context - linear + i + 1)
        before = np.arange(context)
        for i in range(max(self.start, linear), self.stop):
            path, node = [], i - linear + self.of.cached_nodes
            while node != ROOT:
                path.append(context + node)
                node = tree.parents[node]
            yield np.concatenate([before, path[::-1]])


class FusedLM:
    """A Llama-type model on the CPU, with the methods of CausalLM. May be called from any thread, one at a time.

    Logits of a token are bit for bit the same whatever else is in the pass.
    source: taken apart, as its weights move here. threads: that run a pass, the calling one included.
    Raises ValueError where `unsuitable` has a reason.
    """

    batch_tokens = CHUNK
    uses_torch_threads = False

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
        _leave_the_file(source.model)
        self._weights = _stack(source.model)
        embedding = source.model.get_input_embeddings()
        self._embedding = _bits(embedding.weight)
        self._row_of = embedding.rows.numpy() if isinstance(embedding, ReducedEmbedding) else None
        self._team = Team(threads)
        self._workspace = Workspace(self._weights, threads, 0, 0)

    def cache_bytes(self, capacity: int) -> int:
        return 8 * self.num_layers * self._kv_heads * self._head_dim * capacity  # keys and values in float32

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
        addresses: list[tuple[int, int, int]] = []
        for part in parts:
            wanted += range(len(ids) + part.first_wanted - part.start, len(ids) + part.stop - part.start)
            ids += part.fed[part.start : part.stop]
            cache = part.of.cache
            own += range(cache.length + part.start, cache.length + part.stop)
            visible += part.visible()
            addresses += [(cache.keys.ctypes.data, cache.values.ctypes.data, cache.capacity)] * (part.stop - part.start)
        lengths = np.array([len(seen) for seen in visible], np.int64)
        space = self._workspace = self._workspace.fitting(len(ids), int(lengths.max()))
        arrays = space.first(len(ids))
        arrays[0][:] = _floats(self._embedding[ids if self._row_of is None else self._row_of[ids]])
        logits = np.empty((len(wanted), self.vocab_size), np.float32)
        keys, values, capacity = np.array(addresses, np.int64).T.copy()
        arguments = (
            *self._weights,
            *(self._cos, self._sin, self._windows, NOTHING, self._eps, self._kv_heads, self._head_dim),
            *(lengths - 1, keys, values, capacity, np.array(own, np.int64), np.concatenate(visible)),
            *(np.concatenate([[0], lengths.cumsum()]), np.array(wanted, np.int64)),
        )

        def work(thread: int, threads: int, sync: np.ndarray) -> None:
            x, h, *shared, scores = arrays
            run_pass(thread, threads, sync, *arguments, x, h[thread], *shared, scores[thread], logits)

        self._team.run(work)
        return logits


class Team:
    """Threads that do a job together, the calling one among them. To be used from one thread at a time."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._sync = np.zeros(16, np.int64)
        self._jobs: list[SimpleQueue[Job]] = [SimpleQueue() for _ in range(threads - 1)]
        for number, jobs in enumerate(self._jobs, 1):
            threading.Thread(target=self._work, args=(number, jobs), name=f"pass-{number}", daemon=True).start()

    def run(self, job: Job) -> None:
        """Call job(number, threads, sync) in every thread. The last thing that a job does is to meet the others."""
        for jobs in self._jobs:
            jobs.put(job)
        job(0, self.threads, self._sync)

    def _work(self, number: int, jobs: SimpleQueue[Job]) -> None:
        while True:
            jobs.get()(number, self.threads, self._sync)


class Workspace:
    """Arrays that the kernel works in, as large as was ever needed.

    threads: how many have arrays of their own. tokens, visible: the most of a run, and that a token of it attends to.
    """

    def __init__(self, weights: Sequence[np.ndarray], threads: int, tokens: int, visible: int) -> None:
        self._weights, self._threads, self._tokens, self._visible = weights, threads, tokens, visible
        qkv, output, gate_up, down = weights[0], weights[3], weights[5], weights[7]
        hidden = qkv.shape[2]
        sizes = qkv.shape[1], output.shape[2], gate_up.shape[1], down.shape[2]
        self._x, *self._shared = (np.empty((tokens, size), np.float32) for size in (hidden, *sizes))
        self._h = np.empty((threads, tokens, hidden), np.float32)
        self._scores = np.empty((threads, visible), np.float32)

    def fitting(self, tokens: int, visible: int) -> Workspace:
        """This one, or a larger one."""
        if tokens <= self._tokens and visible <= self._visible:
            return self
        visible = -(-max(visible, self._visible) // 1024) * 1024  # not a new one for every token
        return Workspace(self._weights, self._threads, max(tokens, self._tokens), visible)

    def first(self, tokens: int) -> list[np.ndarray]:
        """For so many tokens: x, h of every thread, what `run_pass` wants between, scores of every thread."""
        return [self._x[:tokens], self._h[:, :tokens], *(array[:tokens] for array in self._shared), self._scores]


def unsuitable(model: CausalLM) -> str | None:
    """Why a model cannot be run by this engine; None when it can."""
    hf, config = model.model, model.model.config.get_text_config()
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
    layers = [type(module) for module in hf.model.layers.modules() if isinstance(module, nn.Linear | Int8Linear)]
    if len(set(layers)) > 1:
        return "some of its linear layers are quantised, others not"
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


# ---- weights


def _leave_the_file(hf: Any) -> None:
    """Copy the embedding and the output head, which are not stacked, in place.

    Weights are read by mapping their file to memory, all of which stays there as long as one of them does.
    """
    embedding, head = hf.get_input_embeddings(), hf.get_output_embeddings()
    tied = head.weight is embedding.weight
    for module in (embedding,) if tied else (embedding, head):
        before, module.weight = module.weight, nn.Parameter(module.weight.detach().clone(), requires_grad=False)
        _give_back(before)
    if tied:
        head.weight = embedding.weight


def _give_back(copied: torch.Tensor) -> None:
    """Give back the memory of a weight that nobody reads any more: a mapped file's would stay until the last goes."""
    if sys.platform == "linux" and copied.is_contiguous():
        page, start, size = mmap.PAGESIZE, copied.data_ptr(), copied.nbytes
        first, end = -(-start // page) * page, (start + size) // page * page  # whole pages of it alone
        if end > first:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), mmap.MADV_DONTNEED)


def _stack(hf: Any) -> tuple[np.ndarray, ...]:
    """The weights in the order of run_pass, stacked over the layers. Those of the layers are taken out of `hf`."""
    layers = hf.model.layers
    attention, mlp = [layer.self_attn for layer in layers], [layer.mlp for layer in layers]
    qkv, qkv_scale = _stack_linears([[a.q_proj, a.k_proj, a.v_proj] for a in attention])
    biases = [
        torch.cat([m.bias for m in (a.q_proj, a.k_proj, a.v_proj)]) for a in attention if a.q_proj.bias is not None
    ]
    output, output_scale = _stack_linears([[a.o_proj] for a in attention])
    gate_up, gate_up_scale = _stack_linears([[m.gate_proj, m.up_proj] for m in mlp])
    down, down_scale = _stack_linears([[m.down_proj] for m in mlp])
    head = hf.get_output_embeddings()
    head_scale = _floats(_bits(head.scale)) if isinstance(head, Int8Linear) else NOTHING
    norms = [
        [layer.input_layernorm.weight for layer in layers],
        [layer.post_attention_layernorm.weight for layer in layers],
    ]
    head_norms = [[getattr(a, name).weight for a in attention if hasattr(a, name)] for name in ("q_norm", "k_norm")]
    return (
        *(qkv, qkv_scale, _stack_floats(biases, len(layers)), output, output_scale),
        *(gate_up, gate_up_scale, down, down_scale, _bits(head.weight), head_scale),
        *(_stack_floats(each, len(layers)) for each in norms),
        _floats(_bits(hf.model.norm.weight)),
        *(_stack_floats(each, len(layers)) for each in head_norms),
    )


def _stack_linears(modules: Sequence[Sequence[Any]]) -> tuple[np.ndarray, np.ndarray]:
    """[layers, rows of all modules of a layer, inputs] and, for int8, [layers, rows], else [layers, 0]."""
    rows = sum(len(module.weight) for module in modules[0])
    example = _bits(modules[0][0].weight)
    stacked = np.empty((len(modules), rows, example.shape[1]), example.dtype)
    scales = np.zeros((len(modules), rows if example.dtype == np.int8 else 0), np.float32)
    for i, layer in enumerate(modules):
        at = 0
        for module in layer:
            count = len(module.weight)
            stacked[i, at : at + count] = _bits(module.weight)
            if scales.size:
                scales[i, at : at + count] = _floats(_bits(module.scale))
            _give_back(module.weight)
            module.weight = nn.Parameter(module.weight.new_empty(0), requires_grad=False)
            at += count
    return stacked, scales


def _stack_floats(tensors: Sequence[torch.Tensor], layers: int) -> np.ndarray:
    """[layers, size], float32; [layers, 0] when there are none."""
    if not tensors:
        return np.zeros((layers, 0), np.float32)
    return torch.stack(list(tensors)).detach().float().numpy()


def _bits(tensor: torch.Tensor) -> np.ndarray:
    """The memory of a tensor: float32 and int8 as they are, bfloat16 as uint16."""
    tensor = tensor.detach().contiguous()
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def _floats(bits: np.ndarray) -> np.ndarray:
    """float32 of what `_bits` gave."""
    return (bits.astype(np.uint32) << 16).view(np.float32) if bits.dtype == np.uint16 else bits.astype(np.float32)
