# Simulated models behind real workers: every pipeline mode at several round trips, measured beside its formula.


rule theory_check:
    output:
        table=more_table("theory_check"),
        figures=["results/figures/theory_check.png", figure_output("theory_check", "Figures")],
    log:
        "results/logs/theory_check.log",
    conda:
        "../../envs/specsplit.yaml"
    # It measures times, so nothing may run beside it.
    threads: EVERY_CORE
    params:
        code=code_of("theory-check"),
    shell:
        "specsplit theory-check --output {output.table} --figure {output.figures[0]} > {log} 2>&1"
