"""results/report.html: the experiment on one page that needs nothing beside itself.

A reader who has this file alone can tell which models, data, machine and commands, whether the text was that of the
target, which draft length is best, by how much and how surely.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from pandas import DataFrame, read_csv
from pandas.errors import EmptyDataError

import specsplit
from specsplit.analysis.capacity_table import capacity_sentences
from specsplit.analysis.captions import BESIDE, CAPTIONS, FIGURES
from specsplit.analysis.conclusions import compared_sentence, conclusions
from specsplit.analysis.costs import with_price
from specsplit.analysis.findings import find_best
from specsplit.analysis.merging import read_tables
from specsplit.analysis.series import check_beside
from specsplit.analysis.states_table import states_sentences
from specsplit.analysis.statistics import MIN_PROMPTS
from specsplit.analysis.summary_text import summary_table
from specsplit.analysis.tables import summarize
from specsplit.errors import UserError, counted
from specsplit.io import read_json_object, replace_file
from specsplit.provenance.facts import part_of
from specsplit.settings.axes import CONFIGURATION
from specsplit.settings.measure import PriceSettings
from specsplit.settings.names import SYNTHETIC, swept_drafts

# What is shown of the tables beside the sweep: columns in their order; an interval stands beside its column.
_COLUMNS = {
    "peers": "contender itl_ms_mean ttft_ms_median tokens_per_second latency_vs_* identical first_divergence reason",
    "capacity": "mode gamma clients rate tokens_per_second gain speedup_at_load itl_ms_median itl_ms_p99 "
    "ttft_ms_median total_latency_ms_p90 goodput_share goodput_tokens_per_second matches_single",
    "openai_load": "gamma mode clients requests prompt_tokens output_tokens tokens_per_second gain ttft_ms_median "
    "tpot_ms_median acceptance_length client",
    "profile": f"{' '.join(CONFIGURATION)} phase rounds tokens_per_round round_ms *_compute_ms *_queue_ms network_ms "
    "worker_ms orchestrator_ms hidden_ms ms_per_token",
    "context_curve": "gamma context_tokens ttft_ms_median itl_ms_median *_compute_ms_median tokens_per_round "
    "relative_length relative_cost",
    "hidden_states": "draft project form window rtt_ms bandwidth_mbit target_received_bytes_per_* "
    "draft_sent_bytes_per_* ttft_ms_median itl_ms_median ms_per_token acceptance_length lossless latency_vs_draft",
}
# What such a table says in words.
_SENTENCES = {"capacity": capacity_sentences, "hidden_states": states_sentences}
MOST_ROWS = 200  # of such a table; the file itself has the rest
_UNKNOWN = "not recorded"
_KINDS = {".csv": "text/csv", ".json": "application/json", ".svg": "image/svg+xml"}


def write_report(
    results_dir: Path, output: Path, *, prices: PriceSettings | None = None, confidence: float = 0.95, **settings: Any
) -> None:
    """Write the page from what lies in `results_dir`: tables, figures, record, and what was measured beside the sweep.

    prices: of `with_price`. The other arguments are those of `summarize`. Raises UserError when a table, a figure or
    the record is missing.
    """
    requests, rounds = read_tables(results_dir)
    summary = summarize(requests, rounds, confidence=confidence, **settings)
    summary = with_price(summary, prices or PriceSettings())
    if not (path := results_dir / "provenance" / "provenance.json").exists():
        raise UserError(
            f"{path}: no such file: the page needs the record of how results were made. The workflow writes it "
            "(snakemake results/report.html), or `specsplit provenance record`"
        )
    record = read_json_object(path)
    headings, rows = summary_table(summary)
    files = [results_dir / name for name in ("summary.csv", "requests.csv", "reference.csv", "provenance/config.json")]
    page = {
        "version": specsplit.__version__,
        "created": _moment(record.get("created")),
        "record": record,
        "findings": find_best(requests, rounds, summary, confidence=confidence, **settings),
        "said": conclusions(summary, confidence),
        "left_out": _left_out(record),
        "confidence": f"{100 * confidence:g} %",
        "compared": compared_sentence(summary, int(requests["request_id"].nunique())),
        "least": MIN_PROMPTS,
        "asked": _asked(record),
        "machine": _machine(record),
        "packages": _packages(record),
        "workers": _workers(record),
        "headings": headings,
        "rows": rows,
        "captions": CAPTIONS,
        "figures": [
            (name, _figure(results_dir / "figures" / f"{name}.svg"))
            for name in FIGURES
            if name != "speculation" or summary["hit_rate"].notna().any()  # an empty one has nothing to see
        ],
        "more": [table for name in BESIDE if (table := _more_table(results_dir, requests, name))],
        "changed": bool(record.get("git", {}).get("dirty")),
        "runs": [_run(run) for run in record.get("runs", [])],
        "config": json.dumps(record.get("config", {}), indent=2, ensure_ascii=False),
        "files": [(path.name, _data_uri(path)) for path in files if path.exists()],
    }
    environment = Environment(
        loader=PackageLoader("specsplit.analysis", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    replace_file(output, environment.get_template("report.html.j2").render(page))


Pairs = list[tuple[str, str]]


def _asked(record: Mapping[str, Any]) -> Pairs:
    """Models, data, sweep and settings, as names and values."""
    config, dataset = record.get("config", {}), record.get("dataset", {})
    models = {model.get("name"): model for model in record.get("models", [])}
    drafts = swept_drafts({"drafts": {}, **config})
    pairs = [("Target", _model(config["target"], models))]
    for name, own in drafts.items():
        told = {**own, "dtype": _dtypes(name, record)} if own["dtype"] == "auto" else own
        pairs.append(("Draft" if len(drafts) == 1 else f"Draft {name}", _model(told, models)))
        if lookup := own["lookup"]:
            last = "token" if lookup == 1 else counted(lookup, "token")
            asks = f"where the last {last} occurred in the text before, what followed is drafted instead"
            pairs.append((f"Prompt lookup: {name}", asks))
        if p_min := own["p_min"]:
            asks = f"a draft ends where the draft model gives its path less than {p_min:g}"
            pairs.append((f"Least probability: {name}", asks))
        if (acceptance := own.get("acceptance")) is not None:
            pairs.append(
                (
                    f"Synthetic: {name}",
                    f"its acceptance is forced: each drafted token was made right with probability {acceptance:g}. "
                    "It says what the system does with such a draft, not how good the draft is; and no lookup",
                )
            )
    source = dataset.get("source") or config["dataset"]["path"]
    categories = f", categories {', '.join(dataset['categories'])}" if dataset.get("categories") else ""
    prompts = f"{dataset.get('count', _UNKNOWN)} of {source}{categories}"
    generation, sampling = config["generation"], config["sampling"]
    chosen = ", ".join("greedily" if t == 0 else f"at temperature {t:g}" for t in sampling["temperature"])
    if any(sampling["temperature"]):
        chosen += f"; top-k {sampling['top_k']}, top-p {sampling['top_p']:g}, {sampling['method']} verification"
    networks = product(config["network"]["rtt_ms"], config["network"].get("bandwidth_mbit", [0]))
    template = "chat template" if generation["use_chat_template"] else "plain prompts"
    on = ", written on after the end of text" if generation["ignore_eos"] else ""
    return [
        *pairs,
        ("Prompts", f"{prompts}; sha256 {dataset.get('output_sha256', _UNKNOWN)}"),
        ("Draft lengths γ", ", ".join(map(str, config["gammas"]))),
        ("Pipeline modes", ", ".join(config["mode"])),
        ("Draft trees", ", ".join(config["tree"])),
        ("Tokens chosen", chosen),
        ("Network to the target", ", ".join(_network(*each) for each in networks)),
        ("Texts", f"at most {counted(generation['max_output_tokens'], 'token')}, {template}{on}"),
        ("Warm-up", f"requests run before each configuration, in no table: {config['warmup_requests']}"),
        ("Repeats", f"each request is measured this often, and its median counts: {config['repeats']}"),
        ("Seed", str(config["seed"])),
    ]


def _network(rtt_ms: float, bandwidth_mbit: float) -> str:
    rtt = f"RTT {rtt_ms:g} ms" if rtt_ms else ""
    bandwidth = f"{bandwidth_mbit:g} Mbit/s each way" if bandwidth_mbit else ""
    return f"simulated {', '.join(filter(None, (rtt, bandwidth)))}" if rtt or bandwidth else "as it is"


def _dtypes(draft: str, record: Mapping[str, Any]) -> str:
    """What `dtype: auto` was of a draft, as its workers say."""
    workers = [
        part_of(run, "workers", "draft")
        for run in record.get("runs", [])
        if part_of(run, "orchestrator").get("draft_name", "draft") == draft
    ]
    return " or ".join(sorted({worker["dtype"] for worker in workers if worker})) or "auto"


def _model(role: Mapping[str, Any], models: Mapping[Any, Mapping[str, Any]]) -> str:
    manifest = models.get(role["model"], {})
    fingerprint = manifest.get("fingerprint", {})
    source = {key: value for key, value in manifest.get("source", {}).items() if value is not None}
    kind = source.pop("source", "")
    parts = [f"{role['model']}, {role['dtype']}"]
    if parameters := fingerprint.get("parameters"):
        million = parameters >= 1e6
        parts.append(f"{parameters / 1e6:,.1f} million parameters" if million else f"{parameters:,} parameters")
    if layers := role.get("skip_layers"):
        parts.append(
            f"without layers {layers}" if layers != "auto" else f"without {counted(role['skip_count'], 'layer')} (auto)"
        )
    if kind:
        parts.append(f"from {kind}: " + ", ".join(f"{key} {value}" for key, value in source.items() if key != "sha256"))
    if weights := fingerprint.get("weights_sha256"):
        parts.append(f"weights sha256 {weights}")
    return "; ".join(parts)


def _machine(record: Mapping[str, Any]) -> Pairs:
    """Where and with what the runs ran, as they say; of a record whose runs do not, of the job that wrote it."""
    runs = [run for run in record.get("runs") or () if run.get("machine")]
    workers = [worker for run in runs for worker in (run.get("workers") or {}).values()]
    first = runs[0] if runs else record
    machine, software = first.get("machine") or {}, first.get("software") or record.get("software") or {}
    git, gpu = record.get("git", {}), (first.get("gpu") or {}).get("before") or record.get("gpu", {})
    packages = software.get("packages") or {}
    runtimes = [worker.get("runtime") or {} for worker in workers]
    hosts = [run["machine"].get("hostname") for run in runs] + [runtime.get("host") for runtime in runtimes]
    hosts = list(dict.fromkeys(str(host) for host in hosts or [machine.get("hostname")] if host))
    torch = machine.get("torch") or {}
    cards = [card for run in runs or [record] for card in _cards(run)]
    gpus = [f"{card.get('name')}, driver {card.get('driver_version')}" for card in cards]
    gpus += [f"{r['gpu']}, driver {r.get('driver')}, of a worker" for r in runtimes if r.get("gpu", "None") != "None"]
    gpus = list(dict.fromkeys(gpus))
    differs = [_difference(each) for each in record.get("differences") or ()]
    memory = machine.get("memory_bytes")
    commit = f"commit unknown ({git.get('reason') or _UNKNOWN})"
    if git.get("commit"):
        commit = f"commit {git['commit']}{' with uncommitted changes' if git.get('dirty') else ''}"
    versions = {
        "SpecSplit": software.get("specsplit"),
        "Python": software.get("python"),
        "PyTorch": torch.get("version") or packages.get("torch"),
        "Transformers": packages.get("transformers"),
        "gRPC": packages.get("grpcio"),
        "Snakemake": software.get("snakemake"),
    }
    return [
        ("Host", ", ".join(hosts) or _UNKNOWN),
        (
            "Processor",
            f"{machine.get('cpu_model') or _UNKNOWN}, {counted(machine.get('cores_usable', '?'), 'core')} usable",
        ),
        ("Memory", f"{memory / 2**30:.1f} GiB" if memory else _UNKNOWN),
        ("GPU", ", ".join(gpus) if gpus else f"none ({gpu.get('reason') or _UNKNOWN})"),
        ("System", f"{machine.get('os') or _UNKNOWN}, {machine.get('kernel') or 'kernel ' + _UNKNOWN}"),
        ("Software", ", ".join(f"{name} {version}" for name, version in versions.items() if version)),
        ("Code", commit),
        *([("Differs between runs", "; ".join(differs) or "nothing")] if "differences" in record else []),
    ]


def _cards(run: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The GPUs of a run, or of a record."""
    gpu = run.get("gpu") or {}
    return list((gpu.get("before") or gpu).get("gpus") or ())


def _difference(difference: Mapping[str, Any]) -> str:
    values = (f"{value[:60]} ({', '.join(runs[:3])})" for value, runs in difference["values"].items())
    return f"{difference['fact']}: {' or '.join(values)}"


def _packages(record: Mapping[str, Any]) -> str:
    """All packages of the processes of the runs, each with the versions that there were."""
    versions: dict[str, dict[str, None]] = {}
    for run in record.get("runs") or ():
        for process in (run.get("software") or {}, *(run.get("workers") or {}).values()):
            for name, version in (process.get("packages") or {}).items():
                versions.setdefault(name, {})[version] = None
    return ", ".join(f"{name} {' or '.join(found)}" for name, found in sorted(versions.items()))


def _workers(record: Mapping[str, Any]) -> list[str]:
    """What each kind of worker process was, each once."""
    found = []
    for run in record.get("runs", []):
        for role, worker in (run.get("workers") or {}).items():
            skipped = f" without layers {worker['skip_layers']}" if worker.get("skip_layers") else ""
            found.append(
                f"{role}: {worker.get('model')}{skipped}, {worker.get('dtype')}, on {worker.get('device')}, "
                f"threads {worker.get('threads')}"
            )
    return list(dict.fromkeys(found))


def _left_out(record: Mapping[str, Any]) -> list[str]:
    """What runs were to measure beside their configuration and could not, with the reasons."""
    found = [(run.get("beside") or {}).get("left_out") or {} for run in record.get("runs", [])]
    found += [
        {f"energy of the {role} worker's machine": why for role, why in run["energy"]["left_out"].items()}
        for run in record.get("runs", [])
        if run.get("energy")
    ]
    return list(dict.fromkeys(f"{what}: {reason}" for left_out in found for what, reason in left_out.items()))


def _run(run: Mapping[str, Any]) -> dict[str, str]:
    return {
        "command": str(run.get("command") or _UNKNOWN),
        "started": _moment(run.get("started")),
        "seconds": _seconds(run.get("started"), run.get("finished")),
        "exit_code": str(run.get("exit_code", _UNKNOWN)),
    }


def _seconds(started: Any, finished: Any) -> str:
    try:
        lasted = datetime.fromisoformat(str(finished)) - datetime.fromisoformat(str(started))
    except ValueError:
        return _UNKNOWN
    seconds = lasted.total_seconds()
    return f"{seconds:.1f}" if seconds >= 0 else f"{_UNKNOWN} (the clock was set back)"


def _moment(text: Any) -> str:
    """A recorded time to the second, in UTC: 2025-01-31 12:00:00 UTC."""
    try:
        return datetime.fromisoformat(str(text)).strftime("%Y-%m-%d %H:%M:%S UTC")
    except ValueError:
        return _UNKNOWN


def _figure(path: Path) -> Markup:
    """An <img> that holds the picture itself: an SVG of its own, whose ids and fonts touch no other."""
    return Markup('<img src="{}" alt="{}">').format(
        _data_uri(path), f"Figure {path.stem}. {CAPTIONS.get(path.stem, '')}"
    )


def _data_uri(path: Path) -> str:
    try:
        return f"data:{_KINDS[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path}: {reason}; make it with the workflow or `specsplit analyze`") from None


def _more_table(results_dir: Path, requests: DataFrame, name: str) -> dict[str, Any] | None:
    path = results_dir / f"{name}.csv"
    if not path.exists():
        return None
    check_beside(results_dir, requests, name)
    try:
        table = read_csv(path, dtype=str, keep_default_na=False)
    except ValueError as error:
        why = "is empty" if isinstance(error, EmptyDataError) else f"cannot be read as a CSV table: {error}"
        raise UserError(f"{path}: {why}; make it again, or delete it to have a report without it") from None
    headings, rows = _chosen(table, _COLUMNS.get(name, "*").split())
    figure = results_dir / "figures" / f"{name}.svg"
    return {
        "heading": BESIDE[name],
        "what": CAPTIONS[name],
        "sentences": _SENTENCES[name](read_csv(path)) if name in _SENTENCES else [],
        "headings": headings,
        "rows": rows[:MOST_ROWS],
        "left_out": len(rows) - MOST_ROWS,
        "name": path.name,
        "uri": _data_uri(path),
        "figure": _figure(figure) if figure.exists() else None,
    }


def _chosen(table: DataFrame, patterns: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """The columns that match, in the order of the patterns, numbers shortened; intervals in brackets beside them.

    table: of strings. What is the same in every row and only tells configurations apart, as `tree`, is left out.
    """
    told = [name for name in CONFIGURATION[1:] if name in table]
    constant = {name for name in told if table[name].nunique() <= 1 and not table[name].str.contains(SYNTHETIC).any()}
    every = [str(name) for name in table]
    ends = {name for name in every if name.endswith(("_ci_low", "_ci_high"))}
    names = [name for pattern in patterns for name in every if fnmatchcase(name, pattern)]
    names = [name for name in dict.fromkeys(names) if name not in ends | constant]
    shown = table.map(_short)
    columns = []
    for name in names:
        low, high = (f"{name.removesuffix('_mean')}_ci_{end}" for end in ("low", "high"))
        cells = shown[name].replace("", "-")
        if low in table and high in table:
            cells += (" [" + shown[low] + ", " + shown[high] + "]").where(table[low] != "", "")
        columns.append(cells)
    headings = [name.removesuffix("_mean").replace("_", " ") for name in names]
    return headings, [list(cells) for cells in zip(*columns, strict=True)]


def _short(cell: str) -> str:
    """Numbers with three digits: the file itself has the rest."""
    try:
        value = float(cell)
    except ValueError:
        return cell
    if 0.9995 <= value < 1:  # a share is 1 only when all are
        return "0.999"
    return cell if len(cell) <= 4 else f"{value:.3g}" if abs(value) < 1e3 else f"{value:,.0f}"
