"""What goes in and comes out: examples as the model reads them, answers kept as examples, adapters of peft."""

import io
import json
import re
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from playwright.sync_api import Browser, expect

from tests.browser.conftest import QUESTION, Stack
from tests.browser.visit import ANSWERED, SLOW_MS, visiting

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]

ROW = {"messages": [{"role": "user", "content": "Ahoy?"}, {"role": "assistant", "content": "Arr, matey!"}]}
H = 576  # of the demo's Llama
Q = "base_model.model.model.layers.0.self_attn.q_proj"


def test_a_chosen_file_says_what_is_in_it_and_how_the_model_reads_it(
    chromium: Browser, stack: Stack, pictures: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "report.jsonl"
    long = {"messages": [{"role": "user", "content": "Go on."}, {"role": "assistant", "content": "Arr! " * 80}]}
    rows.write_text("\n".join(json.dumps(row) for row in (ROW, ROW, long)))
    with visiting(chromium, stack.relay, width="phone") as visit:
        page = visit.page
        visit.sign_in()
        visit.go("/training/new")
        page.locator("input[type=file]").set_input_files(rows)
        report = page.get_by_role("region", name="What is in it")
        expect(report).to_contain_text("3 examples · 1 is there twice: lines 2")
        expect(report.get_by_role("img", name=re.compile("^Lengths from"))).to_be_visible(timeout=SLOW_MS)
        expect(report.locator("mark")).to_contain_text("Arr, matey!")
        expect(report).to_contain_text("None is cut")
        page.get_by_text("Training settings").click()
        page.get_by_label("Longest example").fill("64")
        expect(report).to_contain_text("1 is longer than 64 tokens and is cut: lines 3", timeout=SLOW_MS)
        visit.look(pictures / "training-report.png")


def test_an_answer_that_was_corrected_becomes_an_example(chromium: Browser, stack: Stack, pictures: Path) -> None:
    http = stack.relay.http()
    with visiting(chromium, stack.relay) as visit:
        page = visit.page
        visit.sign_in()
        visit.ask(QUESTION)
        expect(page.locator(ANSWERED).first).not_to_be_empty(timeout=SLOW_MS)
        visit.stop()
        visit.button("Edit and keep").click()
        dialog = page.get_by_role("dialog")
        dialog.get_by_label("The answer as it should be").fill("Read, bake, and nap.")
        dialog.get_by_role("combobox", name="Data set").click()
        page.get_by_role("option", name="a new one").click()
        dialog.get_by_label("Name of the new one").fill("corrections")
        visit.look(pictures / "keep-answer.png")
        visit.button("Add to the data set").click()
        expect(dialog.get_by_role("status")).to_contain_text("Added to corrections.jsonl, which has 1 example now.")
        dialog.get_by_role("link", name="Train with it").click()
        expect(page.get_by_role("radio", name="corrections.jsonl")).to_be_checked()
    file = next(f for f in http.get("/v1/files").json()["data"] if f["filename"] == "corrections.jsonl")
    kept = http.get(f"/v1/files/{file['id']}/content").json()
    assert [message["content"] for message in kept["messages"]] == [QUESTION, "Read, bake, and nap."]


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
        expect(page.get_by_text(re.compile("^brought · "))).to_be_visible()
        visit.look(pictures / "models.png")
        page.get_by_role("button", name=re.compile("^What to do with brought")).click()
        with page.expect_download() as going:
            page.get_by_role("menuitem", name="Download for peft").click()
        names = zipfile.ZipFile(io.BytesIO(going.value.path().read_bytes())).namelist()
        assert {"adapter_config.json", "adapter_model.safetensors"} <= {name.split("/")[-1] for name in names}
        page.get_by_role("button", name=re.compile("^What to do with brought")).click()
        page.get_by_role("menuitem", name="Train it further").click()
        expect(page.get_by_text("Goes on from this tuned model")).to_be_visible()
        visit.go("/training/models")
        page.get_by_role("button", name=re.compile("^What to do with brought")).click()
        page.get_by_role("menuitem", name="Delete").click()
        visit.button("Delete it").click()
        expect(page.get_by_text(re.compile("^brought · "))).to_have_count(0)
        assert not visit.faults
