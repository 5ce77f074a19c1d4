"""Signatures hold against every change; messages refuse what they do not know; layer specs have one grammar."""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

import wire

KEY, BY, NOW = "secret", wire.SignedBy(gpu_id="gpu-1", epoch=3), 1_800_000_000.0
METHOD, TARGET = "POST", "/v1/chat/completions?a=1"
SHA = wire.body_sha256(b'{"model": "m"}')


def signed() -> dict[str, str]:
    return wire.sign(KEY, BY, METHOD, TARGET, SHA, NOW)


def check(headers: dict[str, str], **changed: Any) -> str:
    fields: dict[str, Any] = {"key": KEY, "method": METHOD, "target": TARGET, "now": NOW, "seen": wire.SeenNonces()}
    fields |= changed
    by = wire.SignedBy.claimed(headers)
    return wire.verify(fields["key"], by, fields["method"], fields["target"], headers, fields["now"], fields["seen"])


def test_a_signed_request_verifies_and_gives_the_promised_body_hash() -> None:
    assert check(signed()) == SHA


@pytest.mark.parametrize("header", list(signed()))
def test_a_request_with_any_header_altered_or_missing_fails(header: str) -> None:
    headers = signed()
    with pytest.raises(wire.BadSignature):
        check({name: value for name, value in headers.items() if name != header})
    for altered in (headers[header] + "0", "1" + headers[header], "", "nan", "é"):
        with pytest.raises(wire.BadSignature):
            check(headers | {header: altered})


@pytest.mark.parametrize(
    "changed", [{"key": "other"}, {"method": "GET"}, {"target": "/v1/chat/completions"}, {"target": TARGET + "0"}]
)
def test_a_request_that_differs_from_what_was_signed_fails(changed: dict[str, Any]) -> None:
    with pytest.raises(wire.BadSignature, match="does not fit"):
        check(signed(), **changed)


def test_a_signature_of_an_earlier_enrolment_fails() -> None:
    with pytest.raises(wire.BadSignature):
        check(signed() | {wire.HEADER_EPOCH: "4"})


@given(st.lists(st.text(max_size=5), min_size=2, max_size=4), st.data())
def test_moving_a_character_from_one_signed_field_to_the_next_changes_the_signature(
    fields: list[str], data: st.DataObject
) -> None:
    i = data.draw(st.integers(0, len(fields) - 2))
    if fields[i]:
        moved = [*fields[:i], fields[i][:-1], fields[i][-1] + fields[i + 1], *fields[i + 2 :]]
        assert wire._mac(KEY, *fields) != wire._mac(KEY, *moved)


def test_a_replayed_request_fails_and_a_second_of_its_own_does_not() -> None:
    seen, headers = wire.SeenNonces(), signed()
    check(headers, seen=seen)
    with pytest.raises(wire.BadSignature, match="sent before"):
        check(headers, seen=seen, now=NOW + wire.SIGNATURE_WINDOW_S)
    check(signed(), seen=seen)


@pytest.mark.parametrize("late_s", [-60.1, 60.1, 1e9])
def test_a_stale_request_fails(late_s: float) -> None:
    with pytest.raises(wire.BadSignature, match="old"):
        check(signed(), now=NOW + late_s)


def test_no_request_is_accepted_twice_anywhere_in_its_window() -> None:
    seen, headers = wire.SeenNonces(), signed()
    check(headers, seen=seen, now=NOW - 60)  # a clock that runs ahead
    for later in range(-60, 200, 5):
        with pytest.raises(wire.BadSignature):
            check(headers, seen=seen, now=NOW + later)


def test_a_forged_request_leaves_no_nonce_behind() -> None:
    seen, headers = wire.SeenNonces(), signed()
    with pytest.raises(wire.BadSignature):
        check(headers, seen=seen, key="other")
    check(headers, seen=seen)


def test_the_memory_of_nonces_holds_no_more_than_the_window() -> None:
    seen = wire.SeenNonces(window_s=10)
    for i in range(1000):
        assert seen.add(str(i), now=float(i))
    assert len(seen._expiry) <= 20 + 1


def test_only_the_key_of_this_enrolment_answers_a_challenge() -> None:
    proofs = {
        wire.challenge_proof(KEY, "n" * 16, BY),
        wire.challenge_proof("other", "n" * 16, BY),
        wire.challenge_proof(KEY, "m" * 16, BY),
        wire.challenge_proof(KEY, "n" * 16, wire.SignedBy(gpu_id="gpu-1", epoch=4)),
        wire.challenge_proof(KEY, "n" * 16, wire.SignedBy(gpu_id="gpu-2", epoch=3)),
    }
    assert len(proofs) == 5


def messages(of: type[wire.Message] = wire.Message) -> list[type[wire.Message]]:
    return [m for c in of.__subclasses__() for m in (c, *messages(c)) if m.__module__ == wire.__name__]


@pytest.mark.parametrize("message", messages(), ids=lambda m: m.__name__)
def test_every_message_refuses_a_field_that_it_does_not_know(message: type[wire.Message]) -> None:
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        message.model_validate({"surprise": 1})


NUMBER = st.integers(0, 999).map(str)
RANGE = st.one_of(
    st.just("all"),
    NUMBER,
    st.tuples(NUMBER, NUMBER).map("-".join),
    NUMBER.map("first:{}".format),
    NUMBER.map("last:{}".format),
    st.sampled_from(["mid", "down.0", "up.1-3"]),
)


@given(st.lists(RANGE, min_size=1, max_size=6), st.sampled_from([",", ", "]))
def test_every_list_of_ranges_is_a_layers_field(items: list[str], comma: str) -> None:
    text = comma.join(items)
    assert wire.LayerSpec(layers=text).layers == text


@pytest.mark.parametrize("text", ["", ",", "1,", "-3", "3-", "1-2-3", "first:", "first:-1", "first:1-2", "1..3", "1 2"])
def test_what_is_no_range_is_refused_and_the_forms_are_named(text: str) -> None:
    with pytest.raises(ValidationError, match="use all, first:4, last:8, 3, 8-15 or a block name"):
        wire.LayerSpec(layers=text)


@pytest.mark.parametrize("pattern", ["(", "[", "*", "a{99999999999999999999}", "(?P<a>x)(?P<a>y)"])
def test_a_pattern_that_does_not_compile_is_refused_as_a_field_error_not_a_crash(pattern: str) -> None:
    with pytest.raises(ValidationError, match="is no regular expression"):
        wire.LayerSpec(match=pattern)


def test_the_deepest_pattern_that_fits_is_no_crash() -> None:
    deepest = "(" * 250 + ")" * 250
    with contextlib.suppress(ValidationError):  # how deep it may go is the interpreter's business
        assert wire.LayerSpec(match=deepest).match == deepest


@pytest.mark.parametrize(
    "fields",
    [{"rank": 0}, {"rank": 2000}, {"alpha": 0}, {"alpha": float("nan")}, {"parts": []}, {"method": "magic"},
     {"quantize": "2bit"}, {"match": "a" * 501}],
)  # fmt: skip
def test_a_value_out_of_bounds_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        wire.LayerSpec.model_validate(fields)


def error_of(build: Callable[[], object]) -> tuple[str, str | None]:
    with pytest.raises(ValidationError) as caught:
        build()
    return wire.validation_message([dict(error) for error in caught.value.errors()])


def test_a_validation_error_becomes_one_sentence_that_names_the_fields() -> None:
    message, param = error_of(lambda: wire.LayerSpec.model_validate({"rank": 0, "layers": "x y"}))
    assert param == "layers"
    assert message.startswith("layers: 'x y' is no layer range")
    assert "rank: Input should be greater than or equal to 1" in message
