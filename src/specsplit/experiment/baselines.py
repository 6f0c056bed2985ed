"""What people have without two workers, measured in each run beside its own configuration.

Gamma 0 through the same loop is what `speedup` is against. The target that streams its tokens by itself is what a
server does, and the same pair in one process what a library does; both pay no round trip for a token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from specsplit.api.pair import Pair
from specsplit.client.event_loop import event_loop
from specsplit.client.pipeline import gamma_controller
from specsplit.client.result import SpeculativeResult
from specsplit.client.text import OnTokens
from specsplit.client.writer import TextWriter
from specsplit.decoding.adaptive import GammaController
from specsplit.experiment.columns import COLOCATED, STREAMED, WORKERS
from specsplit.experiment.records import Request, request_config
from specsplit.settings.names import DEFAULT_DRAFT
from specsplit.settings.run import NO_NETWORK, OrchestratorConfig

Write = Callable[[Request], SpeculativeResult]


@dataclass(frozen=True)
class Contender:
    """One way to write the texts of a run. config: what its rows say. write: one text."""

    setup: str
    config: OrchestratorConfig
    write: Write


@dataclass(frozen=True)
class Beside:
    """What a run measures beside its own configuration; gamma 0 is always part of it.

    setups: of STREAMED and COLOCATED. pair: for COLOCATED. left_out: setups that were asked for and cannot be measured
    here, each with the reason.
    """

    setups: Sequence[str] = ()
    pair: Pair | None = None
    left_out: Mapping[str, str] = field(default_factory=dict)


def contenders(
    config: OrchestratorConfig,
    writer: TextWriter,
    stops: Callable[[], OnTokens | None],
    controller: GammaController | None,
    beside: Beside | None,
) -> list[Contender]:
    """The run's own configuration first, then what is measured beside it.

    stops: makes what ends one text at a stop string. controller: of the run's own configuration.
    """

    def each(write: Callable[..., SpeculativeResult], own: OrchestratorConfig, **more: Any) -> Write:
        return lambda request: write(request.token_ids, request_config(own, request), on_tokens=stops(), **more)

    def ours(request: Request) -> SpeculativeResult:
        return each(writer.write, config, controller=controller, request_id=request.id)(request)

    found = [Contender(WORKERS, config, ours)]
    if beside is None:
        return found
    plain = {"gamma": 0, "mode": "sync", "tree": "chain", "draft_name": DEFAULT_DRAFT, "draft_acceptance": None}
    alone = config.model_copy(update=plain)
    if config.gamma != 0:
        found.append(Contender(WORKERS, alone, each(writer.write, alone)))
    if STREAMED in beside.setups:
        found.append(Contender(STREAMED, alone, each(writer.stream_target, alone)))
    if COLOCATED in beside.setups and (pair := beside.pair) is not None:

        def here(*text: Any, **more: Any) -> SpeculativeResult:
            return event_loop().run(pair.write_tokens(*text, **more))

        no_network = config.model_copy(update=NO_NETWORK)
        found.append(Contender(COLOCATED, config, each(here, no_network, controller=gamma_controller(config))))
    return found
