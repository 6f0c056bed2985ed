# What a job is told: one file with the settings that decide its result, one with those that only operate it; and for
# each rule one with what else decides its result.


rule settings:
    """What decides results. Written anew, and so run again what reads it, when it is missing or should say something else."""
    input:
        lambda wildcards: DECIDED.make_again(workflow, wildcards.decides),
    output:
        "results/{decides}",
    log:
        "results/logs/{decides}.log",
    wildcard_constraints:
        decides="|".join(map(re.escape, DECIDED.decides)),
    localrule: True
    conda:
        "../../envs/specsplit.yaml"
    params:
        content=lambda wildcards: DECIDED.content(wildcards.decides),
    shell:
        "printf '%s\\n' {params.content:q} > {output:q} 2> {log:q}"


rule operation:
    """How a job is operated. Kept, for Snakemake heeds the ancient() of those who read it only of files that exist."""
    input:
        lambda wildcards: DECIDED.make_again(workflow, wildcards.operates),
    output:
        "results/{operates}",
    log:
        "results/logs/{operates}.log",
    wildcard_constraints:
        operates="|".join(map(re.escape, DECIDED.operates)),
    localrule: True
    conda:
        "../../envs/specsplit.yaml"
    params:
        content=lambda wildcards: DECIDED.content(wildcards.operates),
    shell:
        "printf '%s\\n' {params.content:q} > {output:q} 2> {log:q}"
