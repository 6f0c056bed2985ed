"""The model behind four operations, for every architecture."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from specsplit.decoding.tree import TokenTree
from specsplit.engines.cuda_graphs import GraphLM
from specsplit.engines.kv_cache import KVCache
from specsplit.engines.transformers import CausalLM
from specsplit.errors import UserError

from tiny_models import ARCHITECTURES, COMMON, SMALL, make_tiny_model, random_model

PROMPT = [5, 9, 33, 71, 12, 90, 44, 8, 101, 63, 27]


@pytest.mark.parametrize("engine", [CausalLM, GraphLM])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_are_those_of_transformers(architecture, engine):
    model = make_tiny_model(architecture)
    ours = engine(model)
    cache = ours.new_cache(64)
    with torch.inference_mode():
        expected = model(torch.tensor([PROMPT])).logits[0]
    for i, token in enumerate(PROMPT):
        torch.testing.assert_close(ours.step(cache, [token])[0], expected[i], rtol=1e-4, atol=1e-3)
    cache.rollback(0)
    torch.testing.assert_close(ours.step(cache, PROMPT)[0], expected[-1], rtol=1e-4, atol=1e-3)
    cache.rollback(3)
    chain = ours.step(cache, PROMPT[3:5], TokenTree.chain(PROMPT[5:]))
    torch.testing.assert_close(chain, expected[4:], rtol=1e-4, atol=1e-3)


# Beyond those of every test: other attention, other norms, experts, learned positions, logits with a soft cap.
OTHERS = {
    "gemma2": transformers.Gemma2Config(**SMALL, sliding_window=8),
    "phi3": transformers.Phi3Config(**{**SMALL, "num_key_value_heads": 4, "sliding_window": 8}),
    "mixtral": transformers.MixtralConfig(**SMALL, num_local_experts=4, sliding_window=8),
    "gpt_neox": transformers.GPTNeoXConfig(**SMALL),
    "opt": transformers.OPTConfig(**COMMON, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4),
    "gptj": transformers.GPTJConfig(**COMMON, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=256),
    # A window that the architecture does not know is ignored, as transformers does.
    "llama, stray window": transformers.LlamaConfig(**SMALL, sliding_window=4),
}


@pytest.mark.parametrize("engine", [CausalLM, GraphLM])
@pytest.mark.parametrize("name", OTHERS)
def test_a_tree_after_a_cached_prompt(name, engine):
    model = random_model(OTHERS[name])
    ours = engine(model)
    ours.check_tree_attention()
    cache = ours.new_cache(64)
    ours.step(cache, PROMPT[:7])
    tree = TokenTree([5, 6, 7, 8, 9], [-1, -1, 0, 1, 3], [-1.0] * 5)
    found = ours.step(cache, PROMPT[7:], tree)
    with torch.inference_mode():
        for row, path in enumerate([[], [5], [6], [5, 7], [6, 8], [6, 8, 9]]):
            expected = model(torch.tensor([PROMPT + path])).logits[0, -1]
            torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-3)


LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0, 3.0, 2.0, 2.0]}
LIMITED = {
    "llama4": transformers.Llama4TextConfig(
        **SMALL, attention_chunk_size=16, num_local_experts=2, intermediate_size_mlp=48
    ),
    "gpt_neo": transformers.GPTNeoConfig(
        **COMMON, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=16
    ),
    "phi3": transformers.Phi3Config(
        **{**SMALL, "num_key_value_heads": 4}, original_max_position_embeddings=16, rope_parameters=LONGROPE
    ),
}


@pytest.mark.parametrize("name", LIMITED)
def test_the_context_ends_where_a_cached_token_would_change(name):
    """Right up to max_context, wrong beyond it: so the limit is needed and no lower than it must be."""
    model = random_model(LIMITED[name])
    ours = CausalLM(model)
    assert ours.max_context == 16

    def distance(length: int) -> float:
        tokens = list(range(20, 20 + length))
        cache = ours.new_cache(40)
        ours.step(cache, tokens[:8])
        # One wrong turn, then the right path, which takes a place more in the cache.
        found = ours.step(cache, tokens[8 : length - 3], TokenTree([5, *tokens[-3:]], [-1, -1, 1, 2], [-1.0] * 4))[-1]
        with torch.inference_mode():
            expected = model(torch.tensor([tokens])).logits[0, -1]
        return float((found - expected).norm() / expected.norm())

    assert distance(15) < 1e-4
    assert distance(24) > 1e-2


@pytest.mark.parametrize("engine", [CausalLM, GraphLM])
@pytest.mark.parametrize("architecture", ["llama", "mistral"])
@pytest.mark.parametrize("length", [3, 4, 5, 8, 9, 12])
def test_long_prompts_are_fed_in_chunks(monkeypatch, architecture, length, engine):
    model = engine(make_tiny_model(architecture))
    tokens = list(range(10, 10 + length))
    tree = TokenTree([3, 4, 5], [-1, -1, 0], [-1.0] * 3)
    expected = model.step(model.new_cache(64), tokens, tree)
    monkeypatch.setattr("specsplit.engines.transformers.PREFILL_CHUNK", 4)
    cache = model.new_cache(64)
    torch.testing.assert_close(model.step(cache, tokens, tree), expected, rtol=1e-4, atol=1e-3)
    assert cache.length == length + 3


def test_the_cache_is_allocated_once_and_bounded():
    model = CausalLM(make_tiny_model("llama"))
    cache = model.new_cache(16)
    model.step(cache, [5, 6])
    before = [layer.keys.data_ptr() for layer in cache.layers]
    size = cache.nbytes()
    model.step(cache, [7, 8], TokenTree.chain([9, 10]))
    cache.keep(4, [0])
    assert [layer.keys.data_ptr() for layer in cache.layers] == before
    assert cache.nbytes() == size == 3 * 2 * 2 * 16 * 8 * 4  # layers, keys and values, heads, slots, dimension, bytes
    with pytest.raises(ValueError, match="exceed the cache of 16"):
        model.step(cache, list(range(12)))
    with pytest.raises(ValueError, match="at least one token"):
        model.step(cache, [])


@pytest.mark.parametrize("length", [-1, 3])
def test_rollback_only_to_what_is_held(length):
    cache = KVCache(1, 8)
    cache.advance(2)
    with pytest.raises(ValueError, match=f"roll back to {length}"):
        cache.rollback(length)


@pytest.mark.parametrize(
    ("context", "path", "message"),
    [
        (1, [1, 1], "must increase"),
        (1, [2, 1], "must increase"),
        (1, [-1, 0], "must increase"),
        (1, [3], "beyond"),
        (5, [], "beyond"),
        (-1, [], "cannot keep -1"),
    ],
)
def test_keep_checks_the_path(context, path, message):
    cache = KVCache(1, 8)
    cache.advance(4)
    with pytest.raises(ValueError, match=message):
        cache.keep(context, path)
    assert cache.length == 4


def filled_cache(layers: int, length: int) -> KVCache:
    """Every key and value is the number of its slot."""
    cache = KVCache(layers, 16)
    slots = torch.arange(float(length)).view(1, 1, length, 1)
    for layer in cache.layers:
        layer.update(slots, slots)
    cache.advance(length)
    return cache


@pytest.mark.parametrize("path", [[], [0], [0, 1], [1, 2, 3], [0, 2, 3], [4, 5], [0, 5], [1, 3, 5]])
def test_keep_moves_the_path_behind_the_context(path):
    cache = filled_cache(2, 9)
    cache.keep(3, path)
    expected = [0, 1, 2, *(3 + node for node in path)]
    assert cache.length == len(expected)
    for layer in cache.layers:
        assert layer.keys[0, 0, : cache.length, 0].tolist() == expected
        assert layer.values[0, 0, : cache.length, 0].tolist() == expected


def test_keep_that_fails_half_way_keeps_the_context_only(monkeypatch):
    cache = filled_cache(2, 9)
    monkeypatch.setattr(cache.layers[1], "keys", None)  # the first layer has been moved by then
    with pytest.raises(AttributeError):
        cache.keep(3, [1, 3])
    assert cache.length == 3


def test_the_cache_holds_one_sequence():
    with pytest.raises(ValueError, match="a batch of 2"):
        KVCache(1, 8).layers[0].update(torch.zeros(2, 1, 1, 4), torch.zeros(2, 1, 1, 4))


def test_a_pass_that_fails_leaves_the_cache_as_it_was(monkeypatch):
    model = CausalLM(make_tiny_model("llama"))
    cache = model.new_cache(32)
    model.step(cache, PROMPT[:5])
    layer = model.model.model.layers[1]
    original = layer.forward

    def broken(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(layer, "forward", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        model.step(cache, PROMPT[5:8])
    assert cache.length == 5
    monkeypatch.setattr(layer, "forward", original)
    expected = model.step(model.new_cache(32), PROMPT[:8])
    torch.testing.assert_close(model.step(cache, PROMPT[5:8]), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("skip", [[0], [1], [1, 2]])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_skipped_layers(architecture, skip, tiny_model_folder):
    """The model without some layers is the model made of the others; each stays full or sliding as it was."""
    model = make_tiny_model(architecture)
    skipped = CausalLM.load(tiny_model_folder(architecture), device="cpu", skip_layers=skip)
    assert skipped.num_layers == 3 - len(skip)
    full = CausalLM(model)
    layers = model.transformer.h if architecture == "gpt2" else model.model.layers
    # The full model with these layers passed over, without a cache.
    for number in skip:
        layers[number].forward = lambda hidden, *args, **kwargs: hidden
    with torch.inference_mode():
        expected = full.model(torch.tensor([PROMPT]), use_cache=False).logits[0, -1]
    torch.testing.assert_close(skipped.step(skipped.new_cache(32), PROMPT)[0], expected, rtol=1e-4, atol=1e-3)


def test_mistakes_are_named(tmp_path, tiny_model_folder):
    folder = tiny_model_folder("llama")
    with pytest.raises(UserError, match="dtype 'int3' is not one of"):
        CausalLM.load(folder, dtype="int3")
    with pytest.raises(UserError, match="device 'tpu' is not one of"):
        CausalLM.load(folder, device="tpu")
    with pytest.raises(UserError, match="cuda:99"):
        CausalLM.load(folder, device="cuda:99")
    with pytest.raises(UserError, match=r"skip_layers \[7\]: the model has layers 0 to 2"):
        CausalLM.load(folder, skip_layers=[7])
    with pytest.raises(UserError, match="one must remain"):
        CausalLM.load(folder, skip_layers=[0, 1, 2])
    with pytest.raises(UserError, match="no weights; expected model"):
        CausalLM.load(tmp_path)


def broken(folder: Path, to: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of a model folder with other weights."""
    shutil.copytree(folder, to)
    weights = load_file(to / "model.safetensors")
    change(weights)
    save_file(weights, to / "model.safetensors", {"format": "pt"})
    return to


def test_damaged_weights_are_refused(tmp_path, tiny_model_folder):
    folder, name = tiny_model_folder("llama"), "model.layers.1.mlp.up_proj.weight"
    # Else transformers would draw the missing ones at random, with a warning.
    with pytest.raises(UserError, match=f"incomplete, 1 missing and the first {name}"):
        CausalLM.load(broken(folder, tmp_path / "missing", lambda weights: weights.pop(name)))
    with pytest.raises(UserError, match=rf"shape: config.json is not .*: {name} has the shape \(2, 2\)"):
        CausalLM.load(broken(folder, tmp_path / "shape", lambda weights: weights.update({name: torch.zeros(2, 2)})))
    truncated = broken(folder, tmp_path / "truncated", lambda weights: None) / "model.safetensors"
    truncated.write_bytes(truncated.read_bytes()[:-100])
    with pytest.raises(UserError, match="truncated does not hold a model"):
        CausalLM.load(truncated.parent)


def test_only_folders_are_loaded(tmp_path, tiny_model_folder):
    with pytest.raises(UserError, match="no such folder"):
        CausalLM.load(Path("organisation/name"))
    pickled = tmp_path / "pickled"
    shutil.copytree(tiny_model_folder("llama"), pickled)
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    with pytest.raises(UserError, match="pickled: the weights are pickled"):
        CausalLM.load(pickled)


@pytest.mark.parametrize(
    "config",
    [
        transformers.MptConfig(**COMMON, d_model=32, n_heads=4, n_layers=2, max_seq_len=64),  # ALiBi by cache slot
        transformers.BloomConfig(**COMMON, hidden_size=32, n_head=4, n_layer=2),  # ALiBi from a mask of two dimensions
        transformers.BertConfig(  # looks ahead
            **COMMON, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
        ),
        transformers.Lfm2Config(**{**SMALL, "layer_types": ["conv", "full_attention", "conv"]}),
        transformers.RwkvConfig(**COMMON, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32),
    ],
    ids=lambda config: config.model_type,
)
def test_models_that_cannot_verify_trees_are_refused(config):
    model = CausalLM(random_model(config))
    with pytest.raises(UserError, match=f"{type(model.model).__name__} cannot verify trees"):
        model.check_tree_attention()


def test_models_that_cannot_roll_back_are_refused(tmp_path):
    config = transformers.MambaConfig(**COMMON, hidden_size=16, num_hidden_layers=1, state_size=4)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="Mamba"):
        CausalLM.load(tmp_path)


def test_half_precision_and_eos_ids(tiny_model_folder):
    model = CausalLM.load(tiny_model_folder("llama"), dtype="bfloat16", device="cpu")
    assert model.step(model.new_cache(8), [5, 6]).dtype == torch.bfloat16
    assert model.eos_token_ids == (2,)


@pytest.mark.parametrize("stored", ["full", "reduced", "tied"])
def test_a_reduced_output_head(tmp_path, tiny_model_folder, stored):
    """The rows of the map alone, whether the weights hold the full head or these; every token can still be read."""
    rows = [70, 3, 44, 90, 12]
    folder = tmp_path / "model"
    if stored == "tied":
        random_model(transformers.LlamaConfig(**SMALL, tie_word_embeddings=True)).save_pretrained(folder)
    else:
        shutil.copytree(tiny_model_folder("llama"), folder)
    full = CausalLM.load(folder, device="cpu")
    if stored == "reduced":
        weights = load_file(folder / "model.safetensors")
        weights["lm_head.weight"] = weights["lm_head.weight"][rows].contiguous()
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "draft_to_target.json").write_text(str(rows))
    model = CausalLM.load(folder, device="cpu")
    assert model.vocab_size == 5
    expected = full.step(full.new_cache(16), PROMPT)[:, rows]
    torch.testing.assert_close(model.step(model.new_cache(16), PROMPT), expected, rtol=1e-4, atol=1e-4)
    int8 = CausalLM.load(folder, device="cpu", dtype="int8")
    assert int8.step(int8.new_cache(16), PROMPT).shape == (1, 5)


def test_a_map_that_does_not_fit_the_weights(tmp_path, tiny_model_folder):
    def reduce(weights: dict[str, torch.Tensor]) -> None:
        weights["lm_head.weight"] = weights["lm_head.weight"][:4].contiguous()

    folder = broken(tiny_model_folder("llama"), tmp_path / "four", reduce)
    (folder / "draft_to_target.json").write_text("[1, 2, 3]")
    with pytest.raises(UserError, match=r"lm_head\.weight has 4 rows, but draft_to_target 3 entries"):
        CausalLM.load(folder)

    def shorten(weights: dict[str, torch.Tensor]) -> None:
        weights["model.norm.weight"] = torch.zeros(2)

    folder = broken(tiny_model_folder("llama"), tmp_path / "norm", shorten)
    (folder / "draft_to_target.json").write_text("[1, 2, 3]")
    with pytest.raises(UserError, match=r"model\.norm\.weight has another shape than"):
        CausalLM.load(folder)
    folder = broken(tiny_model_folder("llama"), tmp_path / "beyond", lambda weights: None)
    (folder / "draft_to_target.json").write_text("[1, 128]")
    with pytest.raises(UserError, match="names token 128; the model has 128"):
        CausalLM.load(folder)
