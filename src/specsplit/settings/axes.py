"""The columns that say which configuration a row of a table is of."""

from __future__ import annotations

from typing import Any

from specsplit.settings.run import NO_NETWORK, OrchestratorConfig

_FIELDS = {"draft": "draft_name"}  # column -> its setting, where that has another name
# Name of the column -> its value in a plain sweep over gamma: the default of its setting.
PLAIN: dict[str, Any] = {
    column: OrchestratorConfig.model_fields[_FIELDS.get(column, column)].default
    for column in ("mode", "tree", "draft", "sampling", "temperature", "top_k", "top_p", *NO_NETWORK)
}
CONFIGURATION = ("gamma", *PLAIN)
# Fields of OrchestratorConfig that a sweep may vary.
SWEPT = ("gamma", *(_FIELDS.get(column, column) for column in PLAIN))
# Column of tables of runs that were kept apart: the number of the series, only rows of one are compared.
SERIES = "series"
