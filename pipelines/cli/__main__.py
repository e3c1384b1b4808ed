"""`python -m pipelines.cli`: the `qvgen` command where it is not installed."""

from pipelines.cli import main

main()
