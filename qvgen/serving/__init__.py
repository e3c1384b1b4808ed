"""A packed model behind a server: limits, one video after the other, and the model that MLflow loads."""
