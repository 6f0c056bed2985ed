# Many clients at once through the same workers: results/capacity.csv.


rule benchmark_capacity:
    input:
        settings=settings_files("capacity"),
        operation=operation_file("capacity"),
        workers=settings_files(*CAPACITY),
        endpoints=lambda wildcards: endpoints_of(CAPACITY),
        prompts="results/dataset/prompts.jsonl",
        models=models_of(CAPACITY)[0],
        layers=models_of(CAPACITY)[1],
    output:
        "results/capacity_requests.csv",
    log:
        "results/logs/benchmark_capacity.log",
    conda:
        "../../envs/specsplit.yaml"
    threads: EVERY_CORE
    params:
        code=code_of("capacity"),
    shell:
        "specsplit capacity --only --settings {input.settings} {input.operation} --prompts {input.prompts} --results-dir results"
        " --workers-dir results/workers/capacity > {log} 2>&1"


rule capacity:
    input:
        requests="results/capacity_requests.csv",
    output:
        more_table("capacity"),
        "results/figures/capacity.png",
        figure_output("capacity", "Figures"),
    log:
        "results/logs/capacity.log",
    conda:
        "../../envs/specsplit.yaml"
    params:
        settings=dict(
            **{limit: config["capacity"][limit] for limit in ("tpot_limit_ms", "ttft_limit_ms")},
            confidence=config["statistics"]["confidence"],
        ),
        code=code_of(script="capacity.py"),
    script:
        "../scripts/capacity.py"
