"""Imports go one way. The arrows stand here as data, from the top floor to the ground."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

# The root's own modules; the standard library and pydantic only, and Pillow within functions.
SHARED = ["wire", "dataset", "datafile", "frames", "adapter", "logs", "schema", "archive", "picture", "picturefile"]
SHARED += ["batchfile"]
SHARED_MAY_IMPORT = {
    "wire": {"pydantic"},
    "dataset": {"datafile"},
    "datafile": set[str](),
    "batchfile": {"datafile"},
    "frames": {"pydantic"},
    "adapter": {"pydantic", "wire"},
    "logs": set[str](),
    "schema": {"pydantic"},
    "archive": {"_typeshed"},
    "picture": {"PIL"},
    "picturefile": {"archive", "datafile", "picture", "PIL"},
}

# A module may import from the floors below its own, and from its own floor only what stands to its right.
FLOORS: dict[str, list[list[str]]] = {
    "relay": [
        ["__main__", "celery_app"],
        ["app", "processes"],
        ["openapi"],
        ["api_webhooks", "api_adapters", "api_data", "api_batches"],
        ["api_admin", "api_openai", "api_gpu", "api_ui", "api_ops", "api_peer"],
        ["vitals"],
        ["generations", "waiting", "proxy", "dispatcher"],
        ["adapters", "sd_lora", "zips", "peft_import", "peft", "tensor_file"],
        ["kinds", "shapes", "models", "files", "bodies", "page"],
        [
            "people",
            "sessions",
            "passwords",
            "limits",
            "batches",
            "usage",
            "accounts",
            "checkpoints",
            "uploads",
            "leases",
            "gpus",
            "enrol_tokens",
            "webhooks",
            "audit",
            "jobs",
            "placement",
            "room",
        ],
        ["gpu_client", "calls", "roster", "breaker", "fairness", "lines", "batch_files"],
        ["outbox", "meter"],
        ["backup", "dump", "dialout", "hop", "transport", "sweep", "health", "broker", "peers", "folder"],
        ["storage"],
        ["bucket", "s3"],
        ["refs", "blobs", "store"],
        ["migrate", "tables", "safety"],
        ["settings", "errors", "streams", "metrics", "shared"],
    ],
    "gpu_service": [
        ["__main__", "notebook"],
        ["service", "lone", "places"],
        ["openapi"],
        [
            "app",
            "tunnel",
            "dialout",
            "job",
            "batch",
            "finetune_pictures",
            "finetune_text",
            "finetune",
            "reporter",
            "lease",
            "link",
        ],
        ["previews", "answering", "drawing", "bodies", "gate", "answers"],
        ["worker"],
        ["resident"],
        ["learn_pictures", "checkpoints", "text", "image", "prepare", "learn_text", "train"],
        ["report", "optimizer", "probe", "samples", "trainable", "plan", "course", "picture_data"],
        ["prefix", "data_report", "data", "reuse", "speed"],
        ["decoder"],
        ["llama", "gpt2"],
        ["rows", "cache", "fused"],
        ["models", "artifacts", "sampling", "detokenizer"],
        ["sd"],
        ["tuned", "quantize", "lora", "kernels", "hub", "unet", "shortcuts"],
        ["device", "costs", "sd_tensors", "layers", "metrics", "scheduler"],
        ["settings", "errors"],
    ],
}


def modules(package: str) -> list[Path]:
    return sorted(p for p in (ROOT / package).glob("*.py") if p.name != "__init__.py")


def imported(path: Path, package: str) -> set[str]:
    """Modules of ours that a file imports anywhere, its functions included: `relay.jobs`, `wire`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            base = node.module
            found |= {f"{base}.{alias.name}" for alias in node.names} if base == package else {base}
    return found


@pytest.mark.parametrize("package", FLOORS)
def test_every_module_stands_on_a_floor(package: str) -> None:
    placed = {name for floor in FLOORS[package] for name in floor}
    assert {p.stem for p in modules(package)} <= placed


@pytest.mark.parametrize("package", FLOORS)
def test_imports_go_down(package: str) -> None:
    place = {name: (f, i) for f, floor in enumerate(FLOORS[package]) for i, name in enumerate(floor)}
    upwards = [
        f"{path.stem} -> {name.split('.')[1]}"
        for path in modules(package)
        for name in imported(path, package)
        if name.startswith(f"{package}.") and place[name.split(".")[1]] <= place[path.stem]
    ]
    assert not upwards


@pytest.mark.parametrize(("package", "other"), [("relay", "gpu_service"), ("gpu_service", "relay")])
def test_neither_service_imports_the_other(package: str, other: str) -> None:
    for path in modules(package):
        assert not {n for n in imported(path, package) if n.split(".")[0] in (other, "demo", "tests")}, path


@pytest.mark.parametrize("module", [m for m in SHARED if (ROOT / f"{m}.py").exists()])
def test_what_both_share_needs_next_to_nothing(module: str) -> None:
    names = {name.split(".")[0] for name in imported(ROOT / f"{module}.py", module)}
    foreign = names - set(sys.stdlib_module_names) - SHARED_MAY_IMPORT[module]
    assert not foreign


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("relay.app", {"torch", "transformers", "numpy", "PIL"}),
        ("gpu_service.layers", {"torch"}),
        ("gpu_service.scheduler", {"torch"}),
    ],
)
def test_importing_it_does_not_load_what_is_heavy(module: str, heavy: set[str]) -> None:
    code = f"import sys, {module}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not heavy & set(loaded.split())


@pytest.mark.parametrize("package", FLOORS)
def test_only_settings_reads_the_environment(package: str) -> None:
    """Except to pass it on to child processes, or to set what a library reads at import."""
    readers = {
        path.stem
        for path in modules(package)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")
    }
    assert readers <= {"settings", "__main__", "notebook"}
