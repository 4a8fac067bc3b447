"""What the markers at the beginning of a JPEG say, as far as its pixels need it."""

FRAMES = (0xC0, 0xC1, 0xC2)
"""Markers of a baseline, an extended and a progressive frame (ITU T.81, table B.1)."""
TABLES = (0xC4, 0xDB, 0xDD, 0xE0, 0xED, 0xEE, 0xFE)
"""Markers of what no size follows from: Huffman's and quantization tables, restarts, JFIF,
Photoshop's and Adobe's notes, comments. Adobe's says how colours are coded, which decoders read."""
METADATA = 0xE1
PROFILE = 0xE2
TURNING = (b"\x01\x12", b"\x12\x01", b"Orientation")
"""How EXIF's orientation begins in either order of bytes, and its name in XMP."""
MOST_PIXELS = 2**26
"""Of larger images Pillow decides whether they are opened."""


def plain_size(data: bytes) -> tuple[int, int] | None:
    """Return the width and height of a JPEG that is grey or has three colours, and is upright.

    `None` for everything else, and wherever there is a doubt: a file that is no JPEG, cut short,
    of four colours or more than 8 bits, with metadata that may turn it, or several images in one.
    """
    if data[:2] != b"\xff\xd8":
        return None
    at, end = 2, len(data)
    while at + 9 < end and data[at] == 0xFF:
        marker = data[at + 1]
        if marker in FRAMES:
            bits, channels = data[at + 4], data[at + 9]
            height = int.from_bytes(data[at + 5 : at + 7], "big")
            width = int.from_bytes(data[at + 7 : at + 9], "big")
            plain = bits == 8 and channels in (1, 3) and 0 < width * height <= MOST_PIXELS
            return (width, height) if plain else None
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        if length < 2 or not (
            marker in TABLES or _harmless(marker, data[at + 4 : at + 2 + length])
        ):
            return None
        at += 2 + length
    return None


def _harmless(marker: int, part: bytes) -> bool:
    if marker == PROFILE:
        return part.startswith(b"ICC_PROFILE")
    return marker == METADATA and not any(sign in part for sign in TURNING)
