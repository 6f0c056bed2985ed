"""Settings of a run: the draft -> verify loop, and the points of a sweep. Environment: SPECSPLIT_ORCH_*."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import AfterValidator, Field, model_validator

from specsplit.decoding.theory import PipelineMode
from specsplit.decoding.tree import TreeShape
from specsplit.settings.access import AccessSettings
from specsplit.settings.base import Settings, setting
from specsplit.settings.names import DEFAULT_DRAFT, lookup_name, synthetic_name

MODES = get_args(PipelineMode)
MAX_GAMMA = 64
AUTO_GAMMA_LIMIT = 16  # drafts longer than this pay nowhere that was measured
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-6, 100.0  # but for 0: beyond them logits overflow, or say nothing
MAX_SEED = (1 << 32) - 1


def _not_nearly_greedy(value: float) -> float:
    if 0 < value < MIN_TEMPERATURE:
        raise ValueError(f"write 0 for greedy, or {MIN_TEMPERATURE:g} at least")
    return value


Gamma = Annotated[int, Field(ge=0, le=MAX_GAMMA)] | Literal["auto"]
Tree = Annotated[
    str,
    AfterValidator(lambda text: str(TreeShape.parse(text))),
    Field(json_schema_extra={"title": "a tree: chain, 3x2 or dynamic-16x4", "plural": "trees"}),
]
Temperature = Annotated[float, Field(ge=0, le=MAX_TEMPERATURE), AfterValidator(_not_nearly_greedy)]
Milliseconds = Annotated[float, Field(ge=0)]
Megabits = Annotated[float, Field(ge=0)]
SamplingMethod = Literal["coupled", "rejection"]
DraftFailure = Literal["reconnect", "target_alone", "fail"]
StatesForm = Literal["bfloat16", "float32", "int8"]
OnBadLine = Literal["stop", "skip"]
DRAFT_NAME = r"^[A-Za-z0-9][A-Za-z0-9.-]{0,99}$"  # with marks; a part of names of files, which hold 255 bytes


class OrchestratorConfig(AccessSettings):
    """What one text is written with."""

    prefix = "SPECSPLIT_ORCH_"
    flags: ClassVar = {"draft_address": "--draft-addr", "target_address": "--target-addr"}
    other_variables: ClassVar = {"gamma": "SPECSPLIT_ORCH_MAX_DRAFT_TOKENS"}
    swept: ClassVar = ("gamma", "mode", "tree", "temperature", "rtt_ms", "bandwidth_mbit")

    draft_address: str = setting(
        "127.0.0.1:50051", "Host:port of the draft worker; grpcs:// before it: TLS.", operates=True
    )
    target_address: str = setting("127.0.0.1:50052", "Host:port of the target worker, likewise.", operates=True)
    tokenizer: Path | None = setting(None, "Folder of the tokenizer: a prepared or local model.", operates=True)
    mode: PipelineMode = setting(
        "sync",
        "Pipeline mode: what is drafted while the target verifies. `sync` nothing; `overlap` the next draft, as if all "
        "will be accepted; `lookahead` drafts for the likeliest outcomes.",
        note="sync | overlap | lookahead: what is drafted while the target verifies",
    )
    gamma: Gamma = setting(
        5,
        "Draft length: tokens drafted in a round, the depth of the tree. 0 drafts nothing: the target alone. `auto` "
        "chooses it anew in every round, from what was measured.",
    )
    tree: Tree = setting(
        "chain",
        "Shape of the draft: `chain`; children of each node, level by level and one below (`3x2`); or grown by "
        "probability, at most 16 nodes and 4 fed in a pass (`dynamic-16x4`).",
        note="chain | 3x2 (children per level) | dynamic-16x4 (nodes, nodes fed in a pass)",
    )
    draft_name: str = setting(DEFAULT_DRAFT, "Name of the draft in tables and run folders.", pattern=DRAFT_NAME)
    draft_acceptance: float | None = setting(
        None,
        "Forced acceptance: each drafted token is right with this probability, whatever the draft model would say, by "
        "the seed and its position. The text is written once before, unmeasured; verification stays as it is. So "
        "systems can be compared apart from the quality of a draft. It is called NAME-synthetic-P in every table. "
        "null: as the draft is.",
        example=0.8,
        note="0.8: forced, synthetic: each drafted token is right with this probability; null: as the draft is",
        ge=0,
        le=1,
    )
    lookup: int = setting(
        0,
        "Prompt lookup: where the last so many tokens of a text, or more, occurred in it before, what followed them is "
        "the draft of at most gamma tokens, and the draft worker is not asked, which saves its time. 0: off. With it a "
        "draft is called NAME-lookupN in every table.",
        example=2,
        ge=0,
        le=16,
    )
    p_min: float = setting(
        0.0,
        "Least probability of a drafted token: a draft ends, and a branch of a tree, where the draft model gives the "
        "path from the end of the text less than this, as it is seldom right there. 0: drafts are as deep as gamma. "
        "The text does not depend on it; not with rejection sampling.",
        example=0.3,
        note="a draft ends where its path is less probable than this, by the draft model; 0 = off",
        ge=0,
        lt=1,
    )
    fan_out: int = setting(
        16,
        "Outcomes of a verification that mode lookahead prepares drafts for.",
        example=4,
        note="outcomes of a verification that drafts are prepared for",
        ge=1,
        le=64,
    )
    temperature: Temperature = setting(0.0, "Sampling temperature; 0 is greedy.", note="0 = greedy")
    top_k: int = setting(
        0,
        "Sample from the k likeliest tokens; 0 is from all. Greedy runs do not depend on it.",
        example=50,
        note="0 = all tokens",
        ge=0,
    )
    top_p: float = setting(
        1.0,
        "Sample from the smallest set of tokens with this probability. Greedy runs do not depend on it.",
        example=0.95,
        gt=0,
        le=1,
    )
    sampling: SamplingMethod = setting(
        "coupled",
        "How sampled drafts are verified: `coupled` (the text is that of gamma 0, token for token) or `rejection` "
        "(right in distribution; not with a dynamic tree).",
        example="rejection",
        note="coupled | rejection: how sampled drafts are verified",
    )
    memory: str = setting(
        "",
        "Name of the memory that a draft of source suffix learns from and adds to; a text sees no other one. A "
        "benchmark has one for each repeat, so that no text is looked up in itself.",
        max_length=64,
    )
    rtt_ms: Milliseconds = setting(
        0.0, "Simulated round-trip time to the target worker in milliseconds, added by the client; 0 adds nothing."
    )
    jitter_ms: Milliseconds = setting(
        0.0, "Simulated jitter: each message is late by up to this much more, in milliseconds.", example=2
    )
    bandwidth_mbit: Megabits = setting(
        0.0,
        "Simulated bandwidth to the target worker in megabits (10^6) a second, each way: a message takes the time of "
        "its bytes, after the one before it; 0 is no limit.",
        example=100,
    )
    hidden_states_form: StatesForm = setting(
        "bfloat16",
        "Numbers in which the hidden states of the target go to a draft that reads them; int8 has a scale for each "
        "position.",
        example="int8",
        note="bfloat16 | float32 | int8: the numbers that cross the network",
    )
    hidden_states_project: Literal["draft", "target"] = setting(
        "draft",
        "Which worker applies the draft's `fc`: `draft`, and the states of all its layers cross the network; or "
        "`target`, and one vector a position does. Such a target worker has the setting hidden_states_draft.",
        example="target",
        note="draft | target: who applies fc; with target one vector a position crosses",
    )
    hidden_states_window: int | None = setting(
        None,
        "Positions at the end of a prompt whose hidden states are sent; the draft knows no more of the prompt. null: "
        "all.",
        example=256,
        note="positions at the end of a prompt that are sent; null = all",
        ge=1,
    )
    max_output_tokens: int = setting(128, "Most tokens generated for one request.", example=256, ge=1)
    max_rounds: int | None = setting(
        None,
        "Most draft and verify rounds of one request; null is no limit.",
        example=100,
        note="null = no limit",
        ge=1,
    )
    use_chat_template: bool = setting(
        True,
        "Wrap the prompt in the model's chat template, when the model has one.",
        example=False,
        note="when the model has one",
    )
    ignore_eos: bool = setting(
        False,
        "Go on after the end-of-sequence token, so that every request has max_output_tokens tokens.",
        example=True,
    )
    stop: list[Annotated[str, Field(min_length=1)]] = setting(
        [],
        "Strings that end a text, which is cut off before them.",
        example=["\n\n", "Question:"],
        note="strings that end a text before them",
        verbatim=True,
    )
    stop_token_ids: list[Annotated[int, Field(ge=0)]] | None = setting(
        None,
        "Tokens that end a text; null: those that the target names.",
        example=[2],
        note="null = those that the target names",
        schema={"uniqueItems": True},
    )
    max_context: int | None = setting(None, "Longest text, prompt included; null: what the target can hold.", ge=2)
    tls_name: str | None = setting(
        None, "Name in a worker's certificate, where it is not that of the address, as behind a tunnel.", operates=True
    )
    connect_timeout_s: float = setting(10.0, "Seconds to wait for a worker to answer.", operates=True, gt=0)
    rpc_timeout_s: float = setting(
        120.0,
        "Seconds after which a worker that does not answer has failed.",
        example=30,
        note="after which a worker that does not answer has failed",
        operates=True,
        gt=0,
    )
    recovery_timeout_s: float = setting(
        60.0,
        "Seconds that a worker that failed gets to be back, or to have room; then the request failed, which is a row "
        "too. 0 gives up at once.",
        example=600,
        note="that a worker gets to be back; then the request is a row that says failed",
        operates=True,
        ge=0,
    )
    on_draft_failure: DraftFailure = setting(
        "reconnect",
        "When the draft worker fails: `reconnect` waits for it, `target_alone` lets the target finish the text, `fail` "
        "gives the request up. The target is always waited for.",
        example="target_alone",
        note="reconnect | target_alone | fail",
        operates=True,
    )
    seed: int = setting(
        0,
        "Seed of everything that draws random numbers; recorded with every result. Greedy text does not depend on it.",
        example=7,
        ge=0,
        le=MAX_SEED,
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.sampling == "rejection" and self.temperature and self.shape.nodes:
            raise ValueError(
                "a dynamic tree keeps drafted tokens by their probability, which biases rejection sampling: "
                "use sampling coupled, or a chain or static tree"
            )
        if self.p_min and self.sampling == "rejection" and self.temperature:
            raise ValueError(
                "p_min leaves out drafted tokens by their probability, which biases rejection sampling: "
                "use sampling coupled, or p_min 0"
            )
        if self.draft_acceptance is not None:
            if self.p_min:
                raise ValueError(
                    "draft_acceptance says how often drafts are right, whatever the draft model says, and p_min asks "
                    "the draft model: drop one"
                )
            if self.sampling == "rejection" and self.temperature:
                raise ValueError("draft_acceptance needs a text that is known beforehand: use sampling coupled")
            if self.lookup:
                raise ValueError(
                    "draft_acceptance says how often drafts are right, but with lookup the text drafts too: drop one"
                )
            if self.gamma:
                self.draft_name = synthetic_name(self.draft_name, self.draft_acceptance)
        elif self.gamma:
            self.draft_name = lookup_name(self.draft_name, self.lookup)
        return self

    @property
    def shape(self) -> TreeShape:
        return TreeShape.parse(self.tree)

    @property
    def gamma_limit(self) -> int:
        """The deepest draft that may be asked for."""
        return AUTO_GAMMA_LIMIT if self.gamma == "auto" else self.gamma


# The settings of the simulated network, where there is none.
NO_NETWORK: dict[str, Any] = {
    field: OrchestratorConfig.model_fields[field].default for field in ("rtt_ms", "jitter_ms", "bandwidth_mbit")
}


def swept(field: str, default: list[Any] | None, **changes: Any) -> Any:
    """A setting of OrchestratorConfig of which several values are swept; None: the one value of OrchestratorConfig."""
    info = OrchestratorConfig.model_fields[field]
    return setting(default, f"{info.description} Several are swept.", min_length=1, **changes)


class SweepSettings(Settings):
    """The axes of a sweep, and how often it is measured. An axis that is not given is what one text is written with."""

    prefix = "SPECSPLIT_ORCH_"
    other_variables: ClassVar = OrchestratorConfig.other_variables

    gamma: list[Gamma] = swept("gamma", [1, 3, 5, 8, 12])
    mode: list[PipelineMode] | None = swept("mode", None)
    tree: list[Tree] | None = swept("tree", None)
    temperature: list[Temperature] | None = swept("temperature", None)
    rtt_ms: list[Milliseconds] | None = swept("rtt_ms", None)
    bandwidth_mbit: list[Megabits] | None = swept("bandwidth_mbit", None)
