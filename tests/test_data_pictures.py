"""Pictures: no way out of the root, and upright 8-bit RGB whatever the file."""

from __future__ import annotations

import errno
import io
import os
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from grace_core.data.pictures import open_picture, picture_size, read_picture, resolve_picture
from grace_core.data.sharegpt4v import Reason, UnusableRecord

LIMIT = 1_000_000
WHITE = (255, 255, 255)


def _reason(call: Callable[[], object]) -> Reason:
    with pytest.raises(UnusableRecord) as caught:
        call()
    return caught.value.reason


def _encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


# --- paths


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """root/{a.png, sub/b.png}, a file beside the root, and links of every kind."""
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (tmp_path / "root-twin").mkdir()
    for file in (root / "a.png", root / "sub" / "b.png", tmp_path / "outside.png"):
        file.write_bytes(b"x")
    (tmp_path / "root-twin" / "c.png").write_bytes(b"x")
    (root / "link-in.png").symlink_to(root / "sub" / "b.png")
    (root / "link-out.png").symlink_to(tmp_path / "outside.png")
    (root / "folder-out").symlink_to(tmp_path / "root-twin")
    (root / "dangling.png").symlink_to(root / "nothing.png")
    (root / "loop.png").symlink_to(root / "loop.png")
    os.mkfifo(root / "pipe.png")
    return root


@pytest.mark.parametrize(
    ("relative", "leads_to"),
    [
        ("a.png", "a.png"),
        ("./sub//b.png", "sub/b.png"),
        ("sub/../a.png", "a.png"),
        ("../root/a.png", "a.png"),
        ("link-in.png", "sub/b.png"),
    ],
)
def test_paths_inside_the_root(tree: Path, relative: str, leads_to: str) -> None:
    assert resolve_picture(tree, relative) == tree / leads_to


@pytest.mark.parametrize(
    "relative",
    [
        "../outside.png",
        "sub/../../outside.png",
        "../root-twin/c.png",
        "link-out.png",
        "folder-out/c.png",
        "../../../../../../../../etc/passwd",
        "/etc/passwd",
        "../does-not-exist.png",
    ],
)
def test_no_path_leaves_the_root(tree: Path, relative: str) -> None:
    assert _reason(lambda: resolve_picture(tree, relative)) == Reason.OUTSIDE_ROOT


def test_an_absolute_path_into_the_root_is_refused_too(tree: Path) -> None:
    assert _reason(lambda: resolve_picture(tree, str(tree / "a.png"))) == Reason.OUTSIDE_ROOT


@pytest.mark.parametrize(
    "relative",
    ["none.png", "sub", ".", "dangling.png", "loop.png", "pipe.png", "a.png/b.png", "x" * 5000],
)
def test_what_is_no_regular_file_is_missing(tree: Path, relative: str) -> None:
    assert _reason(lambda: resolve_picture(tree, relative)) == Reason.PICTURE_MISSING


def test_the_root_itself_may_be_a_link(tree: Path) -> None:
    link = tree.parent / "link-to-root"
    link.symlink_to(tree)
    assert resolve_picture(link, "a.png") == tree / "a.png"


def test_a_file_too_large_for_its_pixels_is_not_read(tree: Path) -> None:
    (tree / "a.png").write_bytes(bytes(81))
    assert read_picture(tree, "a.png", 11) == bytes(81)
    assert _reason(lambda: read_picture(tree, "a.png", 10)) == Reason.PICTURE_TOO_LARGE


@pytest.mark.parametrize("fault", [errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ENOMEM])
@pytest.mark.parametrize("call", ["is_file", "stat", "read_bytes"])
def test_what_is_the_storage_s_fault_is_raised(
    fault: int, call: str, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(fault, os.strerror(fault))

    monkeypatch.setattr(Path, call, fail)
    with pytest.raises(OSError, match=os.strerror(fault)):
        read_picture(tree, "a.png", LIMIT)


def test_rights_are_the_picture_s(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Patched: the tests may run as root, who may read everything."""

    def refuse(_: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert _reason(lambda: read_picture(tree, "a.png", LIMIT)) == Reason.PICTURE_UNREADABLE


# --- decoding


def test_a_lack_of_memory_is_no_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Image.Image) -> None:
        raise MemoryError

    data = _encoded(Image.new("RGB", (3, 2)))
    monkeypatch.setattr(PngImageFile, "load", fail)
    with pytest.raises(MemoryError):
        open_picture(data, LIMIT)


def test_a_file_that_is_not_there_is_no_damage(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        open_picture(tmp_path / "none.png", LIMIT)


def test_path_and_bytes_give_the_same_picture(tmp_path: Path) -> None:
    data = _encoded(Image.new("RGB", (3, 2), (1, 2, 3)))
    (tmp_path / "a.png").write_bytes(data)
    one, two = open_picture(data, LIMIT), open_picture(tmp_path / "a.png", LIMIT)
    assert one.mode == two.mode == "RGB"
    assert one.tobytes() == two.tobytes() == bytes([1, 2, 3]) * 6


def test_transparency_is_laid_over_white() -> None:
    """Three pixels: opaque, half, gone; red in each. Half: 128/255 of red, the rest white."""
    rgba = Image.new("RGBA", (3, 1))
    for x, alpha in enumerate((255, 128, 0)):
        rgba.putpixel((x, 0), (200, 0, 0, alpha))
    picture = open_picture(_encoded(rgba), LIMIT)
    half = (200 * 128 + 255 * 127) / 255, 255 * 127 / 255, 255 * 127 / 255
    assert picture.getpixel((0, 0)) == (200, 0, 0)
    assert picture.getpixel((1, 0)) == pytest.approx(half, abs=1)
    assert picture.getpixel((2, 0)) == WHITE


def test_every_way_to_write_transparency() -> None:
    grey_alpha = Image.new("LA", (1, 1), (0, 0))
    assert open_picture(_encoded(grey_alpha), LIMIT).getpixel((0, 0)) == WHITE

    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    picture = open_picture(_encoded(palette, transparency=0), LIMIT)
    assert [picture.getpixel((x, 0)) for x in (0, 1)] == [WHITE, (40, 50, 60)]

    keyed = Image.new("RGB", (2, 1), (9, 9, 9))
    keyed.putpixel((1, 0), (1, 2, 3))
    picture = open_picture(_encoded(keyed, transparency=(9, 9, 9)), LIMIT)
    assert [picture.getpixel((x, 0)) for x in (0, 1)] == [WHITE, (1, 2, 3)]


@pytest.mark.parametrize(("kind", "mode"), [("PNG", "I;16"), ("TIFF", "I;16"), ("TIFF", "I;16B")])
def test_sixteen_bits_keep_their_shades(kind: str, mode: str) -> None:
    values = np.array([[0, 257, 128 * 257, 65535, 300]], dtype=np.uint16)
    order = ">u2" if mode == "I;16B" else "<u2"
    image = Image.frombytes(mode, (5, 1), values.astype(order).tobytes())
    picture = np.asarray(open_picture(_encoded(image, kind), LIMIT))
    assert picture[0, :, 0].tolist() == [0, 1, 128, 255, 1]
    assert (picture == picture[..., :1]).all()


@pytest.mark.parametrize("mode", ["I", "F"])
def test_grey_without_a_range_is_refused(mode: str) -> None:
    data = _encoded(Image.new(mode, (2, 2)), "TIFF")
    assert _reason(lambda: open_picture(data, LIMIT)) == Reason.PICTURE_UNREADABLE


def test_the_exif_orientation_is_applied() -> None:
    """Orientation 6: the stored top-left pixel is the upright top-right one."""
    stored = Image.new("RGB", (3, 2))
    stored.putpixel((0, 0), WHITE)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = open_picture(_encoded(stored, exif=exif), LIMIT)
    assert picture.size == (2, 3)
    assert picture.getpixel((1, 0)) == WHITE
    assert picture.getpixel((0, 0)) == (0, 0, 0)


def test_an_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    for kind, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {})):
        data = _encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert open_picture(data, LIMIT).getpixel((0, 0)) == (255, 0, 0)


def _png_header(width: int, height: int) -> bytes:
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        (b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body)))
        + struct.pack(">I", 0)
        + b"IDAT"
        + struct.pack(">I", zlib.crc32(b"IDAT"))
    )


@pytest.mark.parametrize(("width", "height"), [(60_000, 60_000), (10_000, 10_000), (1001, 1000)])
def test_a_bomb_is_refused_by_its_header(
    width: int, height: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a pixel was decoded")

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load_prepare", refuse)
    data = _png_header(width, height)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _reason(lambda: open_picture(data, LIMIT)) == Reason.PICTURE_TOO_LARGE


def test_the_limits_themselves_are_allowed() -> None:
    data = _encoded(Image.new("L", (200, 1)))
    assert open_picture(data, 200).size == (200, 1)
    assert _reason(lambda: open_picture(data, 199)) == Reason.PICTURE_TOO_LARGE
    elongated = _encoded(Image.new("L", (1, 201)))
    assert _reason(lambda: open_picture(elongated, LIMIT)) == Reason.ASPECT_RATIO


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's remarks on damaged TIFF
def test_any_damage_is_a_reason_and_never_a_crash() -> None:
    """Every cut and many flipped bytes of small files: a picture or a reason, no other error."""
    noise = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    refused = 0
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"):
        data = _encoded(image, kind)
        damaged = [data[:cut] for cut in range(0, len(data), 7)]
        damaged += [
            data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :] for at in range(0, len(data), 5)
        ]
        for candidate in damaged:
            try:
                assert open_picture(candidate, LIMIT).mode == "RGB"
            except UnusableRecord as error:
                assert "0x" not in error.detail
                refused += 1
    assert refused > 100


def test_formats_that_start_programs_are_not_tried() -> None:
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 2 2\n%%EndComments\nshowpage\n"
    with Image.open(io.BytesIO(postscript)) as image:
        assert image.format == "EPS"
    assert _reason(lambda: open_picture(postscript, LIMIT)) == Reason.PICTURE_UNREADABLE


def test_real_photos_decode(shared_data: Path) -> None:
    refused = []
    for file in sorted((shared_data / "photos").rglob("*")):
        if file.suffix.lower() in (".png", ".jpg", ".jpeg", ".gif", ".tif"):
            try:
                picture = open_picture(file, 100_000_000)
            except UnusableRecord as error:
                refused.append((file.name, error.reason))
            else:
                assert picture.mode == "RGB"
    assert refused == [("multipage_rgb.tif", Reason.PICTURE_UNREADABLE)]


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_is_that_of_the_decoded_picture(form: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stream = io.BytesIO()
    Image.new("RGB", (30, 20)).save(stream, form, exif=exif)
    size = picture_size(stream.getvalue(), 1000)
    assert size == open_picture(stream.getvalue(), 1000).size
    assert (size == (20, 30)) == (orientation >= 5)


def test_a_picture_with_too_many_pixels_has_no_size() -> None:
    stream = io.BytesIO()
    Image.new("RGB", (30, 20)).save(stream, "PNG")
    with pytest.raises(UnusableRecord, match="30x20 is more than 599 pixels"):
        picture_size(stream.getvalue(), 599)
