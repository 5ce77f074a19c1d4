"""Models that many tests share: the demo Llama, and a tiny Llama with random weights and the same tokenizer."""

import os
import shutil
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may depend on a hub
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # several tests at once: threads that spin would wait for each other

import hypothesis
import pytest

from demo import model

# A busy machine is no reason to fail: what takes how long is for the benches.
hypothesis.settings.register_profile("ours", deadline=None)
hypothesis.settings.load_profile("ours")

ROOT = Path(__file__).parent.parent
TINY = "tiny"


@pytest.fixture(scope="session")
def smol_dir() -> Path:
    """SmolLM2-135M-Instruct as safetensors; converted on the first run, then kept in data/."""
    return model.ensure(ROOT / "data")


@pytest.fixture(scope="session")
def tiny_dir(smol_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers of 64, random weights, the demo Llama's tokenizer: fast where the words don't matter."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / TINY
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(smol_dir / name, folder / name)
    return folder
