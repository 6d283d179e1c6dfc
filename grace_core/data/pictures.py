"""Pictures: finding them below their root, and decoding them to upright 8-bit RGB.

Every way in which a picture can be unfit ends in `UnusableRecord`, so that the record goes to
quarantine with the reason and nothing is decoded that should not be. What is no fault of the
picture (a storage that fails, memory that is full) is raised as it is: the same picture would be
read at another time.
"""

from __future__ import annotations

import errno
import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from grace_core.data.sharegpt4v import Reason, UnusableRecord

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""Formats that are tried, by content and not by name. Pillow knows more, but some of its readers
(EPS among them) start other programs, which training data must not be able to do."""

MAX_ASPECT_RATIO = 200.0
"""Longer over shorter side. Qwen's `smart_resize` refuses more; the limit holds for every family,
so that one data set serves all of them."""

_BYTES_PER_PIXEL = 8
"""An uncompressed 16-bit RGBA pixel: a file larger than the pixel limit allows is not even read."""

_TURNED = (5, 6, 7, 8)
"""EXIF orientations that swap width and height."""

_FAULTS_OF_A_PATH = (
    *(errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP),
    *(errno.EACCES, errno.EPERM),
)
"""Errors that say something of a name and its rights; all others are the storage's."""

_TOO_LARGE = (Image.DecompressionBombError, Image.DecompressionBombWarning)


def resolve_picture(root: Path, relative: str) -> Path:
    """The real path of a picture named in a record.

    `..` and symbolic links are followed as the file system does, and the place they lead to must
    lie below `root`; a link that leads out is refused like any other way out.

    Raises:
        UnusableRecord: OUTSIDE_ROOT, or PICTURE_MISSING where there is no regular file.
        OSError: the storage fails.
    """
    # An absolute path is refused even where it points into the root: the record would then work on
    # one machine only.
    if Path(relative).is_absolute():
        raise UnusableRecord(Reason.OUTSIDE_ROOT, f"{_shown(relative)} is absolute")
    real_root = root.resolve()
    try:
        path = (real_root / relative).resolve()
        inside = path.is_relative_to(real_root)
        regular = inside and path.is_file()
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, OSError) and error.errno not in _FAULTS_OF_A_PATH:
            raise
        # A name too long for the file system, a loop of links, a folder that may not be searched.
        raise UnusableRecord(
            Reason.PICTURE_MISSING, f"{_shown(relative)} cannot be looked up"
        ) from None
    if not inside:
        raise UnusableRecord(Reason.OUTSIDE_ROOT, f"{_shown(relative)} leads out of the root")
    if not regular:
        problem = "is no regular file" if path.exists() else "does not exist"
        raise UnusableRecord(Reason.PICTURE_MISSING, f"{_shown(relative)} {problem}")
    return path


def read_picture(root: Path, relative: str, max_decoded_pixels: int) -> bytes:
    """The encoded bytes of a picture named in a record, as found.

    Raises:
        UnusableRecord: as `resolve_picture`; PICTURE_TOO_LARGE for a file larger than its
            greatest permitted number of pixels would be without compression;
            PICTURE_UNREADABLE where the file may not be read.
        OSError: the storage fails.
    """
    path = resolve_picture(root, relative)
    try:
        size = path.stat().st_size
        if size > max_decoded_pixels * _BYTES_PER_PIXEL:
            raise UnusableRecord(
                Reason.PICTURE_TOO_LARGE, f"{_shown(relative)} has {size} bytes encoded"
            )
        return path.read_bytes()
    except OSError as error:
        if error.errno not in _FAULTS_OF_A_PATH:
            raise
        raise UnusableRecord(
            Reason.PICTURE_UNREADABLE, f"{_shown(relative)}: {error.strerror}"
        ) from error


def open_picture(source: bytes | Path, max_decoded_pixels: int) -> Image.Image:
    """Decode a picture to upright 8-bit RGB.

    Size and aspect ratio are judged by the header, before any pixel is decoded. Then: the first
    frame of an animation; the EXIF orientation is applied; 16-bit grey is scaled to 8 bit (Pillow's
    own conversion clips it to white); transparency, of whatever mode, is laid over white, because
    captions describe a cut-out as it looks on a page, while dropping the alpha channel would
    uncover the arbitrary colours that lie beneath. Embedded colour profiles are not applied.

    Args:
        source: encoded bytes, or the path of a file.
        max_decoded_pixels: largest width x height; Pillow's own guard holds besides.

    Returns:
        An image of mode RGB, in memory, independent of its file.

    Raises:
        UnusableRecord: PICTURE_UNREADABLE (empty, truncated, unknown format, grey values without
            a defined range), PICTURE_TOO_LARGE or ASPECT_RATIO.
        OSError: the file cannot be read.
        MemoryError: there is too little of it.
    """
    with _opened(source, max_decoded_pixels) as image:
        image.load()
        return _flatten(ImageOps.exif_transpose(image))


def picture_size(source: bytes | Path, max_decoded_pixels: int) -> tuple[int, int]:
    """Width and height of what `open_picture` returns, from the header where that tells.

    Raises as `open_picture` does, except for damage that only decoding finds.
    """
    with _opened(source, max_decoded_pixels) as image:
        width, height = image.size
        if image.format == "TIFF":  # whose reader gives the upright size
            return width, height
        turned = image.getexif().get(ExifTags.Base.Orientation) in _TURNED
        return (height, width) if turned else (width, height)


@contextmanager
def _opened(source: bytes | Path, max_decoded_pixels: int) -> Iterator[Image.Image]:
    """A picture whose header is fit; whatever is found unfit in the block is `UnusableRecord`."""
    data = source if isinstance(source, bytes) else source.read_bytes()
    try:
        with warnings.catch_warnings():
            # What Pillow only warns of is judged by `max_decoded_pixels` right below.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        with image:
            _check_size(image.width, image.height, max_decoded_pixels)
            yield image
    except (UnusableRecord, MemoryError):
        raise
    except _TOO_LARGE:
        raise UnusableRecord(
            Reason.PICTURE_TOO_LARGE, "the header declares more pixels than Pillow decodes"
        ) from None
    except UnidentifiedImageError:
        # Pillow's text holds a memory address, which would change the quarantine file's digest.
        raise UnusableRecord(
            Reason.PICTURE_UNREADABLE, f"none of the formats {', '.join(FORMATS)}"
        ) from None
    except Exception as error:
        # Pillow's readers answer damaged files with errors of many kinds (OSError, SyntaxError,
        # struct.error, IndexError, ...); each of them means that this file cannot be decoded.
        text = re.sub(r" at 0x[0-9a-f]+", "", f"{type(error).__name__}: {error}")
        raise UnusableRecord(Reason.PICTURE_UNREADABLE, text) from error


def _check_size(width: int, height: int, max_decoded_pixels: int) -> None:
    if min(width, height) < 1:
        raise UnusableRecord(Reason.PICTURE_UNREADABLE, f"the size is {width}x{height}")
    if width * height > max_decoded_pixels:
        raise UnusableRecord(
            Reason.PICTURE_TOO_LARGE,
            f"{width}x{height} is more than {max_decoded_pixels} pixels",
        )
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise UnusableRecord(
            Reason.ASPECT_RATIO, f"{width}x{height} is longer than {MAX_ASPECT_RATIO:g} to 1"
        )


def _flatten(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.uint32)
        # 65535 / 255 = 257; half of it is added to round.
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise UnusableRecord(
            Reason.PICTURE_UNREADABLE, f"pixels of mode {image.mode} have no defined range"
        )
    if image.has_transparency_data:
        cutout = image.convert("RGBA")
        page = Image.new("RGBA", cutout.size, (255, 255, 255, 255))
        return Image.alpha_composite(page, cutout).convert("RGB")
    return image.convert("RGB")


def _shown(relative: str) -> str:
    return repr(relative if len(relative) <= 120 else relative[:117] + "...")
