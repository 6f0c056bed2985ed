# One draft and one target worker for all runs, started in the background or attached to.
#
# service() is not used: it would start every run at once and group them with the workers. The endpoint file is a
# temp() output: Snakemake deletes it after the last run, and the worker stops because its file is gone. It stops as
# well when this workflow is gone, Ctrl-C and SIGKILL included.


def worker_model(wildcards):
    return f"resources/models/{config[wildcards.role]['model']}/model.json"


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
        model=worker_model,
    output:
        endpoint=temp("results/workers/{role}.json"),
    log:
        start="results/logs/start_worker/{role}.log",
        worker="results/logs/workers/{role}.log",
    conda:
        "../../envs/specsplit.yaml"
    params:
        worker=worker_flags,
        management=worker_management,
    shell:
        "specsplit start-worker {wildcards.role} --model {input.model} --endpoint-file {output.endpoint}"
        " --worker-log {log.worker} {params.worker} {params.management} > {log.start} 2>&1"
