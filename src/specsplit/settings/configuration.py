"""Reads the workflow's configuration: strings coerced, defaults filled in, checked, every mistake reported at once.

config_schema.json, made from `specsplit.settings.workflow`, says which keys there are, what they may hold and what they
are when left out. Two of its words are our own: a list with `oneOrMore` may be written as its only item, and `plural`
names the items of a list.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from datetime import date, datetime
from importlib.resources import files
from typing import Any

import yaml
from jsonschema import Draft202012Validator, ValidationError
from jsonschema.validators import extend

from specsplit.decoding.tree import TreeShape
from specsplit.errors import UserError, shortened
from specsplit.settings.names import (
    DEFAULT_DRAFT,
    MARKED,
    gamma_order,
    lookup_name,
    synthetic_name,
    too_few_requests,
)

LOOKUPS = {"ngram": "ngram", "suffix": "match"}  # source: what the keys min_ and max_ are of
SCHEMA: dict[str, Any] = json.loads(files("specsplit.settings").joinpath("config_schema.json").read_text("utf-8"))

# YAML has .nan and .inf, which no range check catches and JSON cannot hold.
_TYPES = Draft202012Validator.TYPE_CHECKER.redefine(
    "number", lambda _, value: isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
)
_Validator = extend(Draft202012Validator, type_checker=_TYPES)
_NOUNS = {
    "integer": "an integer",
    "number": "a number",
    "string": "a string",
    "boolean": "true or false",
    "null": "null",
    "array": "a list",
    "object": "a mapping",
}


def load_pipeline_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The checked configuration: a new plain dict with every key present, in the order of the schema.

    raw: Snakemake's `config`, or the content of a YAML file. `--config` hands nested values over as strings,
    so where a string does not fit and what it says in YAML does ("[1,2]", "8", "null"), that is taken.
    The result's `gammas` is sorted and holds 0, the baseline of every speedup; an axis given as one value is a list
    of one; trees have one spelling each.
    Raises UserError with one line for each mistake.
    """
    config = _complete(raw, SCHEMA)
    errors = _Validator(SCHEMA).iter_errors(config)
    # A dict, not a set: keeps the order. One mistake can break two keywords (type and enum) and is told once.
    lines = list(dict.fromkeys(line for error in errors for line in _explain(error)))
    if not lines:
        lines = [*_check_trees(config), *_read_trees("baselines.tree", config["baselines"]["tree"], {})]
        lines += _cross_check(config)
    if lines:
        count = "a mistake" if len(lines) == 1 else f"{len(lines)} mistakes"
        raise UserError(
            f"The configuration has {count} (config/README.md explains every key):\n  " + "\n  ".join(lines)
        )
    if fetched := fetched_path(config["dataset"]):
        config["dataset"]["path"] = fetched
    config["gammas"] = sorted({0, *config["gammas"]}, key=gamma_order)
    for section in (config, config["baselines"]):
        section["tree"] = [str(TreeShape.parse(tree)) for tree in section["tree"]]
    config["capacity"]["clients"] = sorted({1, *config["capacity"]["clients"]})
    config["context"]["lengths"] = sorted(config["context"]["lengths"])
    return config


def fetched_path(dataset: Mapping[str, Any]) -> str | None:
    """Where the workflow puts a set of prompts that it fetches; None when the prompts are a file of the user."""
    hub = dataset["huggingface"]
    if not (dataset["name"] or hub):
        return None
    parts = [dataset["name"]] if dataset["name"] else [hub[key] for key in hub if hub[key]]
    return f"resources/datasets/{re.sub(r'[^A-Za-z0-9._-]', '-', '@'.join(parts))}.jsonl"


def swept_drafts(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Every draft of the sweep by its name, each with all keys of `draft` and one value of `lookup`; without `drafts`
    that one alone."""
    drafts = {}
    for name, own in named_drafts(config).items():
        forced = own.get("acceptance")
        for lookup in [0] if forced is not None else own.get("lookup", [0]):
            drafts[lookup_name(synthetic_name(name, forced), lookup)] = {**own, "lookup": lookup}
    return drafts


def named_drafts(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """As `drafts` has them, each with all keys of `draft`; without `drafts` that one alone."""
    return {name: {**config["draft"], **changes} for name, changes in (config["drafts"] or {DEFAULT_DRAFT: {}}).items()}


def first_draft(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The name and the keys of the first draft as it is, its acceptance not forced and without prompt lookup."""
    name, draft = next(iter(named_drafts(config).items()))
    return name, {**draft, "acceptance": None, "lookup": 0}


def schema_keys() -> dict[str, dict[str, Any]]:
    """Every key of the configuration, dotted, with its schema. A model's keys are `models.<name>.KEY`."""
    keys: dict[str, dict[str, Any]] = {}
    for name, section in SCHEMA["properties"].items():
        keys[name] = section
        named = section.get("additionalProperties") or {}
        if "oneOf" in named:
            sources = _model_sources()
            keys[f"{name}.<name>.source"] = {
                "description": "Where the model comes from; it decides which of the next keys there are.",
                "type": "string",
                "enum": list(sources),
                "examples": ["local"],
            }
            named = {"properties": {k: v for source in sources.values() for k, v in source["properties"].items()}}
            del named["properties"]["source"]
        keys |= {f"{name}.<name>.{key}": child for key, child in named.get("properties", {}).items()}
        keys |= {f"{name}.{key}": child for key, child in section.get("properties", {}).items()}
    return keys


def wanted(schema: Mapping[str, Any]) -> str:
    """What a key may hold, in words: "an integer >= 1 or null"."""
    if "enum" in schema:
        return "one of " + ", ".join(schema["enum"])
    nouns = []
    for name in _type_names(schema):
        noun = _NOUNS[name]
        if name in ("integer", "number"):
            noun += _range(schema)
        elif name == "array":
            noun += f" of {_plural(schema['items'])}"
            noun += ", all different" if schema.get("uniqueItems") else ""
            noun += ", at least one" if schema.get("minItems") else ""
            noun += "; or one of them" if schema.get("oneOrMore") else ""
        elif name != "null":
            noun = schema.get("title", noun)
            if schema.get("minLength"):
                noun = "a string, not empty"
        nouns.append(noun)
    return (", or " if "," in nouns[0] else " or ").join(nouns)


def _plural(items: Mapping[str, Any]) -> str:
    """What a list holds, in words: "integers >= 0 or auto"."""
    if "enum" in items:
        return ", ".join(items["enum"])
    first, *others = _type_names(items)
    noun = items.get("plural", f"{first}s") + _range(items)
    return " or ".join([noun, *(items["title"] for _ in others)])


def _range(schema: Mapping[str, Any]) -> str:
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {schema[key]}" for key, sign in signs.items() if key in schema]
    return (" " + " and ".join(bounds)) if bounds else ""


def _type_names(schema: Mapping[str, Any]) -> list[str]:
    names = schema.get("type", [])
    return [names] if isinstance(names, str) else names


def _model_sources() -> dict[str, dict[str, Any]]:
    """The schema of each kind of model, by the value of its `source`."""
    branches = SCHEMA["properties"]["models"]["additionalProperties"]["oneOf"]
    return {branch["properties"]["source"]["const"]: branch for branch in branches}


def _own(schema: Mapping[str, Any], value: Any) -> Mapping[str, Any]:
    """The schema that applies to `value`: of the models' sources the one it names.

    A model without a known source gets an empty schema: nothing to fill in; validation reports it.
    """
    if "oneOf" not in schema:
        return schema
    source = value.get("source") if isinstance(value, Mapping) else None
    return _model_sources().get(source, {}) if isinstance(source, str) else {}


def _complete(value: Any, schema: Mapping[str, Any]) -> Any:
    """A plain copy of `value` with strings coerced and missing keys set to their defaults."""
    schema = _own(schema, value)
    if isinstance(value, date):  # YAML reads 2026-01-31 as one
        value = value.isoformat()
    if isinstance(value, str):
        value = _coerce(value, schema)
    if schema.get("oneOrMore") and isinstance(value, str | int | float):
        value = [value]
    elif isinstance(value, float) and value.is_integer() and "integer" in _type_names(schema):
        value = int(value)  # JSON Schema takes 8.0 for an integer; a file name made from it would not
    if isinstance(value, Mapping):
        given = {str(key): item for key, item in value.items()}
        known = schema.get("properties", {})
        rest = schema.get("additionalProperties")
        known_here = [key for key, child in known.items() if key in given or "default" in child]
        values = {key: given[key] if key in given else known[key]["default"] for key in known_here} | given
        other = rest if isinstance(rest, Mapping) else {}
        return {key: _complete(item, known.get(key, other)) for key, item in values.items()}
    if isinstance(value, list | tuple):
        return [_complete(item, schema.get("items", {})) for item in value]
    return value


def _coerce(text: str, schema: Mapping[str, Any]) -> Any:
    """`text`, or what it says in YAML when only that is of a type that the key may hold."""
    if _Validator(schema).is_valid(text):
        return text
    try:
        parsed = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):  # ValueError: looks like a date, but is none
        return text
    if isinstance(parsed, float) and parsed.is_integer() and "integer" in _type_names(schema):
        parsed = int(parsed)
    fits = any(_TYPES.is_type(parsed, name) for name in _type_names(schema) if name != "string")
    return parsed if fits else text


def _explain(error: ValidationError) -> Iterator[str]:
    """One line for each thing that is wrong at the place of `error`."""
    path = _dotted(error.absolute_path)
    value: Any = error.instance
    schema: Any = error.schema
    if "propertyNames" in error.schema_path and "enum" in schema:
        yield _explain_unknown_key(path, str(value), {name: {} for name in schema["enum"]})
    elif "propertyNames" in error.schema_path:
        signs = "letters, digits and . -" if path == "drafts" else "letters, digits and . _ -"
        wanted_name = f"a letter or digit first, then {signs}, {schema['maxLength']} characters at most"
        yield f"{path}: the name {_show(value)} cannot be a folder name; wanted {wanted_name}"
    elif error.validator == "oneOf":
        yield from _explain_model(error, path)
    elif error.validator == "required":
        names: Any = error.validator_value
        for name in names:
            if name not in value:
                yield f"{_join(path, name)}: missing; wanted {wanted(schema['properties'][name])}"
    elif error.validator == "additionalProperties":
        for key in value:
            if key not in schema["properties"]:
                yield _explain_unknown_key(path, key, schema["properties"])
    elif error.validator == "minProperties":
        yield f"{path}: empty; wanted at least one model"
    elif error.validator == "uniqueItems":
        repeats = ", ".join(_show(item) for index, item in enumerate(value) if item in value[:index])
        yield f"{path}: {_show(value)} has {repeats} more than once; remove the repeats"
    else:
        yield f"{path}: {_show(value)}; wanted {wanted(schema)}{_hint(value, schema)}"


def _explain_model(error: ValidationError, path: str) -> Iterator[str]:
    """The errors against the source that the model names; oneOf alone would say "none of them fits"."""
    names = list(_model_sources())
    if not isinstance(error.instance, Mapping):
        yield f"{path}: {_show(error.instance)}; wanted a mapping with `source`: one of {', '.join(names)}"
        return
    source = error.instance.get("source")
    if source not in names:
        given = _show(source) if "source" in error.instance else "missing"
        yield f"{path}.source: {given}; wanted one of {', '.join(names)}"
        return
    for cause in error.context or ():
        if cause.schema_path[0] == names.index(source):
            yield from _explain(cause)


def _explain_unknown_key(path: str, key: str, siblings: Mapping[str, Any]) -> str:
    line = f"{_join(path, key)}: unknown key; "
    every = schema_keys()
    if key in every:
        return line + f"write it nested: {key.replace('.', ': {', 1)}: ...}}"
    if close := difflib.get_close_matches(key, siblings, n=1):
        return line + f"did you mean {_join(path, close[0])}?"
    if "source" in siblings:
        source = siblings["source"]["const"]
        return line + (
            f"a {source} model has {', '.join(siblings)} (Snakemake merges models of one name across files: "
            "give a model from another source a new name)"
        )
    # The right key in the wrong section; of several sections the first.
    leaves = {dotted.rpartition(".")[2]: dotted for dotted in reversed(list(every)) if "<" not in dotted}
    if close := difflib.get_close_matches(key, leaves, n=1, cutoff=0.75):
        return line + f"did you mean {leaves[close[0]]}?"
    return line + f"known here: {', '.join(siblings)}"


def _hint(value: Any, schema: Mapping[str, Any]) -> str:
    names = _type_names(schema)
    if isinstance(value, int | float) and not isinstance(value, bool):
        if "array" in names:
            return f" (write [{value}])"
        if "string" in names and "enum" not in schema and "integer" not in names:
            return f' (write it in quotes: "{value}")'
    return ""


def _check_trees(config: Mapping[str, Any]) -> Iterator[str]:
    """As `_read_trees`; then dynamic ones are not to be sampled from by rejection."""
    shapes: dict[TreeShape, str] = {}
    yield from _read_trees("tree", config["tree"], shapes)
    dynamic = [text for shape, text in shapes.items() if shape.nodes]
    warm = [temperature for temperature in config["sampling"]["temperature"] if temperature > 0]
    if config["sampling"]["method"] == "rejection" and dynamic and warm:
        yield (
            f"sampling.method: rejection cannot go with tree {dynamic[0]} at temperature {warm[0]:g}: a dynamic tree "
            "keeps drafted tokens by their probability, which biases rejection sampling; use coupled, or a chain or "
            "static tree"
        )


def _read_trees(key: str, trees: list[str], shapes: dict[TreeShape, str]) -> Iterator[str]:
    """Put every tree into `shapes`; a line for each that cannot be read or is there twice in two spellings."""
    for index, text in enumerate(trees):
        try:
            shape = TreeShape.parse(text)
        except ValueError as error:
            yield f"{key}[{index}]: {error}"
            continue
        if shape in shapes:
            yield f"{key}: {text} is the same tree as {shapes[shape]}; remove one of them"
        shapes[shape] = text


def _cross_check(config: Mapping[str, Any]) -> Iterator[str]:
    """What the schema cannot say: keys that must agree with each other."""
    yield from _check_dataset(config["dataset"])
    models = config["models"]
    paths = [f"drafts.{name}" for name in config["drafts"]] or ["draft"]
    drafts = dict(zip(paths, named_drafts(config).values(), strict=True))
    for path, own in {"target": config["target"], **drafts}.items():
        name = own["model"]
        if name not in models:
            close = difflib.get_close_matches(name, models, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            yield f"{path}.model: {_show(name)} is not in models; {hint}known models: {', '.join(models)}"
    for name in config["drafts"]:
        if marked := MARKED.search(name):
            yield f"drafts.{name}: names get {marked[0]} from acceptance or lookup, and only from them; rename it"
    temperatures = config["sampling"]["temperature"]
    for path, own in drafts.items():
        source = models.get(own["model"], {}).get("source")
        if own["acceptance"] is not None and config["sampling"]["method"] == "rejection" and max(temperatures) > 0:
            yield f"{path}.acceptance: {own['acceptance']} needs texts that are known before: sampling.method coupled"
        if own["acceptance"] is not None and 0 not in own["lookup"]:
            both = f"{path}.acceptance: {own['acceptance']} with lookup {own['lookup']}"
            yield f"{both}: what is looked up cannot be forced; write lookup: [0], or acceptance: null"
        if own["skip_layers"] and source in ("synthetic", *LOOKUPS):
            yield f"{path}.skip_layers: the {source} model {own['model']} has no layers; write []"
    target = models.get(config["target"]["model"], {})
    if target.get("path", "").rstrip("/") == f"results/distill/{config['distill']['name']}/draft":
        yield f"target.model: {_show(config['target']['model'])} is the draft that distill makes from the target"
    if config["distill"]["kind"] == "hidden_states" and (named := config["distill"]["take_layers"]) is not None:
        yield f"distill.take_layers: {named} with kind hidden_states, which has no layers of the target; write null"
    if problem := too_few_requests(config["capacity"]["clients"], config["capacity"]["requests"]):
        yield f"capacity.{problem}"
    workers = config["workers"]
    if workers["gpus"] and workers["device"] not in ("auto", "cuda"):
        yield (
            f"workers.gpus: {workers['gpus']} with workers.device {workers['device']}; each worker sees only its own "
            "GPU then: write device auto or cuda"
        )
    yield from _check_lookup_models(config)


def _check_dataset(dataset: Mapping[str, Any]) -> Iterator[str]:
    """One source of prompts, and a date that there is."""
    default = SCHEMA["properties"]["dataset"]["properties"]["path"]["default"]
    if dataset["name"] and dataset["huggingface"]:
        yield "dataset.name and dataset.huggingface: two sources of prompts; set one of them to null"
    elif (fetched := fetched_path(dataset)) and dataset["path"] not in (default, fetched):
        other = "name" if dataset["name"] else "huggingface"
        yield f"dataset.path and dataset.{other}: two sources of prompts; remove one of them"
    if dataset["date"]:
        try:
            datetime.fromisoformat(dataset["date"])
        except ValueError as error:
            yield f"dataset.date: {_show(dataset['date'])}: {error}"


def _check_lookup_models(config: Mapping[str, Any]) -> Iterator[str]:
    """A model that only looks tokens up needs another one to say which tokens there are, and cannot verify."""
    models = config["models"]
    lookups = {name: model for name, model in models.items() if model["source"] in LOOKUPS}
    others = [other for other in models if other not in lookups]
    for name, model in lookups.items():
        wanted_of = {"tokenizer": "has a tokenizer of its own"}
        if model.get("model") is not None:
            wanted_of["model"] = "drafts by itself"
        for key, what in wanted_of.items():
            if model[key] not in others:
                yield (
                    f"models.{name}.{key}: {_show(model[key])}; wanted the name of a model that {what}: "
                    f"{', '.join(others) or 'none yet'}"
                )
        unit = LOOKUPS[model["source"]]
        if model[f"min_{unit}"] > model[f"max_{unit}"]:
            most = model[f"max_{unit}"]
            yield f"models.{name}.min_{unit}: {model[f'min_{unit}']}; wanted at most max_{unit}, {most}"
    target = config["target"]["model"]
    if target in lookups:
        article = "an" if lookups[target]["source"] == "ngram" else "a"
        yield f"target.model: {_show(target)} is {article} {lookups[target]['source']} model, which can only draft"


def _dotted(path: Iterable[str | int]) -> str:
    """`gammas[1]`, `models.my-model.file`; empty for the whole configuration."""
    dotted = ""
    for part in path:
        dotted = f"{dotted}[{part}]" if isinstance(part, int) else _join(dotted, part)
    return dotted


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _show(value: Any) -> str:
    """The value as YAML would have it, shortened."""
    return shortened(json.dumps(value, ensure_ascii=False, default=str), 80)
