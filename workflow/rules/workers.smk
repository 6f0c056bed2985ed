# One draft and one target worker for all runs, started in the background or attached to.
#
# service() is not used: it would start every run at once and group them with the workers. Each run has endpoint files
# of its own, temp() outputs that Snakemake deletes after the run; runs share a worker with the same flags, which
# stops when the last of its endpoint files is gone. So a new gamma starts workers for itself alone and makes no
# finished run out of date. Workers stop as well when this workflow is gone, by Ctrl-C and SIGKILL too.


def worker_model(role):
    return f"resources/models/{config[role]['model']}/model.json"


def worker_flags(wildcards):
    workers, role = config["workers"], config[wildcards.role]
    return flags(
        dtype=role["dtype"],
        skip_layers=role.get("skip_layers"),
        device=workers["device"],
        threads=workers["threads"],
        max_context=workers["max_context"],
        seed=config["seed"],
    )


def worker_management(wildcards):
    """What does not change a result, so that a change reruns nothing."""
    workers = config["workers"]
    address = (
        os.environ.get(f"SPECSPLIT_ORCH_{wildcards.role.upper()}_ADDRESS")
        or workers[f"{wildcards.role}_address"]
    )
    return flags(
        max_sessions=workers["max_sessions"],
        session_ttl_s=workers["session_ttl_s"],
        startup_timeout_s=workers["startup_timeout_s"],
        attach=address,
    )


rule start_worker:
    input:
        model=lambda wildcards: worker_model(wildcards.role),
    output:
        endpoint=temp("results/workers/gamma_{gamma}/{role}.json"),
    log:
        "results/logs/start_worker/gamma_{gamma}_{role}.log",
    # All before the first run: a run whose workers still serve need not load them again.
    priority: 10
    conda:
        "../../envs/specsplit.yaml"
    params:
        worker=worker_flags,
        management=worker_management,
    shell:
        "specsplit start-worker {wildcards.role} --model {input.model} --endpoint-file {output.endpoint}"
        " --pool results/workers/.pool --worker-log results/logs/workers/{wildcards.role}.log"
        " {params.worker} {params.management} > {log} 2>&1"
