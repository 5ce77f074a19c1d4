"""What a file holds is told before a job; and a data set grows by one call, while jobs keep their version."""

import asyncio
import json
from typing import Any

from aiohttp import web

from tests.relay.conftest import CHAT_ROW, Relay
from tests.relay.double_gpu import BASE, DoubleGpu

ROW = json.loads(CHAT_ROW)


def answer(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": text}]}


async def add(relay: Relay, file_id: str, *rows: Any) -> Any:
    return await relay.http.post(f"/api/datasets/{file_id}/rows", json={"rows": list(rows)})


async def content(relay: Relay, file_id: str) -> list[Any]:
    raw = (await relay.http.get(f"/v1/files/{file_id}/content")).text
    return [json.loads(line) for line in raw.splitlines()]


async def test_an_edited_answer_is_added_once_however_often_it_is_sent(relay: Relay) -> None:
    file_id = await relay.upload(CHAT_ROW * 2 + CHAT_ROW.strip())
    for added in (1, 0):
        told = (await add(relay, file_id, answer("The captain."))).json()
        assert (told["id"], told["rows"], told["added"], told["duplicates"]) == (file_id, 4, added, 1 - added)
    assert await content(relay, file_id) == [ROW, ROW, ROW, answer("The captain.")]
    assert len(relay.stored()) == 1, "the version before is gone"


async def test_several_at_once_are_all_kept(relay: Relay) -> None:
    file_id = await relay.upload()
    answers = await asyncio.gather(*(add(relay, file_id, answer(f"Answer {i}")) for i in range(4)))
    assert [a.status_code for a in answers] == [200] * 4
    assert {m["messages"][1]["content"] for m in (await content(relay, file_id))[3:]} == {
        f"Answer {i}" for i in range(4)
    }


async def test_a_job_keeps_the_version_that_it_began_with(relay: Relay, gpu: DoubleGpu) -> None:
    file_id = await relay.upload()
    await relay.openai.fine_tuning.jobs.create(model=BASE, training_file=file_id)
    assert (await add(relay, file_id, answer("New."))).status_code == 200
    assert len(relay.stored()) == 2
    grant = await gpu.next_grant()
    assert grant.job.training_file.bytes == len(CHAT_ROW) * 3


async def test_a_data_set_is_begun_with_its_first_rows(relay: Relay) -> None:
    made = await relay.http.post("/api/datasets", json={"name": "my answers", "rows": [answer("a"), answer("b")]})
    told = made.json()
    assert (made.status_code, told["filename"], told["rows"]) == (200, "my answers.jsonl", 2)
    assert (await add(relay, told["id"], answer("c"))).json()["rows"] == 3


async def test_what_is_no_row_of_a_data_set_is_refused_and_nothing_changes(relay: Relay) -> None:
    file_id = await relay.upload()
    bad = await add(relay, file_id, answer("x"), {"messages": [{"role": "robot", "content": "x"}]})
    assert (bad.status_code, "rows.1: messages[0].role" in bad.json()["error"]["message"]) == (400, True)
    assert len(await content(relay, file_id)) == 3
    table = await relay.http.post(
        "/v1/files", data={"purpose": "fine-tune"}, files={"file": ("a.csv", b"prompt,completion\na,b\n")}
    )
    refused = await add(relay, table.json()["id"], answer("x"))
    assert (refused.status_code, "only JSON lines can grow" in refused.json()["error"]["message"]) == (400, True)
    assert (await add(relay, "file-none", answer("x"))).status_code == 404


async def test_a_report_tells_what_all_of_a_file_holds(relay: Relay) -> None:
    file_id = await relay.upload(CHAT_ROW * 3 + '{"text": "words"}\n')
    told = (await relay.http.get(f"/v1/files/{file_id}/report")).json()
    assert (told["object"], told["rows"], told["kinds"]) == ("file.report", 4, {"chat": 3, "text": 1})
    assert (told["duplicates"], told["duplicate_lines"], told["errors"]) == (2, [2, 3], {})
    assert "seen" not in told


async def test_with_a_model_the_report_has_what_a_gpu_says_of_rows_from_all_of_the_file(
    relay: Relay, gpu: DoubleGpu
) -> None:
    asked: list[Any] = []

    async def tell(request: web.Request, body: bytes) -> web.StreamResponse:
        asked.append(json.loads(body))
        return web.json_response({"object": "data.report", "rows": len(asked[-1]["rows"]), "truncated": 7})

    gpu.layers = tell
    file_id = await relay.upload("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(2500)))
    told = (await relay.http.get(f"/v1/files/{file_id}/report?model={BASE}&max_length_tokens=64")).json()
    assert told["seen"]["truncated"] == 7
    [sent] = asked
    assert (sent["model"], sent["max_length_tokens"]) == (BASE, 64)
    assert [row["line"] for row in sent["rows"]][:3] == [1, 4, 7]
    assert sent["rows"][-1]["line"] > 2490
    missing = await relay.http.get(f"/v1/files/{file_id}/report?model=nothing")
    assert missing.json()["error"]["code"] == "model_not_found"


async def test_tables_arrays_and_text_are_taken_and_a_broken_one_is_refused_by_kind_and_line(relay: Relay) -> None:
    for name, body, rows in (
        ("a.csv", b"instruction,output\nSay a,a\nSay b,b\n", 2),
        ("a.json", json.dumps([ROW, answer("x")]).encode(), 2),
        ("a.txt", b"A story. " * 500, 3),
    ):
        sent = await relay.http.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": (name, body)})
        assert (sent.status_code, sent.json().get("rows")) == (200, rows), sent.text
    bad = b'prompt,completion\na,b\n"c,d\n'
    sent = await relay.http.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("a.csv", bad)})
    assert (sent.status_code, "line 3: not CSV" in sent.json()["error"]["message"]) == (400, True)
