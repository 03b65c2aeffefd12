"""Videos written by FFmpeg in which every frame shows its own number, so that a frame off by one is seen."""

import fractions
import io

import av
import numpy as np

WIDTH, HEIGHT = 64, 48
BITS = 8


def picture(number: int, size: tuple[int, int] = (WIDTH, HEIGHT)) -> np.ndarray:
    """`number` in binary, the lowest bit on the left: a bright or a dark bar each."""
    width, height = size
    bars = np.array([230 if number >> bit & 1 else 20 for bit in range(BITS)], np.uint8)
    row = bars[np.minimum(np.arange(width) * BITS // width, BITS - 1)]
    return np.broadcast_to(row[None, :, None], (height, width, 3)).copy()


def number(frame: np.ndarray) -> int:
    """The number that a frame shows."""
    width = frame.shape[1]
    middles = [(2 * bit + 1) * width // (2 * BITS) for bit in range(BITS)]
    return sum(int(frame[:, x - 1 : x + 2].mean() > 125) << bit for bit, x in enumerate(middles))


def film(
    container: str = "mp4",
    codec: str = "libx264",
    count: int = 47,
    *,
    size: tuple[int, int] = (WIDTH, HEIGHT),
    times: list[int] | None = None,
    options: dict[str, str] | None = None,
    pixels: str = "yuv420p",
    draw=picture,
) -> bytes:
    """The bytes of a video of the frames 0 to count - 1.

    Args:
      times: milliseconds at which they are shown; 25 a second if None.
    """
    file = io.BytesIO()
    with av.open(file, "w", format=container) as out:
        stream = out.add_stream(codec, rate=25, options=options or {})
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height = size
        stream.pix_fmt = pixels
        stream.codec_context.time_base = fractions.Fraction(1, 1000)
        stream.codec_context.gop_size = 12
        for i in range(count):
            frame = av.VideoFrame.from_ndarray(draw(i, size), format="rgb24")
            frame.pts, frame.time_base = times[i] if times else 40 * i, fractions.Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return file.getvalue()


def sound() -> bytes:
    """An MP4 file with a sound and no picture."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        stream = out.add_stream("aac", rate=44100)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        silence.rate = 44100
        out.mux(stream.encode(silence))
        out.mux(stream.encode())
    return file.getvalue()


def packets(data: bytes, container: str, change, path, options: dict[str, str] | None = None) -> bytes:
    """The same video with its packets changed by `change(number, packet)`, which may leave one out by None."""
    with av.open(io.BytesIO(data)) as source, av.open(str(path), "w", format=container, options=options or {}) as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        out.start_encoding()
        for i, packet in enumerate(source.demux(video=0)):
            if packet.size and (packet := change(i, packet)) is not None:
                packet.stream = stream
                out.mux(packet)
    return path.read_bytes()


def turned(data: bytes, matrix: tuple[int, int, int, int]) -> bytes:
    """The same MP4 file, to be shown turned: x' = a x + c y and y' = b x + d y for (a, b, c, d)."""
    a, b, c, d = matrix
    place = data.index(b"tkhd") + 44  # after the track's times, numbers and volume
    numbers = np.array([a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30], ">i4").tobytes()
    return data[:place] + numbers + data[place + len(numbers) :]


def whole(data: bytes | str) -> list[np.ndarray]:
    """All frames, by decoding the file from its beginning to its end."""
    with av.open(io.BytesIO(data) if isinstance(data, bytes) else data) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
