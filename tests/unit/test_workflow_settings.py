"""The configuration loader: coercion, defaults, messages, and that schema, file and README say the same."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from specsplit.errors import UserError
from specsplit.settings.configuration import load_pipeline_config
from specsplit.settings.names import swept_drafts
from specsplit.settings.schema import SCHEMA, schema_keys

CONFIG = Path(__file__).parents[2] / "config"
LOCAL = {"source": "local", "path": "/data/m"}
PYPI = {"source": "pypi", "package": "p", "version": "1", "file": "p/m.gguf"}
HUGGINGFACE = {"source": "huggingface", "repo": "org/m", "revision": "main"}
SYNTHETIC = {"source": "synthetic", "step_ms": 3, "token_ms": 0, "acceptance": 0.8, "seed": 0}
SUFFIX = {
    "source": "suffix",
    "tokenizer": "my-target",
    "model": None,
    "max_match": 24,
    "min_match": 2,
    "memory_tokens": 2000,
}
NGRAM = {"source": "ngram", "tokenizer": "my-target", "max_ngram": 3, "min_ngram": 1}


def mistakes(raw: dict[str, Any]) -> list[str]:
    """The lines that loading `raw` reports, without the first one."""
    with pytest.raises(UserError) as caught:
        load_pipeline_config(raw)
    header, *lines = str(caught.value).splitlines()
    assert "config/README.md" in header
    return [line.strip() for line in lines]


def nested(dotted: str, value: Any) -> dict[str, Any]:
    for part in reversed(dotted.split(".")):
        value = {part: value}
    return value


def lookup(config: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        config = config[part]
    return config


# ---- what is accepted


@pytest.mark.parametrize(
    ("key", "given", "expected"),
    [
        ("gammas", "[1,2]", [0, 1, 2]),
        ("gammas", ["2", "1"], [0, 1, 2]),
        ("gammas", (3,), [0, 3]),
        ("gammas", [2.0], [0, 2]),
        ("seed", "8", 8),
        ("seed", "8.0", 8),
        ("dataset.limit", "null", None),
        ("dataset.limit", "8", 8),
        ("gammas", "[auto, 2]", [0, 2, "auto"]),
        ("mode", "overlap", ["overlap"]),
        ("mode", "[sync, lookahead]", ["sync", "lookahead"]),
        ("tree", "3x2", ["3x2"]),
        ("tree", "[chain, '2']", ["chain", "2"]),
        ("tree", ("dynamic-16",), ["dynamic-16x4"]),
        ("sampling.temperature", 0.7, [0.7]),
        ("sampling.temperature", "0.7", [0.7]),
        ("sampling.temperature", "[0, '1.5']", [0, 1.5]),
        ("network.rtt_ms", 14, [14]),
        ("network.bandwidth_mbit", 2.5, [2.5]),
        ("draft.skip_layers", "auto", "auto"),
        ("draft.skip_layers", "[3, 1]", [3, 1]),
        ("generation.ignore_eos", "true", True),
        ("workers.session_ttl_s", "1.5", 1.5),
        ("workers.draft_address", "null", None),
        ("workers.threads", 2.0, 2),
        ("statistics.confidence", "0.9", 0.9),
    ],
)
def test_a_string_that_does_not_fit_is_read_as_yaml(key: str, given: Any, expected: Any) -> None:
    value = lookup(load_pipeline_config(nested(key, given)), key)
    assert value == expected
    # 2.0 == 2 == True in Python, but not in a file name.
    assert repr(value) == repr(expected)


@pytest.mark.parametrize("path", ["8", "null", "true", "[1, 2]", "1.0"])
def test_a_string_stays_a_string_where_a_string_is_wanted(path: str) -> None:
    models = {"m": {**PYPI, "version": path}}
    config = load_pipeline_config({"dataset": {"path": path}, "models": models, **both_use("m")})
    assert config["dataset"]["path"] == path
    assert config["models"]["m"]["version"] == path


def test_every_source_of_a_model_is_accepted() -> None:
    given = {"a": PYPI, "b-1.0_x": HUGGINGFACE, "3": LOCAL}
    given |= {"s": {"source": "synthetic"}, "n": {"source": "ngram", "tokenizer": "a"}}
    models = load_pipeline_config({"models": given, "target": {"model": "a"}, "draft": {"model": "3"}})["models"]
    expected = {"a": {**PYPI, "sha256": None}, "b-1.0_x": HUGGINGFACE, "3": {**LOCAL, "sha256": None}}
    assert models == {**expected, "s": SYNTHETIC, "n": {**NGRAM, "tokenizer": "a"}}


@pytest.mark.parametrize("address", ["localhost:50051", "10.0.0.1:1", "[::1]:50051", "grpcs://gpu-1:50051"])
def test_addresses(address: str) -> None:
    assert load_pipeline_config(nested("workers.draft_address", address))["workers"]["draft_address"] == address


def test_gammas_are_sorted_and_hold_the_baseline() -> None:
    assert load_pipeline_config({"gammas": [5, 1]})["gammas"] == [0, 1, 5]
    assert load_pipeline_config({"gammas": [0]})["gammas"] == [0]


def test_the_result_is_a_new_dict_and_independent_of_the_defaults() -> None:
    raw = {"dataset": {"limit": "3"}, "gammas": ["1"]}
    config = load_pipeline_config(raw)
    assert raw == {"dataset": {"limit": "3"}, "gammas": ["1"]}
    config["tree"].append(7)
    config["models"].clear()
    assert load_pipeline_config({})["tree"] == ["chain"]
    assert load_pipeline_config({})["models"]


def test_loading_twice_changes_nothing() -> None:
    config = load_pipeline_config({"gammas": "[4]", "workers": {"threads": "2"}})
    assert load_pipeline_config(config) == config
    assert load_pipeline_config(json.loads(json.dumps(config))) == config


# ---- what is refused


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("gammas", [], "gammas: []; wanted a list of integers >= 0 and <= 64 or auto, all different, at least one"),
        (
            "gammas",
            5,
            "gammas: 5; wanted a list of integers >= 0 and <= 64 or auto, all different, at least one (write [5])",
        ),
        ("gammas", [1, 65], "gammas[1]: 65; wanted an integer >= 0 and <= 64 or auto"),
        ("gammas", ["x"], 'gammas[0]: "x"; wanted an integer >= 0 and <= 64 or auto'),
        ("gammas", ["auto", "auto"], 'gammas: ["auto", "auto"] has "auto" more than once; remove the repeats'),
        ("gammas", [1, 2, 1], "gammas: [1, 2, 1] has 1 more than once; remove the repeats"),
        ("gammas", ["1", 1.0], "gammas: [1, 1] has 1 more than once; remove the repeats"),
        ("seed", 1.5, "seed: 1.5; wanted an integer >= 0 and <= 4294967295"),
        ("seed", True, "seed: true; wanted an integer >= 0 and <= 4294967295"),
        ("dataset", None, "dataset: null; wanted a mapping"),
        ("dataset.limit", 0, "dataset.limit: 0; wanted an integer >= 1 or null"),
        ("dataset.limit", "all", 'dataset.limit: "all"; wanted an integer >= 1 or null'),
        ("dataset.limit", "2026-13-45", 'dataset.limit: "2026-13-45"; wanted an integer >= 1 or null'),
        ("dataset.path", "", 'dataset.path: ""; wanted a string, not empty'),
        ("dataset.path", 3, 'dataset.path: 3; wanted a string, not empty (write it in quotes: "3")'),
        ("dataset.on_bad_line", "ignore", 'dataset.on_bad_line: "ignore"; wanted one of stop, skip'),
        (
            "generation.use_chat_template",
            "maybe",
            'generation.use_chat_template: "maybe"; wanted true or false',
        ),
        ("mode", "fast", 'mode[0]: "fast"; wanted one of sync, overlap, lookahead'),
        (
            "mode",
            [],
            "mode: []; wanted a list of sync, overlap, lookahead, all different, at least one; or one of them",
        ),
        (
            "tree",
            "bush",
            "tree[0]: 'bush' is not a tree: write chain, 3x2 (children per level, 1 to 8) or dynamic-16x4",
        ),
        ("tree", 3, 'tree[0]: 3; wanted a tree: chain, 3x2 or dynamic-16x4 (write it in quotes: "3")'),
        (
            "tree",
            {"branching": [2]},
            'tree: {"branching": [2]}; wanted a list of trees, all different, at least one; or one of them',
        ),
        (
            "tree",
            ["dynamic-16", "dynamic-16x4"],
            "tree: dynamic-16x4 is the same tree as dynamic-16; remove one of them",
        ),
        ("lookahead.fan_out", 0, "lookahead.fan_out: 0; wanted an integer >= 1 and <= 64"),
        ("sampling.temperature", [0, -1], "sampling.temperature[1]: -1; wanted a number >= 0 and <= 100"),
        ("sampling.temperature", [1, 1.0], "sampling.temperature: [1, 1.0] has 1.0 more than once; remove the repeats"),
        ("sampling.top_p", 0, "sampling.top_p: 0; wanted a number > 0 and <= 1"),
        ("network.rtt_ms", math.inf, "network.rtt_ms[0]: Infinity; wanted a number >= 0"),
        ("network.bandwidth_mbit", [0, -1], "network.bandwidth_mbit[1]: -1; wanted a number >= 0"),
        (
            "draft.skip_layers",
            "best",
            'draft.skip_layers: "best"; wanted a list of integers >= 0, all different, or auto',
        ),
        ("draft.dtype", "int4", 'draft.dtype: "int4"; wanted one of auto, float32, bfloat16, float16, int8'),
        ("target.dtype", "auto", 'target.dtype: "auto"; wanted one of float32, bfloat16, float16'),
        ("target.dtype", "int8", 'target.dtype: "int8"; wanted one of float32, bfloat16, float16'),
        ("target.dtype", "fp16", 'target.dtype: "fp16"; wanted one of float32, bfloat16, float16'),
        ("draft.skip_layers", [-1], "draft.skip_layers[0]: -1; wanted an integer >= 0"),
        (
            "generation.stop_token_ids",
            [2, 2],
            "generation.stop_token_ids: [2, 2] has 2 more than once; remove the repeats",
        ),
        ("generation.stop_token_ids", [-1], "generation.stop_token_ids[0]: -1; wanted an integer >= 0"),
        ("draft.skip_layers", [3, 3], "draft.skip_layers: [3, 3] has 3 more than once; remove the repeats"),
        ("workers.device", "gpu", 'workers.device: "gpu"; wanted auto, cpu, cuda or cuda:N'),
        (
            "workers.draft_address",
            "localhost",
            'workers.draft_address: "localhost"; wanted host:port, grpcs://host:port or a .json file, or null',
        ),
        (
            "workers.target_address",
            "http://h:1",
            'workers.target_address: "http://h:1"; wanted host:port, grpcs://host:port or a .json file, or null',
        ),
        ("workers.session_ttl_s", math.nan, "workers.session_ttl_s: NaN; wanted a number > 0"),
        ("workers.session_ttl_s", math.inf, "workers.session_ttl_s: Infinity; wanted a number > 0"),
        ("statistics.confidence", 1, "statistics.confidence: 1; wanted a number > 0 and < 1"),
        ("models", {}, "models: empty; wanted at least one model"),
    ],
)
def test_a_bad_value_is_named_with_what_is_wanted(key: str, value: Any, line: str) -> None:
    assert mistakes(nested(key, value)) == [line]


@pytest.mark.parametrize(
    ("raw", "line"),
    [
        ({"gamas": [1]}, "gamas: unknown key; did you mean gammas?"),
        ({"dataset": {"limt": 8}}, "dataset.limt: unknown key; did you mean dataset.limit?"),
        ({"limit": 8}, "limit: unknown key; did you mean dataset.limit?"),
        ({"dataset.limit": 8}, "dataset.limit: unknown key; write it nested: dataset: {limit: ...}"),
        ({"lookahead": {"zzz": 1}}, "lookahead.zzz: unknown key; known here: fan_out"),
        ({"lookahead": {1: 1}}, "lookahead.1: unknown key; known here: fan_out"),
        ({"temperature": 1}, "temperature: unknown key; did you mean sampling.temperature?"),
    ],
)
def test_an_unknown_key_gets_the_closest_known_one(raw: dict[str, Any], line: str) -> None:
    assert mistakes(raw) == [line]


@pytest.mark.parametrize(
    ("model", "lines"),
    [
        (
            "x",
            [
                'models.m: "x"; wanted a mapping with `source`: '
                "one of pypi, huggingface, local, synthetic, ngram, suffix"
            ],
        ),
        ({}, ["models.m.source: missing; wanted one of pypi, huggingface, local, synthetic, ngram, suffix"]),
        ({"source": "hf"}, ['models.m.source: "hf"; wanted one of pypi, huggingface, local, synthetic, ngram, suffix']),
        (
            {"source": ["pypi"]},
            ['models.m.source: ["pypi"]; wanted one of pypi, huggingface, local, synthetic, ngram, suffix'],
        ),
        ({"source": "local"}, ["models.m.path: missing; wanted a string, not empty"]),
        (
            {"source": "huggingface", "repo": "org/m", "revison": "main"},
            [
                "models.m.revison: unknown key; did you mean models.m.revision?",
                "models.m.revision: missing; wanted a string, not empty",
            ],
        ),
        (
            {**PYPI, "version": 1.2, "sha256": "abc"},
            [
                'models.m.version: 1.2; wanted a string, not empty (write it in quotes: "1.2")',
                'models.m.sha256: "abc"; wanted 64 hexadecimal digits or null',
            ],
        ),
    ],
)
def test_a_bad_model_is_checked_against_the_source_that_it_names(model: Any, lines: list[str]) -> None:
    assert mistakes({"models": {"m": model}}) == lines


def test_a_model_merged_from_two_sources_says_how_to_mend_it() -> None:
    (line,) = mistakes({"models": {"m": {**HUGGINGFACE, "package": "p"}}})
    assert line.startswith("models.m.package: unknown key; a huggingface model has source, repo, revision")
    assert "new name" in line


@pytest.mark.parametrize("name", ["a/b", "", ".hidden", "-x", "a b", "é", "m" * 101])
def test_a_model_name_must_be_a_folder_name(name: str) -> None:
    (line,) = mistakes({"models": {name: LOCAL}})
    shown = json.dumps(name, ensure_ascii=False)
    assert line.startswith(f"models: the name {shown if len(name) < 80 else shown[:77]}")
    assert "cannot be a folder name" in line
    assert "100 characters at most" in line


def test_all_mistakes_are_told_at_once() -> None:
    raw = {
        "gammas": [-1],
        "dataset": {"limit": 0, "on_bad_line": 3},
        "models": {"m": {"source": "local"}},
        "speed": 1,
    }
    keys = [line.split(": ")[0] for line in mistakes(raw)]
    assert sorted(keys) == ["dataset.limit", "dataset.on_bad_line", "gammas[0]", "models.m.path", "speed"]


def test_a_long_value_is_shortened() -> None:
    (line,) = mistakes({"seed": "x" * 500})
    assert len(line) < 200


def test_target_and_draft_must_name_known_models() -> None:
    raw = {
        "models": {"small": LOCAL, "big": LOCAL},
        "target": {"model": "bigg"},
        "draft": {"model": "qqq"},
    }
    assert mistakes(raw) == [
        'target.model: "bigg" is not in models; did you mean big? known models: small, big',
        'draft.model: "qqq" is not in models; known models: small, big',
    ]


def test_rejection_sampling_of_a_dynamic_tree_is_refused_where_it_samples() -> None:
    raw = {"tree": ["chain", "dynamic-8"], "sampling": {"method": "rejection", "temperature": [0, 0.7]}}
    (line,) = mistakes(raw)
    assert line.startswith("sampling.method: rejection cannot go with tree dynamic-8 at temperature 0.7: ")
    assert line.endswith("use coupled, or a chain or static tree")
    load_pipeline_config({**raw, "tree": ["chain", "3x2"]})
    load_pipeline_config({**raw, "sampling": {"method": "rejection"}})


def test_p_min_is_refused_where_rejection_samples_and_is_0_where_acceptance_is_forced() -> None:
    raw = {"draft": {"p_min": 0.2}, "drafts": {"a": {}, "b": {"p_min": 0}}}
    assert mistakes({**raw, "sampling": {"method": "rejection", "temperature": [0, 0.7]}}) == [
        "drafts.a.p_min: 0.2 leaves out drafted tokens by their probability, which biases rejection sampling; write 0, "
        "or sampling.method coupled"
    ]
    drafts = swept_drafts(load_pipeline_config({**raw, "drafts": {**raw["drafts"], "c": {"acceptance": 0.5}}}))
    assert {name: draft["p_min"] for name, draft in drafts.items()} == {"a": 0.2, "b": 0, "c-synthetic-0.5": 0}
    load_pipeline_config({**raw, "sampling": {"temperature": 0.7}})


@pytest.mark.parametrize("layers", ["auto", [1]])
def test_a_model_without_layers_has_none_to_skip(layers: Any) -> None:
    raw = {"models": {"t": LOCAL, "s": {"source": "synthetic"}}, "target": {"model": "t"}}
    load_pipeline_config({**raw, "draft": {"model": "s"}})
    assert mistakes({**raw, "draft": {"model": "s", "skip_layers": layers}}) == [
        "draft.skip_layers: the synthetic model s has no layers; write []"
    ]


def test_an_ngram_model_names_the_model_whose_tokens_it_speaks() -> None:
    models = {"m": LOCAL, "n": {"source": "ngram", "tokenizer": "mm"}, "o": {"source": "ngram", "tokenizer": "n"}}
    assert mistakes({"models": models, **both_use("m")}) == [
        'models.n.tokenizer: "mm"; wanted the name of a model that has a tokenizer of its own: m',
        'models.o.tokenizer: "n"; wanted the name of a model that has a tokenizer of its own: m',
    ]
    assert mistakes({"models": {"n": {**NGRAM, "tokenizer": "n"}}, **both_use("n")})[0].endswith("own: none yet")


def test_a_suffix_model_names_its_models_and_is_no_target() -> None:
    bad = {"tokenizer": "n", "model": "s", "min_match": 30, "memory_tokens": 10}
    assert mistakes({"models": {"m": LOCAL, "s": {"source": "suffix", **bad}}, **both_use("m")}) == [
        "models.s.memory_tokens: 10; wanted an integer >= 1024 and <= 16777216"
    ]
    models = {"m": LOCAL, "s": {"source": "suffix", **bad, "memory_tokens": 2000}}
    assert mistakes({"models": models, "target": {"model": "s"}, "draft": {"model": "s", "skip_layers": [1]}}) == [
        "draft.skip_layers: the suffix model s has no layers; write []",
        'models.s.tokenizer: "n"; wanted the name of a model that has a tokenizer of its own: m',
        'models.s.model: "s"; wanted the name of a model that drafts by itself: m',
        "models.s.min_match: 30; wanted at most max_match, 24",
        'target.model: "s" is a suffix model, which can only draft',
    ]
    load_pipeline_config({"models": {**models, "s": {"source": "suffix", "tokenizer": "m"}}, **both_use("m")})


def test_an_ngram_model_is_no_target_and_its_range_is_in_order() -> None:
    models = {"my-target": LOCAL, "n": {**NGRAM, "min_ngram": 5}}
    assert mistakes({"models": models, **both_use("n")}) == [
        "models.n.min_ngram: 5; wanted at most max_ngram, 3",
        'target.model: "n" is an ngram model, which can only draft',
    ]


# ---- drafts by name


def test_each_value_of_lookup_makes_a_draft_and_forced_ones_have_none() -> None:
    raw = {"draft": {"lookup": [2, 0]}, "drafts": {"own": {}, "plain": {"lookup": 0}, "p": {"acceptance": 0.5}}}
    drafts = swept_drafts(load_pipeline_config(raw))
    assert {name: draft["lookup"] for name, draft in drafts.items()} == {
        "own-lookup2": 2,
        "own": 0,
        "plain": 0,
        "p-synthetic-0.5": 0,
    }


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"draft": {"acceptance": 0.5, "lookup": 2}}, "draft.acceptance: 0.5 with lookup [2]: what is looked up"),
        ({"draft": {"lookup": [2]}, "drafts": {"p": {"acceptance": 0.5}}}, "drafts.p.acceptance: 0.5 with lookup [2]"),
        ({"drafts": {"d" * 65: {}}}, "64 characters at most"),
    ],
)
def test_drafts_that_cannot_be_are_refused(raw: dict[str, Any], said: str) -> None:
    (line,) = mistakes(raw)
    assert said in line


def test_drafts_have_what_draft_has_and_what_they_change() -> None:
    raw = {"draft": {"dtype": "int8"}, "drafts": {"draft": {}, "less": {"skip_layers": "[13,14]"}}}
    drafts = swept_drafts(load_pipeline_config(raw))
    assert drafts["draft"] == {**load_pipeline_config(raw)["draft"], "lookup": 0}
    assert drafts["less"] == {**drafts["draft"], "skip_layers": [13, 14]}
    assert list(swept_drafts(load_pipeline_config({}))) == ["draft"]


@pytest.mark.parametrize("name", ["draft-lookup2", "a-synthetic-0.5", "a-synthetic-1e-05"])
def test_two_drafts_never_get_one_name(name: str) -> None:
    (line,) = mistakes({"drafts": {"draft": {"lookup": [0, 2]}, name: {}}})
    assert line.startswith(f"drafts.{name}: names get ")


def test_mistakes_in_drafts() -> None:
    raw = {"drafts": {"a": {"model": "nobody"}, "b": {"calibration_prompts": 2}}}
    lines = mistakes(raw)
    assert any(line.startswith("drafts.b.calibration_prompts: unknown key") for line in lines)
    assert mistakes({"drafts": {"a": {"model": "nobody"}}}) == [
        'drafts.a.model: "nobody" is not in models; known models: smollm2-135m-instruct, smollm2-two-layers, '
        "smollm2-hidden-states"
    ]
    assert "wanted a letter or digit first, then letters, digits and . -" in mistakes({"drafts": {"a_b": {}}})[0]


def test_gpus_need_a_device_that_they_decide() -> None:
    assert "workers.gpus: 2 with workers.device cuda:1" in mistakes({"workers": {"gpus": 2, "device": "cuda:1"}})[0]
    assert load_pipeline_config({"workers": {"gpus": 2, "device": "cuda"}})["workers"]["gpus"] == 2


def test_a_head_has_no_layers_of_the_target() -> None:
    head = {"kind": "hidden_states", "take_layers": [0, 29]}
    assert "distill.take_layers: [0, 29] with kind hidden_states" in mistakes({"distill": head})[0]
    assert "distill.kind" in mistakes({"distill": {"kind": "hidden"}})[0]


def test_every_client_of_the_capacity_runs_needs_requests() -> None:
    wanted = "capacity.requests is 32: 64 clients need at least 256, four each"
    assert wanted in mistakes({"capacity": {"clients": [64], "requests": 32}})[0]


# ---- schema, config.yaml and README say the same


def leaf_keys() -> dict[str, dict[str, Any]]:
    return {key: schema for key, schema in schema_keys().items() if schema.get("type") != "object"}


def test_what_is_made_from_the_settings_is_current() -> None:
    command = [sys.executable, CONFIG.parent / "scripts" / "settings.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


SHIPPED = {"draft.lookup": [0, 2], "draft.p_min": 0.15}  # in config/config.yaml, and not the default


def test_config_file_holds_every_key_with_its_default() -> None:
    raw = yaml.safe_load((CONFIG / "config.yaml").read_text(encoding="utf-8"))
    for key, value in SHIPPED.items():
        section, _, name = key.rpartition(".")
        assert lookup(raw, key) == value != leaf_keys()[key]["default"]
        lookup(raw, section)[name] = leaf_keys()[key]["default"]
    for key, schema in leaf_keys().items():
        if not key.startswith(("models.", "drafts.")):
            assert lookup(raw, key) == schema["default"], key
    model, *_ = raw["models"].values()
    assert set(model) == {"source", "package", "version", "file", "sha256"}
    assert load_pipeline_config(raw) == load_pipeline_config({})


def test_every_example_is_valid_and_differs_from_the_default() -> None:
    for key, schema in leaf_keys().items():
        for example in schema["examples"]:
            assert "default" not in schema or example != schema["default"], key
            if key.startswith("models."):
                name = key.rpartition(".")[2]
                base = next((m for m in (PYPI, HUGGINGFACE, LOCAL, SYNTHETIC, NGRAM, SUFFIX) if name in m), PYPI)
                base = LOCAL if name == "source" else base
                raw = {"models": {"m": {**base, name: example}, "my-target": LOCAL}, **both_use("my-target")}
            elif key.endswith(".model"):
                raw = {"models": {example: LOCAL}, **both_use(example)}
            elif key.startswith("drafts."):
                raw = {"drafts": {"mine": {key.rpartition(".")[2]: example}}}
            else:
                raw = nested(key, example)
            load_pipeline_config(raw)


def example(path: Path) -> dict[str, Any]:
    """What an example file holds; its models are beside the default ones, as Snakemake merges them."""
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    if "models" in raw:
        raw["models"] |= load_pipeline_config({})["models"]
    return raw


EXAMPLES = sorted((CONFIG / "examples").glob("*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_file_is_a_valid_sweep_of_its_own(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    raw = example(path)
    config = load_pipeline_config(raw)
    assert any(config[key] != load_pipeline_config({})[key] for key in raw)
    assert f"--configfile config/examples/{path.name} " in text


def test_the_examples_show_every_axis() -> None:
    configs = [load_pipeline_config(example(path)) for path in EXAMPLES]
    axes = [
        lambda config: len(config["mode"]) == 3,
        lambda config: len(config["tree"]) == 3,
        lambda config: len(config["sampling"]["temperature"]) > 1,
        lambda config: len(config["network"]["rtt_ms"]) > 1,
        lambda config: config["draft"]["skip_layers"] == "auto",
        lambda config: len(config["drafts"]) > 1,
        lambda config: "auto" in config["gammas"],
    ]
    assert all(any(shows(config) for config in configs) for shows in axes)


def both_use(model: str) -> dict[str, Any]:
    return {"target": {"model": model}, "draft": {"model": model}}


def test_the_schema_allows_no_unknown_key_and_describes_all() -> None:
    def objects(schema: Any) -> list[dict[str, Any]]:
        if isinstance(schema, list):
            return [found for item in schema for found in objects(item)]
        if not isinstance(schema, dict):
            return []
        here = [schema] if "properties" in schema and schema.get("type") == "object" else []
        return here + [found for item in schema.values() for found in objects(item)]

    assert len(objects(SCHEMA)) == 25  # the whole, seventeen sections, a draft by name, six sources
    assert all(schema["additionalProperties"] is False for schema in objects(SCHEMA))
    assert all(schema["description"].endswith(".") for schema in schema_keys().values())
