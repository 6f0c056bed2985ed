"""Models without weights of their own, which are parameters and a tokenizer: a simulated one, and lookups.

They are prepared into folders like other models, so that workers, workflow and record treat them alike. The hash of the
parameters takes the place of the hash of the weights.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from specsplit.errors import UserError, naming
from specsplit.io import json_sha256, read_json_object
from specsplit.models.file_names import TOKENIZER_EXTRAS, TOKENIZER_FILES, matches
from specsplit.models.fingerprint import check_tokenizer, fingerprint_model, read_config
from specsplit.models.head_config import is_head
from specsplit.settings.models import BYTES, SOURCES, LookupParameters, SuffixParameters, SyntheticParameters

Weightless = SyntheticParameters | LookupParameters


def is_weightless(spec: Mapping[str, Any]) -> bool:
    """Whether a source spec (an entry of `models`, or `source` of a manifest) is one of these."""
    return issubclass(SOURCES.get(str(spec.get("source")), BaseModel), Weightless)


def parse_parameters(spec: Mapping[str, Any], name: str) -> Any:
    """A source spec as one of settings.models.SOURCES, defaults filled in. UserError with a line for each mistake."""
    if (source := spec.get("source")) not in SOURCES:
        raise UserError(f"models.{name}.source: {source!r} is not one of {', '.join(SOURCES)}")
    try:
        return SOURCES[source](**spec)
    except ValidationError as error:
        lines = [
            f"{'.'.join(['models', name, *map(str, problem['loc'])])}: {problem['msg'].removeprefix('Value error, ')}"
            for problem in error.errors()
        ]
        raise UserError("\n".join(lines)) from None


def parameters_sha256(parameters: Weightless) -> str:
    """Identity of the model: what decides its answers and its time. The tokenizer has a hash of its own; of the model
    that a suffix draft asks, the weights count."""
    plain = parameters.model_dump(exclude={"tokenizer"})
    if isinstance(parameters, SuffixParameters) and parameters.model:
        plain["model"] = model_behind(parameters.model)[1]["weights_sha256"]
    return json_sha256(plain)


def model_behind(path: str) -> tuple[Path, dict[str, Any]]:
    """The folder and the fingerprint of the model that a suffix draft asks. Raises UserError when there is none."""
    folder, manifest = described(path)
    if manifest and is_weightless(manifest["source"]) and manifest["source"]["source"] != "synthetic":
        raise UserError(f"{path} has no weights: name a model that can draft by itself")
    if is_head(folder):
        raise UserError(f"{path} reads the target's hidden states: name a model that drafts from the text alone")
    return folder, manifest["fingerprint"] if manifest else fingerprint_model(folder)


def write_tokenizer(parameters: Weightless, name: str, folder: Path) -> None:
    """Put the tokenizer files of the model into `folder`."""
    if isinstance(parameters, SyntheticParameters):
        byte_tokenizer(parameters.vocab_size).save_pretrained(folder)
        return
    source, _ = described(parameters.tokenizer)
    with naming(f"models.{name}.tokenizer"):
        check_tokenizer(source)
    # config.json as well: for some tokenizers, the kind is told only there.
    for path in sorted(source.iterdir()):
        if matches(path.name, (*TOKENIZER_FILES, *TOKENIZER_EXTRAS, "config.json")):
            shutil.copyfile(path, folder / path.name)


def byte_tokenizer(vocab_size: int = BYTES) -> Any:
    """A tokenizer whose token ids below 256 are the bytes of UTF-8 text; those above stand for nothing.

    No special tokens, no chat template.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from specsplit.models.vocabulary import BYTE_OF

    words = BYTE_OF | {f"<unused{i}>": i for i in range(BYTES, vocab_size)}
    backend = Tokenizer(models.BPE(vocab=words, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def described(model_or_folder: str) -> tuple[Path, dict[str, Any]]:
    """The folder with the files of a model, and its manifest; empty when that is a plain folder."""
    path = Path(model_or_folder).expanduser()
    model = path.parent if path.name == "model.json" else path
    if not (model / "model.json").is_file():
        return model, {}
    manifest = read_json_object(model / "model.json")
    elsewhere = manifest.get("path", ".")
    return (model if elsewhere == "." else Path(elsewhere)), manifest


def fingerprint_weightless(parameters: Weightless, folder: Path) -> dict[str, Any]:
    """What fingerprint_model says of a model with weights, for one prepared in `folder` from `parameters`."""
    from specsplit.models.tokenizer import TextCodec

    codec = TextCodec.load(folder)
    if isinstance(parameters, SyntheticParameters):
        vocab_size = parameters.vocab_size
    else:
        vocab_size = _vocab_size(parameters, codec.tokenizer)
    if isinstance(parameters, SuffixParameters) and (path := parameters.model):
        behind = model_behind(path)[1]
        if behind["tokenizer_sha256"] != codec.sha256:
            raise UserError(f"its model {path} has another tokenizer than the one whose tokens it speaks")
        if behind["vocab_size"] < vocab_size:
            raise UserError(f"its model {path} reads {behind['vocab_size']} tokens, and it speaks {vocab_size}")
    return {
        "weights_sha256": parameters_sha256(parameters),
        "tokenizer_sha256": codec.sha256,
        "parameters": 0,
        "dtype": "float32",  # of its logits
        "architecture": parameters.architecture,
        "vocab_size": vocab_size,
        "max_context": None,
    }


def _vocab_size(parameters: LookupParameters, tokenizer: Any) -> int:
    """Tokens that the model it drafts for may write: rows of its output head, often more than its tokenizer has."""
    folder, manifest = described(parameters.tokenizer)
    if manifest:
        return int(manifest["fingerprint"]["vocab_size"])
    if not (folder / "config.json").is_file():
        return len(tokenizer)
    return int(read_config(folder).get_text_config().vocab_size)
