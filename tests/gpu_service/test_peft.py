"""Adapters to peft's files and back: each side computes what the other does, to 1e-4."""

import json
import warnings
import zipfile
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

import wire
from adapter import DESCRIPTION, AdapterMeta, Description, LoraMeta
from adapter import WEIGHTS as OURS
from gpu_service import artifacts
from gpu_service.artifacts import Adapter
from gpu_service.layers import TensorInfo
from gpu_service.lora import Lora
from gpu_service.models import FAMILIES
from gpu_service.rows import Rows
from relay import peft as to_peft
from relay import peft_import, tensor_file, zips
from relay.peft import CONFIG, WEIGHTS, CannotExport
from relay.peft_import import BaseTensors, CannotImport
from relay.tensor_file import TensorFile
from tests.gpu_service.test_decoders import SMALL, VARIANTS, decoder_of, reference, weights_of, whole_logits
from tests.gpu_service.test_dora import CPU, IDS, tensors_of

TIED = LlamaConfig(**SMALL, num_key_value_heads=2, tie_word_embeddings=True)
MODELS: dict[str, Any] = {
    "llama": VARIANTS["llama 2: every head its own keys, untied"],
    "llama, tied": TIED,
    "llama, biases": VARIANTS["biases, wide heads"],
    "gpt2": VARIANTS["gpt2"],
}


class Model:
    """One of transformers, and the same as we hold it."""

    def __init__(self, name: str) -> None:
        self.config = MODELS[name]
        self.family: Any = FAMILIES[self.config.model_type]
        self.hf = reference(self.config)
        self.tied = bool(self.config.tie_word_embeddings)
        self.weights = weights_of(self.hf)
        if self.tied:
            self.weights.pop("lm_head.weight", None)
        self.tensors: list[TensorInfo] = tensors_of(self.family, self.weights)

    @torch.no_grad()
    def ours(self, adapter: Adapter) -> Tensor:
        served = adapter.served(CPU, torch.float, self.weights.__getitem__)
        return whole_logits(decoder_of(self.config), Rows(self.weights, full=served.full, lora=[served.lora]), IDS)

    def adapter(self, how: dict[str, LoraMeta], full: list[str]) -> Adapter:
        random = torch.Generator().manual_seed(11)
        lora = {}
        for name, said in how.items():
            out, width = self.weights[name].shape
            a = torch.randn(said.rank, width, generator=random) / width**0.5
            b = torch.randn(out, said.rank, generator=random) / 4
            length = self.weights[name].norm(dim=1) * (0.5 + torch.rand(out, generator=random))
            lora[name] = Lora(a, b, said.scale, length if said.dora else None)
        changed = {n: self.weights[n] + 0.1 * torch.randn(self.weights[n].shape, generator=random) for n in full}
        meta = AdapterMeta(
            family=self.family,
            base_model="a-base",
            base_revision="r",
            tied=self.tied,
            layers=[wire.LayerSpec()],
            lora=how,
            tensors={name: tuple(self.weights[name].shape) for name in [*how, *full]},
            hyperparameters=wire.Hyperparameters(),
            created_at=0.0,
            trained_tokens=0,
        )
        return Adapter(meta, changed, lora)

    def matrices(self) -> list[str]:
        return [t.name for t in self.tensors if t.quantisable]

    def base(self) -> BaseTensors:
        shapes = {t.name: t.shape for t in self.tensors}
        return BaseTensors(self.family, self.tied, shapes, frozenset(t.name for t in self.tensors if t.linear))


def export(adapter: Adapter, folder: Path) -> Path:
    """The folder that peft loads, out of the zip that a caller gets."""
    artifacts.save(folder / "ours", adapter)
    with (folder / "ours" / OURS).open("rb") as file, (folder / "peft.zip").open("wb") as out:
        config, tensors = to_peft.exported(adapter.meta, TensorFile(file))
        zips.write(out, config, tensors)
    with zipfile.ZipFile(folder / "peft.zip") as archive:
        assert sorted(archive.namelist()) == [CONFIG, WEIGHTS]
        archive.extractall(folder / "peft")
    return folder / "peft"


def brought_back(archive: Path, model: Model, folder: Path) -> Adapter:
    """As the relay takes it in, and a gpu loads it."""
    folder.mkdir()
    with zips.opened(archive) as opened:
        found = zips.find(opened)
        config = peft_import.read_config(zips.config_of(opened, found))
        with (folder / "theirs").open("w+b") as file:
            zips.copy(opened, found.weights, file, 2**30)
            result = peft_import.imported(config, TensorFile(file), model.base())
            with (folder / OURS).open("wb") as out:
                tensor_file.write(out.write, result.pieces)
    meta = AdapterMeta(
        family=model.family,
        base_model="a-base",
        base_revision="",
        tied=model.tied,
        layers=[],
        lora=result.lora,
        tensors=result.tensors,
        hyperparameters=wire.Hyperparameters(),
        created_at=0.0,
        trained_tokens=0,
    )
    described = Description(meta=meta, weights=artifacts.file_ref(folder / OURS))
    (folder / DESCRIPTION).write_text(described.model_dump_json())
    return artifacts.load({n: folder / n for n in (OURS, DESCRIPTION)}, model.tensors)


def theirs(hf: Any, folder: Path) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a key that is missing or unexpected is only a warning there
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", message=".*(fan_in_fan_out|tie|Unable to fetch|Could not find a config).*")
        model = peft.PeftModel.from_pretrained(hf, str(folder)).eval()
    with torch.no_grad():
        return model(IDS).logits  # type: ignore[no-any-return]


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


LORA, DORA = LoraMeta(rank=4, alpha=6), LoraMeta(rank=4, alpha=6, dora=True)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "how",
    [LORA, LoraMeta(rank=4, alpha=6, rslora=True), DORA, LoraMeta(rank=2, alpha=3.5, rslora=True, dora=True)],
    ids=["lora", "rslora", "dora", "both"],
)
def test_an_exported_adapter_computes_in_peft_what_it_does_here_and_comes_back_as_it_was(
    name: str, how: LoraMeta, tmp_path: Path
) -> None:
    model = Model(name)
    adapter = model.adapter(dict.fromkeys(model.matrices(), how), [])
    folder = export(adapter, tmp_path)
    expected = model.ours(adapter)
    close(theirs(model.hf, folder), expected)
    close(model.ours(brought_back(tmp_path / "peft.zip", model, tmp_path / "back")), expected)


@pytest.mark.parametrize("name", MODELS)
def test_ranks_alphas_and_whole_tensors_that_differ_by_layer_are_exported(name: str, tmp_path: Path) -> None:
    """Layer 1 and the last are told apart, and q, k and v of GPT-2 have ranks and scales of their own."""
    model = Model(name)
    how = {
        tensor: LoraMeta(rank=1 + i % 5, alpha=3.0 + i % 7, rslora=i % 2 == 0)
        for i, tensor in enumerate(model.matrices())
        if i % 4 and "layers.2" not in tensor and "h.2." not in tensor
    }
    full = [t.name for t in model.tensors if t.part.startswith(("norm", "embed")) or t.layer == 2 or t.part == "head"]
    adapter = model.adapter(how, full)
    folder = export(adapter, tmp_path)
    expected = model.ours(adapter)
    close(theirs(model.hf, folder), expected)
    close(model.ours(brought_back(tmp_path / "peft.zip", model, tmp_path / "back")), expected)


IMPORTS: dict[str, dict[str, Any]] = {
    "llama": {"target_modules": ["q_proj", "v_proj", "down_proj"], "layers_to_transform": [1, 2], "r": 3},
    "llama, tied": {
        "target_modules": r".*layers\.[02]\.(self_attn\.[qk]_proj|mlp\.up_proj)",
        "use_dora": True,
        "rank_pattern": {"layers.2.mlp.up_proj": 2},
        "alpha_pattern": {r"layers\.0\..*": 3},
        "modules_to_save": ["input_layernorm"],
    },
    "llama, biases": {
        "target_modules": "all-linear",
        "use_rslora": True,
        "exclude_modules": ["o_proj"],
        "modules_to_save": ["lm_head"],
    },
    "gpt2": {
        "target_modules": ["c_attn", "c_proj"],
        "use_dora": True,
        "use_rslora": True,
        "rank_pattern": {r"h\.1\.attn\.c_attn": 5},
        "modules_to_save": ["c_fc", "ln_2", "wpe"],
    },
}


@pytest.mark.parametrize("name", IMPORTS)
def test_an_adapter_of_peft_computes_here_what_it_does_there(name: str, tmp_path: Path) -> None:
    model = Model(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(model.hf, peft.LoraConfig(task_type="CAUSAL_LM", **IMPORTS[name])).eval()
        random = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for key, tensor in theirs.named_parameters():
                if "lora_" in key or "modules_to_save" in key:
                    tensor.add_(torch.randn(tensor.shape, generator=random) * (0.1 + tensor.std(correction=0)))
            logits = theirs(IDS).logits
        theirs.save_pretrained(str(tmp_path / "theirs"), save_embedding_layers=False)
    with zipfile.ZipFile(tmp_path / "peft.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in (tmp_path / "theirs").iterdir():
            archive.write(path, f"my-adapter/{path.name}")
    adapter = brought_back(tmp_path / "peft.zip", model, tmp_path / "back")
    close(model.ours(adapter), logits)
    assert not torch.allclose(model.ours(model.adapter({}, [])), logits, atol=1e-2)


@pytest.mark.parametrize(
    ("how", "full", "said"),
    [
        ({"h.0.attn.c_attn.q.weight": DORA}, [], "train q, k and v together"),
        ({"h.0.attn.c_proj.weight": DORA, "h.1.attn.c_proj.weight": LORA}, [], "some tensors have DoRA"),
        ({}, ["h.0.attn.c_attn.q.weight", "h.0.attn.c_attn.q.bias"], "keeps whole modules"),
        ({}, ["h.0.mlp.c_fc.weight"], "train weight and bias together"),
        ({"h.0.attn.c_attn.q.weight": LORA}, ["h.0.attn.c_attn.k.weight"], "one of them for a module"),
    ],
)
def test_what_peft_cannot_hold_is_refused_with_the_reason(
    how: dict[str, LoraMeta], full: list[str], said: str, tmp_path: Path
) -> None:
    adapter = Model("gpt2").adapter(how, full)
    with pytest.raises(CannotExport, match=said):
        export(adapter, tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"init_lora_weights": "pissa"}, "changes the base model too"),
        ({"layer_replication": [[0, 1]]}, "layer_replication is set"),
        ({"field_of_tomorrow": 1}, "field_of_tomorrow is set"),
        ({"r": 7}, "has rank 4 and 4 in its tensors and 7"),
        ({"use_dora": True}, "do not fit each other"),
        ({"target_modules": ["q_proj"]}, "does not target it"),
        ({"target_modules": "(.*)*(.*)*(.*)*[xyz]$"}, "takes too long|does not target"),
        ({"rank_pattern": {f"x{i}(a|b)*$": 4 for i in range(200_000)}}, "take too long"),
        ({"target_modules": "("}, "is no regular expression"),
        ({"alpha_pattern": {".*": -1.0}}, "are above 0"),
    ],
)
def test_a_config_that_we_cannot_hold_is_refused_by_name(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    model = Model("llama")
    folder = export(model.adapter(dict.fromkeys(model.matrices(), LORA), []), tmp_path)
    told = json.loads((folder / CONFIG).read_bytes()) | changes
    with pytest.raises(CannotImport, match=said), (folder / WEIGHTS).open("rb") as file:
        peft_import.imported(peft_import.read_config(json.dumps(told).encode()), TensorFile(file), model.base())
