"""Reads the workflow's configuration: strings coerced, defaults filled in, checked, every mistake reported at once."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from typing import Any

import yaml

from specsplit.decoding.tree import TreeShape
from specsplit.errors import UserError, counted
from specsplit.settings.agreement import disagreements
from specsplit.settings.names import fetched_path, gamma_order
from specsplit.settings.schema import SCHEMA, TYPES, Validator, explain, model_sources, type_names


def load_pipeline_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The checked configuration: a new plain dict with every key present, in the order of the schema.

    raw: Snakemake's `config`, or the content of a YAML file. `--config` hands nested values over as strings,
    so where a string does not fit and what it says in YAML does ("[1,2]", "8", "null"), that is taken.
    The result's `gammas` is sorted and holds 0, the baseline of every speedup; an axis given as one value is a list
    of one; trees have one spelling each.
    Raises UserError with one line for each mistake.
    """
    config = _complete(raw, SCHEMA)
    errors = Validator(SCHEMA).iter_errors(config)
    # A dict, not a set: keeps the order. One mistake can break two keywords (type and enum) and is told once.
    lines = list(dict.fromkeys(line for error in errors for line in explain(error)))
    if lines := lines or list(disagreements(config)):
        count = counted(len(lines), "mistake")
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


def _own(schema: Mapping[str, Any], value: Any) -> Mapping[str, Any]:
    """The schema that applies to `value`: of the models' sources the one it names.

    A model without a known source gets an empty schema: nothing to fill in; validation reports it.
    """
    if "oneOf" not in schema:
        return schema
    source = value.get("source") if isinstance(value, Mapping) else None
    return model_sources().get(source, {}) if isinstance(source, str) else {}


def _complete(value: Any, schema: Mapping[str, Any]) -> Any:
    """A plain copy of `value` with strings coerced and missing keys set to their defaults."""
    schema = _own(schema, value)
    if isinstance(value, date):  # YAML reads 2026-01-31 as one
        value = value.isoformat()
    if isinstance(value, str):
        value = _coerce(value, schema)
    if schema.get("oneOrMore") and isinstance(value, str | int | float):
        value = [value]
    elif isinstance(value, float) and value.is_integer() and "integer" in type_names(schema):
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
    if Validator(schema).is_valid(text):
        return text
    try:
        parsed = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):  # ValueError: looks like a date, but is none
        return text
    if isinstance(parsed, float) and parsed.is_integer() and "integer" in type_names(schema):
        parsed = int(parsed)
    fits = any(TYPES.is_type(parsed, name) for name in type_names(schema) if name != "string")
    return parsed if fits else text
