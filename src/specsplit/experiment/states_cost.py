"""What it costs to ship the target's hidden states: a head that reads them beside a draft that does not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle, islice, product
from pathlib import Path
from typing import Any

from specsplit.experiment.columns import RequestRecord
from specsplit.experiment.journal import journal_beside
from specsplit.experiment.records import (
    Request,
    deciding,
    in_turn,
    request_config,
    request_record,
    text_writer,
    tokens_sha256,
)
from specsplit.settings.measure import StatesCostSettings
from specsplit.settings.run import OrchestratorConfig

DRAFT, HEAD = "draft", "head"


@dataclass(frozen=True)
class StatesRecord(RequestRecord):
    """One text. draft: DRAFT or HEAD. form, project, window: settings of a head; 0 is the whole prompt. lossless:
    whether it is, token for token, what the target writes alone."""

    form: str = ""
    project: str = ""
    window: int | None = None
    lossless: bool = True


def kinds(
    draft: OrchestratorConfig, head: OrchestratorConfig, settings: StatesCostSettings
) -> list[tuple[OrchestratorConfig, dict[str, Any]]]:
    """The draft first, then the head in every way to ship states: the settings of a text, and what its row says."""
    found: list[tuple[OrchestratorConfig, dict[str, Any]]] = [(draft, {})]
    for project, form, window in product(settings.project, settings.form, settings.window):
        told = {"project": project, "form": form, "window": window}
        fields = {f"hidden_states_{name}": value or None for name, value in told.items()}
        found.append((head.model_copy(update=fields), told))
    return found


def measure_states_cost(
    requests: Sequence[Request],
    draft: OrchestratorConfig,
    head: OrchestratorConfig,
    settings: StatesCostSettings,
    output: Path,
    *,
    decides: Mapping[str, Any] | None = None,
    on_rows: Callable[[list[StatesRecord]], None] = lambda rows: None,
    on_end: Callable[[list[StatesRecord]], None] = lambda rows: None,
) -> None:
    """Each request by every kind in turn, at every round trip and bandwidth.

    draft, head: with the addresses of their workers, at a fixed gamma. output: the table that is made of the rows; what
    a journal beside it has of an earlier attempt with the same settings, and the same `decides`, is not measured again.
    on_rows: gets the rows of one request at one network. on_end: gets all of them, before the journal is deleted. The
    text of the target alone is written first, unmeasured.
    """
    ways = kinds(draft, head, settings)
    configs = [deciding(config) for config, _ in ways]
    own = {"settings": settings.model_dump(mode="json"), "configs": configs, **(decides or {})}
    with journal_beside(output, requests, own) as journal, ExitStack() as stack:
        writers = {config.draft_name: stack.enter_context(text_writer(config)) for config in (draft, head)}

        def alone(request: Request) -> str:
            config = request_config(draft.model_copy(update={"gamma": 0}), request)
            return tokens_sha256(writers[draft.draft_name].write(request.token_ids, config).output_tokens)

        def write(place: int, request: Request, network: Mapping[str, float], text: str) -> StatesRecord:
            config, told = ways[place]
            config = request_config(config.model_copy(update=dict(network)), request)
            record = request_record(request, writers[config.draft_name].write(request.token_ids, config), config)
            return StatesRecord(**vars(record), **told, lossless=record.output_sha256 == text)

        def every(number: int, request: Request, network: Mapping[str, float], text: str) -> list[dict[str, Any]]:
            written = {place: write(place, request, network, text) for place in in_turn(range(len(ways)), number)}
            return [asdict(written[place]) for place in range(len(ways))]

        known = {r.id: journal.measured(["alone", r.id], partial(alone, r)) for r in requests}
        for request, place in product(islice(cycle(requests), settings.warmup), range(len(ways))):
            write(place, request, {}, "")
        rows = []
        for rtt_ms, mbit in product(settings.rtt_ms, settings.bandwidth_mbit):
            network = {"rtt_ms": rtt_ms, "bandwidth_mbit": mbit}
            for number, request in enumerate(requests):
                part = [rtt_ms, mbit, request.id]
                made = journal.measured(part, partial(every, number, request, network, known[request.id]))
                rows += (found := [StatesRecord(**row) for row in made])
                on_rows(found)
        on_end(rows)
        journal.remove()
