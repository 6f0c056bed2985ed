# Models: fetched once, checked, converted when needed.


rule prepare_model:
    """A model, made ready in resources/models/NAME; its model.json says what it is and where its weights are."""
    input:
        files=lambda wildcards: [local(path) for path in PLAN.model_inputs(wildcards.model)],
        made=lambda wildcards: PLAN.model_made_from(wildcards.model),
        decided=decided_by("prepare_model/{model}", PLAN.model_flags, model_content, code=["prepare-model"]),
    output:
        "resources/models/{model}/model.json",
    log:
        "results/logs/prepare_model/{model}.log",
    localrule: True
    conda:
        "../../envs/specsplit.yaml"
    params:
        flags=lambda wildcards: PLAN.model_flags(wildcards.model),
        folder=lambda wildcards, output: os.path.dirname(output[0]),
    shell:
        "specsplit prepare-model {params.flags} --name {wildcards.model} --output {params.folder:q} > {log:q} 2>&1"
