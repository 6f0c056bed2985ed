"""What a draft's dtype means: by device, and by the kind of model that is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gguf_files import write_gguf
from specsplit.engines import loading
from specsplit.engines.transformers import pick_dtype
from specsplit.models import sources
from specsplit.models.sources import prepare_model, resolve_model
from specsplit.settings.worker import DraftWorkerConfig

from heads import head_tensors, write_head
from tiny_models import make_tokenizer

AUTO = {"cpu": "int8", "7.5": "float16", "8.0": "bfloat16", "12.0": "bfloat16"}  # by compute capability of a GPU


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16", "int8"])
@pytest.mark.parametrize("place", AUTO)
def test_what_a_dtype_means_on_a_device(place: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu" if place == "cpu" else "cuda:0")
    capability = tuple(map(int, place.split("."))) if place != "cpu" else None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert pick_dtype(dtype, device) == (AUTO[place] if dtype == "auto" else dtype)


@pytest.fixture(scope="module")
def drafts(
    tiny_model_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """Settings of a draft worker for every kind of draft."""
    target, folder = tiny_model_folder("llama"), tmp_path_factory.mktemp("drafts")
    write_gguf(folder / "tiny.gguf")
    (folder / "gguf").mkdir()
    sources._prepare_gguf(folder / "tiny.gguf", folder / "gguf", "tiny")
    write_head(folder / "head", "original", head_tensors())
    make_tokenizer().save_pretrained(folder / "head")
    weightless: dict[str, dict[str, Any]] = {
        "synthetic": {"source": "synthetic", "step_ms": 0},
        "ngram": {"source": "ngram", "tokenizer": str(target)},
        "suffix": {"source": "suffix", "tokenizer": str(target)},
        "suffix, else a model": {"source": "suffix", "tokenizer": str(target), "model": str(target)},
    }
    for name, spec in weightless.items():
        prepare_model(spec, name, folder / name)
    return {
        "the target's folder": {"model": target},
        "without a layer": {"model": target, "skip_layers": [1]},
        "in transformers": {"model": target, "engine": "transformers"},
        "not of Llama's type": {"model": tiny_model_folder("gpt2")},
        "gguf": {"model": folder / "gguf"},
        "head": {"model": folder / "head"},
        **{name: {"model": folder / name} for name in weightless},
    }


@pytest.mark.parametrize(
    ("kind", "auto"),
    [
        ("the target's folder", "int8"),
        ("without a layer", "int8"),
        ("in transformers", "int8"),
        ("not of Llama's type", "int8"),
        ("gguf", "int8"),
        ("head", "int8"),
        ("synthetic", "float32"),
        ("ngram", "float32"),
        ("suffix", "float32"),
        ("suffix, else a model", "int8"),
    ],
)
def test_what_auto_means_for_a_kind_of_draft_on_the_cpu(
    drafts: dict[str, dict[str, Any]], kind: str, auto: str
) -> None:
    for dtype, wanted in {"auto": auto, "bfloat16": "bfloat16"}.items():
        config = DraftWorkerConfig(dtype=dtype, device="cpu", **drafts[kind])
        assert config.model is not None
        _, identity = loading.load_model(*resolve_model(config.model), config)
        assert identity["dtype"] == wanted
