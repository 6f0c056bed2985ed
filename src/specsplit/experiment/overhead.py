"""Rounds of real workers whose models take no time: what is left is what the system itself costs."""

from __future__ import annotations

from dataclasses import asdict
from itertools import product
from typing import Any

from specsplit.client.writer import TextWriter
from specsplit.decoding.theory import PipelineMode
from specsplit.experiment.theory_check import simulated_workers
from specsplit.experiment.transport import bare_round_trip_ms
from specsplit.rpc.credentials import Access
from specsplit.settings.measure import OverheadSettings
from specsplit.settings.run import OrchestratorConfig

ACCEPTANCE = 0.8  # of the simulated drafts


def measure_overhead(settings: OverheadSettings) -> list[dict[str, Any]]:
    """The rounds of the texts in each mode at each gamma, and of the target alone (gamma 0).

    A row a round: mode, gamma, text, the fields of `Round`, and bare_grpc_ms: the median of a message of about that
    size and its answer with gRPC and nothing else, measured just before. The points take turns text by text, after
    a first text each that is not counted.
    """
    points: list[tuple[PipelineMode, int]] = [("sync", 0), *product(settings.mode, settings.gamma)]
    rows = []
    ours = Access.of(OrchestratorConfig.load())  # a token in the environment is the workers' as well
    with (
        simulated_workers(ACCEPTANCE, draft_ms=0.0, verify_ms=0.0) as (draft, target),
        TextWriter(draft, target, access=ours) as writer,
    ):
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
