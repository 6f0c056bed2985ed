"""What a setting is, and where its value comes from.

A setting is defined once, by `setting(...)` in one of the classes of this package: type, default, range, description,
example. Its flag, its variable, its key in the configuration, that key's row in config/README.md and its place in the
JSON Schema are made from the definition.

Precedence: flag, environment variable, settings file, default.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo

from specsplit.errors import UserError
from specsplit.settings.names import did_you_mean


def setting(
    default: Any,
    description: str,
    *,
    example: Any = None,
    note: str = "",
    heading: str = "",
    shipped: Any = None,
    operates: bool = False,
    verbatim: bool = False,
    schema: Mapping[str, Any] | None = None,
    **limits: Any,
) -> Any:
    """A pydantic field.

    description: sentences, for --help and config/README.md. example: a value that is not the default.
    note: what stands beside the key in config/config.yaml; heading: the comment above it.
    shipped: what it has there, when that is not the default.
    operates: it decides how a process is operated, not what it computes; a change of it reruns nothing.
    verbatim: strings of its list are taken as they are, commas and white space included.
    schema: more of its JSON Schema. limits: of pydantic.Field (ge, lt, pattern, min_length, ...).
    """
    extra: dict[str, Any] = {
        "note": note,
        "heading": heading,
        "shipped": shipped,
        "operates": operates,
        "verbatim": verbatim,
    }
    extra = {**(schema or {}), **{key: value for key, value in extra.items() if value}}
    examples = None if example is None else [example]
    return Field(default, description=description, examples=examples, json_schema_extra=extra or None, **limits)


def extra_of(info: FieldInfo) -> dict[str, Any]:
    """What `setting` was told beside pydantic's own."""
    return dict(info.json_schema_extra) if isinstance(info.json_schema_extra, dict) else {}


def is_list(annotation: Any) -> bool:
    """Whether a setting of this type may be a list."""
    return get_origin(annotation) is list or any(is_list(part) for part in get_args(annotation))


class Settings(BaseModel):
    """Settings of one kind of process. What is not given is taken from the environment, then is the default."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    prefix: ClassVar[str] = ""  # of its variables: SPECSPLIT_<ROLE>_; none: it has no variables
    flags: ClassVar[Mapping[str, str]] = {}  # field -> its flag, where that is not the field's own name
    other_variables: ClassVar[Mapping[str, str]] = {}  # field -> a second variable that means the same
    swept: ClassVar[Sequence[str]] = ()  # fields of one value of which `specsplit bench` takes several

    @classmethod
    def flag(cls, field: str) -> str:
        """The command-line flag of a field."""
        return cls.flags.get(field, f"--{field.replace('_', '-')}")

    @classmethod
    def variables(cls, field: str) -> list[str]:
        """The environment variables of a field, the one to name first."""
        if not cls.prefix:
            return []
        names = [f"{cls.prefix}{field.upper()}"]
        return [*names, cls.other_variables[field]] if field in cls.other_variables else names

    @classmethod
    def operating(cls) -> set[str]:
        """The fields that change no result (`setting(operates=True)`)."""
        return {field for field, info in cls.model_fields.items() if extra_of(info).get("operates")}

    @classmethod
    def from_environment(cls) -> dict[str, str | None]:
        """The fields whose variable is set. An empty variable counts as not set; `null` is None.

        Raises UserError when two variables of one field differ.
        """
        found: dict[str, str | None] = {}
        for field in cls.model_fields:
            given = {name: os.environ[name] for name in cls.variables(field) if os.environ.get(name)}
            if len(set(given.values())) > 1:
                shown = " and ".join(f"{name}={value}" for name, value in given.items())
                raise UserError(f"{shown}: two values of one setting; remove one of them")
            if given:
                text = next(iter(given.values()))
                found[field] = None if text == "null" else text
        return found

    @classmethod
    def load(cls, flags: Mapping[str, Any] | None = None, file: Mapping[str, Any] | None = None) -> Self:
        """Settings from flags (None = not given, `null` = None), the environment, the content of a settings file,
        defaults.

        Raises UserError with a line for every mistake: the flag, the variable and what is wanted.
        """
        given = {field: value for field, value in (flags or {}).items() if value is not None}
        for field in [field for field in given if field in cls.model_fields and given[field] == "null"]:
            if type(None) in get_args(cls.model_fields[field].annotation):
                given[field] = None
        try:
            return cls(**{**(file or {}), **cls.from_environment(), **given})
        except ValidationError as error:
            problems: dict[str, tuple[Any, list[str]]] = {}
            for problem in error.errors():  # a union has one for each of its members
                field = str(problem["loc"][0]) if problem["loc"] else ""
                # The whole value, also where one item of it is wrong.
                whole = {**(file or {}), **given} if len(problem["loc"]) > 1 else {}
                problems.setdefault(field, (whole.get(field, problem["input"]), []))[1].append(problem["msg"])
            lines = [cls._explain(field, value, messages) for field, (value, messages) in problems.items()]
            raise UserError("\n".join(lines)) from error

    @classmethod
    def _explain(cls, field: str, value: Any, messages: list[str]) -> str:
        told = " or: ".join(dict.fromkeys(message.removeprefix("Value error, ") for message in messages))
        if not field:  # fields that do not go together
            return told
        if field not in cls.model_fields:
            return f"{cls.flag(field)}: unknown setting{did_you_mean(field, cls.model_fields)}"
        used = [name for name in cls.variables(field) if os.environ.get(name) == value] or cls.variables(field)[:1]
        hint = ""
        if isinstance(value, str) and "," in value and not is_list(cls.model_fields[field].annotation):
            several = f"; `specsplit bench` takes several: {cls.flag(field)} {value.replace(',', ' ')}"
            hint = f" (one value here{several if field in cls.swept else ''})"
        return f"{' / '.join([cls.flag(field), *used])} = {value!r}: {told}{hint}"

    @model_validator(mode="before")
    @classmethod
    def _fill_from_environment(cls, given: Any) -> Any:
        return {**cls.from_environment(), **given} if isinstance(given, dict) else given

    @field_validator("*", mode="before")
    @classmethod
    def _read_list(cls, value: Any, info: Any) -> Any:
        """Lists as variables and flags give them: "[1, 2]", "1,2", ["1,2", "5"]; one value is a list of one."""
        annotation = cls.model_fields[info.field_name].annotation
        if not is_list(annotation):
            return value
        if isinstance(value, str) and value.lstrip().startswith("["):
            try:
                return json.loads(value)
            except ValueError:
                raise ValueError("not JSON; write a list as [1, 2] or 1,2") from None
        if isinstance(value, str | int | float):
            value = [value]
        if extra_of(cls.model_fields[info.field_name]).get("verbatim"):
            return value
        if isinstance(value, list):
            words = [item.split(",") if isinstance(item, str) else [item] for item in value]
            return [word.strip() if isinstance(word, str) else word for item in words for word in item]
        return value
