# The prompts.


if PLAN.dataset_flags:

    rule fetch_dataset:
        """A standard set or a dataset of the Hub, which dataset.name or dataset.huggingface names."""
        input:
            decided=decided_by("fetch_dataset", PLAN.dataset_flags, code=["fetch-dataset"]),
        output:
            prompts=DATASET,
            facts=os.path.splitext(DATASET)[0] + ".json",
        log:
            "results/logs/fetch_dataset.log",
        conda:
            "../../envs/specsplit.yaml"
        params:
            flags=PLAN.dataset_flags,
        shell:
            "specsplit fetch-dataset {params.flags} --output {output.prompts:q} > {log:q} 2>&1"


PROMPT_FLAGS = flags(
    columns=json.dumps(config["dataset"]["columns"]),
    turns=config["dataset"]["turns"],
    limit=config["dataset"]["limit"],
    on_bad_line=config["dataset"]["on_bad_line"],
    date=config["dataset"]["date"],
    use_chat_template=config["generation"]["use_chat_template"],
)


rule prepare_dataset:
    """The slice of the prompts that is run, checked, with the token ids that the target gets, the same in every run; the
    manifest says which, from what, and what was not taken."""
    input:
        prompts=lambda wildcards: (
            [] if files.lost(DATASET, f"{ROOT}results/dataset/prompts.jsonl", workflow.rules) else local(DATASET)
        ),
        tokenizer=PLAN.target,
        decided=decided_by("prepare_dataset", DATASET, PROMPT_FLAGS, prompts_content, code=["prepare-dataset"]),
    output:
        prompts="results/dataset/prompts.jsonl",
        manifest="results/dataset/manifest.json",
    log:
        "results/logs/prepare_dataset.log",
    localrule: True
    conda:
        "../../envs/specsplit.yaml"
    params:
        source=DATASET,
        flags=PROMPT_FLAGS,
    shell:
        "specsplit prepare-dataset --source {params.source:q} --tokenizer {input.tokenizer:q} --output {output.prompts:q}"
        " --manifest {output.manifest:q} {params.flags} > {log:q} 2>&1"
