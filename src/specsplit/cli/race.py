"""specsplit bench --baseline"""

from __future__ import annotations

import argparse
import shlex
import sys
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any

import specsplit
from specsplit.cli.plan import Plan, with_addresses
from specsplit.client.handshake import connected_pair
from specsplit.errors import UserError
from specsplit.experiment.peer_race import SETTLE_S, Ours, PeerRecord, check_peers, race
from specsplit.experiment.peers import HuggingFace, Peer, PeerModel
from specsplit.experiment.runner import encode_prompts, worker_identity
from specsplit.experiment.sweep import Point
from specsplit.io import write_json
from specsplit.launch.endpoint import description_dict
from specsplit.models.sources import resolve_model
from specsplit.provenance.capture import capture_environment, capture_machine, capture_software, utc_now
from specsplit.provenance.closure import code_sha256
from specsplit.provenance.gpu import capture_gpu
from specsplit.provenance.redaction import redact, redact_arguments, without_places


def run_race(args: argparse.Namespace, plan: Plan) -> None:
    """Race the points of the plan against the peers; peers_requests.csv and peers_run.json, and unless --only the
    summary and the figure."""
    bad = [point.label for point in plan.points if point.temperature or point.rtt_ms]
    if bad:
        raise UserError(
            f"--baseline with {bad[0]}: a race is greedy and without a simulated network; Hugging Face draws other "
            "random numbers and has no network"
        )
    if plan.config.max_rounds is not None:
        raise UserError("--baseline with --max-rounds: Hugging Face knows no such limit")
    baselines = [Peer.parse(text) for text in plan.bench.baseline or ()]
    if len({peer.label for peer in baselines}) < len(baselines):
        raise UserError("--baseline: a peer is there more than once; remove the repeats")
    folders = {"target": args.target_model, "draft": args.draft_model}
    resolved = {role: resolve_model(folder) if folder else None for role, folder in folders.items()}
    manifests = {role: model[1] if model else None for role, model in resolved.items()}
    with ExitStack() as stack:
        ours = [_connect(args, plan, point, stack) for point in plan.points]
        check_peers(baselines, ours, manifests)
        limit = min(contender.target.description.max_context for contender in ours)
        requests = encode_prompts(plan.prompts, plan.codec, chat=plan.config.use_chat_template, limit=limit)
        target, draft = ours[0].target.description, next((o.draft for o in ours if o.draft is not None), None)
        models: dict[str, PeerModel | None] = {"target": None, "draft": None}
        for role, description in (("target", target), ("draft", draft.description if draft else None)):
            model = resolved[role]
            if description is not None and model is not None and "weights_sha256" in model[1]["fingerprint"]:
                layers = tuple(description.skip_layers)
                models[role] = PeerModel(model[0], description.dtype, description.device, layers)
        assert models["target"] is not None
        if any(peer.kind == "assisted" for peer in baselines) and draft is None:
            raise UserError("--baseline assisted: give a gamma above 0 as well, for the draft of the workers is raced")
        print(f"loading the models of Hugging Face, {target.threads} threads ...", flush=True)
        hugging_face = stack.enter_context(HuggingFace(models["target"], models["draft"], target.threads))
        run: dict[str, Any] = {
            "schema_version": 1,
            "command": shlex.join(redact_arguments(["specsplit", *sys.argv[1:]])),
            "started": utc_now(),
            "warmup_requests": plan.bench.warmup,
            "repeats": plan.bench.repeats,
            "settle_s": SETTLE_S,
            "ours": {contender.label: _describe(contender) for contender in ours},
            "hugging_face": {"peers": [peer.label for peer in baselines], **hugging_face.description},
            "inputs": plan.inputs,
            "tokenizer_sha256": plan.codec.sha256,
            "environment": capture_environment(),
            "machine": capture_machine(),
            "gpu": capture_gpu(),
            "software": capture_software(),
            "specsplit_version": specsplit.__version__,
        }
        total = plan.bench.repeats * len(requests) * (len(ours) + len(baselines))
        done = 0

        def show(row: PeerRecord) -> None:
            nonlocal done
            done += 1
            tpot = "" if row.tpot_ms is None else f", TPOT {row.tpot_ms:.1f} ms"
            same = "" if row.identical else f", differs from token {row.first_divergence}"
            print(f"[{done}/{total}] {row.contender} {row.request_id}: {row.generated_tokens} tokens{tpot}{same}")
            sys.stdout.flush()

        table = args.results_dir / "peers_requests.csv"
        own = ("hugging_face", "tokenizer_sha256", "environment", "machine", "software")
        decides = {key: run[key] for key in own} | {"code": code_sha256("race"), "ours": _deciding(ours)}
        run["attempts"] = race(
            requests,
            ours,
            baselines,
            hugging_face,
            table,
            warmup=plan.bench.warmup,
            repeats=plan.bench.repeats,
            decides=decides,
            on_row=show,
        )
    told = without_places({**run, "finished": utc_now()}, Path.cwd())
    write_json(args.results_dir / "peers_run.json", redact(told))
    print(table)
    if not args.only:
        for path in import_module("specsplit.analysis.peers_table").write_peers(args.results_dir):
            print(path)


def _connect(args: argparse.Namespace, plan: Plan, point: Point, stack: ExitStack) -> Ours:
    config = with_addresses(plan.configs[point], args.workers_dir, point)
    draft, target = stack.enter_context(connected_pair(config, plan.codec.sha256))
    return Ours(point.label, config, draft, target)


def _deciding(ours: list[Ours]) -> dict[str, Any]:
    """What of our contenders decides their rows."""
    decides = {}
    for contender in ours:
        workers = {role: worker_identity(worker) for role, worker in _describe(contender)["workers"].items()}
        settings = contender.config.model_dump(mode="json", exclude=contender.config.operating())
        decides[contender.label] = {"settings": settings, "workers": workers}
    return decides


def _describe(contender: Ours) -> dict[str, Any]:
    workers = {c.role: c for c in (contender.draft, contender.target) if c is not None}
    return {
        "orchestrator": contender.config.model_dump(mode="json"),
        "workers": {role: {"address": c.address, **description_dict(c.description)} for role, c in workers.items()},
    }
