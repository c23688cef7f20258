-- Run once, when the volume is empty. Users and rights are apart from runs, so that either can be restored alone.
CREATE DATABASE mlflow_auth;
