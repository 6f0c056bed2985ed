# What was run, on what, with what: the record that belongs to the tables, and the archive of it all.


rule provenance:
    """The record of how the results were made, and the changes of the code that no commit has."""
    input:
        config="results/provenance/config.json",
        runs=PLAN.run_files("run.json"),
        models=expand("resources/models/{model}/model.json", model=PLAN.models),
        settings=settings_files(*PLAN.points),
        dataset="results/dataset/manifest.json",
        prompts="results/dataset/prompts.jsonl",
        tables=rules.merge.output,
        texts=PLAN.run_files("outputs.jsonl"),
        decided=decided_by("provenance", code=["provenance record"]),
    output:
        record=report("results/provenance/provenance.json", caption="../report/provenance.rst", category="Record"),
        patch="results/provenance/changes.patch",
    log:
        "results/logs/provenance.log",
    localrule: True
    conda:
        "../../envs/specsplit.yaml"
    shell:
        "specsplit provenance record --config {input.config:q} --runs {input.runs:q}"
        " --models {input.models:q} --dataset {input.dataset:q} --output {output.record:q} --patch {output.patch:q}"
        " --results {input.prompts:q} {input.settings:q} {input.tables:q} {input.texts:q} > {log:q} 2>&1"


rule archive:
    """All that was made, the code and the logs, without the weights: a Workflow Run RO-Crate."""
    input:
        results=[
            *PLAN.result_files(),
            *[f"results/{name}" for name in ("summary.csv", "summary_by_category.csv", "report.html")],
            *[f"results/settings/rules/{name}.json" for name in ("summary", "report")],
        ],
        beside=beside_the_sweep,
        # Made again after every run, without another result.
        seal=ancient("results/provenance/SHA256SUMS"),
        manifest=ancient("results/provenance/manifest.json"),
        models=expand("resources/models/{model}/model.json", model=PLAN.models),
        code=[local(path) for path in files.project_files(PROJECT, capture.WORKFLOW_FILES)],
    output:
        "results/archive.zip",
    log:
        "results/logs/archive.log",
    localrule: True
    conda:
        "../../envs/specsplit.yaml"
    shell:
        "specsplit provenance archive --output {output:q} {input.results:q} {input.beside:q}"
        " {input.models:q} > {log:q} 2>&1"
