"""Images of rows and requests: what is decoded, and what is refused before it is."""

from __future__ import annotations

import base64
import warnings
from pathlib import Path

import pytest
from PIL import Image

from launcher.config.data.images import BadImage, ImageLimits, ImageReader, decode, image_of_url, measure
from tests.image_rows import encoded, picture, png_of_size

LIMITS = ImageLimits(max_pixels=10_000, max_bytes=100_000)


def data_url(raw: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(raw).decode()}"


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_an_image_is_measured_by_its_header_and_decoded_as_rgb(form: str) -> None:
    found = measure(encoded(picture(1), form), name="a", limits=LIMITS)
    assert (found.width, found.height) == (24, 16)
    opened = found.open()
    assert (opened.mode, opened.size) == ("RGB", (24, 16))


def test_pixels_are_those_of_the_file() -> None:
    assert measure(encoded(picture(3)), name="a", limits=LIMITS).open().tobytes() == picture(3).tobytes()


@pytest.mark.parametrize(("width", "height"), [(101, 100), (9_500, 9_500), (25_000, 20_000), (2**31 - 1, 2**31 - 1)])
def test_an_image_of_too_many_pixels_is_refused_by_its_header(width: int, height: int) -> None:
    """Up to four exabytes of pixels: the header alone is read. Pillow's own limit says nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(BadImage, match=r"^a has .* pixels, and an image may have 10,000$") as caught:
            measure(png_of_size(width, height), name="a", limits=LIMITS)
    assert "job.max_image_pixels" in caught.value.fix
    assert Image.MAX_IMAGE_PIXELS is not None


def test_a_limit_above_that_of_pillow_is_the_one_that_counts() -> None:
    limits = ImageLimits(max_pixels=600_000_000)
    assert measure(png_of_size(25_000, 20_000), name="a", limits=limits).height == 20_000


def test_the_limit_of_pixels_is_the_last_that_passes() -> None:
    assert measure(png_of_size(100, 100), name="a", limits=LIMITS).width == 100


def test_a_file_of_too_many_bytes_is_refused_before_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "large.png").write_bytes(encoded(picture(1)) + bytes(LIMITS.max_bytes))
    with pytest.raises(BadImage, match="may have"):
        ImageReader(folder=tmp_path, limits=LIMITS).find("large.png", "image 1")
    with pytest.raises(BadImage, match="may have"):
        image_of_url(data_url(bytes(LIMITS.max_bytes + 3)), name="a", limits=LIMITS)


def test_a_cut_image_passes_by_its_header_and_is_refused_when_it_is_decoded() -> None:
    found = measure(encoded(picture(1, (90, 90)))[:200], name="a", limits=LIMITS)
    with pytest.raises(BadImage, match="damaged or cut off"):
        found.open()


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "no image"),
        (b"not an image", "no image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image"),  # Pillow would start Ghostscript
        (encoded(picture(1), "TIFF"), "no image"),
    ],
)
def test_other_files_are_no_images(raw: bytes, words: str) -> None:
    with pytest.raises(BadImage, match=words):
        measure(raw, name="a", limits=LIMITS)


def test_an_animation_and_wide_channels_are_refused() -> None:
    frames = encoded(picture(1), "GIF", save_all=True, append_images=[picture(2)])
    with pytest.raises(BadImage, match="animated"):
        decode(frames, name="a", limits=LIMITS)
    with pytest.raises(BadImage, match="more than 8 bits"):
        decode(encoded(Image.new("I;16", (4, 4))), name="a", limits=LIMITS)


def test_a_picture_is_turned_as_the_camera_was_held() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    raw = encoded(picture(1), "PNG", exif=exif)
    assert decode(raw, name="a", limits=LIMITS).tobytes() == picture(1).transpose(Image.Transpose.ROTATE_270).tobytes()


def test_transparent_and_gray_images_become_rgb() -> None:
    for mode in ("L", "LA", "P", "RGBA", "1", "CMYK"):
        form = "JPEG" if mode == "CMYK" else "PNG"
        assert decode(encoded(picture(1).convert(mode), form), name="a", limits=LIMITS).mode == "RGB"


@pytest.mark.parametrize("value", ["http://127.0.0.1/a.png", "HTTPS://x/a.png", "file:///etc/passwd", "ftp://x/a.png"])
def test_addresses_are_refused(value: str, tmp_path: Path) -> None:
    reader = ImageReader(folder=tmp_path, limits=LIMITS)
    for held in (value, {"url": value}, {"image_url": {"url": value}}):
        with pytest.raises(BadImage, match="not fetched"):
            reader.find(held, "image 1")
    with pytest.raises(BadImage, match="not fetched"):
        image_of_url(value, name="a", limits=LIMITS)


def test_data_urls(tmp_path: Path) -> None:
    raw = encoded(picture(1))
    reader = ImageReader(folder=tmp_path, limits=LIMITS)
    assert reader.find({"image_url": {"url": data_url(raw)}}, "image 1").read() == raw
    assert reader.find(data_url(raw, "image/png;charset=utf-8"), "image 1").read() == raw
    for url, words in (
        (data_url(raw, "text/html"), "text/html"),
        ("data:image/png,abc", "without base64"),
        ("data:image/png;base64,%%%", "no valid base64"),
        ("data:image/png;base64,", "no image"),
    ):
        with pytest.raises(BadImage, match=words):
            reader.find(url, "image 1")


def test_bytes_and_objects(tmp_path: Path) -> None:
    raw = encoded(picture(1))
    reader = ImageReader(folder=tmp_path, limits=LIMITS)
    for held in (raw, {"bytes": raw, "path": "x.png"}, {"bytes": base64.b64encode(raw).decode()}, {"base64": base64.b64encode(raw).decode()}):  # fmt: skip  # noqa: E501
        assert reader.find(held, "image 1").read() == raw
    assert reader.find({"base64": data_url(raw)}, "image 1").read() == raw
    (tmp_path / "abcd").write_bytes(raw)
    for held, words in (({"base64": "abcd"}, "no image"), ({"bytes": "@@"}, "no valid base64"), ({"base64": {"path": "abcd"}}, "takes bytes")):  # fmt: skip  # noqa: E501
        with pytest.raises(BadImage, match=words):
            reader.find(held, "image 1")
    for held in (None, 3, "", {}, {"bytes": None, "path": None}):
        with pytest.raises(BadImage):
            reader.find(held, "image 1")


def test_a_path_stays_in_its_folder(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for folder in (inside, outside):
        folder.mkdir()
        picture(1).save(folder / "a.png")
    (inside / "link.png").symlink_to(outside / "a.png")
    (inside / "loop.png").symlink_to("loop.png")
    reader = ImageReader(folder=inside, limits=LIMITS)
    assert reader.find("a.png", "image 1").path == inside / "a.png"
    assert reader.find(str(inside / "a.png"), "image 1").width == 24
    for path in ("../outside/a.png", str(outside / "a.png"), "link.png"):
        with pytest.raises(BadImage, match="outside of"):
            reader.find(path, "image 1")
    for path in ("missing.png", "loop.png", ".", "a.png\0"):
        with pytest.raises(BadImage):
            reader.find(path, "image 1")


def test_a_file_that_grew_after_it_was_measured_is_refused(tmp_path: Path) -> None:
    picture(1).save(tmp_path / "a.png")
    found = ImageReader(folder=tmp_path, limits=LIMITS).find("a.png", "image 1")
    (tmp_path / "a.png").write_bytes(png_of_size(25_000, 20_000))
    with pytest.raises(BadImage, match=r"pixels|too large"):
        found.open()
