"""Heads that draft from the target's hidden states: published layouts, every engine, bad files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from gguf_files import write_gguf
from specsplit.decoding.tree import ROOT, TokenTree
from specsplit.engines.gpu_head import GpuHead
from specsplit.engines.head_module import HeadModule, load_head, save_head
from specsplit.engines.hidden_states import HiddenStatesHead
from specsplit.engines.loading import load_model
from specsplit.engines.numba_head import FusedHead, unsuitable_head
from specsplit.engines.passes import Pass
from specsplit.engines.transformers import CausalLM
from specsplit.errors import UserError
from specsplit.models.head_config import default_layers, read_head_config
from specsplit.models.head_files import head_shapes, read_head
from specsplit.models.sources import prepare_model, resolve_model
from specsplit.models.vocabulary import load_vocabulary, read_reduced_map
from specsplit.settings.worker import DraftWorkerConfig, TargetWorkerConfig

from heads import HIDDEN, ROWS, VOCAB, PlainHead, head_config, head_tensors, write_head
from tiny_models import make_tiny_model, make_tokenizer

TOKENS = [5, 9, 33, 71, 12, 90, 44]
TREE = TokenTree([5, 6, 7, 8, 9], [ROOT, ROOT, 0, 1, 3], [-1.0] * 5)
PATHS = [[], [5], [6], [5, 7], [6, 8], [6, 8, 9]]
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "original": ("original", {}),
    "pickled": ("original", {"pickled": True}),
    "original-norms": ("original", {"fc_norm": True, "norm_output": True}),
    "speculators": ("speculators", {}),
    "speculators-qwen3": ("speculators", {"model_type": "qwen3", "fc_norm": True, "attention_bias": False}),
    "specforge-qwen2": ("original", {"model_type": "qwen2", "eagle_config": {"use_aux_hidden_state": True}}),
    "speculators-layers": ("speculators", {"model_type": "qwen3", "num_hidden_layers": 3, "norm_output": True}),
    "config-of-the-target": ("original", {"num_hidden_layers": 40}),
    "speculators-norms": ("speculators", {"norm_before_fc": True, "norm_output": True, "norm_before_residual": False}),
}


def raw_states(count: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, 3 * HIDDEN, generator=torch.Generator().manual_seed(seed))


def eager(folder: Path) -> HiddenStatesHead:
    return HiddenStatesHead.load(folder)


def fused(folder: Path) -> FusedHead:
    return FusedHead(eager(folder), threads=2)


def graphs(folder: Path) -> GpuHead:
    return GpuHead(eager(folder))


ENGINES: dict[str, Callable[[Path], Any]] = {"eager": eager, "fused": fused, "graphs": graphs}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_published_head_drafts_as_published(variant: str, engine: str, tmp_path: Path) -> None:
    """A prompt, a tree, and rounds in which the target corrects what the head read of itself."""
    layout, changes = VARIANTS[variant]
    tensors = head_tensors(layers=changes.get("num_hidden_layers", 1) if layout == "speculators" else 1)
    plain = PlainHead(tensors, write_head(tmp_path, layout, tensors, **changes))
    head = ENGINES[engine](tmp_path)
    module = HeadModule(read_head(tmp_path)[0])
    assert head_shapes(module.config) == {name: tuple(value.shape) for name, value in module.named_parameters()}
    assert (head.vocab_size, head.hidden_size, head.state_size) == (ROWS, HIDDEN, HIDDEN)
    raw = raw_states(12)
    states = head.project(raw)
    torch.testing.assert_close(states, plain.project(raw), rtol=1e-4, atol=1e-4)

    def check(rows: torch.Tensor, known: int, paths: list[list[int]]) -> None:
        for row, path in zip(rows, paths, strict=True):
            text = TOKENS[:known] + path
            torch.testing.assert_close(row, plain.read(text, states[:known])[0], rtol=1e-3, atol=1e-3)

    cache = head.new_cache(64)
    check(head.step(cache, TOKENS[:4], TREE, states=states[:4]), 4, PATHS)
    cache.keep(4, [1, 3])  # the drafted 6 and 8 are kept with the head's own states, and the next token drafted
    check(head.step(cache, (), TokenTree([70], [ROOT], [-1.0])), 4, [[6, 8, 70]])
    cache.rollback(4)  # the target has run them meanwhile: they are read again with true states
    check(head.step(cache, TOKENS[4:6], TREE, states=states[4:6]), 6, PATHS)
    cache.rollback(6)
    check(head.step(cache, TOKENS[6:7]), 6, [TOKENS[6:7]])  # a token whose state has not come


@pytest.mark.parametrize("engine", ENGINES)
def test_sessions_share_a_pass(engine: str, tmp_path: Path) -> None:
    write_head(tmp_path, "original", head_tensors())
    head = ENGINES[engine](tmp_path)
    states = head.project(raw_states(7))

    def work(count: int) -> Pass:
        cache = head.new_cache(64)
        head.step(cache, TOKENS[:1], states=states[:1])
        return Pass(cache, TOKENS[1:count], TREE, states=states[1:count])

    alone = [head.step_many([work(count)])[0] for count in (2, 4, 7)]
    together = head.step_many([work(count) for count in (2, 4, 7)])
    for a, b in zip(alone, together, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0 if engine == "fused" else 1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_the_types_of_weights(dtype: str, tmp_path: Path) -> None:
    """Against the plain computation in float32 with the very weights that are stored, rounded as they are."""
    config = write_head(tmp_path, "speculators", head_tensors(), norm_output=True)
    source = HiddenStatesHead.load(tmp_path, dtype=dtype)
    stored = {name: tensor.detach().float() for name, tensor in source.module.state_dict().items()}
    for name in [name for name in stored if name.endswith(".scale")]:
        stored[name.replace(".scale", ".weight")] *= stored.pop(name)[:, None]
    plain, head = PlainHead(stored, config), FusedHead(source, threads=2)
    states = head.project(raw_states(7))
    torch.testing.assert_close(states, plain.project(raw_states(7)), rtol=1e-3, atol=1e-3)
    found = head.step(head.new_cache(32), TOKENS, TREE, states=states)
    for row, path in zip(found, PATHS, strict=True):
        torch.testing.assert_close(row, plain.read(TOKENS + path, states)[0], rtol=1e-3, atol=1e-2)


def test_biases_of_attention(tmp_path: Path) -> None:
    tensors = head_tensors(bias=True)
    plain = PlainHead(tensors, write_head(tmp_path, "original", tensors, attention_bias=True))
    head = eager(tmp_path)
    assert set(head_shapes(head.module.config)) == set(dict(head.module.named_parameters()))
    states = head.project(raw_states(7))
    found = head.step(head.new_cache(32), TOKENS, states=states)[0]
    torch.testing.assert_close(found, plain.read(TOKENS, states)[0], rtol=1e-3, atol=1e-3)
    assert "biases" in str(unsuitable_head(head))


def test_the_first_token_wants_a_state(tmp_path: Path) -> None:
    write_head(tmp_path, "original", head_tensors())
    head = eager(tmp_path)
    with pytest.raises(ValueError, match="no state before it"):
        head.step(head.new_cache(8), [3])
    with pytest.raises(ValueError, match="1 states for 2 tokens"):
        head.step(head.new_cache(8), [3, 4], states=torch.zeros(1, HIDDEN))


def test_what_is_saved_is_read_again(tmp_path: Path) -> None:
    changes = {"fc_norm": True, "model_type": "qwen3", "num_hidden_layers": 2}
    write_head(tmp_path / "a", "speculators", head_tensors(layers=2), **changes)
    head = load_head(tmp_path / "a", torch.float32)
    save_head(head, tmp_path / "b", torch.float32, with_embedding=True)
    again = load_head(tmp_path / "b", torch.float32)
    assert again.config.layers == (0, 1, 2)
    assert (again.config.qk_norm, len(again.decoder_layers)) == (True, 2)
    for name, tensor in head.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert read_reduced_map(tmp_path / "a") == read_reduced_map(tmp_path / "b")


LAYER_IDS: list[tuple[dict[str, Any], tuple[int, ...] | None]] = [
    ({}, None),
    ({"eagle_aux_hidden_state_layer_ids": None}, None),
    ({"eagle_aux_hidden_state_layer_ids": [1, 15, 28]}, (1, 15, 28)),
    ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": []}}, None),
    ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 15, 28]}}, (2, 16, 29)),  # outputs are counted
    ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [2, 30, 58]}}, (2, 30, 58)),
]


@pytest.mark.parametrize(("keys", "layers"), LAYER_IDS)
def test_layers_of_a_target(keys: dict[str, Any], layers: tuple[int, ...] | None, tmp_path: Path) -> None:
    assert default_layers(32) == (2, 16, 29)
    (tmp_path / "config.json").write_text(json.dumps({**head_config("original"), **keys}))
    assert read_head_config(tmp_path).layers == layers


SPECULATORS_BAD = {
    "another layer": ({"transformer_layer_config": {"model_type": "deepseek_v3"}}, "model_type 'deepseek_v3'"),
    "no layer": ({"transformer_layer_config": None}, "transformer_layer_config is missing"),
    "a choice that readers make differently": ({"norm_before_residual": None}, "norm_before_residual is missing"),
}


@pytest.mark.parametrize("bad", SPECULATORS_BAD)
def test_a_bad_configuration_of_speculators(bad: str, tmp_path: Path) -> None:
    changes, message = SPECULATORS_BAD[bad]
    (tmp_path / "config.json").write_text(json.dumps({**head_config("speculators"), **changes}))
    with pytest.raises(UserError, match=message):
        read_head_config(tmp_path)


def test_what_speculators_leaves_out_is_as_its_type_has_it(tmp_path: Path) -> None:
    config = head_config("speculators") | {"transformer_layer_config": {"model_type": "qwen3", "hidden_size": 2048}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = read_head_config(tmp_path)
    assert (found.qk_norm, found.layer.head_dim, found.layer.vocab_size) == (True, 128, 151936)


# ---- as a worker's model


def target_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "target"
    make_tiny_model("llama").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def without(tensors: dict[str, torch.Tensor], *names: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name not in names}


@pytest.mark.parametrize("pickled", [False, True])
def test_a_draft_worker_takes_what_a_head_lacks_from_the_target(pickled: bool, tmp_path: Path) -> None:
    target, folder = target_folder(tmp_path), tmp_path / "head"
    write_head(folder, "original", without(head_tensors(), "embed_tokens.weight"), pickled=pickled)
    manifest = prepare_model({"source": "local", "path": str(folder)}, "head", tmp_path / "prepared")
    assert manifest["fingerprint"]["vocab_size"] == VOCAB
    assert manifest["fingerprint"]["tokenizer_sha256"] == ""
    assert manifest["fingerprint"]["parameters"] == manifest_parameters(folder)
    config = DraftWorkerConfig(model=tmp_path / "prepared", dtype="float32", device="cpu", target_tokenizer=target)
    model, identity = load_model(*resolve_model(config.model), config)
    assert identity["parameters"] == model.parameters > 0
    assert model.vocab_size == ROWS
    vocabulary = load_vocabulary(folder, target, model.vocab_size)
    d2t = head_tensors()["d2t"]
    wide = vocabulary.outward(torch.arange(ROWS).float()[None])[0]
    assert wide.shape == (VOCAB,)
    assert wide.argmax() == ROWS - 1 + d2t[-1]
    with pytest.raises(UserError, match="head that drafts from the hidden states"):
        load_model(*resolve_model(folder), TargetWorkerConfig(model=folder))
    with pytest.raises(UserError, match="not a model of its own"):
        CausalLM.load(folder)
    with pytest.raises(UserError, match="target_tokenizer"):
        load_model(*resolve_model(folder), DraftWorkerConfig(model=folder))


CANNOT: dict[str, tuple[dict[str, Any], str, str]] = {
    "int8": ({}, "int8", "its linear layers are not plain ones"),
    "activation": ({"hidden_act": "gelu"}, "bfloat16", "its activation is gelu"),
}


@pytest.mark.parametrize("case", CANNOT)
def test_a_head_that_the_engine_for_gpus_cannot_run(
    case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, dtype, reason = CANNOT[case]
    caplog.set_level("INFO")
    write_head(tmp_path, "original", head_tensors(), **changes)
    make_tokenizer().save_pretrained(tmp_path)
    given: dict[str, Any] = {"model": tmp_path, "dtype": dtype, "device": "cpu"}
    with pytest.raises(UserError, match=f"engine graphs cannot run {tmp_path}: {reason}. Use engine auto"):
        load_model(*resolve_model(tmp_path), DraftWorkerConfig(**given, engine="graphs"))
    head = HiddenStatesHead.load(tmp_path, dtype=dtype)
    head.device = torch.device("cuda")  # where auto means graphs
    monkeypatch.setattr(HiddenStatesHead, "load", lambda *_, **__: head)
    assert load_model(*resolve_model(tmp_path), DraftWorkerConfig(**given))[0] is head
    assert f"engine transformers, as {reason}" in caplog.text


def manifest_parameters(folder: Path) -> int:
    path = folder / "model.safetensors"
    tensors = load_file(path) if path.is_file() else torch.load(folder / "pytorch_model.bin")
    return sum(tensor.numel() for name, tensor in tensors.items() if name not in ("d2t", "t2d"))


def cut(folder: Path) -> None:
    path = next(folder.glob("*.safetensors"), folder / "pytorch_model.bin")
    path.write_bytes(path.read_bytes()[:-50])


def changed(**tensors: torch.Tensor | None) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        own = load_file(folder / "model.safetensors")
        for name, tensor in tensors.items():
            own.pop(name, None)
            if tensor is not None:
                own[name] = tensor
        save_file(own, folder / "model.safetensors")

    return change


def config_with(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


D2T = head_tensors()["d2t"]
BAD = {
    "a tensor is missing": (changed(**{"midlayer.hidden_norm.weight": None}), "midlayer.hidden_norm.weight is missing"),
    "one too many": (changed(mask_hidden=torch.zeros(1)), "mask_hidden has no place"),
    "a norm that no flag asks for": (
        changed(**{"input_norm.weight": torch.ones(96)}),
        "input_norm.weight has no place",
    ),
    "other shape": (changed(**{"fc.weight": torch.zeros(32, 64)}), r"fc.weight has shape \[32, 64\]"),
    "no map": (changed(d2t=None), "d2t is missing, although draft_vocab_size 40"),
    "map of another size": (changed(d2t=D2T[:-1].clone()), "d2t is .39. of int64; wanted 40"),
    "map out of range": (changed(d2t=D2T + 100), "d2t names token .*; the target has 0 to 127"),
    "map names one twice": (changed(d2t=-torch.arange(ROWS)), "d2t names a token twice"),
    "cut off": (cut, "not a readable safetensors file"),
    "no layers": (config_with(num_hidden_layers=0), "num_hidden_layers 0"),
    "a second layer": (changed(**{"layers.1.norm.weight": torch.zeros(1)}), "layers.1.norm.weight has no place"),
    "another kind": (config_with(speculators_model_type="dflash"), "speculators_model_type 'dflash'"),
    "another rotation": (config_with(partial_rotary_factor=0.5), "partial_rotary_factor 0.5"),
    "no hidden states": (config_with(eagle_config={"use_aux_hidden_state": False}), "use_aux_hidden_state False"),
    "layers that are none": (config_with(eagle_aux_hidden_state_layer_ids=[-1]), "eagle_aux_hidden_state_layer_ids"),
    "vocabulary": (config_with(draft_vocab_size=500), "draft_vocab_size 500 is more"),
    **{
        f"a huge {key}": (config_with(**{key: 10**9}), r" has shape \[.*\]; config.json says \[.*\d{9}")
        for key in ("hidden_size", "intermediate_size", "head_dim", "target_hidden_size")
    },
    "a huge vocabulary": (config_with(vocab_size=10**12, draft_vocab_size=10**12), r"says \[1000000000000, 32\]"),
    "layers without end": (config_with(num_hidden_layers=10**9), "a model of 1000000000 layers"),
    "biases that were left out": (config_with(attention_bias=True), "Only biases are: .*set attention_bias to false"),
    "not numbers": (config_with(hidden_size="x"), "not the configuration of a head"),
    "both norms": (config_with(norm_before_fc=True, fc_norm=True), "exclude each other"),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_head_is_refused_by_what_is_wrong(bad: str, tmp_path: Path) -> None:
    write_head(tmp_path, "original", head_tensors())
    change, message = BAD[bad]
    change(tmp_path)
    with pytest.raises(UserError, match=message) as refused:
        resolve_model(tmp_path)
    assert str(tmp_path) in str(refused.value)


def test_the_embedding_of_a_target_in_a_gguf_file(tmp_path: Path) -> None:
    write_head(tmp_path / "head", "original", without(head_tensors(), "embed_tokens.weight"), vocab_size=260)
    (tmp_path / "target").mkdir()
    path = tmp_path / "target" / "model.gguf"
    write_gguf(path, hidden=HIDDEN)
    head = load_head(tmp_path / "head", torch.float32, tmp_path / "target")
    stored = next(tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == "token_embd.weight")
    expected = gguf.quants.dequantize(stored.data, stored.tensor_type)
    assert torch.equal(head.embed_tokens.weight, torch.from_numpy(expected))


def test_a_head_of_another_target_is_refused(tmp_path: Path) -> None:
    target = target_folder(tmp_path)
    write_head(tmp_path / "head", "original", without(head_tensors(hidden=48), "embed_tokens.weight"), hidden_size=48,
               target_hidden_size=32)  # fmt: skip
    with pytest.raises(UserError, match=r"another target .* \[128, 32\] .* \[128, 48\]"):
        load_head(tmp_path / "head", torch.float32, target)
    assert read_head_config(tmp_path / "head").target_hidden_size == 32


class Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("ran"),))


@pytest.mark.parametrize("content", [None, {"fc.weight": Code()}, [torch.zeros(1)]], ids=["cut off", "code", "a list"])
def test_a_bad_pickle(content: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_head(tmp_path, "original", head_tensors(), pickled=True)
    cut(tmp_path) if content is None else torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin: (the weights cannot be read|wanted tensors by name)"):
        load_head(tmp_path, torch.float32)
    assert not (tmp_path / "ran").exists()
