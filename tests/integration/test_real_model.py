"""The embedded model behind real workers: the text is the target's own, whatever drafts it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import closing
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from specsplit.client.writer import TextWriter
from specsplit.decoding.tree import TokenTree
from specsplit.distill.acceptance import acceptance, measure
from specsplit.engines.hidden_states import HiddenStatesHead
from specsplit.engines.numba import FusedLM
from specsplit.engines.transformers import CausalLM, library_model
from specsplit.experiment.dataset import load_prompts, select_prompts
from specsplit.experiment.llama_cpp import LlamaCpp
from specsplit.experiment.peers import Peer
from specsplit.launch.heartbeat import hold_lease
from specsplit.launch.start import start_worker, stop_worker
from specsplit.models.fingerprint import gguf_weights
from specsplit.models.sources import resolve_model
from specsplit.models.tokenizer import TextCodec
from specsplit.models.vocabulary import load_vocabulary
from specsplit.rpc.connection import Connection, connect
from specsplit.settings.configuration import load_pipeline_config
from specsplit.settings.run import OrchestratorConfig

ROOT = Path(__file__).parents[2]
SHAPES = ("chain", "3x2", "dynamic-16x4")
GAMMAS = (1, 3, 5, 8, 12)
MODES = ("sync", "overlap", "lookahead")


@pytest.fixture(scope="module")
def model_folder(embedded_model: Path) -> Path:
    return resolve_model(embedded_model)[0]


@pytest.fixture(scope="module")
def reference(model_folder: Path) -> Any:
    """The model in transformers."""
    return library_model(model_folder, torch.float32).eval()


class Workers(dict[str, Connection]):
    """A float32 target, the default draft, and the target as its own: in bfloat16, and without two layers.

    Each is started when it is first asked for.
    """

    def __init__(self, model: Path, folder: Path) -> None:
        super().__init__()
        self._model, self.folder = model, folder

    def __missing__(self, name: str) -> Connection:
        flags = {
            "target": [],
            "draft": [],
            "self": ["--dtype", "bfloat16"],
            "weak": ["--dtype", "bfloat16", "--skip-layers", "13", "14"],
        }[name]
        shipped = ROOT / load_pipeline_config({})["models"]["smollm2-two-layers"]["path"]
        role = "target" if name == "target" else "draft"
        model = shipped if name == "draft" else self._model
        arguments = ["--model", str(model), "--port", "0", "--threads", "1", *flags]
        files = {"endpoint_file": self.folder / f"{name}.json", "log_file": self.folder / f"{name}.log"}
        self[name] = connect(role, start_worker(role, arguments, **files, timeout_s=120).address)
        return self[name]


@pytest.fixture(scope="module")
def workers(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    with patch.dict(os.environ):
        hold_lease()  # they end with the tests, even when those are killed
        started = Workers(model_folder, tmp_path_factory.mktemp("workers"))
        try:
            yield started
        finally:
            for connection in started.values():
                connection.close()
            for file in started.folder.glob("*.json"):
                stop_worker(file)


def check_identity(
    workers: Workers,
    reference: Any,
    model_folder: Path,
    prompts: int | None,
    gammas: tuple[int, ...],
    length: int,
    *,
    modes: tuple[str, ...] = ("sync",),
    shapes: tuple[str, ...] = SHAPES[:2],
    temperatures: tuple[float, ...] = (0.0,),
    drafts: tuple[str, ...] = ("draft", "self", "weak"),
) -> dict[str, int]:
    """Every text equals gamma 0, and when greedy transformers' own search; returns drafted and accepted tokens."""
    codec = TextCodec.load(model_folder)
    taken = select_prompts(load_prompts(ROOT / "resources" / "prompts" / "specsplit-48.jsonl")[0], prompts)
    counts = {"drafted": 0, "accepted": 0}

    def write(draft: str, ids: list[int], **settings: Any) -> list[int]:
        config = OrchestratorConfig(max_output_tokens=length, seed=1, **settings)
        with TextWriter(workers[draft].address, workers["target"].address) as writer:
            result = writer.write(ids, config)
        counts["drafted"] += sum(r.drafted for r in result.rounds)
        counts["accepted"] += sum(r.accepted for r in result.rounds)
        return result.output_tokens

    for prompt, temperature in product(taken, temperatures):
        ids = codec.encode(prompt.prompt)
        expected = write("draft", ids, gamma=0, temperature=temperature)
        if not temperature:
            with torch.inference_mode():
                full = reference.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=length)[0].tolist()
            assert expected == [token for token in full[len(ids) :] if token != 2], prompt.id
        for draft, gamma, tree, mode in product(drafts, gammas, shapes, modes):
            text = write(draft, ids, gamma=gamma, tree=tree, mode=mode, temperature=temperature)
            assert text == expected, (prompt.id, draft, gamma, tree, mode, temperature)
    return counts


@pytest.mark.model
def test_text_is_the_targets_own(workers, reference, model_folder):
    counts = check_identity(workers, reference, model_folder, 1, (1, 5), 12, drafts=("draft",))
    # Both happened: a test in which everything is accepted, or nothing, would prove little.
    assert 0.05 < counts["accepted"] / counts["drafted"] < 0.99


@pytest.mark.model
@pytest.mark.slow
def test_text_is_the_targets_own_in_every_mode(workers, reference, model_folder):
    settings = {"modes": MODES, "shapes": SHAPES, "temperatures": (0.7,), "drafts": ("weak",)}
    counts = check_identity(workers, reference, model_folder, 1, (4,), 12, **settings)
    assert 0.1 < counts["accepted"] / counts["drafted"] < 0.99


@pytest.mark.model
@pytest.mark.slow
def test_the_shipped_head_changes_no_text_and_is_accepted_as_its_card_says(workers, reference, model_folder, tmp_path):
    """In every mode; and by the reference loop near the card's figure, which is of more prompts."""
    folder = ROOT / "resources" / "drafts" / "smollm2-hidden-states"
    file = tmp_path / "head.json"
    arguments = ["--model", str(folder), "--target-tokenizer", str(model_folder), "--port", "0", "--threads", "1"]
    try:
        endpoint = start_worker("draft", arguments, endpoint_file=file, log_file=tmp_path / "log", timeout_s=120)
        with closing(connect("draft", endpoint.address)) as workers["head"]:
            settings = {"modes": MODES, "shapes": SHAPES, "temperatures": (0.0, 0.7), "drafts": ("head",)}
            counts = check_identity(workers, reference, model_folder, 2, (3,), 16, **settings)
    finally:
        stop_worker(file)
    assert 0.02 < counts["accepted"] / counts["drafted"] < 0.99
    codec, head = TextCodec.load(model_folder), HiddenStatesHead.load(folder, device="cpu", target=model_folder)
    prompts = select_prompts(load_prompts(ROOT / "resources" / "prompts" / "specsplit-48.jsonl")[0], 8)
    requests = [(prompt.id, prompt.category, codec.encode(prompt.prompt)) for prompt in prompts]
    target, vocabulary = CausalLM.load(model_folder, device="cpu"), load_vocabulary(folder, None, head.vocab_size)
    table = acceptance(measure(target, head, vocabulary, requests, gamma=2, max_tokens=32), confidence=0.9)
    said = re.search(
        r"^\| 1 \| \d+ \| \d+ \| ([.\d]+) \|$", (folder / "MODEL_CARD.md").read_text("utf-8"), re.MULTILINE
    )
    assert said is not None
    assert table["acceptance_rate"][0] == pytest.approx(float(said[1]), abs=0.1)


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_text_is_the_targets_own_for_every_prompt_and_gamma(workers, reference, model_folder):
    counts = check_identity(workers, reference, model_folder, None, GAMMAS, 32)
    print(counts)
    assert 0.3 < counts["accepted"] / counts["drafted"] < 0.99


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_text_is_the_targets_own_in_every_mode_at_every_temperature(workers, reference, model_folder):
    settings = {"modes": MODES, "shapes": SHAPES, "temperatures": (0.0, 0.7, 1.0)}
    counts = check_identity(workers, reference, model_folder, 6, (1, 3, 6), 24, **settings)
    print(counts)
    assert 0.1 < counts["accepted"] / counts["drafted"] < 0.99


@pytest.mark.model
@pytest.mark.parametrize("name", ["llama.cpp", "llama.cpp-draft", "llama.cpp-prompt-lookup"])
def test_llama_cpp_writes_the_embedded_models_text(model_folder, reference, name):
    """Token by token, ended by the end of text or the limit; its rounding is another, so only the beginning is held."""
    pytest.importorskip("xllamacpp")
    codec, file = TextCodec.load(model_folder), gguf_weights(model_folder)
    prompt = codec.encode("Repeat: one two three one two three one two three.")
    peer = Peer.parse(name)
    with LlamaCpp(peer, file, file if peer.wants_draft else None, 1, 256) as process:
        assert process.description["threads"] == 1
        text = process.write(peer, prompt, max_tokens=6, stop_ids=[2])
        again = process.write(peer, prompt, max_tokens=6, stop_ids=[2])
        ended = process.write(peer, prompt, max_tokens=6, stop_ids=[text.output_tokens[2]])
    with torch.inference_mode():
        first = int(reference(torch.tensor([prompt])).logits[0, -1].argmax())
    assert (text.output_tokens[0], text.finish_reason, sum(text.chunks)) == (first, "length", 6)
    assert text.output_tokens == again.output_tokens
    assert (ended.output_tokens, ended.finish_reason) == (text.output_tokens[:2], "eos")
    assert text.arrived_ms == sorted(text.arrived_ms)
    assert 0 < text.rounds <= 6


@pytest.mark.model
def test_weights_as_stored_have_the_bits_of_float32(model_folder):
    """Every logit of the embedded model in the fused engine, whatever the number of tokens in a pass."""
    assert gguf_weights(model_folder) is not None
    stored, wide = FusedLM(CausalLM.load_blocks(model_folder), 2), FusedLM(CausalLM.load(model_folder, device="cpu"), 2)
    assert stored.weight_bytes < 0.2 * wide.weight_bytes
    tokens = [(97 * i + 11) % stored.vocab_size for i in range(150)]
    alone = {}
    for engine in (stored, wide):
        cache = engine.new_cache(160)
        alone[engine] = [engine.step(cache, [token])[0] for token in tokens[:20]]
    assert all(torch.equal(*rows) for rows in zip(*alone.values(), strict=True))
    for count in range(1, 21):
        rows = stored.step(stored.new_cache(32), tokens[:1], TokenTree.chain(tokens[1:count]))
        assert all(torch.equal(a, b) for a, b in zip(rows, alone[stored][:count], strict=True)), count
    assert torch.equal(*(engine.step(engine.new_cache(160), tokens)[0] for engine in (stored, wide)))
