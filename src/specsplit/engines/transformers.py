"""Any Hugging Face causal language model, with the operations that speculative decoding needs.

`step` runs one pass over context tokens and a tree, `KVCache.rollback` and `KVCache.keep` adapt the cache after
verification, `new_cache` makes one.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from specsplit.decoding.tree import ROOT, TokenTree
from specsplit.engines.blocks import numbers_in_blocks
from specsplit.engines.gguf_model import load_blocks, load_floats
from specsplit.engines.kv_cache import KVCache, LayeredSlots
from specsplit.engines.passes import EMPTY, Pass, all_or_none
from specsplit.engines.quantise import quantise_linears
from specsplit.engines.reduced_vocabulary import reduce_loaded
from specsplit.engines.tree_attention import additive, positions, visible
from specsplit.errors import UserError, is_out_of_memory, told
from specsplit.models.fingerprint import gguf_weights
from specsplit.models.head_config import is_head
from specsplit.models.loaded import check_loaded, quietly
from specsplit.models.vocabulary import read_reduced_map

log = logging.getLogger(__name__)

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.bfloat16,  # of everything but the weights of linear layers
}
PREFILL_CHUNK, CPU_PREFILL_CHUNK = 512, 128  # A CPU is busy with fewer tokens.
# What a pass raises in a model that was not made for it.
CANNOT_RUN = (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError)
BFLOAT16_SINCE = (8, 0)  # compute capability; GPUs before it emulate bfloat16
UNBOUNDED = 1 << 20  # positions of a model that names no limit


class CausalLM:
    """A loaded model. All methods must be called from one thread at a time.

    vocab_size: rows of the output head, which a draft's reduced head has fewer of than tokens that it reads.
    max_context: positions that the model can be used for.
    eos_token_ids: tokens that end a text, from the generation configuration.
    batch_tokens: tokens of several sessions that are worth one pass; 0 = sessions cannot share one.
    prefill_tokens: a longer prompt is always fed in parts of so many tokens, so that its logits depend on nothing else.
    uses_torch_threads: whether PyTorch computes, with a team of threads for every thread that calls it.
    taps: whether its caches can keep hidden states (StateSlots.tap).
    """

    batch_tokens = 0
    uses_torch_threads = True
    taps = True

    def __init__(self, model: Any) -> None:
        config = model.config.get_text_config()
        self.model = model.eval()
        self.device: torch.device = model.device
        self.dtype: torch.dtype = model.dtype
        self.prefill_tokens = min(PREFILL_CHUNK, CPU_PREFILL_CHUNK) if model.device.type == "cpu" else PREFILL_CHUNK
        head = model.get_output_embeddings()
        self.vocab_size: int = getattr(head, "out_features", config.vocab_size)
        self.max_context = _max_context(config)
        self.num_layers: int = config.num_hidden_layers
        self.hidden_size: int = config.hidden_size
        self.eos_token_ids = _eos_token_ids(model)
        layer_types = set(getattr(config, "layer_types", None) or [])
        self._masks_by_type = "sliding_attention" in layer_types
        self._window: int | None = None
        if self._masks_by_type:
            self._window = config.sliding_window
        elif layer_types != {"full_attention"}:
            self._window = _known(config, "sliding_window")

    @property
    def parameters(self) -> int:
        """Numbers in the weights."""
        return sum(p.numel() for p in self.model.parameters()) + numbers_in_blocks(self.model)

    def windows(self) -> list[int]:
        """Of each layer the positions that a token sees, itself included; 0 = all."""
        if not self._masks_by_type:
            return [self._window or 0] * self.num_layers
        types = self.model.config.get_text_config().layer_types
        return [(self._window or 0) if kind == "sliding_attention" else 0 for kind in types]

    @classmethod
    def load(
        cls, folder: Path, *, dtype: str = "float32", device: str = "auto", skip_layers: Sequence[int] = ()
    ) -> CausalLM:
        """Load weights, of safetensors or GGUF, from a local folder; never from the network, never running its code.

        dtype: float32 | bfloat16 | float16 | int8 (weights of linear layers, on the CPU; the rest is bfloat16).
        device: auto (cuda when there is one) | cpu | cuda | cuda:N.
        skip_layers: decoder layers to leave out, for a cheaper and weaker draft from the same weights.
        A folder with a `draft_to_target` map (see vocabulary.read_reduced_map) gives a model with an output head of
        its rows alone, whether the weights hold these or the full head (engines/reduced_vocabulary.py).
        """
        if dtype not in DTYPES:
            raise UserError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
        target_device = pick_device(device)
        if dtype == "int8" and target_device.type != "cpu":
            raise UserError(f"dtype int8 is for the CPU, not for {target_device}: use device cpu, or dtype bfloat16")
        if not folder.is_dir():  # transformers would look the name up among its downloads
            raise UserError(f"{folder} does not hold a model: no such folder")
        if is_head(folder):
            raise UserError(f"{folder} holds a head that drafts from hidden states, not a model of its own")
        return cls._finished(library_model(folder, DTYPES[dtype]), target_device, dtype, skip_layers)

    @classmethod
    def load_blocks(cls, folder: Path, *, skip_layers: Sequence[int] = ()) -> CausalLM:
        """The model of a GGUF file, its weights as stored, for the fused engine to take apart; float32, on the CPU."""
        model = load_blocks(folder)
        if skip_layers:
            drop_layers(model, skip_layers)
        return cls(model)

    @classmethod
    def _finished(cls, model: Any, device: torch.device, dtype: str, skip_layers: Sequence[int]) -> CausalLM:
        if skip_layers:
            drop_layers(model, skip_layers)
        try:
            model = model.to(device)
        except Exception as error:
            raise UserError(unloadable(Path(str(model.config._name_or_path)), error)) from error
        if dtype == "int8":
            quantise_linears(model)
        try:
            loaded = cls(model)
            loaded.check_tree_attention()
        except UserError:
            raise
        except Exception as error:  # a configuration that makes a model which cannot run
            raise UserError(unloadable(Path(str(model.config._name_or_path)), error)) from error
        return loaded

    @torch.inference_mode()
    def check_tree_attention(self) -> None:
        """Refuse a model whose attention or cache does not follow our mask, positions and cache.

        A tree whose first branch differs from the text is fed after the cached context; its last node must give the
        logits of a plain pass over the same text. State-space and recurrent models, for example, cannot do that, and
        models that count positions by place in the cache (ALiBi) are a little off, which shows only in float32.
        """
        first, second, third, *wrong = (i % self.vocab_size for i in (11, 37, 41, 23, 29, 31, 43))
        tree = TokenTree.chain(wrong)
        tree.add(third, tree.add(second, ROOT, -1.0), -1.0)
        limit = 0.99999 if self.dtype == torch.float32 else 0.99
        reason = "its logits are not those of a plain pass"
        try:
            expected = self.model(torch.tensor([[first, second, third]], device=self.device)).logits[0, -1].double()
            check_finite(expected, self.model)
            cache = self.new_cache(1 + len(tree))
            self.step(cache, [first])
            found = self.step(cache, (), tree)[-1].double()
            check_finite(found, self.model)
            same = bool(torch.cosine_similarity(expected, found, dim=0) > limit)
        except UserError:
            raise
        except Exception as error:  # a model that was not made for it may raise any error
            if is_out_of_memory(error):
                raise UserError(
                    "there is not enough memory to run the model: use a smaller one, or dtype bfloat16"
                ) from error
            same, reason = False, f"{type(error).__name__}: {error}"
        if not same:
            raise UserError(
                f"{type(self.model).__name__} cannot verify trees of drafted tokens ({reason}). "
                f"Choose a decoder-only model with plain attention and a key/value cache."
            )

    def cache_bytes(self, capacity: int, taps: int = 0) -> int:
        """Bytes that a cache of so many tokens takes; of a model with compressed keys and values, at most.

        taps: layers whose inputs it keeps.
        """
        config = self.model.config.get_text_config()
        heads = _known(config, "num_key_value_heads") or config.num_attention_heads
        head_dim = _known(config, "head_dim") or config.hidden_size // config.num_attention_heads
        numbers = 2 * self.num_layers * heads * head_dim + taps * self.hidden_size
        return numbers * self.dtype.itemsize * capacity

    def new_cache(self, capacity: int) -> LayeredSlots:
        """An empty cache for one sequence of at most `capacity` tokens, tree nodes included."""
        states_like = torch.empty(0, dtype=self.dtype, device=self.device)
        return KVCache(self.num_layers, capacity, self.hidden_size, states_like)

    @torch.inference_mode()
    def step(
        self, cache: LayeredSlots, tokens: Sequence[int], tree: TokenTree = EMPTY, cached_nodes: int = 0
    ) -> torch.Tensor:
        """One pass over `tokens`, which continue the cached context, then the nodes of `tree` from `cached_nodes` on.

        When `cached_nodes` > 0 the cache ends with those nodes and `tokens` must be empty. Afterwards the cache
        holds everything fed. Returns logits [rows, vocab_size] on the model's device: one row for the last of
        `tokens` (if any), then one for every node fed.
        """
        count = len(tokens) + len(tree) - cached_nodes
        if not count:
            raise ValueError("a pass needs at least one token")
        if cache.length + count > cache.capacity:
            raise ValueError(f"{cache.length} + {count} tokens exceed the cache of {cache.capacity}")
        with all_or_none([cache]):
            while len(tokens) > self.prefill_tokens:
                self._forward(cache, tokens[: self.prefill_tokens], EMPTY, 0, keep_logits=1)
                tokens = tokens[self.prefill_tokens :]
            rows = len(tree) - cached_nodes + (1 if tokens else 0)
            return self._forward(cache, tokens, tree, cached_nodes, keep_logits=rows)

    def step_many(self, passes: Sequence[Pass]) -> list[torch.Tensor]:
        """The passes of several sessions; the logits of each."""
        with all_or_none(p.cache for p in passes):
            return [self.step(p.cache, p.tokens, p.tree, p.cached_nodes) for p in passes]

    def _forward(
        self, cache: Any, tokens: Sequence[int], tree: TokenTree, cached_nodes: int, keep_logits: int
    ) -> torch.Tensor:
        ids = [*tokens, *tree.token_ids[cached_nodes:]]
        context = cache.length - cached_nodes
        kept = None if cache.states is None else cache.states[cache.length : cache.length + len(ids)]

        def keep(place: int, states: torch.Tensor) -> None:
            assert kept is not None
            kept[:, place * self.hidden_size : (place + 1) * self.hidden_size] = states

        with self._tapped(cache.taps, keep):
            output = self.model(
                input_ids=torch.tensor([ids], device=self.device),
                position_ids=torch.tensor([positions(context, len(tokens), tree, cached_nodes)], device=self.device),
                attention_mask=self._attention_mask(context, len(tokens), tree, cached_nodes),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=keep_logits,
            )
        cache.advance(len(ids))
        logits: torch.Tensor = output.logits[0]
        return logits

    @contextmanager
    def _tapped(self, taps: Sequence[int], keep: Callable[[int, torch.Tensor], None]) -> Iterator[None]:
        """Call `keep` in each pass with the place of a tap and the inputs of its layer, [tokens, hidden_size]."""
        if not taps:
            yield
            return
        parent, name = layer_list(self.model, self.num_layers)

        def hook(place: int) -> Callable[..., None]:
            def write(module: Any, args: Any, kwargs: Any) -> None:
                keep(place, (args[0] if args else kwargs["hidden_states"])[0])

            return write

        layers = getattr(parent, name)
        hooks = [
            layers[layer].register_forward_pre_hook(hook(place), with_kwargs=True) for place, layer in enumerate(taps)
        ]
        try:
            yield
        finally:
            for each in hooks:
                each.remove()

    def _attention_mask(
        self, context: int, linear: int, tree: TokenTree, cached_nodes: int
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        def mask(window: int | None) -> torch.Tensor:
            return additive(visible(context, linear, tree, cached_nodes, window), self.dtype, self.device)

        if self._masks_by_type:
            return {"full_attention": mask(None), "sliding_attention": mask(self._window)}
        return mask(self._window)


def library_model(folder: Path, dtype: torch.dtype) -> Any:
    """The model in a folder as transformers loads it; of GGUF weights, turned to numbers of this type."""
    from transformers import AutoModelForCausalLM

    head_tokens = read_reduced_map(folder)
    mismatched: set[str] = set()
    if gguf_weights(folder) is not None:
        model = load_floats(folder, dtype)
    else:
        try:
            # What is wrong with the weights is checked below.
            with quietly():
                model, report = AutoModelForCausalLM.from_pretrained(
                    folder,
                    dtype=dtype,
                    local_files_only=True,
                    use_safetensors=True,
                    trust_remote_code=False,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,
                )
        except Exception as error:  # transformers raises any class of error for unusual files
            raise UserError(unloadable(folder, error)) from error
        mismatched = check_loaded(folder, model, report, reduced=head_tokens is not None)
    if head_tokens is not None:
        reduce_loaded(model, folder, head_tokens, mismatched)
    return model


def check_finite(logits: torch.Tensor, model: Any) -> None:
    """Raise UserError for logits that are not numbers, or all equal: no token is the likeliest then."""
    if not bool(torch.isfinite(logits).all()):
        dtype = str(model.dtype).removeprefix("torch.")
        other = {"float16": "bfloat16", "bfloat16": "float32"}.get(dtype)
        why, mend = (f", or too large for dtype {dtype}", f", or use dtype {other}") if other else ("", "")
        raise UserError(
            f"the logits of {type(model).__name__} are not numbers (NaN or infinite): its weights or config.json are "
            f"damaged{why}. Fetch the model again{mend}."
        )
    if bool((logits == logits[..., :1]).all()):
        raise UserError(
            f"the logits of {type(model).__name__} are all equal: its weights are zero, as those of a file that was "
            "not fetched to its end. Fetch the model again."
        )


def unloadable(folder: Path, error: Exception) -> str:
    """The message about a model that another library could not load."""
    if is_out_of_memory(error):
        return f"{folder}: there is not enough memory to load the model: use a smaller one, or dtype bfloat16 or int8"
    return f"{folder} does not hold a model that can be loaded: {told(error)}"


def pick_device(name: str) -> torch.device:
    """The torch device that `name` means: auto | cpu | cuda | cuda:N. UserError when it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cpu":
        return torch.device("cpu")
    match = re.fullmatch(r"cuda(?::(\d+))?", name)
    if match is None:
        raise UserError(f"device {name!r} is not one of auto, cpu, cuda, cuda:N")
    if int(match.group(1) or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device {name!r} is not there: this machine has {torch.cuda.device_count()} CUDA devices. "
            f"Use device auto or cpu."
        )
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> str:
    """The number format that a draft's dtype means on a device: auto is the one that its passes take least time in."""
    if name != "auto":
        return name
    if device.type == "cpu":
        return "int8"
    return "bfloat16" if torch.cuda.get_device_capability(device) >= BFLOAT16_SINCE else "float16"


def drop_layers(model: Any, skip: Sequence[int]) -> None:
    """Remove decoder layers from a loaded model, in place, and renumber the others for the cache."""
    config = model.config.get_text_config()
    count = config.num_hidden_layers
    bad = [i for i in skip if not 0 <= i < count]
    if bad or len(set(skip)) >= count:
        raise UserError(f"skip_layers {list(skip)}: the model has layers 0 to {count - 1}, and one must remain")
    parent, name = layer_list(model, count)
    kept = [i for i in range(count) if i not in set(skip)]
    layers = getattr(parent, name)
    setattr(parent, name, nn.ModuleList(layers[i] for i in kept))
    for new_index, layer in enumerate(getattr(parent, name)):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = new_index
    layer_types = getattr(config, "layer_types", None)
    if layer_types:
        config.layer_types = [layer_types[i] for i in kept]
    config.num_hidden_layers = len(kept)


@contextmanager
def without_layers(model: Any, skip: Sequence[int]) -> Iterator[None]:
    """Leave decoder layers out for as long as the context lasts; the model is then exactly what it was."""
    config = model.config.get_text_config()
    parent, name = layer_list(model, config.num_hidden_layers)
    layers, count, types = getattr(parent, name), config.num_hidden_layers, getattr(config, "layer_types", None)
    indices = [(module, module.layer_idx) for module in layers.modules() if hasattr(module, "layer_idx")]
    try:
        drop_layers(model, skip)
        yield
    finally:
        setattr(parent, name, layers)
        for module, index in indices:
            module.layer_idx = index
        config.num_hidden_layers = count
        if types:
            config.layer_types = types


def layer_list(model: nn.Module, count: int) -> tuple[nn.Module, str]:
    """The module that holds the decoder layers, and their name in it. Raises UserError when there is no such list."""
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == count:
                return module, name
    raise UserError(f"skip_layers: no list of {count} decoder layers in {type(model).__name__}")


def _max_context(config: Any) -> int:
    """Positions that the model can be used for with a cache and a mask like ours.

    Beyond their chunk (Llama 4) or window (GPT-Neo, which counts places in the cache) some models see less than our
    mask says, and longrope (Phi-3) turns the keys of all tokens another way, those in the cache included.
    """
    limits = [getattr(config, "max_position_embeddings", None)]
    limits += [_known(config, name) for name in ("attention_chunk_size", "window_size")]
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        limits.append(rope["original_max_position_embeddings"])
    return min((limit for limit in limits if limit), default=UNBOUNDED)


def _known(config: Any, name: str) -> Any:
    """A value of the configuration that this architecture defines; None for one that the model ignores."""
    return getattr(config, name) if hasattr(type(config), name) else None


def _eos_token_ids(model: Any) -> tuple[int, ...]:
    for config in (model.generation_config, model.config.get_text_config()):
        eos = getattr(config, "eos_token_id", None)
        if eos is not None:
            return (eos,) if isinstance(eos, int) else tuple(eos)
    return ()
