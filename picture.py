"""One picture as a file: what its header says, whether it is whole, and its pixels, upright and in RGB.

Both services need it. The header is read here, before Pillow may set memory aside for what it promises; Pillow is
imported where it is needed, for the relay at rest does without it. Knows nothing of zips and captions.
"""

import base64
import io
import re
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFile import ImageFile

LEAST_SIDE = 16
MOST_SIDE = 8192
MOST_PIXELS = 25 * 10**6
MOST_SCANS = 50  # of a JPEG: each is a pass over all of it, and cameras make about ten
ORIENTATION = 0x0112  # of EXIF
DAMAGED = "is damaged, or a part is missing: save it again"
LOOKS_LIKE = {
    "a GIF": rb"GIF8",
    "a BMP": rb"BM",
    "a TIFF": rb"(II\*\0|MM\0\*)",
    "a HEIC, as iPhones write": rb"....ftyp(hei|hev|mif|msf)",
    "an AVIF": rb"....ftypavi",
    "an SVG": rb"\s*<(\?xml|svg)",
}
MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # within a JPEG's scan; the others belong to its data


class BadPicture(ValueError):
    """`code` and `message`, as of a training file's errors."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(code, message)
        self.code, self.message = code, message


@dataclass(frozen=True)
class Head:
    format: Literal["PNG", "JPEG", "WEBP"]
    width: int  # as stored
    height: int
    bits: int = 8  # of a channel


@dataclass(frozen=True)
class Seen:
    """A whole picture."""

    format: str
    width: int  # upright
    height: int
    mended: tuple[str, ...]  # by `decoded`


def head(data: bytes) -> Head:
    """Raises BadPicture for other formats, and for what is too large or too small, before anything is unpacked."""
    try:
        found = _head(data)
    except (struct.error, IndexError, ValueError) as exc:
        raise BadPicture("damaged_picture", DAMAGED) from exc
    if found is None:
        looks = next((name for name, how in LOOKS_LIKE.items() if re.match(how, data, re.DOTALL)), "")
        said = f"is {looks}, and not" if looks else "is no"
        raise BadPicture("unknown_format", f"{said} PNG, JPEG or WebP: save it as one of these")
    shape = f"is {found.width} x {found.height} pixels"
    if max(found.width, found.height) > MOST_SIDE or found.width * found.height > MOST_PIXELS:
        most = f"at most {MOST_SIDE} a side and {MOST_PIXELS / 1e6:.0f} megapixels"
        raise BadPicture("too_large", f"{shape}: make it smaller, {most}")
    if min(found.width, found.height) < LEAST_SIDE:
        raise BadPicture("too_small", f"{shape}: a side needs at least {LEAST_SIDE}")
    if found.bits > 8:
        raise BadPicture("too_deep", f"has {found.bits} bits a channel: save it with 8")
    return found


def _head(data: bytes) -> Head | None:
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        if data[12:16] != b"IHDR":
            raise ValueError
        width, height = struct.unpack(">II", data[16:24])
        return Head("PNG", width, height, bits=data[24])
    if data.startswith(b"\xff\xd8\xff"):
        return _jpeg(data)
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return _webp(data)
    return None


def _webp(data: bytes) -> Head:
    """https://developers.google.com/speed/webp/docs/riff_container"""
    kind = data[12:16]
    if kind == b"VP8X":
        width, height = (1 + int.from_bytes(data[at : at + 3], "little") for at in (24, 27))
    elif kind == b"VP8L":
        [bits] = struct.unpack("<I", data[21:25])
        width, height = (1 + (bits >> shift & 0x3FFF) for shift in (0, 14))
    elif kind == b"VP8 ":
        width, height = (side & 0x3FFF for side in struct.unpack("<HH", data[26:30]))
    else:
        raise ValueError
    return Head("WEBP", width, height)


def _jpeg(data: bytes) -> Head:
    """The frame's header. Raises ValueError where there is none, and for more scans than anybody needs."""
    found, scans, at = None, 0, 2
    while at + 4 <= len(data):
        if data[at] != 0xFF:
            raise ValueError
        marker, [length] = data[at + 1], struct.unpack(">H", data[at + 2 : at + 4])
        if marker == 0xFF:  # fills up
            at += 1
            continue
        if marker == 0xD9:
            break
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) and found is None:
            height, width = struct.unpack(">HH", data[at + 5 : at + 9])
            found = Head("JPEG", width, height, bits=data[at + 4])
        at += 2 + length
        if marker == 0xDA:
            scans += 1
            following = MARKER.search(data, at)
            if following is None or scans > MOST_SCANS:
                break
            at = following.start()
    if found is None or scans > MOST_SCANS:
        raise ValueError
    return found


@contextmanager
def _opened(data: bytes, found: Head) -> "Iterator[ImageFile]":
    """As Pillow sees it, which must be the same. Raises BadPicture, also for what happens to it meanwhile."""
    from PIL import Image

    warnings.filterwarnings("ignore", module=r"PIL\.")  # of EXIF and the like: what matters is an error
    try:
        with Image.open(io.BytesIO(data), formats=(found.format,)) as image:
            if image.size != (found.width, found.height):
                raise BadPicture("damaged_picture", DAMAGED)
            if found.format != "JPEG" and getattr(image, "n_frames", 1) > 1:  # a phone's JPEG may carry another behind
                raise BadPicture("animated", "moves: save one picture of it")
            yield image
    except BadPicture:
        raise
    except Exception as exc:  # Pillow raises whatever it stumbles over, its own asserts too
        raise BadPicture("damaged_picture", DAMAGED) from exc


def size(data: bytes) -> tuple[int, int]:
    """Width and height, upright, without its pixels. Raises BadPicture."""
    found = head(data)
    with _opened(data, found) as image:
        return _upright(found, _turned(image))


def seen(data: bytes) -> Seen:
    """Unpacks it once, a JPEG at an eighth of its size, and keeps no pixel. Raises BadPicture."""
    found = head(data)
    if found.format == "PNG":
        with _opened(data, found) as image:
            image.verify()  # its checksums
    with _opened(data, found) as image:
        turned = _turned(image)
        mended = {
            "rotated": turned != 1,
            "transparent": image.has_transparency_data,
            "palette": image.mode in ("P", "PA"),
            "grey": image.mode in ("1", "L", "LA"),
            "cmyk": image.mode == "CMYK",
        }
        if found.format == "JPEG":
            image.draft(None, (max(1, found.width // 8), max(1, found.height // 8)))
        image.load()
    return Seen(found.format, *_upright(found, turned), tuple(what for what, needed in mended.items() if needed))


def decoded(data: bytes) -> "Image":
    """Upright, RGB, on white where it was transparent. Raises BadPicture."""
    found = head(data)
    with _opened(data, found) as image:
        return _rgb(image)


def thumbnail(data: bytes, side: int) -> str:
    """As a data URL, so many pixels at most. Raises BadPicture."""
    found = head(data)
    with _opened(data, found) as image:
        small = _rgb(image, side)
        file = io.BytesIO()
        small.save(file, "WEBP", quality=75)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def _rgb(image: "ImageFile", side: int | None = None) -> "Image":
    """With `side` so many pixels at most, made small as early as that can be: a large one would be held twice."""
    from PIL import Image

    ways = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    turned = _turned(image)
    if side and image.format == "JPEG":
        image.draft(None, (2 * side, 2 * side))
    whole: Image.Image = image
    if image.has_transparency_data and image.mode not in ("RGBA", "LA"):
        whole = image.convert("RGBA")  # of a palette, or with one colour that is none
    if side:
        if whole.mode in ("P", "1"):
            whole = whole.convert("RGB")
        whole.thumbnail((side, side))
    if "A" in whole.getbands():
        sheet = Image.new("RGB", whole.size, "white")
        sheet.paste(whole.convert("RGB"), mask=whole.getchannel("A"))
        whole = sheet
    whole = whole.convert("RGB")
    return whole.transpose(ways[turned]) if turned != 1 else whole


def _turned(image: "ImageFile") -> int:
    """EXIF's orientation, 1 to 8; broken EXIF says nothing."""
    from PIL import Image

    exif = Image.Exif()
    try:
        exif.load(image.info.get("exif") or b"")
        turned = exif.get(ORIENTATION, 1)
    except Exception:  # as above
        return 1
    return turned if turned in range(1, 9) else 1


def _upright(found: Head, turned: int) -> tuple[int, int]:
    return (found.height, found.width) if turned >= 5 else (found.width, found.height)
