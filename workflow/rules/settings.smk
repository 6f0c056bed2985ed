# What a job is told: one file with the settings that decide its result, one with those that only operate it.


rule settings:
    """The settings that decide the result of a job; written anew, and so run again what reads it, when one changes."""
    output:
        "results/settings/{job}/settings.json",
    log:
        "results/logs/settings/{job}.log",
    localrule: True
    conda:
        "../../envs/specsplit.yaml"
    params:
        content=lambda wildcards: PLAN.settings(wildcards.job, operates=False),
    shell:
        "printf '%s\\n' {params.content:q} > {output:q} 2> {log:q}"


rule operation:
    """How a job is operated. Kept, for Snakemake heeds the ancient() of those who read it only of files that exist."""
    output:
        "results/settings/{job}/operation.json",
    log:
        "results/logs/settings/{job}_operation.log",
    localrule: True
    conda:
        "../../envs/specsplit.yaml"
    params:
        content=lambda wildcards: PLAN.settings(wildcards.job, operates=True),
    shell:
        "printf '%s\\n' {params.content:q} > {output:q} 2> {log:q}"
