"""What a token costs against the length of its context."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import cycle, islice, product
from statistics import median

from specsplit.client.result import SpeculativeResult
from specsplit.decoding.measures import tokens_per_round
from specsplit.experiment.records import Request, in_turn, request_record, text_writer
from specsplit.settings.run import OrchestratorConfig


@dataclass(frozen=True)
class ContextText:
    """One text: a row of `context_curve_texts.csv`.

    context_tokens: length of the prompt; the text adds output_tokens to it. ttft_ms: with the prefill of the context.
    itl_ms: time after the first round per token of the later ones. verify_compute_ms, draft_compute_ms: model time of a
    round, median over the rounds but the first.
    """

    gamma: int | str
    context_tokens: int
    text: int
    output_tokens: int
    ttft_ms: float | None
    itl_ms: float | None
    tokens_per_round: float
    verify_compute_ms: float
    draft_compute_ms: float


def measure_contexts(
    requests: Sequence[Request],
    configs: Sequence[OrchestratorConfig],
    lengths: Sequence[int],
    *,
    texts: int,
) -> Iterator[ContextText]:
    """`texts` texts at each of `lengths` tokens of context for each configuration, which take turns text by text.

    A context is the tokens of the requests one after the other, cut at its length; each text begins at another request.
    One text of each configuration at the shortest length is written first and not counted.
    """
    with ExitStack() as stack:
        writers = []
        for config in configs:
            writer = stack.enter_context(text_writer(config))
            writers.append((config, writer))
            writer.write(_context(requests, lengths[0], 0), config)
        for text, length in product(range(texts), lengths):
            prompt = _context(requests, length, text)
            for config, writer in writers:
                yield _row(text, prompt, config, writer.write(prompt, config))


def _row(text: int, prompt: list[int], config: OrchestratorConfig, result: SpeculativeResult) -> ContextText:
    record = request_record(Request(str(text), "", prompt), result, config)
    later = result.rounds[1:] or result.rounds
    return ContextText(
        gamma=config.gamma,
        context_tokens=len(prompt),
        text=text,
        output_tokens=record.generated_tokens,
        ttft_ms=record.ttft_ms,
        itl_ms=record.itl_ms,
        tokens_per_round=tokens_per_round(later),
        verify_compute_ms=median(r.verify_compute_ms for r in later),
        draft_compute_ms=median(r.draft_compute_ms for r in later),
    )


def _context(requests: Sequence[Request], length: int, text: int) -> list[int]:
    tokens = [token for request in in_turn(requests, text) for token in request.token_ids]
    return list(islice(cycle(tokens), length))
