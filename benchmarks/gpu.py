"""Checks and times the engine for GPUs with random weights of real shapes; see gpu.sh, which sets its environment.

The floor of a pass is the time that reading its weights and its part of the cache takes, at the bandwidth that copying
memory reaches on this device. *device* is the time of the recorded pass alone, replayed without waiting for the host;
*ms* is what a caller waits, with the copies there and back. Checks come first; a failed one makes the exit status 1.
Where the time is up, what is left out says so.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from specsplit.decoding.sampling import COUPLED, GREEDY, Sampling, _uniform
from specsplit.decoding.tree import TokenTree
from specsplit.decoding.verification import verify
from specsplit.engines import gpu_noise
from specsplit.engines.gpu import GpuLM
from specsplit.engines.gpu_head import GpuHead
from specsplit.engines.head_module import HeadModule
from specsplit.engines.hidden_states import HiddenStatesHead
from specsplit.engines.passes import Pass, Propose, Walk
from specsplit.engines.transformers import CausalLM
from specsplit.models.head_config import HeadConfig

SMALL = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14}
LARGE = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
SHAPES: dict[str, dict[str, Any]] = {  # Qwen2.5, but that both have one vocabulary, as assisted generation wants it
    "0.5B": {**SMALL, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "7B": {**LARGE, "num_key_value_heads": 4, "vocab_size": 151936, "tie_word_embeddings": False},
}
HEAD_ROWS = 32000  # of the output head of an EAGLE-3 head
TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TREE = TokenTree([5, 6, 7, 8, 9], [-1, 0, -1, 2, 2], [-1.0] * 5)


@dataclass
class Bench:
    """What is measured, and the result so far."""

    device: torch.device
    tiny: bool
    seconds: float  # after which nothing new is begun
    output: Path
    began: float = field(default_factory=time.perf_counter)
    bandwidth: float = 0.0  # bytes/ms
    checks: list[dict[str, Any]] = field(default_factory=list)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    @property
    def contexts(self) -> tuple[int, ...]:
        return (16, 40) if self.tiny else (128, 1024, 8192)

    @property
    def capacity(self) -> int:
        """Of the caches: one pool for all, so that what is compiled for it serves everything."""
        return max(self.contexts) + 64

    @property
    def sizes(self) -> tuple[int, ...]:
        return (1, 4) if self.tiny else (1, 2, 4, 8, 16)

    @property
    def gammas(self) -> range:
        return range(1, 3 if self.tiny else 9)

    def check(self, what: str, passed: bool, found: Any = "") -> None:
        self.checks.append({"check": what, "passed": bool(passed), "found": str(found)})
        print("ok  " if passed else "FAIL", what, found, flush=True)
        self.save()

    def row(self, table: str, **values: Any) -> None:
        rounded = {key: round(value, 3) if isinstance(value, float) else value for key, value in values.items()}
        self.tables.setdefault(table, []).append(rounded)
        print(table, rounded, flush=True)
        self.save()

    def save(self) -> None:
        """Write what there is, so that nothing is lost when this is ended."""
        cuda = self.device.type == "cuda"
        result = {
            "device": torch.cuda.get_device_name(self.device) if cuda else platform.processor() or "cpu",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "seconds": round(time.perf_counter() - self.began, 1),
            "checks": self.checks,
            "tables": self.tables,
        }
        (self.output / "gpu.json").write_text(json.dumps(result, indent=1) + "\n")
        (self.output / "gpu.md").write_text(markdown(result))

    def time_left(self, what: str) -> bool:
        if time.perf_counter() < self.began + self.seconds:
            return True
        self.row("left out", what=what, why="the time was up")
        return False

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def ms(self, call: Callable[[], object], repeats: int = 20) -> float:
        """Median time of a call that ends when its work on the device has."""
        repeats, warm = (1, 0) if self.tiny else (repeats, 2)
        times = []
        for turn in range(repeats + warm):
            began = time.perf_counter()
            call()
            self.synchronize()
            if turn >= warm:
                times.append((time.perf_counter() - began) * 1e3)
        return statistics.median(times)

    def device_ms(self, run: Callable[[], None]) -> float:
        """Mean time of a recorded pass, replayed back to back."""
        count = 1 if self.tiny else 20
        run()
        self.synchronize()
        began = time.perf_counter()
        for _ in range(count):
            run()
        self.synchronize()
        return (time.perf_counter() - began) * 1e3 / count

    def measure_bandwidth(self) -> None:
        source = torch.empty(1 << (20 if self.tiny else 31), dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        self.bandwidth = 2 * source.nbytes / self.ms(lambda: target.copy_(source))
        self.row("machine", what="copy bandwidth, GB/s", value=self.bandwidth / 1e6)


@dataclass
class Loaded:
    """A model of transformers, or a head of it, with random weights, and the engine over the same weights.

    bytes: that a pass reads of the weights. targets: of a head, as in Propose.
    """

    name: str
    hf: Any
    source: Any
    lm: Any
    bytes: int
    targets: torch.Tensor | None = None

    def engine(self, compiles: bool) -> GpuLM | GpuHead:
        make: Any = GpuLM if self.targets is None else GpuHead
        engine: GpuLM | GpuHead = make(self.source, sessions=4, compiles=compiles)
        return engine

    def states(self, count: int) -> dict[str, torch.Tensor]:
        """What a head is given with so many tokens."""
        drawn = torch.Generator().manual_seed(count)
        return {} if self.targets is None else {"states": torch.randn(count, self.lm.state_size, generator=drawn)}

    def propose(self, sampling: Sampling, steps: int = 0) -> Propose:
        size = self.lm.vocab_size if self.targets is None else int(self.targets.max()) + 1
        return Propose(sampling, size, self.targets, steps=steps)

    def floor(self, bench: Bench, context: int) -> float:
        return (self.bytes + context * self.lm.cache_bytes(1024) / 1088) / bench.bandwidth


def load(bench: Bench, name: str) -> Loaded:
    shape = SHAPES[name] | ({**TINY, "vocab_size": 320} if bench.tiny else {})
    config = transformers.Qwen2Config(**shape, max_position_embeddings=32768)
    dtype = torch.float32 if bench.tiny else torch.bfloat16
    torch.manual_seed(0)
    with bench.device:
        hf = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    source = CausalLM(hf)
    read = sum(p.nbytes for p in hf.parameters())
    if not config.tie_word_embeddings:
        read -= hf.get_input_embeddings().weight.nbytes  # of which a pass reads a few rows
    return Loaded(name, hf, source, GpuLM(source, sessions=4, compiles=False), read)


def load_head(bench: Bench, target: Loaded) -> Loaded:
    """An EAGLE-3 head of a target: a layer of its sizes, and an output head of fewer rows."""
    config = target.hf.config
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
    sizes = {name: getattr(config, name) for name in names}
    layer = transformers.LlamaConfig(**sizes, num_hidden_layers=1, max_position_embeddings=32768)
    rows = min(HEAD_ROWS, config.vocab_size // 2)
    torch.manual_seed(0)
    with bench.device:
        module = HeadModule(HeadConfig(layer, rows, config.hidden_size)).to(target.source.dtype)
        module.set_tokens(range(1, 2 * rows, 2))
    source = HiddenStatesHead(module)
    read = sum(p.nbytes for part in (module.midlayer, module.norm, module.lm_head) for p in part.parameters())
    targets = module.d2t + torch.arange(rows, device=bench.device)
    return Loaded(f"{target.name} head", None, source, GpuHead(source, compiles=False), read, targets)


def tokens(count: int, seed: int = 0) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(3, 300, count)]


# ---- checks


def check(bench: Bench, model: Loaded) -> None:
    lm, limit = model.lm, 0.9999 if bench.tiny else 0.99
    text, one = tokens(40), model.states(1)
    plain, cache = model.source.new_cache(64), lm.new_cache(bench.capacity)
    model.source.step(plain, text, **model.states(40))
    lm.step(cache, text, **model.states(40))
    expected, found = model.source.step(plain, [3], TREE, **one).double(), lm.step(cache, [3], TREE, **one).double()
    similar = float(torch.cosine_similarity(expected, found, dim=-1).min())
    bench.check(
        f"{model.name}: logits after a tree are those of transformers", similar > limit, f"cosine {similar:.6f}"
    )
    cache.rollback(40)
    again = lm.step(cache, [3], TREE, **one).double()
    bench.check(f"{model.name}: the same pass gives the same bits", torch.equal(again, found))
    samplings = {
        "greedy": GREEDY,
        "coupled": Sampling(temperature=0.8, seed=7),
        "top-k, top-p": Sampling(temperature=0.8, top_k=40, top_p=0.9, seed=7),
    }
    for how, sampling in samplings.items():
        cache.rollback(40)
        chain = [best for best, _ in lm.step(cache, [3], then=model.propose(sampling, 3), **one)]
        cache.rollback(40)
        fed, apart, given = 3, 0.0, one
        for best in chain:  # the same token by token; other products, so that rounding may differ
            single = lm.step(cache, [fed], then=model.propose(sampling), **given)[0][0]
            fed, given = best.token_ids[0], {}
            likely = dict(zip(single.token_ids, single.log_probs, strict=True))
            apart = max(apart, abs(likely.get(fed, -99.0) - single.log_probs[0]))
        what = f"{model.name}: a chain drafts what single passes draft, {how}"
        bench.check(what, apart < (1e-3 if bench.tiny else 0.1), f"{apart:.4f} from the likeliest")
        if model.targets is None:
            cache.rollback(40)
            wanted = verify(TREE, lm.step(cache, [3], TREE), 41, sampling)
            cache.rollback(40)
            got = lm.step(cache, [3], TREE, then=Walk(sampling))
            bench.check(f"{model.name}: the verdict is that of the logits, {how}", wanted == got, got)
    if model.targets is None:
        alone, drafted = lm.new_cache(bench.capacity), lm.new_cache(bench.capacity)
        rows = torch.cat([lm.step(alone, [token]) for token in text[:8]])
        same = torch.equal(lm.step(drafted, text[:1], TokenTree.chain(text[1:8])), rows)
        bench.check(f"{model.name}: a token has the same bits alone and in a draft", same)
        del alone, drafted  # whose rows are free again
    caches = [lm.new_cache(bench.capacity) for _ in range(3)]
    for i, each in enumerate(caches):
        lm.step(each, tokens(10 + 9 * i, i), **model.states(10 + 9 * i))
    singly = []
    for each in caches:
        singly.append(lm.step(each, [3], TREE, **one))
        each.rollback(each.length - 6)
    shared = lm.step_many([Pass(each, [3], TREE, **one) for each in caches])
    similar = min(
        float(torch.cosine_similarity(a.double(), b.double(), dim=-1).min())
        for a, b in zip(singly, shared, strict=True)
    )
    bench.check(f"{model.name}: sessions in one pass", similar > limit, f"cosine {similar:.6f}")


def check_noise(bench: Bench) -> None:
    seeds, places = [0, 7, (1 << 64) - 1], [0, 5, 1 << 33]
    found = gpu_noise.uniform(
        torch.tensor([gpu_noise.signed(seed) for seed in seeds], device=bench.device),
        COUPLED,
        torch.tensor(places, device=bench.device),
        5000,
    ).cpu()
    expected = np.stack([_uniform(s, COUPLED, p, 5000) for s, p in zip(seeds, places, strict=True)])
    bench.check("noise: the bits of NumPy", bool((found.numpy() == expected).all()))


# ---- times


def passes(bench: Bench, model: Loaded, how: str, peer: bool) -> None:
    """A pass of the target: verification of a chain, launch to verdict."""
    lm = model.lm
    for context in bench.contexts:
        if not bench.time_left(f"{model.name}, {how}, context {context}"):
            return
        text = tokens(context + 32)
        cache, past = lm.new_cache(bench.capacity), None
        lm.step(cache, text[:context])
        if peer and context < 8192:
            past = model.hf(torch.tensor([text[:context]], device=bench.device), use_cache=True).past_key_values
        for size in bench.sizes:
            fed = text[context : context + size]
            chain = TokenTree.chain(fed[1:])

            def step(
                cache: Any = cache, fed: list[int] = fed, chain: TokenTree = chain, context: int = context
            ) -> None:
                cache.rollback(context)
                lm.step(cache, fed[:1], chain, then=Walk(GREEDY))

            def library(past: Any = past, fed: list[int] = fed, context: int = context) -> None:
                if beyond := past.get_seq_length() - context:
                    past.crop(-beyond)
                fed_ids = torch.tensor([fed], device=bench.device)
                model.hf(fed_ids, past_key_values=past, use_cache=True).logits.argmax(-1).cpu()

            ms, floor = bench.ms(step), model.floor(bench, context)
            cache.rollback(context)
            shape = lm._shape([Pass(cache, fed[:1], chain, then=Walk(GREEDY))])
            device = bench.device_ms(cache.pool.programs[shape]._run)
            values = {"ms": ms, "device": device, "floor": floor, "ms / floor": ms / floor}
            if past is not None and size in (1, 8):
                values["transformers"] = bench.ms(library, 5)
            bench.row("pass", model=model.name, how=how, context=context, tokens=size, **values)


def chains(bench: Bench, model: Loaded, how: str) -> None:
    lm, context = model.lm, bench.contexts[0]
    text, cache = tokens(context + 1), lm.new_cache(bench.capacity)
    lm.step(cache, text[:context], **model.states(context))
    for sampling in (GREEDY, Sampling(temperature=0.8, seed=7)):
        for gamma in bench.gammas:
            if not bench.time_left(f"{model.name}, {how}, draft chain of {gamma}"):
                return
            work = Pass(cache, text[context:], then=model.propose(sampling, gamma - 1), **model.states(1))

            def draft(work: Pass = work) -> None:
                cache.rollback(context)
                lm.step_many([work])

            ms, floor = bench.ms(draft), gamma * model.floor(bench, context)
            cache.rollback(context)
            device = bench.device_ms(cache.pool.programs[lm._shape([work])]._run)
            kind = "greedy" if sampling.greedy else "coupled"
            bench.row(
                "draft chain", model=model.name, how=how, sampling=kind, gamma=gamma, ms=ms, device=device,
                host=ms - device, floor=floor, **{"ms / floor": ms / floor},
            )  # fmt: skip


def rounds(
    target: GpuLM, draft: GpuLM, prompt: Sequence[int], gamma: int, capacity: int
) -> Iterator[tuple[list[int], int]]:
    """What each round adds to the text, and how many of it were drafted. Greedy, chains."""
    text = list(prompt)
    caches = [lm.new_cache(capacity) for lm in (target, draft)]
    target.step(caches[0], text[:-1])
    draft.step(caches[1], text[:-1])
    while True:
        tree = TokenTree()
        if gamma:
            fed = text[caches[1].length :]
            ranked = draft.step(caches[1], fed, then=Propose(GREEDY, draft.vocab_size, steps=gamma - 1))
            tree = TokenTree.chain([best.token_ids[0] for best, _ in ranked])
        verdict = target.step(caches[0], text[caches[0].length :], tree, then=Walk(GREEDY))
        new = [*(tree.token_ids[node] for node in verdict.path), verdict.next_token]
        text += new
        caches[1].rollback(min(caches[1].length, len(text) - 1))
        yield new, len(verdict.path)


def round_times(bench: Bench, target: Loaded, draft: Loaded, how: str) -> None:
    for gamma in (2, 4):
        if not bench.time_left(f"round of gamma {gamma}, {how}"):
            return
        running = rounds(target.lm, draft.lm, tokens(bench.contexts[0]), gamma, bench.capacity)
        ms = bench.ms(lambda running=running: next(running))  # type: ignore[misc]
        floor = target.floor(bench, bench.contexts[0]) + gamma * draft.floor(bench, bench.contexts[0])
        pair = f"{target.name} + {draft.name}"
        bench.row("round", pair=pair, how=how, gamma=gamma, ms=ms, floor=floor, **{"ms / floor": ms / floor})


def end_to_end(bench: Bench, target: Loaded, draft: Loaded, gamma: int) -> None:
    """A whole text, beside transformers. Of random weights a draft of another model is never right, one of the target's
    own weights always: between them are all real pairs."""
    prompt, count = tokens(bench.contexts[0]), 4 if bench.tiny else 64
    pair = f"{target.name} + {draft.name if draft.hf is not target.hf else 'itself'}"
    ids = torch.tensor([prompt], device=bench.device)
    common = {"do_sample": False, "min_new_tokens": count, "max_new_tokens": count, "attention_mask": ids * 0 + 1}

    def ours(gamma: int) -> tuple[list[int], float]:
        text: list[int] = []
        accepted = 0
        made = 0
        for new, right in rounds(target.lm, draft.lm, prompt, gamma, bench.capacity):
            text, accepted, made = text + new, accepted + right, made + 1
            if len(text) >= count:
                return text[:count], accepted / max(made * gamma, 1)
        raise AssertionError

    def library(assistant: Any) -> list[int]:
        arguments = {} if assistant is None else {"assistant_model": assistant}
        found: list[int] = target.hf.generate(ids, **common, **arguments)[0, len(prompt) :].tolist()
        return found

    draft.hf.generation_config.num_assistant_tokens = gamma
    draft.hf.generation_config.num_assistant_tokens_schedule = "constant"
    draft.hf.generation_config.assistant_confidence_threshold = 0.0
    texts: dict[str, list[int]] = {}
    for who, call in {
        "gamma 0": lambda: ours(0)[0],
        f"gamma {gamma}": lambda: ours(gamma)[0],
        "transformers generate": lambda: library(None),
        "transformers assisted": lambda: library(draft.hf),
    }.items():
        if not bench.time_left(f"end to end, {pair}, {who}"):
            continue
        try:
            texts[who] = call()
            bench.synchronize()
            began = time.perf_counter()
            call()
            bench.synchronize()
            ms = (time.perf_counter() - began) * 1e3 / count
        except Exception as error:  # what the library cannot do is said
            bench.row("left out", what=f"end to end, {pair}, {who}", why=f"{type(error).__name__}: {error}")
            continue
        rate = ours(gamma)[1] if who == f"gamma {gamma}" else ""
        bench.row("end to end", pair=pair, who=who, **{"ms a token": ms, "acceptance rate": rate})
    if {"gamma 0", f"gamma {gamma}"} <= texts.keys():
        both = zip(texts["gamma 0"], texts[f"gamma {gamma}"], strict=True)
        same = next((i for i, (a, b) in enumerate(both) if a != b), count)
        bench.check(f"{pair}: gamma {gamma} writes what gamma 0 writes", same == count, f"{same} tokens alike")


def measure(bench: Bench, compiles: bool) -> None:
    """Plain graphs first, as compiling may take long."""
    bench.measure_bandwidth()
    check_noise(bench)
    loaded = {name: load(bench, name) for name in SHAPES}
    small, large = loaded.values()
    head = loaded["head"] = load_head(bench, large)
    for model in loaded.values():
        check(bench, model)
        if model is not head:
            passes(bench, model, "graphs", peer=True)
        chains(bench, model, "graphs")
    round_times(bench, large, small, "graphs")
    end_to_end(bench, small, small, 4)
    end_to_end(bench, large, small, 4)
    if not compiles:
        return
    for model in loaded.values():
        model.lm = None  # its joined matrices go before the next are made
        model.lm = model.engine(compiles=True)
        roles = {"0.5B": (False, True), "7B": (False,)}.get(model.name, (True,))
        for drafts in roles:
            if bench.time_left(f"compiling {model.name}"):
                began = time.perf_counter()
                model.lm.prepare(bench.capacity, 4, drafts=drafts)
                what = f"compiling {model.name} for {'drafts' if drafts else 'verification'}, s"
                bench.row("machine", what=what, value=time.perf_counter() - began)
        bench.check(f"{model.name}: compiled", model.lm.runtime.recorder.compiles)
        check(bench, model)
        if model is not head:
            passes(bench, model, "compiled", peer=False)
        if True in roles:
            chains(bench, model, "compiled")
    round_times(bench, large, small, "compiled")


def markdown(result: dict[str, Any]) -> str:
    """The tables of a result."""
    tables = {**result["tables"], "checks": result["checks"]}
    parts = [f"# {result['device']}, torch {result['torch']}, transformers {result['transformers']}"]
    for name, rows in tables.items():
        columns = list(dict.fromkeys(key for row in rows for key in row))
        lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
        lines += [f"| {' | '.join(str(row.get(column, '')) for column in columns)} |" for row in rows]
        parts += [f"## {name}", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda | cpu (default: cuda)")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to rehearse the script")
    parser.add_argument("--seconds", type=float, default=450, help="after which nothing new is begun (default: 450)")
    parser.add_argument("--output", type=Path, default=Path(), help="folder for gpu.json and gpu.md (default: here)")
    parser.add_argument("--no-compile", action="store_true", help="plain graphs alone")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    device = torch.device(args.device)
    args.output.mkdir(parents=True, exist_ok=True)
    bench = Bench(device, args.tiny, args.seconds, args.output)
    with torch.no_grad():
        measure(bench, compiles=device.type == "cuda" and not args.no_compile)
    return 0 if all(each["passed"] for each in bench.checks) else 1


if __name__ == "__main__":
    sys.exit(main())
