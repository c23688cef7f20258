"""Makes the MLflow user that stages log in with, or gives it the secret's password; the job `rankloop-mlflow-users` runs it.

Reads MLFLOW_TRACKING_URI, MLFLOW_AUTH_ADMIN_USERNAME, MLFLOW_AUTH_ADMIN_PASSWORD, STAGE_USERNAME and STAGE_PASSWORD. The user gets
no right on anything that is there (the server's `default_permission` is NO_PERMISSIONS); what it makes, it may manage.

As that user it makes the two names of the registry: to a user without rights MLflow answers 403, not 404, for a model that is not
there, so the first evaluation could not tell that there is no champion yet.

It calls the REST API itself: MLflow's client of it imports the whole server, which takes 20 seconds on a busy core.
"""

from __future__ import annotations

import os
import sys

import requests

SECONDS = 30
MODELS = ("rankloop-policy", "rankloop-reward-model")  # the defaults of `register_model`


def main() -> None:
    make_user()
    login = (os.environ["STAGE_USERNAME"], os.environ["STAGE_PASSWORD"])
    for name in MODELS:
        where = f"{os.environ['MLFLOW_TRACKING_URI']}/api/2.0/mlflow/registered-models/create"
        reply = requests.post(where, json={"name": name}, auth=login, timeout=SECONDS)
        if not reply.ok and "RESOURCE_ALREADY_EXISTS" not in reply.text:
            sys.exit(f"MLflow answers {reply.status_code} to {login[0]}: {reply.text[:500]}")


def make_user() -> None:
    users = f"{os.environ['MLFLOW_TRACKING_URI']}/api/2.0/mlflow/users"
    admin = (os.environ["MLFLOW_AUTH_ADMIN_USERNAME"], os.environ["MLFLOW_AUTH_ADMIN_PASSWORD"])
    user = {"username": os.environ["STAGE_USERNAME"], "password": os.environ["STAGE_PASSWORD"]}
    reply = requests.post(f"{users}/create", json=user, auth=admin, timeout=SECONDS)
    if reply.ok:
        print(f"user {user['username']} made")
        return
    if "RESOURCE_ALREADY_EXISTS" in reply.text:
        reply = requests.patch(f"{users}/update-password", json=user, auth=admin, timeout=SECONDS)
    if not reply.ok:
        sys.exit(f"MLflow answers {reply.status_code} to {admin[0]}: {reply.text[:500]}")
    print(f"user {user['username']} is there; it has the password of the secret now")


if __name__ == "__main__":
    try:
        main()
    except requests.ConnectionError as error:
        sys.exit(f"MLflow does not answer yet: {error}")
