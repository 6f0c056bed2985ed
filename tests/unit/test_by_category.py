"""The summary by category: its rows, its pooled and macro means, and acceptance by place in the output."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from specsplit.analysis.by_category import MACRO, POOLED, draw_by_category, summarize_by_category
from specsplit.analysis.tables import summarize

from test_tables import a_request, a_round, tables

SETTINGS = {"confidence": 0.95, "bootstrap_samples": 200, "seed": 0}


def a_sweep(accepted: dict[str, list[int]], count: int = 7) -> tuple[pd.DataFrame, pd.DataFrame]:
    """`count` requests a category, gammas 0 and 3, whose drafts are accepted as said, round by round."""
    requests, rounds = [], []
    for category, numbers in accepted.items():
        for n in range(count):
            name, total = f"{category}{n}", sum(numbers)
            tokens = total + len(numbers)
            requests.append(a_request(name, 0, category=category, generated_tokens=tokens))
            drafted = a_request(
                name, 3, category=category, generated_tokens=tokens, drafted_tokens=3 * len(numbers),
                accepted_tokens=total, verifications=len(numbers), acceptance_length=1 + total / len(numbers),
                total_latency_ms=1000.0 / (1 + total / len(numbers)),
            )  # fmt: skip
            requests.append(drafted)
            rounds += [a_round(name, 3, number, k) for number, k in enumerate(numbers, 1)]
    return tables(requests, rounds)


def test_each_category_and_both_means() -> None:
    requests, rounds = a_sweep({"code": [3, 3], "chat": [0, 0, 0, 0]})
    table = summarize_by_category(requests, rounds, **SETTINGS)
    drafted = table[table["gamma"] == 3].set_index("category")
    assert list(drafted.index) == ["chat", "code", POOLED, MACRO]
    assert list(drafted["acceptance_length"]) == pytest.approx([1, 4, 2, 2.5])
    assert list(drafted["speedup"])[:2] == pytest.approx([1, 4])
    assert drafted.loc[MACRO, "speedup"] == pytest.approx(2.5)
    assert np.isnan(drafted.loc[MACRO, "speedup_ci_low"])
    assert drafted.loc["code", ["speedup_ci_low", "speedup_ci_high"]].to_list() == pytest.approx([4, 4])
    assert list(drafted["requests"]) == [7, 7, 14, 14]
    whole = summarize(requests, rounds, **SETTINGS).set_index("gamma")
    for name in ("acceptance_length", "speedup", "speedup_ci_low", "itl_ms_mean", "lossless"):
        assert drafted.loc[POOLED, name] == pytest.approx(whole.loc[3, name], nan_ok=True)


def test_one_category_has_no_mean_of_categories_and_an_empty_one_a_name() -> None:
    table = summarize_by_category(*a_sweep({"": [1]}), **SETTINGS)
    assert list(dict.fromkeys(table["category"])) == ["none", POOLED]


def test_a_mean_needs_every_category_and_names_of_rows_stay_theirs(tmp_path: Path) -> None:
    table = summarize_by_category(*a_sweep({POOLED: [3] * 9, "$x^$, a\nname": [1]}, count=2), **SETTINGS)
    drafted = table[table["gamma"] == 3].set_index("category")
    assert list(drafted.index) == ["$x^$, a\nname", f"{POOLED} (category)", POOLED, MACRO]
    assert drafted.loc[MACRO, "acceptance_length"] == pytest.approx(3)
    assert np.isnan(drafted.loc[MACRO, "acceptance_length_32_to_128"])  # no chat is that long
    assert len(draw_by_category(table, tmp_path / "by.png")) == 2


def test_few_prompts_in_a_category_have_no_interval(tmp_path: Path) -> None:
    table = summarize_by_category(*a_sweep({"code": [2], "chat": [1]}, count=3), **SETTINGS)
    own = table[(table["gamma"] == 3) & (table["category"] != MACRO)].set_index("category")
    assert own["speedup_ci_low"].isna().tolist() == [True, True, False]  # six prompts in all
    assert own["acceptance_length"].notna().all()
    for path in draw_by_category(table, tmp_path / "by.png"):
        assert path.stat().st_size > 1000


def test_acceptance_by_place_in_the_output() -> None:
    # 4 tokens a round for 8 rounds (places 0 to 31), then 2 a round until place 127, then 1 a round.
    numbers = [3] * 8 + [1] * 48 + [0] * 10
    table = summarize_by_category(*a_sweep({"code": numbers}, count=2), **SETTINGS)
    row = table[table["gamma"] == 3].iloc[0]
    places = [row[f"acceptance_length_{name}"] for name in ("first_32", "32_to_128", "beyond_128")]
    assert places == pytest.approx([4, 2, 1])
    assert table.loc[table["gamma"] == 0, "acceptance_length_first_32"].isna().all()
