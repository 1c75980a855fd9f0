"""The canvas: pixels where they were asked for, and a file that is a PNG."""

import struct
import zlib

import numpy as np

from fleetcast.drift.figure import BLACK, RED, WHITE, PngCanvas


def decoded(content: bytes) -> np.ndarray:
    """Return the pixels (row, column, 3) of a PNG without filters, every checksum checked."""
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    at, parts = 8, {}
    while at < len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        kind, body = content[at + 4 : at + 8], content[at + 8 : at + 8 + length]
        assert struct.unpack(">I", content[at + 8 + length : at + 12 + length])[0] == zlib.crc32(kind + body)
        parts[kind] = body
        at += 12 + length
    width, height, depth, colours = struct.unpack(">IIBB", parts[b"IHDR"][:10])
    assert (depth, colours) == (8, 2)
    rows = np.frombuffer(zlib.decompress(parts[b"IDAT"]), np.uint8).reshape(height, 1 + 3 * width)
    assert (rows[:, 0] == 0).all()
    return rows[:, 1:].reshape(height, width, 3)


def test_a_rectangle_and_a_line_stand_where_they_were_drawn() -> None:
    canvas = PngCanvas(20, 10)
    canvas.rectangle(2, 3, 5, 4, RED)
    canvas.line(np.array([10.0, 19.0]), np.array([8.0, 8.0]), BLACK)
    pixels = decoded(canvas.png())
    assert [tuple(pixel) for pixel in pixels[3, 1:6]] == [WHITE, RED, RED, RED, WHITE]
    assert (pixels[8, 10:] == BLACK).all() and (pixels[7] == WHITE).all()


def test_absent_points_interrupt_a_line_and_what_lies_outside_is_cut_off() -> None:
    canvas = PngCanvas(10, 10)
    canvas.line(np.array([0.0, 4.0, 9.0]), np.array([5.0, np.nan, 5.0]), BLACK)
    assert (decoded(canvas.png()) == WHITE).all()
    canvas.rectangle(-5, -5, 100, 2, RED)
    canvas.line(np.array([-50.0, 50.0]), np.array([5.0, 5.0]), BLACK)
    pixels = decoded(canvas.png())
    assert (pixels[:2] == RED).all() and (pixels[5] == BLACK).all()


def test_letters_have_their_shape() -> None:
    canvas = PngCanvas(12, 9)
    canvas.text(0, 1, "Té")
    drawn = (decoded(canvas.png()) == BLACK).all(axis=2)
    assert ["".join(".#"[int(dot)] for dot in row[:5]) for row in drawn[1:8]] == ["#####"] + ["..#.."] * 6
    question = PngCanvas(12, 9)
    question.text(0, 1, "T?")
    assert question.png() == canvas.png()
