"""The `qvgen` command. Its subcommands import what they need when they run, so that `--help` is quick."""

from pipelines.cli.everyday import app, main

__all__ = ["app", "main"]
