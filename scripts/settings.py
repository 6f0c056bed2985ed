#!/usr/bin/env python
"""Makes what is generated from the settings (specsplit.settings.workflow); with --check, only compares it:

src/specsplit/settings/config_schema.json   the JSON Schema that the configuration is checked with
config/README.md                            the table of every key, between its markers
config/config.yaml                          every key with its comment, and its default or what is shipped
workflow/schemas/config.schema.yaml         the same schema, where the Snakemake workflow catalog looks for it
src/specsplit/settings/facts.json           facts about the settings, which Snakemake reads without pydantic
"""

import argparse
import json
import re
import sys
import textwrap
from pathlib import Path

from pydantic.json_schema import GenerateJsonSchema
from yaml import safe_dump

from specsplit.settings.base import extra_of
from specsplit.settings.distill import TrainingSettings, WritingSettings
from specsplit.settings.measure import BenchSettings
from specsplit.settings.run import OrchestratorConfig
from specsplit.settings.serve import ServeSettings
from specsplit.settings.worker import DraftWorkerConfig, LaunchSettings, TargetWorkerConfig
from specsplit.settings.workflow import Workflow

ROOT = Path(__file__).parents[1]
SCHEMA = ROOT / "src/specsplit/settings/config_schema.json"
CATALOG_SCHEMA = ROOT / "workflow/schemas/config.schema.yaml"
FACTS = ROOT / "src/specsplit/settings/facts.json"
README = ROOT / "config/README.md"
CONFIG = ROOT / "config/config.yaml"
BEGIN, END = "<!-- made by scripts/settings.py: begin -->", "<!-- made by scripts/settings.py: end -->"
OURS = ("note", "heading", "shipped", "operates", "verbatim")  # of `setting`, and of no use to who reads the schema
ORDER = ("$schema", "title", "description", "plural", "type", "additionalProperties", "required")
WIDTH = 120


def facts():
    """Which settings only operate a job, which a step of the distillation takes, and which variables set what."""
    workers = (DraftWorkerConfig, TargetWorkerConfig)
    with_variables = (OrchestratorConfig, *workers, ServeSettings, WritingSettings, TrainingSettings)
    operates = (cls.operating() for cls in (*with_variables, BenchSettings, LaunchSettings))
    operating, deciding = set(), set()
    for cls in with_variables:
        for field in cls.model_fields:
            (operating if field in cls.operating() else deciding).update(cls.variables(field))
    return {
        "operating": sorted(set().union(*operates)),
        "write_data": list(WritingSettings.model_fields),
        "train": list(TrainingSettings.model_fields),
        "variables": sorted(operating),
        "deciding_variables": sorted(deciding),
    }


class Untitled(GenerateJsonSchema):
    """Without the titles that pydantic makes of names: here a title says what may be written."""

    def field_title_should_be_set(self, schema):
        return False

    def sort(self, value, parent_key=None):
        return value  # in the order of the definitions


def schema():
    """The JSON Schema of the configuration, without references, in plain words."""
    made = Workflow.model_json_schema(schema_generator=Untitled)
    flat = flatten(made, made.pop("$defs"))
    comment = "Made by scripts/settings.py from src/specsplit/settings/workflow.py: change that."
    about = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$comment": comment}
    description = "What config/config.yaml may hold. config/README.md has the same as a table."
    return {**about, **flat, "title": "SpecSplit workflow configuration", "description": description}


def flatten(node, defs):
    """The same schema with references followed and the members of a union in one, as `type: [integer, null]`."""
    if isinstance(node, list):
        return [flatten(item, defs) for item in node]
    if isinstance(node, float) and node.is_integer():
        return int(node)
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        target = {**defs[node["$ref"].rpartition("/")[2]]}
        target = {key: value for key, value in target.items() if key not in ("title", "description")}
        return flatten({**target, **{key: value for key, value in node.items() if key != "$ref"}}, defs)
    named = ("properties", "$defs")
    node = {
        key: {name: flatten(item, defs) for name, item in value.items()} if key in named else flatten(value, defs)
        for key, value in node.items()
        if key not in OURS
    }
    members = node.pop("anyOf", None)
    if members and all("properties" in member for member in members):
        for member in members:
            del member["properties"]["source"]["default"]
            member["properties"]["source"].pop("type")
            member["required"] = ["source", *member.get("required", ())]
        node["oneOf"] = members
    elif members:
        merged = {key: value for member in members for key, value in word(member).items()}
        node = {**merged, "type": [member["type"] for member in members], **node}
    if node.pop("format", None) == "path":
        node["minLength"] = 1
    # A key without a default of its own: that of another section.
    if "default" in node and node["default"] is None and "null" not in node.get("type", ()):
        del node["default"]
    return {
        key: node[key] for key in [*(key for key in ORDER if key in node), *(key for key in node if key not in ORDER)]
    }


def word(member):
    """A member of a union that is one word, as a pattern."""
    return {"title": member["const"], "pattern": f"^{member['const']}$"} if "const" in member else member


def table(schema_keys, wanted):
    """The table of config/README.md."""
    lines = ["| Key | Type | Default | Meaning | Example |", "|---|---|---|---|---|"]
    for key, leaf in schema_keys().items():
        cells = [f"`{key}`", wanted(leaf), "", leaf["description"], ""]
        if leaf.get("type") != "object":
            other = "required" if key.startswith("models.") else "that of `draft`"
            cells[2] = f"`{json.dumps(leaf['default'])}`" if "default" in leaf else other
            cells[4] = f"`{json.dumps(leaf['examples'][0])}`"
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def config(flat):
    """config/config.yaml: every key, its note beside it and its heading above it."""
    lines = [
        "# What the workflow measures. Every key is explained in config/README.md.",
        "# Another file on top of this one: snakemake --cores 2 --configfile my.yaml -- results/summary.csv",
        "# Made by scripts/settings.py: defaults and comments are changed in src/specsplit/settings.",
    ]
    before = "properties"  # what the last key was
    for name, info in Workflow.model_fields.items():
        leaf, extra = flat["properties"][name], extra_of(info)
        nested = leaf.get("type") == "object" and (leaf.get("properties") or leaf["default"])
        if nested or before or extra.get("heading"):
            lines.append("")
        before = nested
        lines += comment(extra.get("heading"), "")
        if not nested:
            lines.append(f"{name}: {yaml(leaf['default'])}{beside(extra)}")
            continue
        lines.append(f"{name}:{beside(extra)}")
        if "properties" not in leaf:  # the models
            sources = [branch["properties"]["source"]["const"] for branch in leaf["additionalProperties"]["oneOf"]]
            for model, keys in leaf["default"].items():
                lines.append(f"  {model}:")
                for key, value in keys.items():
                    lines.append(f"    {key}: {yaml(value)}{' # ' + ' | '.join(sources) if key == 'source' else ''}")
            continue
        for key, child in info.annotation.model_fields.items():
            extra = extra_of(child)
            lines += comment(extra.get("heading"), "  ")
            value = extra.get("shipped", leaf["properties"][key]["default"])
            lines.append(f"  {key}: {yaml(value)}{beside(extra)}")
    return "\n".join(lines) + "\n"


def comment(text, indent):
    return textwrap.wrap(text, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ") if text else []


def beside(extra):
    return f" # {extra['note']}" if extra.get("note") else ""


def yaml(value):
    """A value as YAML, on one line; a string in quotes where it would be read as something else."""
    if isinstance(value, list):
        return f"[{', '.join(map(yaml, value))}]"
    if (
        isinstance(value, str)
        and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_./-]*", value)
        and not re.fullmatch(r"[0-9.]+", value)
    ):
        return value
    return json.dumps(value)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 when a file is not current")
    check = parser.parse_args().check
    stale = []

    def put(path, text):
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(str(path.relative_to(ROOT)))
            if not check:
                path.parent.mkdir(exist_ok=True)
                path.write_text(text, encoding="utf-8")

    flat = schema()
    put(SCHEMA, json.dumps(flat, indent=2, ensure_ascii=False) + "\n")
    put(
        CATALOG_SCHEMA,
        "# Made by scripts/settings.py.\n" + safe_dump(flat, sort_keys=False, width=WIDTH, allow_unicode=True),
    )
    put(FACTS, json.dumps(facts(), indent=2) + "\n")
    if check and stale:
        sys.exit(f"not what the settings say: {', '.join(stale)}; run scripts/settings.py and commit it")
    from specsplit.settings.schema import schema_keys, wanted  # which read the schema

    head, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    put(README, f"{head}{BEGIN}\n{table(schema_keys, wanted)}\n{END}{rest.partition(END)[2]}")
    put(CONFIG, config(flat))
    if check and stale:
        sys.exit(f"not what the settings say: {', '.join(stale)}; run scripts/settings.py and commit it")
    print("settings are current" if not stale else f"made: {', '.join(stale)}")


if __name__ == "__main__":
    main()
