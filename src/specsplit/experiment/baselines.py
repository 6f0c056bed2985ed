"""What people have without two workers, measured in each run beside its own configuration.

Gamma 0 through the same loop is what `speedup` is against. The target that streams its tokens by itself is what a
server does, and the same pair in one process what a library does; both pay no round trip for a token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from specsplit.api.pair import Pair
from specsplit.client.event_loop import event_loop
from specsplit.client.result import SpeculativeResult
from specsplit.client.text import OnTokens
from specsplit.client.writer import TextWriter
from specsplit.experiment.columns import COLOCATED, STREAMED, WORKERS
from specsplit.experiment.records import Request, gamma_controller, request_config
from specsplit.settings.names import DEFAULT_DRAFT
from specsplit.settings.run import NO_NETWORK, OrchestratorConfig


@dataclass(frozen=True)
class Contender:
    """One way to write the texts of a run. config: what its rows say. write: one text."""

    setup: str
    config: OrchestratorConfig
    write: Callable[[Request], SpeculativeResult]


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
        self, config: OrchestratorConfig, writer: TextWriter, stops: Callable[[], OnTokens | None]
    ) -> list[Contender]:
        """They, for a run with these settings. stops: makes what ends one text at a stop string."""
        plain = {"gamma": 0, "mode": "sync", "tree": "chain", "draft_name": DEFAULT_DRAFT, "draft_acceptance": None}
        alone = config.model_copy(update=plain)
        found = []
        if config.gamma != 0:

            def through_workers(request: Request) -> SpeculativeResult:
                return writer.write(request.token_ids, request_config(alone, request), on_tokens=stops())

            found.append(Contender(WORKERS, alone, through_workers))
        if STREAMED in self.setups:

            def streamed(request: Request) -> SpeculativeResult:
                return writer.stream_target(request.token_ids, request_config(alone, request), on_tokens=stops())

            found.append(Contender(STREAMED, alone, streamed))
        if COLOCATED in self.setups and self.pair is not None:
            pair, controller = self.pair, gamma_controller(config)
            here = config.model_copy(update=NO_NETWORK)

            def write(request: Request) -> SpeculativeResult:
                own = request_config(here, request)
                return event_loop().run(
                    pair.write_tokens(request.token_ids, own, on_tokens=stops(), controller=controller)
                )

            found.append(Contender(COLOCATED, config, write))
        return found
