# With draft.skip_layers auto: the layers that the draft does without, chosen on prompts that are not measured.


rule calibration_prompts:
    input:
        prompts=config["dataset"]["path"],
        measured="results/dataset/prompts.jsonl",
    output:
        "results/dataset/calibration.jsonl",
    log:
        "results/logs/calibration_prompts.log",
    conda:
        "../../envs/specsplit.yaml"
    params:
        settings=dict(
            limit=config["draft"]["calibration_prompts"],
            on_bad_line=config["dataset"]["on_bad_line"],
            columns=config["dataset"]["columns"],
        ),
        code=code_of(script="calibration_prompts.py"),
    script:
        "../scripts/calibration_prompts.py"


# Every core, as a run: it must not run beside one.
rule pick_layers:
    input:
        settings=settings_files("layers/{draft}"),
        model=lambda wildcards: f"resources/models/{DRAFTS[wildcards.draft]['model']}/model.json",
        prompts="results/dataset/calibration.jsonl",
    output:
        "results/skip_layers/{draft}.json",
    log:
        "results/logs/pick_layers/{draft}.log",
    conda:
        "../../envs/specsplit.yaml"
    threads: EVERY_CORE
    params:
        code=code_of("pick-layers"),
    shell:
        "specsplit pick-layers --settings {input.settings} --model {input.model} --prompts {input.prompts}"
        " --output {output} > {log} 2>&1"
