"""The work of the subcommands of `qvgen`, a file or folder each; pipelines/cli only reads their options.

A command that runs the pipeline or judges its model is in pipelines/run, pipelines/champion or pipelines/audit.
"""
