# Where the time goes: of the rounds of the sweep, of rounds whose models take none, with the length of the context, and
# with hidden states on the network.


rule profile:
    """The parts of a round's time, from the rows of the sweep: the table and the figure."""
    input:
        requests="results/requests.csv",
        rounds="results/per_round.csv",
        decided=decided_by("profile", code=["profile"]),
    output:
        table_output("profile"),
        "results/figures/profile.png",
        figure_output("profile"),
    log:
        "results/logs/profile.log",
    localrule: True
    conda:
        "../../envs/specsplit.yaml"
    params:
        folder=lambda wildcards, input: os.path.dirname(input.requests),
    shell:
        "specsplit profile --results-dir {params.folder:q} > {log:q} 2>&1"


rule overhead:
    """What a round costs beside its models: simulated models that take no time, behind real workers."""
    input:
        decided=decided_by("overhead", code=["overhead"]),
    output:
        table=table_output("overhead"),
        run="results/overhead_run.json",
    log:
        "results/logs/overhead.log",
    conda:
        "../../envs/specsplit.yaml"
    threads: EVERY_CORE
    shell:
        "specsplit overhead --output {output.table:q} > {log:q} 2>&1"


rule context_curve:
    """What a token costs against the length of its context: the table and the figure."""
    input:
        **measured_with("context", PLAN.context),
        decided=decided_by("context_curve", code=["context-curve"]),
    output:
        table=table_output("context_curve"),
        run="results/context_curve_run.json",
        figures=["results/figures/context_curve.png", figure_output("context_curve")],
    log:
        "results/logs/context_curve.log",
    conda:
        "../../envs/specsplit.yaml"
    threads: EVERY_CORE
    params:
        folder=lambda wildcards, output: os.path.dirname(output.table),
    shell:
        "specsplit context-curve --settings {input.settings:q} {input.operation:q}"
        " --prompts {input.prompts:q} --output {output.table:q} --figure {output.figures[0]:q}"
        " --workers-dir {params.folder:q}/workers/context > {log:q} 2>&1"


rule hidden_states:
    """What it costs to ship hidden states to a draft that reads them: the table and the figure."""
    input:
        **measured_with("states_cost", PLAN.compared, PLAN.compared_endpoints),
        decided=decided_by("hidden_states", code=["states-cost"]),
    output:
        table=table_output("hidden_states"),
        run="results/hidden_states_run.json",
        figures=["results/figures/hidden_states.png", figure_output("hidden_states")],
    log:
        "results/logs/hidden_states.log",
    conda:
        "../../envs/specsplit.yaml"
    threads: EVERY_CORE
    params:
        folder=lambda wildcards, output: os.path.dirname(output.table),
    shell:
        "specsplit states-cost --settings {input.settings:q} {input.operation:q}"
        " --prompts {input.prompts:q} --output {output.table:q} --figure {output.figures[0]:q}"
        " --workers-dir {params.folder:q}/workers/states_cost > {log:q} 2>&1"
