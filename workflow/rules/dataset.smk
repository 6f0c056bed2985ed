# Check the prompts and take the slice that is run; the manifest says which, from what, and what was skipped.


rule prepare_dataset:
    input:
        prompts=config["dataset"]["path"],
    output:
        prompts="results/dataset/prompts.jsonl",
        manifest="results/dataset/manifest.json",
    log:
        "results/logs/prepare_dataset.log",
    conda:
        "../../envs/specsplit.yaml"
    params:
        flags=flags(
            limit=config["dataset"]["limit"],
            on_bad_line=config["dataset"]["on_bad_line"],
        ),
        code=code_of("prepare-dataset"),
    shell:
        "specsplit prepare-dataset --source {input.prompts} --output {output.prompts} --manifest {output.manifest}"
        " {params.flags} > {log} 2>&1"
