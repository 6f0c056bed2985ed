"""Simulated models behind real workers beside the formulas: the table, its figure, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from specsplit.cli.main import main
from specsplit.decoding.theory import expected_tokens
from specsplit.decoding.tree_plan import tpot_ms
from specsplit.experiment import theory_check
from specsplit.experiment.transport import bare_round_trip_ms
from specsplit.settings.measure import SimulationSettings


@pytest.mark.slow
def test_the_table_and_its_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, figure = tmp_path / "tables" / "check.csv", tmp_path / "check.png"
    settings = ["--gamma", "2", "auto", "--rtt-ms", "0", "6", "--tokens", "24", "--texts", "1"]
    times = ["--draft-ms", "1", "--verify-ms", "8"]
    main(["theory-check", "--output", str(output), "--figure", str(figure), *settings, *times])
    rows = pd.read_csv(output)
    every = [("sync", "0"), *((mode, gamma) for mode in ("sync", "overlap", "lookahead") for gamma in ("2", "auto"))]
    assert [(r.rtt_ms, r.mode, r.gamma) for r in rows.itertuples()] == [
        (rtt, *point) for rtt in (0, 6) for point in every
    ]
    assert rows["lossless"].all()
    fixed, auto = rows[rows["gamma"] != "auto"], rows[rows["gamma"] == "auto"]
    assert auto[["formula_ms", "expected_ms", "limit_ms", "ratio"]].isna().all(axis=None)
    for row in fixed.itertuples():
        gamma = int(row.gamma)
        assert row.formula_ms == pytest.approx(tpot_ms(row.mode, gamma, 0.8, 1, 8, row.rtt_ms, 16))
        assert row.expected_ms * row.tokens_per_round == pytest.approx(row.formula_ms * expected_tokens(0.8, gamma))
        assert row.ratio == pytest.approx(row.tpot_ms / row.expected_ms)
        assert row.tpot_ms > 8 / (gamma + 1)  # no pass takes less than it was told to
        assert row.expected_ms < row.limit_ms < row.expected_ms + 50
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert figure.with_suffix(".svg").stat().st_size > 1000
    assert capsys.readouterr().out.splitlines()[-3:] == [str(output), str(figure), str(figure.with_suffix(".svg"))]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--acceptance", "1"], "--acceptance = '1': Input should be less than 1"),
        (["--draft-ms", "0"], "--draft-ms = '0': Input should be greater than 0"),
        (["--fan-out", "0"], "--fan-out = '0': Input should be greater than or equal to 1"),
        (["--rtt-ms", "-1"], "--rtt-ms = ['-1']: Input should be greater than or equal to 0"),
        (["--gamma", "x"], "--gamma = ['x']: Input should be a valid integer"),
        (["--gamma", "0"], "--gamma = ['0']: Input should be greater than or equal to 1"),
        (["--verify-ms", "inf"], "--verify-ms = 'inf': Input should be a finite number"),
        (["--figure", "a.pdf"], "--figure: a.pdf: a path that ends in .png"),
    ],
)
def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["theory-check", "--output", str(tmp_path / "check.csv"), *flags])
    assert message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_a_bare_round_trip_takes_time_and_leaves_no_process() -> None:
    assert 0 < bare_round_trip_ms(1.0, repeats=5) < 1000


@pytest.mark.slow
def test_a_text_that_is_not_the_targets_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(theory_check, "bare_round_trip_ms", lambda pause_ms: 0.1)
    written = theory_check.TextWriter.write

    def wrong(self: object, prompt: list[int], config: object, **kwargs: object) -> object:
        result = written(self, prompt, config, **kwargs)  # type: ignore[arg-type]
        result.output_tokens[-1] += config.gamma != 0  # type: ignore[attr-defined]
        return result

    monkeypatch.setattr(theory_check.TextWriter, "write", wrong)
    settings = SimulationSettings(draft_ms=0.5, verify_ms=1.0, tokens=20, texts=1, gamma=[2], rtt_ms=[0.0])
    rows = list(theory_check.check_theory(settings))
    assert [row.lossless for row in rows] == [True, False, False, False]
