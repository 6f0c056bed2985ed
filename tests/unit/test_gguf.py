"""GGUF models: as stored in the fused engine, bit for bit as in float32; what is wrong with a file is said."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from gguf_files import write_gguf
from specsplit.decoding.tree import TokenTree
from specsplit.engines import loading
from specsplit.engines.numba import FusedLM
from specsplit.engines.transformers import CausalLM
from specsplit.errors import UserError
from specsplit.models import sources
from specsplit.models.gguf_file import check_types, read_gguf, rope_scaling
from specsplit.models.sources import resolve_model
from specsplit.settings.worker import DraftWorkerConfig, TargetWorkerConfig

PROMPT = [5, 9, 33, 71, 12, 90, 44, 8, 101, 63, 27, 200, 250]
TREE = TokenTree([5, 6, 7, 8, 9], [-1, -1, 0, 1, 3], [-1.0] * 5)
BIG = {"hidden": 256, "ffn": 512}
MIXES = {
    "Q4_0": ({"ffn_down": "Q4_0", "attn_q": "Q4_0", "ffn_up": "Q4_0"}, {}),
    "Q4_1": ({"ffn_down": "Q4_1", "attn_k": "Q4_1", "token_embd": "Q4_1"}, {"kv_heads": 2}),
    "Q4_K_M": (
        {
            **dict.fromkeys(("attn_q", "attn_k", "attn_output", "ffn_gate", "ffn_up"), "Q4_K"),
            **dict.fromkeys(("attn_v", "ffn_down", "token_embd"), "Q6_K"),
        },
        BIG,
    ),
    "untied": ({"output": "Q6_K", "token_embd": "Q4_K"}, {**BIG, "tied": False}),
    "floats": ({"attn_q": "F32", "ffn_down": "F16", "attn_v": "BF16", "ffn_gate": "Q5_0"}, {}),
    "float embedding": ({"token_embd": "F32"}, {}),
}


def prepared(folder: Path, *arguments, **settings) -> Path:
    """A model folder of a file made by write_gguf(..., *arguments, **settings)."""
    write_gguf(folder / "source.gguf", *arguments, **settings)
    ready = folder / "model"
    ready.mkdir()
    sources._prepare_gguf(folder / "source.gguf", ready, "tiny")
    return ready


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("mix", MIXES)
def test_bits_are_those_of_the_float32_engine(tmp_path: Path, mix: str, threads: int) -> None:
    kinds, sizes = MIXES[mix]
    folder = prepared(tmp_path, kinds, **sizes)
    stored = FusedLM(CausalLM.load_blocks(folder), threads)
    wide = FusedLM(CausalLM.load(folder, device="cpu"), threads)
    assert stored.parameters == wide.parameters
    for count in (1, 2, 7, 13):
        rows = [engine.step(engine.new_cache(64), PROMPT[:count], TREE) for engine in (stored, wide)]
        assert torch.equal(*rows)


@pytest.mark.parametrize("mix", MIXES)
def test_logits_are_those_of_transformers_own_reader(tmp_path: Path, mix: str) -> None:
    kinds, sizes = MIXES[mix]
    folder = prepared(tmp_path, kinds, **sizes)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.float32)
    ours = CausalLM.load(folder, device="cpu").model
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    with torch.inference_mode():
        expected = theirs(torch.tensor([PROMPT])).logits[0, -1]
    fused = FusedLM(CausalLM.load_blocks(folder), 1)
    torch.testing.assert_close(fused.step(fused.new_cache(32), PROMPT)[0], expected, rtol=1e-3, atol=1e-3)


def test_the_engine_that_a_worker_takes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = prepared(tmp_path, {"ffn_gate": "Q5_0"})
    caplog.set_level(logging.INFO)

    def load(settings=TargetWorkerConfig, **given):
        return loading.load_model(*resolve_model(folder), settings(model=folder, port=0, **given), 1)

    model, identity = load()
    assert type(model) is FusedLM
    assert identity["parameters"] == CausalLM.load(folder, device="cpu").parameters
    assert "weights in memory as stored (Q8_0" in caplog.text
    assert "matrices of type Q5_0 are turned to float32" in caplog.text
    assert type(load(engine="fused")[0]) is FusedLM
    assert type(load(engine="transformers")[0]) is CausalLM
    caplog.clear()
    assert type(load(DraftWorkerConfig, dtype="int8")[0]) is FusedLM
    assert "as stored" not in caplog.text


def test_old_safetensors_beside_a_file_are_what_counts(tmp_path: Path) -> None:
    folder = prepared(tmp_path)
    CausalLM.load(folder, device="cpu").model.save_pretrained(folder)
    config = TargetWorkerConfig(model=folder, port=0)
    assert resolve_model(folder)[1]["fingerprint"]["dtype"] == "float32"
    assert type(loading.load_model(*resolve_model(folder), config, 1)[0]) is FusedLM


# ---- bad input


def test_a_file_that_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    write_gguf(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(UserError, match=r"cut off in tensor .* ends at byte \d+ of \d+; fetch it again"):
        read_gguf(path)
    for length in (5, 30, 200, 3000):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="damaged or cut off in its header"):
            read_gguf(path)
    with pytest.raises(UserError, match=r"models\.tiny\.file: damaged or cut off"):
        sources._prepare_gguf(path, tmp_path, "tiny")


def test_other_files_and_versions(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"PK" * 100)
    with pytest.raises(UserError, match="not a GGUF file"):
        read_gguf(path)
    path.write_bytes(b"GGUF\x09\0\0\0" + bytes(100))
    with pytest.raises(UserError, match="version 9 of GGUF"):
        read_gguf(path)


def with_type(path: Path, name: bytes, number: int) -> None:
    """Write another type's number into a file's table of tensors."""
    data = bytearray(path.read_bytes())
    at = data.index(len(name).to_bytes(8, "little") + name) + 8 + len(name)
    dimensions = int.from_bytes(data[at : at + 4], "little")
    at += 4 + 8 * dimensions
    data[at : at + 4] = number.to_bytes(4, "little")
    path.write_bytes(data)


def test_types_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    write_gguf(path)
    with_type(path, b"blk.0.ffn_up.weight", 4711)
    with pytest.raises(UserError, match=r"tensor blk\.0\.ffn_up\.weight is of type number 4711"):
        read_gguf(path)
    with_type(path, b"blk.0.ffn_up.weight", 24)  # I8, whole numbers
    with pytest.raises(UserError, match=r"tensor blk\.0\.ffn_up\.weight is of type I8, which cannot be read"):
        check_types(read_gguf(path))
    with_type(path, b"blk.0.ffn_up.weight", 12)  # Q4_K
    with pytest.raises(UserError, match=r"rows of 32 numbers, no multiple of the 256 in a block of Q4_K"):
        read_gguf(path)


def test_a_file_that_is_not_the_model_of_its_metadata(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"models\.tiny\.file: tensor blk\.0\.attn_output\.bias has no place"):
        prepared(tmp_path, extra={"blk.0.attn_output.bias": np.ones(32, np.float32)})


def test_a_file_of_another_model_in_the_folder(tmp_path: Path) -> None:
    folder = prepared(tmp_path)
    write_gguf(folder / "model.gguf", ffn=96)
    for load in (CausalLM.load_blocks, CausalLM.load):
        with pytest.raises(
            UserError,
            match=r"model\.gguf: tensor .* is \(.*96.*\), where the model has",
        ):
            load(folder)


def test_frequencies_of_llama_3(tmp_path: Path) -> None:
    size, theta, factor = 32, 500000.0, 8.0
    turns = 8192 / (2 * np.pi) * theta ** (-np.arange(size) / size)
    smooth = np.clip((turns - 1) / 3, 0, 1)
    divisors = (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)
    path = tmp_path / "a.gguf"
    for values, expected in ((divisors, 8.0), (np.ones(size, np.float32), None)):
        write_gguf(path, extra={"rope_freqs.weight": values})
        assert rope_scaling(read_gguf(path), theta).get("factor") == expected
    config = transformers.LlamaConfig(
        hidden_size=64, num_attention_heads=1, rope_parameters={"rope_theta": theta, **_scaled(path, divisors, theta)}
    )
    found, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    expected = theta ** (-np.arange(size) / size) / divisors
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4)
    write_gguf(path, extra={"rope_freqs.weight": divisors * 1.1})
    with pytest.raises(UserError, match=r"rope_freqs\.weight is not as for Llama 3"):
        rope_scaling(read_gguf(path), theta)


def _scaled(path: Path, divisors: np.ndarray, theta: float) -> dict:
    write_gguf(path, extra={"rope_freqs.weight": divisors})
    return rope_scaling(read_gguf(path), theta)
