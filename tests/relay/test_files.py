"""Files: what goes in comes out, and what is refused leaves nothing."""

import asyncio
from typing import Any

import httpx2
import openai
import pytest

from tests.relay.conftest import CHAT_ROW, Relay, until

ON_BOTH_DATABASES = {  # the others are about HTTP
    "test_a_file_comes_back_as_it_was_until_it_is_deleted",
    "test_the_same_content_twice_is_stored_once_and_stays_for_the_second",
    "test_pages_of_files_cover_all_of_them_in_order",
    "test_a_caller_who_leaves_in_mid_upload_leaves_nothing",
}


async def test_a_file_comes_back_as_it_was_until_it_is_deleted(relay: Relay) -> None:
    content = CHAT_ROW.encode() * 2
    made = await relay.openai.files.create(file=("한글 rows.jsonl", content), purpose="fine-tune")
    assert (made.filename, made.bytes, made.purpose) == ("한글 rows.jsonl", len(content), "fine-tune")
    assert await relay.openai.files.retrieve(made.id) == made
    assert (await relay.openai.files.content(made.id)).content == content
    assert (await relay.openai.files.delete(made.id)).deleted
    assert relay.stored() == []
    with pytest.raises(openai.NotFoundError):
        await relay.openai.files.retrieve(made.id)


async def test_the_same_content_twice_is_stored_once_and_stays_for_the_second(relay: Relay) -> None:
    first, second = await relay.upload(), await relay.upload()
    assert len(relay.stored()) == 1
    await relay.openai.files.delete(first)
    assert (await relay.openai.files.content(second)).text == CHAT_ROW * 3


async def test_pages_of_files_cover_all_of_them_in_order(relay: Relay) -> None:
    ids = []
    for _ in range(5):
        relay.clock.advance(1)
        ids.append(await relay.upload())
    listed = [f.id async for f in relay.openai.files.list(limit=2, order="asc")]
    assert listed == ids
    assert [f.id async for f in relay.openai.files.list(limit=2)] == ids[::-1]
    page = await relay.openai.files.list(limit=2, after=ids[2])
    assert ([f.id for f in page.data], page.has_more) == ([ids[1], ids[0]], False)


async def test_a_bad_training_file_is_refused_by_line_and_leaves_nothing(relay: Relay) -> None:
    content = CHAT_ROW + '{"messages": 3}\n\nnot json\n'
    with pytest.raises(openai.BadRequestError) as caught:
        await relay.upload(content)
    assert (caught.value.code, caught.value.param) == ("invalid_training_file", "file")
    assert "line 2" in caught.value.message
    assert "line 4" in caught.value.message
    assert relay.stored() == []
    assert (await relay.openai.files.list()).data == []


async def test_an_empty_file_is_refused(relay: Relay) -> None:
    with pytest.raises(openai.BadRequestError, match="no rows"):
        await relay.upload("")


@pytest.mark.parametrize("told", [True, False])
async def test_a_file_over_the_limit_is_413_and_leaves_nothing(relay: Relay, told: bool) -> None:
    file = CHAT_ROW.encode() * 2000
    form = httpx2.Request("POST", relay.url, data={"purpose": "fine-tune"}, files={"file": ("a", file)})
    body = form.read()

    async def chunks() -> Any:
        for at in range(0, len(body), 10_000):
            yield body[at : at + 10_000]

    response = await relay.http.post(
        "/v1/files", content=body if told else chunks(), headers={"content-type": form.headers["content-type"]}
    )
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "request_too_large"
    assert relay.stored() == []


async def test_fields_may_come_after_the_file(relay: Relay) -> None:
    parts: list[Any] = [("file", ("a.jsonl", CHAT_ROW.encode())), ("purpose", (None, "fine-tune"))]
    response = await relay.http.post("/v1/files", files=parts)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("parts", "param"),
    [
        ([("purpose", (None, "fine-tune"))], "file"),
        ([("file", ("a", b"{}"))], "purpose"),
        ([("file", ("a", b"{}")), ("purpose", (None, "assistants"))], "purpose"),
        ([("file", ("a", b"{}")), ("file", ("b", b"{}"))], "file"),
        ([("file", ("a", b"{}")), ("expires_after[anchor]", (None, "created_at"))], "expires_after[anchor]"),
    ],
)
async def test_a_form_that_lacks_something_is_refused_by_name(relay: Relay, parts: list[Any], param: str) -> None:
    response = await relay.http.post("/v1/files", files=parts)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert relay.stored() == []


async def test_more_fields_than_any_form_has_are_refused(relay: Relay) -> None:
    many = [(f"field-{n}", (None, "x")) for n in range(9)]
    response = await relay.http.post("/v1/files", files=many)
    assert response.status_code == 400
    assert "more than 8 fields" in response.json()["error"]["message"]


async def test_a_form_that_is_large_beside_its_file_is_413(relay: Relay) -> None:
    async def chunks() -> Any:
        for _ in range(40):
            yield b"\r\n" * 5_000  # before the first boundary: of no field and no file

    headers = {"content-type": "multipart/form-data; boundary=x"}
    response = await relay.http.post("/v1/files", content=chunks(), headers=headers)
    assert response.status_code == 413
    assert relay.stored() == []


async def test_a_boundary_longer_than_allowed_is_refused(relay: Relay) -> None:
    headers = {"content-type": f"multipart/form-data; boundary={'x' * 300}"}
    response = await relay.http.post("/v1/files", content=b"hello", headers=headers)
    assert response.status_code == 400
    assert "malformed" in response.json()["error"]["message"]


async def test_what_is_no_form_is_refused(relay: Relay) -> None:
    for headers in ({}, {"content-type": "application/json"}, {"content-type": "multipart/form-data; boundary=x"}):
        response = await relay.http.post("/v1/files", content=b"hello", headers=headers)
        assert response.status_code == 400, headers


async def test_a_caller_who_leaves_in_mid_upload_leaves_nothing(relay: Relay) -> None:
    host, port = relay.url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    head = (
        "POST /v1/files HTTP/1.1\r\nhost: x\r\ncontent-length: 100000\r\n"
        f"authorization: {relay.http.headers['authorization']}\r\ncontent-type: multipart/form-data; boundary=b\r\n\r\n"
        '--b\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n'
    )
    writer.write(head.encode() + b"x" * 5000)
    await writer.drain()
    await until(relay.stored)
    writer.close()
    await until(lambda: not relay.stored())


async def test_a_name_can_not_point_elsewhere(relay: Relay) -> None:
    response = await relay.http.post(
        "/v1/files", files={"file": ("../../etc/passwd", CHAT_ROW.encode())}, data={"purpose": "fine-tune"}
    )
    assert response.json()["filename"] == "passwd"
