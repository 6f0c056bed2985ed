# Ours, Hugging Face's and llama.cpp's decoding on the same prompts, request by request in turn: results/peers.csv.


# Every core, as a run. All workers and the processes of the peers are loaded, and one of them computes.
rule race_peers:
    input:
        settings=settings_files("race"),
        operation=operation_file("race"),
        workers=settings_files(*RACED),
        endpoints=lambda wildcards: endpoints_of(RACED),
        prompts="results/dataset/prompts.jsonl",
        models=models_of(RACED)[0],
        layers=models_of(RACED)[1],
    output:
        requests="results/peers_requests.csv",
        run="results/peers_run.json",
    log:
        "results/logs/race_peers.log",
    conda:
        "../../envs/specsplit.yaml"
    threads: EVERY_CORE
    params:
        models=flags(
            target_model=TARGET_FOLDER,
            draft_model=f"resources/models/{DRAFTS[FIRST_DRAFT]['model']}",
        ),
        code=code_of("bench", "race"),
    shell:
        "specsplit bench --only --settings {input.settings} {input.operation} --prompts {input.prompts} --results-dir results"
        " --workers-dir results/workers/race {params.models} > {log} 2>&1"


rule peers:
    input:
        requests="results/peers_requests.csv",
        run="results/peers_run.json",
    output:
        more_table("peers"),
        "results/figures/peers.png",
        figure_output("peers", "Figures"),
    log:
        "results/logs/peers.log",
    conda:
        "../../envs/specsplit.yaml"
    params:
        settings=dict(
            confidence=config["statistics"]["confidence"],
            bootstrap_samples=config["statistics"]["bootstrap_samples"],
            seed=config["seed"],
        ),
        code=code_of(script="peers.py"),
    script:
        "../scripts/peers.py"
