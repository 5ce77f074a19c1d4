"""The peer of bench/train.py: one LoRA run with Hugging Face Trainer and peft, in an environment of its own.

Started as a script with a JSON file that says what to do; the last line that it prints says what came of it. It imports
nothing of ours.
"""

import importlib
import json
import re
import resource
import sys
import time
from pathlib import Path
from typing import Any


def rows(file: str) -> list[dict[str, list[int]]]:
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def adapted(model: Any, spec: dict[str, Any]) -> Any:
    """With LoRA on the matrices of attention and MLP of the wanted layers."""
    peft = importlib.import_module("peft")
    gpt2 = model.config.model_type == "gpt2"
    names = r"(c_attn|c_proj|c_fc)" if gpt2 else r"(q|k|v|o|gate|up|down)_proj"
    layer = re.compile(rf"\.(?:h|layers)\.([0-9]+)\..*{names}$")
    first = spec["first_layer"]
    targets = [n for n, _ in model.named_modules() if (found := layer.search(f".{n}")) and int(found[1]) >= first]
    config = peft.LoraConfig(
        r=spec["rank"],
        lora_alpha=2 * spec["rank"],
        lora_dropout=0.0,
        target_modules=targets,
        fan_in_fan_out=gpt2,
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(model, config)


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    torch = importlib.import_module("torch")
    transformers = importlib.import_module("transformers")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(spec["threads"])
    transformers.set_seed(5)
    pad_id = 0
    half = spec["precision"] == "bf16"
    dtype = torch.bfloat16 if half else torch.float32
    model = transformers.AutoModelForCausalLM.from_pretrained(spec["model"], dtype=dtype)
    model = adapted(model, spec)

    def collate(batch: list[dict[str, list[int]]]) -> dict[str, Any]:
        longest = max(len(row["ids"]) for row in batch)

        def padded(key: str, fill: int) -> Any:
            return torch.tensor([row[key] + [fill] * (longest - len(row[key])) for row in batch])

        mask = torch.tensor([[1] * len(row["ids"]) + [0] * (longest - len(row["ids"])) for row in batch])
        return {"input_ids": padded("ids", pad_id), "labels": padded("labels", -100), "attention_mask": mask}

    arguments = transformers.TrainingArguments(
        output_dir=spec["folder"],
        per_device_train_batch_size=spec["batch"],
        num_train_epochs=spec["epochs"],
        learning_rate=spec["learning_rate"],
        lr_scheduler_type="linear",
        warmup_steps=spec["warmup_steps"],
        weight_decay=0.0,
        max_grad_norm=1.0,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=half,
        disable_tqdm=True,
        remove_unused_columns=False,
        seed=5,
    )
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=rows(spec["train"]), data_collator=collate
    )
    wall, cpu = time.perf_counter(), time.process_time()
    trainer.train()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = {"wall_s": wall, "cpu_s": cpu, "rss_bytes": peak, "steps": trainer.state.global_step}
    print(json.dumps(result | {"loss": validation(model, rows(spec["validation"]), torch), "gemm": gemm(torch)}))


def validation(model: Any, rows: list[dict[str, list[int]]], torch: Any) -> float:
    """Cross entropy a labelled token, row by row."""
    model.eval()
    total, learned = 0.0, 0
    for row in rows:
        labels = torch.tensor([row["labels"]])
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["ids"]])).logits[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum"))
        learned += int((labels[0, 1:] != -100).sum())
    return total / learned


def gemm(torch: Any) -> str:
    """What multiplies fp32 matrices in this process: torch's default."""
    return "MKL (torch's default for fp32)" if torch.backends.mkl.is_available() else "torch's default"


if __name__ == "__main__":
    main()
