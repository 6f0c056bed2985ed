# What was run, on what, with what: the record that belongs to the tables, and the archive of it all.
from specsplit.io import json_sha256


rule resolved_config:
    output:
        "results/provenance/config.json",
    log:
        "results/logs/resolved_config.log",
    conda:
        "../../envs/specsplit.yaml"
    params:
        sha256=json_sha256(config),
    script:
        "../scripts/resolved_config.py"


rule provenance:
    input:
        config="results/provenance/config.json",
        runs=run_files("run.json"),
        models=expand("resources/models/{model}/model.json", model=MODELS),
        settings=settings_files(*POINTS),
        dataset="results/dataset/manifest.json",
        prompts="results/dataset/prompts.jsonl",
        results=[
            *("results/requests.csv", "results/per_round.csv", "results/reference.csv"),
            *run_files("outputs.jsonl"),
        ],
    output:
        record=report("results/provenance/provenance.json", caption="../report/provenance.rst", category="Record"),
        patch="results/provenance/changes.patch",
    log:
        "results/logs/provenance.log",
    conda:
        "../../envs/specsplit.yaml"
    params:
        code=code_of("provenance record"),
    shell:
        "specsplit provenance record --config {input.config} --runs {input.runs} --models {input.models}"
        " --dataset {input.dataset} --results {input.prompts} {input.settings} {input.results}"
        " --output {output.record} --patch {output.patch} > {log} 2>&1"


# Jobs that came after the summary left tables and logs of their own beside it: those are sealed too.
SEAL_AGAIN = (
    "! test -f results/provenance/SHA256SUMS"
    " || specsplit provenance seal --add --output results/provenance/SHA256SUMS > /dev/null"
)


onsuccess:
    shell(SEAL_AGAIN)


onerror:
    shell(SEAL_AGAIN)


# All that was made, the code and the logs, without the weights: a Workflow Run RO-Crate.
rule archive:
    input:
        results=[*result_files(), "results/report.html", *measured_beside_the_sweep()],
        # Made again after every run, without another result.
        seal=ancient("results/provenance/SHA256SUMS"),
        manifest=ancient("results/provenance/manifest.json"),
        models=expand("resources/models/{model}/model.json", model=MODELS),
        project=[str(file) for pattern in WORKFLOW_FILES for file in sorted(Path().glob(pattern)) if file.is_file()],
        code=source_files(),
    output:
        "results/archive.zip",
    log:
        "results/logs/archive.log",
    conda:
        "../../envs/specsplit.yaml"
    shell:
        "specsplit provenance archive --output {output} {input.results} {input.models} > {log} 2>&1"
