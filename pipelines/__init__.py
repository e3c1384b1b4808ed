"""The `qvgen` command, and everything above single stages: running the graph, the champion, the audit.

It runs in a checkout, which it reads through DVC, and is not installed with the library.
"""
