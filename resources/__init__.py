"""Resources: what is injected into the assets: thin wrappers around rsft_pipeline and MLflow."""
