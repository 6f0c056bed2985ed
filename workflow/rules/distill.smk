# A small draft made from the target: it writes its own training text, the draft learns its probabilities, and its
# acceptance is measured on prompts that are not in that text. Made for a GPU; config/examples/distill_test.yaml is not.


rule distill:
    """A distilled draft, with its card, its acceptance and its curves."""
    input:
        expand(
            "results/distill/{recipe}/{file}",
            recipe=config["distill"]["name"],
            file=["draft/MODEL_CARD.md", "acceptance.csv", "curves.svg"],
        ),
    localrule: True


HELD_OUT_FLAGS = flags(
    on_bad_line=config["dataset"]["on_bad_line"],
    columns=json.dumps(config["dataset"]["columns"]),
)


rule distill_write_data:
    """The text that the target writes. Shards are no outputs: Snakemake would delete what an interrupted job left."""
    input:
        settings=settings_files("distill/write_data"),
        target=PLAN.target,
        held_out=lambda wildcards: local(DATASET),
        decided=decided_by("distill_write_data", HELD_OUT_FLAGS, prompts_content, code=["distill write-data"]),
    output:
        "results/distill/{recipe}/data/manifest.json",
    log:
        "results/logs/distill/{recipe}_write_data.log",
    conda:
        "../../envs/specsplit.yaml"
    threads: EVERY_CORE
    resources:
        gpu=PLAN.own_gpu,
    params:
        flags=HELD_OUT_FLAGS,
        folder=lambda wildcards, output: os.path.dirname(output[0]),
    shell:
        "specsplit distill write-data --settings {input.settings:q} --target {input.target:q}"
        " --held-out {input.held_out:q} {params.flags} --output {params.folder:q}"
        " --terminal-fd 3 3>&2 > {log:q} 2>&1"


rule distill_train:
    """The draft; its folder has the target's tokenizer files and, for a reduced vocabulary, its map as well."""
    input:
        settings=settings_files("distill/train"),
        operation=operation_file("distill/train"),
        decided=decided_by("distill_train", code=["distill train"]),
        target=PLAN.target,
        data="results/distill/{recipe}/data/manifest.json",
    output:
        draft=multiext("results/distill/{recipe}/draft/", "config.json", "model.safetensors"),
        losses="results/distill/{recipe}/loss.csv",
        report="results/distill/{recipe}/training.json",
    log:
        "results/logs/distill/{recipe}_train.log",
    conda:
        "../../envs/specsplit.yaml"
    threads: EVERY_CORE
    resources:
        gpu=PLAN.own_gpu,
    params:
        draft=lambda wildcards, output: os.path.dirname(output.draft[0]),
    shell:
        "specsplit distill train --settings {input.settings:q} {input.operation:q} --target {input.target:q}"
        " --data {input.data:q} --name {wildcards.recipe} --output {params.draft:q} --losses {output.losses:q} --report"
        " {output.report:q} --checkpoint {params.draft:q}/../checkpoint.safetensors --terminal-fd 3 3>&2 > {log:q} 2>&1"


rule distill_measure:
    """The acceptance of the draft by position, on prompts that are not in its training text."""
    input:
        settings=settings_files("distill/measure"),
        target=PLAN.target,
        weights="results/distill/{recipe}/draft/model.safetensors",
        prompts="results/dataset/prompts.jsonl",
        decided=decided_by("distill_measure", code=["distill measure"]),
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
        gpu=PLAN.own_gpu,
    params:
        draft=lambda wildcards, input: os.path.dirname(input.weights),
    shell:
        "specsplit distill measure --settings {input.settings:q} --target {input.target:q} --draft {params.draft:q}"
        " --prompts {input.prompts:q} --output {output.acceptance:q} --rounds {output.rounds:q} --report {output.report:q}"
        " --terminal-fd 3 3>&2 > {log:q} 2>&1"


rule distill_card:
    """The model card, the hashes of the files and the curves of the training."""
    input:
        weights="results/distill/{recipe}/draft/model.safetensors",
        training="results/distill/{recipe}/training.json",
        losses="results/distill/{recipe}/loss.csv",
        acceptance="results/distill/{recipe}/acceptance.csv",
        measured="results/distill/{recipe}/acceptance.json",
        decided=decided_by("distill_card", code=["distill card"]),
    output:
        card="results/distill/{recipe}/draft/MODEL_CARD.md",
        sums="results/distill/{recipe}/draft/SHA256SUMS",
        png="results/distill/{recipe}/curves.png",
        svg=figure_output("distill", "results/distill/{recipe}/curves.svg"),
    log:
        "results/logs/distill/{recipe}_card.log",
    localrule: True
    conda:
        "../../envs/specsplit.yaml"
    params:
        draft=lambda wildcards, input: os.path.dirname(input.weights),
    shell:
        "specsplit distill card --draft {params.draft:q} --training {input.training:q} --losses {input.losses:q}"
        " --acceptance {input.acceptance:q} --measured {input.measured:q} --figure {output.png:q} > {log:q} 2>&1"
