# The runs of the sweep, one a point.


rule benchmark:
    """A run of the sweep with its baselines. It takes every core: timing runs never overlap, whatever --cores says."""
    input:
        settings=settings_files("{point}"),
        operation=operation_file("{point}"),
        endpoints=lambda wildcards: told(PLAN.run_endpoints, wildcards.point, workflow.non_local_exec),
        prompts="results/dataset/prompts.jsonl",
        models=lambda wildcards: PLAN.models_of([wildcards.point]),
        decided=decided_by("benchmark", code=["bench"]),
    output:
        run="results/runs/{point}/run.json",
        texts="results/runs/{point}/outputs.jsonl",
        tables=expand("results/runs/{{point}}/{name}.csv", name=["requests", "per_round", "reference"]),
    log:
        "results/logs/benchmark/{point}.log",
    conda:
        "../../envs/specsplit.yaml"
    threads: EVERY_CORE
    resources:
        gpu=config["workers"]["gpus"],
    params:
        folder=lambda wildcards, output: folder_of(output.run, f"runs/{wildcards.point}/run.json"),
    shell:
        "specsplit bench --only --settings {input.settings:q} {input.operation:q} --prompts {input.prompts:q}"
        " --results-dir {params.folder:q} --gpus {resources.gpu} --terminal-fd 3 3>&2 > {log:q} 2>&1"
