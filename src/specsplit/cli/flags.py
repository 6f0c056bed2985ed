"""Command-line flags and settings files, made from the settings: a flag, its variable and default are defined once.

A settings file is a JSON object of parts: `run` for the settings of the command itself, `draft` and `target` for
those of its workers.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from specsplit.errors import UserError
from specsplit.io import read_json_object
from specsplit.settings.base import Settings, is_list
from specsplit.settings.names import did_you_mean
from specsplit.settings.worker import ROLES, LaunchSettings

S = TypeVar("S", bound=Settings)
PARTS = ("run", *ROLES)


def add_setting_flags(
    parser: argparse.ArgumentParser, *classes: type[Settings], part: str = "run", without: Iterable[str] = ()
) -> None:
    """Add --settings, and a flag for each field of these classes but those in `without`.

    A field that several classes have belongs to the first. part: of a settings file that holds them.
    """
    parser.set_defaults(settings_classes=classes, settings_part=part)
    parser.add_argument(
        "--settings",
        type=Path,
        nargs="+",
        metavar="FILE.json",
        help=f'settings as JSON: {{"{part}": {{"setting": value}}}}; flags and variables override them, and a later '
        "file an earlier one",
    )
    seen = set(without)
    for settings in classes:
        title = f"settings (environment: {settings.prefix}*)" if settings.prefix else "settings"
        group = parser.add_argument_group(title)
        for field, info in settings.model_fields.items():
            if field in seen:
                continue
            seen.add(field)
            default = info.get_default(call_default_factory=True)
            text = (info.description or "").replace("%", "%%")
            if isinstance(default, list):
                default = " ".join(map(str, default))
            if default not in (None, ""):
                text += f" (default: {default})"
            kind: dict[str, Any] = {"metavar": field.rpartition("_")[2].upper()}
            if info.annotation is bool:
                kind = {"action": argparse.BooleanOptionalAction}
            elif is_list(info.annotation):
                kind["nargs"] = "*"
            group.add_argument(settings.flag(field), dest=field, default=None, help=text, **kind)


def settings_part(args: argparse.Namespace, part: str) -> dict[str, Any]:
    """One part of the files of --settings, a later file over an earlier. Raises UserError that names file and key."""
    own: Sequence[type[Settings]] = args.settings_classes
    classes: Sequence[type[Settings]] = [ROLES[part], LaunchSettings] if part in ROLES else own
    check = part in ROLES or part == args.settings_part
    known = {field for settings in classes for field in settings.model_fields}
    found: dict[str, Any] = {}
    for path in args.settings or ():
        content = read_json_object(path)
        for name in content:
            if name not in PARTS:
                raise UserError(f"{path}: {name}: no such part{did_you_mean(name, PARTS)} Parts: {', '.join(PARTS)}")
            if not isinstance(content[name], dict):
                raise UserError(f"{path}: {name}: wanted an object of settings")
        given = content.get(part, {})
        if unknown := [key for key in given if key not in known] if check else []:
            lines = [f"{path}: {part}.{key}: unknown setting{did_you_mean(key, known)}" for key in unknown]
            raise UserError("\n".join(lines))
        found |= given
    return found


def load_settings(settings: type[S], args: argparse.Namespace, **override: Any) -> S:
    """Settings from the parsed flags, the environment, the files of --settings and the defaults.

    A field that belongs to another class of the command is only what `override` says, or else its default.
    Raises UserError that names what is wrong.
    """
    classes: Sequence[type[Settings]] = args.settings_classes
    others = [other for other in classes[: classes.index(settings)] if not issubclass(settings, other)]
    own = [f for f in settings.model_fields if not any(f in other.model_fields for other in others)]
    part = settings_part(args, args.settings_part)
    given = {field: getattr(args, field, None) for field in own}
    return settings.load({**given, **override}, {field: part[field] for field in own if field in part})


def setting_arguments(settings: Settings, only: Sequence[str]) -> list[str]:
    """The flags that give a child process these very settings (null ones left to their default).

    An empty list is said, for the child might read another one from its environment.
    """
    arguments: list[str] = []
    for field in only:
        value = getattr(settings, field)
        if isinstance(value, bool):
            arguments.append(settings.flag(field) if value else f"--no-{settings.flag(field)[2:]}")
        elif value is not None:
            arguments.append(settings.flag(field))
            arguments += [str(item) for item in value] if isinstance(value, list) else [str(value)]
    return arguments
