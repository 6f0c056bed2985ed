# Draft and target workers, started in the background or attached to.
#
# service() is not used: it would start every run at once and group them with the workers. Each run has endpoint files
# of its own, temp() outputs that Snakemake deletes after the run; runs share a worker with the same flags, which
# stops when the last of its endpoint files is gone. So a new point starts workers for itself alone and makes no
# finished run out of date. Workers stop as well when this workflow is gone, by Ctrl-C and SIGKILL too.


rule start_worker:
    """A worker of a run; all are there before the first run, so that one that still serves need not load again."""
    input:
        settings=settings_files("{point}"),
        operation=operation_file("{point}"),
        model=lambda wildcards: PLAN.role_model(wildcards.role, wildcards.point),
        layers=lambda wildcards: PLAN.layers_file(wildcards.role, wildcards.point),
        other=lambda wildcards: PLAN.other_model(wildcards.role, wildcards.point),
    output:
        endpoint=temp("results/workers/{point}/{role}.json"),
    log:
        "results/logs/start_worker/{point}_{role}.log",
    priority: 10
    conda:
        "../../envs/specsplit.yaml"
    resources:
        gpu=config["workers"]["gpus"],
    params:
        results=lambda wildcards, output: folder_of(output.endpoint, f"workers/{wildcards.point}/{wildcards.role}.json"),
        dead=lambda wildcards: PLAN.worker_left_behind(wildcards.role, wildcards.point),
    shell:
        "SPECSPLIT_LEASE_PID=$PPID specsplit start-worker {wildcards.role} --settings {input.settings:q}"
        " {input.operation:q} --endpoint-file {output.endpoint:q} --pool {params.results:q}/workers/.pool"
        " --worker-log {params.results:q}/logs/workers/{wildcards.role}.log --gpus {resources.gpu} > {log:q} 2>&1"
