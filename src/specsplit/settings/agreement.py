"""What the schema of the configuration cannot say: keys that must agree with each other. A line for each mistake."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

from specsplit.decoding.tree import TreeShape
from specsplit.settings.names import MARKED, fetched_path, named_drafts, too_few_requests
from specsplit.settings.schema import SCHEMA, model_sources, show

# Source of a model that only looks tokens up -> what its keys min_ and max_ are of.
LOOKUPS = {
    source: key.removeprefix("min_")
    for source, schema in model_sources().items()
    for key in schema["properties"]
    if key.startswith("min_")
}


def disagreements(config: Mapping[str, Any]) -> Iterator[str]:
    """A line for each mistake of a configuration that the schema takes."""
    yield from _check_trees(config)
    yield from _read_trees("baselines.tree", config["baselines"]["tree"], {})
    yield from _check_dataset(config["dataset"])
    models = config["models"]
    paths = [f"drafts.{name}" for name in config["drafts"]] or ["draft"]
    drafts = dict(zip(paths, named_drafts(config).values(), strict=True))
    for path, own in {"target": config["target"], **drafts}.items():
        name = own["model"]
        if name not in models:
            close = difflib.get_close_matches(name, models, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            yield f"{path}.model: {show(name)} is not in models; {hint}known models: {', '.join(models)}"
    for name in config["drafts"]:
        if marked := MARKED.search(name):
            yield f"drafts.{name}: names get {marked[0]} from acceptance or lookup, and only from them; rename it"
    temperatures = config["sampling"]["temperature"]
    for path, own in drafts.items():
        source = models.get(own["model"], {}).get("source")
        if own["acceptance"] is not None and config["sampling"]["method"] == "rejection" and max(temperatures) > 0:
            yield f"{path}.acceptance: {own['acceptance']} needs texts that are known before: sampling.method coupled"
        elif own["p_min"] and config["sampling"]["method"] == "rejection" and max(temperatures) > 0:
            yield (
                f"{path}.p_min: {own['p_min']} leaves out drafted tokens by their probability, which biases rejection "
                "sampling; write 0, or sampling.method coupled"
            )
        if own["acceptance"] is not None and 0 not in own["lookup"]:
            both = f"{path}.acceptance: {own['acceptance']} with lookup {own['lookup']}"
            yield f"{both}: what is looked up cannot be forced; write lookup: [0], or acceptance: null"
        if own["skip_layers"] and source in ("synthetic", *LOOKUPS):
            yield f"{path}.skip_layers: the {source} model {own['model']} has no layers; write []"
    target = models.get(config["target"]["model"], {})
    if target.get("path", "").rstrip("/") == f"results/distill/{config['distill']['name']}/draft":
        yield f"target.model: {show(config['target']['model'])} is the draft that distill makes from the target"
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
            yield f"dataset.date: {show(dataset['date'])}: {error}"


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
                    f"models.{name}.{key}: {show(model[key])}; wanted the name of a model that {what}: "
                    f"{', '.join(others) or 'none yet'}"
                )
        unit = LOOKUPS[model["source"]]
        if model[f"min_{unit}"] > model[f"max_{unit}"]:
            most = model[f"max_{unit}"]
            yield f"models.{name}.min_{unit}: {model[f'min_{unit}']}; wanted at most max_{unit}, {most}"
    target = config["target"]["model"]
    if target in lookups:
        article = "an" if lookups[target]["source"] == "ngram" else "a"
        yield f"target.model: {show(target)} is {article} {lookups[target]['source']} model, which can only draft"
