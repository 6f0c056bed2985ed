"""The points of a sweep: the product of its axes, the name of each point's run folder, and the settings of its run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from specsplit.settings.names import DEFAULT_DRAFT, gamma_order

# Settings that every point of a sweep shares, with what they are where they decide nothing: the defaults of
# OrchestratorConfig, which Snakemake cannot import.
SHARED_DEFAULTS: dict[str, Any] = {
    **{"fan_out": 16, "top_k": 0, "top_p": 1.0, "sampling": "coupled", "jitter_ms": 0.0},
    **{"hidden_states_form": "bfloat16", "hidden_states_project": "draft", "hidden_states_window": None},
}

_AXES = ("gamma", "mode", "tree", "temperature", "rtt_ms", "bandwidth_mbit")


@dataclass(frozen=True)
class Point:
    """One run of a sweep.

    gamma: draft length in tokens, or `auto`. draft: name of the draft model. rtt_ms, bandwidth_mbit: of the
    simulated network.
    """

    gamma: int | str
    mode: str = "sync"
    tree: str = "chain"
    temperature: float = 0.0
    rtt_ms: float = 0.0
    draft: str = DEFAULT_DRAFT
    bandwidth_mbit: float = 0.0

    @property
    def label(self) -> str:
        """Name of its run folder: `gamma_5`, `lookahead_3x2_t0.7_rtt14_gamma_auto`.

        An axis is in it only where it is not at its default, so another value on an axis renames no finished run.
        """
        parts = [
            f"draft-{self.draft}" if self.draft != DEFAULT_DRAFT else "",
            self.mode if self.mode != "sync" else "",
            self.tree if self.tree != "chain" else "",
            f"t{plain_number(self.temperature)}" if self.temperature else "",
            f"rtt{plain_number(self.rtt_ms)}" if self.rtt_ms else "",
            f"mbit{plain_number(self.bandwidth_mbit)}" if self.bandwidth_mbit else "",
            f"gamma_{self.gamma}",
        ]
        return "_".join(part for part in parts if part)

    def settings(self, shared: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of OrchestratorConfig for the run of this point.

        shared: a value for each key of SHARED_DEFAULTS. Where one decides nothing it is at its default (top_k of
        greedy decoding, fan_out outside lookahead), so that a change of it reruns only the points that it concerns.
        """
        concerned = {
            **{"fan_out": self.mode == "lookahead", "jitter_ms": True},
            **dict.fromkeys(("top_k", "top_p", "sampling"), self.temperature > 0),
            **dict.fromkeys(("hidden_states_form", "hidden_states_project", "hidden_states_window"), self.gamma != 0),
        }
        return {
            **{name: getattr(self, name) for name in _AXES},
            "draft_name": self.draft,
            # Each in the type of its default: 1 and 1.0 are one setting.
            **{
                key: _typed(shared[key], default) if concerned[key] else default
                for key, default in SHARED_DEFAULTS.items()
            },
        }


def _typed(value: Any, default: Any) -> Any:
    return value if default is None else type(default)(value)


def sweep_points(
    gammas: Iterable[int | str],
    modes: Iterable[str] = ("sync",),
    trees: Iterable[str] = ("chain",),
    temperatures: Iterable[float] = (0.0,),
    rtts_ms: Iterable[float] = (0.0,),
    drafts: Iterable[str] = (DEFAULT_DRAFT,),
    bandwidths_mbit: Iterable[float] = (0.0,),
) -> list[Point]:
    """The product of the axes, each point once, in the order in which they are best run and read.

    Gamma 0 drafts nothing, so mode, tree and draft are nothing to it: it is one synchronous point for each temperature
    and network.
    """
    networks = product(rtts_ms, bandwidths_mbit)
    every = product(temperatures, networks, drafts, modes, trees, sorted(set(gammas), key=gamma_order))
    points = [
        Point(gamma, mode, tree, float(temperature), float(rtt), draft, float(mbit))
        if gamma != 0
        else Point(0, temperature=float(temperature), rtt_ms=float(rtt), bandwidth_mbit=float(mbit))
        for temperature, (rtt, mbit), draft, mode, tree, gamma in every
    ]
    return list(dict.fromkeys(points))


def plain_number(value: float) -> str:
    """The shortest text that says this very number, without a needless `.0`: 14, 0.7."""
    return repr(float(value)).removesuffix(".0")
