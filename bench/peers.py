"""A peer's own environment: a folder that is made once, with nothing of ours in it."""

import shutil
import subprocess
import venv
from collections.abc import Sequence
from pathlib import Path


def python(folder: Path, packages: Sequence[str]) -> Path:
    """The interpreter of `folder`, which has these packages. Downloads them the first time."""
    found = folder / "bin/python"
    if not (folder / "done").exists():
        print("making the peer's environment ...", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True)
        subprocess.run([found, "-m", "pip", "install", "-q", *packages], check=True)
        (folder / "done").touch()
    return found
