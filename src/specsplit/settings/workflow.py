"""The configuration of the workflow: which keys config/config.yaml has.

Most keys are settings of a run, a worker or a measurement, whose definition is taken over (`specsplit.settings.keys`).
`specsplit.settings.configuration` reads a configuration by the JSON Schema that is made from this tree.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, Field

from specsplit.settings.access import AccessSettings
from specsplit.settings.distill import AcceptanceSettings, TrainingSettings, WritingSettings
from specsplit.settings.keys import (
    ONE_OR_MORE,
    UNIQUE,
    Run,
    address,
    axis,
    key,
    keys,
    list_of,
    other,
    same,
    section,
    several,
    type_of,
)
from specsplit.settings.measure import (
    BenchSettings,
    CapacitySettings,
    ContextSettings,
    IntervalSettings,
    LayerSettings,
    MergeSettings,
    Peer,
    PriceSettings,
    PromptSettings,
    StandardName,
    StatesCostSettings,
    TokenSettings,
)
from specsplit.settings.models import (
    EMBEDDED,
    SHIPPED_DRAFTS,
    HuggingFaceSource,
    LocalSource,
    NGramParameters,
    PypiSource,
    SuffixParameters,
    SyntheticParameters,
)
from specsplit.settings.run import DRAFT_NAME
from specsplit.settings.worker import (
    DraftWorkerConfig,
    FloatDtype,
    LaunchSettings,
    Layer,
    TargetWorkerConfig,
    WorkerSettings,
)

(MODEL,), (DRAFT, HEAD) = EMBEDDED, SHIPPED_DRAFTS
SkipLayers = list[Layer] | Literal["auto"]


Synthetic: Any = section(
    "",
    source=same(SyntheticParameters, "source"),
    **keys(SyntheticParameters, "step_ms", "token_ms", "acceptance", "seed"),
)[0]
Source: Any = PypiSource | HuggingFaceSource | LocalSource | Synthetic | NGramParameters | SuffixParameters
LookupSize: Any = type_of(Run, "lookup")
NamedDraft: Any = section(
    "",
    model=other("model", str, "my-draft"),
    dtype=other("dtype", type_of(DraftWorkerConfig, "dtype"), "int8"),
    skip_layers=other("skip_layers", SkipLayers, [13, 14], schema=UNIQUE),
    acceptance=other("acceptance", Annotated[float, Field(ge=0, le=1)], 0.8),
    lookup=other("lookup", list[LookupSize], [2], schema=ONE_OR_MORE, min_length=1),
    p_min=other("p_min", type_of(Run, "p_min"), 0.3),
    skip_count=other("skip_count", type_of(LayerSettings, "skip_count"), 4),
)[0]

HubDataset: Any = section(
    "",
    id=key(str, ..., "owner/name", schema={"title": "owner/name"}, pattern=r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?$"),
    config=key(str | None, None, "Its configuration.", min_length=1),
    split=key(str | None, None, "Its split.", min_length=1),
    revision=key(str | None, None, "A branch, tag or commit.", min_length=1),
)[0]

Workflow: type[BaseModel] = section(
    "",
    gammas=axis(
        "gamma",
        [0, 1, 2, 3, "auto"],
        [1, 8],
        " 0 is added when missing and the list is sorted: speedup is against gamma 0.",
        schema=UNIQUE,
        heading="Draft lengths to sweep. 0 (the target alone) is always measured: speedup is against it. auto = chosen "
        "in every round.",
    ),
    mode=axis(
        "mode",
        ["sync"],
        ["sync", "lookahead"],
        heading="More axes: each may hold several values, and every combination is run. config/examples/ has sweeps of "
        "each.",
    ),
    tree=axis("tree", ["chain"], ["chain", "3x2", "dynamic-16x4"]),
    seed=same(Run, "seed"),
    dataset=section(
        "The prompts.",
        path=key(
            str,
            "resources/prompts/specsplit-48.jsonl",
            "A file of prompts: JSON lines, JSON, CSV, Parquet or Arrow, of any shape that docs/prompts.md lists; or a "
            "folder that `datasets` saved. Relative to the working directory.",
            example="data/my-prompts.jsonl",
            note="JSON lines, JSON, CSV, Parquet, Arrow: docs/prompts.md",
            min_length=1,
        ),
        name=key(
            str | None,
            None,
            "A standard set, fetched once, instead of `path`: docs/prompts.md.",
            example="spec-bench",
            note=f"{' | '.join(get_args(StandardName))}, instead of path",
            pattern=f"^({'|'.join(get_args(StandardName))})$",
            schema={"title": f"one of {', '.join(get_args(StandardName))}"},
        ),
        huggingface=key(
            HubDataset | None,
            None,
            "A dataset of the Hugging Face Hub, fetched once, instead of `path`: its `id` (owner/name) and, where it "
            "has them, `config` and `split` (else the only one, or test), and `revision` (else main).",
            example={"id": "openai/gsm8k", "config": "main", "split": "test"},
            note="{ id: owner/name, config: main, split: test, revision: COMMIT }, instead of path",
            schema={"title": "a mapping of id, config, split, revision"},
        ),
        **keys(PromptSettings, "columns", "turns"),
        limit=same(PromptSettings, "limit", default=16),
        **keys(PromptSettings, "on_bad_line"),
        **keys(TokenSettings, "date"),
    ),
    generation=section(
        "When and how a text ends.",
        max_output_tokens=same(Run, "max_output_tokens", default=96),
        **keys(Run, "max_rounds", "use_chat_template", "ignore_eos", "stop", "stop_token_ids"),
        **keys(TargetWorkerConfig, "ignore_model_settings"),
    ),
    lookahead=section("Of mode lookahead.", fan_out=same(Run, "fan_out")),
    sampling=section(
        "How tokens are chosen.",
        temperature=axis("temperature", [0], [0, 0.7], note="0 = greedy; several values are swept"),
        **keys(Run, "top_k", "top_p", method="sampling"),
    ),
    network=section(
        "A simulated network to the target worker, added by the client.",
        note="simulated, to the target worker",
        rtt_ms=axis("rtt_ms", [0], [0, 14, 50], note="several values are swept"),
        jitter_ms=same(Run, "jitter_ms"),
        bandwidth_mbit=axis("bandwidth_mbit", [0], [0, 100, 10], note="each way, by the bytes sent; 0 = no limit"),
    ),
    hidden_states=section(
        "What a draft that reads the target's hidden states is sent: docs/hidden-states.md.",
        note="of a draft that reads the target's: docs/hidden-states.md",
        **keys(Run, form="hidden_states_form", project="hidden_states_project", window="hidden_states_window"),
    ),
    faults=section(
        "What a run does when a worker fails.",
        note="what a run does when a worker fails",
        **keys(Run, "on_draft_failure", "recovery_timeout_s", call_timeout_s="rpc_timeout_s"),
    ),
    **keys(BenchSettings, warmup_requests="warmup", repeats="repeats"),
    **keys(MergeSettings, "keep_apart"),
    setups=same(BenchSettings, "setups", schema=UNIQUE),
    models=key(
        dict[str, Source],
        {**EMBEDDED, **SHIPPED_DRAFTS},
        "Models by name, each from one of six sources. The names become folder names.",
        schema={
            "title": "a mapping of names to models",
            "minProperties": 1,
            "propertyNames": {"pattern": "^[A-Za-z0-9][A-Za-z0-9._-]*$", "maxLength": 100},
        },
    ),
    target=section(
        "The large model, which decides every token.",
        model=key(str, MODEL, "A name from `models`.", example="my-model"),
        dtype=same(TargetWorkerConfig, "dtype", type_=FloatDtype),
    ),
    draft=section(
        "The small model, which guesses ahead.",
        model=key(str, DRAFT, "A name from `models`. Of another tokenizer, tokens that both have.", example="my-draft"),
        dtype=same(DraftWorkerConfig, "dtype"),
        skip_layers=same(
            DraftWorkerConfig,
            "skip_layers",
            type_=SkipLayers,
            description=f"{DraftWorkerConfig.model_fields['skip_layers'].description} `auto` looks for the layers "
            "whose loss changes the model least.",
            example=[13, 14],
            note="e.g. [13, 14]: a cheaper, weaker draft; auto = look for the layers that matter least",
            schema=UNIQUE,
        ),
        **keys(Run, acceptance="draft_acceptance"),
        lookup=axis(
            "lookup",
            [0],
            [2],
            " A draft whose acceptance is forced has none.",
            note="prompt lookup first: tokens that must match; 0 = none; several values are swept",
            shipped=[0, 2],
        ),
        p_min=same(Run, "p_min", shipped=0.15),
        **keys(LayerSettings, "skip_count", calibration_prompts="limit"),
    ),
    drafts=key(
        dict[str, NamedDraft],
        {},
        "Drafts to sweep, by name. Each says what differs from `draft`, which is swept only when an entry is "
        "`draft: {}`. Empty: `draft` alone.",
        note="several drafts, by name; each says what differs from draft: { int8: { dtype: int8 }, plain: {} }",
        schema={"title": "a mapping of names to drafts", "propertyNames": {"pattern": DRAFT_NAME, "maxLength": 64}},
    ),
    workers=section(
        "The two model servers.",
        lifecycle=key(
            Literal["workflow", "job"],
            "workflow",
            "How long a worker that is started lives: `workflow` until the last run that shares it; `job` as long as "
            "its one run, inside that run's job, as a cluster needs it.",
            example="job",
            note="workflow | job: in the job of each run, as on a cluster",
        ),
        **keys(WorkerSettings, "device", "engine"),
        gpus=key(
            int,
            0,
            "GPUs that a run asks for, as Snakemake's resource `gpu`; they decide its CUDA_VISIBLE_DEVICES. 1 is "
            "shared by both workers, of 2 each has its own; 0 leaves the variable alone.",
            example=2,
            note="GPUs that a run asks for, shared or one each; 0 = leave CUDA_VISIBLE_DEVICES alone",
            ge=0,
            le=2,
        ),
        threads=same(
            WorkerSettings,
            "threads",
            description="Compute threads of each worker; null takes every core it may use, or half of them in modes "
            "overlap and lookahead, where both workers compute at once.",
        ),
        **keys(WorkerSettings, "max_context", "max_sessions", "cache_memory_mb", "session_ttl_s"),
        startup_timeout_s=same(LaunchSettings, "startup_timeout_s"),
        draft_address=address(
            "draft",
            "gpu-1.local:50051",
            note="host:port of a running worker, or a .json file that says it: attach to it, never stop it",
        ),
        target_address=address("target", "grpcs://gpu-1.local:50052"),
        **keys(AccessSettings, "token_file", "tls_ca", "tls_cert", "tls_key", "insecure"),
    ),
    baselines=section(
        "The race of results/peers.csv: points of ours, Hugging Face's and llama.cpp's ways to decode, in turn on "
        "every request. Gamma 0 is always one of ours; greedy, no simulated network.",
        note="ours beside Hugging Face's and llama.cpp's, in turn on every request",
        heading="Measurements that are not part of the main job: snakemake results/peers.csv results/capacity.csv "
        "results/context_curve.csv results/hidden_states.csv",
        peers=list_of(
            BenchSettings,
            "baseline",
            type_=list[Peer],
            default=["generate", "assisted", "prompt-lookup", "llama.cpp", "llama.cpp-prompt-lookup"],
        ),
        gammas=several("gamma", [2, 3], "Draft lengths of ours.", ["auto"], note="of ours; 0 is always there"),
        mode=several("mode", ["sync", "overlap"], "Pipeline modes of ours.", ["lookahead"], note=""),
        tree=several("tree", ["chain"], "Shapes of our drafts.", ["3x2"], note=""),
    ),
    capacity=section(
        "Many clients at once: results/capacity.csv.",
        note="many clients at once",
        clients=list_of(CapacitySettings, "clients"),
        gammas=list_of(CapacitySettings, "gamma"),
        rates=same(CapacitySettings, "rates", schema=ONE_OR_MORE),
        **keys(
            CapacitySettings,
            *("arrivals", "burstiness", "saturation_steps", "mode", "requests", "tpot_limit_ms", "ttft_limit_ms"),
        ),
    ),
    context=section(
        "Cost of a token against the length of its context: results/context_curve.csv.",
        note="cost of a token against the length of its context",
        lengths=list_of(ContextSettings, "length"),
        gammas=list_of(ContextSettings, "gamma"),
        **keys(ContextSettings, "output_tokens", "texts"),
    ),
    states_cost=section(
        "What it costs to ship hidden states to a draft that reads them: results/hidden_states.csv.",
        note="what it costs to ship hidden states: results/hidden_states.csv",
        draft=key(str, DRAFT, "The draft that reads none, a name from `models`.", example="my-draft"),
        head=key(
            str,
            HEAD,
            "The one that reads them, a name from `models`.",
            example="my-head",
            note="reads hidden states: docs/hidden-states.md",
        ),
        **{
            name: list_of(StatesCostSettings, name)
            for name in ("rtt_ms", "bandwidth_mbit", "form", "project", "window")
        },
        **keys(StatesCostSettings, "gamma", "output_tokens"),
        limit=same(StatesCostSettings, "limit", default=6),
    ),
    distill=section(
        "A draft that the workflow makes from the target: results/distill/NAME. docs/distillation.md.",
        heading="A small draft that the workflow makes from the target: snakemake distill. Made for a GPU; "
        "docs/distillation.md",
        name=key(
            str,
            "default",
            "Name of the recipe: its folder below results/distill. The draft is a local model with the path "
            "results/distill/NAME/draft.",
            example="two-layers",
            note="its folder below results/distill",
            schema={"title": "a folder name"},
            pattern=DRAFT_NAME,
        ),
        **keys(WritingSettings, "kind", "tokens", "user_temperature"),
        answer_temperature=list_of(WritingSettings, "answer_temperature"),
        **keys(WritingSettings, "max_user_tokens", "max_answer_tokens", "write_batch", "top_k"),
        state_layers=same(WritingSettings, "state_layers", schema=UNIQUE),
        **keys(WritingSettings, "target_dtype"),
        **keys(TrainingSettings, "layers"),
        take_layers=same(TrainingSettings, "take_layers", schema=UNIQUE),
        vocab_size=same(TrainingSettings, "vocab_size", default=6144),
        **keys(
            TrainingSettings,
            *("unroll_steps", "draft_dtype", "epochs", "batch_size", "learning_rate", "warmup_share", "weight_decay"),
            *("clip_norm", "validation_texts", "evaluate_every", "checkpoint_every"),
        ),
        gamma=same(AcceptanceSettings, "gamma"),
    ),
    prices=section(
        "What an hour of each machine costs, for the price per million tokens in summary.csv and capacity.csv; null is "
        "not known.",
        note="an hour of each machine, in any currency; null = not known",
        **keys(PriceSettings, draft="draft_price", target="target_price"),
    ),
    statistics=section(
        "The intervals in summary.csv.",
        **keys(IntervalSettings, "confidence"),
        bootstrap_samples=same(IntervalSettings, "bootstrap_samples", Annotated[int, Field(ge=100)]),
    ),
)[0]
