"""What identifies a model: hashes of its weights and vocabulary, its size and its shape.

Two workers must agree on the tokenizer, and a report must say which weights it measured. Everything here
reads a folder in Hugging Face layout: config.json, safetensors or model.gguf, tokenizer files. Weights are only hashed.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specsplit.errors import UserError, told
from specsplit.io import (
    check_openable,
    children,
    combined_sha256,
    read_json,
    read_json_object,
    refuse_stand_in,
    sha256_file,
)
from specsplit.models.file_names import (
    GGUF_FILE,
    HEAD_WEIGHTS,
    MAP_FILES,
    MODEL_FILES,
    TOKENIZER_EXTRAS,
    TOKENIZER_FILES,
    matches,
)
from specsplit.models.generation_settings import check_eos
from specsplit.models.gguf_file import MOST_LAYERS, read_gguf
from specsplit.models.head_config import HEAD_MAPS, is_head, read_head_config
from specsplit.models.loaded import INDEX, Stored, check_stored, quietly, stored_tensors

if TYPE_CHECKING:
    import torch

PICKLED_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# What a folder holds in place of weights, and what to do about it.
NO_WEIGHTS = (
    (
        ("*.incomplete", "*.part", "*.aria2", "*.crdownload"),
        "is a download that was not finished; fetch the model again",
    ),
    (
        ("adapter_*",),
        "is of an adapter (LoRA), not a whole model; merge it into its base model (merge_and_unload of peft) "
        "and save that",
    ),
    (("model-*-of-*.safetensors",), "is a shard without its index; fetch model.safetensors.index.json as well"),
    (
        ("*.gguf",),
        "is a GGUF file: name it as `path` in the configuration, or prepare it once: "
        "specsplit prepare-model --local '{folder}/{name}' --output FOLDER",
    ),
    (("*.safetensors",), "is not the name of weights in Hugging Face layout, model.safetensors"),
    (("*.h5", "*.msgpack", "*.onnx", "*.npz", "*.tflite"), "is of another framework; save the model as safetensors"),
)
OLDER_TOKENIZERS = ("*.model", "*.tiktoken", "tekken.json")
LAYER_COUNT = re.compile(r"(num|n)(_\w+)?_layers?")
MOST_UNSTORED = 4  # times the stored numbers: a reduced output head is stored smaller than the configuration says

DTYPE_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn"}


def hash_files(folder: Path) -> dict[str, str]:
    """File name -> sha256 of every model file in `folder`, by name."""
    patterns = file_patterns(folder)
    paths = sorted(path for path in folder.iterdir() if path.is_file() and matches(path.name, patterns))
    return {path.name: sha256_file(path) for path in paths}


def file_patterns(folder: Path) -> tuple[str, ...]:
    """Patterns of the names of the files that make the model in `folder`."""
    return (*MODEL_FILES, HEAD_WEIGHTS) if is_head(folder) else MODEL_FILES


def tokenizer_sha256(tokenizer: Any) -> str:
    """Hash of the id -> token map: two copies of one vocabulary agree whatever their files look like."""
    pairs = sorted([token_id, token] for token, token_id in tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(pairs, separators=(",", ":")).encode()).hexdigest()


def check_model_folder(folder: Path) -> None:
    """Raise UserError unless `folder` has a config, weights and a tokenizer; of a head that is the target's."""
    if folder.is_file():
        instead = _in_place_of_weights(folder.parent) if folder.suffix == ".gguf" else f": name {folder.parent}"
        raise UserError(f"{folder}: a file, where the folder of a model is wanted{instead}")
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such folder; prepare the model first, or name a folder with config.json, weights "
            "and a tokenizer"
        )
    _check_files(folder)
    if not (folder / "config.json").is_file():
        snapshots = sorted(folder.glob("snapshots/*/config.json"))
        instead = f"; it is a folder of the Hub's cache: name {snapshots[-1].parent}" if snapshots else ""
        raise UserError(
            f"{folder}: no config.json, so not a model in Hugging Face layout{instead or _in_place_of_weights(folder)}"
        )
    weight_files(folder)
    if not is_head(folder):
        check_tokenizer(folder)


def _check_files(folder: Path) -> None:
    """Raise UserError for a file of a model that cannot be opened: libraries would go on without it, or wait for it."""
    for path in children(folder):
        if matches(path.name, (*MODEL_FILES, HEAD_WEIGHTS)):
            check_openable(path)


def _in_place_of_weights(folder: Path) -> str:
    """What the folder holds that is no model, for a message."""
    names = [path.name for path in children(folder)]
    for patterns, what in NO_WEIGHTS:
        if name := next((name for name in names if matches(name, patterns)), None):
            return f": {name} {what.format(folder=folder, name=name)}"
    return ""


def check_tokenizer(folder: Path) -> None:
    """Raise UserError unless `folder` holds a tokenizer."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; prepare the model first (specsplit prepare-model)")
    _check_files(folder)
    if not has_tokenizer(folder):
        raise UserError(f"{folder}: no tokenizer; expected one of {', '.join(TOKENIZER_FILES)}")


def has_tokenizer(folder: Path) -> bool:
    return any(matches(path.name, TOKENIZER_FILES) for path in children(folder))


def load_tokenizer(folder: Path, problem: str = "") -> Any:
    """The tokenizer of a local folder. Raises UserError when it cannot be read. problem: how its message begins, where
    the folder means nothing to the reader."""
    from transformers import AutoTokenizer

    try:
        with quietly():
            return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises any class of error for unusual files
        reason = told(error)
        names = [path.name for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
        for name in [] if problem else names:
            if matches(name, (*TOKENIZER_FILES, *TOKENIZER_EXTRAS)):
                read_json_object(folder / name) if name.endswith(".json") else refuse_stand_in(folder / name)
        older = [name for name in names if matches(name, OLDER_TOKENIZERS)]
        if "trust_remote_code" in str(error):
            reason = "it needs Python code of its own, which is not run here; choose a model with a tokenizer.json"
        elif older and "tokenizer.json" not in names and find_spec("sentencepiece") is None:
            reason = (
                f"there is {older[0]} and no tokenizer.json: fetch a copy of the model that has one, or install what "
                "transformers reads the older file with: pip install sentencepiece protobuf tiktoken"
            )
        raise UserError(f"{problem or f'{folder} does not hold a tokenizer that can be loaded'}: {reason}") from error


def read_config(folder: Path) -> Any:
    """The configuration of a model, as transformers reads it; of a head that of its layer. Raises UserError when it
    cannot."""
    import transformers

    stored = read_json_object(folder / "config.json")
    for key, value in _entries(stored):
        if LAYER_COUNT.fullmatch(key) and type(value) is int and value > MOST_LAYERS:
            raise UserError(f"{folder}: config.json describes a model of {value} layers ({key}), and none has so many")
    if is_head(folder):
        return read_head_config(folder).layer
    kind = stored.get("model_type")
    if isinstance(kind, str) and kind not in transformers.CONFIG_MAPPING:
        if stored.get("auto_map"):
            raise UserError(
                f"{folder}: a model of type {kind!r} needs Python code of its own (auto_map), which is not run here; "
                "choose a model whose architecture is part of transformers"
            )
        raise UserError(
            f"{folder}: an unknown architecture: transformers {transformers.__version__} has no model type {kind!r}; "
            "a newer version may, or mend model_type in its config.json"
        )
    if (quantised := stored.get("quantization_config")) and not (folder / GGUF_FILE).is_file():
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise UserError(
            f"{folder}: the weights are quantised ({method}), which is not run here; take the model as it was before, "
            "or a GGUF file of it, and quantise by the worker's dtype: int8"
        )
    if (named := stored.get("transformers_weights")) not in (None, "model.safetensors", INDEX):
        raise UserError(
            f"{folder}: config.json names other weights (transformers_weights: {named!r}), which are not read here; "
            "name them model.safetensors, and take the key out"
        )
    try:
        with quietly():
            return transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # it raises any class of error for an unusual file
        raise UserError(f"{folder}: transformers cannot read its configuration: {told(error)}") from error


def _entries(stored: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The keys with their values, those of objects within it included."""
    for key, value in stored.items():
        yield key, value
        if isinstance(value, dict):
            yield from _entries(value)


def check_architecture(
    folder: Path,
    config: Any,
    parameters: int,
    described_by: str = "config.json",
    stored: Mapping[str, Stored] | None = None,
) -> str:
    """The class that runs the model. Refuses what no engine can run, and weights that are not those of the
    configuration, before anything is loaded; attention that strays is found when a worker loads.

    parameters: numbers in the weights. described_by: where the configuration stands. stored: the tensors of the
    weights, where they are in safetensors."""
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(
            f"{folder}: a model of type {config.model_type!r} is no decoder-only language model; choose one that "
            "transformers loads as AutoModelForCausalLM"
        )
    if getattr(config.get_text_config(), "num_hidden_layers", 1) < 1:
        raise UserError(f"{folder}: {described_by} describes a model without layers (num_hidden_layers)")
    if getattr(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], "_is_stateful", False):
        raise UserError(
            f"{folder}: a model of type {config.model_type!r} keeps a recurrent state, which cannot go back to the "
            "accepted tokens; choose a decoder-only model with plain attention"
        )
    if other := [name for name in config.architectures or () if re.search("For(Seq|Token|Multiple|Quest)", str(name))]:
        raise UserError(
            f"{folder}: {described_by} names {other[0]}, which writes no text; choose a causal language model"
        )
    try:
        with quietly(), torch.device("meta"):  # shapes alone, without memory
            model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        described = sum(parameter.numel() for parameter in model.parameters())
        limit = _max_context(config)
    except Exception as error:  # an unusual configuration may raise any error
        raise UserError(
            f"{folder}: transformers cannot make the model that {described_by} describes: {told(error)}"
        ) from error
    if limit is not None and limit < 1:
        raise UserError(f"{folder}: {described_by} describes a model for {limit} tokens (max_position_embeddings)")
    if described > MOST_UNSTORED * parameters:
        raise UserError(
            f"{folder}: {described_by} is not that of the weights: it describes {described:.3g} parameters, and they "
            f"hold {parameters:.3g}. Fetch or convert the model again."
        )
    if stored:
        check_stored(folder, model, stored, reduced=any((folder / name).is_file() for name in MAP_FILES))
    return type(model).__name__


def _max_context(config: Any) -> int | None:
    """None when the model states no limit. GPT-2 and its kin call it n_positions."""
    text = config.get_text_config()
    limit: int | None = getattr(text, "max_position_embeddings", None)
    return getattr(text, "n_positions", None) if limit is None else limit


def weight_files(folder: Path) -> list[Path]:
    """The files that make up the weights: model.safetensors, else the shards named in its index, else model.gguf, else
    pytorch_model.bin of a head.

    Raises UserError when there are none, or a shard is missing.
    """
    single, index = folder / "model.safetensors", folder / INDEX
    if single.is_file():
        return [single]
    if index.is_file():
        try:
            shards = sorted(set(read_json(index)["weight_map"].values()))
        except (TypeError, KeyError, AttributeError):
            shards = []
        if not shards:
            raise UserError(f"{index}: no weight_map, so not an index of weights; fetch it again")
        if strange := [shard for shard in shards if not matches(str(shard), ("*.safetensors",))]:
            raise UserError(f"{index}: weight_map names {strange[0]!r}, not a .safetensors file beside it")
        if missing := [shard for shard in shards if not (folder / shard).is_file()]:
            raise UserError(
                f"{folder}: {missing[0]} is missing ({len(missing)} of {len(shards)} shards); fetch it again"
            )
        return [folder / shard for shard in shards]
    if (folder / GGUF_FILE).is_file():
        return [folder / GGUF_FILE]
    if (folder / HEAD_WEIGHTS).is_file() and is_head(folder):
        return [folder / HEAD_WEIGHTS]
    pickled = sorted(path.name for path in children(folder) if matches(path.name, PICKLED_WEIGHTS))
    if pickled and not matches(pickled[0], ("adapter_*",)):
        raise UserError(
            f"{folder}: the weights are pickled ({pickled[0]}); only safetensors is read, for a pickle can "
            "run code. If you trust them, convert once: "
            'python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{folder}').save_pretrained('{folder}')\""
        )
    found = _in_place_of_weights(folder) or "; expected model.safetensors, or its shards and their index"
    raise UserError(f"{folder}: no weights{found}")


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a head's file of weights by name; those of safetensors are mapped and not read yet.

    pytorch_model.bin, as the original checkpoints are, is read by a reader of tensors alone, without running code.
    Raises UserError.
    """
    import pickle

    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise UserError(f"{path}: the weights cannot be read: {told(error)}; fetch the head again") from None
    if not isinstance(found, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in found.values()):
        raise UserError(f"{path}: wanted tensors by name")
    return found


def gguf_weights(folder: Path) -> Path | None:
    """The GGUF file with the weights of a model folder; None when they are in safetensors."""
    files = weight_files(folder)
    return files[0] if files[0].name == GGUF_FILE else None


def fingerprint_model(folder: Path, files: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Identity and shape of the model in `folder`.

    files: sha256 by file name when already known (see hash_files), so that large weights are read once.
    Returns weights_sha256 (of the weight files as they are: a GGUF file and the safetensors converted from it differ;
    with that of the map of a reduced vocabulary), tokenizer_sha256 (empty for a head without one), parameters (as
    stored: tied weights count once), dtype (as stored, `+` between several), architecture, vocab_size, max_context
    (None when the model states no limit).
    Raises UserError for a folder that does not hold a readable causal language model.
    """
    check_model_folder(folder)
    check_eos(folder)
    weights = weight_files(folder)
    hashed = [*weights, *(folder / name for name in MAP_FILES if (folder / name).is_file())]
    sha256 = files or {}
    stored = stored_tensors(weights) if weights[0].suffix == ".safetensors" else {}
    parameters, dtype = _count_parameters(weights[0], stored)
    config = read_config(folder)
    head = is_head(folder)
    architecture = config.architectures[0] if head else check_architecture(folder, config, parameters, stored=stored)
    tokenizer_hash = tokenizer_sha256(load_tokenizer(folder)) if not head or has_tokenizer(folder) else ""
    return {
        "weights_sha256": combined_sha256({f.name: sha256.get(f.name) or sha256_file(f) for f in hashed}),
        "tokenizer_sha256": tokenizer_hash,
        "parameters": parameters,
        "dtype": dtype,
        "architecture": architecture,
        "vocab_size": config.get_text_config().vocab_size,
        "max_context": _max_context(config),
    }


def _count_parameters(weights: Path, stored: Mapping[str, Stored]) -> tuple[int, str]:
    """Number of parameters and their dtype, of safetensors (stored) and GGUF from the headers alone. A head's map of
    tokens is none of them. weights: the file, or the first of several."""
    if weights.name == GGUF_FILE:
        file = read_gguf(weights)
        return file.parameters, "+".join(DTYPE_NAMES.get(kind, kind) for kind in file.types)
    sizes = [(name, each.dtype, math.prod(each.shape)) for name, each in stored.items()]
    if weights.name == HEAD_WEIGHTS:
        found = read_tensors(weights).items()
        sizes = [(name, str(tensor.dtype).removeprefix("torch."), tensor.numel()) for name, tensor in found]
    counts: Counter[str] = Counter()
    for name, dtype, size in sizes:
        if name not in HEAD_MAPS:
            counts[dtype] += size
    if other := [dtype for dtype, _ in counts.most_common(1) if not dtype.upper().startswith(("F", "BF"))]:
        raise UserError(
            f"{weights}: most of the weights are no floating-point numbers ({other[0]}); quantised ones are not run "
            "here: take the model as it was before"
        )
    names = [DTYPE_NAMES.get(dtype, dtype.lower()) for dtype, _ in counts.most_common()]
    return counts.total(), "+".join(names)
