"""A device that is really full: a process of its own, whose address space is limited while rows write in it."""

import json
import logging
import os
import resource
import subprocess
import sys
from pathlib import Path

import torch

from gpu_service import decoder as decoders
from gpu_service import device as devices
from gpu_service.models import Models
from gpu_service.sampling import Sampling
from gpu_service.settings import Settings
from gpu_service.text import Engine, Request, Served
from tests.conftest import ROOT

CALLERS = 160
LEFT_BYTES = 16 * 2**20  # for all of them; they want some 250 MB, and what the process has freed is theirs too
HOPEFUL_BYTES = 2**40  # the budget that the engine believes in


def test_rows_that_find_no_memory_end_with_a_clear_error_and_the_engine_goes_on(tiny_dir: Path) -> None:
    command = [sys.executable, "-m", "tests.gpu_service.test_out_of_memory", str(tiny_dir)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    told = json.loads(ended.stdout.splitlines()[-1])
    assert set(told["crowd"]) <= {"Finish", "OutOfMemory"}
    assert len(told["crowd"]) == CALLERS, "everybody is told"
    assert "OutOfMemory" in told["crowd"], "the limit was felt"
    assert told["held_bytes"] == 0
    assert told["afterwards"] == "Finish"


def child(folder: str) -> dict[str, object]:
    logging.disable()
    torch.set_num_threads(1)
    device = devices.choose(Settings(device="cpu", precision="fp32"))
    base = Models((f"tiny={folder}",), device).load("tiny")
    source = base.source
    decoder = decoders.build(source.family, source.config, device.torch)
    served = Served(source.id, decoder, base.weights, source.tokenizer, source.stop_ids)
    engine = Engine(HOPEFUL_BYTES, 256, device.precision.dtype, device.torch)

    def ask(prompt_tokens: int, caller: int) -> list[object]:
        heard: list[object] = []
        engine.add(
            Request(
                served=served,
                adapter=None,
                adapter_id=None,
                dials=None,
                prompt=list(range(5 + caller, 5 + caller + prompt_tokens)),
                sampling=Sampling(max_tokens=16, temperature=0, ignore_eos=True),
                caller=str(caller),
                send=heard.append,
                cancelled=lambda: False,
            )
        )
        return heard

    def finish() -> None:
        while len(engine):
            engine.step()

    ask(50, 0)
    finish()  # what a first pass sets up is there
    used = 4096 * int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (used + LEFT_BYTES, used + LEFT_BYTES))
    crowd = [ask(400, caller) for caller in range(CALLERS)]
    finish()
    late = ask(50, CALLERS)
    finish()
    return {
        "crowd": [type(heard[-1]).__name__ for heard in crowd],
        "held_bytes": engine._admission.held_bytes,
        "afterwards": type(late[-1]).__name__,
    }


if __name__ == "__main__":
    print(json.dumps(child(sys.argv[1])))
