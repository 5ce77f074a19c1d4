"""Zips of pictures as people make them, and as nobody should: every fault by the name of its file."""

import base64
import io
import json
import re
import stat
import struct
import subprocess
import sys
import tracemalloc
import unicodedata
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

import archive
import datafile
import picture
import picturefile
from tests.conftest import ROOT


def drawn(
    format: str = "PNG", mode: str = "RGB", size: tuple[int, int] = (40, 30), turned: int = 1, **how: Any
) -> bytes:
    """Noise, so that every byte matters."""
    made, file = Image.effect_noise(size, 90), io.BytesIO()
    if turned != 1:
        how["exif"] = Image.Exif()
        how["exif"][picture.ORIENTATION] = turned
    made.convert(mode).save(file, format, **how)
    return file.getvalue()


def zipped(tmp_path: Path, content: Mapping[str, bytes | str], packed: int = zipfile.ZIP_DEFLATED) -> Path:
    path = tmp_path / "pictures.zip"
    with zipfile.ZipFile(path, "w", packed) as out:
        for name, data in content.items():
            out.writestr(name, data)
    return path


def lines(*rows: Mapping[str, Any]) -> str:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)


def faults(path: Path) -> list[tuple[str, str]]:
    return [(error.name, error.code) for error in picturefile.check(path).errors]


def captions(path: Path) -> dict[str, str]:
    return {found.name: found.caption for found in picturefile.pictures(path)}


A, B = drawn(), drawn("JPEG")


# --- what a zip may look like ---


@pytest.mark.parametrize("folder", ["", "dogs/"])
@pytest.mark.parametrize("named", ["text", "caption", "prompt"])
def test_captions_come_from_metadata_as_imagefolder_has_them(tmp_path: Path, folder: str, named: str) -> None:
    rows = lines({"file_name": "a.png", named: "a dog"}, {"file_name": "more/b.jpg", named: " two\n dogs "})
    path = zipped(
        tmp_path,
        {f"{folder}metadata.jsonl": rows, f"{folder}a.png": A, f"{folder}more/b.jpg": B, f"{folder}more/": b""},
    )
    report = picturefile.check(path)
    assert (report.ok, report.rows, report.captioned) == (True, 2, 2), report.summary()
    assert captions(path) == {f"{folder}a.png": "a dog", f"{folder}more/b.jpg": "two dogs"}


def test_metadata_may_be_a_table(tmp_path: Path) -> None:
    table = '\ufefffile_name,text\na.png,"a dog, and a cat"\nb.jpg,개\n'
    assert captions(zipped(tmp_path, {"metadata.csv": table, "a.png": A, "b.jpg": B})) == {
        "a.png": "a dog, and a cat",
        "b.jpg": "개",
    }


def test_captions_come_from_texts_beside_the_pictures_as_kohya_has_them(tmp_path: Path) -> None:
    path = zipped(
        tmp_path, {"10_dog/a.png": A, "10_dog/a.txt": b"\xef\xbb\xbfa dog\r\n", "b.JPG": B, "b.caption": "another"}
    )
    assert captions(path) == {"10_dog/a.png": "a dog", "b.JPG": "another"}


def test_pictures_of_a_concept_have_no_captions(tmp_path: Path) -> None:
    path = zipped(tmp_path, {"b.jpg": B, "a.png": A, "README.txt": "mine"})
    report = picturefile.check(path)
    assert (report.ok, report.rows, report.captioned, report.ignored_names) == (True, 2, 0, ["README.txt"])
    assert captions(path) == {"a.png": "", "b.jpg": ""}


@pytest.mark.parametrize("says_utf8", [True, False])
def test_names_match_in_whichever_letters_and_what_systems_leave_is_passed_over(
    tmp_path: Path, says_utf8: bool
) -> None:
    """macOS takes 사 apart into its letters, and older ones do not say that a name is UTF-8."""
    whole, apart = "사진.png", unicodedata.normalize("NFD", "사진.png")
    litter = ("__MACOSX/._a.png", ".DS_Store", "sub/.hidden.png", "Thumbs.db", "sub/desktop.ini", "Icon\r")
    meta = lines({"file_name": whole, "text": "x"})
    path = zipped(tmp_path, {"metadata.jsonl": meta, apart: A, **dict.fromkeys(litter, "x")})
    if not says_utf8:
        raw = bytearray(path.read_bytes())
        for at in (found.start() for found in re.finditer(b"PK\x03\x04|PK\x01\x02", raw)):
            raw[at + (7 if raw[at + 2] == 3 else 9)] &= ~0x08
        path.write_bytes(raw)
    report = picturefile.check(path)
    assert (report.ok, report.ignored, report.captioned) == (True, 0, 1), report.summary()
    assert captions(path) == {whole: "x"}
    [(found, image)] = picturefile.read(path, picturefile.pictures(path))
    assert isinstance(image, Image.Image)
    assert found.name == whole


# --- what pictures look like once read ---


def one(tmp_path: Path, name: str, data: bytes) -> Image.Image:
    path = zipped(tmp_path, {name: data})
    [found] = picturefile.pictures(path)
    [(_, image)] = picturefile.read(path, [found])
    assert isinstance(image, Image.Image), image
    assert (image.mode, image.size) == ("RGB", (found.width, found.height))
    return image


@pytest.mark.parametrize("turned", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_pictures_stand_upright_as_pillow_itself_would_turn_them(tmp_path: Path, format: str, turned: int) -> None:
    data = drawn(format, turned=turned)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert one(tmp_path, "a.png", data).tobytes() == expected.tobytes()
    assert picturefile.check(tmp_path / "pictures.zip").repaired == ({"rotated": 1} if turned > 1 else {})


def test_what_is_transparent_stands_on_white(tmp_path: Path) -> None:
    palette = Image.new("P", (16, 16), 3)
    palette.putpalette(list(range(30)))
    for drawing, colour, how in (
        (Image.new("RGBA", (16, 16), (255, 0, 0, 0)), 255, {}),
        (Image.new("RGBA", (16, 16), (0, 0, 0, 128)), 127, {}),
        (palette, 255, {"transparency": 3}),
        (Image.new("RGB", (16, 16), (1, 2, 3)), 255, {"transparency": (1, 2, 3)}),
    ):
        file = io.BytesIO()
        drawing.save(file, "PNG", **how)
        assert one(tmp_path, "a.png", file.getvalue()).getpixel((5, 5)) == (colour,) * 3
        assert picturefile.check(tmp_path / "pictures.zip").repaired["transparent"] == 1


@pytest.mark.parametrize(
    ("format", "mode", "mended"),
    [
        ("PNG", "L", {"grey": 1}),
        ("PNG", "1", {"grey": 1}),
        ("JPEG", "L", {"grey": 1}),
        ("PNG", "P", {"palette": 1}),
        ("PNG", "LA", {"grey": 1, "transparent": 1}),
        ("JPEG", "CMYK", {"cmyk": 1}),
        ("WEBP", "RGB", {}),
    ],
)
def test_every_kind_of_picture_is_read_as_rgb_and_what_was_mended_is_counted(
    tmp_path: Path, format: str, mode: str, mended: dict[str, int]
) -> None:
    one(tmp_path, "a.png", drawn(format, mode))
    report = picturefile.check(tmp_path / "pictures.zip")
    assert (report.ok, report.repaired, report.formats) == (True, mended, {format: 1})


def test_a_phones_jpeg_that_carries_a_second_picture_is_its_first(tmp_path: Path) -> None:
    file = io.BytesIO()
    first, second = (Image.open(io.BytesIO(drawn("JPEG"))) for _ in range(2))
    first.save(file, "MPO", save_all=True, append_images=[second])
    assert one(tmp_path, "a.jpg", file.getvalue()).size == (40, 30)


def test_the_report_says_sizes_and_duplicates_and_the_sample_shows_small_pictures(tmp_path: Path) -> None:
    large = drawn("JPEG", size=(1200, 800), turned=6)
    path = zipped(tmp_path, {f"{n}.png": A for n in range(5)} | {"9.jpg": large, "notes.md": "x"})
    report = picturefile.check(path)
    assert (report.rows, report.duplicates, report.duplicate_names) == (6, 4, ["1.png", "2.png", "3.png", "4.png"])
    told = json.loads(json.dumps(report.told()))
    assert {key: told[key] for key in ("smallest_side", "median_side", "largest_side", "ignored_names")} == {
        "smallest_side": 30,
        "median_side": 30,
        "largest_side": 1200,
        "ignored_names": ["notes.md"],
    }
    sample = picturefile.sample(path, 3, 10**6, 96)
    assert [row["name"] for row in sample] == ["0.png", "2.png", "4.png"]
    [*_, last] = picturefile.sample(path, 6, 10**6, 96)
    assert (last["name"], last["width"], last["height"]) == ("9.jpg", 800, 1200)
    head, _, small = last["thumbnail"].partition(",")
    assert head == "data:image/webp;base64"
    assert Image.open(io.BytesIO(base64.b64decode(small))).size == (64, 96)
    assert len(picturefile.sample(path, 6, 1, 96)) == 1


# --- what is wrong, by name ---


def deep() -> bytes:
    file = io.BytesIO()
    Image.new("I;16", (40, 30), 700).save(file, "PNG")
    return file.getvalue()


def moving(format: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 30)).save(file, format, save_all=True, append_images=[Image.new("RGB", (40, 30), "red")])
    return file.getvalue()


def promised(width: int, height: int) -> bytes:
    """A PNG that says it is so large."""
    header = b"IHDR" + struct.pack(">II5B", width, height, 8, 2, 0, 0, 0)
    return A[:12] + header + struct.pack(">I", zlib.crc32(header)) + A[33:]


def jpeg_of_scans(count: int) -> bytes:
    whole = drawn("JPEG", progressive=True)
    at = whole.rfind(b"\xff\xda")
    return whole[:at] + (whole[at:-2]) * count + whole[-2:]


PNG_DEEP_RGB = A[:12] + (h := b"IHDR" + struct.pack(">II5B", 40, 30, 16, 2, 0, 0, 0)) + struct.pack(">I", zlib.crc32(h))


@pytest.mark.parametrize(
    ("name", "data", "code"),
    [
        ("cut.png", A[: len(A) // 2], "damaged_picture"),
        ("cut.jpg", B[: len(B) // 2], "damaged_picture"),
        ("cut.webp", (W := drawn("WEBP"))[: len(W) // 2], "damaged_picture"),
        ("flipped.png", A[:900] + bytes([A[900] ^ 1]) + A[901:], "damaged_picture"),
        ("head.jpg", B[:20], "damaged_picture"),
        ("scans.jpg", jpeg_of_scans(500), "damaged_picture"),
        ("empty.png", b"", "unknown_format"),
        ("text.png", b"hello", "unknown_format"),
        ("gif.png", drawn("GIF"), "unknown_format"),
        ("real.gif", drawn("GIF"), "unknown_format"),
        ("phone.heic", b"\0\0\0\x18ftypheic", "unknown_format"),
        ("wide.png", promised(8193, 20), "too_large"),
        ("huge.png", promised(60_000, 60_000), "too_large"),
        ("mega.png", promised(5001, 5000), "too_large"),
        ("tiny.png", drawn(size=(15, 40)), "too_small"),
        ("deep.png", deep(), "too_deep"),
        ("deep_colour.png", PNG_DEEP_RGB + A[33:], "too_deep"),
        ("moves.png", moving("PNG"), "animated"),
        ("moves.webp", moving("WEBP"), "animated"),
    ],
)
def test_a_bad_picture_is_named_and_the_others_are_still_counted(
    tmp_path: Path, name: str, data: bytes, code: str
) -> None:
    path = zipped(tmp_path, {name: data, "good.png": A})
    report = picturefile.check(path)
    assert (report.rows, [(error.name, error.code) for error in report.errors]) == (1, [(name, code)])
    assert f"{name}: " in report.summary()
    assert not report.ok
    if code != "damaged_picture":  # which may not show before its pixels are unpacked
        with pytest.raises(ValueError, match=name):
            picturefile.pictures(path)


def test_a_heic_is_called_by_its_name(tmp_path: Path) -> None:
    path = zipped(tmp_path, {"a.jpg": b"\0\0\0\x18ftypheic" + bytes(50)})
    assert "a HEIC, as iPhones write, and not PNG, JPEG or WebP" in picturefile.check(path).summary()


META = "metadata.jsonl"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"a.png": A, "a.txt": "x", "b.jpg": B}, [("b.jpg", "no_caption")]),
        ({META: lines({"file_name": "a.png", "text": "x"}), "a.png": A, "b.jpg": B}, [("b.jpg", "no_caption")]),
        ({"a.png": A, "a.txt": " \n"}, [("a.png", "empty_caption")]),
        ({META: lines({"file_name": "a.png", "text": ""}), "a.png": A}, [("a.png", "empty_caption")]),
        ({META: lines({"file_name": "a.png", "label": 3}), "a.png": A}, [("a.png", "empty_caption")]),
        ({"a.png": A, "a.txt": "x" * 2001}, [("a.png", "caption_too_long")]),
        ({"a.png": A, "a.txt": "x" * 70_000}, [("a.txt", "too_many_bytes")]),
        ({"a.png": A, "a.txt": "개".encode("cp949")}, [("a.txt", "not_utf8")]),
        ({META: b'{"file_name": "a.png", "text": "\xff"}', "a.png": A}, [(META, "not_utf8"), ("a.png", "no_caption")]),
        ({META: "{", "a.png": A}, [(META, "not_json"), ("a.png", "no_caption")]),
        ({META: "[1]", "a.png": A}, [(META, "bad_metadata"), ("a.png", "no_caption")]),
        ({META: '{"text": "x"}', "a.png": A}, [(META, "bad_metadata"), ("a.png", "no_caption")]),
        (
            {META: lines({"file_name": "a.png", "text": "x"}, {"file_name": "no.png", "text": "x"}), "a.png": A},
            [(META, "no_such_file")],
        ),
        ({META: lines(*[{"file_name": "a.png", "text": "x"}] * 2), "a.png": A}, [("a.png", "captioned_twice")]),
        ({"metadata.csv": "a;b", "a.png": A}, [("metadata.csv", "no_header"), ("a.png", "no_caption")]),
        ({"metadata.parquet": b"PAR1", "a.png": A}, [("metadata.parquet", "bad_metadata")]),
        ({"../a.png": A}, [("../a.png", "leads_out")]),
        ({"../.hidden": A}, [("../.hidden", "leads_out")]),
        ({"/a.png": A}, [("/a.png", "leads_out")]),
        ({"x\\a.png": A}, [("x\\a.png", "leads_out")]),
        ({"C:/a.png": A}, [("C:/a.png", "leads_out")]),
        ({"a\x1b.png": A}, [("a\\x1b.png", "bad_name")]),
    ],
)
def test_bad_captions_and_bad_names_are_named(
    tmp_path: Path, content: dict[str, bytes | str], expected: list[tuple[str, str]]
) -> None:
    path = zipped(tmp_path, content)
    assert faults(path) == expected
    with pytest.raises(ValueError, match=re.escape(expected[0][0])):
        picturefile.pictures(zipped(tmp_path, content | {"z.png": A}))


def test_links_encryption_other_compressions_and_names_given_twice_are_refused_by_name(tmp_path: Path) -> None:
    path = zipped(tmp_path, {"a.png": A, "locked.png": A, "c.png": A})
    with zipfile.ZipFile(path, "a") as out:
        link = zipfile.ZipInfo("link.png")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        out.writestr(link, "/etc/passwd")
        out.writestr("lzma.png", A, zipfile.ZIP_LZMA)
        with pytest.warns(UserWarning, match="Duplicate name"):
            out.writestr("c.png", A)
        out.getinfo("locked.png").flag_bits |= 1
        out.comment = b"the directory is written anew"
    assert sorted(faults(path)) == [
        ("c.png", "named_twice"),
        ("link.png", "link"),
        ("locked.png", "encrypted"),
        ("lzma.png", "bad_compression"),
    ]


def test_a_zip_without_pictures_says_how_to_make_one(tmp_path: Path) -> None:
    report = picturefile.check(zipped(tmp_path, {"adapter.safetensors": b"x"}))
    assert (report.ok, report.counts) == (False, {})
    assert "the zip has no pictures: put PNG, JPEG or WebP files into a zip" in report.summary()
    assert picturefile.check(zipped(tmp_path, {})).ok is False


def test_many_errors_are_summed_up_and_no_kind_goes_unshown(tmp_path: Path) -> None:
    bad = {f"{n:03}.png": b"x" for n in range(200)}
    report = picturefile.check(zipped(tmp_path, bad | {"z.png": drawn(size=(10, 10))}))
    assert report.counts == {"unknown_format": 200, "too_small": 1}
    assert len(report.errors) == datafile.SHOWN_ERRORS + 1
    assert "z.png: " in report.summary()
    assert "and 196 more" in report.summary()


# --- zips as weapons ---


def whole(report: picturefile.Report) -> list[str]:
    return [error.code for error in report.errors]


def test_a_bomb_is_stopped_whatever_it_says_of_itself_and_memory_stays_small(tmp_path: Path) -> None:
    """200 MB of zeros for a picture, for a caption and for the metadata."""
    zeros = bytes(200 * 2**20)
    for name in ("a.png", "b.txt", "metadata.jsonl"):
        path = zipped(tmp_path, {name: zeros, "b.png": A})
        honest = path.read_bytes()
        for said in (None, 1000, 2**31):
            if said:
                size = struct.pack("<I", len(zeros))
                path.write_bytes(honest.replace(size, struct.pack("<I", said)))
            tracemalloc.start()
            report = picturefile.check(path)
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert not report.ok
            assert {"too_many_bytes", "damaged_zip"} & set(whole(report)), (name, said, report.summary())
            assert peak < 20 * 2**20, (name, said, peak)


def test_all_of_a_zip_may_grow_so_far_and_no_further(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picturefile, "EXPANSION_BYTES", 10**6)
    stuffed = {f"{n}.png": A + bytes(300_000 + n) for n in range(40)}
    path = zipped(tmp_path, stuffed)
    report = picturefile.check(path)
    assert 0 < report.rows < 40
    assert set(report.counts) == {"too_many_bytes"}


def test_the_pixels_of_a_zip_are_counted_before_they_are_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(picturefile, "MOST_PIXELS", 40 * 30 * 3)
    path = zipped(tmp_path, {f"{n}.png": drawn() for n in range(5)})
    report = picturefile.check(path)
    assert (report.rows, report.counts) == (3, {"too_many_pixels": 2})


def test_a_directory_that_is_too_long_is_not_read_though_a_second_end_hides_its_length(tmp_path: Path) -> None:
    """The plain end says 1 entry of 60 bytes; the record for zips past 4 GB, which readers believe, says 200 MB."""
    path = zipped(tmp_path, {"a.png": A})
    raw = path.read_bytes()
    at = raw.rfind(archive.END)
    directory = raw[raw.find(b"PK\x01\x02") : at] * 3_000_000
    start = raw.find(b"PK\x01\x02")
    end64 = struct.pack("<4sQHHIIQQQQ", archive.END64, 44, 45, 45, 0, 0, 3_000_000, 3_000_000, len(directory), start)
    locator = struct.pack("<4sIQI", archive.LOCATOR, 0, start + len(directory), 1)
    path.write_bytes(raw[:start] + directory + end64 + locator + raw[at:])
    assert path.stat().st_size > 100 * 2**20
    tracemalloc.start()
    report = picturefile.check(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert whole(report) == ["too_many_entries"]
    assert peak < 2**20


def test_entries_that_overlap_are_refused(tmp_path: Path) -> None:
    path = zipped(tmp_path, {"a.png": A, "b.png": A})
    raw = bytearray(path.read_bytes())
    second = raw.rfind(b"PK\x01\x02")
    raw[second + 42 : second + 46] = bytes(4)  # it begins where the first does
    path.write_bytes(raw)
    assert whole(picturefile.check(path)) == ["overlapping"]


def test_more_pictures_than_the_limit_are_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picturefile, "MOST_PICTURES", 3)
    path = zipped(tmp_path, {f"{n}.png": A for n in range(4)})
    assert whole(picturefile.check(path)) == ["too_many_pictures"]
    monkeypatch.setattr(picturefile, "MOST_ENTRIES", 3)
    assert whole(picturefile.check(path)) == ["too_many_entries"]


def test_a_picture_that_is_damaged_within_the_zip_is_named(tmp_path: Path) -> None:
    path = zipped(tmp_path, {"a.png": A, "b.png": A}, zipfile.ZIP_STORED)
    raw = bytearray(path.read_bytes())
    raw[raw.find(A) + 500] ^= 1
    path.write_bytes(raw)
    assert faults(path) == [("a.png", "damaged_zip")]
    raw = raw[: len(raw) // 2]
    path.write_bytes(raw)
    assert whole(picturefile.check(path)) == ["no_zip"]


GROWTH = """
import pathlib, re, sys, picturefile, PIL.Image, PIL.WebPImagePlugin
def most(): return int(re.search(r"VmHWM:\\s*(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
before = most()
path = pathlib.Path(sys.argv[1])
assert picturefile.check(path).ok if sys.argv[2] == "check" else picturefile.sample(path, 12, 2**20, 96)
print(most() - before)
"""


def test_the_largest_pictures_are_checked_in_bounded_memory(tmp_path: Path) -> None:
    """25 megapixels, transparent, as each format; in a process of its own, for Pillow's memory is not Python's."""
    large = Image.new("RGBA", (5000, 5000), (200, 10, 10, 100))
    for format, what, most_mb in (
        ("PNG", "check", 130),
        ("JPEG", "check", 30),
        ("WEBP", "check", 450),  # its decoder keeps two of them beside its own
        ("PNG", "report", 230),
        ("JPEG", "report", 30),
        ("WEBP", "report", 450),
    ):
        file = io.BytesIO()
        large.convert("RGB" if format == "JPEG" else "RGBA").save(file, format)
        path = zipped(tmp_path, {"a.png": file.getvalue()})
        done = subprocess.run(
            [sys.executable, "-c", GROWTH, str(path), what], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert int(done.stdout) < most_mb * 1024, (format, what, done.stdout)


SEEDS = [
    A,
    B,
    drawn("JPEG", progressive=True, turned=6),
    drawn("WEBP"),
    drawn("WEBP", "RGBA", lossless=True, turned=3),
    drawn("PNG", "P"),
    drawn("JPEG", "CMYK"),
]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damage_to_a_zip_or_its_pictures_raises_anything_but_is_reported(
    tmp_path: Path, data: st.DataObject
) -> None:
    def damaged(content: bytes, most: int) -> bytes:
        raw = bytearray(content)
        for _ in range(data.draw(st.integers(0, most))):
            at = data.draw(st.integers(0, len(raw) - 1))
            raw[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
            raw = raw or bytearray(1)
        return bytes(raw)

    picture_of = damaged(data.draw(st.sampled_from(SEEDS)), 6)
    text = damaged("a caption 개".encode(), 2)
    meta = damaged(lines({"file_name": "a.png", "text": "x"}).encode(), 2)
    content = {"a.png": picture_of, "b.png": A} | data.draw(
        st.sampled_from([{}, {"a.txt": text, "b.txt": "x"}, {META: meta}, {"metadata.csv": meta}])
    )
    path = zipped(tmp_path, content, data.draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])))
    path.write_bytes(damaged(path.read_bytes(), 3))
    report = picturefile.check(path, "mine.zip")
    assert report.summary()
    json.dumps(report.told())
    if report.ok:
        found = picturefile.pictures(path)
        assert len(found) == report.rows
        for _, image in picturefile.read(path, found):
            assert isinstance(image, Image.Image)


def test_a_zip_is_known_by_how_it_begins(tmp_path: Path) -> None:
    assert picturefile.is_zip(zipped(tmp_path, {"a.png": A}), "train.jsonl")
    (tmp_path / "x").write_bytes(b'{"text": "PK"}')
    assert not picturefile.is_zip(tmp_path / "x", "train.zip")
