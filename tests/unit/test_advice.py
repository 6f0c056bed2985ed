"""Advice in messages about models and workers, followed as it stands: what was refused before works then."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_no_traceback import edit

from specsplit.client.handshake import text_limit
from specsplit.errors import UserError
from specsplit.experiment.prompt import Prompt
from specsplit.experiment.records import encode_prompts
from specsplit.models.tokenizer import TextCodec
from specsplit.rpc.v1 import specsplit_pb2 as pb
from specsplit.settings.worker import TargetWorkerConfig
from specsplit.worker.server import load_servicer

from tiny_models import make_tiny_model, make_tokenizer


def large(folder: Path) -> None:
    """Weights that float16 cannot hold."""
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] *= 1e6
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def run_python(folder: Path, message: str) -> None:
    """Runs the command that the message holds."""
    words = shlex.split(message[message.index("python -c") :])
    exec(words[2], {})


def shards(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")


def fetch_index(folder: Path, _: str) -> None:
    names = load_file(folder / "model-00001-of-00001.safetensors")
    content = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def nothing(folder: Path, message: str = "") -> None:
    pass


# What is spoilt, the settings of the worker, what its message says, what is done then, the settings that it advises.
Row = tuple[Callable[[Path], None], dict[str, Any], str, Callable[[Path, str], None], list[dict[str, Any]]]
ADVICE: dict[str, Row] = {
    "engine": (
        lambda folder: make_tiny_model("gpt2").save_pretrained(folder),
        {"engine": "fused"},
        r"Use engine auto, or transformers\.",
        nothing,
        [{"engine": "auto"}, {"engine": "transformers"}],
    ),
    "device": (
        nothing,
        {"device": "cuda:99"},
        r"Use device auto or cpu\.",
        nothing,
        [{"device": "auto"}, {"device": "cpu"}],
    ),
    "dtype": (large, {"dtype": "float16"}, r"or use dtype bfloat16\.", nothing, [{"dtype": "bfloat16"}]),
    "quantised": (
        edit("config.json", quantization_config={"quant_method": "awq"}),
        {},
        "take the model as it was before.*quantise by the worker's dtype: int8",
        lambda folder, _: edit("config.json", quantization_config=None)(folder),
        [{"dtype": "int8"}],
    ),
    "memory": (
        nothing,
        {"cache_memory_mb": 1, "max_context": 250, "max_sessions": 1},
        "lower max_context or raise cache_memory_mb",
        nothing,
        [{"cache_memory_mb": 1, "max_context": 16}, {"cache_memory_mb": 64, "max_context": 250}],
    ),
    "pickled": (pickled, {}, "convert once: python -c", run_python, [{}]),
    "shards": (shards, {}, r"fetch model\.safetensors\.index\.json as well", fetch_index, [{}]),
    "mark": (
        lambda folder: (folder / "config.json").write_text("\ufeff" + (folder / "config.json").read_text()) and None,
        {},
        "save it as UTF-8 without one",
        lambda folder, _: (folder / "config.json").write_text((folder / "config.json").read_text()[1:]) and None,
        [{}],
    ),
}


@pytest.mark.parametrize("name", ADVICE)
def test_what_a_worker_advises_helps(
    name: str, tiny_model_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil, settings, said, mend, advised = ADVICE[name]
    folder = Path(shutil.copytree(tiny_model_folder("llama"), tmp_path / "model"))
    if name == "memory":  # a cache of a model of a size that people run
        monkeypatch.setattr(
            "specsplit.engines.transformers.CausalLM.cache_bytes", lambda self, capacity, taps=0: capacity << 14
        )
    spoil(folder)

    def load(**changed: Any) -> Any:
        return load_servicer(TargetWorkerConfig(**{"model": folder, "threads": 1, "engine": "transformers", **changed}))

    with pytest.raises(UserError, match=said) as refusal:
        load(**settings)
    mend(folder, str(refusal.value))
    for changed in advised:
        load(**changed)


@pytest.mark.parametrize(("limit", "advice"), [(16, "raise workers.max_context"), (512, "the model has no more")])
def test_what_is_advised_of_a_prompt_that_is_too_long(
    limit: int, advice: str, tiny_model_folder: Callable[..., Path]
) -> None:
    """By a worker that could hold more, and by one whose model cannot."""
    prompts = [Prompt("long", "test", "x" * (20 if limit == 16 else 300))]

    def encode(max_context: int) -> None:
        config = TargetWorkerConfig(
            model=tiny_model_folder("llama"), threads=1, engine="transformers", max_context=max_context
        )
        reply = load_servicer(config).Describe(pb.DescribeRequest(), None)  # type: ignore[arg-type]
        size, raisable = text_limit(reply)
        encode_prompts(prompts, TextCodec(make_tokenizer()), chat=True, limit=size, raisable=raisable)

    with pytest.raises(UserError, match=re.escape(advice)):
        encode(limit)
    if limit == 16:
        encode(64)
