# Check the prompts and take the slice that is run; the manifest says which, from what, and what was not taken.


# A standard set or a dataset of the Hub; only with dataset.name or dataset.huggingface, which decide dataset.path.
if config["dataset"]["name"] or config["dataset"]["huggingface"]:

    rule fetch_dataset:
        output:
            prompts=config["dataset"]["path"],
            facts=os.path.splitext(config["dataset"]["path"])[0] + ".json",
        log:
            "results/logs/fetch_dataset.log",
        conda:
            "../../envs/specsplit.yaml"
        params:
            flags=flags(
                name=config["dataset"]["name"],
                huggingface=(config["dataset"]["huggingface"] or {}).get("id"),
                config=(config["dataset"]["huggingface"] or {}).get("config"),
                split=(config["dataset"]["huggingface"] or {}).get("split"),
                revision=(config["dataset"]["huggingface"] or {}).get("revision"),
            ),
            code=code_of("fetch-dataset"),
        shell:
            "specsplit fetch-dataset {params.flags} --output {output.prompts:q} > {log} 2>&1"


# With the token ids that the target gets, so that every run gets the same.
rule prepare_dataset:
    input:
        prompts=config["dataset"]["path"],
        tokenizer=f"{TARGET_FOLDER}/model.json",
    output:
        prompts="results/dataset/prompts.jsonl",
        manifest="results/dataset/manifest.json",
    log:
        "results/logs/prepare_dataset.log",
    conda:
        "../../envs/specsplit.yaml"
    params:
        flags=flags(
            columns=json.dumps(config["dataset"]["columns"]),
            turns=config["dataset"]["turns"],
            limit=config["dataset"]["limit"],
            on_bad_line=config["dataset"]["on_bad_line"],
            date=config["dataset"]["date"],
            use_chat_template=config["generation"]["use_chat_template"],
        ),
        code=code_of("prepare-dataset"),
    shell:
        "specsplit prepare-dataset --source {input.prompts:q} --tokenizer {input.tokenizer} --output {output.prompts}"
        " --manifest {output.manifest} {params.flags} > {log} 2>&1"
