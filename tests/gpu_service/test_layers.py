"""The layer spec selects exactly what it says, or says what exists."""

import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from gpu_service import layers
from gpu_service.costs import Estimate, Shape, estimate, summary, weights_bytes
from gpu_service.errors import BadRequest, GpuError, NoSuchLayer, UnsupportedModel
from gpu_service.layers import TensorInfo, llama_tensors, select
from wire import LAYERS_PATTERN, LayerSpec

N, H, INNER, V = 12, 8, 16, 32  # layers, hidden size, MLP's inner size, vocabulary


def shapes(*, n_layers: int = N, head: bool = True, biases: bool = False) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, H), "model.norm.weight": (H,)}
    if head:
        found["lm_head.weight"] = (V, H)
    for i in reversed(range(n_layers)):  # a checkpoint's order means nothing
        at = f"model.layers.{i}."
        for p in "qkvo":
            found[f"{at}self_attn.{p}_proj.weight"] = (H // 2 if p in "kv" else H, H)
            if biases and p != "o":
                found[f"{at}self_attn.{p}_proj.bias"] = (H // 2 if p in "kv" else H,)
        found |= {f"{at}mlp.gate_proj.weight": (INNER, H), f"{at}mlp.up_proj.weight": (INNER, H)}
        found |= {f"{at}mlp.down_proj.weight": (H, INNER)}
        found |= {f"{at}input_layernorm.weight": (H,), f"{at}post_attention_layernorm.weight": (H,)}
    return found


Tensors = list[TensorInfo]
LLAMA = llama_tensors(shapes())
TIED = llama_tensors(shapes(head=False))
QWEN = llama_tensors(shapes(biases=True))


def names(*specs: dict[str, Any], tensors: Tensors = LLAMA, tied: bool = False) -> list[str]:
    found = select(tensors, [LayerSpec(**s) for s in specs], tied=tied)
    return [t.name for t in found.full] + [t.tensor.name for t in found.lora]


def full(**fields: Any) -> dict[str, Any]:
    return {"method": "full", **fields}


def refusal(
    error: type[GpuError], *specs: dict[str, Any], tensors: list[TensorInfo] = LLAMA, tied: bool = False
) -> str:
    with pytest.raises(error) as caught:
        names(*specs, tensors=tensors, tied=tied)
    assert type(caught.value) is error
    assert (caught.value.status, caught.value.param) == (400, "layers")
    return caught.value.message


# --- tensors ---------------------------------------------------------------------------------------------------------


def test_tensors_stand_in_the_order_of_the_forward_pass_whatever_the_checkpoints_order() -> None:
    assert LLAMA[0].part == "embed"
    assert [t.part for t in LLAMA[-2:]] == ["norm.final", "head"]
    assert [t.layer for t in LLAMA[1:-2]] == sorted(i for i in range(N) for _ in range(9))
    assert [t.part for t in LLAMA if t.layer == 10] == list(layers.LAYER_PARTS.values())
    assert [t.name for t in QWEN if t.layer == 0 and t.part == "attn.q"] == [
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.self_attn.q_proj.bias",
    ]


def test_only_matrices_that_multiply_are_linear() -> None:
    assert {t.part for t in QWEN if t.linear} == {p for p in layers.PARTS if p.startswith(("attn", "mlp", "head"))}
    assert not any(t.linear for t in QWEN if len(t.shape) == 1 or t.part == "embed")


def test_a_checkpoint_with_a_foreign_tensor_is_refused_by_name_but_rotary_constants_are_not() -> None:
    with pytest.raises(UnsupportedModel, match=r"q_norm\.weight"):
        llama_tensors(shapes() | {"model.layers.0.self_attn.q_norm.weight": (4,)})
    old = llama_tensors(shapes() | {"model.layers.0.self_attn.rotary_emb.inv_freq": (4,)})
    assert old == LLAMA


def test_the_demo_model_is_understood_down_to_its_last_number(smol_dir: Path) -> None:
    with safe_open(smol_dir / "model.safetensors", "pt") as file:
        smol = llama_tensors({name: tuple(file.get_slice(name).get_shape()) for name in file.keys()})  # noqa: SIM118
    norms = select(smol, [LayerSpec(method="full", parts=["norm"])], tied=True)
    assert (norms.total_tensors, norms.total_params, norms.n_layers) == (272, 134_515_008, 30)
    assert (norms.n_tensors, norms.n_trainable) == (61, 61 * 576)


# --- layers ----------------------------------------------------------------------------------------------------------


def test_layer_one_is_not_layers_ten_and_eleven() -> None:
    assert names(full(parts=["attn.q"], layers="1")) == ["model.layers.1.self_attn.q_proj.weight"]
    assert names(full(parts=["attn.q"], match=r"layers\.1\.")) == ["model.layers.1.self_attn.q_proj.weight"]


@given(st.data())
def test_ranges_are_inclusive_and_a_list_is_their_union(data: st.DataObject) -> None:
    number = st.integers(0, N - 1)
    expected: set[int] = set()
    items = []
    for _ in range(data.draw(st.integers(1, 4))):
        kind = data.draw(st.sampled_from(["one", "range", "first", "last", "all"]))
        a, b = sorted((data.draw(number), data.draw(number)))
        item, meant = {
            "one": (f"{a}", {a}),
            "range": (f"{a}-{b}", set(range(a, b + 1))),
            "first": (f"first:{a + 1}", set(range(a + 1))),
            "last": (f"last:{a + 1}", set(range(N - a - 1, N))),
            "all": ("all", set(range(N))),
        }[kind]
        items.append(item)
        expected |= meant
    found = select(LLAMA, [LayerSpec(parts=["attn", "mlp"], layers=",".join(items))], tied=False)
    assert {t.tensor.layer for t in found.lora} == expected
    assert found.n_tensors == 7 * len(expected)
    assert found.lowest_layer == min(expected)


@given(
    st.lists(st.from_regex(LAYERS_PATTERN, fullmatch=True), min_size=1, max_size=3).map(",".join),
    st.sampled_from(["full", "lora", "dora"]),
    st.sampled_from([*layers.PARTS, "attn.self", "conv", "time", "attn", "mlp", "norm", "x"]),
)
def test_whatever_the_grammar_allows_selects_tensors_of_the_part_or_is_refused(
    text: str, method: Any, part: str
) -> None:
    try:
        found = select(LLAMA, [LayerSpec(method=method, parts=[part], layers=text[:500])], tied=False)
    except (GpuError, ValueError):
        return
    chosen = [*found.full, *(t.tensor for t in found.lora)]
    assert chosen
    assert all(t.belongs_to(part) for t in chosen)
    assert bool(found.lora) == (method != "full")
    assert all(t.dora == (method == "dora") for t in found.lora)


@given(st.sets(st.sampled_from([p for p in layers.PARTS if p != "embed.position"]), min_size=1), st.integers(0, N - 1))
def test_specs_that_share_the_parts_among_them_select_what_one_spec_selects(parts: set[str], low: int) -> None:
    together = names(full(parts=sorted(parts), layers=f"{low}-{N - 1}"))
    apart = names(*(full(parts=[p], layers=f"{low}-{N - 1}") for p in sorted(parts)))
    assert together == apart
    assert len(set(together)) == len(together)
    assert together == [t.name for t in LLAMA if t.part in parts and (t.layer is None or t.layer >= low)]


@pytest.mark.parametrize("text", ["12", "8-12", "last:13", "first:13", "0-99999999999999", "first:" + "9" * 400])
def test_a_layer_that_the_model_lacks_is_refused_and_the_layers_are_named(text: str) -> None:
    message = refusal(NoSuchLayer, {"layers": text})
    assert f"'{text}' goes beyond the model: this model has layers 0-11; parts: attn (attn.q, attn.k," in message


@pytest.mark.parametrize("text", ["first:0", "last:0", "5-4"])
def test_an_empty_range_is_refused(text: str) -> None:
    assert "names no layer" in refusal(NoSuchLayer, {"layers": text})


@pytest.mark.parametrize("text", ["mid", "up.1-3", "3,down.0"])
def test_block_names_are_no_layers_of_a_text_model(text: str) -> None:
    assert "is no number of a layer: this model has layers 0-11" in refusal(NoSuchLayer, {"layers": text})


# --- parts -----------------------------------------------------------------------------------------------------------


def test_a_part_stands_for_its_finer_parts_and_no_part_for_one_that_begins_alike() -> None:
    parts = {t.name: t.part for t in LLAMA}
    assert {parts[n] for n in names(full(parts=["attn"]))} == {"attn.q", "attn.k", "attn.v", "attn.o"}
    assert {parts[n] for n in names(full(parts=["norm"]))} == {"norm.attn", "norm.mlp", "norm.final"}
    assert "This model has no part 'att'" in refusal(NoSuchLayer, full(parts=["att"]))


def test_an_unknown_part_is_refused_and_the_parts_are_named() -> None:
    message = refusal(NoSuchLayer, full(parts=["attn", "attn.x"]))
    assert "no part 'attn.x'" in message
    assert "mlp (mlp.gate, mlp.up, mlp.down), norm (norm.attn, norm.mlp, norm.final), embed, head." in message


@pytest.mark.parametrize("part", ["attn.self", "attn.cross", "conv", "time"])
def test_parts_of_a_unet_are_none_of_a_text_model(part: str) -> None:
    assert f"no part '{part}': this model has layers 0-11" in refusal(NoSuchLayer, full(parts=[part]))


def test_the_last_norm_is_selected_by_norm_in_all_layers_or_by_its_own_name() -> None:
    assert "model.norm.weight" in names(full(parts=["norm"]))
    assert "model.norm.weight" not in names(full(parts=["norm"], layers="last:4"))
    assert names(full(parts=["norm.final"], layers="last:4")) == ["model.norm.weight"]


def test_layers_do_not_apply_to_what_lies_in_no_layer_and_a_note_says_so() -> None:
    found = select(LLAMA, [LayerSpec(method="full", parts=["embed", "head", "attn.o"], layers="3")], tied=False)
    assert [t.part for t in found.full] == ["embed", "attn.o", "head"]
    assert any("embed, head: outside the layers" in note for note in found.notes)
    assert not select(LLAMA, [LayerSpec(method="full", parts=["head"])], tied=False).notes


def test_a_tied_head_is_refused_with_the_advice_to_select_the_embedding() -> None:
    assert "tied to its embedding: select embed" in refusal(NoSuchLayer, full(parts=["head"]), tensors=TIED, tied=True)
    stored_twice = refusal(NoSuchLayer, full(parts=["head"]), tensors=LLAMA, tied=True)
    assert "tied" in stored_twice


def test_a_tied_embedding_is_noted_to_train_both() -> None:
    found = select(TIED, [LayerSpec(method="full", parts=["embed"])], tied=True)
    assert any("trains both" in note for note in found.notes)
    assert found.lowest_layer == 0


# --- methods ---------------------------------------------------------------------------------------------------------


def test_lora_takes_the_weights_and_leaves_the_biases() -> None:
    assert all(n.endswith(".weight") for n in names({"parts": ["attn"]}, tensors=QWEN))
    assert any(n.endswith(".bias") for n in names(full(parts=["attn"]), tensors=QWEN))


@pytest.mark.parametrize("part", ["norm", "norm.final", "embed"])
def test_lora_of_what_is_no_matrix_is_refused_with_the_advice_to_use_full(part: str) -> None:
    message = refusal(BadRequest, {"parts": ["attn", part]})
    assert f"'{part}' has none: use method full" in message


def test_lora_of_biases_alone_is_refused() -> None:
    assert "selects no matrices" in refusal(BadRequest, {"parts": ["attn"], "match": r"bias$"}, tensors=QWEN)


def test_lora_counts_both_factors_and_scales_by_alpha_over_rank() -> None:
    found = select(LLAMA, [LayerSpec(parts=["mlp.down"], layers="4", rank=2, alpha=3.0)], tied=False)
    [target] = found.lora
    assert (target.rank, target.alpha, target.scale) == (2, 3.0, 1.5)
    assert found.n_trainable == 2 * (H + INNER)
    assert select(LLAMA, [LayerSpec(rank=4)], tied=False).lora[0].scale == 2.0


def test_a_rank_beyond_the_matrix_is_noted() -> None:
    assert any("rank 64" in n for n in select(LLAMA, [LayerSpec(rank=64)], tied=False).notes)


def test_a_text_model_is_one_network() -> None:
    assert "one network, leave the field out" in refusal(NoSuchLayer, {"component": "unet"})


def test_a_tensor_in_two_specs_is_refused_by_name() -> None:
    message = refusal(BadRequest, {"parts": ["attn"], "layers": "0-3"}, full(parts=["attn.v"], layers="3-5"))
    assert "'model.layers.3.self_attn.v_proj.weight' is selected by two specs" in message


# --- match -----------------------------------------------------------------------------------------------------------


def test_match_narrows_and_never_widens() -> None:
    assert names({"parts": ["attn"], "layers": "2-3", "match": r"[qv]_proj"}) == [
        f"model.layers.{i}.self_attn.{p}_proj.weight" for i in (2, 3) for p in "qv"
    ]
    assert "match 'lm_head' selects nothing" in refusal(NoSuchLayer, {"parts": ["attn"], "match": "lm_head"})


@pytest.mark.parametrize("pattern", [r"(.*)*(.*)*(.*)*[xyz]\d$", r"(\w+\.?)+!$", r"(.?){40}(.?){40}#$"])
def test_a_pathological_pattern_ends_quickly_even_in_sixteen_specs(pattern: str) -> None:
    start = time.monotonic()
    with pytest.raises(BadRequest):
        names(*({"parts": ["attn"], "match": pattern} for _ in range(16)))
    assert time.monotonic() - start < 2.0


# --- what it says ----------------------------------------------------------------------------------------------------


def test_the_lowest_layer_is_the_number_of_layers_when_only_norm_or_head_is_trained() -> None:
    assert select(LLAMA, [LayerSpec(method="full", parts=["head", "norm.final"])], tied=False).lowest_layer == N
    assert select(LLAMA, [LayerSpec(method="full", parts=["embed"])], tied=False).lowest_layer == 0


def costs(spec: LayerSpec, rows: int = 4, tokens: int = 16) -> Estimate:
    found = select(LLAMA, [spec], tied=False)
    shape = Shape(H, INNER, V, 2, gated=True, attention_dropout=False, tied=False)
    return estimate(
        found,
        shape,
        base_bytes_per_param=2,
        base_weights_bytes=weights_bytes(LLAMA, spec.quantize, 2),
        rows=rows,
        tokens=tokens,
    )


def test_an_estimate_counts_weights_in_base_precision_and_training_in_fp32() -> None:
    found = select(LLAMA, [LayerSpec(method="full", layers="last:1")], tied=False)
    cost = costs(LayerSpec(method="full", layers="last:1"))
    assert cost.weights_bytes == 2 * found.total_params
    assert cost.gradients_bytes == cost.adapter_bytes == 4 * found.n_trainable
    assert cost.optimizer_bytes == 8 * found.n_trainable
    assert cost.total == sum(vars(cost).values())


@given(st.integers(1, N - 1), st.integers(1, 8), st.integers(1, 64))
def test_more_rows_tokens_or_layers_never_cost_less(last: int, rows: int, tokens: int) -> None:
    base = costs(LayerSpec(layers=f"last:{last}"), rows, tokens)
    assert costs(LayerSpec(layers=f"last:{last + 1}"), rows, tokens).activations_bytes > base.activations_bytes
    assert costs(LayerSpec(layers=f"last:{last}"), rows + 1, tokens).total > base.total
    assert costs(LayerSpec(layers=f"last:{last}"), rows, tokens + 1).total > base.total


def test_the_summary_is_one_line_for_a_person() -> None:
    smol = {name: tuple(72 * n for n in shape) for name, shape in shapes(n_layers=30, head=False).items()}
    tensors = llama_tensors(smol)
    found = select(tensors, [LayerSpec(layers="last:8")], tied=True)
    cost = Estimate(1_000_000_000, 0, 0, 0, 100_000_000)
    assert summary(found, cost) == ("56 of 272 tensors, 1.2 M trainable parameters (1.3 % of 90.9 M), about 1.1 GB")


def test_the_description_lists_every_tensor_once_by_layer() -> None:
    described = layers.describe(QWEN)
    assert described["object"] == "model.layers"
    assert described["n_layers"] == len(described["layers"]) == N
    assert described["parts"]["attn.q"] == 2 * N
    assert [t["part"] for t in described["outside"]] == ["embed", "norm.final", "head"]
    listed = [t["name"] for layer in described["layers"] for t in layer["tensors"]]
    assert sorted(listed + [t["name"] for t in described["outside"]]) == sorted(t.name for t in QWEN)
    assert described["layers"][3]["tensors"][1] == {
        "name": "model.layers.3.self_attn.q_proj.weight",
        "shape": [H, H],
        "part": "attn.q",
        "parameters": H * H,
        "linear": True,
    }


def gpt2(n_layers: int) -> list[layers.TensorInfo]:
    shapes: dict[str, tuple[int, ...]] = {
        "wte.weight": (50, 8),
        "wpe.weight": (16, 8),
        "ln_f.weight": (8,),
        "ln_f.bias": (8,),
    }
    for i in range(n_layers):
        for name, shape in (
            ("ln_1", (8,)),
            ("attn.c_attn.q", (8, 8)),
            ("attn.c_attn.k", (8, 8)),
            ("mlp.c_fc", (32, 8)),
        ):
            shapes |= {f"h.{i}.{name}.weight": shape, f"h.{i}.{name}.bias": shape[:1]}
    return layers.gpt2_tensors(shapes)


def test_gpt2_is_chosen_from_by_the_same_language_queries_keys_and_values_apart() -> None:
    tensors = gpt2(12)
    chosen = layers.select(tensors, [LayerSpec(method="full", parts=["attn.q"], layers="1")], tied=True)
    assert [t.name for t in chosen.full] == ["h.1.attn.c_attn.q.weight", "h.1.attn.c_attn.q.bias"]
    adapted = layers.select(tensors, [LayerSpec(parts=["attn", "mlp"], layers="last:1")], tied=True)
    assert [t.tensor.part for t in adapted.lora] == ["attn.q", "attn.k", "mlp.up"]
    embed = layers.select(tensors, [LayerSpec(method="full", parts=["embed"])], tied=True)
    assert [t.name for t in embed.full] == ["wte.weight", "wpe.weight"]
    assert embed.lowest_layer == 0
