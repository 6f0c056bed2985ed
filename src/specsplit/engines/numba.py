"""Llama-type models on the CPU without PyTorch: tables for `run_pass`, caches, a team of threads."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from specsplit.decoding.tree import ROOT, TokenTree
from specsplit.engines.architectures import not_llama_layer, not_llama_type
from specsplit.engines.linears import Linears, embedding_rows, tied
from specsplit.engines.numba_kernels import LANES, run_pass
from specsplit.engines.numba_team import Sizes, Team, Workspace, vectors
from specsplit.engines.passes import EMPTY, Pass, all_or_none
from specsplit.engines.reduced_vocabulary import ReducedEmbedding
from specsplit.engines.state_slots import StateSlots
from specsplit.engines.token_cache import tokens_of_pass
from specsplit.engines.transformers import CausalLM
from specsplit.engines.vector_kernels import FEATURES, QUERIES, accumulation, activation, packing, processor_lacks

CHUNK = 64  # tokens of a run: more would push each other out of the processor's caches


class FusedCache(StateSlots):
    """Keys and values of one session, float32: keys [layers, kv_heads, capacity / 8, head_dim, 8], so that a vector is
    of eight slots; values [layers, kv_heads, capacity, head_dim rounded up to a multiple of 8].

    The memory is reserved at once; the operating system commits it page by page as it is written.
    """

    states_like = torch.empty(0)

    def __init__(self, layers: int, kv_heads: int, head_dim: int, capacity: int, hidden_size: int) -> None:
        self.length = 0
        self.capacity, self.hidden_size = capacity, hidden_size
        self.slots = vectors(capacity) * LANES
        self.keys = np.empty((layers, kv_heads, self.slots // LANES, head_dim, LANES), np.float32)
        self.values = np.empty((layers, kv_heads, self.slots, vectors(head_dim) * LANES), np.float32)

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
            self.move_states(context, path)
        self.length = end

    def nbytes(self) -> int:
        """Bytes reserved by this cache."""
        return self.keys.nbytes + self.values.nbytes + self.state_bytes()


@dataclass(frozen=True)
class Part:
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


class FusedPasses:
    """What runs passes of a Llama-type model, or of a part of one, on the CPU. May be called from any thread, one at a
    time. Logits of a token are bit for bit the same whatever else is in the pass."""

    batch_tokens = prefill_tokens = CHUNK
    uses_torch_threads = False
    vocab_size: int

    def __init__(
        self,
        config: Any,
        layers: Sequence[Any],
        head: Any,
        final_norm: Any,
        rotary: Any,
        threads: int,
        *,
        joined: int = 0,
    ) -> None:
        """config: of a Llama-type model. layers, head, final_norm: its modules, which are taken apart, as their weights
        move here. rotary: its position embedding. joined: as Sizes.joined."""
        self.device = torch.device("cpu")
        self.num_layers = len(layers)
        self._kv_heads: int = config.num_key_value_heads
        self._head_dim: int = layers[0].self_attn.head_dim
        self._rotary = rotary
        self._cos = self._sin = np.zeros((0, self._head_dim // 2), np.float32)
        self._windows = np.zeros(self.num_layers, np.int64)
        self._eps: float = config.rms_norm_eps
        norms = _norms(layers, final_norm)
        self._linears = Linears(layers, head)
        self._model = (self._linears.layers, self._linears.head, *norms)
        self._state_norm = self._output_norm = np.zeros(0, np.float32)
        self._norm_before_residual = False
        self._functions = (packing().address, activation().address, accumulation().address)
        self._team = Team(threads)
        self._sizes = Sizes(
            config.hidden_size,
            config.num_attention_heads,
            self._kv_heads,
            self._head_dim,
            config.intermediate_size,
            joined,
        )
        self._workspace = Workspace(self._sizes, threads, 0, LANES)

    @property
    def weight_bytes(self) -> int:
        """Memory of the weights that a pass reads."""
        return self._linears.nbytes

    def cache_bytes(self, capacity: int, taps: int = 0) -> int:
        """As CausalLM.cache_bytes."""
        dims = self._head_dim + vectors(self._head_dim) * LANES  # of keys and values, in float32
        keys_and_values = self.num_layers * self._kv_heads * dims * vectors(capacity) * LANES
        return 4 * (keys_and_values + taps * self._sizes.hidden * capacity)

    def new_cache(self, capacity: int) -> FusedCache:
        """An empty cache for one sequence of at most `capacity` tokens, tree nodes included."""
        if capacity > len(self._cos):
            with torch.inference_mode():
                tables = self._rotary(torch.zeros(1), torch.arange(capacity)[None])
            half = self._head_dim // 2
            self._cos, self._sin = (table[0, :, :half].float().contiguous().numpy() for table in tables)
        return FusedCache(self.num_layers, self._kv_heads, self._head_dim, capacity, self._sizes.hidden)

    def step_many(self, passes: Sequence[Pass]) -> list[torch.Tensor]:
        """The passes of several sessions, each of another one, made as one; the logits of each."""
        fed = [tokens_of_pass(p.cache, p.tokens, p.tree, p.cached_nodes) for p in passes]
        rows: list[list[np.ndarray]] = [[] for _ in passes]
        with all_or_none(p.cache for p in passes):
            for parts in self._chunks(passes, fed):
                logits, at = self._run(list(parts.values())), 0
                for i, part in parts.items():
                    count = part.stop - part.first_wanted
                    rows[i].append(logits[at : at + count])
                    at += count
            for p, ids in zip(passes, fed, strict=True):
                p.cache.advance(len(ids))
        return [torch.from_numpy(np.concatenate(each) if len(each) > 1 else each[0]) for each in rows]

    def _run(self, parts: Sequence[Part]) -> np.ndarray:
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
        self._fill(space, ids, parts)
        logits = np.empty((len(wanted), self.vocab_size), np.float32)
        keys, values, capacity = np.array(addresses, np.int64).T.copy()
        arguments = (
            *self._model,
            *(self._cos, self._sin, self._windows, self._eps, self._kv_heads, self._head_dim),
            *(self._state_norm, self._output_norm, self._norm_before_residual, *self._functions),
            *(count, lengths - 1, keys, values, capacity, np.array(own, np.int64), np.concatenate(visible)),
            *(np.concatenate([[0], lengths.cumsum()]), np.array(runs), np.array(tiles), np.array(wanted, np.int64)),
            self._kept(parts, count),
        )

        def work(thread: int, threads: int, sync: np.ndarray) -> None:
            run_pass(thread, threads, sync, *arguments, *space.of(thread, count), logits)

        self._team.run(work)
        return logits

    def _fill(self, space: Workspace, ids: Sequence[int], parts: Sequence[Part]) -> None:
        """Put the inputs of the tokens of a run into the work space."""
        raise NotImplementedError

    def _reach(self, work: Pass, start: int) -> int:
        """Up to which of its tokens a pass can be run, when those before `start` have been."""
        return work.size

    def _chunks(self, passes: Sequence[Pass], fed: Sequence[Sequence[int]]) -> Iterator[dict[int, Part]]:
        """What is run together: at most CHUNK tokens at a time, the first passes first; by number of the pass."""
        starts = [0] * len(passes)
        while any(start < len(ids) for start, ids in zip(starts, fed, strict=True)):
            parts: dict[int, Part] = {}
            room = CHUNK
            for i, p in enumerate(passes):
                if starts[i] < len(fed[i]) and room:
                    stop = min(self._reach(p, starts[i]), starts[i] + room)
                    parts[i] = Part(p, fed[i], starts[i], stop)
                    room -= stop - starts[i]
                    starts[i] = stop
            yield parts

    def _kept(self, parts: Sequence[Part], count: int) -> np.ndarray:
        """Where the caches keep hidden states of the tokens of a run, as `run_pass` has it."""
        most = max(max((part.of.cache.taps.count(tap) for tap in part.of.cache.taps), default=0) for part in parts)
        kept = np.zeros((most, self.num_layers + 1, count) if most else (0, 0, 0), np.int64)
        at = 0
        for part in parts:
            cache, end = part.of.cache, at + part.stop - part.start
            if cache.states is not None:
                width = 4 * cache.states.shape[1]
                rows = cache.states.data_ptr() + width * np.arange(cache.length + part.start, cache.length + part.stop)
                for place, tap in enumerate(cache.taps):
                    kept[cache.taps[:place].count(tap), tap, at:end] = rows + 4 * self._sizes.hidden * place
            at = end
        return kept


class FusedLM(FusedPasses):
    """A Llama-type model on the CPU, with the methods of CausalLM.

    source: taken apart, as its weights move here. threads: that run a pass, the calling one included.
    Raises ValueError where `unsuitable` has a reason.
    """

    taps = True

    def __init__(self, source: CausalLM, threads: int) -> None:
        if reason := unsuitable(source):
            raise ValueError(reason)
        hf, is_tied, embedding = source.model, tied(source.model), source.model.get_input_embeddings()
        config, rotary = hf.config.get_text_config(), hf.model.rotary_emb
        self.vocab_size, self.hidden_size = source.vocab_size, source.hidden_size
        self.max_context = source.max_context
        self.eos_token_ids = source.eos_token_ids
        self.parameters = source.parameters
        super().__init__(config, hf.model.layers, hf.get_output_embeddings(), hf.model.norm, rotary, threads)
        self._windows = np.array(source.windows(), np.int64)
        self._rows = embedding_rows(embedding, self._linears.head_rows if is_tied else None)
        self._row_of = embedding.rows.numpy() if isinstance(embedding, ReducedEmbedding) else None

    def step(
        self, cache: FusedCache, tokens: Sequence[int], tree: TokenTree = EMPTY, cached_nodes: int = 0
    ) -> torch.Tensor:
        """One pass, as CausalLM.step. Returns logits [rows, vocab_size], float32."""
        return self.step_many([Pass(cache, tokens, tree, cached_nodes)])[0]

    def _fill(self, space: Workspace, ids: Sequence[int], parts: Sequence[Part]) -> None:
        space.x[: len(ids)] = self._rows(ids if self._row_of is None else self._row_of[ids])


def unsuitable(model: CausalLM) -> str | None:
    """Why a model cannot be run by this engine; None when it can."""
    return _unsuitable_here(model.device, model.dtype) or not_llama_type(model.model)


def unsuitable_layer(layer: Any, config: Any, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a model with such layers cannot be run by this engine; None when it can."""
    return _unsuitable_here(device, dtype) or not_llama_layer(layer, config)


def _unsuitable_here(device: torch.device, dtype: torch.dtype) -> str | None:
    if reason := processor_lacks(platform.machine(), FEATURES):
        return reason
    if device.type != "cpu":
        return f"it is on {device}"
    return None if dtype in (torch.float32, torch.bfloat16) else f"its type is {dtype}"


def _norms(layers: Sequence[Any], final_norm: Any) -> tuple[np.ndarray, ...]:
    """Weights of the norms in the order of run_pass, float32: of attention and MLP [layers, hidden], the last [hidden],
    of queries and keys [layers, head_dim], or [layers, 0] when there are none."""
    attention = [layer.self_attn for layer in layers]
    norms = [
        [layer.input_layernorm.weight for layer in layers],
        [layer.post_attention_layernorm.weight for layer in layers],
    ]
    head_norms = [[getattr(a, name).weight for a in attention if hasattr(a, name)] for name in ("q_norm", "k_norm")]
    return (
        *(_stack_floats(each, len(layers)) for each in norms),
        final_norm.weight.detach().float().numpy().copy(),
        *(_stack_floats(each, len(layers)) for each in head_norms),
    )


def _stack_floats(tensors: Sequence[torch.Tensor], layers: int) -> np.ndarray:
    """[layers, size], float32; [layers, 0] when there are none."""
    if not tensors:
        return np.zeros((layers, 0), np.float32)
    return torch.stack(list(tensors)).detach().float().numpy()
