"""Videos → frames: exact places in any file, PE's uniform sample of eight, and the model's own transform over them.

A frame is known by its place in the order of presentation, from 0: frame i is the i-th that decoding the whole file
gives. What a header says of the number of frames, or of their rate, is not relied on. Decoding is FFmpeg's, by PyAV
(extra `video`); a folder of images or an array of frames needs neither.
"""

import bisect
import contextlib
import dataclasses
import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64, UInt8

from pe_jax import paths
from pe_jax.data.image import Preprocess, decode

Video = str | os.PathLike | bytes | np.ndarray

ENDINGS = ("mp4", "m4v", "mov", "avi", "mkv", "webm", "mpg", "mpeg", "ogv", "flv", "wmv", "3gp", "ts")
FRAMES = 8  # of a clip, in all of PE's video training and evaluation

_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".ppm", ".bmp")
_PACKET_IS_FRAME = ("h264", "hevc", "av1", "vp9")  # others may hide frames, or hold several in one packet
_BOXES = ("ftyp", "moov", "mdat", "moof", "free", "skip", "wide", "styp", "sidx", "mfra", "udta", "meta", "uuid")


class BadVideo(ValueError):
    """A video that cannot be decoded; the message names it."""


class Reader:
    """The frames of one video: `len(reader)` of them, `reader.read([0, 5])` gives two.

    Opening a file reads its packets and decodes none. Where the packets tell the frames, by times of their own that
    none lacks or repeats, a frame is decoded from the keyframe before it, and what comes out is held against those
    times. Where they do not (an old codec, times missing or doubled, a stream that begins in the middle), or what
    comes out differs, the whole video is decoded. Either way the frames are the same.

    Args:
      video: a path, local or gs://; the bytes of a file; a folder of images, whose frames follow the order of their
        names; or uint8 frames [T, H, W, 3].
      threads: that decode this one video; more than one pays only where few videos are read at a time.
      name: how an error calls it; the path where it is one.

    Raises:
      BadVideo: if it is missing, cut short, of an unknown format, or has no video stream.
      ModuleNotFoundError: without PyAV.
    """

    def __init__(self, video: Video, *, threads: int = 1, name: str | None = None):
        if threads < 1:
            raise ValueError(f"threads={threads} must be at least 1.")
        self.name, self._threads = name or _name(video), threads
        self.codec = "pictures"
        self._count: int | None = None
        self._pictures = self._as_pictures(video)
        if self._pictures is None:
            assert not isinstance(video, np.ndarray)
            self._file: str | bytes = self._checked(video)
            self._scan()

    def __len__(self) -> int:
        """T, the number of frames; counted by decoding them all where packets do not tell it."""
        if self._count is None:
            self._decode_all(lambda count: ())
        assert self._count is not None
        return self._count

    @property
    def fps(self) -> float:
        """Frames a second, on average; 0 where nothing tells."""
        if self._pictures is not None:
            return 0.0
        if len(self._times) > 1:
            return (len(self) - 1) / ((self._times[-1] - self._times[0]) * self._unit)
        return len(self) / self._seconds if self._seconds else self._rate

    def read(self, places: Sequence[int] | Int64[np.ndarray, "F"]) -> list[UInt8[np.ndarray, "H W 3"]]:
        """The frames at `places`, 0 <= place < T, in any order; one that is named twice is decoded once.

        They are RGB, upright as the file says a player should show them, and of one size unless the stream changes it.

        Raises:
          IndexError: for a place that is not there.
          BadVideo: if decoding fails.
        """
        return self._pick(lambda count: list(map(int, places)))

    def sample(self, frames: int = FRAMES, rng: np.random.Generator | None = None) -> list[UInt8[np.ndarray, "H W 3"]]:
        """The frames at `places(T, frames, rng)`."""
        draws = None if rng is None else rng.random(frames)
        return self._pick(lambda count: _places(count, frames, draws).tolist())

    def _pick(self, choose: Callable[[int], Sequence[int]]) -> list[np.ndarray]:
        """The frames at `choose(T)`, which is asked again if T turns out to be another than the packets said."""
        if self._pictures is not None:
            wanted = self._inside(choose(len(self)))
            found = {place: self._picture(place) for place in set(wanted)}
            return [found[place] for place in wanted]
        if self._times:
            wanted = self._inside(choose(len(self)))
            if (sought := self._seek_each(sorted(set(wanted)))) is not None:
                return [sought[place] for place in wanted]
            self._times, self._count = [], None  # the packets told wrong
        found = self._decode_all(choose)
        return [found[place] for place in self._inside(choose(len(self)))]

    def _inside(self, places: Sequence[int]) -> Sequence[int]:
        for place in places:
            if not 0 <= place < len(self):
                raise IndexError(f"{self.name} has the frames 0 to {len(self) - 1}; got {place}.")
        return places

    # ---- pictures

    def _as_pictures(self, video: Video) -> list[Any] | None:
        if isinstance(video, np.ndarray):
            if video.dtype != np.uint8 or video.ndim != 4 or video.shape[3] != 3 or not video.size:
                raise BadVideo(f"{self.name} is {video.dtype} {list(video.shape)}; wanted uint8 [T, H, W, 3].")
            pictures: list[Any] = list(video)
        elif isinstance(video, bytes) or not paths.path(video).is_dir():
            return None
        else:
            pictures = sorted(str(file) for file in paths.path(video).iterdir() if file.suffix.lower() in _PICTURES)
            if not pictures:
                raise BadVideo(f"{self.name} is a folder without frames; wanted {', '.join(_PICTURES)} files.")
        self._count = len(pictures)
        return pictures

    def _picture(self, place: int) -> np.ndarray:
        assert self._pictures is not None
        try:
            return np.array(decode(self._pictures[place]).convert("RGB"))
        except ValueError as error:
            raise BadVideo(f"{self.name}, frame {place}: {error}") from error

    # ---- files

    def _checked(self, video: str | os.PathLike | bytes) -> str | bytes:
        """What FFmpeg opens, known to be whole as far as its container tells."""
        try:
            if isinstance(video, bytes):
                given: str | bytes = video
            elif paths.is_bucket(video):
                given = paths.path(video).read_bytes()
            else:
                given = os.fspath(video)
            with io.BytesIO(given) if isinstance(given, bytes) else open(given, "rb") as file:
                size = file.seek(0, os.SEEK_END)
                announced = _announced(file, size)
        except FileNotFoundError as error:
            raise BadVideo(f"{self.name} does not exist.") from error
        except OSError as error:
            raise BadVideo(f"{self.name} cannot be read: {error}.") from error
        if not size:
            raise BadVideo(f"{self.name} is empty.")
        if announced is not None and announced > size:
            raise BadVideo(f"{self.name} is cut short: it has {size} bytes of at least {announced}.")
        return given

    @contextlib.contextmanager
    def _opened(self) -> Iterator[tuple[Any, Any]]:
        """PyAV's container and its video stream; what FFmpeg raises in the block becomes a BadVideo."""
        try:
            import av
            import av.error
        except ImportError as error:
            raise ModuleNotFoundError("videos are decoded by PyAV: pip install 'pe-jax[video]'.") from error
        opened = False
        try:
            # "file:", lest a name be taken for an address of another protocol of FFmpeg's.
            file = io.BytesIO(self._file) if isinstance(self._file, bytes) else f"file:{self._file}"
            with av.open(file) as container:
                opened = True
                # A cover of a piece of music is a stream of video too, to FFmpeg.
                streams = [s for s in container.streams.video if not s.disposition & s.disposition.attached_pic]
                if not streams:
                    kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "no stream at all"
                    raise BadVideo(f"{self.name} has no video stream; it has {kinds}.")
                stream = streams[0]
                if stream.codec_context is None:
                    raise BadVideo(f"{self.name} holds video in a form that this FFmpeg has no decoder for.")
                stream.thread_type = "NONE" if self._threads == 1 else "AUTO"
                stream.codec_context.thread_count = self._threads
                yield container, stream
        except av.error.FFmpegError as error:
            said = error.strerror or str(error)
            if opened:
                raise BadVideo(f"{self.name} cannot be decoded: {said}.") from error
            with io.BytesIO(self._file) if isinstance(self._file, bytes) else open(self._file, "rb") as read:
                start = read.read(16)
            raise BadVideo(
                f"{self.name} is no video that FFmpeg can open: {said}; it starts with {start!r}."
            ) from error

    def _scan(self) -> None:
        """Reads all packets: their number, and their times where these tell the frames."""
        times: list[int] = []
        self._packets, self._keys = 0, dict[int, int]()
        with self._opened() as (container, stream):
            self.codec = stream.codec_context.codec.canonical_name
            told, first = self.codec in _PACKET_IS_FRAME, None
            for packet in container.demux(stream):
                if not packet.size:
                    continue
                self._packets += not packet.is_discard
                if not told:
                    continue
                if first is None:
                    first = packet.pts if packet.is_keyframe else None
                if packet.pts is None or first is None or packet.pts < first or packet.is_corrupt:
                    told = False
                    continue
                if packet.is_keyframe:
                    self._keys[packet.pts] = packet.pts if packet.dts is None else min(packet.pts, packet.dts)
                if not packet.is_discard:  # an edit list leaves it out
                    times.append(packet.pts)
            self._unit = float(stream.time_base or 0)
            self._seconds = (stream.duration or 0) * self._unit or (container.duration or 0) / 1e6
            self._rate = float(stream.average_rate or 0)
        self._times = sorted(times) if told and len(set(times)) == len(times) else []
        self._count = len(self._times) or None

    def _seek_each(self, wanted: Sequence[int]) -> dict[int, np.ndarray] | None:
        """The frames at the sorted places, each from the keyframe before it; None if they are not what packets told."""
        found: dict[int, np.ndarray] = {}
        times, keys = self._times, sorted(self._keys)
        with self._opened() as (container, stream):
            frames, coming = iter(()), -1
            for place in wanted:
                key = keys[bisect.bisect_right(keys, times[place]) - 1]
                begin = bisect.bisect_left(times, key)  # the key itself, unless an edit list leaves it out
                if coming < begin or coming < 0:
                    container.seek(self._keys[key], stream=stream)
                    frames, coming = container.decode(stream), begin
                for frame in frames:
                    if coming == begin and frame.pts is not None and frame.pts < times[begin]:
                        continue  # the seek went further back
                    if frame.pts != times[coming]:
                        return None
                    coming += 1
                    if coming > place:
                        found[place] = self._pixels(frame, place)
                        break
                else:
                    return None
        return found

    def _decode_all(self, choose: Callable[[int], Iterable[int]]) -> dict[int, np.ndarray]:
        """Counts the frames, and keeps those at `choose(T)`; a second pass if there are not as many as packets."""
        guess = self._count or self._packets
        while True:
            wanted = set(choose(guess)) if guess else set()
            found, count = {}, 0
            with self._opened() as (container, stream):
                for frame in container.decode(stream):
                    if count in wanted:
                        found[count] = self._pixels(frame, count)
                    count += 1
            if not count:
                raise BadVideo(f"{self.name} has a video stream ({self.codec}), but no frame in it.")
            self._count = count
            if count == guess:
                return found
            guess = count

    def _pixels(self, frame: Any, place: int) -> np.ndarray:
        if frame.is_corrupt:
            raise BadVideo(f"{self.name} is damaged at frame {place}.")
        pixels = frame.to_ndarray(format="rgb24")
        matrix = frame.side_data.get("DISPLAYMATRIX")
        if matrix is None:
            return pixels
        # x' = a x + c y, y' = b x + d y: of quarter turns and mirrors, one pair is zero.
        a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
        if abs(b) > abs(a):
            pixels, a, d = pixels.swapaxes(0, 1), c, b
        return np.ascontiguousarray(pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])


@dataclasses.dataclass(frozen=True)
class Clip:
    """The evaluation transform of videos: `Clip(model.preprocess)("dog.mp4")` → float32 [1, F, H, W, 3].

    Attributes:
      preprocess: of each frame.
      frames: F, taken at equal distances over the whole video.
      threads: that decode one video.
    """

    preprocess: Preprocess
    frames: int = FRAMES
    threads: int = 1

    def __call__(self, videos: Video | Iterable[Video]) -> Float32[np.ndarray, "B F H W 3"]:
        """Decoded, resized and normalised clips [B, F, H, W, 3], as `CLIP.encode_video` takes them.

        Args:
          videos: one, or a list of: anything `Reader` takes.

        Raises:
          BadVideo: (a ValueError) naming the video that cannot be read.
        """
        rows = [videos] if isinstance(videos, (str, bytes, os.PathLike, np.ndarray)) else list(videos)
        return np.stack([self.preprocess.normalize(self.pixels(video)) for video in rows])

    def pixels(self, video: Video, name: str | None = None) -> UInt8[np.ndarray, "F H W 3"]:
        """One video's frames decoded and resized, before normalisation, uint8."""
        found = sample(video, self.frames, threads=self.threads, name=name)
        return np.stack([self.preprocess.pixels(frame) for frame in found])


def sample(
    video: Video,
    frames: int = FRAMES,
    rng: np.random.Generator | None = None,
    *,
    threads: int = 1,
    name: str | None = None,
) -> list[UInt8[np.ndarray, "H W 3"]]:
    """`frames` frames of a video, in order: uint8 [H, W, 3] each, at the places that `places` gives.

    An augmentation is the same for all frames of a clip if each frame is given a generator made anew from the same
    seed and position.

    Args:
      video, threads, name: see `Reader`.
      frames: F; a video that has fewer repeats some.
      rng: for a random clip; advanced by `frames` numbers.

    Raises:
      BadVideo: naming the video, if it cannot be decoded.
    """
    return Reader(video, threads=threads, name=name).sample(frames, rng)


def places(count: int, frames: int = FRAMES, rng: np.random.Generator | None = None) -> Int64[np.ndarray, "F"]:
    """Which of `count` frames make a clip of `frames`: floor(i (T - 1) / (F - 1)) (PE, appendix B.1.2).

    The first frame and the last are among them. Where F is 1 it is the middle one. They count frames, not seconds,
    also where the rate varies.

    Args:
      count: T, at least 1.
      frames: F, at least 1.
      rng: draw one frame of each of F equal parts instead.
    """
    return _places(count, frames, None if rng is None else rng.random(frames))


def _places(count: int, frames: int, draws: np.ndarray | None) -> np.ndarray:
    if count < 1 or frames < 1:
        raise ValueError(f"cannot choose frames={frames} of {count}; both must be at least 1.")
    steps = np.arange(frames, dtype=np.int64)
    if draws is not None:
        return np.minimum(((steps + draws) * count / frames).astype(np.int64), count - 1)
    return steps * (count - 1) // (frames - 1) if frames > 1 else steps + (count - 1) // 2


def _name(video: Video) -> str:
    if isinstance(video, bytes):
        return f"video of {len(video)} bytes"
    if isinstance(video, np.ndarray):
        return "video array"
    if isinstance(video, (str, os.PathLike)):
        return os.fspath(video)
    raise BadVideo(f"video is {type(video).__name__}; wanted a path, bytes, a folder of images or uint8 frames.")


def _announced(file: io.BufferedIOBase, size: int) -> int | None:
    """How many bytes, at least, the file should have by its own account; None where its format does not say."""

    def at(place: int, count: int) -> bytes:
        file.seek(place)
        return file.read(count)

    head = at(0, 12)
    if head[:4] == b"RIFF":
        length = int.from_bytes(head[4:8], "little")
        return None if length in (0, 0xFFFFFFFF) else 8 + length
    if head[:4] == b"\x1aE\xdf\xa3":  # Matroska and WebM: a header, then the segment, which is all the rest
        length, width = _matroska_size(at(4, 8))
        segment = 4 + width + (length or 0)
        if at(segment, 4) != b"\x18S\x80g":
            return None
        length, width = _matroska_size(at(segment + 4, 8))
        return None if length is None else segment + 4 + width + length
    place, kinds = 0, set()
    while place + 8 <= size:  # MP4 and QuickTime: boxes, one after the other
        box = at(place, 16)
        length = int.from_bytes(box[:4], "big")
        kinds.add(kind := box[4:8].decode("latin-1"))
        if kind not in _BOXES or not length:  # 0: up to the end
            return None
        length = int.from_bytes(box[8:16], "big") if length == 1 else length
        if length < 8:
            return None
        place += length
    # A head begun, or no index yet: at least another head is missing.
    return None if not kinds else place + 8 if place < size or "moov" not in kinds else place


def _matroska_size(data: bytes) -> tuple[int | None, int]:
    """A number whose first byte tells its width in bytes, and that width; all ones mean "unknown"."""
    width = 9 - data[0].bit_length() if data and data[0] else 8
    value = int.from_bytes(data[:width], "big") & ((1 << 7 * width) - 1)
    return (None if value == (1 << 7 * width) - 1 else value), width
