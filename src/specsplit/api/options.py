"""The options of a text by their Python names, and the settings of the client that they stand for."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict, TypeVar

from pydantic import BaseModel, ValidationError

from specsplit.decoding.theory import PipelineMode
from specsplit.errors import OptionError
from specsplit.settings.run import DraftFailure, OrchestratorConfig, SamplingMethod, StatesForm

S = TypeVar("S", bound=BaseModel)


class Options(TypedDict, total=False):
    """How a text is written. What is not given is as the pair has it, then as SPECSPLIT_ORCH_* says, then the default.

    gamma: depth of a draft, or "auto": chosen in every round from what was measured; 0 = the target alone.
    tree: shape of a draft: "chain", "3x2" (children per level), "dynamic-16x4" (nodes, nodes fed in a pass).
    lookup: prompt lookup: where the last so many tokens of the text, or more, occurred in it before, what followed them
    is the draft, and no model is asked; 0 = none. It works without a draft model as well.
    mode: "sync", "overlap" or "lookahead": what is drafted while the target verifies.
    fan_out: outcomes of a verification that lookahead prepares drafts for.
    temperature: 0 = greedy. top_k: 0 = all tokens. top_p: 1 = all tokens.
    sampling: "coupled": the text is bit for bit that of the target alone; "rejection": it is so in distribution.
    seed: decides what is sampled. max_new_tokens, max_rounds: what ends a text, besides its stop tokens.
    stop: a string or several that end a text before them; what the target writes is not changed by it.
    stop_token_ids: tokens that end a text; by default those that the target names. ignore_eos: no token ends it.
    max_context: longest text, prompt included. use_chat_template: a string is one user turn of the model's template.
    hidden_states_form, hidden_states_project, hidden_states_window: what a draft that reads the target's hidden states
    is sent (docs/hidden-states.md). rtt_ms, jitter_ms, bandwidth_mbit: a network to the target, simulated.
    on_draft_failure: "reconnect", "target_alone" or "fail".
    """

    gamma: int | Literal["auto"]
    tree: str
    lookup: int
    mode: PipelineMode
    fan_out: int
    temperature: float
    top_k: int
    top_p: float
    sampling: SamplingMethod
    seed: int
    max_new_tokens: int
    max_rounds: int | None
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool
    max_context: int | None
    use_chat_template: bool
    hidden_states_form: StatesForm
    hidden_states_project: Literal["draft", "target"]
    hidden_states_window: int | None
    rtt_ms: float
    jitter_ms: float
    bandwidth_mbit: float
    on_draft_failure: DraftFailure


FIELDS = {"max_new_tokens": "max_output_tokens"}  # where the setting's name is another


def with_options(config: OrchestratorConfig, options: Mapping[str, Any], *, has_draft: bool) -> OrchestratorConfig:
    """The settings with these options in place of their own. Raises OptionError that names the option."""
    for name in options:
        if name not in Options.__annotations__:
            close = difflib.get_close_matches(name, Options.__annotations__, n=1)
            hint = f"; did you mean {close[0]}?" if close else f": there are {', '.join(Options.__annotations__)}"
            raise OptionError(f"{name} is not an option of a text{hint}")
    given = {FIELDS.get(name, name): value for name, value in options.items()}
    if "stop" in given:  # one string is not a list written as JSON
        given["stop"] = [given["stop"]] if isinstance(given["stop"], str) else list(given["stop"] or ())
    if given.get("stop_token_ids") is not None:
        given["stop_token_ids"] = list(given["stop_token_ids"])
    if given:
        config = checked(OrchestratorConfig, {**config.model_dump(), **given})
    if config.gamma and not has_draft and not config.lookup:
        raise OptionError(f"gamma={config.gamma!r}: this pair has no draft model; name one, or lookup=2, or gamma=0")
    return config


def checked(settings: type[S], values: Mapping[str, Any], of: str = "") -> S:
    """Settings of these values. Raises OptionError that names what is wrong. of: whose they are, for the message."""
    try:
        return settings(**values)
    except ValidationError as error:
        names = {field: name for name, field in FIELDS.items()}
        lines = []
        for problem in error.errors():
            field = str(problem["loc"][0]) if problem["loc"] else ""
            said = f"{names.get(field, field)}={problem['input']!r}: " if field else ""
            lines.append(f"{of}{said}{problem['msg']}")
        raise OptionError("\n".join(dict.fromkeys(lines))) from None
