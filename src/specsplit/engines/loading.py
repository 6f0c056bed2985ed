"""Loading a model of any kind, and the interface that all kinds have."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from specsplit.decoding.tree import ROOT, TokenTree
from specsplit.engines import gpu_decoder, gpu_head
from specsplit.engines.cuda_graphs import GraphLM
from specsplit.engines.gpu import GpuLM
from specsplit.engines.hidden_states import HiddenStatesHead
from specsplit.engines.ngram import NGramLM
from specsplit.engines.numba import FusedLM, unsuitable
from specsplit.engines.numba_head import FusedHead, unsuitable_head
from specsplit.engines.passes import EMPTY, Pass
from specsplit.engines.suffix import SuffixLM
from specsplit.engines.synthetic import SyntheticLM
from specsplit.engines.transformers import CANNOT_RUN, CausalLM, check_finite, pick_device, pick_dtype
from specsplit.errors import UserError
from specsplit.models.file_names import GGUF_FILE
from specsplit.models.fingerprint import fingerprint_model, gguf_weights, has_tokenizer, read_config
from specsplit.models.generation_settings import check_eos, refuse_model_settings
from specsplit.models.gguf_file import read_gguf
from specsplit.models.head_config import is_head
from specsplit.models.sources import manifest_file, model_folder, resolve_model, tokenizer_folder
from specsplit.models.tokenizer import TextCodec
from specsplit.models.vocabulary import load_vocabulary, read_reduced_map
from specsplit.models.weightless import is_weightless, model_behind, parameters_sha256, parse_parameters
from specsplit.settings.models import NGramParameters, SyntheticParameters
from specsplit.settings.worker import DraftWorkerConfig, TargetWorkerConfig, WorkerSettings

log = logging.getLogger(__name__)
COMPILED_S = 3.0  # a first pass that took longer compiled


class LanguageModel(Protocol):
    """A model that drafts or verifies: CausalLM, GraphLM, GpuLM, FusedLM, SyntheticLM, NGramLM, SuffixLM, and the
    heads HiddenStatesHead, FusedHead and GpuHead.

    CausalLM says how.

    Its caches are of its own kind and have length, capacity, advance, rollback and keep, as KVCache documents them.
    """

    device: torch.device
    vocab_size: int
    max_context: int
    eos_token_ids: tuple[int, ...]
    batch_tokens: int
    prefill_tokens: int
    uses_torch_threads: bool
    taps: bool

    @property
    def parameters(self) -> int: ...
    def new_cache(self, capacity: int) -> Any: ...
    def cache_bytes(self, capacity: int, taps: int = 0) -> int: ...
    def step(
        self, cache: Any, tokens: Sequence[int], tree: TokenTree = EMPTY, cached_nodes: int = 0
    ) -> torch.Tensor: ...
    def step_many(self, passes: Sequence[Pass]) -> list[torch.Tensor]: ...


def check_model(config: WorkerSettings) -> None:
    """Refuse what can be told of the worker's model before anything is loaded, started or hashed. Raises UserError.

    Of a prepared model the configuration was read when it was prepared.
    """
    if config.model is None:
        raise UserError(f"no model: give --model FOLDER or set {config.prefix}MODEL")
    folder = model_folder(config.model)
    if not manifest_file(config.model).is_file():
        check_eos(folder)
        read_config(folder)
    if isinstance(config, TargetWorkerConfig) and not config.ignore_model_settings:
        refuse_model_settings(
            folder,
            "set generation.ignore_model_settings, give the target worker --ignore-model-settings "
            f"({config.prefix}IGNORE_MODEL_SETTINGS=true), or in Python Model(..., ignore_model_settings=True)",
        )


def load_model(
    folder: Path, manifest: dict[str, Any], config: WorkerSettings, threads: int = 1
) -> tuple[LanguageModel, dict[str, Any]]:
    """The model in `folder`, ready to run, and its identity: model, weights_sha256, tokenizer_sha256, parameters and
    dtype, never auto.

    folder, manifest: from resolve_model(config.model). threads: of a pass in the fused engine.
    Raises UserError when the model cannot be loaded, is not the one that the manifest was made for, or does not fit the
    settings.
    """
    model: LanguageModel
    if is_weightless(manifest["source"]):
        model, weights_sha256, dtype = _load_weightless(manifest, config, threads)
    else:
        dtype = pick_dtype(config.dtype, pick_device(config.device))
        config = config.model_copy(update={"dtype": dtype})
        weights_sha256 = _weights_sha256(folder, manifest, config)
        if is_head(folder):
            model = _load_head(folder, manifest["name"], config, threads)
        else:
            model = _load_causal_lm(folder, config, threads)
    identity = {
        "model": manifest["name"],
        "weights_sha256": weights_sha256,
        "tokenizer_sha256": TextCodec.load(target_tokenizer(config) or folder).sha256,  # what it speaks
        "parameters": model.parameters,
        "dtype": dtype,
    }
    return model, identity


def target_tokenizer(config: WorkerSettings) -> Path | None:
    """The folder of the target's tokenizer, when a draft worker was given one."""
    given = config.target_tokenizer if isinstance(config, DraftWorkerConfig) else None
    return tokenizer_folder(given) if given else None


def _load_causal_lm(folder: Path, config: WorkerSettings, threads: int) -> LanguageModel:
    skip_layers = config.skip_layers if isinstance(config, DraftWorkerConfig) else []
    if (fused := _in_blocks(folder, config, threads, skip_layers)) is not None:
        return fused
    model = CausalLM.load(folder, dtype=config.dtype, device=config.device, skip_layers=skip_layers)
    if config.engine == "transformers":
        return model
    if config.engine == "graphs" or (config.engine == "auto" and model.device.type == "cuda"):
        return _graphs(model, folder, config.engine, config.max_sessions)
    if reason := unsuitable(model):
        if config.engine == "fused":
            raise UserError(f"engine fused cannot run {folder}: {reason}. Use engine auto, or transformers.")
        log.info("engine transformers, as %s", reason)
        return model
    return _compared(model, lambda: FusedLM(model, threads), "fused")


def _weights_sha256(folder: Path, manifest: dict[str, Any], config: WorkerSettings) -> str:
    """The manifest's hash, compared with the weights unless it has just been made from them, as of a plain folder."""
    weights_sha256: str = manifest["fingerprint"]["weights_sha256"]
    if config.model is not None and manifest_file(config.model).is_file():
        _check_same(fingerprint_model(folder)["weights_sha256"], weights_sha256, f"the weights in {folder}")
    return weights_sha256


def _load_head(folder: Path, name: str, config: WorkerSettings, threads: int) -> LanguageModel:
    """A head that drafts from the target's hidden states."""
    if not isinstance(config, DraftWorkerConfig):
        raise UserError(
            f"{name} is a head that drafts from the hidden states of a target, and no target: name it as the draft "
            "worker's model"
        )
    if config.skip_layers:
        raise UserError(f"skip_layers {config.skip_layers}: {name} is a head, whose layers cannot be left out")
    target = target_tokenizer(config)
    if target is None and not has_tokenizer(folder):
        raise UserError(
            f"{folder}: a head without a tokenizer speaks that of its target: name the target's folder as "
            "target_tokenizer (--target-tokenizer FOLDER)"
        )
    head = HiddenStatesHead.load(folder, dtype=config.dtype, device=config.device, target=target)
    if config.engine == "transformers":
        return head
    on_gpu = config.engine == "graphs" or (config.engine == "auto" and head.device.type == "cuda")
    engine, reason = ("graphs", gpu_head.unsuitable_head(head)) if on_gpu else ("fused", unsuitable_head(head))
    if reason:
        if config.engine == engine:
            raise UserError(f"engine {engine} cannot run {folder}: {reason}. Use engine auto, or transformers.")
        log.info("engine transformers, as %s", reason)
        return head
    if on_gpu:
        return _graphs(head, folder, config.engine, config.max_sessions)
    return _compared(head, lambda: FusedHead(head, threads), "fused")


def _in_blocks(folder: Path, config: WorkerSettings, threads: int, skip_layers: Sequence[int]) -> LanguageModel | None:
    """A float32 model of a GGUF file in the fused engine, its weights as stored; None for any other."""
    wanted = config.engine in ("auto", "fused") and config.dtype == "float32"
    if not wanted or gguf_weights(folder) is None or pick_device(config.device).type != "cpu":
        return None
    if read_reduced_map(folder) is not None:
        return None
    model = CausalLM.load_blocks(folder, skip_layers=skip_layers)
    if reason := unsuitable(model):
        log.info("weights are turned to float32, as %s", reason)
        return None
    fast = _compared(model, lambda: FusedLM(model, threads), "fused")
    log.info(
        "engine fused: float32, with the weights in memory as stored (%s)",
        "+".join(read_gguf(folder / GGUF_FILE).types),
    )
    return fast


def _graphs(model: CausalLM | HiddenStatesHead, folder: Path, engine: str, sessions: int) -> LanguageModel:
    try:
        if isinstance(model, HiddenStatesHead):
            return _compared(model, lambda: gpu_head.GpuHead(model, sessions), "graphs")
        if reason := gpu_decoder.unsuitable(model):
            log.info("engine graphs runs the layers of transformers, as %s", reason)
            return _compared(model, lambda: GraphLM(model.model), "graphs")
        return _compared(model, lambda: GpuLM(model, sessions), "graphs")
    except CANNOT_RUN as error:
        reason = f"{type(error).__name__}: {error}"
        if engine == "graphs":
            raise UserError(
                f"engine graphs cannot run {folder} ({reason}). Use engine auto, or transformers."
            ) from None
        log.warning("engine transformers, as passes of this model cannot be recorded (%s)", reason)
        return model


def _compared(model: CausalLM | HiddenStatesHead, make: Callable[[], LanguageModel], name: str) -> LanguageModel:
    """The same model in a fast engine, compared with the first over a tree of a few tokens."""
    given: dict[str, Any] = {}
    if isinstance(model, HiddenStatesHead):
        given["states"] = torch.randn(2, model.state_size, generator=torch.Generator().manual_seed(0))
    tokens = [i % model.vocab_size for i in (11, 37, 41, 23, 29, 31, 43)]
    tree = TokenTree(tokens[2:], [ROOT, 0, ROOT, 2, 2], [-1.0] * 5)
    expected = model.step(model.new_cache(16), tokens[:2], tree, **given).double()
    check_finite(expected, model.module if isinstance(model, HiddenStatesHead) else model.model)
    started = time.perf_counter()
    fast = make()
    found = fast.step(fast.new_cache(16), tokens[:2], tree, **given).double()
    if (seconds := time.perf_counter() - started) > COMPILED_S:
        log.info("engine %s was compiled in %.0f s", name, seconds)
    # Activations of half precision models are rounded at other places.
    limit = 0.99999 if model.dtype == torch.float32 else 0.99
    if not bool((torch.cosine_similarity(expected, found, dim=-1) > limit).all()):
        raise UserError(
            f"engine {name} does not give the logits of engine transformers for this model: use engine transformers, "
            "and please report it"
        )
    return fast


def _load_weightless(manifest: dict[str, Any], config: WorkerSettings, threads: int) -> tuple[LanguageModel, str, str]:
    """A model without weights of its own, its hash and its dtype, where auto is that of its logits, float32. It runs on
    the CPU whatever dtype and device say; the model that a suffix draft asks has both."""
    name, fingerprint = manifest["name"], manifest["fingerprint"]
    parameters = parse_parameters(manifest["source"], name)
    weights_sha256 = parameters_sha256(parameters)
    _check_same(weights_sha256, fingerprint["weights_sha256"], f"the parameters of {name}")
    is_draft = isinstance(config, DraftWorkerConfig)
    dtype = "float32" if config.dtype == "auto" else config.dtype
    if isinstance(config, DraftWorkerConfig) and config.skip_layers:
        raise UserError(f"skip_layers {config.skip_layers}: {name} is a {parameters.source} model, without layers")
    if isinstance(parameters, SyntheticParameters):
        settings = parameters.model_dump(exclude={"source"})
        if not is_draft:  # the target always writes the text itself; only a draft misses it
            settings["acceptance"] = 1.0
        return SyntheticLM(**settings), weights_sha256, dtype
    if not is_draft:
        article = "an ngram" if isinstance(parameters, NGramParameters) else "a suffix"
        raise UserError(f"{name} is {article} model, which can only draft: name another model for the target worker")
    settings = parameters.model_dump(exclude={"source", "tokenizer", "model"})
    if isinstance(parameters, NGramParameters):
        return NGramLM(fingerprint["vocab_size"], **settings), weights_sha256, dtype
    if parameters.model:
        folder, _ = model_behind(parameters.model)
        if is_head(folder):
            raise UserError(
                f"{name}: the model that it asks, {folder}, reads hidden states of a target: name a plain one"
            )
        other, identity = load_model(*resolve_model(Path(parameters.model)), config, threads)
        dtype = identity["dtype"]
        settings["model"], settings["outward"] = other, load_vocabulary(folder, None, other.vocab_size).outward
    return SuffixLM(fingerprint["vocab_size"], **settings), weights_sha256, dtype


def _check_same(found: str, expected: str, what: str) -> None:
    if found != expected:
        raise UserError(f"{what} are not those of its model.json: prepare the model again")
