# Ours, Hugging Face's and llama.cpp's decoding on the same prompts, request by request in turn: results/peers.csv.


rule race_peers:
    """The rows of the race. All workers and the processes of the peers are loaded, and one of them computes."""
    input:
        **measured_with("race", PLAN.raced),
        target=PLAN.target,
        decided=decided_by("race_peers", code=["bench", "race"]),
        draft=f"resources/models/{PLAN.drafts[PLAN.first_draft]['model']}/model.json",
    output:
        requests="results/peers_requests.csv",
        run="results/peers_run.json",
    log:
        "results/logs/race_peers.log",
    conda:
        "../../envs/specsplit.yaml"
    threads: EVERY_CORE
    resources:
        gpu=PLAN.own_gpu,
    params:
        folder=lambda wildcards, output: os.path.dirname(output.requests),
    shell:
        "specsplit bench --only --settings {input.settings:q} {input.operation:q}"
        " --prompts {input.prompts:q} --results-dir {params.folder:q} --workers-dir {params.folder:q}/workers/race"
        " --target-model {input.target:q} --draft-model {input.draft:q} > {log:q} 2>&1"


rule peers:
    """The table and the figure of the race."""
    input:
        requests="results/peers_requests.csv",
        run="results/peers_run.json",
        decided=decided_by("peers", INTERVALS, code=["peers-table"]),
    output:
        table_output("peers"),
        "results/figures/peers.png",
        figure_output("peers"),
    log:
        "results/logs/peers.log",
    localrule: True
    conda:
        "../../envs/specsplit.yaml"
    params:
        folder=lambda wildcards, input: os.path.dirname(input.requests),
        settings=INTERVALS,
    shell:
        "specsplit peers-table --results-dir {params.folder:q} {params.settings} > {log:q} 2>&1"
