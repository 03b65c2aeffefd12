"""Frames of videos: the right ones, whatever the file says and however it is stored."""

import io
import json
import os
import pathlib
import pickle

import av
import numpy as np
import PIL.Image
import pytest

from pe_jax.data import video
from pe_jax.data.image import Preprocess
from pe_jax.data.video import BadVideo, Clip, Reader, places, sample
from tests.data import films

CHOSEN = [0, 6, 13, 19, 26, 32, 39, 46]  # floor(46 i / 7)
SWIFT = {"deadline": "realtime", "cpu-used": "8"}
X264 = {"x264-params": "scenecut=0:keyint=12:bframes=2"}
FORMS = {  # container, codec, options, pixels
    "mp4, B-frames": ("mp4", "libx264", X264, "yuv420p"),
    "mp4, keyframes alone": ("mp4", "libx264", {"x264-params": "keyint=1"}, "yuv420p"),
    "mp4, pairs of frames": ("mp4", "libx264", {"x264-params": "keyint=2:bframes=1"}, "yuv420p"),
    "mkv, open groups": ("matroska", "libx264", {"x264-params": "open-gop=1:bframes=3:keyint=12"}, "yuv420p"),
    "ts": ("mpegts", "libx264", X264, "yuv420p"),
    "hevc, open groups": (
        "mp4",
        "libx265",
        {"x265-params": "log-level=none:open-gop=1:bframes=4:keyint=12"},
        "yuv420p",
    ),
    "webm": ("webm", "libvpx-vp9", SWIFT, "yuv420p"),
    "avi, no times": ("avi", "libx264", X264, "yuv420p"),
    "avi": ("avi", "mpeg4", {}, "yuv420p"),
    "webm, old codec": ("webm", "libvpx", SWIFT, "yuv420p"),
    "mp4, old codec": ("mp4", "mpeg4", {}, "yuv420p"),
    "mkv, lossless": ("matroska", "ffv1", {}, "bgr0"),
}
TOLD = {"mp4, B-frames", "mp4, keyframes alone", "mkv, open groups", "hevc, open groups", "webm"}


@pytest.fixture(scope="module")
def made():
    """Each form, written when it is first asked for."""
    kept = {}

    def make(name):
        if name not in kept:
            container, codec, options, pixels = FORMS[name]
            kept[name] = films.film(container, codec, options=options, pixels=pixels)
        return kept[name]

    return make


@pytest.fixture(scope="module")
def plain(made):
    return made("mp4, B-frames")


@pytest.mark.parametrize("name", FORMS)
def test_frames_are_those_of_a_whole_decode_and_show_the_numbers_they_have(made, name):
    data = made(name)
    whole = films.whole(data)
    assert [films.number(frame) for frame in whole] == list(range(47))
    assert len(Reader(data)) == 47
    for chosen in (CHOSEN, [46], [0], [12, 11, 24, 23, 12], range(47)):
        found = Reader(data).read(chosen)
        assert [films.number(frame) for frame in found] == list(chosen)
        assert all(np.array_equal(frame, whole[i]) for frame, i in zip(found, chosen, strict=True))
    assert [films.number(frame) for frame in sample(data)] == CHOSEN


@pytest.mark.parametrize("name", sorted(TOLD))
def test_a_file_whose_packets_tell_its_frames_is_not_decoded_whole(made, name, monkeypatch):
    monkeypatch.setattr(Reader, "_decode_all", None)
    reader = Reader(made(name))
    assert len(reader) == 47 and [films.number(frame) for frame in reader.sample()] == CHOSEN
    assert reader.fps == pytest.approx(25)


@pytest.mark.parametrize("container", ["mp4", "matroska", "mpegts"])
def test_at_a_varying_rate_frames_are_counted_and_not_timed(container):
    times = np.cumsum(np.random.default_rng(0).integers(10, 400, 47)).tolist()
    data = films.film(container, times=times, options=X264)
    reader = Reader(data)
    assert [films.number(frame) for frame in reader.sample()] == CHOSEN
    assert reader.fps == pytest.approx(46_000 / (times[-1] - times[0]), rel=1e-3)


def test_a_wrong_number_of_frames_in_the_header_is_not_believed(made):
    data = made("avi")
    with av.open(io.BytesIO(data)) as container:
        assert container.streams.video[0].frames != 47
    assert len(Reader(data)) == 47 and Reader(data).fps == pytest.approx(25)


@pytest.mark.parametrize("second", [20, 24])  # 24 is a keyframe
def test_two_frames_of_one_time_are_two_frames(tmp_path, second):
    def change(i, packet):
        packet.dts = packet.pts - 100
        packet.pts -= 40 * (i == second)
        return packet

    once = films.film("matroska", options={"x264-params": "scenecut=0:keyint=12:bframes=0"})
    data = films.packets(once, "matroska", change, tmp_path / "a.mkv")
    with av.open(io.BytesIO(data)) as container:
        times = [packet.pts for packet in container.demux(video=0) if packet.size]
    assert len(set(times)) == 46
    assert len(Reader(data)) == 47 and [films.number(frame) for frame in sample(data)] == CHOSEN
    for i in range(second - 2, second + 3):
        assert films.number(Reader(data).read([i])[0]) == i


def test_frames_that_an_edit_list_leaves_out_do_not_count(plain, tmp_path):
    """As in a clip cut without encoding it again: frames 0 to 4 are there because the others refer to them."""

    def change(i, packet):
        step = round(1 / 25 / packet.time_base)
        packet.pts, packet.dts = packet.pts - 5 * step, packet.dts - 5 * step
        return packet

    data = films.packets(plain, "mp4", change, tmp_path / "a.mp4", {"avoid_negative_ts": "disabled"})
    with av.open(io.BytesIO(data)) as container:
        assert sum(packet.is_discard for packet in container.demux(video=0)) == 5
    assert [films.number(frame) for frame in films.whole(data)] == list(range(5, 47))
    reader = Reader(data)
    assert len(reader) == 42 and [films.number(frame) for frame in reader.read(range(42))] == list(range(5, 47))
    assert films.number(Reader(data).read([2])[0]) == 7
    assert reader._times  # found by their times, without decoding the whole


@pytest.mark.parametrize("container", ["mp4", "mpegts"])
def test_a_stream_that_begins_in_the_middle_has_the_frames_that_can_be_decoded(plain, tmp_path, container):
    """As a clip cut without encoding it again: the first packets lack the keyframe they refer to."""
    data = films.packets(plain, container, lambda i, packet: packet if i >= 5 else None, tmp_path / "a")
    shown = [films.number(frame) for frame in films.whole(data)]
    assert 35 == len(shown) < 42 and shown[0] == 12
    assert len(Reader(data)) == 35
    assert [films.number(frame) for frame in sample(data)] == [shown[i] for i in places(35)]


def test_keyframes_that_are_none_are_noticed_and_the_whole_is_decoded():
    options = {"x265-params": "log-level=none:open-gop=0:bframes=0:keyint=12"}
    data = films.film("mp4", "libx265", options=options).replace(b"stss", b"free")  # without their list, each is one
    reader = Reader(data)
    assert reader._times and len(reader._keys) == 47
    assert [films.number(frame) for frame in reader.sample()] == CHOSEN
    assert not reader._times
    for i in (6, 13):  # of which FFmpeg gives the next keyframe
        assert films.number(Reader(data).read([i])[0]) == i


@pytest.mark.parametrize(("count", "chosen"), [(1, [0] * 8), (3, [0, 0, 0, 0, 1, 1, 1, 2]), (8, list(range(8)))])
def test_a_short_video_repeats_frames(count, chosen):
    assert [films.number(frame) for frame in sample(films.film(count=count))] == chosen


@pytest.mark.parametrize(
    ("matrix", "upright"),
    [
        ((1, 0, 0, 1), lambda x: x),
        ((0, 1, -1, 0), lambda x: np.rot90(x, -1)),  # a quarter clockwise, as telephones write it
        ((-1, 0, 0, -1), lambda x: np.rot90(x, 2)),
        ((0, -1, 1, 0), lambda x: np.rot90(x, 1)),
        ((-1, 0, 0, 1), lambda x: x[:, ::-1]),
        ((1, 0, 0, -1), lambda x: x[::-1]),
        ((0, 1, 1, 0), lambda x: x.swapaxes(0, 1)),
    ],
)
def test_frames_are_turned_as_a_player_shows_them(plain, matrix, upright):
    stored = films.whole(plain)
    for frame, i in zip(sample(films.turned(plain, matrix)), CHOSEN, strict=True):
        np.testing.assert_array_equal(frame, upright(stored[i]))


@pytest.mark.parametrize(
    ("container", "codec", "pixels"), [("matroska", "ffv1", "bgr0"), ("mp4", "libx264", "yuv444p")]
)
def test_odd_sizes_keep_every_row_and_column(container, codec, pixels):
    noise = np.random.default_rng(0).integers(0, 256, (47, 49, 67, 3)).astype(np.uint8)
    options = {"qp": "0"} if codec == "libx264" else {}
    data = films.film(container, codec, size=(67, 49), options=options, pixels=pixels, draw=lambda i, size: noise[i])
    for frame, i in zip(sample(data), CHOSEN, strict=True):
        assert frame.shape == (49, 67, 3)
        assert np.abs(frame.astype(int) - noise[i]).max() <= (0 if codec == "ffv1" else 5)  # of the colour space


def test_threads_give_the_same_frames(made):
    for name in ("mp4, B-frames", "avi"):
        one, three = sample(made(name)), sample(made(name), threads=3)
        assert all(np.array_equal(a, b) for a, b in zip(one, three, strict=True))


def test_a_path_and_bytes_are_the_same_video_and_a_name_is_no_address(plain, tmp_path):
    (tmp_path / "concat:a|b.mp4").write_bytes(plain)  # which FFmpeg would take for a protocol of its own
    for given in (tmp_path / "concat:a|b.mp4", str(tmp_path / "concat:a|b.mp4")):
        assert all(np.array_equal(a, b) for a, b in zip(sample(given), sample(plain), strict=True))


def test_a_folder_of_images_and_an_array_are_videos_too(tmp_path):
    pictures = [films.picture(i) for i in range(47)]
    for i, picture in enumerate(pictures):
        PIL.Image.fromarray(picture).save(tmp_path / f"{i:05}.png")
    (tmp_path / "notes.txt").write_text("no frame")
    for given in (tmp_path, np.stack(pictures)):
        reader = Reader(given)
        assert len(reader) == 47 and reader.fps == 0
        assert [films.number(frame) for frame in reader.sample()] == CHOSEN
        assert all(np.array_equal(a, pictures[i]) for a, i in zip(reader.read([3, 1]), [3, 1], strict=True))
    (tmp_path / "00013.png").write_bytes(b"none")
    with pytest.raises(BadVideo, match=r"frame 13: .*00013.png is in no image format"):
        sample(tmp_path)


# ---- places


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 15, 250, 10**9 + 7])
@pytest.mark.parametrize("frames", [2, 8, 32])
def test_places_are_the_formula_in_whole_numbers(count, frames):
    found = places(count, frames)
    assert found.tolist() == [i * (count - 1) // (frames - 1) for i in range(frames)]
    assert found[0] == 0 and found[-1] == count - 1


def test_one_frame_alone_is_the_middle_one():
    assert [places(count, 1).tolist() for count in (1, 4, 5)] == [[0], [1], [2]]


def test_random_places_are_one_of_each_equal_part_and_all_are_reached():
    rng = np.random.default_rng(0)
    drawn = np.stack([places(40, 8, rng) for _ in range(200)])
    assert (drawn // 5 == np.arange(8)).all()
    assert {tuple(np.unique(drawn[:, i])) for i in range(8)} == {tuple(range(5 * i, 5 * i + 5)) for i in range(8)}
    few = places(3, 8, rng).tolist()
    assert few == sorted(few) and set(few) == {0, 1, 2}


def test_a_seed_gives_the_same_random_clip_however_it_is_stored(made):
    drawn = places(47, 8, np.random.default_rng(5)).tolist()
    assert drawn != CHOSEN
    for name in ("mp4, B-frames", "avi"):
        clip = sample(made(name), 8, np.random.default_rng(5))
        assert [films.number(frame) for frame in clip] == drawn


# ---- what is wrong


@pytest.mark.parametrize(
    "name", ["mp4, B-frames", "mkv, open groups", "webm", "avi", "mp4, index first", "mp4, fragments"]
)
@pytest.mark.parametrize("share", [0.2, 0.6, 0.95])
def test_a_file_that_is_cut_short_says_so(made, plain, tmp_path, name, share):
    if name in FORMS:
        data = made(name)
    else:
        flags = "faststart" if name == "mp4, index first" else "frag_keyframe+empty_moov"
        data = films.packets(plain, "mp4", lambda i, packet: packet, tmp_path / "a", {"movflags": flags})
    assert len(Reader(data)) == 47
    path = tmp_path / "short"
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(
        BadVideo, match=rf"{path} is cut short: it has {int(len(data) * share)} bytes of at least \d+\."
    ):
        sample(path)


def test_bytes_after_the_end_do_no_harm(plain):
    assert [films.number(frame) for frame in sample(plain + bytes(100))] == CHOSEN


def test_a_damaged_file_is_named(plain, tmp_path):
    path = tmp_path / "a.mp4"
    start = plain.index(b"mdat") + 900
    path.write_bytes(plain[:start] + bytes(200) + plain[start + 200 :])
    with pytest.raises(BadVideo, match=rf"{path} (cannot be decoded|is damaged at frame \d+)"):
        sample(path)


def test_a_frame_that_ffmpeg_mends_as_well_as_it_can_is_an_error(made):
    whole, mended = made("mkv, open groups"), None
    for start in range(len(whole) // 4, len(whole) - 60, 40):
        data = whole[:start] + bytes(60) + whole[start + 60 :]
        try:
            with av.open(io.BytesIO(data)) as container:
                mended = next((i for i, f in enumerate(container.decode(video=0)) if f.is_corrupt), None)
        except av.FFmpegError:
            continue
        if mended is not None:
            break
    assert mended is not None
    with pytest.raises(BadVideo, match=rf"video of {len(data)} bytes is damaged at frame {mended}\."):
        Reader(data).read([mended])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "x.mp4 is empty"),
        (b"<html>404</html>" * 99, r"x.mp4 is no video that FFmpeg can open: Invalid data .* b'<html>404</html>'"),
        (films.sound(), "x.mp4 has no video stream; it has audio"),
    ],
)
def test_a_file_that_is_no_video_says_what_it_is(tmp_path, data, message):
    (tmp_path / "x.mp4").write_bytes(data)
    with pytest.raises(BadVideo, match=message):
        sample(tmp_path / "x.mp4")
    if data:
        with pytest.raises(BadVideo, match="shard 3 sample 5"):
            sample(data, name="shard 3 sample 5")


def test_a_stream_without_a_frame_says_so(made, tmp_path):
    data = films.packets(made("avi"), "avi", lambda i, packet: None, tmp_path / "a.avi")
    with pytest.raises(BadVideo, match=r"has a video stream \(mpeg4\), but no frame in it"):
        len(Reader(data))


def test_what_cannot_be_is_refused(plain, tmp_path):
    for given, message in (
        (tmp_path / "none.mp4", "none.mp4 does not exist"),
        (tmp_path, "folder without frames"),
        (np.zeros((3, 4, 5, 3), np.float32), r"float32 \[3, 4, 5, 3\]; wanted uint8"),
        (np.zeros((0, 4, 5, 3), np.uint8), "wanted uint8"),
    ):
        with pytest.raises(BadVideo, match=message):
            sample(given)
    with pytest.raises(IndexError, match="has the frames 0 to 46; got 47"):
        Reader(plain).read([3, 47])
    with pytest.raises(IndexError, match="got -1"):
        Reader(plain).read([-1])
    with pytest.raises(ValueError, match="threads=0"):
        Reader(plain, threads=0)
    with pytest.raises(ValueError, match="frames=0"):
        sample(plain, 0)


def test_without_pyav_it_says_what_to_install(plain, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'pe-jax\[video\]'"):
        sample(plain)


# ---- clips


def test_a_clip_is_the_models_transform_of_every_frame(plain, tmp_path):
    preprocess = Preprocess((10, 14), mode="crop", mean=(0.1, 0.2, 0.3))
    (tmp_path / "a.mp4").write_bytes(plain)
    clip = Clip(preprocess, frames=5)
    found = clip([tmp_path / "a.mp4", films.film(count=2)])
    assert found.shape == (2, 5, 10, 14, 3) and found.dtype == np.float32
    np.testing.assert_array_equal(found[0], preprocess(sample(plain, 5)))
    assert clip(str(tmp_path / "a.mp4")).shape == (1, 5, 10, 14, 3)
    assert clip.pixels(plain).dtype == np.uint8
    assert pickle.loads(pickle.dumps(clip)) == clip


def test_the_sample_videos_equal_their_whole_decode():
    root = pathlib.Path(__file__).parents[2]
    data = pathlib.Path(os.environ.get("PE_JAX_DATA", root.parent / "shared" / "data")) / "videos"
    if not (data / "captions.jsonl").exists():
        pytest.skip(f"{data} holds no sample videos; set PE_JAX_DATA to the folder whose `videos` does.")
    said = [json.loads(line) for line in (data / "captions.jsonl").read_text().splitlines()]
    small = [row for row in said if row["width"] <= 320]
    assert {row["codec"] for row in small} == {"h264", "mpeg4"}
    for row in small[::3] + [row for row in small if row["codec"] == "mpeg4"]:
        path = str(data / row["file"])
        whole = films.whole(path)
        reader = Reader(path)
        assert len(reader) == len(whole) == row["frames"]
        assert reader.fps == pytest.approx(row["fps"], rel=1e-3)
        wanted = [i * (len(whole) - 1) // 7 for i in range(8)]
        assert all(np.array_equal(a, whole[i]) for a, i in zip(reader.sample(), wanted, strict=True))


def test_only_files_with_a_videos_ending_are_taken_for_videos():
    assert "mp4" in video.ENDINGS and "webm" in video.ENDINGS and "gif" not in video.ENDINGS
