"""What a run may be asked for besides its layers: each changes what it says it changes, and nothing else."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import wire
from adapter import AdapterMeta
from demo import gpt2
from gpu_service import decoder as decoders
from gpu_service import layers, learn_text, probe, report, samples, train, trainable
from gpu_service.artifacts import Adapter
from gpu_service.cache import Whole
from gpu_service.course import Course
from gpu_service.data import TokenStore, epoch_order
from gpu_service.device import Device
from gpu_service.errors import BadRequest, OutOfMemory
from gpu_service.lora import Lora
from gpu_service.models import Base, Models
from gpu_service.plan import Plan, resolve
from gpu_service.rows import Rows
from tests.gpu_service.test_train import FULL, LORA, ROWS, job, run

PLAN = Plan(
    n_epochs=10,
    batch_rows=4,
    micro_rows=4,
    learning_rate=1e-3,
    multiplier=1.0,
    max_length_tokens=64,
    steps_per_epoch=10,
    warmup_steps=10,
)


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in ROWS))
    return file


@pytest.fixture(scope="module")
def gpt(cpu: Device) -> Base:
    return Models((f"demo-gpt2={Path(gpt2.__file__).parent / 'model'}",), cpu).load("demo-gpt2")


def build(base: Base, cpu: Device) -> decoders.Decoder:
    return decoders.build(base.source.family, base.source.config, cpu.torch)


def items(wanted: learn_text.TextJob, base: Base, cpu: Device) -> list[Any]:
    return list(learn_text.run(wanted, base, build(base, cpu), cpu))


def told(found: list[Any]) -> list[float]:
    return [i.train_loss for i in found if isinstance(i, train.Progress) and i.train_loss is not None]


@pytest.mark.parametrize(
    ("schedule", "middle", "end"), [("linear", 0.5, 0.011), ("cosine", 0.5, 3e-4), ("constant", 1, 1)]
)
def test_after_the_warm_up_the_rate_follows_its_schedule(schedule: Any, middle: float, end: float) -> None:
    plan = replace(PLAN, schedule=schedule)
    rates = [plan.rate(step) / plan.learning_rate for step in range(plan.total_steps)]
    assert rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert rates[55] == pytest.approx(middle, abs=0.01)
    assert rates[-1] == pytest.approx(end, rel=0.1)
    assert replace(plan, warmup_steps=0).rate(0) == plan.learning_rate


def test_every_hyperparameter_can_be_said_and_is_what_the_plan_holds(
    tiny: Base, cpu: Device, rows_file: Path, tmp_path: Path
) -> None:
    said = {
        "schedule": "cosine",
        "warmup_ratio": 0.25,
        "optimizer": "adamw_8bit",
        "weight_decay": 0.02,
        "max_gradient_norm": 0.0,
        "activation_checkpointing": True,
        "packing": True,
        "early_stop_patience": 3,
        "samples_every_steps": 7,
    }
    chosen = job(tiny, cpu, rows_file, tmp_path, LORA, **said).plan.chosen().model_dump()
    assert {name: chosen[name] for name in said} == said


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_rows_packed_into_one_sequence_have_the_loss_and_gradients_of_rows_apart(
    family: str, tiny: Base, gpt: Base, cpu: Device, rows_file: Path, tmp_path: Path
) -> None:
    base = {"llama": tiny, "gpt2": gpt}[family]
    store = TokenStore.build(rows_file, tmp_path, base.source.tokenizer, 64)
    selection = layers.select(base.source.tensors, [LORA], tied=base.source.tied)
    found = []
    for packed in (False, True):
        trained = trainable.build(selection, base, 3)
        rows = Rows(base.weights, lora=[trained.lora])
        batch = store.batch([3, 0, 7, 5], pad_id=0)
        batch = batch.packed() if packed else batch
        loss = learn_text.summed_loss(build(base, cpu), rows, batch, selection.lowest_layer, cpu)
        loss.backward()  # type: ignore[no-untyped-call]
        found.append((loss.detach(), [p.grad for p in trained.named.values()]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_checkpointed_activations_change_no_bit_dropout_included(
    family: str, tiny: Base, gpt: Base, cpu: Device, rows_file: Path, tmp_path: Path
) -> None:
    base = {"llama": tiny, "gpt2": gpt}[family]
    found = [
        told(items(job(base, cpu, rows_file, tmp_path, LORA, n_epochs=1, activation_checkpointing=again), base, cpu))
        for again in (False, True)
    ]
    assert found[0] == found[1]


def test_trained_on_all_every_token_but_the_first_is_a_label(tiny: Base, rows_file: Path, tmp_path: Path) -> None:
    everything = TokenStore.build(rows_file, tmp_path / "all", tiny.source.tokenizer, 64, train_on="all")
    answers = TokenStore.build(rows_file, tmp_path / "answers", tiny.source.tokenizer, 64)
    assert everything.report.learned_tokens == everything.report.tokens - len(everything)
    assert answers.report.learned_tokens < everything.report.learned_tokens


def test_eight_bit_adamw_learns_about_what_the_plain_one_does(
    tiny: Base, cpu: Device, rows_file: Path, tmp_path: Path
) -> None:
    spec = wire.LayerSpec(method="full", parts=["mlp"], layers="last:1")
    plain, packed = (
        run(job(tiny, cpu, rows_file, tmp_path, spec, learning_rate=1e-3, optimizer=name), tiny, cpu)[0]
        for name in ("adamw", "adamw_8bit")
    )
    assert packed != plain
    assert packed == pytest.approx(plain, rel=0.02)


# --- the probe -------------------------------------------------------------------------------------------------------


class Small:
    """A decoder that runs out of memory with more than two rows, as a GPU would."""

    def __init__(self, inner: decoders.Decoder) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def embed(self, ids: Tensor, *more: Any) -> Tensor:
        if ids.shape[0] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return self._inner.embed(ids, *more)


def test_only_the_probe_halves_the_micro_batch_and_the_losses_stay(
    tiny: Base, cpu: Device, rows_file: Path, tmp_path: Path
) -> None:
    wanted = job(tiny, cpu, rows_file, tmp_path, LORA, micro_batch_rows=4, n_epochs=1)
    decoder: Any = Small(build(tiny, cpu))
    found = list(learn_text.run(wanted, tiny, decoder, cpu))
    (ready,) = [item for item in found if isinstance(item, probe.Ready)]
    assert (ready.asked_rows, ready.plan.micro_rows) == (4, 2)
    assert found.index(ready) < 4, "it shows before the first step"
    assert told(found) == pytest.approx(told(items(wanted, tiny, cpu)), rel=1e-4)


def test_the_probe_leaves_no_trace(gpt: Base, cpu: Device, rows_file: Path, tmp_path: Path) -> None:
    """The demo GPT-2 draws dropout: a run with its probe and one that begins behind it have the same losses."""
    wanted = job(gpt, cpu, rows_file, tmp_path, LORA, n_epochs=1, batch_size=6)
    straight = told(items(wanted, gpt, cpu))
    torch.manual_seed(wanted.seed)
    trained = trainable.build(wanted.selection, gpt, wanted.seed)
    rows = Rows(gpt.weights, lora=[trained.lora], dropout=True)
    order = epoch_order(len(wanted.store), wanted.seed, 0)[:6]
    total = 0.0
    for micro in (order[i : i + wanted.plan.micro_rows] for i in range(0, 6, wanted.plan.micro_rows)):
        batch = wanted.store.batch(micro, 0)
        batch = batch.packed() if wanted.plan.packing else batch
        loss = learn_text.summed_loss(build(gpt, cpu), rows, batch, wanted.selection.lowest_layer, cpu)
        total += (loss / wanted.store.learned(order)).item()
    assert total == straight[0]


class Cramped(Device):
    """With so little memory that the estimate alone says no."""

    def free_bytes(self) -> int:
        return 700_000


def test_on_a_cpu_the_estimate_halves_and_a_row_that_never_fits_is_an_error_that_says_what_to_do(cpu: Device) -> None:
    cramped = Cramped(cpu.torch, cpu.name, cpu.precision)
    tried: list[int] = []
    fitting = probe.fit(replace(PLAN, micro_rows=8), tried.append, lambda rows: rows * 200_000, cramped)
    assert [next(fitting), next(fitting)] == [None, None], "8 and 4"
    with pytest.raises(StopIteration) as over:
        next(fitting)
    assert over.value.value.plan.micro_rows == 2
    assert tried == [2], "what can't fit is not tried: that would be the end of the process"
    with pytest.raises(OutOfMemory, match="max_length_tokens"):
        list(probe.fit(PLAN, tried.append, lambda rows: 10**9, cramped, advice=learn_text.TextLearner.advice))


# --- when it ends ----------------------------------------------------------------------------------------------------


def test_early_stop_keeps_the_weights_of_the_best_validation(
    tiny: Base, cpu: Device, rows_file: Path, tmp_path: Path
) -> None:
    """The validation answers contradict the training ones, so learning too well is punished."""
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(json.dumps(row).replace("It is", "Never") for row in ROWS))
    validation = TokenStore.build(other, tmp_path / "other", tiny.source.tokenizer, 64)
    wanted = job(
        tiny,
        cpu,
        rows_file,
        tmp_path,
        FULL,
        learning_rate=0.02,
        n_epochs=12,
        early_stop_patience=2,
        schedule="constant",
    )
    found = items(replace(wanted, validation=validation), tiny, cpu)
    trained = found[-1]
    course = trained.course
    assert course.ended_early
    assert course.step < wanted.plan.total_steps
    assert course.best_step < course.step
    assert course.best_loss == min(loss for step, loss in course.validated if step)
    rows = Rows(tiny.weights, full=trained.full)
    batch = validation.batch(list(range(len(validation))), 0)
    with torch.no_grad():
        loss = learn_text.summed_loss(build(tiny, cpu), rows, batch, 4, cpu) / validation.report.learned_tokens
    assert float(loss) == pytest.approx(course.best_loss, rel=1e-5)


def test_early_stop_without_a_validation_file_is_refused(
    tiny: Base, cpu: Device, rows_file: Path, tmp_path: Path
) -> None:
    wanted = job(tiny, cpu, rows_file, tmp_path, LORA)
    asked = wire.Hyperparameters(early_stop_patience=2)
    with pytest.raises(BadRequest, match="validation_file"):
        resolve(asked, tiny.source, wanted.selection, wanted.store, 64, cpu, validates=False)


def test_a_loss_that_explodes_ends_the_run_and_says_what_to_change(
    tiny: Base, cpu: Device, rows_file: Path, tmp_path: Path
) -> None:
    spec = wire.LayerSpec(method="full", parts=["embed"])
    said = {"learning_rate": 10.0, "max_gradient_norm": 0, "n_epochs": 20, "warmup_ratio": 0}
    wild = job(tiny, cpu, rows_file, tmp_path, spec, **said)
    with pytest.raises(train.Diverged, match="lower the learning rate"):
        run(wild, tiny, cpu)


def test_one_odd_batch_is_no_explosion() -> None:
    course = Course()
    for loss in (2.0, 1.0, 0.5, 7.0, 0.5, 0.4):
        course.stepped(loss, 1e-3, 1.0)
        assert not course.has_exploded
    for _ in range(3):
        course.stepped(9.0, 1e-3, 1.0)
    assert course.has_exploded


def test_a_loss_that_is_weighed_more_may_rise_more() -> None:
    course = Course(unit=51.0)  # pictures of a class that weigh fifty times
    for loss in (20.0, 60.0, 60.0, 60.0):
        course.stepped(loss, 1e-3, 1.0)
    assert not course.is_rising
    for _ in range(6):
        course.stepped(300.0, 1e-3, 1.0)
    assert course.has_exploded


def test_a_long_runs_curve_is_thinned_and_keeps_its_shape() -> None:
    course = Course()
    for step in range(5000):
        course.stepped(1 / (step + 1), 1e-3, 1.0)
    assert 400 < len(course.losses) <= 1000
    assert course.losses[0][0] == 1
    assert {b[0] - a[0] for a, b in zip(course.losses, course.losses[1:], strict=False)} == {course.every}


# --- samples ---------------------------------------------------------------------------------------------------------


def test_answers_on_the_way_are_the_models_own_and_change_no_loss(
    gpt: Base, cpu: Device, rows_file: Path, tmp_path: Path
) -> None:
    quiet = job(gpt, cpu, rows_file, tmp_path, LORA, n_epochs=1, samples_every_steps=2)
    prompts = tuple(
        samples.prompts(gpt.source, ["Say 2 times 2", "Say 3"], samples.File(rows_file, "rows.jsonl"), None)
    )
    found = items(replace(quiet, prompts=prompts), gpt, cpu)
    assert told(found) == told(items(quiet, gpt, cpu))
    answered = [(i.step, i.answers) for i in found if isinstance(i, train.Progress) and i.answers]
    assert [step for step, _ in answered] == [0, 2, 3]
    assert answered[0][1][0] == greedy(gpt, cpu, prompts[0].ids)
    assert found[-1].course.first_answers == list(answered[0][1])


def greedy(base: Base, cpu: Device, ids: tuple[int, ...]) -> str:
    """The whole sequence anew for every token."""
    decoder, rows, found = build(base, cpu), Rows(base.weights), list(ids)
    for _ in range(samples.MAX_ANSWER_TOKENS):
        attention = Whole(len(found), cpu.torch)
        with torch.no_grad():
            h = decoder.embed(torch.tensor([found]), rows, attention)
            h = decoder.layers(h, 0, decoder.n_layers, rows, attention)
            found.append(int(decoder.unembed(decoder.final_norm(h, rows), rows)[0, -1].argmax()))
        if found[-1] in base.source.stop_ids:
            break
    text = str(base.source.tokenizer.decode(found[len(ids) :], skip_special_tokens=True))
    return text.partition(base.source.stop[0])[0].strip() if base.source.stop else text.strip()


def test_without_prompts_of_the_users_own_held_out_ones_are_asked(tiny: Base, rows_file: Path) -> None:
    file = samples.File(rows_file, "rows.jsonl")
    found = samples.prompts(tiny.source, [], file, file)
    assert [(p.text, p.reference) for p in found[:2]] == [("Say 0 times 0", "It is 0!"), ("Say 1 times 1", "It is 1!")]


def test_plain_text_is_asked_for_its_second_half(tiny: Base, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("Sing, goddess, of the anger of Achilles and of its many sorrows.")
    file = samples.File(tmp_path / "text.txt", "text.txt")
    (asked,) = samples.prompts(tiny.source, [], file, file)
    assert asked.text == "Sing, goddess, of the anger of Achilles"
    assert asked.reference == " and of its many sorrows."
    assert asked.ids


# --- on from a tuned model -------------------------------------------------------------------------------------------

Q = {"parts": ["attn.q"], "layers": "2"}
EARLIER: dict[str, wire.LayerSpec] = {
    "lora": wire.LayerSpec.model_validate({**Q, "rank": 4}),
    "dora": wire.LayerSpec.model_validate({**Q, "method": "dora", "rank": 2}),
    "full": wire.LayerSpec.model_validate({**Q, "method": "full"}),
}
LATER = EARLIER | {
    "more": wire.LayerSpec.model_validate({**Q, "rank": 8}),
    "aside": wire.LayerSpec(parts=["mlp.down"], layers="3"),
}


def adapter(base: Base, selection: layers.Selection, trained: train.Trained) -> Adapter:
    shapes = {t.name: t.shape for t in base.source.tensors}
    meta = AdapterMeta(
        family=base.source.family,
        base_model=base.source.id,
        base_revision=base.source.revision,
        tied=base.source.tied,
        layers=[],
        lora=trained.meta,
        tensors={name: shapes[name] for name in [*trained.full, *trained.lora]},
        hyperparameters=wire.Hyperparameters(),
        created_at=0,
        trained_tokens=1,
    )
    return Adapter(meta, trained.full, trained.lora)


def logits(base: Base, cpu: Device, full: Mapping[str, Tensor], lora: Mapping[str, Lora]) -> Tensor:
    decoder, rows, attention = build(base, cpu), Rows(base.weights, full=full, lora=[lora]), Whole(9, cpu.torch)
    with torch.no_grad():
        h = decoder.embed(torch.arange(9)[None] + 40, rows, attention)
        h = decoder.layers(h, 0, decoder.n_layers, rows, attention)
        return decoder.unembed(decoder.final_norm(h, rows), rows)


@pytest.fixture(scope="module")
def tuned(tiny: Base, cpu: Device, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Adapter]:
    found = {}
    for name, spec in EARLIER.items():
        wanted = job(tiny, cpu, rows_file, tmp_path_factory.mktemp("rows"), spec, learning_rate=5e-3, n_epochs=1)
        found[name] = adapter(tiny, wanted.selection, run(wanted, tiny, cpu)[1])
    return found


@pytest.mark.parametrize("later", LATER)
@pytest.mark.parametrize("earlier", EARLIER)
def test_a_run_from_a_tuned_model_begins_at_it_and_its_result_is_whole(
    earlier: str, later: str, tuned: dict[str, Adapter], tiny: Base, cpu: Device, rows_file: Path, tmp_path: Path
) -> None:
    begin = tuned[earlier]
    wanted = job(tiny, cpu, rows_file, tmp_path, LATER[later], learning_rate=5e-3, n_epochs=1)
    start = trainable.build(wanted.selection, tiny, 1, begin)
    before = logits(tiny, cpu, begin.full, begin.lora)
    torch.testing.assert_close(logits(tiny, cpu, *trainable.weights(start)), before, rtol=1e-4, atol=1e-4)

    with torch.no_grad():
        for tensor in start.named.values():
            tensor += 0.01 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1))
    moved = logits(tiny, cpu, *trainable.weights(start))
    assert not torch.allclose(moved, before, atol=1e-3)
    result = trainable.result(wanted.selection, start, tiny, begin)
    torch.testing.assert_close(logits(tiny, cpu, result.full, result.lora), moved, rtol=1e-4, atol=1e-4)
    assert result.meta.keys() == result.lora.keys()


def test_the_same_adapter_is_trained_on_as_it_is(
    tuned: dict[str, Adapter], tiny: Base, cpu: Device, rows_file: Path, tmp_path: Path
) -> None:
    wanted = replace(job(tiny, cpu, rows_file, tmp_path, EARLIER["lora"]), begin=tuned["lora"])
    (name,) = tuned["lora"].lora
    _, trained = run(wanted, tiny, cpu)
    assert trained.lora[name].a.shape == tuned["lora"].lora[name].a.shape
    moved, _ = trained.changes[name]
    assert 0 < moved < 1


# --- the report ------------------------------------------------------------------------------------------------------


def test_the_report_tells_the_run_and_escapes_what_others_wrote(
    tiny: Base, cpu: Device, rows_file: Path, tmp_path: Path
) -> None:
    evil = "<script>alert(1)</script> \ud83d"
    wanted = job(tiny, cpu, rows_file, tmp_path, LORA, n_epochs=1)
    prompts = (samples.Prompt(evil, (1, 2, 3), None),)
    trained = items(replace(wanted, validation=wanted.store, prompts=prompts), tiny, cpu)[-1]
    told = report.Told(
        job_id="ftjob-1",
        base_model=tiny.source.id,
        continued_from=None,
        device="cpu",
        summary="4 tensors",
        layers=[LORA],
        hyperparameters=wanted.plan.chosen(),
        training=wanted.store.report,
        validation=wanted.store.report,
        prompts=prompts,
        course=trained.course,
        changes=trained.changes,
        elapsed_s=1.0,
        at=1.0,
        kept_best=False,
    )
    built = report.build(told)
    assert [row["step"] for row in built["losses"]] == [1, 2, 3]
    assert built["perplexity"]["after"] == built["validations"][-1]["perplexity"]
    assert {row["layer"] for row in built["changes"]["layers"]} == {2, 3}
    assert all(row["relative_change"] > 0 for row in built["changes"]["tensors"])
    page = report.as_html(built).decode()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert page.count("<svg") == 2
    assert json.loads(report.as_json(built))["hyperparameters"]["schedule"] == "linear"
