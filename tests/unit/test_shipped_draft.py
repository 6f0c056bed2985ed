"""The drafts that come with the project: complete, small enough for a repository, and what their records say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from specsplit.engines.transformers import CausalLM, pick_dtype
from specsplit.io import combined_sha256, sha256_file
from specsplit.models.fingerprint import fingerprint_model, hash_files
from specsplit.models.sources import prepare_model, resolve_model
from specsplit.models.vocabulary import ReducedVocabulary, load_vocabulary
from specsplit.settings.configuration import load_pipeline_config

ROOT = Path(__file__).parents[2]
DRAFTS = sorted(path for path in (ROOT / "resources" / "drafts").iterdir() if path.is_dir())
MOST_BYTES = 25e6  # of a file
MODELS = load_pipeline_config({})["models"]


@pytest.mark.parametrize("draft", DRAFTS, ids=lambda path: path.name)
def test_a_shipped_draft_is_whole(draft: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sums = dict(reversed(line.split("  ")) for line in (draft / "SHA256SUMS").read_text("utf-8").splitlines())
    files = {path.name: path for path in draft.iterdir() if path.name != "SHA256SUMS"}
    assert sums == {name: sha256_file(path) for name, path in files.items()}
    assert max(path.stat().st_size for path in files.values()) < MOST_BYTES

    entry = MODELS[draft.name]
    assert entry == {"source": "local", "path": f"resources/drafts/{draft.name}", "sha256": entry["sha256"]}
    assert combined_sha256(hash_files(draft)) == entry["sha256"]
    monkeypatch.chdir(ROOT)
    manifest = prepare_model(entry, draft.name, tmp_path / "prepared")
    assert manifest["pinned"]
    assert resolve_model(tmp_path / "prepared")[0] == Path(entry["path"])
    fingerprint = fingerprint_model(draft)
    card = (draft / "MODEL_CARD.md").read_text("utf-8")
    for fact in (fingerprint["weights_sha256"], f"{fingerprint['parameters']:,}", "Apache-2.0"):
        assert fact in card


def test_the_default_draft_is_a_shipped_one_that_says_a_part_of_the_targets_tokens() -> None:
    config = load_pipeline_config({})
    draft = ROOT / MODELS[config["draft"]["model"]]["path"]
    assert draft in DRAFTS
    model = CausalLM.load(draft, dtype=pick_dtype(config["draft"]["dtype"], torch.device("cpu")), device="cpu")
    vocabulary = load_vocabulary(draft, None, model.vocab_size)
    assert isinstance(vocabulary, ReducedVocabulary)
    logits = vocabulary.outward(model.step(model.new_cache(8), [1, 9690, 198]))
    assert logits.shape == (1, fingerprint_model(draft)["vocab_size"])
    assert logits.isfinite().sum() == model.vocab_size == 8192
