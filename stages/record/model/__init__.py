"""A packed model in MLflow: its version in the registry (version), and its files there (upload)."""
