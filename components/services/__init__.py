"""The edges to real services: S3 storage, MLflow tracking, exit codes, and the launcher that gives them to a stage."""
