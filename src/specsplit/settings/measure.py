"""Settings of the measurements: prompts, repeats, races, clients, contexts, intervals."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from specsplit.decoding.theory import PipelineMode
from specsplit.settings.base import Settings, setting
from specsplit.settings.names import REQUESTS_A_CLIENT, too_few_requests
from specsplit.settings.run import MAX_GAMMA, MAX_SEED, MODES, Gamma, Megabits, Milliseconds, OnBadLine, StatesForm
from specsplit.settings.worker import ComputeSettings, DraftDtype

Positive = Annotated[int, Field(ge=1)]
Peer = Annotated[
    str,
    Field(
        pattern=r"^(generate|assisted(-[1-9][0-9]?)?|prompt-lookup|llama\.cpp(-draft|-prompt-lookup)?)$",
        json_schema_extra={
            "title": "generate, assisted, assisted-N, prompt-lookup, llama.cpp, llama.cpp-draft or "
            "llama.cpp-prompt-lookup",
            "plural": "names: generate, assisted, assisted-N, prompt-lookup, llama.cpp, llama.cpp-draft, "
            "llama.cpp-prompt-lookup",
        },
    ),
]

Setup = Literal["target_streamed", "colocated"]


StandardName = Literal["spec-bench", "mt-bench", "gsm8k", "humaneval", "mbpp", "math-500", "speed-bench", "alpaca"]
PromptPart = Literal["prompt", "id", "category", "system"]


def _each_once(value: Any) -> Any:
    """Values that are measured one after the other, each once: rows are told apart by them."""
    return [one for place, one in enumerate(value) if one not in value[:place]] if isinstance(value, list) else value


class PromptSettings(Settings):
    """Which prompts of a file are taken."""

    _once = field_validator("*")(_each_once)

    columns: dict[PromptPart, Annotated[str, Field(min_length=1)]] = setting(
        {},
        "The columns of the file that hold `prompt`, `id`, `category` and `system` message, where they have other "
        "names than docs/prompts.md lists. On the command line: prompt=question,id=task_id. `a.b` is the key b of a.",
        example={"prompt": "question", "id": "task_id"},
        note="{ prompt: question, id: task_id, category: subject }, where the file has names of its own",
        schema={"title": "a mapping of prompt, id, category, system to names of columns"},
    )
    turns: Literal["first", "all"] = setting(
        "first",
        "Of a conversation with several turns: `first` is the prompt, and the later ones are counted in the manifest; "
        "`all` makes each a request of its own, after the answers that the target wrote to those before it.",
        example="all",
        note="first | all: each turn a request, after the target's own answers",
    )
    limit: int | None = setting(
        None,
        "How many prompts: a stratified slice over the categories; null takes every prompt.",
        example=8,
        note="a stratified slice over the categories; null = every prompt",
        ge=1,
    )
    on_bad_line: OnBadLine = setting(
        "stop",
        "What a malformed line does: `stop` the run, or `skip` the line and list it in the manifest.",
        example="skip",
        note="stop | skip (skipped lines are listed in the manifest)",
    )

    @field_validator("columns", mode="before")
    @classmethod
    def _read_columns(cls, value: Any) -> Any:
        """A mapping as a flag gives it: prompt=question,id=task_id, or as JSON."""
        if not isinstance(value, str):
            return value
        if value.lstrip().startswith("{"):
            try:
                return json.loads(value)
            except ValueError:
                raise ValueError("not JSON; write prompt=question,id=task_id") from None
        pairs = [pair.partition("=") for pair in value.split(",")]
        if any(not sign or not name.strip() for _, sign, name in pairs):
            raise ValueError("write prompt=question,id=task_id")
        return {part.strip(): name.strip() for part, _, name in pairs}


class TokenSettings(Settings):
    """How prompts become tokens, once for all runs."""

    use_chat_template: bool = setting(True, "Wrap the prompts in the model's chat template, when it has one.")
    date: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d)?)?$")] | None = setting(
        None,
        "The date, or date and time, that a chat template is told that prints it (as Llama 3's does); null: when the "
        "prompts are prepared. The manifest records it.",
        example="2026-01-31",
        note="that a chat template is told which prints it; null = when the prompts are prepared",
        schema={"title": "a date as 2026-01-31 or 2026-01-31T14:30"},
    )

    @field_validator("date")
    @classmethod
    def _is_a_date(cls, value: str | None) -> str | None:
        if value is not None:
            datetime.fromisoformat(value)
        return value


class WarmupSettings(PromptSettings):
    warmup: int = setting(
        1,
        "Requests run before the clock starts; they are in no table.",
        example=3,
        note="run before the clock starts, not in the tables",
        ge=0,
    )


class BenchSettings(WarmupSettings):
    """How the points of a sweep are measured."""

    repeats: int = setting(
        1,
        "How often every request is measured; statistics take the median over the repeats of a request first.",
        example=3,
        note="times that every request is measured; statistics take the median over them first",
        ge=1,
    )
    setups: list[Setup] = setting(
        ["target_streamed", "colocated"],
        "What every run measures beside gamma 0, request by request in turn with its own configuration: "
        "`target_streamed` (the target worker decodes alone and streams its tokens) and `colocated` (the same models "
        "in one process, which takes their memory once more).",
        example=["target_streamed"],
        note="measured in every run beside gamma 0; [] = neither",
    )
    start_workers: bool = setting(
        False, "Start the workers that `draft` and `target` of --settings describe for this call alone.", operates=True
    )
    baseline: list[Peer] | None = setting(
        None,
        "Race each point, request by request in turn, against Hugging Face's `generate` (the target alone), assisted "
        "generation as it is by default (`assisted`) or with drafts of N tokens (`assisted-N`), and prompt lookup; and "
        "against llama.cpp (extra `peers`) alone, with the draft, with prompt lookup. A peer that cannot use the "
        "models is a row that says why.",
        example=["assisted-5"],
        note="",
        min_length=1,
    )


CLOSED = "closed"
ArrivalPattern = Literal["constant", "poisson", "gamma"]


class LatencyLimits(Settings):
    """What a request has to keep to count as goodput."""

    tpot_limit_ms: float | None = setting(
        None,
        "Goodput counts the requests with at most this many milliseconds a token (ITL); null is twice the median of "
        "one client.",
        example=50,
        note="for the goodput; null = twice the median of one client",
        gt=0,
    )
    ttft_limit_ms: float | None = setting(
        None,
        "Goodput counts the requests whose first token came within this many milliseconds of their arrival; null is "
        "twice the median of one client.",
        example=500,
        note="for the goodput; null = twice the median of one client",
        gt=0,
    )


class CapacitySettings(WarmupSettings, LatencyLimits):
    """Many requests at once."""

    clients: list[Annotated[int, Field(ge=1, le=256)]] = setting(
        [1, 2, 4, 8, 16],
        "Numbers of concurrent clients; 1 is added when missing, for every text is compared with its single run.",
        example=[1, 12],
        min_length=1,
    )
    rates: list[Annotated[float, Field(gt=0)]] = setting(
        [],
        "Open loop: rates of requests per second that arrive whether or not others are done.",
        example=[0.5, 1, 2],
        note="open loop: requests per second that arrive whether or not others are done",
    )
    arrivals: ArrivalPattern = setting(
        "poisson",
        "How requests of an open loop arrive: `constant`, `poisson`, or in bursts (`gamma`, with `burstiness`). Times "
        "follow from the seed.",
        example="constant",
        note="constant | poisson | gamma (bursts)",
    )
    burstiness: float = setting(
        1.0,
        "Shape of the gaps between arrivals of pattern gamma: below 1 in bursts, 1 as poisson, above 1 more even.",
        example=0.25,
        note="of gamma: below 1 in bursts, above 1 more even",
        gt=0,
    )
    saturation_steps: int = setting(
        0,
        "Bisection steps towards the rate from which on fewer than 9 of 10 requests keep the limits; 0 does not look "
        "for it. Each step measures all requests at one rate.",
        example=5,
        note="bisection steps towards the rate that the workers just sustain; 0 = not looked for",
        ge=0,
        le=12,
    )
    gamma: list[Gamma] = setting([0, 3], "Draft lengths.", example=[5], min_length=1)
    mode: PipelineMode = setting("sync", "Pipeline mode.", example="overlap")
    requests: int = setting(
        64,
        "Requests at each load, the same ones, at least four a client; prompts are taken again when there are fewer.",
        example=128,
        note="at each load, at least four a client",
        ge=REQUESTS_A_CLIENT,
    )

    @model_validator(mode="after")
    def _enough_requests(self) -> Self:
        if problem := too_few_requests(self.clients, self.requests):
            raise ValueError(problem)
        return self


class ContextSettings(PromptSettings):
    """The cost of a token against the length of its context."""

    length: list[Positive] = setting(
        [64, 128, 256, 512, 1024, 2048, 4096],
        "Context lengths in tokens; those that the target cannot hold are left out.",
        example=[64, 8000],
        min_length=1,
    )
    gamma: list[Gamma] = setting([0, 3], "Draft lengths, in mode sync.", example=[5], min_length=1)
    output_tokens: int = setting(32, "Tokens written after each context.", example=128, ge=8)
    texts: int = setting(3, "Different texts at each length.", example=8, ge=1)


class MergeSettings(Settings):
    """How runs are put together."""

    keep_apart: bool = setting(
        False,
        "Keep runs that do not belong together (other prompts, models, settings, machine or code) as series that are "
        "never compared, instead of refusing them.",
        example=True,
        note="runs on other machines, code or prompts become series that are never compared; false refuses them",
    )


DraftLength = Annotated[int, Field(ge=1, le=MAX_GAMMA)]


class SimulatedTexts(Settings):
    """Texts of simulated models behind real workers."""

    _once = field_validator("*")(_each_once)

    tokens: int = setting(400, "Length of a text in tokens.", ge=2)
    texts: int = setting(2, "Texts at each point.", ge=1)


class StatesCostSettings(WarmupSettings):
    """A draft that reads the target's hidden states beside one that does not."""

    gamma: DraftLength = setting(3, "Draft length of both, in mode sync.", example=2)
    rtt_ms: list[Milliseconds] = setting(
        [0.0, 10.0, 50.0], "Simulated round trips in milliseconds.", example=[0, 20], min_length=1
    )
    bandwidth_mbit: list[Megabits] = setting(
        [10.0, 100.0, 1000.0, 0.0],
        "Simulated bandwidths in megabits (10^6) a second, each way; 0 is no limit.",
        example=[1, 10000],
        note="each way; 0 = no limit",
        min_length=1,
    )
    form: list[StatesForm] = setting(
        ["bfloat16", "int8"], "Numbers in which the hidden states are sent.", example=["float32"], min_length=1
    )
    project: list[Literal["draft", "target"]] = setting(
        ["draft", "target"],
        "Which worker applies the head's `fc`: `draft` (three vectors a position cross) or `target` (one).",
        example=["target"],
        min_length=1,
    )
    window: list[Annotated[int, Field(ge=0)]] = setting(
        [0],
        "Positions at the end of a prompt whose hidden states are sent; 0 is all.",
        example=[0, 32],
        note="positions at the end of a prompt that are sent; 0 = all",
        min_length=1,
    )
    output_tokens: int = setting(24, "Tokens of each text.", example=64, ge=2)


class OverheadSettings(SimulatedTexts):
    """Rounds of models that take no time."""

    mode: list[PipelineMode] = setting(list(MODES), "Pipeline modes.", min_length=1)
    gamma: list[DraftLength] = setting([3, 5], "Draft lengths.", min_length=1)
    texts: int = setting(4, "Texts at each point.", ge=1)


class SimulationSettings(SimulatedTexts):
    """A simulated pair, and what of it is laid beside the formulas."""

    gamma: list[DraftLength | Literal["auto"]] = setting(
        [3, 5, 7, 9, "auto"], "Draft lengths; the target alone is always measured.", min_length=1
    )
    rtt_ms: list[Milliseconds] = setting([0.0, 14.0, 50.0], "Round trips in milliseconds.", min_length=1)
    acceptance: float = setting(0.8, "Probability that a drafted token is accepted.", gt=0, lt=1)
    draft_ms: float = setting(3.0, "Milliseconds of a pass of the draft.", gt=0)
    verify_ms: float = setting(30.0, "Milliseconds of a pass of the target.", gt=0)
    fan_out: int = setting(16, "Outcomes that lookahead prepares drafts for.", ge=1, le=64)
    seed: int = setting(0, "Of the simulated text.", ge=0, le=MAX_SEED)


class IntervalSettings(Settings):
    """The intervals that tables state."""

    confidence: float = setting(0.95, "Confidence level of the intervals.", example=0.99, gt=0, lt=1)
    bootstrap_samples: int = setting(
        10_000, "Draws for the intervals that hold for all configurations at once.", example=2000, ge=1
    )
    seed: int = setting(0, "Seed of what draws random numbers.", ge=0, le=MAX_SEED)


class PriceSettings(Settings):
    """What an hour of the machines costs, for prices in tables."""

    draft_price: float | None = setting(
        None, "Price of an hour of the draft worker's machine, in any currency; null is not known.", example=0.5, ge=0
    )
    target_price: float | None = setting(
        None, "Price of an hour of the target worker's machine, in the same currency.", example=2.0, ge=0
    )


class LayerSettings(ComputeSettings):
    """The search for layers that a draft can do without."""

    flags: ClassVar = {"skip_count": "--count"}

    skip_count: int = setting(
        2, "Layers to leave out, where skip_layers is auto.", example=4, note="with auto: layers to leave out", ge=1
    )
    limit: int = setting(
        8,
        "With skip_layers auto: how many prompts the layers are chosen on. They are taken from those of the dataset "
        "that are not measured.",
        example=4,
        note="with auto: prompts to choose them on, from those that are not measured",
        ge=1,
    )
    max_tokens: int = setting(48, "Tokens written for each prompt.", ge=1)
    use_chat_template: bool = setting(True, "Wrap the prompts in the model's chat template, when it has one.")
    dtype: DraftDtype = setting("auto", "Number format of the search, as the draft will have it.")
