"""Campaigns that break things for a long time and count what came of it: `make soak`, docs/reliability.md.

    python tests/soak.py workers --kills 100       a draft and a target worker killed at random moments
    python tests/soak.py bench --kills 40          `specsplit bench` killed at random moments and started again
    python tests/soak.py own --kills 5             the same while it starts and uses workers of its own
    python tests/soak.py workflow --kills 10       `snakemake` killed at random moments and started again
    python tests/soak.py load --minutes 30         8 clients through a network with faults, memory of the workers
    python tests/soak.py pressure --minutes 15     1 to 64 clients, low limits, kills, faults, silent and greedy streams
    python tests/soak.py serve --minutes 30 --kills 0   OpenAI's client against `specsplit serve`, mixed load, memory

Each prints one JSON object and ends with status 1 when something is wrong: a text that is neither right nor named as
failed, a row that is lost or doubled, a process left after 5 s. tests/integration/test_faults.py has short ones.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil

from specsplit.client.event_loop import event_loop
from specsplit.client.pipeline import run_speculative_loop_async
from specsplit.client.writer import TextWriter
from specsplit.errors import WorkerError
from specsplit.models.sources import prepare_model
from specsplit.rpc.codec import CHANNEL_OPTIONS
from specsplit.rpc.v1 import specsplit_pb2 as pb
from specsplit.rpc.v1 import specsplit_pb2_grpc as pb_grpc
from specsplit.settings.run import OrchestratorConfig

from faulty_network import FaultyNetwork, faulty_network
from soak_serve import serve_campaign
from worker_processes import WorkerProcess, start_command
from workspace import Workspace

MARK = "SOAK_MARK"  # in the environment of every process of a campaign
LEFT_AFTER_S = 5.0
PROMPTS = [[65 + i, 66 + i % 7, 67] for i in range(16)]
TOKENS = 48


@contextmanager
def campaign() -> Iterator[tuple[Path, dict[str, Any]]]:
    """A folder, and the figures of the campaign; at the end, what is left of its processes is counted."""
    mark = uuid.uuid4().hex
    figures: dict[str, Any] = {"mark": mark}
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="specsplit-soak-") as folder:
        yield Path(folder), figures
    del figures["mark"]
    figures["seconds"] = round(time.monotonic() - began, 1)
    figures["orphans"] = len(orphans(mark))


def orphans(mark: str = "", but: Sequence[int] = ()) -> list[psutil.Process]:
    """Processes that are left after LEFT_AFTER_S seconds: what was forked for us, and whatever has our mark in its
    environment. but: process numbers that may be there."""
    deadline = time.monotonic() + LEFT_AFTER_S
    while True:
        # Our children are the fork server and its helper; what they forked is a child of theirs.
        helpers = {child.pid for child in psutil.Process().children()}
        left = [child for child in psutil.Process().children(recursive=True) if child.pid not in {*helpers, *but}]
        for process in psutil.process_iter() if mark else ():
            with suppress(psutil.Error):
                if process.environ().get(MARK) == mark:
                    left.append(process)
        left = [process for process in left if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.1)


def simulated(folder: Path, *, step_ms: float) -> dict[str, Path]:
    """Folders of a draft and a target whose text depends on every token before: a lost or doubled one shows."""
    for name, settings in {"draft": {"acceptance": 0.8, "step_ms": 0.2}, "target": {"step_ms": step_ms}}.items():
        prepare_model({"source": "synthetic", **settings}, name, folder / name)
    return {name: folder / name for name in ("draft", "target")}


def any_settings(chance: random.Random, **fixed: Any) -> OrchestratorConfig:
    """A mode, shape, gamma, prompt lookup, way to choose tokens and way to meet failures, drawn."""
    temperature = chance.choice([0.0, 0.0, 0.8])
    return OrchestratorConfig(
        **{
            "mode": chance.choice(["sync", "overlap", "lookahead"]),
            "tree": chance.choice(["chain", "2x2"]),
            "gamma": chance.choice([0, 1, 3, "auto"]),
            "lookup": chance.choice([0, 0, 1, 2]),
            "temperature": temperature,
            "seed": 5,
            "max_output_tokens": TOKENS,
            "on_draft_failure": chance.choice(["reconnect", "reconnect", "target_alone", "fail"]),
            "recovery_timeout_s": chance.choice([0.3, 30.0, 30.0]),
            "connect_timeout_s": 5.0,
            "rpc_timeout_s": 10.0,
            **fixed,
        }
    )


def right_texts(draft: str, target: str, prompts: int = len(PROMPTS)) -> dict[tuple[int, float], list[int]]:
    """(prompt, temperature) -> what the target writes alone, undisturbed. prompts: how many of PROMPTS."""
    texts = {}
    with TextWriter(draft, target) as writer:
        for number, prompt in enumerate(PROMPTS[:prompts]):
            for temperature in (0.0, 0.8):
                config = OrchestratorConfig(gamma=0, temperature=temperature, seed=5, max_output_tokens=TOKENS)
                texts[number, temperature] = writer.write(prompt, config).output_tokens
    return texts


def judge(tokens: Sequence[int], expected: Sequence[int], error: WorkerError | None) -> str:
    """right | failed (named, and what there is of the text is right) | wrong."""
    if error is None:
        return "right" if list(tokens) == list(expected) else "wrong"
    return "failed" if error.code and list(tokens) == list(expected[: len(tokens)]) else "wrong"


def kill_workers(kills: int, seed: int, *, downtime_s: float = 0.5, prompts: int = len(PROMPTS)) -> dict[str, Any]:
    """Texts, one after the other, while the two workers are killed in turn by chance and started again."""
    chance = random.Random(seed)
    with campaign() as (folder, figures), ExitStack() as stack:
        models = simulated(folder, step_ms=4.0)
        workers = {role: WorkerProcess(role, models[role], folder) for role in models}
        for worker in workers.values():
            stack.callback(worker.close)
        expected = right_texts(workers["draft"].address, workers["target"].address, prompts)
        killed: Counter[str] = Counter()
        over = threading.Event()

        def kill_again_and_again() -> None:
            killer = random.Random(seed + 1)
            while sum(killed.values()) < kills:
                time.sleep(killer.uniform(0.02, 0.4))
                role = killer.choice(list(workers))
                workers[role].kill()
                killed[role] += 1
                time.sleep(killer.choice([0.0, killer.uniform(0, downtime_s)]))
                workers[role].start()
            over.set()

        verdicts: Counter[str] = Counter()
        recovered = 0
        thread = threading.Thread(target=kill_again_and_again)
        with TextWriter(workers["draft"].address, workers["target"].address) as writer:
            thread.start()
            while not over.is_set():
                number, config = chance.randrange(prompts), any_settings(chance)
                error, tokens = None, []
                try:
                    result = writer.write(PROMPTS[number], config)
                    tokens = result.output_tokens
                    recovered += bool(result.failures)
                except WorkerError as failure:
                    error, tokens = failure, failure.result.output_tokens if failure.result else []
                verdicts[judge(tokens, expected[number, config.temperature], error)] += 1
        thread.join()
        figures |= {"kills": dict(killed), "texts": dict(verdicts), "right_after_a_failure": recovered}
    figures["ok"] = not verdicts["wrong"] and not figures["orphans"]
    return figures


def kill_bench(kills: int, seed: int, *, own: bool = False, prompts: int = 12) -> dict[str, Any]:
    """`specsplit bench` killed again and again, and started again, until it ends by itself; then the next run.

    own: it starts its workers itself, so that their end is tested as well.
    """
    chance = random.Random(seed)
    with campaign() as (folder, figures), ExitStack() as stack:
        models = simulated(folder, step_ms=4.0)
        lines = [json.dumps({"id": f"p{i}", "category": "c", "prompt": f"number {i}"}) for i in range(prompts)]
        (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
        arguments = ["bench", "--only", "--gamma", "3", "--prompts", folder / "prompts.jsonl", "--warmup", "0"]
        but = []
        arguments += ["--tokenizer", models["target"], "--max-output-tokens", str(TOKENS)]
        if own:
            settings = {role: {"model": str(models[role]), "threads": 1} for role in models}
            (folder / "settings.json").write_text(json.dumps(settings))
            arguments += ["--start-workers", "--settings", folder / "settings.json"]
        else:
            for role in models:
                worker = WorkerProcess(role, models[role], folder)
                stack.callback(worker.close)
                arguments += [f"--{role}-addr", worker.address]
                but.append(worker.pid)
        marked = {MARK: figures["mark"]}
        killed = runs = rows = kept = lost = doubled = wrong = left = 0
        texts: dict[str, str] = {}
        while killed < kills:
            results = folder / f"results-{runs}"
            table = results / "runs/gamma_3/requests.csv"
            while True:
                process = start_command(
                    *arguments, "--results-dir", results, log=folder / "bench.log", environment=marked
                )
                # Long enough to be done now and then; most end in the middle.
                process.join(chance.uniform(0.3, 40.0 if own else 6.0) if killed < kills else 120)
                if process.is_alive():
                    process.kill()
                    process.join()
                    killed += 1
                    left += len(orphans(figures["mark"], but))
                    continue
                assert process.exitcode == 0, (folder / "bench.log").read_text()
                break
            runs += 1
            with table.open(newline="") as file:
                found = [(row["request_id"], row["output_sha256"], row["status"]) for row in csv.DictReader(file)]
            names = Counter(name for name, _, _ in found)
            rows += len(found)
            kept += json.loads(table.with_name("run.json").read_text())["requests"]["kept"]
            lost += prompts - len(names)
            doubled += sum(count - 1 for count in names.values())
            wrong += sum(status != "ok" or texts.setdefault(name, sha) != sha for name, sha, status in found)
        figures |= {"kills": killed, "runs": runs, "rows": rows, "kept_from_a_killed_run": kept}
        figures |= {"lost": lost, "doubled": doubled, "wrong": wrong, "left_by_a_kill": left}
    figures["ok"] = not (lost or doubled or wrong or left or figures["orphans"])
    return figures


# Snakemake alone, it and those of its jobs that share its process group, and what Ctrl-C at a terminal does.
KILLS: dict[str, Callable[[int], None]] = {
    "snakemake": lambda pid: os.kill(pid, signal.SIGKILL),
    "group": lambda pid: os.killpg(pid, signal.SIGKILL),
    "ctrl_c": lambda pid: os.killpg(pid, signal.SIGINT),
}
LAST_WORDS_S = 20.0


def kill_workflow(kills: int, seed: int, *, prompts: int = 8) -> dict[str, Any]:
    """The workflow killed again and again, and called again as it was, until it ends by itself; then from the start.

    Locks and half-made files of a killed run are the workflow's own affair: nothing is unlocked or deleted here.
    """
    chance = random.Random(seed)
    with campaign() as (folder, figures):
        workspace = Workspace(folder, {"source": "synthetic", "step_ms": 15})
        workspace.config |= {"gammas": [0, 2], "generation": {"max_output_tokens": TOKENS}, "warmup_requests": 0}
        workspace.write_prompts(*(f"number {i}" for i in range(prompts)))
        results, log = folder / "results", folder / "snakemake.log"
        began = time.monotonic()
        workspace.run()
        undisturbed_s = time.monotonic() - began
        with (results / "requests.csv").open(newline="") as file:
            texts = {row["request_id"]: row["output_sha256"] for row in csv.DictReader(file)}
        killed: Counter[str] = Counter()
        runs = rows = kept = lost = doubled = wrong = left = 0
        while killed.total() < kills:
            for made in (results, folder / "resources"):
                shutil.rmtree(made)
            while True:
                process = workspace.start(log=log, **{MARK: figures["mark"]})
                kind = chance.choice(list(KILLS))
                try:
                    # Half of a whole run at most: after a few kills what is left to do fits in.
                    process.wait(chance.uniform(0, undisturbed_s / 2) if killed.total() < kills else 600)
                    break
                except subprocess.TimeoutExpired:
                    KILLS[kind](process.pid)
                    killed[kind] += 1
                # After Ctrl-C Snakemake takes a few seconds to end its jobs; its workers are there as long as it is.
                with suppress(subprocess.TimeoutExpired):
                    process.wait(LAST_WORDS_S)
                workspace.wait_until(lambda: not workspace.processes(), LEFT_AFTER_S)
                if found := workspace.processes():
                    logging.error("left by %s: %s", kind, found)
                    left += len(found)
                process.kill()
                process.wait()
            assert process.returncode == 0, log.read_text() + workspace.logs()
            runs += 1
            with (results / "requests.csv").open(newline="") as file:
                table = list(csv.DictReader(file))
            names = Counter((row["gamma"], row["request_id"]) for row in table)
            rows += len(table)
            kept += sum(json.loads(run.read_text())["requests"]["kept"] for run in results.glob("runs/*/run.json"))
            lost += 2 * prompts - len(names)
            doubled += sum(count - 1 for count in names.values())
            wrong += sum(row["status"] != "ok" or texts.get(row["request_id"]) != row["output_sha256"] for row in table)
            with (results / "summary.csv").open(newline="") as file:
                wrong += sum(float(row["lossless"]) != 1 for row in csv.DictReader(file))
        figures |= {"kills": dict(killed), "runs": runs, "rows": rows, "kept_from_a_killed_run": kept}
        figures |= {"lost": lost, "doubled": doubled, "wrong": wrong, "left_by_a_kill": left}
        figures["undisturbed_s"] = round(undisturbed_s, 1)
    figures["ok"] = not (lost or doubled or wrong or left or figures["orphans"])
    return figures


# A peer that went silent is noticed in a second instead of 15.
_PINGS = {"grpc.keepalive_time_ms": 700, "grpc.http2.ping_timeout_ms": 500, "grpc.use_local_subchannel_pool": 1}
QUICK = list({**dict(CHANNEL_OPTIONS), **_PINGS}.items())
FAULTS = ("cut", "silent", "stall", "slow", "twice")


async def _disturb(
    networks: Sequence[FaultyNetwork], chance: random.Random, done: Counter[str], every_s: float
) -> None:
    while True:
        await asyncio.sleep(chance.uniform(0.5, 1.5) * every_s)
        network, fault = chance.choice(networks), chance.choice(FAULTS)
        done[fault] += 1
        if fault == "cut":
            network.cut()
        elif fault == "silent":
            network.go_silent()
        elif fault == "twice":
            network.repeat_next()
        elif fault == "stall":
            network.stall()
            await asyncio.sleep(chance.uniform(0.1, 1.0))
            network.resume()
        else:
            network.delay_s, network.bytes_per_s = 0.02, 20_000
            await asyncio.sleep(chance.uniform(0.5, 2.0))
            network.delay_s, network.bytes_per_s = 0.0, 0


def load(minutes: float, clients: int, seed: int, *, curve: Path | None = None, every_s: float = 2.0) -> dict[str, Any]:
    """Many clients through a network with faults; how many texts were right, and the memory of the workers."""
    chance = random.Random(seed)
    verdicts: Counter[str] = Counter()
    codes: Counter[str] = Counter()
    done: Counter[str] = Counter()
    samples: list[tuple[float, ...]] = []
    with campaign() as (folder, figures), ExitStack() as stack:
        models = simulated(folder, step_ms=4.0)
        workers = {role: WorkerProcess(role, models[role], folder, max_sessions=clients) for role in models}
        for worker in workers.values():
            stack.callback(worker.close)
        expected = right_texts(workers["draft"].address, workers["target"].address)
        networks = [stack.enter_context(faulty_network(workers[role].address)) for role in models]
        processes = [psutil.Process(worker.pid) for worker in workers.values()] + [psutil.Process()]
        began = time.monotonic()

        async def client(number: int) -> None:
            own = random.Random(seed + number)
            async with (
                grpc.aio.insecure_channel(networks[0].address, options=QUICK) as draft,
                grpc.aio.insecure_channel(networks[1].address, options=QUICK) as target,
            ):
                stubs = pb_grpc.DraftServiceStub(draft), pb_grpc.TargetServiceStub(target)
                while time.monotonic() - began < minutes * 60:
                    prompt = own.randrange(len(PROMPTS))
                    config = any_settings(own, on_draft_failure="reconnect", recovery_timeout_s=30.0)
                    error, tokens = None, []
                    try:
                        result = await run_speculative_loop_async(*stubs, PROMPTS[prompt], config)
                        tokens = result.output_tokens
                    except WorkerError as failure:
                        error, tokens = failure, failure.result.output_tokens if failure.result else []
                        codes[error.code] += 1
                    verdicts[judge(tokens, expected[prompt, config.temperature], error)] += 1

        async def sample() -> None:
            while True:
                memory = [process.memory_info().rss / 2**20 for process in processes]
                samples.append((time.monotonic() - began, *memory))
                await asyncio.sleep(1.0)

        async def everything() -> None:
            side = [asyncio.create_task(sample()), asyncio.create_task(_disturb(networks, chance, done, every_s))]
            await asyncio.gather(*(client(number) for number in range(clients)))
            for task in side:
                task.cancel()

        event_loop().run(everything())
        # Every session can be had again: none is taken for in use by a client that is gone.
        with TextWriter(workers["draft"].address, workers["target"].address) as writer:
            for prompt in PROMPTS[:clients]:
                writer.write(prompt, OrchestratorConfig(max_output_tokens=4, recovery_timeout_s=0.0))
    names = ("draft", "target", "clients")
    table = np.array(samples)
    late = table[table[:, 0] > table[-1, 0] / 3]
    figures |= {"texts": dict(verdicts), "failed_with": dict(codes), "faults": dict(done), "clients": clients}
    figures["memory_mib"] = {
        name: {"start": round(table[0, i], 1), "third": round(late[0, i], 1), "end": round(table[-1, i], 1)}
        for i, name in enumerate(names, start=1)
    }
    if len(late) > 2:
        slopes = [np.polyfit(late[:, 0] / 60, late[:, i], 1)[0] for i in range(1, 4)]
        figures["mib_per_minute"] = {name: round(slope, 3) for name, slope in zip(names, slopes, strict=True)}
    if curve is not None:
        with curve.open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["seconds", *(f"{name}_mib" for name in names)])
            rows.writerows([f"{value:.2f}" for value in row] for row in samples)
    figures["ok"] = not verdicts["wrong"] and not figures["orphans"]
    return figures


def low_limits(chance: random.Random) -> dict[str, Any]:
    """Settings of a worker that has little of something."""
    return {
        "max_sessions": chance.choice([1, 2, 4, 8]),
        "max_calls": chance.choice([1, 4, None]),
        "max_tree_nodes": chance.choice([3, 16, 256]),
        "max_context": chance.choice([96, 256]),
        "max_message_mb": chance.choice([1, 16]),
        "session_slice_s": chance.choice([0.3, 2.0]),
        "stream_idle_s": chance.choice([1.0, 60.0]),
    }


@contextmanager
def nuisances(address: str, chance: random.Random) -> Iterator[None]:
    """Streams beside the clients': silent ones, and some that hold a session and say nothing more."""
    over = threading.Event()

    def messages(number: int) -> Iterator[Any]:
        if chance.random() < 0.5:
            context = pb.Context(session_id=f"nuisance-{number}", round=1, new_tokens=PROMPTS[0])
            yield pb.StreamVerifyRequest(verify=pb.VerifyDraftsRequest(context=context))
        over.wait(600)

    with grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        stub = pb_grpc.TargetServiceStub(channel)
        streams = [stub.StreamVerify(messages(number)) for number in range(chance.choice([0, 4, 40]))]
        try:
            yield
        finally:
            over.set()
            for stream in streams:
                stream.cancel()


def pressure(minutes: float, seed: int) -> dict[str, Any]:
    """Episodes: workers with low limits drawn, 1 to 64 clients that come at once, and what disturbs them.

    Each text must be right, or end with a named error; afterwards the worker serves the next one. Texts whose settings
    say so give up early; `patient` are the failures of the others, with what they say.
    """
    chance = random.Random(seed)
    verdicts: Counter[str] = Counter()
    codes: Counter[str] = Counter()
    patient: Counter[str] = Counter()
    done: Counter[str] = Counter()
    slowest_s, episodes, unserved = 0.0, 0, 0
    with campaign() as (folder, figures):
        models = simulated(folder, step_ms=2.0)
        began = time.monotonic()
        while time.monotonic() - began < minutes * 60:
            episodes += 1
            found, served = _episode(folder / str(episodes), models, chance, done)
            unserved += not served
            for verdict, error, seconds, is_patient in found:
                verdicts[verdict] += 1
                slowest_s = max(slowest_s, seconds)
                if error is not None:
                    codes[error.code] += 1
                    patient[str(error)] += is_patient
        figures |= {"episodes": episodes, "texts": dict(verdicts), "failed_with": dict(codes), "faults": dict(done)}
        figures |= {"patient": dict(+patient)}
        figures |= {"slowest_text_s": round(slowest_s, 1), "not_served_afterwards": unserved}
    figures["ok"] = not (verdicts["wrong"] or unserved or figures["orphans"])
    return figures


def _episode(
    home: Path, models: dict[str, Path], chance: random.Random, done: Counter[str]
) -> tuple[list[tuple[str, WorkerError | None, float, bool]], bool]:
    """(verdict, error, seconds, whether it was to wait long) of each text, and whether the workers serve afterwards."""
    home.mkdir()
    with ExitStack() as stack:
        workers = {role: WorkerProcess(role, models[role], home, **low_limits(chance)) for role in models}
        for worker in workers.values():
            stack.callback(worker.close)
        addresses = [worker.address for worker in workers.values()]
        networks = [stack.enter_context(faulty_network(address)) for address in addresses]
        expected = right_texts(*addresses)
        stack.enter_context(nuisances(workers["target"].address, chance))
        seeds = [random.Random(chance.random()) for _ in range(chance.choice([1, 2, 4, 8, 16, 32, 64]))]
        kills, faults = chance.choice([0, 0, 1, 2]), chance.random() < 0.5

        async def client(own: random.Random) -> tuple[str, WorkerError | None, float, bool]:
            prompt = own.randrange(len(PROMPTS))
            tree, gamma = own.choice(["chain", "2x2", "4x4x2", "dynamic-64x8"]), own.choice([0, 3, 16, "auto"])
            config = any_settings(own, tree=tree, gamma=gamma)
            error, tokens, started = None, [], time.monotonic()
            async with (
                grpc.aio.insecure_channel(networks[0].address, options=QUICK) as draft,
                grpc.aio.insecure_channel(networks[1].address, options=QUICK) as target,
            ):
                stubs = pb_grpc.DraftServiceStub(draft), pb_grpc.TargetServiceStub(target)
                try:
                    tokens = (await run_speculative_loop_async(*stubs, PROMPTS[prompt], config)).output_tokens
                except WorkerError as failure:
                    error, tokens = failure, failure.result.output_tokens if failure.result else []
            is_patient = config.recovery_timeout_s > 1 and config.on_draft_failure != "fail"
            verdict = judge(tokens, expected[prompt, config.temperature], error)
            return verdict, error, time.monotonic() - started, is_patient

        async def kill_some() -> None:
            for _ in range(kills):
                await asyncio.sleep(chance.uniform(0.1, 1.0))
                worker = workers[chance.choice(list(workers))]
                done["kill"] += 1
                await asyncio.to_thread(worker.restart)

        async def everything() -> list[tuple[str, WorkerError | None, float, bool]]:
            side = [asyncio.create_task(kill_some())]
            if faults:
                side.append(asyncio.create_task(_disturb(networks, chance, done, 1.0)))
            found = await asyncio.gather(*(client(own) for own in seeds))
            await side[0]
            for task in side:
                task.cancel()
            return found

        found = event_loop().run(everything())
        with TextWriter(*addresses) as writer:
            last = writer.write(PROMPTS[0], OrchestratorConfig(max_output_tokens=8, recovery_timeout_s=10.0))
        return found, last.output_tokens == expected[0, 0.0][:8]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("campaign", choices=("workers", "bench", "own", "workflow", "load", "pressure", "serve"))
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--curve", type=Path, help="CSV file for the memory of each second (load, serve)")
    args = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    if args.campaign == "workers":
        figures = kill_workers(args.kills, args.seed)
    elif args.campaign == "load":
        figures = load(args.minutes, args.clients, args.seed, curve=args.curve)
    elif args.campaign == "pressure":
        figures = pressure(args.minutes, args.seed)
    elif args.campaign == "serve":
        with campaign() as (folder, figures):
            models, mark = simulated(folder, step_ms=4.0), {MARK: figures["mark"]}
            how: dict[str, Any] = {"minutes": args.minutes, "clients": args.clients, "seed": args.seed}
            serve_campaign(folder, models, figures, mark, kills=args.kills, curve=args.curve, **how)
        figures["ok"] = figures["ok"] and not figures["orphans"]
    elif args.campaign == "workflow":
        figures = kill_workflow(args.kills, args.seed)
    else:
        figures = kill_bench(args.kills, args.seed, own=args.campaign == "own")
    print(json.dumps({"campaign": args.campaign, "seed": args.seed, **figures}))
    sys.exit(0 if figures["ok"] else 1)


if __name__ == "__main__":
    main()
