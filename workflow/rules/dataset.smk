# The prompts.


rule prepare_dataset:
    """The slice of the prompts that is run, checked; the manifest says which, from what, and what was skipped."""
    input:
        prompts=lambda wildcards: local(DATASET),
    output:
        prompts="results/dataset/prompts.jsonl",
        manifest="results/dataset/manifest.json",
    log:
        "results/logs/prepare_dataset.log",
    localrule: True
    conda:
        "../../envs/specsplit.yaml"
    params:
        flags=flags(limit=config["dataset"]["limit"], on_bad_line=config["dataset"]["on_bad_line"]),
        sha256=lambda wildcards: content_of([Path(DATASET)]),
        code=code_of("prepare-dataset"),
    shell:
        "specsplit prepare-dataset --source {input.prompts:q} --output {output.prompts:q}"
        " --manifest {output.manifest:q} {params.flags} > {log:q} 2>&1"
