"""specsplit states-cost"""

from __future__ import annotations

import argparse
from pathlib import Path

from specsplit.cli.flags import add_setting_flags, load_settings
from specsplit.cli.measuring import add_figure_flag, add_prompts_flag, add_workers_dir_flag, greedy, leave
from specsplit.errors import RunError, UserError, counted
from specsplit.settings.measure import StatesCostSettings
from specsplit.settings.run import NO_NETWORK, OrchestratorConfig


def add_flags(parser: argparse.ArgumentParser) -> None:
    add_prompts_flag(parser)
    parser.add_argument(
        "--output", type=Path, required=True, help="CSV table, one row a kind, round trip and bandwidth"
    )
    add_figure_flag(parser)
    add_workers_dir_flag(parser)
    parser.add_argument("--head-addr", metavar="ADDR", help="host:port of the draft worker whose model reads states")
    # Greedy texts of a fixed length in mode sync.
    without = (
        *("mode", "temperature", "jitter_ms", "top_k", "top_p", "sampling", "draft_acceptance", "draft_name"),
        *("max_output_tokens", "max_rounds", "ignore_eos", "stop", "stop_token_ids", "fan_out", "tree"),
        *("hidden_states_form", "hidden_states_project", "hidden_states_window"),
    )
    add_setting_flags(parser, StatesCostSettings, OrchestratorConfig, without=without)


def run(args: argparse.Namespace) -> None:
    import pandas as pd

    from specsplit.analysis.states_table import draw_states_cost, summarize_states_cost
    from specsplit.cli.plan import connect
    from specsplit.experiment.states_cost import DRAFT, HEAD, StatesRecord, measure_states_cost

    settings = load_settings(StatesCostSettings, args)
    length = {"ignore_eos": True, "max_output_tokens": settings.output_tokens}
    config = greedy(args, mode="sync", gamma=settings.gamma, **length)
    if not (args.workers_dir or args.head_addr):
        raise UserError("--head-addr is missing: the draft worker whose model reads hidden states")
    for_head = {"draft_name": HEAD, "draft_address": args.head_addr or config.draft_address}
    if "target" in settings.project:  # the handshake asks for the fc of this head
        for_head["hidden_states_project"] = "target"
    own = (*length, "stop", "stop_token_ids", *NO_NETWORK)
    configs = [config, config.model_copy(update=for_head)]
    found = connect(args, settings, configs, room=settings.output_tokens, own=own)
    draft, head = found.configs
    wanted = {DRAFT: (False, "a draft that reads none"), HEAD: (True, "a head of this target")}
    for (key, (reads, mend)), connected, workers in zip(wanted.items(), found.configs, found.workers, strict=True):
        worker = workers["draft"].description
        if worker.HasField("states_needed") != reads:
            raise UserError(
                f"{worker.model}, at {connected.draft_address}, {'reads no' if reads else 'reads'} hidden states: name "
                f"{mend} by states_cost.{key}, or start its worker and name that by --{key}-addr"
            )
    # Of these drafts, whatever those of the sweep are.
    found.run["ours"] = {
        key: {**told, "orchestrator": told["orchestrator"] | {"draft_name": f"states_cost.{key}"}}
        for key, told in zip(wanted, found.run["ours"].values(), strict=True)
    }

    def show(rows: list[StatesRecord]) -> None:
        first = rows[0]
        times = ", ".join(f"{row.total_latency_ms / row.generated_tokens:.1f}" for row in rows)
        network = f"RTT {first.rtt_ms:g} ms, {first.bandwidth_mbit:g} Mbit/s"
        print(f"{network}, {first.request_id}: {times} ms a token", flush=True)

    differing = 0

    def finish(rows: list[StatesRecord]) -> None:
        nonlocal differing
        differing = sum(not row.lossless for row in rows)
        table = summarize_states_cost(pd.DataFrame(rows))
        leave(args.output, found.run, table, draw=draw_states_cost, figure=args.figure)

    measure_states_cost(
        found.requests, draft, head, settings, args.output, decides=found.decides, on_rows=show, on_end=finish
    )
    if differing:
        raise RunError(f"{counted(differing, 'text differs', 'texts differ')} from those of the target alone")
