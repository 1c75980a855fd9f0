"""A small canvas that becomes a PNG: lines, bars and plain text, with numpy and zlib alone.

Owns: pixels, a 5 x 7 font of printable ASCII, the PNG file format (RFC 2083, 8-bit RGB).
Does not know: what is drawn. A plotting library was left out for one figure: it would bring ten
packages and 60 MB into every installation (docs/decisions/drift-figure.md).
"""

import struct
import zlib

import numpy as np
from numpy.typing import NDArray

Colour = tuple[int, int, int]
BLACK, GREY, PALE, RED, BLUE = (20, 20, 20), (130, 130, 130), (222, 228, 236), (200, 40, 30), (40, 90, 170)
WHITE = (255, 255, 255)
GLYPH_WIDTH, GLYPH_HEIGHT = 6, 9  # with the space around
# five columns of each character from the space to the tilde, lowest bit at the top
_FONT = bytes.fromhex(
    "000000000000005f00000007000700147f147f14242a7f2a12231308646236495620500008070300001c2241000041221c00"
    "14083e081408083e080800807030000808080808006060000020100804023e5149453e00427f400042615149462141454b31"
    "1814127f1027454545393c4a49493001710905033649494936064949291e0036360000005636000008142241001414141414"
    "00412214080201510906324979413e7e1111117e7f494949363e414141227f4141221c7f494949417f090909013e4149497a"
    "7f0808087f00417f41002040413f017f081422417f404040407f020c027f7f0408107f3e4141413e7f090909063e4151215e"
    "7f09192946464949493101017f01013f4040403f1f2040201f3f4038403f631408146307087008076151494543007f414100"
    "02040810200041417f0004020102044040404040000102040020545454787f484444383844444420384444487f3854545418"
    "087e0901020c5252523e7f0804047800447d40002040443d007f1028440000417f40007c041804787c080404783844444438"
    "7c14141408081414187c7c080404084854545420043f4440203c4040207c1c2040201c3c4030403c44281028440c5050503c"
    "4464544c44000836410000007f000000413608001008081008"
)


class PngCanvas:
    """Draws by pixel coordinates, x to the right, y down; what lies outside is cut off."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self._pixels: NDArray[np.uint8] = np.full((height, width, 3), WHITE, np.uint8)

    def rectangle(self, left: float, top: float, right: float, bottom: float, colour: Colour) -> None:
        """Fill a rectangle."""
        rows = slice(max(0, round(top)), max(0, round(bottom)))
        self._pixels[rows, max(0, round(left)) : max(0, round(right))] = colour

    def line(self, x: NDArray[np.floating], y: NDArray[np.floating], colour: Colour) -> None:
        """Join points; NaN interrupts the line."""
        for index in range(len(x) - 1):
            ends = np.array([x[index], x[index + 1], y[index], y[index + 1]], float)
            if np.isfinite(ends).all():
                n = int(max(abs(ends[1] - ends[0]), abs(ends[3] - ends[2]))) + 2
                columns = np.rint(np.linspace(ends[0], ends[1], n)).astype(np.int64)
                rows = np.rint(np.linspace(ends[2], ends[3], n)).astype(np.int64)
                self._dots(columns, rows, colour)

    def text(self, left: int, top: int, words: str, colour: Colour = BLACK) -> None:
        """Write one line; a character the font lacks becomes a question mark."""
        for place, letter in enumerate(words):
            code = ord(letter) - 32
            code = code if 0 <= code < len(_FONT) // 5 else ord("?") - 32
            columns = np.frombuffer(_FONT[5 * code : 5 * code + 5], np.uint8)
            rows, across = np.nonzero((columns[None] >> np.arange(8)[:, None]) & 1)
            self._dots(across + left + place * GLYPH_WIDTH, rows + top, colour)

    def png(self) -> bytes:
        """Return the file's content."""
        raw = np.concatenate(
            [np.zeros((self.height, 1), np.uint8), self._pixels.reshape(self.height, -1)], axis=1
        )
        header = struct.pack(">IIBBBBB", self.width, self.height, 8, 2, 0, 0, 0)
        parts = ((b"IHDR", header), (b"IDAT", zlib.compress(raw.tobytes(), 6)), (b"IEND", b""))
        return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*part) for part in parts)

    def _dots(self, columns: NDArray[np.int64], rows: NDArray[np.int64], colour: Colour) -> None:
        inside = (columns >= 0) & (columns < self.width) & (rows >= 0) & (rows < self.height)
        self._pixels[rows[inside], columns[inside]] = colour


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
