"""Resources: what is injected into the assets. Thin Dagster shells around rsft_pipeline and MLflow."""
