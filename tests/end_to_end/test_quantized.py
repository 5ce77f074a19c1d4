"""A gpu whose model serves in 8 bits, and a job over a base in 4 bits, through the relay. Tiny model."""

from pathlib import Path
from typing import Any

from tests.conftest import ROOT, TINY
from tests.end_to_end.stack import Gpu, Relay, ended, follow, running


def test_a_job_over_a_4_bit_base_succeeds_and_its_model_answers_beside_the_8_bit_one(
    tiny_dir: Path, tmp_path: Path
) -> None:
    relay = Relay(tmp_path / "relay")
    with running(relay):
        gpu = Gpu(tmp_path / "gpu", {TINY: tiny_dir}, relay, GPU_QUANTIZE="8bit")
        with running(gpu):
            relay.serves(TINY)
            client = relay.client()
            layers = {"parts": ["attn", "mlp"], "rank": 4, "quantize": "4bit"}
            preview = relay.http().post("/v1/layers/preview", json={"model": TINY, "layers": layers}).json()
            whole = relay.http().post("/v1/layers/preview", json={"model": TINY, "layers": {"rank": 4}}).json()
            assert preview["memory_bytes"]["weights"] < whole["memory_bytes"]["weights"]

            rows = (ROOT / "demo/captain.jsonl").read_bytes().splitlines()[:32]
            file = client.files.create(file=("rows.jsonl", b"\n".join(rows)), purpose="fine-tune")
            job = client.fine_tuning.jobs.create(
                model=TINY,
                training_file=file.id,
                hyperparameters={"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 20},
                extra_body={"layers": layers},
            )
            done = follow(relay, job.id, ended)
            assert done.status == "succeeded", done.error
            ask: Any = {"messages": [{"role": "user", "content": "Hello"}], "temperature": 0, "max_tokens": 8}
            base, tuned = (
                client.chat.completions.create(model=model, **ask).choices[0].message.content
                for model in (TINY, done.fine_tuned_model)
            )
            assert base
            assert tuned
            assert base != tuned
