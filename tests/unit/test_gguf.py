"""GGUF models: as stored in the fused engine, bit for bit as in float32; what is wrong with a file is said."""

from __future__ import annotations

import logging
import math
import random
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from gguf_files import write_gguf
from specsplit.api.named_models import Model
from specsplit.decoding.tree import TokenTree
from specsplit.engines import loading
from specsplit.engines.numba import FusedLM
from specsplit.engines.transformers import CausalLM
from specsplit.errors import ModelError, OptionError, UserError
from specsplit.io import sha256_file
from specsplit.models import sources
from specsplit.models.gguf_file import read_gguf, rope_scaling
from specsplit.models.sources import resolve_model
from specsplit.settings.worker import DraftWorkerConfig, TargetWorkerConfig
from specsplit.workflow import files

Change = Callable[[bytes], bytes]
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
    sources._prepare_gguf(folder / "source.gguf", ready, "models.tiny.file")
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


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def number(value: int, size: int = 4) -> bytes:
    return value.to_bytes(size, "little")


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + number(kind) + value


def put(at: int, value: bytes) -> Change:
    """Other bytes at a place of the file."""
    return lambda file: file[:at] + value + file[at + len(value) :]


def more(*keys: bytes) -> Change:
    """More keys, before the others."""
    return lambda file: file[:16] + number(file[16] + len(keys), 8) + b"".join(keys) + file[24:]


def other(name: str, kind: int, value: bytes) -> Change:
    """Another value of a key that has a number of four bytes."""

    def change(file: bytes) -> bytes:
        at = file.index(text(name))
        return file[:at] + key(name, kind, value) + file[at + len(text(name)) + 8 :]

    return change


def swapped(old: str, new: str) -> Change:
    return lambda file: file.replace(text(old), text(new))


def in_tensor(skip: int, value: bytes) -> Change:
    """Other bytes so many after the name of a matrix: 0 its dimensions, 4 and 12 its shape, 20 its type, 24 its
    offset."""
    name = text("blk.0.attn_q.weight")
    return lambda file: put(file.index(name) + len(name) + skip, value)(file)


HEAD_COUNT, LAYERS, ALIGNMENT = "llama.attention.head_count", "llama.block_count", "general.alignment"
DAMAGED: dict[str, tuple[Change, str]] = {
    "empty": (lambda file: b"", "not a GGUF file"),
    "another file": (lambda file: b"PK" * 100, "not a GGUF file"),
    "a pointer": (lambda file: b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer"),
    "GGML": (put(0, b"tjgg"), "a GGML file from before GGUF"),
    "version 1": (put(4, number(1)), "version 1 of GGUF, where 2 and 3 are known"),
    "a later version": (put(4, number(9)), "version 9 of GGUF"),
    "big-endian": (put(4, b"\0\0\0\3"), "of the other byte order; turn it with gguf-convert-endian"),
    **{f"cut at {at}": (lambda file, at=at: file[:at], f"in its header, at {place}")
       for at, place in {5: "its beginning", 30: "key 1 of", 210: "key llama", 3000: "key tokenizer"}.items()},
    "cut in the weights": (lambda file: file[:-100], r"cut off in tensor .* ends at byte \d+ of \d+; fetch it again"),
    "a key too many": (put(16, number(99, 8)), "damaged or cut off in its header, at key"),
    "a tensor too many": (put(8, number(99, 8)), "damaged or cut off in its header, at tensor"),
    "a tensor too few": (put(8, number(10, 8)), r"no tensor for model\.layers\.0\..*1 missing"),
    "a name that is no text": (lambda file: file.replace(b"blk.0.attn_q", b"\xff" * 12), "its header, at tensor 2 of"),
    "another place": (in_tensor(24, number(0, 8)), "blk.0.attn_q.weight begins at byte 0 of the weights, where those"),
    "a place far out": (in_tensor(24, number(2**63, 8)), "begins at byte 9223372036854775808"),
    "no dimensions": (in_tensor(0, number(0)), "damaged or cut off in its header, at tensor blk.0.attn_q.weight"),
    "a shape of 0": (in_tensor(4, number(0, 8)), r"tensor blk.0.attn_q.weight has the shape \(32, 0\)"),
    "a huge shape": (in_tensor(4, number(2**40, 8) * 2), "cut off in tensor blk.0.attn_q.weight"),
    "a type of another size": (in_tensor(20, number(0)), "blk.0.attn_k.weight .* a type or shape in it is wrong"),
    "an unknown type": (in_tensor(20, number(4711)), "of type number 4711, which is not known; take the model in"),
    "a type of longer rows": (in_tensor(20, number(12)), "rows of 32 numbers, no multiple of the 256 in a block of Q4"),
    "a tensor twice": (swapped("blk.0.attn_q.weight", "blk.0.attn_k.weight"), "attn_k.weight stands twice"),
    "an alignment of 0": (more(key(ALIGNMENT, 4, number(0))), "general.alignment is 0, no power of 2"),
    "an alignment as text": (more(key(ALIGNMENT, 8, text("x"))), "general.alignment is 'x', no power of 2"),
    "a key twice": (more(key(LAYERS, 4, number(1))), "key llama.block_count stands twice"),
    "a list of lists": (more(key("x", 9, number(9) + number(2**50, 8))), "its header, at key x"),
    "a list beyond the end": (more(key("x", 9, number(0) + number(2**63, 8))), "its header, at key x"),
    "a text beyond the end": (more(key("x", 8, number(2**63, 8))), "its header, at key x"),
    "no such type of key": (more(key("x", 77, b"")), "its header, at key x"),
    "NaN": (other(HEAD_COUNT, 6, struct.pack("<f", math.nan)), "key llama.attention.head_count is nan"),
    "a number as text": (other(HEAD_COUNT, 8, text("x")), "head_count is 'x', where a number from 1 to"),
    "no heads": (other(HEAD_COUNT, 4, number(0)), "head_count is 0, where a number from 1 to"),
    "layers without end": (other(LAYERS, 4, number(2**32 - 1)), "block_count is 4294967295, where a number from 1 to"),
    "no layers": (swapped(LAYERS, "llama.block_kount"), "llama.block_count is missing"),
    "no architecture": (swapped("general.architecture", "general.archibecture"), "names no architecture"),
    "another model": (swapped("llama", "stablelm"), "the weights are incomplete, 3 missing and the first model.layers"),
    "one of three": (more(key("split.count", 2, number(3, 2))), "one of the 3 parts of a model.*--merge"),
    "an adapter": (more(key("general.type", 8, text("adapter"))), r"an adapter \(LoRA\), not a whole model; merge it"),
    "an imatrix": (more(key("general.type", 8, text("imatrix"))), "an importance matrix"),
    "a projector": (more(key("general.type", 8, text("mmproj"))), "reads pictures or sound"),
    "no tokenizer": (swapped("tokenizer.ggml.model", "tokenizer.ggml.mobel"), "no tokenizer, for there is no tokeniz"),
    "no tokens": (swapped("tokenizer.ggml.tokens", "tokenizer.ggml.tokans"), "there is no tokenizer.ggml.tokens"),
    "a token out of range": (other("tokenizer.ggml.eos_token_id", 5, b"\xff" * 4), "eos_token_id is -1, where the f"),
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A file that has nothing wrong with it."""
    path = tmp_path_factory.mktemp("whole") / "a.gguf"
    write_gguf(path)
    return path.read_bytes()


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_refused_by_what_is_wrong(name: str, whole: bytes, tmp_path: Path) -> None:
    change, said = DAMAGED[name]
    (tmp_path / "a.gguf").write_bytes(change(whole))
    with pytest.raises(UserError, match=rf"models\.tiny\.file: .*{said}"):
        sources._prepare_gguf(tmp_path / "a.gguf", tmp_path, "models.tiny.file")


def test_a_file_in_place_of_a_folder(whole: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(whole)
    with pytest.raises(UserError, match=r"where the folder of a model is wanted: a\.gguf .*prepare-model --local"):
        resolve_model(tmp_path / "a.gguf")


def test_a_local_file_is_a_model(whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "mine q4.GGUF"
    file.write_bytes(whole)
    spec = {"source": "local", "path": str(file)}
    manifest = sources.prepare_model(spec, "tiny", tmp_path / "out")
    assert (tmp_path / "out" / "model.gguf").read_bytes() == file.read_bytes() == whole
    assert (manifest["path"], manifest["pinned"], manifest["upstream_sha256"]) == (".", False, sha256_file(file))
    assert sources.prepare_model(spec | {"sha256": sha256_file(file)}, "tiny", tmp_path / "out")["pinned"]
    assert files.model_inputs(file) == [str(file)]
    assert files.model_files(file) == [file]

    first = Model(file).folder()
    assert Model(str(file)).folder() == first
    with pytest.raises(OptionError, match="which has none"):
        Model(file, revision="main").folder()
    write_gguf(file, ffn=96)
    assert Model(file).folder() != first
    for changed, said in ({"sha256": "0" * 64}, "not 0000"), ({"path": str(tmp_path / "b.gguf")}, "no such file"):
        with pytest.raises(UserError, match=rf"models\.tiny\.(sha256|path): .*{said}"):
            sources.prepare_model(spec | changed, "tiny", tmp_path / "out")
    file.write_bytes(whole[:1000])
    with pytest.raises(ModelError, match=r"models\..*path: .*cut off|ends"):
        Model(file).folder()
    assert (tmp_path / "out" / "model.gguf").read_bytes() == whole


def test_any_damage_to_a_header(whole: bytes, tmp_path: Path) -> None:
    """A table within the file comes of it, or a message; no other error, and no memory that the file does not fill."""
    path, chosen = tmp_path / "a.gguf", random.Random(0)
    header = whole.index(text("blk.0.ffn_norm.weight")) + 60
    tracemalloc.start()
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(chosen.choice((1, 1, 2, 8))):
            at, size = chosen.randrange(header), chosen.choice((1, 1, 4, 8))
            data[at : at + size] = chosen.choice((chosen.randbytes(size), b"\xff" * size, bytes(size)))
        path.write_bytes(data[: chosen.randrange(len(data)) if chosen.random() < 0.1 else None])
        try:
            tensors = read_gguf(path).tensors.values()
        except UserError:
            continue
        assert all(tensor.offset + tensor.nbytes <= len(data) for tensor in tensors)
    assert tracemalloc.get_traced_memory()[1] < 1 << 24
    tracemalloc.stop()


def test_types_that_cannot_be_read(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", extra={"x.weight": np.ones((2, 32), np.int8)})
    with pytest.raises(UserError, match=r"tensor x\.weight is of type I8, which cannot be read; take the model in"):
        read_gguf(tmp_path / "a.gguf")


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
