"""Stage: closes the pipeline's MLflow run with its true status."""
