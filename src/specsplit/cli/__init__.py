"""The subcommands of `specsplit`, one module each; `main` imports that of the command it runs.

Modules import what is heavy inside their functions, so that --help is quick. What `--only` leaves out is imported by
`import_module`: it decides nothing of what the workflow's rule of the command makes (see specsplit.provenance.closure).
"""
