"""Training files of pictures: uploaded as a zip, reported, and trained on by models that make pictures."""

import base64
import io
import sqlite3
from collections.abc import AsyncIterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from sqlalchemy import create_engine

import wire
from relay import migrate
from relay.store import Store
from tests.relay.conftest import CHAT_ROW, Relay
from tests.relay.double_gpu import BASE, BASE_OF_PICTURES, DoubleGpu
from tests.test_picturefile import drawn, zipped

CONCEPT = {"prompt": "a photo of sks dog", "class_prompt": "a photo of a dog", "class_pictures": 8}
A, B = drawn(), drawn("JPEG", size=(200, 100), turned=6)
PLAIN: Mapping[str, bytes | str] = {"dogs/a.png": A, "dogs/b.jpg": B}
CAPTIONED: Mapping[str, bytes | str] = {**PLAIN, "dogs/a.txt": "a dog", "dogs/b.txt": "개 두 마리"}


@pytest.fixture
async def gpu(relay: Relay) -> AsyncIterator[DoubleGpu]:
    async with relay.gpu(BASE, BASE_OF_PICTURES) as gpu:
        yield gpu


async def send(relay: Relay, tmp_path: Path, content: Mapping[str, bytes | str], name: str = "dogs.zip") -> Any:
    body = zipped(tmp_path, content).read_bytes()
    return await relay.http.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": (name, body)})


async def uploaded(relay: Relay, tmp_path: Path, content: Mapping[str, bytes | str]) -> str:
    answer = await send(relay, tmp_path, content)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


async def job(relay: Relay, **fields: Any) -> Any:
    return await relay.http.post("/v1/fine_tuning/jobs", json={"model": BASE_OF_PICTURES, **fields})


def refused(answer: Any) -> tuple[int, str, str]:
    error = answer.json()["error"]
    return answer.status_code, error["param"], error["code"]


async def test_a_zip_of_pictures_is_taken_by_what_it_is_and_says_whether_it_is_captioned(
    relay: Relay, tmp_path: Path
) -> None:
    for content, captioned in ((CAPTIONED, 2), (PLAIN, 0)):
        told = (await send(relay, tmp_path, content, "train.jsonl")).json()
        assert (told["rows"], told["kind"], told["captioned"]) == (2, "pictures", captioned)
        assert (await relay.http.get(f"/v1/files/{told['id']}")).json() == told
    text = (await relay.http.get(f"/v1/files/{await relay.upload()}")).json()
    assert (text["kind"], text["captioned"]) == ("text", None)


async def test_a_bad_zip_is_refused_by_the_names_of_its_files_and_leaves_nothing(relay: Relay, tmp_path: Path) -> None:
    bad = await send(relay, tmp_path, {**CAPTIONED, "dogs/c.png": A[:900], "dogs/c.txt": "x", "dogs/d.heic": b"x"})
    assert refused(bad) == (400, "file", "invalid_training_file")
    message = bad.json()["error"]["message"]
    assert "the zip has 2 errors (1 unknown_format, 1 damaged_picture) beside 2 sound pictures" in message
    assert "dogs/c.png: is damaged" in message
    assert "dogs/d.heic: is no PNG, JPEG or WebP" in message
    assert relay.stored() == []


async def test_the_report_tells_what_the_zip_holds_and_shows_some_of_it_small(relay: Relay, tmp_path: Path) -> None:
    file_id = await uploaded(relay, tmp_path, {**CAPTIONED, "dogs/c.png": A, "dogs/c.txt": "again", "notes.md": "x"})
    told = (await relay.http.get(f"/v1/files/{file_id}/report")).json()
    expected = {"object": "file.report", "file": file_id, "kind": "pictures", "rows": 3, "captioned": 3, "errors": {}}
    assert expected.items() <= told.items()
    assert (told["duplicate_names"], told["ignored_names"]) == (["dogs/c.png"], ["notes.md"])
    assert (told["repaired"], told["largest_side"]) == ({"rotated": 1}, 200)
    assert [(row["name"], row["caption"]) for row in told["sample"]] == [
        ("dogs/a.png", "a dog"),
        ("dogs/b.jpg", "개 두 마리"),
        ("dogs/c.png", "again"),
    ]
    url = told["sample"][1]["thumbnail"]
    small = Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/webp;base64,"))))
    assert (small.size, told["sample"][1]["height"]) == ((48, 96), 200)


async def test_a_report_for_a_model_of_the_other_kind_is_refused(relay: Relay, tmp_path: Path, gpu: DoubleGpu) -> None:
    pictures, text = await uploaded(relay, tmp_path, PLAIN), await relay.upload()
    for file_id, model in ((pictures, BASE), (text, BASE_OF_PICTURES)):
        answer = await relay.http.get(f"/v1/files/{file_id}/report?model={model}")
        assert refused(answer) == (400, "model", "wrong_kind_of_file")
    assert (await relay.http.get(f"/v1/files/{pictures}/report?model={BASE_OF_PICTURES}")).status_code == 200


async def test_pictures_do_not_grow_by_rows(relay: Relay, tmp_path: Path) -> None:
    file_id = await uploaded(relay, tmp_path, PLAIN)
    answer = await relay.http.post(f"/api/datasets/{file_id}/rows", json={"rows": [{"text": "x"}]})
    assert (refused(answer)[:2], "can't grow" in answer.text) == ((400, "dataset_id"), True)


async def test_a_job_on_captioned_pictures_reaches_the_gpu(relay: Relay, tmp_path: Path, gpu: DoubleGpu) -> None:
    file_id = await uploaded(relay, tmp_path, CAPTIONED)
    chosen = {"resolution": 64, "min_snr_gamma": 5, "caption_dropout": 0.1, "packing": "auto"}
    made = await job(relay, training_file=file_id, validation_file=file_id, hyperparameters=chosen)
    assert made.status_code == 200, made.text
    assert made.json()["concept"] is None
    spec = (await gpu.next_grant()).job
    assert (spec.base_model, spec.concept, spec.training_file.name) == (BASE_OF_PICTURES, None, "dogs.zip")
    assert (spec.hyperparameters.resolution, spec.hyperparameters.caption_dropout) == (64, 0.1)


async def test_a_concept_is_kept_with_the_job_and_reaches_the_gpu(relay: Relay, tmp_path: Path, gpu: DoubleGpu) -> None:
    made = await job(relay, training_file=await uploaded(relay, tmp_path, PLAIN), concept=CONCEPT)
    assert made.status_code == 200, made.text
    kept = {**CONCEPT, "prior_weight": 1.0}
    shown = (await relay.http.get(f"/v1/fine_tuning/jobs/{made.json()['id']}")).json()
    assert made.json()["concept"] == shown["concept"] == kept
    assert (await gpu.next_grant()).job.concept == wire.Concept.model_validate(kept)
    again = await job(relay, training_file=shown["training_file"], concept=shown["concept"])
    assert again.status_code == 200


async def test_a_job_says_which_of_its_parts_do_not_go_together(relay: Relay, tmp_path: Path, gpu: DoubleGpu) -> None:
    text = await relay.upload(CHAT_ROW)
    plain, captioned = [await uploaded(relay, tmp_path, content) for content in (PLAIN, CAPTIONED)]
    kind, bad = "wrong_kind_of_file", "invalid_value"
    for fields, param, code in (
        ({"training_file": text}, "training_file", kind),
        ({"training_file": captioned, "validation_file": text}, "validation_file", kind),
        ({"model": BASE, "training_file": captioned}, "training_file", kind),
        ({"model": BASE, "training_file": text, "validation_file": plain}, "validation_file", kind),
        ({"model": BASE, "training_file": text, "concept": CONCEPT}, "concept", bad),
        ({"training_file": plain}, "concept", bad),
        ({"training_file": captioned, "concept": CONCEPT}, "concept", bad),
        ({"training_file": captioned, "validation_file": plain}, "validation_file", bad),
        (
            {"training_file": plain, "validation_file": captioned, "concept": CONCEPT},
            "validation_file",
            bad,
        ),
        ({"training_file": captioned, "hyperparameters": {"packing": False}}, "hyperparameters", bad),
        ({"training_file": captioned, "hyperparameters": {"max_length_tokens": 64}}, "hyperparameters", bad),
        ({"model": BASE, "training_file": text, "hyperparameters": {"resolution": 64}}, "hyperparameters", bad),
        ({"training_file": plain, "concept": {"prompt": ""}}, "concept", bad),
        ({"training_file": plain, "concept": {"prompt": "x", "tail": 1}}, "concept", bad),
    ):
        answer = await job(relay, **fields)
        assert refused(answer) == (400, param, code), (fields, answer.text)
    assert (await relay.http.get("/v1/fine_tuning/jobs")).json()["data"] == []


async def test_files_from_before_there_were_pictures_are_of_text(tmp_path: Path) -> None:
    path = tmp_path / "relay.db"
    engine = create_engine(f"sqlite:///{path}")
    with engine.begin() as db:
        migrate.run(db, "0014")
    engine.dispose()
    with closing(sqlite3.connect(path)) as old:
        old.execute("INSERT INTO users (id, name, created_at) VALUES ('user-1', 'ada', 1.5)")
        old.execute(
            "INSERT INTO files (id, owner, filename, purpose, bytes, sha256, rows, created_at) "
            "VALUES ('file-1', 'user-1', 'a.jsonl', 'fine-tune', 1, 'x', 1, 1.5)"
        )
        old.commit()
    store = Store(f"sqlite+aiosqlite:///{path}")
    await store.open()
    await store.close()
    with closing(sqlite3.connect(path)) as new:
        assert new.execute("SELECT kind, captioned, report FROM files").fetchall() == [("text", None, None)]
