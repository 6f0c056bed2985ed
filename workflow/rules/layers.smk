# With draft.skip_layers auto: the layers that the draft does without, chosen on prompts that are not measured.


CALIBRATION_FLAGS = flags(
    limit=config["draft"]["calibration_prompts"],
    on_bad_line=config["dataset"]["on_bad_line"],
    columns=json.dumps(config["dataset"]["columns"]),
)


rule calibration_prompts:
    """Prompts of the dataset that are not measured."""
    input:
        prompts=lambda wildcards: local(DATASET),
        measured="results/dataset/prompts.jsonl",
        decided=decided_by("calibration_prompts", CALIBRATION_FLAGS, prompts_content, code=["calibration-prompts"]),
    output:
        "results/dataset/calibration.jsonl",
    log:
        "results/logs/calibration_prompts.log",
    localrule: True
    conda:
        "../../envs/specsplit.yaml"
    params:
        flags=CALIBRATION_FLAGS,
    shell:
        "specsplit calibration-prompts --source {input.prompts:q} --measured {input.measured:q}"
        " --output {output:q} {params.flags} > {log:q} 2>&1"


rule pick_layers:
    """The layers that a draft does without. It takes every core, as a run: it must not run beside one."""
    input:
        settings=settings_files("layers/{draft}"),
        model=lambda wildcards: f"resources/models/{PLAN.drafts[wildcards.draft]['model']}/model.json",
        prompts="results/dataset/calibration.jsonl",
        decided=decided_by("pick_layers", code=["pick-layers"]),
    output:
        "results/skip_layers/{draft}.json",
    log:
        "results/logs/pick_layers/{draft}.log",
    conda:
        "../../envs/specsplit.yaml"
    threads: EVERY_CORE
    resources:
        gpu=PLAN.own_gpu,
    shell:
        "specsplit pick-layers --settings {input.settings:q} --model {input.model:q}"
        " --prompts {input.prompts:q} --output {output:q} > {log:q} 2>&1"
