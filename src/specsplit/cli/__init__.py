"""Subcommands of `specsplit`. Modules import what is heavy inside their functions, so that --help is quick."""
