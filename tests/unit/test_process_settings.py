"""Settings: flags before variables before defaults, and messages that say what to mend."""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest

import specsplit.settings
from specsplit.cli.flags import add_setting_flags, load_settings, setting_arguments
from specsplit.cli.main import Parser
from specsplit.decoding.tree import TreeShape
from specsplit.errors import UserError
from specsplit.settings import environment
from specsplit.settings.base import Settings
from specsplit.settings.environment import check_environment, known_variables
from specsplit.settings.run import AUTO_GAMMA_LIMIT, MAX_GAMMA, OrchestratorConfig, SweepSettings
from specsplit.settings.worker import DraftWorkerConfig, TargetWorkerConfig, WorkerSettings

ROLES: list[type[WorkerSettings]] = [DraftWorkerConfig, TargetWorkerConfig]
ALL: list[type[Settings]] = [DraftWorkerConfig, TargetWorkerConfig, OrchestratorConfig]


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SPECSPLIT_")]:
        monkeypatch.delenv(name)


def parsed(settings: type[Settings], *arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_setting_flags(parser, settings)
    return parser.parse_args(arguments)


def test_defaults() -> None:
    draft, target, loop = DraftWorkerConfig.load(), TargetWorkerConfig.load(), OrchestratorConfig.load()
    assert (draft.port, draft.dtype, target.port, target.dtype) == (50051, "auto", 50052, "float32")
    assert (loop.draft_address, loop.target_address) == ("127.0.0.1:50051", "127.0.0.1:50052")
    assert (loop.gamma, loop.tree, loop.max_rounds) == (5, "chain", None)
    assert (loop.mode, loop.rtt_ms, loop.jitter_ms) == ("sync", 0, 0)
    assert (loop.temperature, loop.top_k, loop.top_p, loop.sampling) == (0, 0, 1, "coupled")  # greedy


@pytest.mark.parametrize(
    ("settings", "variable", "text", "field", "value"),
    [
        (OrchestratorConfig, "SPECSPLIT_ORCH_MAX_DRAFT_TOKENS", "7", "gamma", 7),
        (OrchestratorConfig, "SPECSPLIT_ORCH_TARGET_ADDRESS", "gpu:1", "target_address", "gpu:1"),
        (OrchestratorConfig, "SPECSPLIT_ORCH_MAX_DRAFT_TOKENS", "auto", "gamma", "auto"),
        (OrchestratorConfig, "SPECSPLIT_ORCH_TREE", "2x2", "tree", "2x2"),
        (OrchestratorConfig, "SPECSPLIT_ORCH_TREE", "dynamic-16", "tree", "dynamic-16x4"),
        (OrchestratorConfig, "SPECSPLIT_ORCH_MODE", "lookahead", "mode", "lookahead"),
        (OrchestratorConfig, "SPECSPLIT_ORCH_SAMPLING", "rejection", "sampling", "rejection"),
        (OrchestratorConfig, "SPECSPLIT_ORCH_TEMPERATURE", "0.7", "temperature", 0.7),
        (OrchestratorConfig, "SPECSPLIT_ORCH_TOP_K", "40", "top_k", 40),
        (OrchestratorConfig, "SPECSPLIT_ORCH_TOP_P", "0.9", "top_p", 0.9),
        (OrchestratorConfig, "SPECSPLIT_ORCH_RTT_MS", "14", "rtt_ms", 14.0),
        (OrchestratorConfig, "SPECSPLIT_ORCH_STOP_TOKEN_IDS", "[]", "stop_token_ids", []),
        (OrchestratorConfig, "SPECSPLIT_ORCH_MAX_ROUNDS", "null", "max_rounds", None),
        (OrchestratorConfig, "SPECSPLIT_ORCH_USE_CHAT_TEMPLATE", "false", "use_chat_template", False),
        (OrchestratorConfig, "SPECSPLIT_ORCH_SEED", "", "seed", 0),  # empty is not set
        (DraftWorkerConfig, "SPECSPLIT_DRAFT_SKIP_LAYERS", "[13, 14]", "skip_layers", [13, 14]),
        (TargetWorkerConfig, "SPECSPLIT_TARGET_MODEL", "models/big", "model", Path("models/big")),
    ],
)
def test_the_environment_overrides_the_default(
    monkeypatch: pytest.MonkeyPatch, settings: type[Settings], variable: str, text: str, field: str, value: Any
) -> None:
    monkeypatch.setenv(variable, text)
    assert getattr(settings.load(), field) == value
    assert variable in settings.variables(field)


def test_a_flag_overrides_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECSPLIT_ORCH_MAX_DRAFT_TOKENS", "7")
    monkeypatch.setenv("SPECSPLIT_ORCH_IGNORE_EOS", "true")
    monkeypatch.setenv("SPECSPLIT_ORCH_TREE", "3")
    given = load_settings(OrchestratorConfig, parsed(OrchestratorConfig, "--gamma", "2", "--no-ignore-eos"))
    assert (given.gamma, given.ignore_eos, given.tree) == (2, False, "3")


def test_one_role_does_not_read_the_variables_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECSPLIT_DRAFT_PORT", "1234")
    assert DraftWorkerConfig.load().port == 1234
    assert TargetWorkerConfig.load().port == 50052


def test_the_shape_and_the_deepest_draft_that_settings_ask_for() -> None:
    given = OrchestratorConfig.load({"tree": "3x2", "gamma": "4"})
    assert (given.shape, given.gamma_limit) == (TreeShape((3, 2)), 4)
    automatic = OrchestratorConfig.load({"gamma": "auto"})
    assert (automatic.shape, automatic.gamma_limit) == (TreeShape(), AUTO_GAMMA_LIMIT)


# ---- mistakes


@pytest.mark.parametrize(
    ("settings", "variable", "text", "named"),
    [
        (OrchestratorConfig, "SPECSPLIT_ORCH_MAX_DRAFT_TOKENS", "many", "--gamma / SPECSPLIT_ORCH_MAX_DRAFT_TOKENS"),
        (OrchestratorConfig, "SPECSPLIT_ORCH_MAX_DRAFT_TOKENS", str(MAX_GAMMA + 1), f"equal to {MAX_GAMMA}"),
        (OrchestratorConfig, "SPECSPLIT_ORCH_MAX_OUTPUT_TOKENS", "0", "--max-output-tokens"),
        (OrchestratorConfig, "SPECSPLIT_ORCH_MAX_DRAFT_TOKENS", "many", "auto"),
        (OrchestratorConfig, "SPECSPLIT_ORCH_TREE", "2x9", "--tree / SPECSPLIT_ORCH_TREE = '2x9'"),
        (OrchestratorConfig, "SPECSPLIT_ORCH_TREE", "[2, 2]", "write chain, 3x2 (children per level, 1 to 8)"),
        (OrchestratorConfig, "SPECSPLIT_ORCH_TREE", "dynamic-1000", "1 to 256"),
        (OrchestratorConfig, "SPECSPLIT_ORCH_MODE", "async", "'sync', 'overlap' or 'lookahead'"),
        (OrchestratorConfig, "SPECSPLIT_ORCH_SAMPLING", "typical", "'coupled' or 'rejection'"),
        (OrchestratorConfig, "SPECSPLIT_ORCH_TEMPERATURE", "-1", "--temperature"),
        (OrchestratorConfig, "SPECSPLIT_ORCH_TEMPERATURE", "inf", "--temperature"),
        (OrchestratorConfig, "SPECSPLIT_ORCH_TOP_K", "-1", "--top-k"),
        (OrchestratorConfig, "SPECSPLIT_ORCH_TOP_P", "0", "greater than 0"),
        (OrchestratorConfig, "SPECSPLIT_ORCH_TOP_P", "1.1", "--top-p"),
        (OrchestratorConfig, "SPECSPLIT_ORCH_FAN_OUT", "0", "--fan-out"),
        (OrchestratorConfig, "SPECSPLIT_ORCH_RTT_MS", "-5", "--rtt-ms"),
        (OrchestratorConfig, "SPECSPLIT_ORCH_RTT_MS", "nan", "--rtt-ms"),
        (OrchestratorConfig, "SPECSPLIT_ORCH_JITTER_MS", "-5", "--jitter-ms"),
        (OrchestratorConfig, "SPECSPLIT_ORCH_BANDWIDTH_MBIT", "-5", "--bandwidth-mbit"),
        (OrchestratorConfig, "SPECSPLIT_ORCH_SEED", "-1", "--seed"),
        (OrchestratorConfig, "SPECSPLIT_ORCH_RPC_TIMEOUT_S", "nan", "SPECSPLIT_ORCH_RPC_TIMEOUT_S"),
        (DraftWorkerConfig, "SPECSPLIT_DRAFT_SKIP_LAYERS", "[13; 14]", "not JSON; write a list as [1, 2]"),
        (DraftWorkerConfig, "SPECSPLIT_DRAFT_PORT", "70000", "--port / SPECSPLIT_DRAFT_PORT = '70000'"),
        (TargetWorkerConfig, "SPECSPLIT_TARGET_DTYPE", "auto", "--dtype / SPECSPLIT_TARGET_DTYPE = 'auto'"),
        (TargetWorkerConfig, "SPECSPLIT_TARGET_DTYPE", "int4", "--dtype / SPECSPLIT_TARGET_DTYPE = 'int4'"),
        (TargetWorkerConfig, "SPECSPLIT_TARGET_THREADS", "0", "SPECSPLIT_TARGET_THREADS"),
    ],
)
def test_a_bad_value_names_its_variable(
    monkeypatch: pytest.MonkeyPatch, settings: type[Settings], variable: str, text: str, named: str
) -> None:
    monkeypatch.setenv(variable, text)
    with pytest.raises(UserError) as caught:
        settings.load()
    assert variable in str(caught.value)
    assert named in str(caught.value)


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(UserError) as caught:
        OrchestratorConfig.load({"gamma": -1, "draft_address": None, "max_rounds": "x"})
    lines = str(caught.value).splitlines()
    assert {line.split(" = ")[0] for line in lines} == {
        "--gamma / SPECSPLIT_ORCH_GAMMA",
        "--max-rounds / SPECSPLIT_ORCH_MAX_ROUNDS",
    }


def test_rejection_sampling_refuses_a_dynamic_tree() -> None:
    together = {"sampling": "rejection", "temperature": 1.0, "tree": "dynamic-16"}
    with pytest.raises(UserError, match="biases rejection sampling: use sampling coupled, or a chain or static tree"):
        OrchestratorConfig.load(together)
    for mend in ({"sampling": "coupled"}, {"tree": "3x2"}, {"tree": "chain"}, {"temperature": 0.0}):
        OrchestratorConfig.load({**together, **mend})


def test_an_unknown_setting_is_refused() -> None:
    with pytest.raises(UserError, match="--colour"):
        TargetWorkerConfig.load({"colour": "red"})


# ---- flags


@pytest.mark.parametrize("settings", ALL)
def test_every_field_has_the_flag_that_messages_name(settings: type[Settings]) -> None:
    parser = argparse.ArgumentParser()
    add_setting_flags(parser, settings)
    flags = {option for action in parser._actions for option in action.option_strings}
    assert {settings.flag(field) for field in settings.model_fields} <= flags


def test_some_fields_can_be_left_out() -> None:
    parser = argparse.ArgumentParser()
    add_setting_flags(parser, OrchestratorConfig, without=set(OrchestratorConfig.model_fields) - {"seed"})
    assert [action.dest for action in parser._actions] == ["help", "settings", "seed"]


@pytest.mark.parametrize("settings", ROLES)
def test_a_child_process_gets_these_very_settings(
    monkeypatch: pytest.MonkeyPatch, settings: type[WorkerSettings]
) -> None:
    values: dict[str, Any] = {"model": Path("models/x"), "threads": 3, "max_context": 99, "session_ttl_s": 2.5}
    if settings is DraftWorkerConfig:
        values["skip_layers"] = [1, 2]
    config = settings.load(values)
    arguments = setting_arguments(config, list(settings.model_fields))
    for field in ("max_context", "dtype", "port"):  # the child's environment may say something else
        monkeypatch.setenv(settings.variables(field)[0], "17" if field != "dtype" else "float16")
    assert load_settings(settings, parsed(settings, *arguments)) == config


def test_a_child_process_gets_an_empty_list(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = setting_arguments(DraftWorkerConfig.load({"skip_layers": []}), ["skip_layers"])
    monkeypatch.setenv("SPECSPLIT_DRAFT_SKIP_LAYERS", "[1]")
    assert load_settings(DraftWorkerConfig, parsed(DraftWorkerConfig, *arguments)).skip_layers == []


# ---- one setting, four places


def test_flag_before_variable_before_file_before_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text('{"run": {"gamma": 2, "tree": "2x2", "max_rounds": 9}, "draft": {"threads": 3}}')
    monkeypatch.setenv("SPECSPLIT_ORCH_GAMMA", "3")
    monkeypatch.setenv("SPECSPLIT_ORCH_TREE", "3")
    flags = ["--settings", str(file)]
    given = load_settings(OrchestratorConfig, parsed(OrchestratorConfig, *flags, "--gamma", "4"))
    assert (given.gamma, given.tree, given.max_rounds, given.mode) == (4, "3", 9, "sync")
    assert load_settings(OrchestratorConfig, parsed(OrchestratorConfig, *flags)).gamma == 3
    monkeypatch.delenv("SPECSPLIT_ORCH_GAMMA")
    assert load_settings(OrchestratorConfig, parsed(OrchestratorConfig, *flags)).gamma == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"run": {"gama": 2}}', "run.gama: unknown setting; did you mean gamma?"),
        ('{"rum": {}}', "rum: no such part; did you mean run?"),
        ('{"run": 3}', "run: wanted an object of settings"),
        ('{"run": {"rtt_ms": NaN}}', "JSON has no NaN"),
        ('{"run": {"gamma": 65}}', "--gamma"),
    ],
)
def test_a_mistake_in_a_file_of_settings_is_named(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "run.json"
    file.write_text(content)
    with pytest.raises(UserError, match=re.escape(message)):
        load_settings(OrchestratorConfig, parsed(OrchestratorConfig, "--settings", str(file)))


def test_both_variables_of_gamma_mean_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECSPLIT_ORCH_GAMMA", "7")
    assert OrchestratorConfig.load().gamma == 7
    monkeypatch.setenv("SPECSPLIT_ORCH_MAX_DRAFT_TOKENS", "7")
    assert OrchestratorConfig.load().gamma == 7
    monkeypatch.setenv("SPECSPLIT_ORCH_MAX_DRAFT_TOKENS", "8")
    with pytest.raises(UserError, match="two values of one setting"):
        OrchestratorConfig.load()


@pytest.mark.parametrize("given", [["1", "3", "auto"], ["1,3,auto"], ["1,3", "auto"]])
def test_several_values_are_given_with_spaces_or_commas(given: list[str]) -> None:
    arguments = parsed(SweepSettings, "--gamma", *given)
    assert load_settings(SweepSettings, arguments).gamma == [1, 3, "auto"]


def test_several_values_where_one_is_wanted_say_who_takes_several() -> None:
    with pytest.raises(UserError, match=r"one value here; `specsplit bench` takes several: --gamma 1 3 5"):
        OrchestratorConfig.load({"gamma": "1,3,5"})


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("SPECSPLIT_ORCH_GAMA", "SPECSPLIT_ORCH_GAMMA"),
        ("SPECSPLIT_DRAFT_THREAD", "SPECSPLIT_DRAFT_THREADS"),
        ("SPECSPLIT_TARGET_MODLE", "SPECSPLIT_TARGET_MODEL"),
        ("SPECSPLIT_TOKENS", "SPECSPLIT_TOKEN"),
    ],
)
def test_a_misspelt_variable_is_refused_with_the_right_one(
    monkeypatch: pytest.MonkeyPatch, wrong: str, right: str
) -> None:
    check_environment()
    monkeypatch.setenv(wrong, "1")
    with pytest.raises(UserError, match=f"{wrong}: no such variable; did you mean {right}"):
        check_environment()


def test_every_variable_that_the_code_names_is_known() -> None:
    source = Path(environment.__file__).parents[1]
    named = {name for file in source.rglob("*.py") for name in re.findall(r"SPECSPLIT_[A-Z_]*[A-Z]", file.read_text())}
    known = environment.known_variables()
    assert not {name for name in named - known if not any(other.startswith(f"{name}_") for other in known)}


def test_a_workflow_refuses_variables_that_would_change_its_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECSPLIT_ORCH_TARGET_ADDRESS", "gpu:1")
    environment.refuse_overrides()
    monkeypatch.setenv("SPECSPLIT_ORCH_MAX_OUTPUT_TOKENS", "8")
    with pytest.raises(UserError, match="SPECSPLIT_ORCH_MAX_OUTPUT_TOKENS: would change results"):
        environment.refuse_overrides()


def test_a_misspelt_flag_gets_the_right_one(capsys: pytest.CaptureFixture[str]) -> None:
    parser = Parser(prog="specsplit")
    add_setting_flags(parser, OrchestratorConfig)
    with pytest.raises(SystemExit):
        parser.parse_args(["--gama", "3"])
    assert "did you mean --gamma instead of --gama?" in capsys.readouterr().err
    with pytest.raises(SystemExit):  # no abbreviations
        parser.parse_args(["--max-out", "3"])


def test_every_variable_of_every_class_of_settings_is_known() -> None:
    for module in pkgutil.iter_modules(specsplit.settings.__path__):
        importlib.import_module(f"specsplit.settings.{module.name}")
    waiting, names = [Settings], set()
    while waiting:
        settings = waiting.pop()
        waiting += settings.__subclasses__()
        names |= {name for field in settings.model_fields for name in settings.variables(field)}
    assert {"SPECSPLIT_ORCH_GAMMA", "SPECSPLIT_DISTILL_LAYERS"} < names
    assert names <= known_variables()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--stop", "\n\n", "a, b", " end"], ["\n\n", "a, b", " end"]),
        (["--stop", "[INST]"], ["[INST]"]),
        ([], []),
    ],
)
def test_stop_strings_are_taken_as_they_are(words: list[str], expected: list[str]) -> None:
    parser = argparse.ArgumentParser()
    add_setting_flags(parser, OrchestratorConfig)
    assert load_settings(OrchestratorConfig, parser.parse_args(words)).stop == expected


def test_stop_strings_in_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECSPLIT_ORCH_STOP", '["a,b", "\\n"]')
    assert OrchestratorConfig.load().stop == ["a,b", "\n"]
    monkeypatch.setenv("SPECSPLIT_ORCH_STOP", "a, b")
    assert OrchestratorConfig.load().stop == ["a, b"]
    with pytest.raises(UserError, match="--stop"):
        OrchestratorConfig.load({"stop": [""]})
