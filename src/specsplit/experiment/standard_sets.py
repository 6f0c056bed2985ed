"""The sets of prompts that results in the field are stated on, by name: where they are and how they are read.

Revisions are those of the files that were looked at. sha256 is None where the file itself could not be: then the first
download is recorded beside it, and later ones are checked against that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Row = dict[str, Any]
MT_BENCH = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
# Rows of SPEED-Bench whose text the publisher may not pass on say this instead.
SPEED_BENCH_PLACEHOLDER = "FULL BENCHMARK DATA SHOULD BE FETCHED FROM THE SOURCE"


@dataclass(frozen=True)
class StandardSet:
    """One set. count: its prompts. columns: of its rows, as `read_conversation` takes them.

    url: of its file; with the revision in it. hub: instead, id, configuration and split of a dataset on the Hub.
    category: of rows that have no column for it. form: the prompt of a row, where it is more than a column.
    keep: which rows are of the set. tasks: categories that are told under one name.
    """

    name: str
    about: str
    count: int
    licence: str
    url: str = ""
    revision: str = ""
    sha256: str | None = None
    hub: tuple[str, str, str] | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    category: str = ""
    form: Callable[[Row], str] | None = None
    keep: Callable[[Row], bool] = lambda row: True
    tasks: Mapping[str, str] = field(default_factory=dict)

    @property
    def file(self) -> str:
        """The name of its file."""
        return self.url.rpartition("/")[2]


def _mbpp(row: Row) -> str:
    """The form of the paper (Austin et al. 2021, arXiv:2108.07732), without examples."""
    said, tests = row["text"], row["test_list"]
    if not isinstance(said, str) or not said.strip() or not isinstance(tests, list):
        raise TypeError("text is not a text, or test_list not a list")
    task, tests = f"You are an expert Python programmer, and here is your task: {said}", "\n".join(tests)
    return f"{task} Your code should pass these tests:\n\n{tests}\n"


_GITHUB = "https://raw.githubusercontent.com"
_SETS = (
    StandardSet(
        "spec-bench",
        "Spec-Bench (Xia et al. 2024): 80 prompts each of six tasks; those of MT-bench are one, mt_bench",
        480,
        "Apache-2.0",
        f"{_GITHUB}/hemingkx/Spec-Bench/fd2c1cd7d2201ef71db4c5f4e455008f017967bf/data/spec_bench/question.jsonl",
        "fd2c1cd7d2201ef71db4c5f4e455008f017967bf",
        "4b6d33e79484f9841c487ee87d1cf6aa8c6066f61d5d482ff09e5a007fafdf04",
        tasks=dict.fromkeys(MT_BENCH, "mt_bench"),
    ),
    StandardSet(
        "mt-bench",
        "MT-bench (Zheng et al. 2023): 80 conversations of two turns in eight categories",
        80,
        "Apache-2.0",
        f"{_GITHUB}/lm-sys/FastChat/0e6d3e4beaab66f4d3f93db72541a4abab8af28d/fastchat/llm_judge/data/mt_bench/question.jsonl",
        "0e6d3e4beaab66f4d3f93db72541a4abab8af28d",
        "119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7",
    ),
    StandardSet(
        "gsm8k",
        "GSM8K (Cobbe et al. 2021): the test split, the question alone",
        1319,
        "MIT",
        f"{_GITHUB}/openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data/test.jsonl",
        "3101c7d5072418e28b9008a6636bde82a006892c",
        "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
        columns={"prompt": "question"},
        category="math_reasoning",
    ),
    StandardSet(
        "humaneval",
        "HumanEval (Chen et al. 2021): the head of a function and its docstring",
        164,
        "MIT",
        f"{_GITHUB}/openai/human-eval/6d43fb980f9fee3c892a914eda09951f772ad10d/data/HumanEval.jsonl.gz",
        "6d43fb980f9fee3c892a914eda09951f772ad10d",
        "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef",
        columns={"prompt": "prompt", "id": "task_id"},
        category="coding",
    ),
    StandardSet(
        "mbpp",
        "MBPP (Austin et al. 2021): tasks 11 to 510, with their tests",
        500,
        "CC-BY-4.0",
        f"{_GITHUB}/google-research/google-research/2251e8c67a7fe7d6348714967ee101080b28e956/mbpp/mbpp.jsonl",
        "2251e8c67a7fe7d6348714967ee101080b28e956",
        columns={"id": "task_id"},
        category="coding",
        form=_mbpp,
        keep=lambda row: 11 <= int(row["task_id"]) <= 510,
    ),
    StandardSet(
        "math-500",
        "MATH-500 (Hendrycks et al. 2021, Lightman et al. 2023): 500 problems by subject",
        500,
        "MIT",
        "https://huggingface.co/datasets/HuggingFaceH4/MATH-500/resolve/main/test.jsonl",
        "main",
        columns={"prompt": "problem", "id": "unique_id", "category": "subject"},
    ),
    StandardSet(
        "speed-bench",
        "SPEED-Bench (NVIDIA), configuration qualitative: 80 prompts each of eleven categories",
        880,
        "NVIDIA Evaluation Dataset License",
        hub=("nvidia/SPEED-Bench", "qualitative", "test"),
        revision="main",
        columns={"prompt": "turns", "id": "question_id", "category": "category"},
        keep=lambda row: not any(SPEED_BENCH_PLACEHOLDER in str(turn) for turn in row["turns"]),
    ),
    StandardSet(
        "alpaca",
        "Alpaca (Taori et al. 2023): instruction with its input",
        52002,
        "CC-BY-NC-4.0",
        f"{_GITHUB}/tatsu-lab/stanford_alpaca/761dc5bfbdeeffa89b8bff5d038781a4055f796a/alpaca_data.json",
        "761dc5bfbdeeffa89b8bff5d038781a4055f796a",
        category="instruction",
    ),
)
STANDARD_SETS: Mapping[str, StandardSet] = {each.name: each for each in _SETS}
