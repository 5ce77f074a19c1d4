"""safetensors files read and written without torch: a header of names, types, shapes and places, then plain bytes.

Nothing is trusted that is read. Knows no model. https://huggingface.co/docs/safetensors
"""

import json
import struct
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import isfinite, prod
from typing import IO, Any, Literal

MAX_HEADER_BYTES = 16 * 2**20
ITEM_BYTES: Mapping[str, int] = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8}  # what an adapter may be kept in
NUMBER_BYTES: Mapping[str, int] = {"I64": 8, "I32": 4}  # what a lone number may be besides: an alpha that was counted
CODES: Mapping[str, str] = {"F16": "e", "F32": "f", "F64": "d", "I32": "i", "I64": "q"}  # as struct has them
AT_ONCE = 2**16  # items that are looked at without letting another thread in
F16_NOT_FINITE = bytes(high for high in range(256) if high & 0x7C == 0x7C)  # of its two bytes
CAST: Mapping[int, Literal["H", "I", "Q"]] = {2: "H", 4: "I", 8: "Q"}  # items of so many bytes, as memoryview has them


class NotTensors(ValueError):
    """The message says what is wrong with the file."""


@dataclass(frozen=True)
class Place:
    """Of a tensor in a file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    bytes: int


@dataclass(frozen=True)
class Piece:
    """A tensor at hand: row after row, little-endian."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    def __post_init__(self) -> None:
        assert len(self.data) == prod(self.shape) * _item_bytes(self.dtype, self.shape)

    @property
    def transposed(self) -> "Piece":
        """(R, C) -> (C, R)"""
        rows, columns = self.shape
        items = memoryview(self.data).cast(CAST[ITEM_BYTES[self.dtype]])
        return Piece(self.dtype, (columns, rows), b"".join(items[i::columns].tobytes() for i in range(columns)))

    @property
    def finite(self) -> bool:
        """No number of it is infinite or none at all."""
        if self.dtype in NUMBER_BYTES:
            return True
        if self.dtype == "F64":
            return all(map(isfinite, array("d", self.data)))
        step = AT_ONCE * ITEM_BYTES[self.dtype]
        return all(_finite(self.dtype, self.data[at : at + step]) for at in range(0, len(self.data), step))

    @property
    def number(self) -> float:
        """Of a tensor that has one."""
        if self.dtype == "BF16":  # the upper half of an F32
            return float(struct.unpack("<f", bytes(2) + self.data)[0])
        return float(struct.unpack(f"<{CODES[self.dtype]}", self.data)[0])

    def rows(self, start: int, stop: int) -> "Piece":
        """Some of the first dimension."""
        row_bytes = len(self.data) // self.shape[0]
        return Piece(self.dtype, (stop - start, *self.shape[1:]), self.data[start * row_bytes : stop * row_bytes])


def _finite(dtype: str, data: bytes) -> bool:
    """Numbers of 32 bits can't overflow a sum of 64, and what is not finite stays so in it."""
    if dtype == "F16":
        return len(data[1::2].translate(None, F16_NOT_FINITE)) == len(data) // 2
    if dtype == "BF16":
        whole = bytearray(2 * len(data))
        whole[2::4], whole[3::4] = data[::2], data[1::2]
        data = bytes(whole)
    return isfinite(sum(array("f", data)))


class TensorFile:
    """An open file. Raises NotTensors for what is no whole safetensors file."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        size_bytes = file.seek(0, 2)
        file.seek(0)
        first = file.read(8)
        header_bytes = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
        if not 2 <= header_bytes <= min(MAX_HEADER_BYTES, size_bytes - 8):
            raise NotTensors("it has no header of a safetensors file")
        try:
            header = json.loads(file.read(header_bytes))
            self.metadata = _metadata(header)
            self.places = dict(_places(header, 8 + header_bytes))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
            raise exc if isinstance(exc, NotTensors) else NotTensors("its header is malformed") from exc
        at = 8 + header_bytes
        for place in sorted(self.places.values(), key=lambda place: place.start):
            if place.start != at:
                raise NotTensors("its tensors overlap, or leave gaps")
            at += place.bytes
        if at != size_bytes:
            raise NotTensors(f"it is {size_bytes:,} bytes, and its header names {at:,}")

    def read(self, name: str) -> Piece:
        place = self.places[name]
        self._file.seek(place.start)
        return Piece(place.dtype, place.shape, self._file.read(place.bytes))


def _metadata(header: Any) -> dict[str, str]:
    """What its writer noted."""
    found = header.get("__metadata__", {})
    return {key: value for key, value in found.items() if isinstance(value, str)}


def _item_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    return (ITEM_BYTES if shape else {**NUMBER_BYTES, **ITEM_BYTES})[dtype]


def _places(header: Any, base: int) -> Iterator[tuple[str, Place]]:
    for name, told in header.items():
        if name == "__metadata__":
            continue
        dtype, shape, (start, end) = told["dtype"], told["shape"], told["data_offsets"]
        if dtype not in ITEM_BYTES and not (shape == [] and dtype in NUMBER_BYTES):
            raise NotTensors(f"{name[:200]} is of type {str(dtype)[:20]}: {', '.join(ITEM_BYTES)} can be used")
        if not all(type(n) is int and 0 <= n < 2**40 for n in [*shape, start, end]):
            raise NotTensors(f"the place of {name[:200]} is malformed")
        if end - start != prod(shape) * _item_bytes(dtype, tuple(shape)):
            raise NotTensors(f"{name[:200]} has not the bytes of its shape")
        yield name, Place(dtype, tuple(shape), base + start, end - start)


@dataclass(frozen=True)
class Shaped:
    """A tensor to be written: type and shape are known before its bytes are read."""

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], Piece]


def write(
    put: Callable[[bytes], object], tensors: Mapping[str, Shaped], metadata: Mapping[str, str] | None = None
) -> None:
    """A whole file, piece by piece; one tensor is held at a time."""
    at, header = 0, dict[str, Any]({"__metadata__": dict(metadata or {"format": "pt"})})
    for name, tensor in tensors.items():
        end = at + prod(tensor.shape) * ITEM_BYTES[tensor.dtype]
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    put(struct.pack("<Q", len(text)) + text)
    for tensor in tensors.values():
        piece = tensor.read()
        assert (piece.dtype, piece.shape) == (tensor.dtype, tensor.shape)
        put(piece.data)
