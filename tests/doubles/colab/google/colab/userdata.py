"""Colab's secrets, as its documentation has them: `get`, and what it raises. They stand in COLAB_SECRETS, as JSON."""

import json
import os


class SecretNotFoundError(Exception):
    def __init__(self, key: str) -> None:
        super().__init__(f"Secret {key} does not exist.")


class NotebookAccessError(Exception):
    def __init__(self, key: str) -> None:
        super().__init__(f"Notebook does not have access to secret {key}")


def get(key: str) -> str:
    secrets = json.loads(os.environ.get("COLAB_SECRETS", "{}"))
    if key not in secrets:
        raise SecretNotFoundError(key)
    if secrets[key] is None:
        raise NotebookAccessError(key)
    return str(secrets[key])
