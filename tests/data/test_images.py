"""From an encoded image to pixels: orientation, depth, and what is refused."""

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageOps

from zoo.data import images
from zoo.data.images import FORMATS, EncodedImage, PlainJpeg, UnreadableImage, open_image, to_rgb
from zoo.data.jpeg import plain_size
from zoo.data.views import View


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def gradient(width=40, height=24) -> Image.Image:
    """An image that no turn or mirroring leaves as it is."""
    rows, cols = np.mgrid[:height, :width]
    pixels = np.stack([5 * cols, 9 * rows, 3 * (rows + cols)], -1)
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_photograph_is_turned_as_its_exif_says(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(gradient(), kind, exif=exif)
    theirs = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    ours = EncodedImage(data)
    assert ours.size == theirs.size
    assert np.array_equal(ours.rgb(), theirs)
    if kind != "TIFF":  # which Pillow turns in any case
        stored = EncodedImage(data, upright=False)
        assert stored.size == (40, 24)
        assert np.array_equal(stored.rgb(), Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_views_of_a_turned_photograph_are_those_of_the_upright_one(orientation):
    upright = gradient(400, 240)
    turn = {1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}[orientation]  # its inverse
    exif = Image.Exif()
    exif[0x0112] = turn
    stored = encoded(ImageOps.exif_transpose(_with(upright, turn)), "PNG")
    exif[0x0112] = orientation
    turned = encoded(Image.open(io.BytesIO(stored)), "PNG", exif=exif)
    view, whole = View(size=16), encoded(upright, "PNG")
    assert np.array_equal(view.evaluate(turned), view.evaluate(whole))
    ours, theirs = (view.train(x, np.random.default_rng(3)) for x in (turned, whole))
    assert np.array_equal(ours, theirs)


def _with(image: Image.Image, orientation: int) -> Image.Image:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return Image.open(io.BytesIO(encoded(image, "PNG", exif=exif)))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_does_not_cost_the_image():
    data = encoded(gradient(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + b"\xff" * 40)
    assert EncodedImage(data).size == (40, 24)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_a_grey_ramp_of_16_bits_is_a_ramp_of_8(kind):
    ramp = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    ours = np.asarray(EncodedImage(encoded(Image.fromarray(ramp), kind)).rgb())
    assert np.array_equal(ours, np.repeat((ramp >> 8)[..., None], 3, axis=-1))


@pytest.mark.parametrize(
    ("pixels", "what"), [(np.float32, "floats"), (np.int32, "integers of 32 bits")]
)
def test_values_of_an_unknown_range_are_refused(pixels, what):
    data = encoded(Image.fromarray(np.ones((8, 8), pixels)), "TIFF")
    with pytest.raises(UnreadableImage, match=f"it holds {what}.*8 or 16 bits"):
        EncodedImage(data).rgb()


def test_integers_in_memory_are_taken_for_16_bits():
    image = Image.fromarray(np.full((2, 2), 0x1234, np.int32))
    assert np.asarray(to_rgb(image)).tolist() == [[[0x12] * 3] * 2] * 2


def test_a_small_file_with_a_side_of_millions_is_refused_by_its_number():
    tags = [
        (256, 4, 1), (257, 4, 80_000_000), (258, 3, 1), (259, 3, 1), (262, 3, 1),
        (273, 4, 8), (277, 3, 1), (278, 4, 80_000_000), (279, 4, 1),
    ]  # fmt: skip
    ifd = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    data = b"II*\0" + struct.pack("<IH", 8, len(tags)) + ifd + bytes(4)
    with pytest.raises(UnreadableImage, match=r"1 x 80000000 pixels; no side .* 65535"):
        EncodedImage(data)


def test_a_format_that_runs_another_program_is_no_image():
    assert "EPS" not in FORMATS
    with pytest.raises(UnreadableImage, match="it is none of AVIF, BMP"):
        EncodedImage(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")


def test_an_unreadable_file_is_named(tmp_path):
    file = tmp_path / "a.png"
    file.write_bytes(encoded(gradient(), "PNG")[:-300])
    with pytest.raises(UnreadableImage, match=r"a\.png cannot be read"):
        EncodedImage(file).rgb()


def test_the_faster_decoder_sees_what_pillow_sees(tmp_path):
    """A JPEG, one that is turned, one that is grey, a PNG; what is damaged is refused as ever."""
    photo = Image.fromarray(smooth(96, 128))
    turned = Image.Exif()
    turned[274] = 6
    photo.save(tmp_path / "plain.jpg", quality=95)
    photo.save(tmp_path / "turned.jpg", quality=95, exif=turned)
    photo.convert("L").save(tmp_path / "grey.jpg", quality=95)
    photo.save(tmp_path / "plain.png")
    for file in sorted(tmp_path.iterdir()):
        theirs = np.asarray(EncodedImage(file.read_bytes()).rgb()).transpose(2, 0, 1)
        ours = EncodedImage(file.read_bytes()).pixels().numpy()
        assert ours.shape == theirs.shape and ours.dtype == np.uint8
        assert np.abs(ours.astype(int) - theirs).max() <= 2
    torn = (tmp_path / "plain.jpg").read_bytes()[:900]
    with pytest.raises(UnreadableImage):
        EncodedImage(torn).pixels()


@pytest.mark.parametrize("orientation", [0, 1, 6])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_that_pillow_need_not_open_is_what_pillow_sees(orientation, mode, progressive):
    exif = Image.Exif()
    exif[0x010E] = "a photograph"
    if orientation:
        exif[0x0112] = orientation
    photo = Image.fromarray(smooth(96, 128)).convert(mode)
    more = dict(exif=exif, progressive=progressive, icc_profile=b"profile", comment=b"no comment")
    data = encoded(photo, "JPEG", quality=90, **more)
    theirs, ours = EncodedImage(data), open_image(data)
    assert isinstance(ours, PlainJpeg) == (mode != "CMYK" and not orientation)
    assert ours.size == theirs.size and np.array_equal(ours.rgb(), theirs.rgb())
    assert np.array_equal(ours.pixels(), theirs.pixels())


def test_xmp_that_turns_a_jpeg_is_left_to_pillow():
    turned = b'http://ns.adobe.com/xap/1.0/\0<x xmlns:tiff="t" tiff:Orientation="6"/>'
    upright = b'http://ns.adobe.com/xap/1.0/\0<x xmlns:tiff="t" tiff:Make="zoo"/>'
    plain = encoded(gradient(), "JPEG")
    sizes = {}
    for note in (turned, upright):
        segment = b"\xff\xe1" + struct.pack(">H", len(note) + 2) + note
        data = plain[:2] + segment + plain[2:]
        sizes[note] = plain_size(data)
        assert open_image(data).size == EncodedImage(data).size
    assert sizes == {turned: None, upright: (40, 24)}


def test_what_is_cut_or_no_jpeg_has_no_plain_size():
    data = encoded(gradient(), "JPEG")
    start = next(at for at in range(len(data)) if plain_size(data[:at]))
    assert data[start - 10 : start - 8] == b"\xff\xc0"  # the frame's header, as far as it is read
    assert all(plain_size(data[:at]) is None for at in range(start))
    assert plain_size(encoded(gradient(), "PNG")) is None
    with pytest.raises(UnreadableImage):
        open_image(data[:start]).pixels()


@pytest.mark.parametrize("quality, subsampling", [(85, 2), (95, 0), (60, 1)])
def test_simplejpeg_gives_the_bytes_of_pillow(quality, subsampling):
    pytest.importorskip("simplejpeg")
    decode = images._by_simplejpeg()
    assert decode is not None
    for mode in ("RGB", "L"):
        data = io.BytesIO()
        photo = Image.fromarray(smooth(97, 131)).convert(mode)
        photo.save(data, "JPEG", quality=quality, subsampling=subsampling)
        theirs = np.asarray(Image.open(data).convert("RGB")).transpose(2, 0, 1)
        np.testing.assert_array_equal(decode(data.getvalue()).numpy(), theirs)
    with pytest.raises(ValueError):
        decode(data.getvalue()[:-400])


def test_views_of_both_decoders_are_alike():
    data = io.BytesIO()
    Image.fromarray(smooth(120, 160)).save(data, "JPEG", quality=95)
    for size in (32, 96):  # the first is decoded at half its size, by Pillow in both cases
        views = [View(size=size, decoder=decoder) for decoder in ("pillow", "torch")]
        ours, theirs = (
            view.train(data.getvalue(), np.random.default_rng(1)).astype(float) for view in views
        )
        assert ours.shape == (3, size, size)
        assert np.abs(ours - theirs).mean() < 1.5  # half a pixel of a smooth image
    assert "decoder" not in views[0].described() and views[1].described()["decoder"] == "torch"


def smooth(rows: int, cols: int) -> np.ndarray:
    """Make an image without edges."""
    y, x = np.mgrid[:rows, :cols] / 40
    waves = [np.sin(y + phase) * np.cos(x - phase) for phase in range(3)]
    return (127.5 * (1 + np.stack(waves, -1))).astype(np.uint8)
