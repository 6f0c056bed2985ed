"""How a key of the configuration is defined: as a setting of a process (`same`, `keys`, `list_of`), as an axis of the
sweep (`axis`), or as one of the workflow alone (`key`). The keys themselves are in `specsplit.settings.workflow`.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, create_model

from specsplit.settings.base import extra_of, setting
from specsplit.settings.run import OrchestratorConfig

Definition = Any  # (type, field), as create_model takes them
Run = OrchestratorConfig
UNIQUE = {"uniqueItems": True}
ONE_OR_MORE = {**UNIQUE, "oneOrMore": True}  # a list that may be written as its only item


class Section(BaseModel):
    """A part of the configuration. Others than its keys are mistakes."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


def section(description: str, *, note: str = "", heading: str = "", **keys: Definition) -> Definition:
    """A mapping of these keys."""
    made: Any = create_model("Section", __base__=Section, **keys)
    return made, setting({}, description, note=note, heading=heading)


def key(type_: Any, default: Any, description: str, **more: Any) -> Definition:
    """A setting of the workflow alone."""
    return type_, setting(default, description, **more)


def type_of(source: type[BaseModel], field: str) -> Any:
    """The type of a setting, with its range."""
    info = source.model_fields[field]
    return Annotated[(info.annotation, *info.metadata)] if info.metadata else info.annotation


def same(source: type[BaseModel], field: str, type_: Any = None, **changes: Any) -> Definition:
    """A key that is a setting of a process. changes: what is not as there."""
    info = source.model_fields[field]
    extra = extra_of(info)
    told: dict[str, Any] = {
        name: extra.pop(name) for name in ("note", "heading", "shipped", "operates") if name in extra
    }
    example = info.examples[0] if info.examples else None
    given: dict[str, Any] = {
        "default": info.default,
        "description": info.description,
        "example": example,
        "schema": extra,
        **told,
    }
    return type_ or type_of(source, field), setting(**{**given, **changes})


def keys(source: type[BaseModel], *fields: str, **renamed: str) -> dict[str, Any]:
    """Keys that are settings of a process, called as these or, key=setting, otherwise."""
    return {key: same(source, field) for key, field in (*((field, field) for field in fields), *renamed.items())}


def several(field: str, default: Any, description: str, example: Any, **changes: Any) -> Definition:
    """A key with a list of different values of what a run has one of."""
    told = {"default": default, "description": description, "example": example, "schema": ONE_OR_MORE}
    extra = {name: value for name, value in extra_of(Run.model_fields[field]).items() if name in ("title", "plural")}
    item: Any = Annotated[type_of(Run, field), Field(json_schema_extra=extra)]
    return same(Run, field, list[item], min_length=1, **{**told, **changes})


def axis(field: str, default: Any, example: Any, more: str = "", **changes: Any) -> Definition:
    """A key with the values of a setting of a run that are swept."""
    return several(
        field, default, f"{Run.model_fields[field].description} Several are swept.{more}", example, **changes
    )


def list_of(source: type[BaseModel], field: str, **changes: Any) -> Definition:
    """A key that is a setting with a list, of different values."""
    return same(source, field, schema=ONE_OR_MORE, min_length=1, **changes)


def other(name: str, type_: Any, example: Any, **more: Any) -> Definition:
    """A key of a named draft, which is that of `draft` when it is left out."""
    return type_, setting(None, f"As `draft.{name}`, when it is another one.", example=example, **more)


def address(role: str, example: str, note: str = "") -> Definition:
    return key(
        str | None,
        None,
        f"A running {role} worker to attach to, never stopped: host:port, or a .json file with its `address`; null "
        "starts one.",
        example=example,
        note=note,
        schema={"title": "host:port, grpcs://host:port or a .json file"},
        pattern=r"^((grpcs://)?[^\s/]+:[0-9]{1,5}|.+\.json)$",
    )
