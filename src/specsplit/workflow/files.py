"""Files of the workflow: what the configuration names, what is in it, what is left behind, and paths that cannot be.

Snakemake imports this while it parses, so it needs nothing that Snakemake does not bring along, and only reads.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import socket
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from specsplit.errors import UserError
from specsplit.launch.heartbeat import silent
from specsplit.launch.process import ProcessIdentity
from specsplit.models.file_names import HEAD_WEIGHTS, MODEL_FILES, WEIGHT_FILES, is_gguf_file, matches

READ_WHOLE_BYTES = 1 << 26
SAMPLES, SAMPLE_BYTES = 64, 1 << 14
# What the measurements beside the sweep leave, by the name of their rule.
BESIDE = {
    name: [f"results/{file}" for file in (f"{name}.csv", *rows, f"figures/{name}.png", f"figures/{name}.svg")]
    for name, rows in {
        "peers": ["peers_requests.csv", "peers_run.json"],
        "capacity": ["capacity_requests.csv", "capacity_run.json"],
        "profile": [],
        "context_curve": ["context_curve_run.json"],
        "hidden_states": ["hidden_states_run.json"],
        "theory_check": ["theory_check_run.json"],
    }.items()
} | {name: [f"results/{name}.csv", f"results/{name}_run.json"] for name in ("overhead", "openai_load")}
INPUT_KEYS = re.compile(r"dataset\.path|models\..*\.path")  # of files that Snakemake sees as inputs
PATTERN = re.compile(r"[{}]|<[^<>]*>")  # its wildcards and path variables, which cannot be escaped
OTHER_BASE = re.compile(r"[-+]?(0[0-7_]+|[0-9][0-9_]*(:[0-5]?[0-9])+)")
MERGE = "tag:yaml.org,2002:merge"
UNUSABLE = re.compile("[\x00-\x1f\x7f\x85\u2028\u2029\ud800-\udfff]")  # control characters, half a character
# Keys that name a file or a folder; `models.NAME.path` as well.
PATH_KEYS = (
    "dataset.path",
    *(f"workers.{key}" for key in ("token_file", "tls_ca", "tls_cert", "tls_key", "draft_address", "target_address")),
)


def check_project(folder: Path) -> None:
    """Raise UserError for a checkout at a path that Snakemake would take for a pattern."""
    if found := PATTERN.search(str(folder.resolve())):
        raise UserError(
            f"{folder.resolve()} has {found[0]} in it, which Snakemake takes for a pattern: rename the folder"
        )


def check_yaml(path: Path) -> None:
    """Raise UserError for what YAML takes without a word for something else than what stands there: of a key that
    stands twice the last value, a number with a leading zero as octal, one with colons as of base 60. Of what is no
    YAML, Snakemake tells."""
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, ValueError, yaml.YAMLError):
        return
    if lines := list(_misread(root)):
        raise UserError("\n".join(f"{path}, line {line}: {why}" for line, why in sorted(lines)))


def _misread(node: Any) -> Iterator[tuple[int, str]]:
    line = node.start_mark.line + 1 if node is not None else 0
    if isinstance(node, yaml.ScalarNode) and node.tag.endswith(":int") and OTHER_BASE.fullmatch(node.value):
        value = yaml.safe_load(node.value)
        yield line, f"{node.value} is {value} in YAML; write {value}, or in quotes, if it is no number"
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _misread(item)
    elif isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            at = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.tag != MERGE:
                if key.value in seen:
                    yield at, f"{key.value}: stands twice (before in line {seen[key.value]}); keep one of them"
                seen.setdefault(key.value, at)
            yield from _misread(value)


def refuse_unusable(config: Mapping[str, Any]) -> None:
    """Raise UserError with a line for each text of a checked configuration that cannot be a path or an argument.

    Everything else works: spaces, quotes, `$`, backticks and stars are characters of a name like others.
    """
    lines = list(_unusable("", config))
    for key, path in path_values(config):
        if path.startswith("-"):
            lines.append(f"{key}: {path!r} begins with -, as a flag does: write the absolute path, or rename it")
        elif INPUT_KEYS.fullmatch(key) and (found := PATTERN.search(path)):
            lines.append(f"{key}: {path!r} has {found[0]} in it, which Snakemake takes for a pattern: rename it")
        elif key == "dataset.path" and Path(os.path.normpath(path)).is_relative_to("results/dataset"):
            lines.append(f"{key}: {path!r} is what the workflow makes: name the file that it is made from")
        elif path != path.strip():
            lines.append(f"{key}: {path!r} begins or ends with a space: rename it")
        elif INPUT_KEYS.fullmatch(key) and (why := _unreadable(path)):
            lines.append(f"{key}: {path!r}: {why}")
        elif key == "dataset.path" and Path(path).expanduser().is_dir():
            lines.append(f"{key}: {path!r} is a folder: name the file of prompts in it")
    if lines:
        raise UserError(
            "The configuration cannot be used (config/README.md explains every key):\n  " + "\n  ".join(lines)
        )


def _unreadable(path: str) -> str | None:
    """Why nothing of that name can be read; None where it can, or is not there yet."""
    try:
        file = Path(path).expanduser()
        file.stat()
        return None if os.access(file, os.R_OK) else "it may not be read"
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: told by _unusable
        return None
    except (OSError, RuntimeError) as error:  # too long, links in a circle, the home of nobody
        return getattr(error, "strerror", None) or str(error)


def path_values(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Every path in a checked configuration, with its dotted key."""
    for dotted in PATH_KEYS:
        section, key = dotted.split(".")
        if value := config[section][key]:
            yield dotted, value
    for name, model in config["models"].items():
        for key in ("path", "file"):
            if key in model:
                yield f"models.{name}.{key}", model[key]


def _unusable(path: str, value: Any) -> Iterator[str]:
    """A line for each text, keys too, with a control character: a line break, a NUL, an escape."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _unusable(path or "the configuration", key)
            yield from _unusable(f"{path}.{key}" if path else key, item)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _unusable(f"{path}[{index}]", item)
    elif isinstance(value, str) and (bad := UNUSABLE.search(value)):
        what = "a line break" if len(f"a{bad[0]}b".splitlines()) > 1 else f"the character {bad[0]!r}"
        yield f"{path}: {value!r} has {what} in it, which no name should: rename it"


def model_inputs(folder: Path) -> list[str]:
    """Files of a local model that a rule waits for: its configuration and its weights.

    Of a folder that is not there yet those that a rule is expected to make. All its files count by `files_sha256`.
    folder: or a GGUF file.
    """
    if is_gguf_file(folder):
        return [str(folder)]
    return [str(folder / name) for name in ["config.json", *(_weights(folder) or ["model.safetensors"])]]


def model_files(folder: Path) -> list[Path]:
    """Every file that a local model is made of: weights, configuration, tokenizer, template. folder: or a GGUF file."""
    if is_gguf_file(folder):
        return [folder]
    files = (name for name in _names(folder) if matches(name, MODEL_FILES))
    return [folder / name for name in sorted({"config.json", *files, *_weights(folder)})]


def _weights(folder: Path) -> list[str]:
    """The files with the weights; those of a head may be pickled."""
    names = _names(folder)
    return [name for name in names if matches(name, WEIGHT_FILES)] or [name for name in names if name == HEAD_WEIGHTS]


def files_sha256(paths: Iterable[Path]) -> str:
    """One hash over names and contents, whatever the dates say; a missing file counts as such.

    Of a large file samples count, and its size and date.
    """
    lines = []
    for path in paths:
        digest = hashlib.sha256()
        if path.is_file():
            size = path.stat().st_size
            with path.open("rb") as file:
                if size <= READ_WHOLE_BYTES:
                    digest.update(file.read())
                else:
                    for index in range(SAMPLES):
                        file.seek(index * (size - SAMPLE_BYTES) // (SAMPLES - 1))
                        digest.update(file.read(SAMPLE_BYTES))
                    digest.update(f"{size} {path.stat().st_mtime_ns}".encode())
        lines.append(f"{digest.hexdigest() if path.is_file() else 'missing'}  {path.name}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []


def content_sha256(paths: Iterable[Path], rules: Iterable[Any]) -> str | None:
    """`files_sha256`, for a file that was copied may have an old date; None of files that a rule of Snakemake makes."""
    paths = list(paths)
    return files_sha256(paths) if paths and not any(_made(str(path), rules) for path in paths) else None


def lost(path: str, output: str, rules: Iterable[Any]) -> bool:
    """Whether a file of the user is missing beside a finished output. Snakemake would take that for current; without
    the input the job runs, and says what is missing. rules: of Snakemake, one of which may make the file."""
    return Path(output).exists() and not Path(path).exists() and not _made(path, rules)


def _made(path: str, rules: Iterable[Any]) -> bool:
    return any(rule.is_producer(path) for rule in rules)


def beside_the_sweep(root: str, targets: Iterable[str]) -> list[str]:
    """Tables, rows and figures of the measurements beside the sweep that are there, or that this call asks for.

    root: as of a Plan. targets: those of the call, files or rules.
    """
    targets, found = list(targets), []
    for name, files in BESIDE.items():
        # A rule of a module has another name before its own.
        asked = any(t == name or t.endswith(f"_{name}") or t.removeprefix(root) in files for t in targets)
        found += [path for path in files if asked or Path(root + path).exists()]
    return found


def dead_worker(endpoint: str, run: str) -> int | None:
    """The process of the worker that an endpoint file names, when it is gone; None when the file `run` is there.

    As a parameter it starts the worker anew; a workflow that was killed leaves such files behind. A worker on another
    host is gone when its heartbeat is silent, which takes seconds to tell.
    """
    try:
        told = json.loads(Path(endpoint).read_text(encoding="utf-8"))
        pid, started, holder = told["pid"], told["started"], told["holder_pid"]
        worker = ProcessIdentity(pid, started, told.get("birth") or "")
        user = ProcessIdentity(holder, told.get("holder_started") or -1.0, told.get("holder_birth") or "")
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if pid is None or Path(run).exists():
        return None
    if told.get("host") != socket.gethostname():
        heartbeat = told.get("heartbeat")
        return pid if heartbeat and silent({Path(heartbeat)}) else None
    return None if worker.alive() and (holder is None or user.alive()) else pid


def project_files(project: Path, patterns: Iterable[str]) -> list[str]:
    """The files of the project that decide its results, and its sources, relative to the working directory."""
    own = (path for pattern in patterns for path in sorted(project.glob(pattern)))
    sources = sorted((project / "src" / "specsplit").rglob("*"))
    return [os.path.relpath(path) for path in (*own, *sources) if path.is_file() and "__pycache__" not in path.parts]


def folder_of(path: str, name: str) -> str:
    """The folder in which a file has this name, which may have folders of its own."""
    return path.removesuffix(name).rstrip("/")


def flags(**values: Any) -> str:
    """Command-line flags, quoted: None and empty lists are left out, True and False become --flag and --no-flag."""
    words: list[str] = []
    for name, value in values.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True or value is False:
            words.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, list) and value:
            words.extend([flag, *map(str, value)])
        elif isinstance(value, str) and value.startswith("-"):  # which would be taken for a flag
            words.append(f"{flag}={value}")
        elif value is not None and value != []:
            words.extend([flag, str(value)])
    return shlex.join(words)
