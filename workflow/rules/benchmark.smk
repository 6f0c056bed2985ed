# One run per gamma. A run takes every core, so that timing runs never overlap, whatever --cores says.


def run_roles(wildcards):
    """Gamma 0 is the target alone."""
    return ROLES if int(wildcards.gamma) else ["target"]


def run_settings(wildcards):
    """Everything that decides a run's results; a change of it reruns the run."""
    target_worker = {
        k: config["workers"][k] for k in ("device", "threads", "max_context")
    }
    generation, gamma = config["generation"], int(wildcards.gamma)
    return {
        "bench": flags(
            max_output_tokens=generation["max_output_tokens"],
            max_rounds=generation["max_rounds"],
            use_chat_template=generation["use_chat_template"],
            ignore_eos=generation["ignore_eos"],
            branching=config["tree"]["branching"] if gamma else None,
            warmup=config["warmup_requests"],
            seed=config["seed"],
        ),
        "models": json.dumps(
            [config["target"], config["draft"] if gamma else None, target_worker],
            sort_keys=True,
        ),
    }


rule benchmark:
    input:
        endpoints=lambda wildcards: [
            f"results/workers/gamma_{wildcards.gamma}/{role}.json"
            for role in run_roles(wildcards)
        ],
        prompts="results/dataset/prompts.jsonl",
        models=lambda wildcards: unique(
            worker_model(role) for role in run_roles(wildcards)
        ),
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
        addresses=lambda wildcards, input: flags(
            **{f"{Path(endpoint).stem}_addr": endpoint for endpoint in input.endpoints}
        ),
        settings=run_settings,
        tokenizer=f"resources/models/{config['target']['model']}",
    shell:
        "specsplit bench --only --gamma {wildcards.gamma} --prompts {input.prompts} --results-dir results"
        " --tokenizer {params.tokenizer} {params.addresses} {params.settings[bench]} > {log} 2>&1"
