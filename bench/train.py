"""Fine-tuning side by side with Hugging Face Trainer and peft, in one run: the same rows, layers, rank, batch, epochs.

SmolLM2-135M-Instruct, LoRA of rank 16 on attention and MLP of the last 8 of 30 layers, 96 chats cut to 256 tokens of
which about half are labels, fp32, 5 epochs; the peer once more on all layers; and the demo's GPT-2, last 2 of 6. Each
side runs alone, in a process and an environment of its own, one after another. Our clock runs from the first slice to
the last and includes the frozen prefix, whose folder is empty at the start; the peer's is that of `Trainer.train`.
Loading and tokenising are in neither.

The last line is JSON. Speed-ups are the peer's seconds / ours; `loss_gap` is ours / the peer's - 1 of the final
validation loss; memory is the peak of the process, ours / the peer's. `bf16` is the same with base models in bf16 on
both sides, and null on a machine without units for it. Run it by `make bench-train`, on a machine that does nothing
else. `--quick` is one epoch of a few rows, for who works on it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil

from bench import peers
from demo import model as demo_model
from gpu_service import device as devices
from gpu_service import models
from gpu_service.data import TokenStore
from gpu_service.settings import Settings

ROOT = Path(__file__).parent.parent
PEER = ("torch==2.13.0", "transformers==5.23.0", "accelerate==1.15.0", "peft==0.21.0")
GPT2 = ROOT / "demo/gpt2/model"
ROWS, VALIDATION_ROWS = 96, 16
MAX_LENGTH = 256
EPOCHS, BATCH, RANK, LEARNING_RATE = 5, 4, 16, 2e-4
ALL_LAYERS_EPOCHS = 1  # of the peer on all layers: each costs the same, so one is timed and counted EPOCHS times


def chats(n: int, turns: list[dict[str, Any]], least_chars: int) -> list[dict[str, Any]]:
    """Chats of many turns, each longer than what is kept of it; every one begins at another turn."""
    found = []
    for i in range(n):
        messages: list[dict[str, str]] = []
        step = 1 + i // len(turns)  # the second time round the turns follow each other in another order
        at = i
        while sum(len(m["content"]) for m in messages) < least_chars:
            question, answer = (m["content"] for m in turns[at % len(turns)]["messages"])
            # Two questions and one answer make about half of the tokens labels.
            asked = f"{question} {turns[(at + 1) % len(turns)]['messages'][0]['content']}"
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
            at += step
        found.append({"messages": messages})
    return found


def write_rows(folder: Path, n: int) -> tuple[Path, Path]:
    turns = [json.loads(line) for line in (ROOT / "demo/captain.jsonl").read_text().splitlines()]
    files = []
    for name, count, some in (("rows", n, turns[:-16]), ("validation", VALIDATION_ROWS, turns[-16:])):
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in chats(count, some, 6 * MAX_LENGTH)))
        files.append(file)
    return files[0], files[1]


def tokens(file: Path, model: Path, folder: Path) -> Path:
    """The very tokens and labels that our side trains on, for the peer."""
    store = TokenStore.build(file, folder / f"{file.stem}-{model.name}", models.find(str(model)).tokenizer, MAX_LENGTH)
    report = store.report
    print(f"{model.name}, {file.stem}: {report.summary()}", flush=True)
    out = folder / f"{file.stem}-{model.name}.tokens"
    with out.open("w") as lines:
        for i in range(len(store)):
            batch = store.batch([i], pad_id=0)
            ids, learn = batch.ids[0].tolist(), batch.learn[0].tolist()
            labels = [token if wanted else -100 for token, wanted in zip(ids, learn, strict=True)]
            lines.write(json.dumps({"ids": ids, "labels": labels}) + "\n")
    return out


class Bench:
    """The runs, one after another. `folder` is empty at the start."""

    def __init__(self, folder: Path, rows: int, epochs: int) -> None:
        self._folder, self._epochs, self._n = folder, epochs, 0
        self._rows, self._validation = write_rows(folder, rows)
        self._threads = psutil.cpu_count(logical=False) or os.cpu_count() or 1

    def run(
        self, side: str, model: Path, first_layer: int, *, epochs: int | None = None, **extra: Any
    ) -> dict[str, Any]:
        self._n += 1
        folder = self._folder / f"run-{self._n}"
        folder.mkdir()
        spec = {
            "model": str(model),
            "folder": str(folder),
            "first_layer": first_layer,
            "threads": self._threads,
            "epochs": epochs or self._epochs,
            "batch": BATCH,
            "rank": RANK,
            "learning_rate": LEARNING_RATE,
            "max_length": MAX_LENGTH,
            "precision": "fp32",
            "streamed": False,
            "prefix_cache": "auto",
            **extra,
        }
        steps = spec["epochs"] * -(-sum(1 for _ in self._rows.open()) // BATCH)
        spec["warmup_steps"] = max(1, round(0.1 * steps))
        if side == "peer":
            python = peers.python(ROOT / "data/bench/train-peer", PEER)
            command = [str(python), str(ROOT / "bench/train_peer.py")]
            spec["train"] = str(tokens(self._rows, model, self._folder))
            spec["validation"] = str(tokens(self._validation, model, self._folder))
        else:
            command = [sys.executable, "-m", "bench.train_ours"]
            spec["rows"], spec["validation_rows"] = str(self._rows), str(self._validation)
        (folder / "spec.json").write_text(json.dumps(spec))
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run(
            [*command, str(folder / "spec.json")], cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True
        )
        *said, last = done.stdout.decode().splitlines()
        result: dict[str, Any] = json.loads(last)
        if side == "ours":
            print(*(line for line in said if line.startswith("prefix")), sep="\n")
        print(
            f"{side} {extra or ''} {model.name} from layer {first_layer}: {result['steps']} steps in "
            f"{result['wall_s']:.1f} s ({result['cpu_s']:.1f} s of CPU), peak {result['rss_bytes'] / 1e6:.0f} MB, "
            f"{said_before(result)}validation loss {result['loss']:.4f}; GEMM: {result['gemm']}; "
            f"load {os.getloadavg()[0]:.1f}",
            flush=True,
        )
        return result


def said_before(result: dict[str, Any]) -> str:
    """The time that a preview states, which only our side does."""
    return f"{result['expected_s']:.1f} s were expected, " if result.get("expected_s") else ""


def per_step(result: dict[str, Any]) -> float:
    return float(result["wall_s"] / result["steps"])


def compared(ours: dict[str, Any], peer: dict[str, Any]) -> dict[str, float]:
    return {
        "same_layers_speedup": round(per_step(peer) / per_step(ours), 2),
        "loss_gap": round(ours["loss"] / peer["loss"] - 1, 4),
        "rss_ratio": round(ours["rss_bytes"] / peer["rss_bytes"], 2),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rows, two epochs")
    quick = parser.parse_args().quick
    smol = demo_model.ensure(ROOT / "data")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), 12 if quick else ROWS, 2 if quick else EPOCHS)
        ours = bench.run("ours", smol, 22)
        same = bench.run("peer", smol, 22)
        everywhere = bench.run("peer", smol, 0, epochs=ALL_LAYERS_EPOCHS)
        streamed = bench.run("ours", smol, 22, epochs=1, streamed=True)
        halves = None
        if devices.choose(Settings(device="cpu")).precision.name == "bf16":
            halves = [bench.run(side, smol, 22, precision="bf16") for side in ("ours", "peer")]
        ours_gpt2 = bench.run("ours", GPT2, 4)
        peer_gpt2 = bench.run("peer", GPT2, 4)
        if ours["gemm"] != same["gemm"]:
            alike = bench.run("ours", smol, 22, epochs=2, like_for_like=True)
            # Fewer epochs, so the prefix is counted by itself.
            ours_s = (alike["wall_s"] - alike["prefix_s"]) / alike["steps"] + alike["prefix_s"] / ours["steps"]
            print(f"like for like, both with {alike['gemm']}: {per_step(same) / ours_s:.2f} on the same layers")
        else:
            print(f"like for like: both sides multiply with {same['gemm']}, so the ratios below are it")
    print(
        json.dumps(
            {
                **compared(ours, same),
                "all_layers_speedup": round(per_step(everywhere) / per_step(ours), 2),
                "streamed_weights_ratio": round(streamed["weights_ratio"], 3),
                "bf16": compared(*halves) if halves else None,
                "gpt2": {"same_layers_speedup": round(per_step(peer_gpt2) / per_step(ours_gpt2), 2)},
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
