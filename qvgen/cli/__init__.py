"""Commands that need no project: `qvgen` has them wherever it is installed. Those of a project are in pipelines/cli."""
