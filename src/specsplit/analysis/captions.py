"""Which figures and tables there are, and what to see in each; workflow/report/NAME.rst holds the same captions for
`snakemake --report`.

No imports: the workflow reads it at every start, in each job of a cluster too.
"""

from __future__ import annotations

# Figures of every sweep, and measurements beside it (tables, most with a figure), with their titles.
FIGURES = {
    "tpot": "Time between tokens",
    "acceptance_rate": "Acceptance rate",
    "ttft": "Time to first token",
    "network_idle": "Waiting for the network",
    "speculation": "Drafts made ahead that fit",
}
BY_CATEGORY = "summary_by_category"
DRAWN = (*FIGURES, BY_CATEGORY)  # what the main job draws
BESIDE = {
    BY_CATEGORY: "By category of the prompts",
    "peers": "Beside other programs' decoding",
    "capacity": "Many clients at once",
    "openai_load": "OpenAI's API under load",
    "profile": "Where the time of a round goes",
    "overhead": "A round beyond its models",
    "context_curve": "Cost of a token against its context",
    "hidden_states": "What shipping hidden states costs",
    "theory_check": "Modes beside their formulas",
}
TITLES = {**FIGURES, **BESIDE, "distill": "A draft in training"}
CAPTIONS = {
    "tpot": (
        "Time per token over the tokens after the first round (ITL), against the draft length γ. A drafted token costs "
        "time and saves time when it is accepted, so the curve has a minimum where one more costs more than it saves. "
        "The dashed line is the target alone, the dotted one the target worker that streams its tokens by itself; a "
        "cross is the same pair in one process. The time to the first token is not in it: "
        "whether whole texts are written faster is the speedup. Points are means over the requests that every "
        "configuration finished, bars their intervals; where there is one line, faint dots are single requests."
    ),
    "acceptance_rate": (
        "How much of a draft the target accepts. Above, accepted / drafted, the mean over rounds, then over requests, "
        "against γ: as a rule it falls, since a token counts only when all before it were accepted. Below, by "
        "position in the longest draft, among the rounds that got so far: a flat line means that every token is as "
        "easy to guess as the one before. Where a draft has several sources, as with prompt lookup, its line is of "
        "all of them, and later positions are more of those that are accepted for longer; summary.csv has "
        "draft_acceptance_rate_lookup and _model."
    ),
    "ttft": (
        "Time to the first token against γ: what a user waits for before anything appears. It holds the target's pass "
        "over the prompt and no draft, so γ hardly matters; on one machine the draft model reads the prompt meanwhile, "
        "on the same cores."
    ),
    "network_idle": (
        "The share of a request's latency in which neither worker did anything for it: messages under way and waiting. "
        "Longer drafts need fewer round trips, and the modes that draft ahead hide them."
    ),
    "speculation": (
        "How often a draft that was made ahead, while the round before was still verified, fitted what was accepted. "
        "Only the modes overlap and lookahead draft ahead; a hit hides the time of a whole draft."
    ),
    "summary_by_category": (
        "The same measures for each category of the prompts, for all of them together, and as the mean in which each "
        "category counts alike. Acceptance length is 1 + accepted tokens / verifications; in the table also of the "
        "rounds that begin in the first 32 tokens of the output, in the next ones up to 128, and beyond. The speedup "
        "is end to end. Bars are intervals over the prompts of a category, where there are enough of them."
    ),
    "theory_check": (
        "Simulated models behind real workers: the measured time per token of each pipeline mode beside its formula, "
        "at several round-trip times. Where points leave the lines, the system costs something that the formula lacks."
    ),
    "peers": (
        "Ours beside Hugging Face's and llama.cpp's ways to decode: the same models, prompts and machine, request by "
        "request in turn, greedy. A ratio divides the milliseconds per token of the row by those of the peer, so below "
        "1 the row is faster. Identical is the share of texts that are, token for token, those of our target alone. "
        "A peer that could not use the models is a row with the reason."
    ),
    "capacity": (
        "Several requests at once on one pair of workers: clients that each send the next request when the last one "
        "is done, or requests that arrive at a rate. Tokens per second rise as long as the workers serve requests "
        "together, and each waits longer; goodput counts only requests whose first token and time per token (ITL) "
        "stay within the limits. Where drafting stops to pay, the target alone has the higher throughput."
    ),
    "openai_load": (
        "`specsplit serve` under the load client llama-benchy: so many requests at once, and again when all of them "
        "are written. Tokens per second are of all clients together, prompts included in the time; gain is that "
        "over gamma 0 with as many clients. Prompts are drawn anew for each row, so rows are not paired."
    ),
    "profile": (
        "Where the time of a round goes: the models, waiting for other work, messages under way, the rest of the "
        "workers, the orchestrator. The parts add up to the round; what is not the models' is the price of the system."
    ),
    "overhead": (
        "What a round costs beside its models: simulated models that take no time, behind real workers, and a bare "
        "gRPC message with its answer for comparison."
    ),
    "context_curve": (
        "What a token costs as its context grows. Relative to the shortest context: where the cost stays below the "
        "length, growth is less than linear."
    ),
    "hidden_states": (
        "A head that reads the target's hidden states beside a draft that reads none, at simulated round trips "
        "and bandwidths to the target: milliseconds per token of whole texts. The states of every position cross "
        "that link once, those of the prompt in the reply with the first token, so a slow link holds the head up "
        "more than the other draft. Where its line is below the black one, the head is faster."
    ),
    "distill": (
        "A draft in training. Left, how far it is from its target, on texts that it learns from and on others; middle, "
        "how often the likeliest tokens of both are the same; right, how often the target accepts what it proposes, "
        "by position in the draft, among the rounds that got so far, on the prompts of the dataset, which it was not "
        "trained on."
    ),
    "summary": (
        "One row for each configuration, then the baselines: means with their intervals over the requests that all of "
        "them finished; speedup end to end, prefill included, against the target alone in the same run; lossless is "
        "the share of texts that are, token for token, those of the target alone. docs/results.md explains every "
        "column."
    ),
    "report": "Everything on one page: what was asked, on what machine, what came out, and whether it can be repeated.",
    "provenance": (
        "The record of the experiment: configuration, commands, times, hashes of models, data, code and results, "
        "machine, packages, and a checklist of what a reviewer would ask for."
    ),
}
