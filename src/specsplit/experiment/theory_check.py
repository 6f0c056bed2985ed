"""Simulated models behind real workers: measured time per token beside the formula's, and rounds of no model time.

The time of the models and how often they agree are given, so the difference between measurement and formula is the cost
of the system itself.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from specsplit.client.pipeline import gamma_controller
from specsplit.client.result import SpeculativeResult
from specsplit.client.writer import TextWriter
from specsplit.decoding.measures import tokens_per_round
from specsplit.decoding.theory import PipelineMode, expected_tokens
from specsplit.decoding.tree_plan import tpot_ms
from specsplit.experiment.transport import bare_round_trip_ms
from specsplit.launch.endpoint import Endpoint
from specsplit.launch.start import own_workers, start_worker
from specsplit.models.sources import prepare_model
from specsplit.rpc.credentials import Access
from specsplit.settings.measure import OverheadSettings, SimulationSettings
from specsplit.settings.run import MODES, OrchestratorConfig

ACCEPTANCE = 0.8  # of the drafts whose overhead is measured


@dataclass(frozen=True)
class Check:
    """One row of theory_check.csv: a mode at a round trip and a gamma, over all tokens of all texts but the first.

    formula_ms: by the formula of the mode at the nominal acceptance, of a network that takes rtt_ms and nothing else.
    expected_ms: the same formula with the tokens per round that these texts had by chance; ratio: tpot_ms / this.
    limit_ms: expected_ms with the bare gRPC round trips of a round, transport_ms in all, added to rtt_ms.
    ratio_to_limit: tpot_ms / limit_ms, what the system itself adds.
        All of these are empty for gamma auto, which has no formula of its own.
    hit_rate: share of the rounds whose draft was there when it was needed.
    lossless: every text was the target's own.
    """

    mode: str
    rtt_ms: float
    gamma: int | str
    tpot_ms: float
    formula_ms: float | None
    expected_ms: float | None
    ratio: float | None
    transport_ms: float
    limit_ms: float | None
    ratio_to_limit: float | None
    tokens_per_round: float
    hit_rate: float | None
    lossless: bool


@contextmanager
def simulated_workers(acceptance: float, draft_ms: float, verify_ms: float, seed: int = 0) -> Iterator[TextWriter]:
    """What writes texts through a draft and a target worker, processes of their own, for the time of the block.

    acceptance: probability that a drafted token is right. draft_ms, verify_ms: milliseconds of a pass of each model.
    """
    models = {
        "draft": {"step_ms": draft_ms, "acceptance": acceptance, "seed": seed},
        "target": {"step_ms": verify_ms, "seed": seed},
    }

    def start(role: str, endpoint_file: Path) -> Endpoint:
        model = endpoint_file.with_name(role)
        prepare_model({"source": "synthetic", **models[role]}, role, model)
        settings = ["--model", str(model), "--port", "0", "--threads", "1", "--max-context", "8192"]
        return start_worker(role, settings, endpoint_file=endpoint_file, timeout_s=120.0)

    ours = Access.of(OrchestratorConfig.load())  # a token in the environment is the workers' as well
    with (
        own_workers({role: partial(start, role) for role in models}) as workers,
        TextWriter(workers["draft"].address, workers["target"].address, access=ours) as writer,
    ):
        yield writer


def check_theory(simulation: SimulationSettings) -> Generator[Check, None, None]:
    """Every mode at every gamma and round trip, and the target alone: a row each."""
    prompts = [[65 + i, 66, 67] for i in range(simulation.texts)]
    # A worker is idle about as long as the other one computes.
    bare_ms = bare_round_trip_ms(simulation.verify_ms / 2)
    times = (simulation.acceptance, simulation.draft_ms, simulation.verify_ms)
    points: list[tuple[PipelineMode, int | str]] = [("sync", 0), *product(MODES, simulation.gamma)]
    with simulated_workers(*times, simulation.seed) as writer:
        for rtt_ms in simulation.rtt_ms:
            alone: list[list[int]] = []
            for mode, gamma in points:
                settings = {"mode": mode, "gamma": gamma, "fan_out": simulation.fan_out, "rtt_ms": rtt_ms}
                config = OrchestratorConfig.load({**settings, "max_output_tokens": simulation.tokens})
                controller = gamma_controller(config)
                results = [writer.write(prompt, config, controller=controller) for prompt in prompts]
                alone = alone or [result.output_tokens for result in results]
                yield _row(simulation, config, bare_ms, results, alone)


def _row(
    simulation: SimulationSettings,
    config: OrchestratorConfig,
    bare_ms: float,
    results: list[SpeculativeResult],
    alone: list[list[int]],
) -> Check:
    # Without the first round, which has no draft, and with a draft the second, whose draft could not be made ahead.
    left_out = 2 if config.gamma else 1
    rounds = [r for result in results for r in result.rounds[left_out:]]
    per_round = tokens_per_round(rounds)
    total_ms = sum(result.total_ms - result.rounds[left_out - 1].arrived_ms for result in results)
    measured = total_ms / (per_round * len(rounds))
    hits = [r.speculation == "hit" for r in rounds if r.speculation != "none"]
    transport_ms = bare_ms * (2 if config.gamma else 1)  # the draft worker's and the target's
    formula = expected = limit = None
    if isinstance(config.gamma, int):
        times = simulation.acceptance, simulation.draft_ms, simulation.verify_ms
        by_formula = partial(tpot_ms, config.mode, config.gamma, *times, fan_out=simulation.fan_out)
        by_chance = expected_tokens(simulation.acceptance, config.gamma) / per_round
        formula = by_formula(rtt_ms=config.rtt_ms)
        expected, limit = by_chance * formula, by_chance * by_formula(rtt_ms=config.rtt_ms + transport_ms)
    return Check(
        mode=config.mode,
        rtt_ms=config.rtt_ms,
        gamma=config.gamma,
        tpot_ms=measured,
        formula_ms=formula,
        expected_ms=expected,
        ratio=measured / expected if expected else None,
        transport_ms=transport_ms,
        limit_ms=limit,
        ratio_to_limit=measured / limit if limit else None,
        tokens_per_round=per_round,
        hit_rate=sum(hits) / len(hits) if hits else None,
        lossless=[result.output_tokens for result in results] == alone,
    )


def measure_overhead(settings: OverheadSettings) -> list[dict[str, Any]]:
    """The rounds of the texts in each mode at each gamma, and of the target alone (gamma 0).

    A row a round: mode, gamma, text, the fields of `Round`, and bare_grpc_ms: the median of a message of about that
    size and its answer with gRPC and nothing else, measured just before. The points take turns text by text, after
    a first text each that is not counted.
    """
    points: list[tuple[PipelineMode, int]] = [("sync", 0), *product(settings.mode, settings.gamma)]
    rows = []
    with simulated_workers(ACCEPTANCE, draft_ms=0.0, verify_ms=0.0) as writer:
        bare_ms = bare_round_trip_ms(0.0, repeats=500)
        for text in range(-1, settings.texts):  # -1: the warm-up
            for mode, gamma in points:
                config = OrchestratorConfig.load(
                    {"mode": mode, "gamma": gamma, "max_output_tokens": settings.tokens, "temperature": 0.0}
                )
                result = writer.write([65 + max(text, 0), 66, 67], config)
                if text >= 0:
                    about = {"mode": mode, "gamma": gamma, "text": text, "bare_grpc_ms": bare_ms}
                    rows += [{**about, **asdict(row)} for row in result.rounds]
    return sorted(rows, key=lambda row: points.index((row["mode"], row["gamma"])))
