"""Where a notebook runs: Colab, Kaggle, Lightning or a Jupyter of one's own. Its secrets, and where its GPU is hidden.

Knows no setting's meaning; asked for a secret by name, it answers or it does not.
"""

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass

KAGGLE_LIMIT_S = 12 * 3600.0  # https://www.kaggle.com/docs/notebooks: a session on a CPU or GPU


@dataclass(frozen=True)
class Place:
    name: str
    no_gpu: str  # what to click, in English and Korean
    secret: Callable[[str], str | None]
    limit_s: float | None = None  # of a session, where the place promises to end it then


def here(env: Mapping[str, str]) -> Place:
    if "COLAB_RELEASE_TAG" in env or _is_there("google.colab"):
        return Place("Google Colab", _COLAB, _colab)
    if "KAGGLE_KERNEL_RUN_TYPE" in env:
        return Place("Kaggle", _KAGGLE, _kaggle, KAGGLE_LIMIT_S)
    if any(name.startswith("LIGHTNING_CLOUD") for name in env):
        return Place("Lightning", _LIGHTNING, lambda name: None)  # its secrets are environment variables
    return Place("Jupyter", _OWN, lambda name: None)


_COLAB = """In the menu: Runtime > Change runtime type > T4 GPU > Save. Then run all cells again.
메뉴에서: 런타임 > 런타임 유형 변경 > T4 GPU > 저장. 그다음 모든 셀을 다시 실행하세요."""
_KAGGLE = """In the panel on the right: Session options > Accelerator > GPU T4 x2; Internet on. Then run all cells.
오른쪽 패널에서: Session options > Accelerator > GPU T4 x2, Internet 켜기. 그다음 모든 셀을 다시 실행하세요."""
_LIGHTNING = """Click the machine at the right edge (CPU), then GPU, and choose one. Then run all cells again.
오른쪽 가장자리의 머신(CPU)을 누르고 GPU를 고르세요. 그다음 모든 셀을 다시 실행하세요."""
_OWN = """Is there one, is its driver loaded (nvidia-smi), and was torch built for it (torch.version.cuda)?
GPU가 있는지, 드라이버가 올라왔는지(nvidia-smi), torch가 GPU용인지(torch.version.cuda) 확인하세요."""


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even its parent
        return False


def _colab(name: str) -> str | None:
    userdata = importlib.import_module("google.colab.userdata")
    try:
        return str(userdata.get(name))
    except (userdata.SecretNotFoundError, userdata.NotebookAccessError):
        return None  # there is none, or its owner does not give it to this notebook


def _kaggle(name: str) -> str | None:
    try:
        return str(importlib.import_module("kaggle_secrets").UserSecretsClient().get_secret(name))
    except Exception:  # it documents none, and raises several; without its secret the next source is asked
        return None
