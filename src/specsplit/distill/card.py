"""The model card of a distilled draft, and the hashes of its files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pandas import DataFrame

from specsplit.errors import counted
from specsplit.io import replace_file, sha256_file
from specsplit.provenance.folder import write_sums

CARD, SUMS = "MODEL_CARD.md", "SHA256SUMS"
USEFUL = 0.5  # greedy acceptance of the first token from which such a draft is worth keeping


def write_card(folder: Path, training: Mapping[str, Any], acceptance: DataFrame, measured: Mapping[str, Any]) -> None:
    """Write the card and `SHA256SUMS`, which names every other file of the draft's folder.

    training, measured: the reports of the steps train and measure. acceptance: the table of the latter.
    """
    replace_file(folder / CARD, card(training, acceptance, measured))
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.name != SUMS and not p.name.startswith("."))
    replace_file(folder / SUMS, write_sums({p.name: sha256_file(p) for p in files}))


def card(training: Mapping[str, Any], acceptance: DataFrame, measured: Mapping[str, Any]) -> str:
    """The text of MODEL_CARD.md."""
    data, settings = training["data"], training["settings"]
    writing = data["settings"]
    first = float(acceptance["acceptance_rate"].iloc[0]) if len(acceptance) else 0.0
    reached = (
        f"The target accepts {first:.1%} of its first tokens, greedy, on {counted(measured['prompts'], 'prompt')} that "
        f"it was not trained on (sha256 `{measured['prompts_sha256'][:16]}`), "
        f"in texts of at most {measured['max_output_tokens']} tokens."
    )
    if first < USEFUL:
        reached += f" That is below {USEFUL:g}: a trial of the recipe, not a draft to use."
    reads_states = settings["kind"] == "hidden_states"
    layers, unlike = training["layers"], "" if reads_states else "read as one, and "
    kind = (
        f"a head (EAGLE-3), {training['architecture']}: one layer that reads the hidden states of the target before "
        f"its layers {layers}; the embedding is the target's and not in the file"
        if reads_states
        else f"{training['architecture']}, layers {layers} of the target, its embeddings"
    )
    vocabulary = (
        f"the {training['vocab_size']:,} most frequent of {training['target']['vocab_size']:,} tokens; all others are "
        f"{unlike}never proposed"
        if training["vocab_size"] < training["target"]["vocab_size"]
        else "the target's"
    )
    shares = ", ".join(f"{share:.1%}" for share in training["further_agreement"])
    further = f" One token further on, and so on, from its own states: {shares}." if shares else ""
    hardware = training["hardware"]
    facts = [
        ("target", f"{training['target']['model']}, weights sha256 `{training['target']['weights_sha256']}`"),
        ("kind", kind),
        ("vocabulary", vocabulary),
        ("parameters", f"{training['parameters']:,}, saved in {settings['draft_dtype']}"),
        ("weights sha256", f"`{training['weights_sha256']}`"),
        (
            "training text",
            f"{data['texts']:,} texts, {data['answer_tokens']:,} tokens of answers, written by the target alone; "
            f"sha256 `{data['data_sha256']}`",
        ),
        (
            "written at",
            f"temperature {writing['user_temperature']:g} (user turns), "
            f"{', '.join(f'{t:g}' for t in writing['answer_temperature'])} (answers)",
        ),
        ("left out", ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in data["left_out"].items())),
        (
            "loss",
            f"KL to the {counted(writing['top_k'], 'likeliest token')} of the target and all others together"
            + (f", over {counted(settings['unroll_steps'], 'token')} drafted in a row" if reads_states else ""),
        ),
        (
            "training",
            f"{counted(settings['epochs'], 'epoch')}, {training['learnt']:,} tokens of answers passed, "
            f"{training['steps']:,} steps of {counted(settings['batch_size'], 'text')}; AdamW, "
            f"peak {settings['learning_rate']:g}, warm-up {settings['warmup_share']:g}, cosine; "
            f"weight decay {settings['weight_decay']:g}, gradients clipped at {settings['clip_norm']:g}",
        ),
        ("seed", str(settings["seed"])),
        ("hardware", hardware["name"]),
        ("software", f"torch {hardware['torch']}, transformers {hardware['transformers']}"),
        ("time", f"{data['seconds']:.0f} s to write, {training['seconds']:.0f} s to train"),
    ]
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts)
    table = "\n".join(
        f"| {r.position} | {r.reached} | {r.accepted} | {r.acceptance_rate:.3f} |" for r in acceptance.itertuples()
    )
    return f"""# {training["name"]}: a draft for speculative decoding

Distilled by SpecSplit from {training["target"]["model"]}, for it alone. {reached}

| | |
|---|---|
{rows}

Validation, on texts of the target that were not trained on: divergence {training["validation_loss"]:.3f} nats a token,
the same likeliest token at {training["validation_agreement"]:.1%} of the positions (before training
{training["untrained_agreement"]:.1%}).{further}

| position in the draft | rounds that reached it | accepted | acceptance rate |
|---|---|---|---|
{table}

A draft changes no text: the target verifies every token. Made of its weights, it is under its licence.
"""
