"""A packed model in MLflow: its version in the registry (version), its files there (upload), how MLflow loads it (flavour)."""
