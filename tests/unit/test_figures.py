"""The figures as a reader gets them: texts and marks of the SVG, pixels of the PNG, the same bytes again."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import matplotlib.image
import numpy as np
import pandas as pd
import pytest

from specsplit.analysis import figures
from specsplit.analysis.captions import FIGURES
from specsplit.analysis.curves import left_out, split_curves
from specsplit.analysis.figures import draw_figures
from specsplit.analysis.tables import summarize
from specsplit.errors import UserError
from specsplit.experiment.columns import REQUEST_COLUMNS, ROUND_COLUMNS, RequestRecord, RoundRecord
from specsplit.settings.axes import CONFIGURATION

SVG = "{http://www.w3.org/2000/svg}"
QUICK = {"bootstrap_samples": 200}


def experiment(
    gammas: Sequence[int | str], requests: int, tokens: int = 40, axes: Sequence[dict[str, Any]] = ({},)
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A simulated sweep: 50 ms a target pass, 8 ms a drafted token, requests that differ in acceptance.

    axes: what the other axes are; each is run at every gamma, gamma 0 only where mode and tree are not named.
    """
    rng = np.random.default_rng(0)
    rows, rounds = [], []
    for label, axis in [(g, a) for a in axes for g in gammas if g != 0 or not {"mode", "tree", "draft"} & a.keys()]:
        gamma = 4 if label == "auto" else int(label)
        mode, rtt = axis.get("mode", "sync"), axis.get("rtt_ms", 0.0)
        hidden = {"sync": 0.0, "overlap": 0.4, "lookahead": 0.8}[mode] if gamma else 0.0
        for i in range(requests):
            name, alpha = f"r{i}", 0.5 + 0.4 * i / max(1, requests - 1)
            alpha -= 0.2 * axis.get("temperature", 0.0)
            own: list[RoundRecord] = []
            made = 1
            while made < tokens:
                accepted = int(np.cumprod(rng.random(gamma) < alpha).sum())
                own.append(RoundRecord(name, label, len(own), gamma, accepted, gamma, 8.0, 7.0, 0, 50, 49, 0, 2))
                made += accepted + 1
            decode = sum(50.0 + (1 - hidden) * (8.0 * gamma + rtt) + rng.normal() for _ in own)
            ahead = max(0, len(own) - 1) if hidden else 0
            hits = int((alpha**gamma if mode == "overlap" else 0.85) * ahead)
            latency = 120.0 + i + decode
            total = sum(round_.accepted for round_ in own)
            rows.append(
                RequestRecord(
                    request_id=name,
                    gamma=label,
                    prompt_length=20,
                    generated_tokens=made,
                    ttft_ms=120.0 + i,
                    tpot_ms=decode / (made - 1) if made > 1 else None,
                    itl_ms=decode / (made - 1) if made > 1 else None,
                    average_acceptance_rate=total / (gamma * len(own)) if gamma and own else None,
                    total_network_idle_ms=2.0 * len(own),
                    total_latency_ms=latency,
                    num_rounds=len(own),
                    category="chat",
                    finish_reason="length",
                    drafted_tokens=gamma * len(own),
                    accepted_tokens=total,
                    mean_accepted_length=made / len(own) if own else None,
                    network_idle_fraction=2.0 * len(own) / latency,
                    draft_compute_ms=0.0,
                    target_compute_ms=0.0,
                    mode=mode,
                    tree=axis.get("tree", "chain"),
                    draft=axis.get("draft", "draft"),
                    sampling="coupled",
                    temperature=axis.get("temperature", 0.0),
                    top_k=0,
                    top_p=1.0,
                    rtt_ms=rtt,
                    jitter_ms=0.0,
                    seed=0,
                    speculation_hits=hits,
                    speculation_misses=ahead - hits,
                    output_sha256=name,
                )
            )
            settings = {column: getattr(rows[-1], column) for column in CONFIGURATION[1:]}
            rounds += [asdict(round_) | settings for round_ in own]
    table = pd.DataFrame([asdict(row) for row in rows], columns=REQUEST_COLUMNS)
    empty = ["tpot_ms", "itl_ms", "ttft_ms", "average_acceptance_rate", "mean_accepted_length"]
    table[empty] = table[empty].astype(float)
    table["matches_gamma0"] = pd.array([True] * len(table), dtype="boolean")
    return table, pd.DataFrame(rounds, columns=[*ROUND_COLUMNS, *CONFIGURATION[1:]])


def texts(path: Path) -> list[str]:
    """Every line of text in an SVG, in drawing order."""
    return ["".join(node.itertext()).strip() for node in ElementTree.parse(path).iter(f"{SVG}text")]


def axis_labels(path: Path, axes: int = 1) -> list[str]:
    """The labels on the x ticks of panel number `axes`."""
    for group in ElementTree.parse(path).iter(f"{SVG}g"):
        if group.get("id") == f"matplotlib.axis_{2 * axes - 1}":
            ticks = [tick for tick in group if (tick.get("id") or "").startswith("xtick")]
            return ["".join(tick.itertext()).strip() for tick in ticks]
    raise AssertionError(f"{path} has no panel {axes}")


@pytest.fixture(scope="module")
def sweep() -> tuple[pd.DataFrame, pd.DataFrame]:
    return experiment((0, 1, 3, 5, 8, 12), requests=8)


@pytest.fixture(scope="module")
def written(sweep, tmp_path_factory) -> list[Path]:
    """What draw_figures says that it wrote."""
    return draw_figures(*sweep, tmp_path_factory.mktemp("figures") / "new/figures", **QUICK)


@pytest.fixture(scope="module")
def drawn(written) -> Path:
    return written[0].parent


def draw_some(
    names: Sequence[str], experiment: tuple[pd.DataFrame, pd.DataFrame], folder: Path, **settings: Any
) -> None:
    """Only the figures that a test looks at, as draw_figures draws them: all of them take seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "FIGURES", {name: FIGURES[name] for name in names})
        patch.setattr(figures, "summarize_by_category", lambda *_, **__: None)
        patch.setattr(figures, "draw_by_category", lambda *_: [])
        paths = draw_figures(*experiment, folder, **QUICK, **settings)
    assert {path.stem for path in paths} == set(names)


def test_every_figure_is_written_in_both_formats(written, drawn):
    names = [*FIGURES, "summary_by_category"]
    assert written == [drawn / f"{name}.{suffix}" for name in names for suffix in ("png", "svg")]
    assert sorted(drawn.iterdir()) == sorted(written)
    assert list(FIGURES) == ["tpot", "acceptance_rate", "ttft", "network_idle", "speculation"]


def test_figures_are_one_column_wide_at_200_dpi(drawn):
    for name in FIGURES:
        height, width, _ = matplotlib.image.imread(drawn / f"{name}.png").shape
        assert width == 680
        assert height == (920 if name == "acceptance_rate" else 520)


@pytest.mark.parametrize("name", FIGURES)
def test_nothing_touches_the_edge_of_the_picture(drawn, name):
    pixels = matplotlib.image.imread(drawn / f"{name}.png")[..., :3]
    edges = [pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:]]
    assert all((edge == 1.0).all() for edge in edges)
    assert (pixels < 0.5).any()


@pytest.mark.parametrize("name", FIGURES)
def test_text_is_text_of_at_least_seven_points(drawn, name):
    svg = (drawn / f"{name}.svg").read_text(encoding="utf-8")
    sizes = [float(size) for size in re.findall(r"font-size: ([\d.]+)px", svg)]
    assert len(sizes) > 7
    assert min(sizes) >= 7


def test_same_data_give_the_same_bytes_whatever_the_readers_settings(sweep, drawn, tmp_path):
    with matplotlib.rc_context({"font.size": 20, "savefig.dpi": 50, "axes.grid": True}):
        draw_some(["tpot", "acceptance_rate"], sweep, tmp_path)
        assert matplotlib.rcParams["font.size"] == 20
    for path in sorted(tmp_path.iterdir()):
        assert path.read_bytes() == (drawn / path.name).read_bytes()
    assert "<dc:date>" not in (drawn / "tpot.svg").read_text(encoding="utf-8")


def test_pyplot_and_its_global_state_are_not_loaded():
    code = "import sys, specsplit.analysis.figures; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_ticks_are_the_measured_gammas(drawn):
    assert axis_labels(drawn / "tpot.svg") == ["0", "1", "3", "5", "8", "12"]
    assert axis_labels(drawn / "acceptance_rate.svg") == ["1", "3", "5", "8", "12"]


def test_crowded_ticks_keep_their_marks_but_not_every_label(tmp_path):
    draw_some(["ttft"], experiment((0, 1, 2, 3, 4, 64), requests=2), tmp_path)
    labels = axis_labels(tmp_path / "ttft.svg")
    assert len(labels) == 6
    assert [label for label in labels if label] == ["0", "3", "64"]


def test_axes_have_units_and_start_at_zero(drawn):
    for name, label in (
        ("tpot", "ITL (ms)"),
        ("ttft", "TTFT (ms)"),
        ("network_idle", "share of total latency"),
        ("acceptance_rate", "accepted / drafted"),
    ):
        found = texts(drawn / f"{name}.svg")
        assert label in found
        assert "draft length γ (tokens)" in found
        heights = [text for text in found if re.fullmatch(r"0(\.0+)?", text)]
        assert heights, f"{name}: no zero on the axis"


def test_every_request_is_a_dot(sweep, drawn):
    root = ElementTree.parse(drawn / "tpot.svg")
    dots = [group for group in root.iter(f"{SVG}g") if (group.get("id") or "").startswith("PathCollection")]
    uses = [len(list(group.iter(f"{SVG}use"))) for group in dots]
    assert max(uses) == len(sweep[0])


def test_reference_and_best_gamma_are_those_of_the_summary(sweep, drawn):
    summary = summarize(*sweep, bootstrap_samples=10).set_index("gamma")["itl_ms_mean"]
    found = texts(drawn / "tpot.svg")
    assert f"target alone: {summary[0]:.1f} ms" in found
    assert f"lowest: γ = {summary.idxmin()}, {summary.min():.1f} ms" in found
    assert 0 < summary.idxmin() < 12  # the simulation has its best gamma inside the sweep
    assert any(text.startswith("target alone: 1") for text in texts(drawn / "ttft.svg"))
    assert not any(text.startswith("target alone") for text in texts(drawn / "network_idle.svg"))


def test_number_of_requests_and_confidence_are_said(sweep, drawn, tmp_path):
    assert "n = 8 requests at each γ" in texts(drawn / "tpot.svg")
    assert "mean, 95 % interval" in texts(drawn / "tpot.svg")
    requests, rounds = sweep
    requests = requests.copy()
    requests.loc[(requests["gamma"] == 5) & (requests["request_id"] == "r0"), "itl_ms"] = np.nan
    draw_some(["tpot"], (requests, rounds), tmp_path, confidence=0.995)
    assert "n = 7 requests at each γ" in texts(tmp_path / "tpot.svg")
    assert "mean, 99.5 % interval" in texts(tmp_path / "tpot.svg")


def test_acceptance_by_position_is_that_of_the_largest_gamma(sweep, drawn):
    found = texts(drawn / "acceptance_rate.svg")
    assert "By position, γ = 12" in found
    rounds = sweep[1]
    assert f"n = {(rounds['gamma'] == 12).sum()} rounds" in found
    assert axis_labels(drawn / "acceptance_rate.svg", axes=2)[:3] == ["1", "2", "3"]


def test_position_with_too_few_rounds_is_marked(tmp_path):
    requests, rounds = experiment((3,), requests=6)
    rounds["accepted"] = 1
    rounds.loc[rounds["request_id"] == "r0", "accepted"] = 3  # only this request reaches position 3
    draw_some(["acceptance_rate"], (requests, rounds), tmp_path)
    assert "too few for an interval" in texts(tmp_path / "acceptance_rate.svg")


def test_single_request_has_no_interval(tmp_path):
    names = ["tpot", "acceptance_rate"]
    draw_some(names, experiment((0, 2, 4), requests=1), tmp_path)
    for name in names:
        found = texts(tmp_path / f"{name}.svg")
        assert "mean, no interval" in found
        assert "n = 1 request at each γ" in found


def test_single_gamma_has_neither_reference_nor_best(tmp_path):
    draw_some(["tpot"], experiment((5,), requests=3), tmp_path)
    found = texts(tmp_path / "tpot.svg")
    assert axis_labels(tmp_path / "tpot.svg") == ["5"]
    assert not [text for text in found if text.startswith(("target alone", "lowest"))]
    assert "n = 3 requests" in found


def test_gamma_0_alone_says_that_nothing_was_drafted(tmp_path):
    draw_some(["acceptance_rate"], experiment((0,), requests=3), tmp_path)
    found = " ".join(texts(tmp_path / "acceptance_rate.svg"))
    assert found.count("Nothing was drafted") == 2


def test_metric_without_a_value_says_why(tmp_path):
    draw_some(["tpot", "ttft", "network_idle"], experiment((0, 4), requests=3, tokens=1), tmp_path)
    assert "No request has two rounds" in " ".join(texts(tmp_path / "tpot.svg"))
    assert axis_labels(tmp_path / "tpot.svg") == ["0", "4"]
    assert "n = 3 requests at each γ" in texts(tmp_path / "ttft.svg")
    assert "0.0" in texts(tmp_path / "network_idle.svg")  # all zero is a value, not a missing one


def test_impossible_settings_write_nothing(sweep, tmp_path):
    with pytest.raises(UserError, match="confidence is 95"):
        draw_figures(*sweep, tmp_path, confidence=95)
    assert list(tmp_path.iterdir()) == []


# More axes than gamma

MODES = [{}, {"mode": "overlap"}, {"mode": "lookahead"}]


@pytest.fixture(scope="module")
def modes(tmp_path_factory) -> tuple[pd.DataFrame, Path]:
    """The summary of a sweep over modes, and its figures."""
    data = experiment((0, 1, 3, "auto"), requests=3, axes=MODES)
    folder = tmp_path_factory.mktemp("modes")
    draw_some(["tpot", "speculation"], data, folder)
    return summarize(*data, bootstrap_samples=10), folder


def test_each_mode_is_a_curve_that_looks_different_without_colour(modes):
    summary, folder = modes
    found = texts(folder / "tpot.svg")
    assert {"sync", "overlap", "lookahead"} <= set(found)
    assert "mean, 95 % interval" in found
    assert "one request" not in found  # dots of several curves would hide each other
    curves = split_curves(summary)
    assert len({(curve.marker, str(curve.line)) for curve in curves}) == 3
    assert len({curve.colour for curve in curves}) == 3


def test_modes_and_trees_are_told_apart_by_line_and_marker():
    axes = [
        {"mode": mode, "tree": tree} for mode in ("sync", "overlap", "lookahead") for tree in ("chain", "3x2", "2x2")
    ]
    curves = split_curves(summarize(*experiment((1,), requests=2, axes=axes), bootstrap_samples=10))
    assert [curve.name for curve in curves][:4] == ["sync, chain", "sync, 2x2", "sync, 3x2", "overlap, chain"]
    assert len({(curve.marker, str(curve.line), curve.hollow) for curve in curves}) == 9


def test_lowest_mean_names_its_curve_and_gamma(modes):
    summary, folder = modes
    best = summary.loc[summary["itl_ms_mean"].idxmin()]
    text = f"lowest: {best['mode']}, γ = {best['gamma']}, {best['itl_ms_mean']:.1f} ms"
    assert text in texts(folder / "tpot.svg")


def test_a_single_curve_that_is_not_plain_says_what_it_is(tmp_path):
    alone, drafted = experiment((0,), requests=6), experiment((1, 3), requests=6, axes=MODES[1:2])
    requests, rounds = (pd.concat(pair, ignore_index=True) for pair in zip(alone, drafted, strict=True))
    draw_some(["tpot"], (requests, rounds), tmp_path)
    found = texts(tmp_path / "tpot.svg")
    assert "overlap: mean, 95 % interval" in found
    assert axis_labels(tmp_path / "tpot.svg") == ["0", "1", "3"]


def test_auto_stands_right_of_the_numbers_and_not_on_the_line(tmp_path):
    draw_some(["tpot", "acceptance_rate"], experiment((0, 3, 5, "auto"), requests=3), tmp_path)
    assert axis_labels(tmp_path / "tpot.svg") == ["0", "3", "5", "auto"]
    assert "By position, γ = 5" in texts(tmp_path / "acceptance_rate.svg")


@pytest.mark.filterwarnings("error")
def test_auto_alone_is_drawn(tmp_path):
    draw_some(["tpot", "acceptance_rate"], experiment((0, "auto"), requests=3), tmp_path)
    assert axis_labels(tmp_path / "acceptance_rate.svg") == ["auto"]
    assert "By position, γ = auto" in texts(tmp_path / "acceptance_rate.svg")


def test_each_temperature_and_network_is_a_panel_on_the_same_scale(tmp_path):
    axes = [{**mode, "temperature": t, "rtt_ms": rtt} for t in (0.0, 0.7) for rtt in (0.0, 14.0) for mode in MODES]
    draw_some(["tpot", "acceptance_rate"], experiment((0, 1, 3), requests=3, axes=axes), tmp_path)
    found = texts(tmp_path / "tpot.svg")
    titles = [f"temperature {t}, RTT {rtt} ms" for t in ("0", "0.7") for rtt in ("0", "14")]
    assert [text for text in found if text.startswith("temperature")] == titles
    assert found.count("ITL (ms)") == 2  # the left column
    assert found.count("lookahead") == 1  # one legend
    assert "Time between tokens, n = 3 requests at each point" in found
    assert [text for text in texts(tmp_path / "acceptance_rate.svg") if ", γ = 3" in text] == [
        f"{title}, γ = 3" for title in titles
    ]


def test_only_what_varies_is_in_the_title_of_a_panel(tmp_path):
    draw_some(["ttft"], experiment((0, 1), requests=2, axes=[{"rtt_ms": rtt} for rtt in (0.0, 50.0)]), tmp_path)
    assert [text for text in texts(tmp_path / "ttft.svg") if "RTT" in text] == ["RTT 0 ms", "RTT 50 ms"]


def test_drafts_are_curves_by_name():
    axes = [{}, {"draft": "int8"}, {"draft": "lookup", "tree": "3x2"}]
    curves = split_curves(summarize(*experiment((0, 1), requests=2, axes=axes), bootstrap_samples=10))
    assert [curve.name for curve in curves] == ["draft, chain", "int8, chain", "lookup, 3x2"]
    assert len({curve.colour for curve in curves}) == len({curve.marker for curve in curves}) == 3


def test_what_does_not_fit_is_said(tmp_path):
    networks = [{"rtt_ms": float(i)} for i in range(7)]
    draw_some(["tpot"], experiment((1,), requests=2, tokens=8, axes=networks), tmp_path)
    assert "6 of 7 panels shown; all are in summary.csv" in texts(tmp_path / "tpot.svg")
    axes = [{"tree": f"{i}x{mode}", "mode": "overlap"} for i in range(1, 5) for mode in (2, 3)]
    summary = summarize(*experiment((1,), requests=2, tokens=8, axes=axes), bootstrap_samples=10)
    assert left_out([], summary, split_curves(summary)) == "6 of 8 curves shown; all are in summary.csv"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("gammas", [(0, 1, 3, 5), (0, "auto")])
def test_nothing_touches_the_edge_of_a_crowded_picture(tmp_path, gammas):
    names = ["tpot", "acceptance_rate"]  # the most text, and two panels
    trees = ("chain", "3x2", "dynamic-16x4")
    axes = [{}, *({"mode": mode, "tree": tree} for mode in ("overlap", "lookahead") for tree in trees)]
    draw_some(names, experiment(gammas, requests=3, axes=axes), tmp_path)
    for name in names:
        pixels = matplotlib.image.imread(tmp_path / f"{name}.png")[..., :3]
        assert all((edge == 1.0).all() for edge in (pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:])), name


def test_a_long_name_of_a_draft_fits_into_the_legend(tmp_path):
    draw_some(["tpot"], experiment((0, 2), requests=2, axes=[{}, {"draft": "a-draft-lookup2"}]), tmp_path)
    pixels = matplotlib.image.imread(tmp_path / "tpot.png")[..., :3]
    assert all((edge == 1.0).all() for edge in (pixels[:, :2], pixels[:, -2:]))


def test_hit_rates_are_those_of_the_modes_that_draft_ahead(modes):
    folder = modes[1]
    found = texts(folder / "speculation.svg")
    assert "hits / (hits + misses)" in found
    assert {"overlap", "lookahead"} <= set(found)
    assert "sync" not in found
    assert axis_labels(folder / "speculation.svg") == ["1", "3", "auto"]


def test_synchronous_sweep_has_no_hit_rate_and_says_so(drawn):
    assert "only the modes overlap and lookahead" in " ".join(texts(drawn / "speculation.svg"))
