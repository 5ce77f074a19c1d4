"""No pickle is loaded anywhere: it could run code. Refused files have their tests beside the code that refuses them."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

UNPICKLERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "jsonpickle"}
LOADERS = {"read_pickle", "unsafe_load", "full_load", "load_legacy"}
SOURCES = sorted(
    path for pattern in ("*.py", "relay/**/*.py", "gpu_service/**/*.py", "demo/**/*.py") for path in ROOT.glob(pattern)
)


def unpicklings(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            names = []
        yield from (name for name in names if name.split(".")[0] in UNPICKLERS or name == "torch.load")
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        called = ast.unparse(node.func)
        options = {option.arg: ast.unparse(option.value) for option in node.keywords}
        restricted = called == "torch.load" and options.get("weights_only") == "True"
        if called in ("torch.load", "torch.jit.load", "torch.hub.load") and not restricted:
            yield called
        if node.func.attr in LOADERS or options.get("allow_pickle", "False") != "False":
            yield called
        if options.get("trust_remote_code", "False") != "False" or options.get("use_safetensors") == "False":
            yield called


def test_the_sources_are_found() -> None:
    assert {ROOT / "wire.py", ROOT / "relay" / "app.py", ROOT / "gpu_service" / "artifacts.py"} <= set(SOURCES)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(Path(path).relative_to(ROOT)))
def test_no_file_loads_a_pickle(path: Path) -> None:
    assert list(unpicklings(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from joblib import load",
        "from torch import load",
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "np.load(file, allow_pickle=True)",
        "pandas.read_pickle(file)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_what_would_load_one_is_recognised(line: str) -> None:
    assert list(unpicklings(line))
