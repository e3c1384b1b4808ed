"""The record of a stage: a local journal first (journal, execution), then MLflow (forwarder, sender, outbox).

pipelines/ reads it: the registry, the history of its aliases, and the connection that all of them share.
"""
