# A small draft made from the target: it writes its own training text, the draft learns its probabilities, and its
# acceptance is measured on prompts that are not in that text. Made for a GPU; config/examples/distill_test.yaml is not.


rule distill:
    input:
        expand(
            "results/distill/{recipe}/{file}",
            recipe=config["distill"]["name"],
            file=["draft/MODEL_CARD.md", "acceptance.csv", "curves.svg"],
        ),


# Shards are no outputs, which Snakemake would delete before it goes on where an interrupted job was.
rule distill_write_data:
    input:
        settings=settings_files("distill/write_data"),
        target=f"{TARGET_FOLDER}/model.json",
        held_out=config["dataset"]["path"],
    output:
        "results/distill/{recipe}/data/manifest.json",
    log:
        "results/logs/distill/{recipe}_write_data.log",
    conda:
        "../../envs/specsplit.yaml"
    threads: EVERY_CORE
    resources:
        gpu=DISTILL_GPU,
    params:
        flags=flags(
            on_bad_line=config["dataset"]["on_bad_line"],
            columns=json.dumps(config["dataset"]["columns"]),
        ),
        code=code_of("distill write-data"),
        folder=lambda wildcards, output: os.path.dirname(output[0]),
    shell:
        "specsplit distill write-data --settings {input.settings} --target {input.target} --held-out {input.held_out}"
        " {params.flags} --output {params.folder}"
        " --terminal-fd 3 3>&2 > {log} 2>&1"


# The folder has the target's tokenizer files and, for a reduced vocabulary, its map as well.
rule distill_train:
    input:
        settings=settings_files("distill/train"),
        operation=operation_file("distill/train"),
        target=f"{TARGET_FOLDER}/model.json",
        data="results/distill/{recipe}/data/manifest.json",
    output:
        weights="results/distill/{recipe}/draft/model.safetensors",
        config="results/distill/{recipe}/draft/config.json",
        losses="results/distill/{recipe}/loss.csv",
        report="results/distill/{recipe}/training.json",
    log:
        "results/logs/distill/{recipe}_train.log",
    conda:
        "../../envs/specsplit.yaml"
    threads: EVERY_CORE
    resources:
        gpu=DISTILL_GPU,
    params:
        folder=lambda wildcards, output: os.path.dirname(output.weights),
        checkpoint="results/distill/{recipe}/checkpoint.safetensors",
        code=code_of("distill train"),
    shell:
        "specsplit distill train --settings {input.settings} {input.operation} --target {input.target} --data {input.data} --name {wildcards.recipe}"
        " --output {params.folder} --losses {output.losses} --report {output.report}"
        " --checkpoint {params.checkpoint}"
        " --terminal-fd 3 3>&2 > {log} 2>&1"


rule distill_measure:
    input:
        settings=settings_files("distill/measure"),
        target=f"{TARGET_FOLDER}/model.json",
        weights="results/distill/{recipe}/draft/model.safetensors",
        prompts="results/dataset/prompts.jsonl",
    output:
        acceptance="results/distill/{recipe}/acceptance.csv",
        rounds="results/distill/{recipe}/acceptance_rounds.csv",
        report="results/distill/{recipe}/acceptance.json",
    log:
        "results/logs/distill/{recipe}_measure.log",
    conda:
        "../../envs/specsplit.yaml"
    threads: EVERY_CORE
    resources:
        gpu=DISTILL_GPU,
    params:
        draft=lambda wildcards, input: os.path.dirname(input.weights),
        code=code_of("distill measure"),
    shell:
        "specsplit distill measure --settings {input.settings} --target {input.target} --draft {params.draft} --prompts {input.prompts}"
        " --output {output.acceptance} --rounds {output.rounds} --report {output.report}"
        " --terminal-fd 3 3>&2 > {log} 2>&1"


rule distill_card:
    input:
        weights="results/distill/{recipe}/draft/model.safetensors",
        training="results/distill/{recipe}/training.json",
        losses="results/distill/{recipe}/loss.csv",
        acceptance="results/distill/{recipe}/acceptance.csv",
        measured="results/distill/{recipe}/acceptance.json",
    output:
        card="results/distill/{recipe}/draft/MODEL_CARD.md",
        sums="results/distill/{recipe}/draft/SHA256SUMS",
        png="results/distill/{recipe}/curves.png",
        svg=report(
            "results/distill/{recipe}/curves.svg",
            caption="../report/distill.rst",
            category="Distillation",
            labels={"figure": "Training and acceptance"},
        ),
    log:
        "results/logs/distill/{recipe}_card.log",
    conda:
        "../../envs/specsplit.yaml"
    params:
        draft=lambda wildcards, input: os.path.dirname(input.weights),
        code=code_of("distill card"),
    shell:
        "specsplit distill card --draft {params.draft} --training {input.training} --losses {input.losses}"
        " --acceptance {input.acceptance} --measured {input.measured} --figure {output.png} > {log} 2>&1"
