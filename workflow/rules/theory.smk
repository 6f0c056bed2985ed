# Simulated models behind real workers: every pipeline mode at several round trips, measured beside its formula.


rule theory_check:
    """Measured times of every mode beside the formula's. It measures times, so nothing may run beside it."""
    input:
        decided=decided_by("theory_check", code=["theory-check"]),
    output:
        table=table_output("theory_check"),
        run="results/theory_check_run.json",
        figures=["results/figures/theory_check.png", figure_output("theory_check")],
    log:
        "results/logs/theory_check.log",
    conda:
        "../../envs/specsplit.yaml"
    threads: EVERY_CORE
    shell:
        "specsplit theory-check --output {output.table:q} --figure {output.figures[0]:q} > {log:q} 2>&1"
