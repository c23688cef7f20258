"""The learning code: records, losses, advantages, rollouts, checkpoints. Imports no KFP, MLflow, boto3 or Kubernetes."""
