"""Makes the MLflow user that stages log in with, or gives it the secret's password; the job `rankloop-mlflow-users` runs it.

Reads MLFLOW_TRACKING_URI, ADMIN_PASSWORD, STAGE_USERNAME and STAGE_PASSWORD. The user gets no right on anything that is there (the
server's `default_permission` is NO_PERMISSIONS); what it makes, it may manage.
"""

from __future__ import annotations

import os

from mlflow.exceptions import MlflowException
from mlflow.server import get_app_client


def main() -> None:
    os.environ.update(MLFLOW_TRACKING_USERNAME="admin", MLFLOW_TRACKING_PASSWORD=os.environ["ADMIN_PASSWORD"])
    name, password = os.environ["STAGE_USERNAME"], os.environ["STAGE_PASSWORD"]
    client = get_app_client("basic-auth", tracking_uri=os.environ["MLFLOW_TRACKING_URI"])
    try:
        client.create_user(name, password)
        print(f"user {name} made")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        client.update_user_password(name, password)
        print(f"user {name} is there; it has the password of the secret now")


if __name__ == "__main__":
    main()
