"""Command-line flags made from the settings classes, so that flag, variable and default are written down once."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, TypeVar

from specsplit.errors import UserError
from specsplit.settings.processes import Settings

S = TypeVar("S", bound=Settings)


def add_setting_flags(
    parser: argparse.ArgumentParser,
    settings: type[Settings],
    *,
    only: Sequence[str] | None = None,
) -> None:
    """Add a flag for each field of `settings`, or for those in `only`."""
    group = parser.add_argument_group(f"settings (environment: {settings.model_config['env_prefix']}*)")
    for field, info in settings.model_fields.items():
        if only is not None and field not in only:
            continue
        flag = settings.flag(field)
        default = info.get_default(call_default_factory=True)
        text = (info.description or "").replace("%", "%%")
        if default is not None and "default" not in text:
            text += f" (default: {default})"
        options: dict[str, Any] = {"dest": field, "default": None, "help": text}
        if info.annotation is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        elif "list" in str(info.annotation):
            group.add_argument(flag, nargs="*", metavar="N", **options)
        else:
            group.add_argument(flag, metavar=field.rpartition("_")[2].upper(), **options)


def load_settings(settings: type[S], args: argparse.Namespace, **override: Any) -> S:
    """Settings from the parsed flags, the environment and the defaults; UserError names what is wrong."""
    given = {field: getattr(args, field, None) for field in settings.model_fields}
    return settings.load({**given, **override})


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


def add_interval_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of every command that states intervals."""
    parser.add_argument("--confidence", type=float, default=0.95, help="level of the intervals")
    parser.add_argument("--bootstrap-samples", type=int, default=10_000, help="draws for joint intervals")
    parser.add_argument("--seed", type=int, default=0, help="seed of those draws")


def interval_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What those flags say, as `summarize` wants it."""
    if not 0 < args.confidence < 1:
        raise UserError(f"--confidence {args.confidence}: a level between 0 and 1, as 0.95")
    return {"confidence": args.confidence, "bootstrap_samples": args.bootstrap_samples, "seed": args.seed}
