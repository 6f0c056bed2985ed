"""Files of texts with the target's likeliest tokens at each position, and the manifest of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from specsplit.errors import UserError
from specsplit.io import combined_sha256, read_json_object, replacing, sha256_file, write_json

MANIFEST = "manifest.json"
POOL = 32  # batches
HEADER = "specsplit"
RECIPE = "recipe_sha256"  # in the header of a shard: hash of the settings that it was written with


@dataclass(frozen=True)
class Text:
    """A prompt, in the chat template, with the answer to it.

    tokens: both. answer: where the answer begins. top_ids, top_log_probs: [len(tokens) - answer, k], the target's
    likeliest tokens, and their natural log-probabilities, at each token of the answer: after all tokens before it.
    states: [len(tokens) - 1, layers, hidden], the target's hidden states at all tokens but the last; None = not kept.
    """

    tokens: torch.Tensor
    answer: int
    top_ids: torch.Tensor
    top_log_probs: torch.Tensor
    states: torch.Tensor | None = None

    @property
    def answered(self) -> int:
        """Tokens of the answer: positions to learn from."""
        return len(self.tokens) - self.answer


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05}.safetensors"


def write_shard(path: Path, texts: Sequence[Text], header: Mapping[str, Any]) -> None:
    """Write texts, at least one; a reader sees the whole file or none. header: what shard_header says of it."""
    tensors = {
        "tokens": torch.cat([text.tokens for text in texts]).to(torch.int32),
        "lengths": torch.tensor([len(text.tokens) for text in texts], dtype=torch.int32),
        "answers": torch.tensor([text.answer for text in texts], dtype=torch.int32),
        "top_ids": torch.cat([text.top_ids for text in texts]).to(torch.int32),
        "top_log_probs": torch.cat([text.top_log_probs for text in texts]).to(torch.float16),
    }
    if states := [text.states for text in texts if text.states is not None]:
        tensors["states"] = torch.cat(states)
    # A single entry: several would be written in any order, and the same texts have to give the same bytes.
    replace_tensors(path, tensors, {HEADER: json.dumps(header, sort_keys=True)})


def replace_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file; a reader sees the old file or the new one."""
    with replacing(path) as part:
        save_file(tensors, part, metadata)
        part.chmod(0o644)  # safetensors makes it readable by its owner alone


def shard_header(path: Path) -> dict[str, Any]:
    """The header that write_shard was given; empty when there is no whole file."""
    try:
        with safe_open(path, framework="np") as shard:
            return dict(json.loads((shard.metadata() or {})[HEADER]))
    except (OSError, SafetensorError, KeyError, ValueError):
        return {}


def read_shard(path: Path) -> list[Text]:
    """The texts of a shard, on the CPU. Raises UserError when it is damaged."""
    try:
        tensors = load_file(path)
        lengths, answers = tensors["lengths"].tolist(), tensors["answers"].tolist()
        counts = [length - answer for length, answer in zip(lengths, answers, strict=True)]
        of_answers = [tensors[name].split(counts) for name in ("top_ids", "top_log_probs")]
        parts = [tensors["tokens"].split(lengths), answers, *of_answers]
        if "states" in tensors:  # mapped, so that their memory is the page cache's
            parts.append(tensors["states"].split([length - 1 for length in lengths]))
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: not a shard of training text ({error}); delete it and write it again") from None
    return [Text(*each) for each in zip(*parts, strict=True)]


def write_manifest(folder: Path, shards: Sequence[dict[str, Any]], about: dict[str, Any]) -> dict[str, Any]:
    """Write `manifest.json` of the shards, each {file, sha256, texts, tokens, answer_tokens}; returns it."""
    digest = combined_sha256({shard["file"]: shard["sha256"] for shard in shards})
    counts = {key: sum(shard[key] for shard in shards) for key in ("texts", "tokens", "answer_tokens")}
    manifest = {**about, "data_sha256": digest, **counts, "shards": list(shards)}
    write_json(folder / MANIFEST, manifest)
    return manifest


def describe_shard(path: Path, texts: Sequence[Text]) -> dict[str, Any]:
    """The entry of a shard in the manifest."""
    return {
        "file": path.name,
        "sha256": sha256_file(path),
        "texts": len(texts),
        "tokens": sum(len(text.tokens) for text in texts),
        "answer_tokens": sum(text.answered for text in texts),
    }


def read_texts(manifest_path: Path) -> tuple[dict[str, Any], list[Text]]:
    """The manifest and its texts, in order. Raises UserError when a shard is not the one that it names."""
    manifest = read_json_object(manifest_path)
    texts: list[Text] = []
    try:
        shards = [(manifest_path.parent / shard["file"], shard["sha256"]) for shard in manifest["shards"]]
    except (KeyError, TypeError):
        raise UserError(f"{manifest_path}: not a manifest of training text; write it by distill write-data") from None
    for path, digest in shards:
        if not path.is_file() or sha256_file(path) != digest:
            raise UserError(
                f"{path}: not the file that {manifest_path} names; delete both and write the text again "
                "(specsplit distill write-data goes on from the shards that are whole)"
            )
        texts += read_shard(path)
    return manifest, texts


def frequent_tokens(texts: Sequence[Text], size: int, vocab_size: int, always: Sequence[int]) -> list[int]:
    """The `size` tokens to keep of a vocabulary of `vocab_size`, the most frequent in `texts` first.

    Counted in answers, prompts included only to break ties; then the lower id comes first. always: tokens that are
    kept however rare, those that end a text.
    """
    answers, everywhere = (np.zeros(vocab_size, np.int64) for _ in range(2))
    for text in texts:
        tokens = text.tokens.numpy()
        np.add.at(answers, tokens[text.answer :], 1)
        np.add.at(everywhere, tokens, 1)
    order = np.lexsort((np.arange(vocab_size), -everywhere, -answers)).tolist()
    others = [token for token in order if token not in always]
    kept = {*always, *others[: size - len(set(always))]}
    return [token for token in order if token in kept]


def batches(lengths: Sequence[int], size: int, seed: int, epoch: int) -> Iterator[list[int]]:
    """Indices of every text once, in batches of texts of about the same length, in the order of one epoch.

    Texts are shuffled, sorted by length within pools of POOL batches, cut into batches, and the batches shuffled:
    little padding, and an order that is nearly random. The last batch of a pool may be smaller.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths)).tolist()
    found: list[list[int]] = []
    for start in range(0, len(order), POOL * size):
        pool = sorted(order[start : start + POOL * size], key=lambda index: lengths[index])
        found += [pool[i : i + size] for i in range(0, len(pool), size)]
    for index in rng.permutation(len(found)).tolist():
        yield found[index]
