"""Whatever a user gives, a command ends with one message: never a traceback. The next case is one line."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from specsplit.cli.main import main
from specsplit.launch.environment import REQUIRED
from specsplit.settings.measure import CapacitySettings, ContextSettings, StatesCostSettings
from specsplit.settings.run import OrchestratorConfig
from specsplit.settings.schema import SCHEMA
from specsplit.settings.serve import ServeSettings
from specsplit.settings.worker import DraftWorkerConfig, LaunchSettings, TargetWorkerConfig

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def specsplit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command in this process: exit status, and what it wrote to standard error."""
    for name, value in REQUIRED.items():  # a worker would start itself again with them
        monkeypatch.setenv(name, value)

    def run(*arguments: object) -> tuple[int, str]:
        capsys.readouterr()
        status: Any = 0
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as end:
            status = end.code
        return status, capsys.readouterr().err

    return run


def refused(outcome: tuple[int, str], *said: str) -> None:
    """One message, which says this."""
    status, err = outcome
    assert status == 2, err
    assert "Traceback" not in err
    assert "[transformers]" not in err
    assert err.count(": error: ") == 1, err
    for words in said:
        assert words in err


# ---- flags

COMMANDS = {
    "generate": (["generate", "--prompt", "x"], [OrchestratorConfig]),
    "serve": (["serve"], [ServeSettings]),
    "draft": (["worker", "draft", "--model", "none"], [DraftWorkerConfig]),
    "target": (["worker", "target", "--model", "none"], [TargetWorkerConfig]),
    "start-worker": (["start-worker", "target", "--model", "none", "--endpoint-file", "e", "--worker-log", "l"],
                     [LaunchSettings]),
    "capacity": (["capacity", "--prompts", "none", "--results-dir", "r"], [CapacitySettings]),
    "context-curve": (["context-curve", "--prompts", "none", "--output", "o.csv"], [ContextSettings]),
    "states-cost": (["states-cost", "--prompts", "none", "--output", "o.csv"], [StatesCostSettings]),
}  # fmt: skip
STRANGE = ("inf", "-inf", "nan", "1e999", "-1", "99999999999999999999999999", "½", "", "[", "[1, null]", "{}", "null",
           "\udcff", "a,b", "0x10", "1_0")  # fmt: skip


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n == "serve" else n for n in COMMANDS])
def test_strange_values_of_every_flag(specsplit: Run, name: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    words, classes = COMMANDS[name]
    chosen = random.Random(name)
    for settings in classes:
        for field in settings.model_fields:
            flag = settings.flag(field)
            for value in chosen.sample(STRANGE, 3):
                status, err = specsplit(*words, f"{flag}={value}")
                assert status == 2, (flag, value, err)
                assert "Traceback" not in err
                assert err.count("error: ") == 1, (flag, value, err)


@pytest.mark.parametrize("flag", ["--step-ms", "--token-ms", "--acceptance", "--seed", "--vocab-size"])
@pytest.mark.parametrize("value", ["inf", "nan", "-1", "x"])
def test_numbers_of_a_simulated_model(specsplit: Run, flag: str, value: str, tmp_path: Path) -> None:
    status, err = specsplit("prepare-model", "--synthetic", f"{flag}={value}", "--output", tmp_path / "out")
    assert (status, "Traceback" in err, err.count("error: ")) == (2, False, 1), err


@pytest.mark.parametrize("content", ["", "[]", "null", "{", '{"run": 3}', '{"run": {"gamma": {}}}', "[" * 100_000,
                                     '{"run": {"rtt_ms": NaN}}', '{"run": {"tree": []}}', "\ufeff{}"])  # fmt: skip
def test_strange_settings_files(specsplit: Run, content: str, tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text(content, encoding="utf-8")
    status, err = specsplit("generate", "--prompt", "x", "--settings", tmp_path / "s.json")
    assert (status, "Traceback" in err, err.count("error: ")) == (2, False, 1), err


def test_null_is_no_value_where_a_setting_may_have_none(specsplit: Run, tmp_path: Path) -> None:
    """As in the configuration, in variables, and as the help of a flag says."""
    (tmp_path / "p").write_text('{"prompt": "x"}')
    outputs = ["--output", tmp_path / "o", "--manifest", tmp_path / "m"]
    assert specsplit("prepare-dataset", "--source", tmp_path / "p", *outputs, "--limit", "null")[0] == 0
    assert json.loads((tmp_path / "m").read_text())["limit"] is None
    refused(specsplit("prepare-dataset", "--source", tmp_path / "p", *outputs, "--turns", "null"), "--turns = 'null'")


def test_a_link_that_leads_to_itself(specsplit: Run, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    outputs = ["--output", tmp_path / "o", "--manifest", tmp_path / "m"]
    refused(specsplit("prepare-dataset", "--source", tmp_path / "loop", *outputs), "Symlink loop")
    refused(specsplit("prepare-model", "--local", tmp_path / "loop", "--output", tmp_path / "o"), "loop")


# ---- files of a kind that no command can open, and permissions


@pytest.mark.parametrize("flag", ["--source", "--settings", "--output", "--manifest"])
def test_a_pipe_that_nobody_writes_to_is_not_waited_for(specsplit: Run, flag: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "p").write_text('{"prompt": "x"}')
    flags = {"--source": "p", "--output": "o", "--manifest": "m", flag: "pipe"}
    words = [word for name, file in flags.items() for word in (name, tmp_path / file)]
    refused(specsplit("prepare-dataset", *words), "pipe: a pipe, device or socket, where a file is wanted")


def test_what_a_shell_pipes_in_is_read(specsplit: Run, tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.write(writing, b'{"prompt": "x"}\n')
    os.close(writing)
    words = ["--source", f"/dev/fd/{reading}", "--output", tmp_path / "o", "--manifest", tmp_path / "m"]
    assert specsplit("prepare-dataset", *words) == (0, "")
    os.close(reading)


def test_a_device_is_never_replaced_by_a_file(specsplit: Run, tmp_path: Path) -> None:
    (tmp_path / "p").write_text('{"prompt": "x"}')
    (tmp_path / "link").symlink_to("/dev/null")
    words = ["prepare-dataset", "--source", tmp_path / "p", "--manifest", tmp_path / "m", "--output"]
    refused(specsplit(*words, tmp_path / "link"), "/dev/null: a folder, pipe or device, which no file replaces")
    assert Path("/dev/null").is_char_device()
    (tmp_path / "other").symlink_to("made")
    assert specsplit(*words, tmp_path / "other") == (0, "")
    assert (tmp_path / "made").is_file()
    assert (tmp_path / "other").is_symlink()


@contextmanager
def as_a_user() -> Iterator[None]:
    """Permissions hold within: root may otherwise read and write everything (capabilities 1 and 2 of Linux)."""
    header, data = struct.pack("Ii", 0x20080522, 0), ctypes.create_string_buffer(24)
    call = ctypes.CDLL(None, use_errno=True).syscall
    get, put = {"x86_64": (125, 126)}.get(platform.machine(), (90, 91))
    assert call(get, header, data) == 0
    before = data.raw
    effective, *rest = struct.unpack("6I", before)
    assert call(put, header, ctypes.create_string_buffer(struct.pack("6I", effective & ~0b110, *rest))) == 0
    try:
        yield
    finally:
        assert call(put, header, ctypes.create_string_buffer(before)) == 0


FORBIDDEN = [
    ("prepare-dataset --source secret --output o --manifest m", "secret: no permission to read it"),
    ("prepare-dataset --source shut/p --output o --manifest m", "shut/p: Permission denied"),
    ("prepare-dataset --source shut --output o --manifest m", "shut: Permission denied"),
    ("prepare-dataset --source p --output fixed/o --manifest m", "--output fixed/o: no permission to write in"),
    ("prepare-dataset --source p --output fixed/new/o --manifest m", "no permission to write in"),
    ("prepare-dataset --source p --output p/o --manifest m", "is a file, not a folder"),
    ("prepare-dataset --source p --settings secret --output o --manifest m", "secret: no permission to read it"),
    ("prepare-model --local model --output o", "model/tokenizer.json: no permission to read it"),
    ("prepare-model --local shut --output o", "shut: the folder cannot be read: Permission denied"),
    ("prepare-model --synthetic --output fixed/o", "no permission to write in"),
    ("worker target --model model --port 0", "model/tokenizer.json: no permission to read it"),
    ("start-worker target --model p --endpoint-file fixed/e --worker-log l", "--endpoint-file fixed/e: no permission"),
    ("start-worker target --model p --endpoint-file e --worker-log fixed/l", "--worker-log fixed/l: no permission"),
    ("serve --api-key-file secret --tokenizer model", "secret: no permission to read it"),
    ("analyze --results-dir shut", "shut/requests.csv: cannot be read: Permission denied"),
    ("merge --results-dir shut", "Permission denied"),
]


@pytest.mark.parametrize(("command", "said"), FORBIDDEN, ids=lambda value: value.partition(" --")[0])
def test_what_may_not_be_read_or_written_is_named(
    specsplit: Run, command: str, said: str, folder: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("p").write_text('{"prompt": "x"}')
    Path("secret").write_text("{}")
    for made in ("shut", "fixed"):
        Path(made).mkdir()
    for closed, mode in {"secret": 0, "model/tokenizer.json": 0, "shut": 0, "fixed": 0o555}.items():
        Path(closed).chmod(mode)
    with as_a_user():
        outcome = specsplit(*command.split())
    for made in ("shut", "fixed"):
        Path(made).chmod(0o755)
    refused(outcome, said)


# ---- model folders


def edit(file: str, **changes: Any) -> Callable[[Path], None]:
    """Changes keys of a JSON file of the folder; None removes one."""

    def change(folder: Path) -> None:
        path = folder / file
        content = json.loads(path.read_text()) if path.exists() else {}
        content.update(changes)
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return change


def cut(file: str, size: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / file, size)


def write(file: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_text(content) and None


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 1\n"


def index(weight_map: Any) -> Callable[[Path], None]:
    """Has an index of shards in place of the weights."""

    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return change


def stored(more: dict[str, torch.Tensor]) -> Callable[[Path], None]:
    """Has these tensors as well."""

    def change(folder: Path) -> None:
        save_file(load_file(folder / "model.safetensors") | more, folder / "model.safetensors", {"format": "pt"})

    return change


def rewritten(make: Callable[[str, torch.Tensor], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    """Has other tensors in place of each."""

    def change(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors").items()
        other = {name: tensor for each in weights for name, tensor in make(*each).items()}
        save_file(other, folder / "model.safetensors", {"format": "pt"})

    return change


def retyped(dtype: torch.dtype) -> Callable[[Path], None]:
    return rewritten(lambda name, tensor: {name: tensor.to(dtype)})


def renamed(file: str, other: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).rename(folder / other) and None


def linked(file: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).unlink() or (folder / file).symlink_to("../blobs/none")


def piped(file: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).unlink() or os.mkfifo(folder / file)


def snapshot(folder: Path) -> None:
    """Has all files where the cache of the Hub has them."""
    files = list(folder.iterdir())
    (folder / "snapshots" / "0123").mkdir(parents=True)
    for file in files:
        file.rename(folder / "snapshots" / "0123" / file.name)


def poison(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], float("nan"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


MODELS: dict[str, tuple[Callable[[Path], None], str]] = {
    "an unknown architecture": (edit("config.json", model_type="zebra"), "no model type 'zebra'"),
    "custom code": (edit("config.json", model_type="zebra", auto_map={"AutoModel": "m.M"}), "code of its own"),
    "no model type": (edit("config.json", model_type=None), "config"),
    "GPTQ": (edit("config.json", quantization_config={"quant_method": "gptq", "bits": 4}), "quantised (gptq)"),
    "AWQ": (edit("config.json", quantization_config={"quant_method": "awq"}), "quantised (awq)"),
    "bitsandbytes": (edit("config.json", quantization_config={"quant_method": "bitsandbytes"}), "(bitsandbytes)"),
    "an unheard-of quantisation": (edit("config.json", quantization_config="odd"), "quantised (odd)"),
    "layers as text": (edit("config.json", num_hidden_layers="three"), "config"),
    "heads that do not divide": (edit("config.json", num_attention_heads=0), "model"),
    "EOS as text": (edit("generation_config.json", eos_token_id="</s>"), "not the id of a token"),
    "EOS as text in the configuration": (edit("config.json", eos_token_id="</s>"), "not the id of a token"),
    "a repetition penalty": (edit("generation_config.json", repetition_penalty=1.1), "sets repetition_penalty 1.1"),
    "a list as generation_config": (write("generation_config.json", "[]"), "wanted a JSON object"),
    "a list as configuration": (write("config.json", "[1]"), "wanted a JSON object"),
    "a cut configuration": (cut("config.json", 20), "not valid JSON"),
    "no layers": (edit("config.json", num_hidden_layers=0), "a model without layers"),
    "another width": (edit("config.json", vocab_size=200), "config.json is not that of the weights"),
    "an encoder and decoder": (edit("config.json", model_type="t5"), "no decoder-only language model"),
    "pictures": (edit("config.json", model_type="clip"), "no decoder-only language model"),
    "a recurrent state": (edit("config.json", model_type="mamba"), "recurrent state"),
    "an LFS pointer as configuration": (write("config.json", LFS), "Git LFS pointer"),
    "an LFS pointer as weights": (write("model.safetensors", LFS), "Git LFS pointer"),
    "an LFS pointer as tokenizer": (write("tokenizer.json", LFS), "Git LFS pointer"),
    "a page as weights": (write("model.safetensors", "<!DOCTYPE html><html>"), "an HTML page"),
    "an index of what is not there": (index({"lm_head.weight": "nope.safetensors"}), "nope.safetensors is missing"),
    "an index that leads out": (index({"lm_head.weight": "../x.safetensors"}), "not a .safetensors file beside it"),
    "an index of nothing": (index({}), "no weight_map"),
    "an index of numbers": (index({"lm_head.weight": 3}), "not a .safetensors file beside it"),
    "a folder for weights": (index(None), "no weight_map"),
    "a broken tokenizer_config": (write("tokenizer_config.json", "{"), "tokenizer"),
    "half-written weights": (cut("model.safetensors", 5000), "not a readable safetensors file"),
    "empty weights": (cut("model.safetensors", 0), "not a readable safetensors file"),
    "NaN weights": (poison, "not numbers"),
    "a cut tokenizer": (cut("tokenizer.json", 100), "tokenizer"),
    "an empty tokenizer": (cut("tokenizer.json", 0), "tokenizer"),
    "a tokenizer that is a list": (write("tokenizer.json", "[]"), "tokenizer"),
    "a tokenizer of a strange kind": (edit("tokenizer.json", model={"type": "Odd"}), "tokenizer"),
    "many layers": (edit("config.json", num_hidden_layers=10**9), "a model of 1000000000 layers (num_hidden_layers)"),
    "many layers within": (
        edit("config.json", text_config={"n_layer": 10**9}),
        "a model of 1000000000 layers (n_layer)",
    ),
    **{
        f"a huge {key}": (
            edit("config.json", **{key: 10**size}),
            "config.json is not that of the weights: it describes",
        )
        for key, size in {"hidden_size": 9, "vocab_size": 12, "intermediate_size": 9, "head_dim": 9}.items()
    },
    "no positions": (edit("config.json", max_position_embeddings=0), "a model for 0 tokens"),
    "a strange activation": (edit("config.json", hidden_act="zap"), "cannot make the model that config.json describes"),
    "an object within": (edit("config.json", text_config={"x": 1}), "cannot make the model that config.json describes"),
    "a classifier": (edit("config.json", architectures=["LlamaForSequenceClassification"]), "which writes no text"),
    "a key twice": (write("config.json", '{"vocab_size": 3, "vocab_size": 4}'), "'vocab_size' stands twice"),
    "a byte order mark": (write("tokenizer.json", "\ufeff{}"), "tokenizer.json: begins with a byte order mark"),
    "a cut file of added tokens": (write("added_tokens.json", "[1"), "added_tokens.json, line 1"),
    "whole numbers": (retyped(torch.int8), "no floating-point numbers (I8)"),
    "complex numbers": (retyped(torch.complex64), "no floating-point numbers (C64)"),
    "zeros": (rewritten(lambda name, tensor: {name: tensor * 0}), "are all equal: its weights are zero"),
    "names with a prefix": (rewritten(lambda name, tensor: {f"_orig_mod.{name}": tensor}), "take the prefix off all"),
    "scales of what is quantised": (
        stored({"model.layers.0.self_attn.q_proj.weight_scale_inv": torch.ones(1)}),
        "they are quantised, or an adapter lies beside them",
    ),
    "an end of text that is no token": (edit("generation_config.json", eos_token_id=[10**6]), "beyond the vocabulary"),
    "an end of text below 0": (edit("generation_config.json", eos_token_id=-1), "-1 is not the id of a token"),
    "null as tokenizer_config": (write("tokenizer_config.json", "null"), "tokenizer_config.json: holds null; wanted"),
    "fewer layers": (edit("config.json", num_hidden_layers=2), "they hold model.layers.2."),
    "a bias too many": (stored({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}), "they hold model.layers.0."),
    "biases that were left out": (
        edit("config.json", attention_bias=True),
        "are all zero, set attention_bias to false",
    ),
    "an adapter": (renamed("model.safetensors", "adapter_model.safetensors"), "of an adapter (LoRA)"),
    "an unfinished download": (renamed("model.safetensors", "model.safetensors.incomplete"), "was not finished"),
    "a shard alone": (renamed("model.safetensors", "model-00001-of-00002.safetensors"), "a shard without its index"),
    "a GGUF file of another name": (renamed("model.safetensors", "m-q4.gguf"), "m-q4.gguf is a GGUF file: name it"),
    **{
        f"{file}, a link to nothing": (linked(file), f"{file}: a link to ../blobs/none, which is not there")
        for file in ("config.json", "generation_config.json", "model.safetensors", "tokenizer_config.json")
    },
    "a pipe": (piped("generation_config.json"), "generation_config.json: a pipe, device or socket"),
    "an older tokenizer": (renamed("tokenizer.json", "tokenizer.model"), "tokenizer.model and no tokenizer.json"),
    "other weights": (
        edit("config.json", transformers_weights="x.safetensors"),
        "transformers_weights: 'x.safetensors'",
    ),
    "a rotary of a strange kind": (edit("config.json", rope_parameters={"rope_type": "zap"}), "'zap'"),
    "a comma in the configuration": (write("config.json", '{"model_type": "llama",}'), "end of the object: remove it"),
    "a comment in the configuration": (write("config.json", "{ // mine\n}"), "a comment, which JSON does not have"),
    "a folder of the Hub's cache": (snapshot, "a folder of the Hub's cache: name "),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer"),
}


AT_A_WORKER = ("NaN weights", "zeros")  # numbers, found when they are loaded; all else is found by one function
ROWS_AT_A_WORKER = [pytest.param(name, marks=() if name in AT_A_WORKER else pytest.mark.slow) for name in MODELS]


@pytest.fixture
def folder(tiny_model_folder: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of a tiny model, to be spoilt."""
    return Path(shutil.copytree(tiny_model_folder("llama"), tmp_path / "model"))


@pytest.mark.parametrize("name", ROWS_AT_A_WORKER)
def test_spoilt_model_folders_at_a_worker(specsplit: Run, name: str, folder: Path) -> None:
    spoil, said = MODELS[name]
    spoil(folder)
    refused(specsplit("worker", "target", "--model", folder, "--port", 0, "--engine", "transformers"), said)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in AT_A_WORKER])
def test_spoilt_model_folders_at_prepare_model(specsplit: Run, name: str, folder: Path, tmp_path: Path) -> None:
    spoil, said = MODELS[name]
    spoil(folder)
    refused(specsplit("prepare-model", "--local", folder, "--output", tmp_path / "out"), said)
    assert not (tmp_path / "out").exists()


def test_settings_of_the_model_are_left_out_as_the_message_says(specsplit: Run, folder: Path, tmp_path: Path) -> None:
    edit("generation_config.json", repetition_penalty=1.1, no_repeat_ngram_size=3)(folder)
    words = ["prepare-model", "--local", folder, "--output", tmp_path / "out"]
    refused(specsplit(*words), "--ignore-model-settings", "generation.ignore_model_settings")
    assert specsplit(*words, "--ignore-model-settings")[0] == 0
    assert "ignore_model_settings" in SCHEMA["properties"]["generation"]["properties"]


TEMPLATES = {
    "syntax": "{% for %}",
    "an error of its own": "{{ raise_exception('no users here') }}",
    "a division": "{{ 1 // 0 }}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "an attribute": "{{ messages.nothing.more }}",
    "an index": "{{ messages[7]['content'] }}",
    "arithmetic": "{{ messages + 1 }}",
    "nothing": "",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_templates_that_fail(specsplit: Run, name: str, folder: Path) -> None:
    edit("tokenizer_config.json", chat_template=None)(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATES[name])
    status, err = specsplit("generate", "--prompt", "x", "--tokenizer", folder, "--gamma", 0,
                            "--target-addr", "127.0.0.1:1", "--connect-timeout-s", "0.1")  # fmt: skip
    assert (status, "Traceback" in err, err.count(": error: ")) == (2, False, 1), err


def test_debug_shows_the_traceback(specsplit: Run, tmp_path: Path) -> None:
    for words in (["--debug", "merge"], ["merge", "--debug"]):
        status, err = specsplit(*words, "--results-dir", tmp_path)
        assert status == 2
        assert "Traceback" in err
        assert ": error: " in err
