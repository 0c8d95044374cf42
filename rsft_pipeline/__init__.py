"""The method of rejection-sampling fine-tuning, as plain Python: no Dagster, no MLflow."""
