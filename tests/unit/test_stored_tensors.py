"""The tensors of a folder are compared with its config.json from the headers alone, before anything is loaded.

Every architecture of tests/unit/test_identity.py passes there as it was saved.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from specsplit.errors import UserError
from specsplit.models.fingerprint import fingerprint_model

from tiny_models import make_tiny_model, make_tokenizer

Tensors = dict[str, torch.Tensor]
INDEX = "model.safetensors.index.json"
Q, UP = "model.layers.1.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.layers.1.input_layernorm.weight"


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    make_tiny_model("llama").save_pretrained(folder, max_shard_size="40KB")
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(sharded: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    return Path(shutil.copytree(sharded, tmp_path / "model"))


def shard(folder: Path, name: str) -> Path:
    """The file that holds a tensor."""
    return folder / str(json.loads((folder / INDEX).read_text())["weight_map"][name])


def change(path: Path, make: Callable[[Tensors], object]) -> None:
    """Change the tensors of a file in place."""
    tensors = load_file(path)
    make(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})


def config(folder: Path, **keys: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def indexed(folder: Path, name: str, file: str | None) -> None:
    """Have the index name another file for a tensor; None: none."""
    content = json.loads((folder / INDEX).read_text())
    content["weight_map"][name] = file
    content["weight_map"] = {key: value for key, value in content["weight_map"].items() if value is not None}
    (folder / INDEX).write_text(json.dumps(content))


def put(name: str, tensor: torch.Tensor) -> Callable[[Path], None]:
    """Another tensor of that name in its file; of a new one in the file of Q."""
    return lambda folder: change(
        shard(folder, name if name in (Q, UP, EMBEDDING, HEAD, NORM) else Q), lambda t: t.update({name: tensor})
    )


def dropped(name: str) -> Callable[[Path], None]:
    return lambda folder: change(shard(folder, name), lambda tensors: tensors.pop(name))


def both(*changes: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda folder: [one(folder) for one in changes] and None


# What is still a model: nothing is refused that runs.
TAKEN: dict[str, Callable[[Path], None]] = {
    "as it was saved": lambda folder: None,
    "frequencies of the rotary embedding": put("model.layers.1.self_attn.rotary_emb.inv_freq", torch.ones(4)),
    "masks as buffers": put("model.layers.1.self_attn.masked_bias", torch.ones(1)),
    "a tensor of no part": put("vision_tower.patch.weight", torch.ones(2, 2)),
    "a tied head that is not stored": both(dropped(HEAD), lambda folder: config(folder, tie_word_embeddings=True)),
    "a tied head that is stored": lambda folder: config(folder, tie_word_embeddings=True),
    "an index with the tensor in another shard": lambda folder: indexed(folder, Q, shard(folder, EMBEDDING).name),
    "a padded vocabulary": both(
        put(EMBEDDING, torch.ones(160, 32)),
        put(HEAD, torch.ones(160, 32)),
        lambda folder: config(folder, vocab_size=160),
    ),
    "half precision": put(Q, torch.ones(32, 32, dtype=torch.float16)),
}
REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "a tensor missing": (dropped(Q), rf"incomplete, 1 missing and the first {Q}, which {INDEX} places in model-\d"),
    "a shard that the index does not name": (
        lambda folder: [indexed(folder, name, None) for name in load_file(shard(folder, Q))] and None,
        "incomplete, .* missing and the first model",
    ),
    "another shape": (
        put(Q, torch.ones(32, 31)),
        rf"{Q} \(in model-\d.* has the shape \(32, 31\) there, and \(32, 32\)",
    ),
    "a matrix turned": (put(UP, torch.ones(32, 48)), rf"{UP} .* has the shape \(32, 48\) there, and \(48, 32\)"),
    "a number": (put(NORM, torch.ones(())), rf"{NORM} .* has the shape \(\) there"),
    "nothing within": (put(NORM, torch.ones(0)), rf"{NORM} .* has the shape \(0,\) there"),
    "a longer vocabulary": (put(EMBEDDING, torch.ones(160, 32)), rf"{EMBEDDING} .* has the shape \(160, 32\)"),
    "no head": (dropped(HEAD), f"incomplete, 1 missing and the first {HEAD}"),
    "a layer more": (
        lambda folder: config(folder, num_hidden_layers=4),
        "incomplete, 9 missing and the first model.la",
    ),
    "a layer less": (lambda folder: config(folder, num_hidden_layers=2), "they hold model.layers.2.* leaves out"),
    "fewer heads of keys": (lambda folder: config(folder, num_key_value_heads=1), "k_proj.weight .*\\(16, 32\\) there"),
    "another architecture": (lambda folder: config(folder, model_type="qwen3"), "incomplete, 6 missing.*k_norm.weight"),
    "a bias too many": (put(Q.replace("weight", "bias"), torch.ones(32)), "they hold .*q_proj.bias .in model-"),
    "scales": (put(Q.replace("weight", "weight_scale_inv"), torch.ones(1)), "weight_scale_inv .in model-.*quantised"),
    "four bits": (
        both(dropped(Q), put(Q.replace("weight", "qweight"), torch.ones(4, 32, dtype=torch.int32))),
        "q_proj.qweight .*quantised",
    ),
    "a tensor in two shards": (
        lambda folder: change(shard(folder, EMBEDDING), lambda tensors: tensors.update({Q: torch.ones(32, 32)})),
        f"{Q} stands here and in model-.*fetch all of them again",
    ),
    "a shard of another size": (
        lambda folder: change(shard(folder, Q), lambda tensors: tensors.update({Q: torch.ones(64, 64)})),
        r"has the shape \(64, 64\)",
    ),
}


@pytest.mark.parametrize("name", TAKEN)
def test_what_is_a_model_is_taken(folder: Path, name: str) -> None:
    TAKEN[name](folder)
    assert fingerprint_model(folder)["architecture"] == "LlamaForCausalLM"


@pytest.mark.parametrize("name", REFUSED)
def test_tensors_that_are_not_those_of_the_configuration_are_named(folder: Path, name: str) -> None:
    make, said = REFUSED[name]
    make(folder)
    with pytest.raises(UserError, match=said) as refused:
        fingerprint_model(folder)
    assert str(folder) in str(refused.value)
