"""Adapters come back as they were saved or not at all; the cache holds what its names promise."""

import hashlib
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import wire
from adapter import DESCRIPTION, WEIGHTS, AdapterMeta, LoraMeta
from gpu_service.artifacts import (
    Adapter,
    BlobCache,
    atomic_file,
    load,
    save,
)
from gpu_service.errors import BadAdapter, BadBlob
from gpu_service.layers import TensorInfo, llama_tensors
from gpu_service.lora import Lora

H, INNER = 6, 10  # hidden size, MLP's inner size
MODEL = llama_tensors(
    {
        "model.embed_tokens.weight": (12, H),
        "model.layers.0.self_attn.q_proj.weight": (H, H),
        "model.layers.0.self_attn.q_proj.bias": (H,),
        "model.layers.0.mlp.up_proj.weight": (INNER, H),
        "model.layers.0.mlp.down_proj.weight": (H, INNER),
        "model.norm.weight": (H,),
    }
)
BY_NAME = {t.name: t for t in MODEL}
DOWN, NORM = "model.layers.0.mlp.down_proj.weight", "model.norm.weight"


def adapter(full: dict[str, torch.Tensor], lora: dict[str, tuple[int, float]], /, **changed: Any) -> Adapter:
    """`lora`: rank and alpha by tensor."""
    how: dict[str, LoraMeta] = changed.get("lora", {})
    pairs = {}
    for name, (rank, alpha) in lora.items():
        out_size, in_size = BY_NAME[name].shape
        pairs[name] = Lora(torch.randn(rank, in_size), torch.randn(out_size, rank), alpha / rank)
        if how.get(name, LoraMeta(rank=1, alpha=1)).dora:
            pairs[name] = replace(pairs[name], magnitude=torch.rand(out_size))
        if how.get(name, LoraMeta(rank=1, alpha=1)).rslora:
            pairs[name] = replace(pairs[name], scale=alpha / rank**0.5)
    fields: dict[str, Any] = {
        "family": "llama",
        "base_model": "tiny",
        "base_revision": "r1",
        "layers": [wire.LayerSpec()],
        "lora": {name: LoraMeta(rank=rank, alpha=alpha) for name, (rank, alpha) in lora.items()},
        "tensors": {name: BY_NAME[name].shape for name in [*full, *lora]},
        "hyperparameters": wire.Hyperparameters(n_epochs=3, learning_rate=1e-4),
        "created_at": 1.8e9,
        "trained_tokens": 123,
        "training_loss": 0.5,
    }
    return Adapter(AdapterMeta(**(fields | changed)), full, pairs)


def small() -> Adapter:
    return adapter({NORM: torch.randn(H)}, {DOWN: (2, 4.0)})


def files(folder: Path) -> dict[str, Path]:
    return {name: folder / name for name in (WEIGHTS, DESCRIPTION)}


def inside(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def same(a: Adapter, b: Adapter) -> bool:
    return (
        a.meta == b.meta
        and a.full.keys() == b.full.keys()
        and a.lora.keys() == b.lora.keys()
        and all(torch.equal(a.full[n], b.full[n]) and a.full[n].dtype == b.full[n].dtype for n in a.full)
        and all(
            a.lora[n].tensors.keys() == b.lora[n].tensors.keys()
            and all(torch.equal(x, b.lora[n].tensors[key]) for key, x in a.lora[n].tensors.items())
            and a.lora[n].scale == b.lora[n].scale
            for n in a.lora
        )
    )


# --- adapters --------------------------------------------------------------------------------------------------------


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
def test_any_adapter_comes_back_as_it_was_saved(tmp_path: Path, data: st.DataObject) -> None:
    how = data.draw(
        st.fixed_dictionaries({t.name: st.sampled_from(["no", "full", *(["lora"] if t.linear else [])]) for t in MODEL})
    )
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    any_lora = st.builds(LoraMeta, rank=st.integers(1, 4), alpha=st.floats(0.1, 64), dora=..., rslora=...)
    lora = {name: data.draw(any_lora) for name, kind in how.items() if kind == "lora"}
    made = adapter(
        {n: torch.randn(BY_NAME[n].shape).to(dtype) for n, kind in how.items() if kind == "full"},
        {n: (x.rank, x.alpha) for n, x in lora.items()},
        lora=lora,
    )
    manifest = save(tmp_path, made)
    assert same(load(files(tmp_path), MODEL), made)
    for ref in manifest.files:
        content = (tmp_path / ref.name).read_bytes()
        assert (ref.sha256, ref.bytes) == (hashlib.sha256(content).hexdigest(), len(content))
    assert inside(tmp_path) == [DESCRIPTION, WEIGHTS]


def test_the_file_holds_only_what_was_trained_under_the_names_that_peft_would_know(tmp_path: Path) -> None:
    save(tmp_path, small())
    assert sorted(safetensors.torch.load_file(tmp_path / WEIGHTS)) == [
        "model.layers.0.mlp.down_proj.lora_A.weight",
        "model.layers.0.mlp.down_proj.lora_B.weight",
        NORM,
    ]


def test_views_of_a_larger_buffer_are_saved_alone(tmp_path: Path) -> None:
    buffer = torch.arange(1000.0)
    made = adapter({NORM: buffer[10 : 10 + H], "model.layers.0.self_attn.q_proj.bias": buffer[20 : 20 + H]}, {})
    save(tmp_path, made)
    assert (tmp_path / WEIGHTS).stat().st_size < 1000
    assert same(load(files(tmp_path), MODEL), made)


def test_a_flipped_bit_anywhere_in_the_weights_is_detected(tmp_path: Path) -> None:
    save(tmp_path, small())
    whole = (tmp_path / WEIGHTS).read_bytes()
    for at in range(0, len(whole), 7):
        (tmp_path / WEIGHTS).write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(BadAdapter, match="is not the file"):
            load(files(tmp_path), MODEL)


def test_weights_and_description_of_different_adapters_do_not_load(tmp_path: Path) -> None:
    save(tmp_path / "a", small())
    save(tmp_path / "b", small())
    mixed = {WEIGHTS: tmp_path / "a" / WEIGHTS, DESCRIPTION: tmp_path / "b" / DESCRIPTION}
    with pytest.raises(BadAdapter, match="is not the file"):
        load(mixed, MODEL)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: adapter({NORM: torch.randn(H + 1)}, {}), rf"{NORM} is \[7\], not \[6\]"),
        (lambda: adapter({NORM: torch.full((H,), torch.nan)}, {}), f"{NORM} has values that are no finite"),
        (lambda: adapter({NORM: torch.full((H,), torch.inf)}, {}), "no finite"),
        (lambda: adapter({NORM: torch.ones(H, dtype=torch.int64)}, {}), "no finite"),
        (lambda: adapter({NORM: torch.randn(H)}, {}, tensors={NORM: (H + 1,)}), "made for tiny, and this model has no"),
        (
            lambda: adapter({}, {DOWN: (2, 4.0)}, lora={DOWN: LoraMeta(rank=3, alpha=4.0)}),
            r"lora_A.weight is \[2, 10\], not \[3, 10\]",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(tmp_path: Path, made: Any, said: str) -> None:
    save(tmp_path, made())
    with pytest.raises(BadAdapter, match=said):
        load(files(tmp_path), MODEL)


def test_an_adapter_of_another_model_is_refused_by_the_tensors_that_are_missing(tmp_path: Path) -> None:
    save(tmp_path, small())
    other = [t for t in MODEL if t.name != DOWN]
    with pytest.raises(BadAdapter, match=f"made for tiny, and this model has no such {DOWN}"):
        load(files(tmp_path), other)
    wide = [TensorInfo(t.name, (99, *t.shape[1:]), t.part, t.layer, t.linear) for t in MODEL]
    with pytest.raises(BadAdapter, match="and this model has no such"):
        load(files(tmp_path), wide)


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "can't be used"), ("{}", "meta: Field required"), ('{"format": 2}', "can't be used"), ("\x80", "can't be")],
)
def test_a_description_that_is_none_is_refused(tmp_path: Path, text: str, said: str) -> None:
    save(tmp_path, small())
    (tmp_path / DESCRIPTION).write_text(text, encoding="latin-1")
    with pytest.raises(BadAdapter, match=said):
        load(files(tmp_path), MODEL)


def test_an_adapter_of_a_later_format_is_refused_as_such(tmp_path: Path) -> None:
    """Whatever else it holds: a field of tomorrow may change what the others mean."""
    save(tmp_path, small())
    told = json.loads((tmp_path / DESCRIPTION).read_bytes())
    told["meta"] |= {"format": 3, "field_of_tomorrow": 1}
    (tmp_path / DESCRIPTION).write_text(json.dumps(told))
    with pytest.raises(BadAdapter, match="of format 3, and this gpu reads up to 2: update"):
        load(files(tmp_path), MODEL)


def test_an_adapter_of_the_first_format_still_loads(tmp_path: Path) -> None:
    made = small()
    save(tmp_path, made)
    told = json.loads((tmp_path / DESCRIPTION).read_bytes())
    told["meta"]["format"] = 1
    for how in told["meta"]["lora"].values():
        del how["dora"], how["rslora"]
    (tmp_path / DESCRIPTION).write_text(json.dumps(told))
    assert load(files(tmp_path), MODEL).lora[DOWN].scale == 2.0


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    save(tmp_path, small())
    with pytest.raises(BadAdapter, match=f"lacks {WEIGHTS}"):
        load({DESCRIPTION: tmp_path / DESCRIPTION}, MODEL)


def test_a_pickle_is_never_read_even_if_its_hash_is_right(tmp_path: Path) -> None:
    save(tmp_path, small())
    old = hashlib.sha256((tmp_path / WEIGHTS).read_bytes()).hexdigest()
    torch.save({NORM: torch.randn(H)}, tmp_path / WEIGHTS)
    new = hashlib.sha256((tmp_path / WEIGHTS).read_bytes()).hexdigest()
    (tmp_path / DESCRIPTION).write_text((tmp_path / DESCRIPTION).read_text().replace(old, new))
    with pytest.raises(BadAdapter, match="no safetensors file"):
        load(files(tmp_path), MODEL)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(TypeError), atomic_file(path) as file:
        file.writelines([b"half", "not bytes"])  # type: ignore[list-item]
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


# --- blobs -----------------------------------------------------------------------------------------------------------


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


async def chunks(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


async def put(cache: BlobCache, content: bytes) -> Path:
    return await cache.store(sha(content), len(content), chunks(content[:1], content[1:]))


async def test_a_blob_that_was_stored_is_found_by_a_later_process(tmp_path: Path) -> None:
    path = await put(BlobCache(tmp_path, 1000), b"hello")
    assert path.read_bytes() == b"hello"
    later = BlobCache(tmp_path, 1000)
    assert later.path(sha(b"hello")) == path
    assert later.path(sha(b"other")) is None


@pytest.mark.parametrize("sent", [b"hellx", b"hell", b"hello!", b""])
async def test_a_blob_that_is_not_what_was_promised_is_refused_and_nothing_stays(tmp_path: Path, sent: bytes) -> None:
    cache = BlobCache(tmp_path, 1000)
    with pytest.raises(BadBlob):
        await cache.store(sha(b"hello"), 5, chunks(sent[:2], sent[2:]))
    assert inside(tmp_path) == []
    assert cache.path(sha(b"hello")) is None


async def test_a_transfer_that_breaks_leaves_nothing_and_can_be_made_again(tmp_path: Path) -> None:
    async def breaking() -> AsyncIterator[bytes]:
        yield b"he"
        raise ConnectionError

    cache = BlobCache(tmp_path, 1000)
    with pytest.raises(ConnectionError):
        await cache.store(sha(b"hello"), 5, breaking())
    assert inside(tmp_path) == []
    assert (await put(cache, b"hello")).exists()


async def test_a_blob_damaged_on_disk_is_removed_instead_of_served(tmp_path: Path) -> None:
    path = await put(BlobCache(tmp_path, 1000), b"hello")
    path.write_bytes(b"hellx")
    assert BlobCache(tmp_path, 1000).path(path.name) is None
    assert not path.exists()


async def test_what_a_killed_process_left_half_written_is_removed_at_the_next_start(tmp_path: Path) -> None:
    (tmp_path / f"{sha(b'x')}.1234.part").write_bytes(b"half")
    BlobCache(tmp_path, 1000)
    assert inside(tmp_path) == []


async def test_past_the_budget_the_least_recently_used_goes(tmp_path: Path) -> None:
    cache = BlobCache(tmp_path, 25)
    a, b, c = b"a" * 10, b"b" * 10, b"c" * 10
    await put(cache, a)
    await put(cache, b)
    assert cache.path(sha(a))  # used again
    await put(cache, c)
    assert (cache.path(sha(a)) is None, cache.path(sha(b)) is None, cache.path(sha(c)) is None) == (False, True, False)


async def test_what_is_kept_and_what_just_came_are_never_removed(tmp_path: Path) -> None:
    cache = BlobCache(tmp_path, 15)
    a, b, c = b"a" * 10, b"b" * 10, b"c" * 40
    await put(cache, a)
    with cache.keep(sha(a), sha(a)), cache.keep(sha(a)):
        await put(cache, b)
        assert cache.path(sha(a))
    await put(cache, c)
    assert cache.path(sha(a)) is None
    assert cache.path(sha(c))


def test_a_file_that_is_added_is_a_copy_found_by_its_hash(tmp_path: Path) -> None:
    cache = BlobCache(tmp_path / "blobs", 1000)
    source = tmp_path / "train.jsonl"
    source.write_bytes(b"rows")
    ref = cache.add(source)
    assert ref == wire.FileRef(name="train.jsonl", sha256=sha(b"rows"), bytes=4)
    source.write_bytes(b"changed")
    path = cache.path(ref.sha256)
    assert path is not None
    assert path.read_bytes() == b"rows"
    source.write_bytes(b"rows")
    assert cache.add(source) == ref
