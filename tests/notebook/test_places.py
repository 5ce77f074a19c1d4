"""Where a notebook runs, what its secrets are, and which source of a setting wins."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from gpu_service import places
from gpu_service.notebook import _gathered
from gpu_service.places import Place
from gpu_service.service import listen
from gpu_service.settings import BadSetting, Settings
from tests.conftest import ROOT

DOUBLES = ROOT / "tests/doubles"


def place(**secrets: str) -> Place:
    return Place("somewhere", "click here", secrets.get)


@pytest.mark.parametrize(
    ("env", "name"),
    [
        ({"COLAB_RELEASE_TAG": "release-colab"}, "Google Colab"),
        ({"KAGGLE_KERNEL_RUN_TYPE": "Interactive"}, "Kaggle"),
        ({"LIGHTNING_CLOUD_URL": "https://lightning.example"}, "Lightning"),
        ({}, "Jupyter"),
    ],
)
def test_a_place_is_known_by_what_it_sets_and_says_what_to_click(env: dict[str, str], name: str) -> None:
    found = places.here(env)
    assert found.name == name
    english, korean = found.no_gpu.splitlines()
    assert english.isascii()
    assert "GPU" in korean


def secret(name: str, path: Path, **env: str) -> str:
    """In a process of its own, which has the place's module."""
    code = f"import os; from gpu_service import places; print(places.here(os.environ).secret({name!r}))"
    clean = {**os.environ, **env, "PYTHONPATH": f"{path}{os.pathsep}{ROOT}"}
    return subprocess.run(
        [sys.executable, "-c", code], env=clean, capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.mark.parametrize(("name", "value"), [("NGROK_AUTHTOKEN", "a-token"), ("HF_TOKEN", "None"), ("OTHER", "None")])
def test_colabs_secrets_are_asked_for_and_one_that_is_withheld_is_none(name: str, value: str) -> None:
    secrets = json.dumps({"NGROK_AUTHTOKEN": "a-token", "HF_TOKEN": None})
    assert secret(name, DOUBLES / "colab", COLAB_SECRETS=secrets) == value


@pytest.mark.parametrize(("name", "value"), [("NGROK_AUTHTOKEN", "a-token"), ("OTHER", "None")])
def test_kaggles_secrets_are_asked_for(name: str, value: str) -> None:
    env = {"KAGGLE_KERNEL_RUN_TYPE": "Batch", "KAGGLE_SECRETS": json.dumps({"NGROK_AUTHTOKEN": "a-token"})}
    assert secret(name, DOUBLES, **env) == value


def test_the_cell_wins_then_the_environment_then_the_secrets() -> None:
    env = {"GPU_MODELS": "of-the-environment", "HF_TOKEN": "of-the-environment", "PATH": "/bin"}
    found = _gathered(env, {"GPU_MODELS": "of-the-cell", "HF_TOKEN": ""}, place(HF_TOKEN="secret", NGROK_AUTHTOKEN="t"))
    assert found == {
        "GPU_MODELS": "of-the-cell",
        "HF_TOKEN": "of-the-environment",
        "NGROK_AUTHTOKEN": "t",
        "PATH": "/bin",
    }


def test_without_a_model_a_small_one_is_offered() -> None:
    assert _gathered({}, {"GPU_MODELS": ""}, place())["GPU_MODELS"].endswith("SmolLM2-135M-Instruct")


def test_a_name_that_is_no_setting_is_refused() -> None:
    with pytest.raises(BadSetting, match="GPU_MODEL:"):
        _gathered({}, {"GPU_MODEL": "misspelt"}, place())


def test_the_port_is_listened_on_without_nagles_delay() -> None:
    with listen(Settings(port=0)) as listener:
        assert listener.proto == socket.IPPROTO_TCP  # asyncio sets TCP_NODELAY only where the protocol is named
