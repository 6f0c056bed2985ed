# Fetch each model once, check it, convert it when needed; resources/models/NAME/model.json says what it is.


rule prepare_model:
    input:
        files=lambda wildcards: local_files(wildcards.model),
    output:
        "resources/models/{model}/model.json",
    log:
        "results/logs/prepare_model/{model}.log",
    conda:
        "../../envs/specsplit.yaml"
    params:
        source=lambda wildcards: model_source(wildcards.model),
        folder=lambda wildcards, output: os.path.dirname(output[0]),
        code=code_of("prepare-model"),
    shell:
        "specsplit prepare-model {params.source} --name {wildcards.model} --output {params.folder} > {log} 2>&1"
