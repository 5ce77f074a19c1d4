"""What goes in and comes out: adapters of peft."""

import io
import json
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from playwright.sync_api import Browser, expect

from tests.browser.conftest import Stack
from tests.browser.visit import visiting

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]

H = 576  # of the demo's Llama
Q = "base_model.model.model.layers.0.self_attn.q_proj"


def test_an_adapter_of_peft_comes_in_is_listed_goes_out_and_is_deleted(
    chromium: Browser, stack: Stack, pictures: Path, tmp_path: Path
) -> None:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "layers_to_transform": [0]}
    weights = {f"{Q}.lora_A.weight": torch.randn(2, H), f"{Q}.lora_B.weight": torch.randn(H, 2)}
    archive = tmp_path / "adapter.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        packed.writestr("adapter_config.json", json.dumps(config))
        packed.writestr("adapter_model.safetensors", safetensors.torch.save(weights))
    with visiting(chromium, stack.relay) as visit:
        page = visit.page
        visit.sign_in()
        visit.go("/training/models")
        visit.button("Import an adapter").click()
        dialog = page.get_by_role("dialog")
        dialog.locator("input[type=file]").set_input_files(archive)
        dialog.get_by_role("combobox", name="Base model").click()
        page.get_by_role("option", name=stack.model).click()
        dialog.get_by_label("Name of the tuned model").fill("brought")
        visit.look(pictures / "models-import.png")
        visit.button("Import it").click()
        expect(page.get_by_text("brought", exact=True)).to_be_visible()
        visit.look(pictures / "models.png")
        page.get_by_role("button", name="What to do with brought").click()
        with page.expect_download() as going:
            page.get_by_role("menuitem", name="Download for peft").click()
        names = zipfile.ZipFile(io.BytesIO(going.value.path().read_bytes())).namelist()
        assert {"adapter_config.json", "adapter_model.safetensors"} <= {name.split("/")[-1] for name in names}
        page.get_by_role("button", name="What to do with brought").click()
        page.get_by_role("menuitem", name="Train it further").click()
        expect(page.get_by_text("Goes on from this tuned model")).to_be_visible()
        visit.go("/training/models")
        page.get_by_role("button", name="What to do with brought").click()
        page.get_by_role("menuitem", name="Delete").click()
        visit.button("Delete it").click()
        expect(page.get_by_text("brought", exact=True)).to_have_count(0)
        assert not visit.faults
