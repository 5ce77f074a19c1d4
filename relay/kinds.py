"""Whether what a job is asked to do goes together: a model of text or of pictures, its files, and what is set.

What else a family refuses, only a gpu knows.
"""

from collections.abc import Mapping
from typing import Any, Final, Literal

from sqlalchemy import Row

import wire
from relay import errors, fairness
from relay.models import Model
from relay.shapes import JobRequest

Kind = Literal["text", "pictures"]
# Hyperparameters that the other kind does not have.
OWN: Final[Mapping[Kind, frozenset[str]]] = {"text": wire.OF_TEXT, "pictures": wire.OF_PICTURES}


def kind_of(model: Model) -> Kind:
    return "pictures" if model.family == "sd" else "text"


def check(asked: JobRequest, model: Model, training: Row[Any], validation: Row[Any] | None) -> None:
    """Raises InvalidRequest that names the field."""
    kind = kind_of(model)
    for param, file in (("training_file", training), ("validation_file", validation)):
        if file is not None and file.kind != kind:
            wanted = "a zip of pictures" if kind == "pictures" else "a file of text, such as JSON lines"
            raise errors.WrongKindOfFile(
                f"'{model.base}' is a model of {kind}, and '{file.id}' holds {file.kind}: upload {wanted}", param=param
            )
    _hyperparameters(asked, kind)
    if kind == "pictures":
        _captions(asked, training, validation)
    elif asked.concept:
        raise errors.InvalidRequest(
            "concept: is of models that make pictures, and this one writes text: leave it out", param="concept"
        )


def estimate_s(training: Row[Any], chosen: wire.Hyperparameters) -> float | None:
    """Of gpu time, of pictures; text is estimated by its size."""
    return fairness.estimate_pictures_s(training.rows, chosen.n_epochs) if training.kind == "pictures" else None


def _hyperparameters(asked: JobRequest, kind: Kind) -> None:
    other: Kind = "text" if kind == "pictures" else "pictures"
    chosen = asked.chosen_hyperparameters
    given = sorted(name for name in OWN[other] if getattr(chosen, name) != "auto")
    if given:
        raise errors.InvalidRequest(
            f"hyperparameters: only models of {other} have {', '.join(given)}, and this is one of {kind}: leave it out",
            param="hyperparameters",
        )


def _captions(asked: JobRequest, training: Row[Any], validation: Row[Any] | None) -> None:
    if training.captioned and asked.concept:
        raise errors.InvalidRequest(
            "concept: the training file has captions, and those say what its pictures show: leave the concept out, or "
            "upload the pictures without captions",
            param="concept",
        )
    if not training.captioned and not asked.concept:
        raise errors.InvalidRequest(
            "concept: the training file has no captions, so say what its pictures show, for example "
            '{"prompt": "a photo of sks dog", "class_prompt": "a photo of a dog"}; or upload them with captions',
            param="concept",
        )
    if validation is not None and bool(validation.captioned) != bool(training.captioned):
        has, lacks = ("training", "validation") if training.captioned else ("validation", "training")
        raise errors.InvalidRequest(
            f"validation_file: the {has} file has captions and the {lacks} file has none: give both or neither",
            param="validation_file",
        )
