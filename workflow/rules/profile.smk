# Where the time goes: of the rounds of the sweep, of rounds whose models take none, and with the length of the context.


rule profile:
    input:
        requests="results/requests.csv",
        rounds="results/per_round.csv",
    output:
        more_table("profile"),
        "results/figures/profile.png",
        figure_output("profile", "Figures"),
    log:
        "results/logs/profile.log",
    conda:
        "../../envs/specsplit.yaml"
    params:
        code=code_of("profile"),
    shell:
        "specsplit profile --results-dir results > {log} 2>&1"


rule overhead:
    output:
        more_table("overhead"),
    log:
        "results/logs/overhead.log",
    conda:
        "../../envs/specsplit.yaml"
    threads: EVERY_CORE
    params:
        code=code_of("overhead"),
    shell:
        "specsplit overhead --output {output} > {log} 2>&1"


rule context_curve:
    input:
        settings=settings_files("context"),
        operation=operation_file("context"),
        workers=settings_files(*CONTEXT),
        endpoints=lambda wildcards: endpoints_of(CONTEXT),
        prompts="results/dataset/prompts.jsonl",
        models=models_of(CONTEXT)[0],
        layers=models_of(CONTEXT)[1],
    output:
        table=more_table("context_curve"),
        figures=["results/figures/context_curve.png", figure_output("context_curve", "Figures")],
    log:
        "results/logs/context_curve.log",
    conda:
        "../../envs/specsplit.yaml"
    threads: EVERY_CORE
    params:
        code=code_of("context-curve"),
    shell:
        "specsplit context-curve --settings {input.settings} {input.operation} --prompts {input.prompts} --output {output.table} --figure {output.figures[0]}"
        " --workers-dir results/workers/context > {log} 2>&1"
