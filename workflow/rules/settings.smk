# What a job is told: one file with the settings that decide its result, one with those that only operate it.


# Written anew, and so run again what reads it, when a setting in it changes.
rule settings:
    output:
        "results/settings/{job}/settings.json",
    log:
        "results/logs/settings/{job}.log",
    conda:
        "../../envs/specsplit.yaml"
    params:
        content=lambda wildcards: settings_content(wildcards.job, operates=False),
    shell:
        "printf '%s\\n' {params.content:q} > {output} 2> {log}"


# Read as ancient(): a change of it reruns nothing. It is kept, for Snakemake heeds ancient() only of files that exist.
rule operation:
    output:
        "results/settings/{job}/operation.json",
    log:
        "results/logs/settings/{job}_operation.log",
    conda:
        "../../envs/specsplit.yaml"
    params:
        content=lambda wildcards: settings_content(wildcards.job, operates=True),
    shell:
        "printf '%s\\n' {params.content:q} > {output} 2> {log}"
