"""MLflow's server with a guard before it, and with artifacts nowhere but in its own store.

A client may name any place for the artifacts of an experiment that it makes, `file:///etc` too,
and MLflow's server reads there for it.
"""

from __future__ import annotations

import os
import re

from flows.guard import App, Guard

STORE = r"mlflow-artifacts:(/[A-Za-z0-9_-][A-Za-z0-9_.-]*)+"
"""Places that the server's own store holds."""


FILES = ("/mlflow-artifacts/artifacts/", "/upload-artifact")
"""Where clients send artifacts."""


def keep_artifacts_in_store() -> None:
    """Where artifacts of an experiment lie is refused outside of the store that is served."""
    from mlflow.exceptions import MlflowException
    from mlflow.server import handlers

    check = handlers._validate_storage_location_uri

    def within(value: str, field_name: str) -> str:
        if not re.fullmatch(STORE, value):
            raise MlflowException.invalid_parameter_value(
                f"{field_name} {value!r} is outside of this server's store; leave it out"
            )
        return str(check(value, field_name))

    handlers._validate_storage_location_uri = within


def create_app() -> App:
    """The application that asks for a password, guarded."""
    from mlflow.server.auth import create_app

    keep_artifacts_in_store()
    origins = os.environ["MLFLOW_SERVER_CORS_ALLOWED_ORIGINS"]
    return Guard(create_app(), origins, body=dict, files=FILES)


def main() -> None:
    """`mlflow` with the arguments of this process."""
    import mlflow.server
    from mlflow.cli import cli

    mlflow.server._find_app = lambda _name: "flows.mlflow_server:create_app"
    cli()


if __name__ == "__main__":
    main()
