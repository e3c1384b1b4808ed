"""Models that are not in a folder here: in MLflow's registry, by name, and the files behind them."""
