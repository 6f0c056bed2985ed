"""Llama-type models on the CPU without PyTorch: tables for `run_pass`, caches, a team of threads."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from specsplit.decoding.growth import CANDIDATES
from specsplit.decoding.sampling import Candidates, check_chosen
from specsplit.decoding.verification import follow
from specsplit.engines.architectures import not_llama_layer, not_llama_type
from specsplit.engines.linears import Embedding, Linears, tied
from specsplit.engines.numba_kernels import HEADER, KEPT, LANES, PART_NUMBERS
from specsplit.engines.numba_team import Sizes, Team, Workspace, vectors
from specsplit.engines.passes import MakesTogether, Pass, Propose, Walk, all_or_none
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

    def numbers(self, best: int, among: int, parents: int) -> tuple[int, ...]:
        """Its row of the request, as run_pass has it. parents: where those of its tree are."""
        cache = self.of.cache
        fed = self.start, self.stop, len(self.of.tokens), self.of.cached_nodes, cache.length, self.first_wanted
        return (*fed, best, among, cache.keys.ctypes.data, cache.values.ctypes.data, cache.slots, parents)


class FusedPasses(MakesTogether):
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
        embedding: Any,
        threads: int,
        *,
        is_tied: bool = False,
        joined: int = 0,
    ) -> None:
        """config: of a Llama-type model. layers, head, final_norm, embedding: its modules, which are taken apart, as
        their weights move here. rotary: its position embedding. is_tied: head and embedding have the same weights.
        joined: as Sizes.joined."""
        self.device = torch.device("cpu")
        self.num_layers = len(layers)
        self._kv_heads: int = config.num_key_value_heads
        self._head_dim: int = layers[0].self_attn.head_dim
        self._rotary = rotary
        self._tables = (np.zeros((0, self._head_dim // 2), np.float32),) * 2  # cosines and sines of positions
        self._windows = np.zeros(self.num_layers, np.int64)
        self._eps: float = config.rms_norm_eps
        self._norms = _norms(layers, final_norm)
        self._linears = Linears(layers, head)
        self._embedding = Embedding(embedding, self._linears.head_rows if is_tied else None)
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
            self.num_layers,
            self.vocab_size,
            joined,
        )
        self._workspace = Workspace(self._sizes, threads, 0, LANES, 0)
        self._arguments: tuple[Any, ...] = ()  # of run_pass
        self._made_for: tuple[Any, ...] = (
            None,
            None,
        )  # what changes of them: the work space, and the tables of positions

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
        if capacity > len(self._tables[0]):
            with torch.inference_mode():
                cos, sin = self._rotary(torch.zeros(1), torch.arange(capacity)[None])
            half = self._head_dim // 2
            self._tables = tuple(table[0, :, :half].float().contiguous().numpy() for table in (cos, sin))
        return FusedCache(self.num_layers, self._kv_heads, self._head_dim, capacity, self._sizes.hidden)

    def step_many(self, passes: Sequence[Pass]) -> list[Any]:
        """The passes of several sessions, each of another one, made as one; of each what Pass.then says."""
        rows: list[list[Any]] = [[] for _ in passes]
        with all_or_none(p.cache for p in passes):
            self._feed(passes, rows)
            going, step = list(zip(passes, rows, strict=True)), 0
            while going := [(p, own) for p, own in going if self._goes_on(p, own, step)]:
                step += 1
                following = [Pass(p.cache, [self._best(p, own)], then=p.then) for p, own in going]
                self._feed(following, [own for _, own in going])
            return [self._result(p, each) for p, each in zip(passes, rows, strict=True)]

    def _feed(self, passes: Sequence[Pass], rows: Sequence[list[Any]]) -> None:
        """Run the passes; add to `rows` of each the logits, or the best tokens and their values, where these are
        wanted."""
        fed = [tokens_of_pass(p.cache, p.tokens, p.tree, p.cached_nodes) for p in passes]
        for parts in self._chunks(passes, fed):
            space, at = self._run(list(parts.values())), 0
            for i, part in parts.items():
                here = slice(at, at + part.stop - part.first_wanted)
                if passes[i].then is None:
                    rows[i].append(space.logits[here].copy())
                else:
                    rows[i] += zip(space.best_tokens[here].tolist(), space.best_values[here].tolist(), strict=True)
                at = here.stop
        for p, ids in zip(passes, fed, strict=True):
            p.cache.advance(len(ids))

    def _goes_on(self, work: Pass, rows: Sequence[Any], step: int) -> bool:
        """Whether another token is fed after so many steps."""
        return False

    def _best(self, work: Pass, rows: Sequence[Any]) -> int:
        """The token that a draft goes on with; any where there is none."""
        raise NotImplementedError

    def _result(self, work: Pass, rows: Sequence[Any]) -> Any:
        """What a pass came to."""
        return torch.from_numpy(np.concatenate(rows) if len(rows) > 1 else rows[0])

    def _choices(self, work: Pass) -> tuple[int, int]:
        """How many best tokens are wanted of each row of logits, among the first how many."""
        return 0, 0

    def _run(self, parts: Sequence[Part]) -> Workspace:
        """One run of the kernel. What comes out is in the work space, in the order of the tokens, until the next."""
        sizes = self._sizes
        count = sum(part.stop - part.start for part in parts)
        # So that all threads have some.
        together = max(1, min(QUERIES, sizes.heads * count // (4 * self._team.threads)))
        request = [len(parts), count, together, 0, 0, 0]
        ids: list[int] = []
        parents: list[int] = []
        for part in parts:
            before = HEADER + len(parts) * PART_NUMBERS + count + len(parents)
            request += part.numbers(*self._choices(part.of), before)
            ids += self._embedding.rows_of(part.fed[part.start : part.stop])
            parents += part.of.tree.parents
        request += ids
        request += parents
        visible = max(part.of.cache.length + part.stop for part in parts)
        space = self._workspace = self._workspace.fitting(count, visible, len(request))
        tables = self._tables
        if self._made_for[0] is not space or self._made_for[1] is not tables:
            self._made_for = space, tables
            self._arguments = (
                *(self._linears.layers, self._linears.head, *self._norms, *tables, self._windows),
                *(self._eps, self._kv_heads, self._head_dim),
                *(self._state_norm, self._output_norm, self._norm_before_residual),
                *(self._embedding.table, *self._functions),
                *space.arguments,
            )
        space.request[: len(request)] = request
        self._fill(space, parts)
        self._keep_states(space, parts)
        self._team.run(self._arguments)
        return space

    def _fill(self, space: Workspace, parts: Sequence[Part]) -> None:
        """Put what the tokens of a run need beside their embeddings into the work space."""

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

    def _keep_states(self, space: Workspace, parts: Sequence[Part]) -> None:
        """Say where the caches keep hidden states of the tokens of a run, if they do."""
        most = max(max(map(part.of.cache.taps.count, part.of.cache.taps), default=0) for part in parts)
        space.request[KEPT] = most
        space.kept[:most] = 0
        at = 0
        for part in parts:
            cache, end = part.of.cache, at + part.stop - part.start
            if cache.states is not None:
                width = 4 * cache.states.shape[1]
                rows = cache.states.data_ptr() + width * np.arange(cache.length + part.start, cache.length + part.stop)
                for place, tap in enumerate(cache.taps):
                    kept = space.kept[cache.taps[:place].count(tap), tap]
                    kept[at:end] = rows + 4 * self._sizes.hidden * place
            at = end


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
        head = hf.get_output_embeddings()
        super().__init__(config, hf.model.layers, head, hf.model.norm, rotary, embedding, threads, is_tied=is_tied)
        self._windows = np.array(source.windows(), np.int64)
        self._targets: tuple[Any, list[int], int] = None, [], 0  # of the last Propose, as numbers, and the largest

    def decides(self, then: Walk | Propose) -> bool:
        """As Pass.then: greedy choices alone, among what the draft model can say."""
        if isinstance(then, Walk) or not then.sampling.greedy or then.targets is None:
            return then.sampling.greedy
        if then.targets is not self._targets[0]:
            self._targets = then.targets, then.targets.tolist(), int(then.targets.max())
        return self._targets[2] < then.vocab_size

    def _choices(self, work: Pass) -> tuple[int, int]:
        if isinstance(work.then, Walk):
            return 1, self.vocab_size
        if work.then is None:
            return 0, 0
        return CANDIDATES, self.vocab_size if work.then.targets is not None else min(
            work.then.vocab_size, self.vocab_size
        )

    def _goes_on(self, work: Pass, rows: Sequence[Any], step: int) -> bool:
        if work.steps <= step or not isinstance(work.then, Propose):
            return False
        path = sum(values[0] for _, values in rows[-step - 1 :])  # log-probability; NaN goes on
        return not path < work.then.least and not work.pause()

    def _best(self, work: Pass, rows: Sequence[Any]) -> int:
        row: int = rows[-1][0][0]
        return row if not isinstance(work.then, Propose) or work.then.targets is None else self._targets[1][row]

    def _result(self, work: Pass, rows: Sequence[Any]) -> Any:
        if work.then is None:
            return super()._result(work, rows)
        if isinstance(work.then, Propose):
            return [self._candidates(work.then, *row) for row in rows]
        position = work.cache.length - len(work.tree)

        def choice_after(node: int, depth: int) -> int:
            tokens, values = rows[node + 1]
            check_chosen(values[0], position + depth)
            return int(tokens[0])

        return follow(work.tree, choice_after)

    def _candidates(self, then: Propose, tokens: list[int], values: list[float]) -> tuple[Candidates, bool]:
        overflowed = math.isnan(values[0])
        possible = 0 if overflowed else sum(value > -math.inf for value in values)
        tokens = tokens[:possible]
        if then.targets is not None:
            tokens = [self._targets[1][row] for row in tokens]
        return Candidates(tokens, values[:possible]), overflowed


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
