"""What is left of a run for a person: one JSON document, and the same as one HTML page that loads and runs nothing.

Everything that a user or a model wrote is escaped. Knows no torch, and nothing of how the page is kept or served.
"""

import html
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from typing import Any

import wire
from gpu_service.course import Course, perplexity
from gpu_service.data import DataReport
from gpu_service.picture_data import PictureReport
from gpu_service.samples import Prompt

WIDTH, HEIGHT, EDGE = 720, 240, 44  # of a drawing, in CSS pixels
LAYER = re.compile(r"(?:model\.layers|h)\.([0-9]+)\.")
BLOCK = re.compile(r"unet\.(?:(down|up)_blocks\.([0-9]+)|(mid)_block)\.|(text_encoder)\.")
PICTURE = re.compile(r"data:image/webp;base64,[A-Za-z0-9+/=]+")
MOST_CHARS = 4000  # of a prompt or an answer


@dataclass(frozen=True, kw_only=True)
class Told:
    """What a report is made from."""

    job_id: str
    base_model: str
    continued_from: str | None
    device: str
    summary: str  # of the selection: how much is trained
    layers: Sequence[wire.LayerSpec]
    hyperparameters: wire.Hyperparameters  # as resolved
    training: DataReport | PictureReport
    validation: DataReport | PictureReport | None
    prompts: Sequence[Prompt]
    course: Course
    changes: Mapping[str, tuple[float, float]]  # by tensor: how far it moved, what it was
    elapsed_s: float
    at: float  # unix time
    kept_best: bool  # early stopping was on: the result is the best validation's


def build(told: Told) -> dict[str, Any]:
    """The JSON document; docs/training.md describes it."""
    course = told.course
    result_loss = course.best_loss if told.kept_best else course.valid_loss
    writes = isinstance(told.training, DataReport)
    return {
        "object": "fine_tuning.report",
        "version": 1,
        "makes": "text" if writes else "pictures",
        "job": told.job_id,
        "base_model": told.base_model,
        "continued_from": told.continued_from,
        "created_at": int(told.at),
        "device": told.device,
        "elapsed_s": round(told.elapsed_s, 1),
        "summary": told.summary,
        "layers": [spec.model_dump() for spec in told.layers],
        "hyperparameters": told.hyperparameters.model_dump(),
        "steps": course.step,
        "trained_tokens": course.tokens,
        "ended_early": course.ended_early,
        "result_step": course.best_step if told.kept_best and course.best_loss is not None else course.step,
        "data": {
            "training": asdict(told.training),
            "validation": asdict(told.validation) if told.validation else None,
        },
        "losses": [
            {"step": step, "loss": loss, "learning_rate": rate, "gradient_norm": norm}
            for step, loss, rate, norm in course.losses
        ],
        "validations": [
            {"step": step, "loss": loss, "perplexity": perplexity(loss) if writes else None}
            for step, loss in course.validated
        ],
        "perplexity": {
            "before": perplexity(course.validated[0][1]) if course.validated and writes else None,
            "after": None if result_loss is None or not writes else perplexity(result_loss),
        },
        "answers": [
            {"prompt": prompt.text, "reference": prompt.reference, "before": before, "after": after}
            for prompt, before, after in zip(told.prompts, course.first_answers, course.last_answers, strict=False)
        ],
        "changes": {"layers": _by_layer(told.changes), "tensors": _by_tensor(told.changes)},
    }


def _by_layer(changes: Mapping[str, tuple[float, float]]) -> list[dict[str, Any]]:
    """Relative norms over all trained tensors of a layer, in the model's order; what lies in none comes last."""
    sums: dict[int | str | None, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for name, (moved, was) in changes.items():
        here = sums[_layer(name)]
        here[0], here[1] = here[0] + moved**2, here[1] + was**2
    order = sorted(sums, key=_place)
    return [{"layer": layer, "relative_change": _ratio(*map(sqrt, sums[layer]))} for layer in order]


def _layer(name: str) -> int | str | None:
    """A number, or a block's name, or neither."""
    if found := LAYER.match(name):
        return int(found[1])
    block = BLOCK.match(name)
    return (block[4] or block[3] or f"{block[1]}.{block[2]}") if block else None


def _place(layer: int | str | None) -> tuple[int, int, str]:
    kinds = ("down", "mid", "up", "text_encoder")
    if isinstance(layer, str):
        return 1, kinds.index(layer.partition(".")[0]), layer
    return (2, 0, "") if layer is None else (0, layer, "")


def _by_tensor(changes: Mapping[str, tuple[float, float]]) -> list[dict[str, Any]]:
    """The most changed first."""
    found = [{"name": name, "relative_change": _ratio(*norms)} for name, norms in changes.items()]
    return sorted(found, key=lambda row: (-row["relative_change"], row["name"]))


def _ratio(moved: float, was: float) -> float:
    return moved / was if was else 0.0


def as_json(report: Mapping[str, Any]) -> bytes:
    return json.dumps(report, indent=1, allow_nan=False).encode()


# --- the page --------------------------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark; --line: #8884; --a: #2f6feb; --b: #d9480f; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; } small { opacity: .7; font-weight: normal; }
table { border-collapse: collapse; width: 100%; }
td, th { text-align: left; vertical-align: top; padding: .3rem .5rem; }
tr { border-bottom: 1px solid var(--line); } td.n { text-align: right; font-variant-numeric: tabular-nums; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: inherit; margin: 0; }
svg { width: 100%; height: auto; } svg text { font: 11px system-ui, sans-serif; fill: currentColor; }
"""
CSP = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def as_html(report: Mapping[str, Any]) -> bytes:
    perplexities = report["perplexity"]
    figures = [
        ("Base model 기반 모델", report["base_model"]),
        ("Continued from 이어서 학습한 모델", report["continued_from"]),
        ("Trained 학습 대상", report["summary"]),
        ("Steps 단계", _steps(report)),
        ("Time 시간", f"{report['elapsed_s']:,.0f} s, {report['device']}"),
        ("Perplexity before 학습 전", _number(perplexities["before"])),
        ("Perplexity after 학습 후", _number(perplexities["after"])),
    ]
    parts = [
        f"<h1>{_text(report['job'])}</h1>",
        _table([(name, value) for name, value in figures if value is not None]),
        _heading("Loss", "손실"),
        _curves(report["losses"], report["validations"]),
        _heading("Answers before and after", "학습 전후의 답변"),
        _answers(report["answers"]),
        _heading("What changed, by layer", "레이어별 변화"),
        _bars(report["changes"]["layers"]),
        _table([(row["name"], _number(row["relative_change"])) for row in report["changes"]["tensors"][:10]]),
        _heading("Hyperparameters", "하이퍼파라미터"),
        _table(list(report["hyperparameters"].items())),
        _heading("Data", "데이터"),
        _data(report["data"]),
        _heading("Layers", "레이어"),
        f"<pre>{_text(json.dumps(report['layers'], ensure_ascii=False, indent=1))}</pre>",
    ]
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{_text(report["job"])}</title>'
        f'<meta http-equiv="content-security-policy" content="{CSP}">'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>'
    )
    return (page + "\n".join(parts) + "</body></html>\n").encode()


def _text(value: object) -> str:
    text = str(value)
    # Half a surrogate pair can stand in JSON, and can't be encoded.
    return html.escape(text[:MOST_CHARS] + ("…" if len(text) > MOST_CHARS else "")).encode(errors="replace").decode()


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:,.4g}"


def _heading(english: str, korean: str) -> str:
    return f'<h2>{english} <small lang="ko">{korean}</small></h2>'


def _table(rows: Iterable[tuple[object, object]]) -> str:
    return "<table>" + "".join(f"<tr><th>{_text(k)}</th><td>{_text(v)}</td></tr>" for k, v in rows) + "</table>"


def _steps(report: Mapping[str, Any]) -> str:
    what = "tokens" if report["makes"] == "text" else "pictures"
    text = f"{report['steps']:,}, {report['trained_tokens']:,} {what}"
    if report["ended_early"]:
        text += "; ended early"
    if report["result_step"] != report["steps"]:
        text += f"; the result is that of step {report['result_step']:,}, the best on the validation data"
    return text


def _answers(answers: Sequence[Mapping[str, Any]]) -> str:
    if not answers:
        return "<p>None: the job had neither sample_prompts nor a validation file, or its layers were streamed.</p>"
    columns = {"prompt": ("Prompt", "질문"), "before": ("Before", "전"), "after": ("After", "후")}
    head = "".join(f'<th>{english} <small lang="ko">{korean}</small></th>' for english, korean in columns.values())
    cells = ("".join(f"<td>{_answer(row[key] or '')}</td>" for key in columns) for row in answers)
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"


def _answer(text: str) -> str:
    """A picture where it is one that the gpu drew: nothing but base64 stands in its address."""
    if PICTURE.fullmatch(text):
        return f'<img src="{text}" alt="">'
    return f"<pre>{_text(text)}</pre>"


def _data(data: Mapping[str, Any]) -> str:
    sides = [side for side in ("training", "validation") if data[side]]
    head = "".join(f"<th>{side}</th>" for side in sides)
    rows = []
    for name in data["training"]:
        cells = "".join(f'<td class="n">{_text(_plain(data[side].get(name)))}</td>' for side in sides)
        rows.append(f"<tr><th>{_text(name)}</th>{cells}</tr>")
    return f"<table><tr><th></th>{head}</tr>{''.join(rows)}</table>"


def _plain(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


# --- drawings --------------------------------------------------------------------------------------------------------


def _curves(losses: Sequence[Mapping[str, Any]], validations: Sequence[Mapping[str, Any]]) -> str:
    lines = [(losses, "var(--a)", "training"), (validations, "var(--b)", "validation")]
    points = [(row["step"], row["loss"]) for rows, _, _ in lines for row in rows]
    if not points:
        return "<p>No step was taken.</p>"
    last, most = max(max(step for step, _ in points), 1), max(loss for _, loss in points) or 1.0

    def place(row: Mapping[str, Any]) -> str:
        x = EDGE + (WIDTH - 2 * EDGE) * row["step"] / last
        return f"{x:.1f},{HEIGHT - EDGE - (HEIGHT - 2 * EDGE) * row['loss'] / most:.1f}"

    drawn = [_axis(f"step {last:,}", f"{most:.3g}")]
    for index, (rows, colour, name) in enumerate(lines):
        if rows:
            spots = " ".join(place(row) for row in rows)
            drawn.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.5" points="{spots}"/>')
            drawn.append(f'<text x="{EDGE + 90 * index}" y="14" style="fill:{colour}">{name}</text>')
    return _svg(HEIGHT, drawn, "training and validation loss by step")


def _axis(right: str, top: str) -> str:
    low = HEIGHT - EDGE
    return (
        f'<path d="M{EDGE} {EDGE}V{low}H{WIDTH - EDGE}" fill="none" stroke="currentColor" opacity=".4"/>'
        f'<text x="{WIDTH - EDGE}" y="{low + 16}" text-anchor="end">{right}</text>'
        f'<text x="{EDGE - 6}" y="{EDGE + 4}" text-anchor="end">{top}</text>'
        f'<text x="{EDGE - 6}" y="{low}" text-anchor="end">0</text>'
    )


def _bars(layers: Sequence[Mapping[str, Any]]) -> str:
    most = max((row["relative_change"] for row in layers), default=0.0) or 1.0
    drawn = []
    for index, row in enumerate(layers):
        y, width = 6 + 18 * index, (WIDTH - 200) * row["relative_change"] / most
        layer = row["layer"]
        name = "outside" if layer is None else layer if isinstance(layer, str) else f"layer {layer}"
        drawn.append(f'<text x="80" y="{y + 10}" text-anchor="end">{name}</text>')
        drawn.append(f'<rect x="90" y="{y}" width="{width:.1f}" height="12" fill="var(--a)"/>')
        drawn.append(f'<text x="{96 + width:.1f}" y="{y + 10}">{row["relative_change"]:.3g}</text>')
    return _svg(12 + 18 * len(layers), drawn, "relative change of the trained tensors by layer")


def _svg(height: int, drawn: Iterable[str], label: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{label}">{"".join(drawn)}</svg>'
