# With draft.skip_layers auto: the layers that the draft does without, chosen on prompts that are not measured.


rule calibration_prompts:
    """Prompts of the dataset that are not measured."""
    input:
        prompts=lambda wildcards: local(DATASET),
        measured="results/dataset/prompts.jsonl",
    output:
        "results/dataset/calibration.jsonl",
    log:
        "results/logs/calibration_prompts.log",
    localrule: True
    conda:
        "../../envs/specsplit.yaml"
    params:
        flags=flags(
            limit=config["draft"]["calibration_prompts"],
            on_bad_line=config["dataset"]["on_bad_line"],
            columns=json.dumps(config["dataset"]["columns"]),
        ),
        sha256=lambda wildcards: content_of([Path(DATASET)]),
        code=code_of("calibration-prompts"),
    shell:
        "specsplit calibration-prompts --source {input.prompts:q} --measured {input.measured:q}"
        " --output {output:q} {params.flags} > {log:q} 2>&1"


rule pick_layers:
    """The layers that a draft does without. It takes every core, as a run: it must not run beside one."""
    input:
        settings=settings_files("layers/{draft}"),
        model=lambda wildcards: f"resources/models/{PLAN.drafts[wildcards.draft]['model']}/model.json",
        prompts="results/dataset/calibration.jsonl",
    output:
        "results/skip_layers/{draft}.json",
    log:
        "results/logs/pick_layers/{draft}.log",
    conda:
        "../../envs/specsplit.yaml"
    threads: EVERY_CORE
    resources:
        gpu=PLAN.own_gpu,
    params:
        code=code_of("pick-layers"),
    shell:
        "specsplit pick-layers --settings {input.settings:q} --model {input.model:q}"
        " --prompts {input.prompts:q} --output {output:q} > {log:q} 2>&1"
