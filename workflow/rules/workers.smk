# One draft and one target worker for all runs, started in the background or attached to.
#
# service() is not used: it would start every run at once and group them with the workers. Each run has endpoint files
# of its own, temp() outputs that Snakemake deletes after the run; runs share a worker with the same flags, which
# stops when the last of its endpoint files is gone. So a new point starts workers for itself alone and makes no
# finished run out of date. Workers stop as well when this workflow is gone, by Ctrl-C and SIGKILL too.


rule start_worker:
    input:
        settings=settings_files("{point}"),
        operation=operation_file("{point}"),
        model=lambda wildcards: role_model(wildcards.role, wildcards.point),
        layers=lambda wildcards: layers_file(wildcards.role, wildcards.point),
        tokenizer=lambda wildcards: speaks_through(wildcards.role, wildcards.point),
    output:
        endpoint=temp("results/workers/{point}/{role}.json"),
    log:
        "results/logs/start_worker/{point}_{role}.log",
    # All before the first run: a run whose workers still serve need not load them again.
    priority: 10
    conda:
        "../../envs/specsplit.yaml"
    resources:
        gpu=config["workers"]["gpus"],
    shell:
        "specsplit start-worker {wildcards.role} --settings {input.settings} {input.operation}"
        " --endpoint-file {output.endpoint}"
        " --pool results/workers/.pool --worker-log results/logs/workers/{wildcards.role}.log"
        " --gpus {resources.gpu} > {log} 2>&1"
