# One run per gamma. A run takes every core, so that timing runs never overlap, whatever --cores says.


rule benchmark:
    input:
        endpoints=lambda wildcards: expand(
            "results/workers/gamma_{gamma}/{role}.json", gamma=wildcards.gamma, role=run_roles(wildcards.gamma)
        ),
        prompts="results/dataset/prompts.jsonl",
        models=lambda wildcards: sorted({role_model(role) for role in run_roles(wildcards.gamma)}),
        code=source("decoding", "models", "workers", "rpc", "bench", "config.py"),
    output:
        requests="results/runs/gamma_{gamma}/requests.csv",
        rounds="results/runs/gamma_{gamma}/per_round.csv",
        texts="results/runs/gamma_{gamma}/outputs.jsonl",
        run="results/runs/gamma_{gamma}/run.json",
    log:
        "results/logs/benchmark/gamma_{gamma}.log",
    conda:
        "../../envs/specsplit.yaml"
    threads: workflow.cores or 1
    params:
        addresses=lambda wildcards, input: flags(**{f"{Path(file).stem}_addr": file for file in input.endpoints}),
        settings=lambda wildcards: run_settings(wildcards.gamma),
        # Not used by the command: other workers, other results.
        workers=lambda wildcards: [worker_settings(role) for role in run_roles(wildcards.gamma)],
        tokenizer=f"resources/models/{config['target']['model']}",
    shell:
        "specsplit bench --only --gamma {wildcards.gamma} --prompts {input.prompts} --results-dir results"
        " --tokenizer {params.tokenizer} {params.addresses} {params.settings} > {log} 2>&1"
