"""The points of a sweep: which there are, what their folders are called, what their runs are told."""

from __future__ import annotations

import re
from itertools import product
from typing import Any

import pytest

from specsplit.experiment.sweep import SHARED_DEFAULTS, Point, sweep_points
from specsplit.settings.run import OrchestratorConfig

STATES = {"hidden_states_form": "int8", "hidden_states_project": "target", "hidden_states_window": 64}
SHARED = {"fan_out": 3, "top_k": 50, "top_p": 0.9, "sampling": "rejection", "jitter_ms": 2, **STATES}


@pytest.mark.parametrize(
    ("point", "label"),
    [
        (Point(5), "gamma_5"),
        (Point("auto"), "gamma_auto"),
        (Point(5, mode="overlap"), "overlap_gamma_5"),
        (Point(0, temperature=0.7), "t0.7_gamma_0"),
        (Point(5, tree="dynamic-16x4", rtt_ms=0.5), "dynamic-16x4_rtt0.5_gamma_5"),
        (Point("auto", "lookahead", "3x2", 0.7, 14.0), "lookahead_3x2_t0.7_rtt14_gamma_auto"),
        (Point(5, rtt_ms=14.0, bandwidth_mbit=2.5), "rtt14_mbit2.5_gamma_5"),
    ],
)
def test_a_label_names_the_axes_that_are_not_at_their_default(point: Point, label: str) -> None:
    assert point.label == label


def test_labels_are_different_folder_names() -> None:
    points = sweep_points(
        [0, 1, 10, "auto"],
        ["sync", "overlap", "lookahead"],
        ["chain", "3x2", "dynamic-16x4"],
        [0, 0.1234567, 0.12345678, 1e-7],
        [0, 1 / 3, 1000000.5],
        bandwidths_mbit=[0, 1e-3, 100],
    )
    labels = [point.label for point in points]
    assert len(set(labels)) == len(points)
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", label) for label in labels)


def test_a_plain_sweep_is_one_point_a_gamma() -> None:
    assert sweep_points(["auto", 3, 0, 1, 3]) == [Point(0), Point(1), Point(3), Point("auto")]


def test_gamma_0_is_one_point_a_temperature_and_network() -> None:
    points = sweep_points([0, 5], ["overlap", "lookahead"], ["3x2", "chain"], [0, 0.7], [0, 14], bandwidths_mbit=[0, 9])
    alone = [(point.temperature, point.rtt_ms, point.bandwidth_mbit) for point in points if point.gamma == 0]
    assert alone == list(product((0.0, 0.7), (0.0, 14.0), (0.0, 9.0)))
    assert len(points) == 8 + 8 * 2 * 2
    assert points[0] == Point(0)  # what the others are compared with comes first


def test_a_new_value_on_an_axis_leaves_the_points_there_are() -> None:
    before = sweep_points([0, 1, 5])
    after = sweep_points([0, 1, 5, "auto"], ["sync", "lookahead"], ["chain", "3x2"], [0, 1], [0, 50])
    assert set(before) < set(after)


def test_integers_and_floats_of_one_value_are_one_point() -> None:
    whole, broken = Point(1, temperature=1.0, rtt_ms=14.0), sweep_points([1], temperatures=[1], rtts_ms=[14])[0]
    assert (broken, broken.label) == (whole, "t1_rtt14_gamma_1")
    assert type(broken.settings({**SHARED, "top_p": 1})["top_p"]) is float


@pytest.mark.parametrize(
    ("point", "changed"),
    [
        (Point(5), {"jitter_ms", *STATES}),
        (Point(5, mode="overlap"), {"jitter_ms", *STATES}),
        (Point(5, mode="lookahead"), {"jitter_ms", "fan_out", *STATES}),
        (Point(0, temperature=0.7), {"jitter_ms", "top_k", "top_p", "sampling"}),
    ],
)
def test_settings_that_decide_nothing_stay_at_their_default(point: Point, changed: set[str]) -> None:
    settings = point.settings(SHARED)
    assert {key for key in SHARED if settings[key] != SHARED_DEFAULTS[key]} == changed
    assert all(settings[key] == SHARED[key] for key in changed)


@pytest.mark.parametrize("point", sweep_points([0, 3, "auto"], ["sync", "lookahead"], ["chain", "3x2"], [0, 1], [5]))
def test_settings_are_those_of_the_orchestrator(point: Point) -> None:
    config = OrchestratorConfig.load(point.settings(SHARED))
    given: dict[str, Any] = config.model_dump()
    assert (given["gamma"], given["mode"], given["tree"]) == (point.gamma, point.mode, point.tree)
    assert (given["temperature"], given["rtt_ms"]) == (point.temperature, point.rtt_ms)


def test_defaults_are_those_of_the_orchestrator() -> None:
    fields = OrchestratorConfig.model_fields
    assert {key: fields[key].default for key in SHARED_DEFAULTS} == SHARED_DEFAULTS
    plain = Point(1)
    for name in ("mode", "tree", "temperature", "rtt_ms", "bandwidth_mbit"):
        assert fields[name].default == getattr(plain, name)
    assert fields["draft_name"].default == plain.draft


def test_drafts_are_an_axis_that_gamma_0_does_not_have() -> None:
    points = sweep_points([0, 3], ["sync", "overlap"], drafts=["draft", "int8"])
    assert [point.label for point in points] == [
        "gamma_0",
        "gamma_3",
        "overlap_gamma_3",
        "draft-int8_gamma_3",
        "draft-int8_overlap_gamma_3",
    ]
    assert points[-1].settings(SHARED)["draft_name"] == "int8"
