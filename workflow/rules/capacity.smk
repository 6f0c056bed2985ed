# Many clients at once through the same workers: results/capacity.csv.


rule benchmark_capacity:
    """The rows of the requests of many clients."""
    input:
        **measured_with("capacity", PLAN.capacity),
        decided=decided_by("benchmark_capacity", code=["capacity"]),
    output:
        requests="results/capacity_requests.csv",
        run="results/capacity_run.json",
    log:
        "results/logs/benchmark_capacity.log",
    conda:
        "../../envs/specsplit.yaml"
    threads: EVERY_CORE
    params:
        folder=lambda wildcards, output: os.path.dirname(output.requests),
    shell:
        "specsplit capacity --only --settings {input.settings:q} {input.operation:q}"
        " --prompts {input.prompts:q} --results-dir {params.folder:q} --workers-dir {params.folder:q}/workers/capacity"
        " > {log:q} 2>&1"


rule openai_load:
    """`specsplit serve` on the same workers, under a load client from PyPI: gamma 0 and the draft lengths of `capacity`."""
    input:
        **measured_with("capacity", PLAN.capacity),
        decided=decided_by("openai_load", code=["openai-load", "serve"]),
    output:
        table=table_output("openai_load"),
        run="results/openai_load_run.json",
    log:
        "results/logs/openai_load.log",
    conda:
        "../../envs/specsplit.yaml"
    threads: EVERY_CORE
    params:
        folder=lambda wildcards, output: os.path.dirname(output.table),
    shell:
        "specsplit openai-load --settings {input.settings:q} {input.operation:q}"
        " --prompts {input.prompts:q} --output {output.table:q} --workers-dir {params.folder:q}/workers/capacity"
        " > {log:q} 2>&1"


CAPACITY_FLAGS = flags(
    **{limit: config["capacity"][limit] for limit in ("tpot_limit_ms", "ttft_limit_ms")},
    confidence=config["statistics"]["confidence"],
)


rule capacity:
    """Throughput, latency and goodput against the number of clients: the table and the figure."""
    input:
        requests="results/capacity_requests.csv",
        run="results/capacity_run.json",
        decided=decided_by("capacity", CAPACITY_FLAGS, PRICES, code=["capacity-table"]),
    output:
        table_output("capacity"),
        "results/figures/capacity.png",
        figure_output("capacity"),
    log:
        "results/logs/capacity.log",
    localrule: True
    conda:
        "../../envs/specsplit.yaml"
    params:
        folder=lambda wildcards, input: os.path.dirname(input.requests),
        settings=CAPACITY_FLAGS,
        prices=PRICES,
    shell:
        "specsplit capacity-table --results-dir {params.folder:q} {params.settings} {params.prices} > {log:q} 2>&1"
