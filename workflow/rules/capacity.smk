# Many clients at once through the same workers: results/capacity.csv.


rule benchmark_capacity:
    input:
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
    resources:
        faults=fault_settings(),
    params:
        settings=flags(
            clients=config["capacity"]["clients"],
            gamma=config["capacity"]["gammas"],
            mode=config["capacity"]["mode"],
            requests=config["capacity"]["requests"],
            fan_out=config["lookahead"]["fan_out"],
            draft_name=FIRST_DRAFT,
            **text_settings(),
        ),
        # Not used by the command: other workers, other results.
        workers=[worker_settings(role, label) for label in CAPACITY for role in run_roles(label)],
        tokenizer=lambda wildcards: TARGET_FOLDER,
        code=code_of("capacity"),
    shell:
        "specsplit capacity --only --prompts {input.prompts} --results-dir results"
        " --workers-dir results/workers/capacity --tokenizer {params.tokenizer} {params.settings} {resources.faults} > {log} 2>&1"


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
        settings=dict(tpot_limit_ms=config["capacity"]["tpot_limit_ms"]),
        code=code_of(script="capacity.py"),
    script:
        "../scripts/capacity.py"
