"""Kaggle's secrets, as its documentation has them. They stand in KAGGLE_SECRETS, as JSON."""

import json
import os


class UserSecretsClient:
    def get_secret(self, label: str) -> str:
        secrets = json.loads(os.environ.get("KAGGLE_SECRETS", "{}"))
        if label not in secrets:
            raise ValueError(f"No user secrets exist for kernel id 1 and label {label}.")
        return str(secrets[label])
