"""Memory of the workers: what they take beside weights, cache and torch, and whether it grows.

    python benchmarks/memory.py --model resources/models/smollm2-135m-instruct --requests 1000

starts a target worker (and with --gamma a draft worker on the same model), fills every session to its last token,
writes so many short texts, and prints the resident memory of each worker in MB. Linux only (peak memory is read from
/proc).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from transformers import AutoConfig

import specsplit
from specsplit.launch.endpoint import Endpoint
from specsplit.launch.start import own_workers, start_worker
from specsplit.models.fingerprint import gguf_weights
from specsplit.models.sources import resolve_model

MB = 1e6
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 2}  # int8: at most, with an embedding in bfloat16
CACHE_BYTES = 4  # engine fused keeps float32
# What a process takes that has loaded the libraries and multiplied once.
LIBRARIES = """
import psutil, torch, grpc
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama import modeling_llama
torch.set_num_threads({threads})
torch.ones(256, 256) @ torch.ones(256, 256)
print(psutil.Process().memory_info().rss)
"""


def main() -> None:
    args = parse_arguments()
    code = LIBRARIES.format(threads=args.threads)
    libraries = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    dtypes = {"target": args.dtype, **({"draft": args.draft_dtype} if args.gamma else {})}
    starts = {role: partial(start, role, worker_flags(args, dtype)) for role, dtype in dtypes.items()}
    with own_workers(starts) as endpoints:
        report = {role: {**budget(args, dtypes[role], endpoint), "libraries_mb": libraries / MB,
                         "loaded_mb": resident(endpoint)} for role, endpoint in endpoints.items()}  # fmt: skip
        fill_and_write(args, endpoints, report)
    for row in report.values():
        planned = row["weights_mb"] + row["cache_mb"] + row["libraries_mb"]
        row["beside_mb"] = row["peak_mb"] - planned
        row["growth_mb"] = row["end_mb"] - row["after_tenth_mb"]
    print(json.dumps(report, indent=2, default=lambda value: round(value, 1)) if args.json else as_text(report, args))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a prepared or local model")
    parser.add_argument("--dtype", default="float32", help="of the target (default: float32)")
    parser.add_argument("--draft-dtype", default="bfloat16", help="of the draft (default: bfloat16)")
    parser.add_argument("--gamma", type=int, default=0, help="draft length; above 0 a draft worker is measured as well")
    parser.add_argument("--requests", type=int, default=1000, help="short texts after the sessions were filled")
    parser.add_argument("--output-tokens", type=int, default=4, help="of each short text")
    parser.add_argument("--max-context", type=int, default=2048, help="tokens of a session")
    parser.add_argument("--max-sessions", type=int, default=4, help="sessions, and clients at once")
    parser.add_argument("--threads", type=int, default=psutil.cpu_count(logical=False) or 1, help="of each worker")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()
    if args.requests < 10:
        parser.error(f"--requests {args.requests}: at least 10")
    return args


def start(role: str, flags: list[str], endpoint_file: Path) -> Endpoint:
    return start_worker(role, flags, endpoint_file=endpoint_file, timeout_s=300.0)


def worker_flags(args: argparse.Namespace, dtype: str) -> list[str]:
    flags = {"model": args.model, "dtype": dtype, "port": 0, "threads": args.threads,
             "max-context": args.max_context, "max-sessions": args.max_sessions}  # fmt: skip
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def budget(args: argparse.Namespace, dtype: str, endpoint: Endpoint) -> dict[str, float]:
    """What the settings ask for: MB of weights, and of keys and values of all sessions; zero without weights."""
    folder, manifest = resolve_model(args.model)
    weights, cache = endpoint.worker["parameters"] * BYTES[dtype], 0
    has_weights = "weights_sha256" in manifest["fingerprint"]
    if has_weights and dtype == "float32" and (gguf := gguf_weights(folder)):
        weights = gguf.stat().st_size  # kept in its blocks
    if has_weights and (folder / "config.json").is_file():
        config = AutoConfig.from_pretrained(folder).get_text_config()
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        tokens = endpoint.worker["max_context"] * args.max_sessions
        cache = 2 * config.num_hidden_layers * heads * head * tokens * CACHE_BYTES
    return {"weights_mb": weights / MB, "cache_mb": cache / MB}


def fill_and_write(args: argparse.Namespace, endpoints: dict[str, Endpoint], report: dict[str, Any]) -> None:
    addresses = {role: endpoint.address for role, endpoint in endpoints.items()}
    limit = min(endpoint.worker["max_context"] for endpoint in endpoints.values())
    vocabulary = min(endpoint.worker["vocab_size"] for endpoint in endpoints.values())

    def write(count: int, length: int, tokens: int) -> None:
        texts = [[(7919 * (i + 1) + 31 * j) % vocabulary for j in range(length)] for i in range(count)]
        with specsplit.connect(**addresses, gamma=args.gamma, ignore_eos=True) as pair:
            pair.generate(texts, max_new_tokens=tokens)

    write(args.max_sessions, limit - 8, 8)
    note(endpoints, report, "filled_mb")
    tenth = args.requests // 10
    short = min(32, limit // 2)
    for part in range(10):
        count = tenth if part < 9 else args.requests - 9 * tenth
        write(count, short, args.output_tokens)
        if part == 0:
            note(endpoints, report, "after_tenth_mb")
        print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    note(endpoints, report, "end_mb")
    for role, endpoint in endpoints.items():
        report[role]["peak_mb"] = peak(endpoint)


def note(endpoints: dict[str, Endpoint], report: dict[str, Any], name: str) -> None:
    for role, endpoint in endpoints.items():
        report[role][name] = resident(endpoint)


def resident(endpoint: Endpoint) -> float:
    return psutil.Process(endpoint.pid).memory_info().rss / MB


def peak(endpoint: Endpoint) -> float:
    status = Path(f"/proc/{endpoint.pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) * 1024 / MB


WORDS = {
    "weights_mb": "weights",
    "cache_mb": "cache, as configured",
    "libraries_mb": "libraries (torch, transformers, grpc)",
    "loaded_mb": "worker with its model loaded",
    "filled_mb": "worker with every session filled",
    "after_tenth_mb": "after a tenth of the requests",
    "end_mb": "after all of them",
    "peak_mb": "peak",
    "beside_mb": "peak beside weights, cache and libraries",
    "growth_mb": "growth over the last nine tenths",
}


def as_text(report: dict[str, Any], args: argparse.Namespace) -> str:
    head = f"{args.requests} requests, {args.max_sessions} sessions of {args.max_context} tokens; resident memory, MB"
    lines = [head, f"{'':42}" + "".join(f"{role:>10}" for role in report)]
    for name, words in WORDS.items():
        lines.append(f"{words:42}" + "".join(f"{row[name]:10.1f}" for row in report.values()))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
