"""A data set of pictures for one run: brought to one size, once, and kept as bytes in a memory-mapped file.

So are whatever numbers the run computes of each. Knows captions as text and pictures as pixels; not the model. What a
zip may hold is picturefile.py's.
"""

import base64
import hashlib
import io
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

import picturefile
import wire
from datafile import Checked, FileError
from gpu_service.artifacts import atomic_file
from gpu_service.errors import BadDataset, OutOfMemory, PromptTooLong
from gpu_service.sd import PictureSource

SHOWN_SIDE = 192  # pixels, of a picture as it is told: some 10 kB


@dataclass(frozen=True)
class PictureReport:
    rows: int
    captions: int  # that differ
    duplicates: int  # pictures that equal an earlier one, pixel for pixel; they stay
    enlarged: int  # smaller than the size that is trained
    cropped: int  # not square: what stands out at two sides is left out
    resolution: int  # pixels of a side, after that

    def summary(self) -> str:
        text = f"{self.rows:,} pictures at {self.resolution} x {self.resolution}, {self.captions:,} different captions"
        if self.cropped:
            text += f"; {self.cropped:,} are not square and lose their edges"
        if self.enlarged:
            text += f"; {self.enlarged:,} are smaller and were enlarged"
        return text + (f"; {self.duplicates:,} duplicates" if self.duplicates else "")


class PictureStore:
    """Rows are pictures: pixels, and which of `captions` is theirs."""

    def __init__(self, folder: Path, report: PictureReport, captions: Sequence[str], of_row: Sequence[int]) -> None:
        """Opens what `build` has written."""
        side = report.resolution
        self.folder, self.report = folder, report
        self.captions, self._of_row = tuple(captions), tuple(of_row)
        self._pixels = np.memmap(folder / "pixels", np.uint8, "r", shape=(report.rows, side, side, 3))

    @classmethod
    def build(
        cls,
        source: Path,
        folder: Path,
        model: PictureSource,
        resolution: int,
        *,
        concept: wire.Concept | None = None,
        param: str = "training_file",
        told: Callable[[int], None] = lambda rows: None,
    ) -> Self:
        """Decode a zip into `folder`. One picture is in memory at a time.

        Without captions each picture shows the concept. `told` hears before each picture how many it were; what it
        raises ends this. Raises BadDataset with the files' names, and OutOfMemory where the disk is full.
        """
        try:
            listed = picturefile.pictures(source)
        except ValueError as exc:
            raise BadDataset(str(exc), param=param) from exc
        _check_room(folder, len(listed) * resolution**2 * 3)
        captions: dict[str, int] = {}
        of_row, seen = list[int](), set[bytes]()
        enlarged = cropped = 0
        try:
            with atomic_file(folder / "pixels") as file:
                for picture, decoded in _pictures(source, listed, param, told):
                    caption = picture.caption or (concept.prompt if concept else "")
                    try:
                        model.chunks(caption)
                    except PromptTooLong as exc:
                        raise BadDataset(f"The caption of {picture.name}: {exc.message}", param=param) from exc
                    enlarged += min(decoded.size) < resolution
                    cropped += decoded.width != decoded.height
                    fitted = ImageOps.fit(decoded, (resolution, resolution), Image.Resampling.LANCZOS)
                    data = np.asarray(fitted, np.uint8).tobytes()
                    file.write(data)
                    seen.add(hashlib.blake2b(data, digest_size=16).digest())
                    of_row.append(captions.setdefault(caption, len(captions)))
        except OSError as exc:
            raise OutOfMemory(f"The gpu's disk refuses the pictures: {exc.strerror or exc}. Make room.") from exc
        if not of_row:
            raise BadDataset("The file has no pictures.", param=param)
        report = PictureReport(len(of_row), len(captions), len(of_row) - len(seen), enlarged, cropped, resolution)
        return cls(folder, report, list(captions), of_row)

    def __len__(self) -> int:
        return self.report.rows

    def caption(self, row: int) -> str:
        return self.captions[self._of_row[row]]

    def pixels(self, row: int) -> Tensor:
        """(3, H, W) from -1 to 1, fp32."""
        return as_tensor(np.array(self._pixels[row]))


def as_tensor(pixels: Any) -> Tensor:
    """(H, W, 3) bytes -> (3, H, W) from -1 to 1, fp32."""
    return (2 * (torch.from_numpy(pixels.astype(np.float32)) / 255) - 1).permute(2, 0, 1)


def _check_room(folder: Path, n_bytes: int) -> None:
    """Raises OutOfMemory, with both figures, before anything is written."""
    folder.mkdir(parents=True, exist_ok=True)
    free_bytes = shutil.disk_usage(folder).free
    if n_bytes > free_bytes:
        raise OutOfMemory(
            f"The pictures take {n_bytes / 1e6:,.0f} MB on the gpu's disk, and {free_bytes / 1e6:,.0f} MB are free: "
            "make room, use fewer pictures, or lower the resolution."
        )


def _pictures(
    source: Path, listed: Sequence[picturefile.Picture], param: str, told: Callable[[int], None]
) -> Iterator[tuple[picturefile.Picture, Image.Image]]:
    """All of a sound file. Raises BadDataset, after all have been tried, for those that are damaged."""
    bad = Checked[FileError]()
    for number, (picture, decoded) in enumerate(picturefile.read(source, listed)):
        told(number)
        if isinstance(decoded, FileError):
            bad.add(decoded)
        elif not bad.counts:
            yield picture, decoded
    if bad.counts:
        raise BadDataset(f"{bad.counts.total()} pictures can't be used: {bad.shown()}", param=param)


class Kept:
    """Numbers of one shape for each row, in a file that is memory-mapped.

    The disk's room is taken first: to run out of it later would end the process. Raises OutOfMemory.
    """

    def __init__(self, file: Path, shapes: Sequence[tuple[int, ...]]) -> None:
        self._shapes = shapes
        self._starts = np.cumsum([0, *(prod(shape) for shape in shapes)])
        n_bytes = 4 * int(self._starts[-1])
        try:
            with file.open("wb") as made:
                if n_bytes and hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(made.fileno(), 0, n_bytes)
                made.truncate(n_bytes)
        except OSError as exc:
            raise OutOfMemory(
                f"{file.name} of {len(shapes):,} rows takes {n_bytes / 1e6:,.0f} MB on the gpu's disk, which refuses "
                f"({exc.strerror or exc}): make room, use fewer pictures, or lower the resolution."
            ) from exc
        self._held = np.memmap(file, np.float32, "r+", shape=(int(self._starts[-1]),))

    def put(self, row: int, numbers: Tensor) -> None:
        self._held[self._starts[row] : self._starts[row + 1]] = numbers.float().cpu().flatten().numpy()

    def get(self, row: int) -> Tensor:
        """fp32, on the CPU."""
        held = np.array(self._held[self._starts[row] : self._starts[row + 1]])
        return torch.from_numpy(held).view(self._shapes[row])


def data_url(pixels: Tensor) -> str:
    """Bytes (H, W, 3), as a small WebP."""
    picture, file = Image.fromarray(pixels.numpy()), io.BytesIO()
    picture.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    picture.save(file, "WEBP", quality=75)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
