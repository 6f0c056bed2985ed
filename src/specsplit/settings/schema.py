"""The JSON Schema of the configuration, and what it says in words: what a key may hold, what is wrong with a value.

config_schema.json is made from `specsplit.settings.workflow`. Two of its words are our own: a list with `oneOrMore` may
be written as its only item, and `plural` names the items of a list.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from importlib.resources import files
from typing import Any

from jsonschema import Draft202012Validator, ValidationError
from jsonschema.validators import extend

from specsplit.errors import shortened

SCHEMA: dict[str, Any] = json.loads(files("specsplit.settings").joinpath("config_schema.json").read_text("utf-8"))

# YAML has .nan and .inf, which no range check catches and JSON cannot hold.
TYPES = Draft202012Validator.TYPE_CHECKER.redefine(
    "number", lambda _, value: isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
)
Validator = extend(Draft202012Validator, type_checker=TYPES)
_NOUNS = {
    "integer": "an integer",
    "number": "a number",
    "string": "a string",
    "boolean": "true or false",
    "null": "null",
    "array": "a list",
    "object": "a mapping",
}


def schema_keys() -> dict[str, dict[str, Any]]:
    """Every key of the configuration, dotted, with its schema. A model's keys are `models.<name>.KEY`."""
    keys: dict[str, dict[str, Any]] = {}
    for name, section in SCHEMA["properties"].items():
        keys[name] = section
        named = section.get("additionalProperties") or {}
        if "oneOf" in named:
            sources = model_sources()
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
    for name in type_names(schema):
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
    first, *others = type_names(items)
    noun = items.get("plural", f"{first}s") + _range(items)
    return " or ".join([noun, *(items["title"] for _ in others)])


def _range(schema: Mapping[str, Any]) -> str:
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {schema[key]}" for key, sign in signs.items() if key in schema]
    return (" " + " and ".join(bounds)) if bounds else ""


def type_names(schema: Mapping[str, Any]) -> list[str]:
    names = schema.get("type", [])
    return [names] if isinstance(names, str) else names


def model_sources() -> dict[str, dict[str, Any]]:
    """The schema of each kind of model, by the value of its `source`."""
    branches = SCHEMA["properties"]["models"]["additionalProperties"]["oneOf"]
    return {branch["properties"]["source"]["const"]: branch for branch in branches}


def explain(error: ValidationError) -> Iterator[str]:
    """One line for each thing that is wrong at the place of `error`."""
    path = _dotted(error.absolute_path)
    value: Any = error.instance
    schema: Any = error.schema
    if "propertyNames" in error.schema_path and "enum" in schema:
        yield _explain_unknown_key(path, str(value), {name: {} for name in schema["enum"]})
    elif "propertyNames" in error.schema_path:
        signs = "letters, digits and . -" if path == "drafts" else "letters, digits and . _ -"
        wanted_name = f"a letter or digit first, then {signs}, {schema['maxLength']} characters at most"
        yield f"{path}: the name {show(value)} cannot be a folder name; wanted {wanted_name}"
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
        repeats = ", ".join(show(item) for index, item in enumerate(value) if item in value[:index])
        yield f"{path}: {show(value)} has {repeats} more than once; remove the repeats"
    else:
        yield f"{path}: {show(value)}; wanted {wanted(schema)}{_hint(value, schema)}"


def _explain_model(error: ValidationError, path: str) -> Iterator[str]:
    """The errors against the source that the model names; oneOf alone would say "none of them fits"."""
    names = list(model_sources())
    if not isinstance(error.instance, Mapping):
        yield f"{path}: {show(error.instance)}; wanted a mapping with `source`: one of {', '.join(names)}"
        return
    source = error.instance.get("source")
    if source not in names:
        given = show(source) if "source" in error.instance else "missing"
        yield f"{path}.source: {given}; wanted one of {', '.join(names)}"
        return
    for cause in error.context or ():
        if cause.schema_path[0] == names.index(source):
            yield from explain(cause)


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
    names = type_names(schema)
    if isinstance(value, int | float) and not isinstance(value, bool):
        if "array" in names:
            return f" (write [{value}])"
        if "string" in names and "enum" not in schema and "integer" not in names:
            return f' (write it in quotes: "{value}")'
    return ""


def _dotted(path: Iterable[str | int]) -> str:
    """`gammas[1]`, `models.my-model.file`; empty for the whole configuration."""
    dotted = ""
    for part in path:
        dotted = f"{dotted}[{part}]" if isinstance(part, int) else _join(dotted, part)
    return dotted


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def show(value: Any) -> str:
    """The value as YAML would have it, shortened."""
    return shortened(json.dumps(value, ensure_ascii=False, default=str), 80)
