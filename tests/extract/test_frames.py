"""Every frame asked for is the frame that comes: its number is drawn in its pixels."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import itertools
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction
from importlib.abc import MetaPathFinder
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
from av.stream import Disposition

from coldframe.data_manifests.errors import ColdframeError
from coldframe.extract import frames as frames_file
from coldframe.extract.crops import resize_and_crop
from coldframe.extract.decoders import by_decord, contract
from coldframe.extract.decoders.source import inspect
from coldframe.extract.frames import Crops, DecodeError, DecodeOptions, decode, write_video
from coldframe.extract.sampling import sample, segment_centres
from coldframe.extract.specs import FrameSpec, TransformSpec

N = 90  # frames of a toy video
ZEROS, ONES = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
SQUASH = TransformSpec(96, ZEROS, ONES, "bilinear", "squash")


def read(path: Path, frames: FrameSpec, transform: TransformSpec = SQUASH, view: int = 0, **rest: Any) -> Any:
    """One view of a video: pixels [T, 3, S, S], and what `decode` says of it."""
    sink = Crops()
    video = decode(path, frames, transform, sink, **rest)
    assert len(sink) == video.rows.max() + 1
    of_view = {name: getattr(video, name)[view] for name in ("rows", "timestamps_s", "indices", "n_repeated")}
    names = ("n_source_frames", "decoder", "content_sha256", "source_bytes", "kept")
    same = {name: getattr(video, name) for name in names}
    return SimpleNamespace(pixels=np.stack(sink)[of_view["rows"]], **of_view, **same)


def numbers(video: Any) -> list[int]:
    """What is drawn in the pictures."""
    return [read_number(crop) for crop in video.pixels]


def numbered(number: int, width: int = 96, height: int = 64) -> np.ndarray:
    """A picture whose 4 × 3 black or white blocks spell `number`."""
    bits = np.array([number >> bit & 1 for bit in range(12)]).reshape(3, 4)
    rows, columns = np.arange(height) * 3 // height, np.arange(width) * 4 // width
    return np.repeat(bits[rows][:, columns, None] * 215 + 20, 3, axis=2).astype(np.uint8)


def read_number(crop: np.ndarray) -> int:
    side = crop.shape[-1]
    bits = [
        crop[:, (2 * row + 1) * side // 6, (2 * column + 1) * side // 8].mean() > 128
        for row in range(3)
        for column in range(4)
    ]
    return sum(bit << place for place, bit in enumerate(bits))


def make(path: Path, codec: str, options: dict[str, str], *, pix_fmt: str = "yuv420p", size: tuple[int, int] = (96, 64),
         n: int = N, ticks: list[int] | None = None, rotation: int = 0) -> None:  # fmt: skip
    """Write numbered frames; `ticks` are the times of the frames in milliseconds."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=25, options=options)
        stream.pix_fmt, stream.thread_count = pix_fmt, 1
        if rotation:
            stream.set_display_rotation(rotation)
        if ticks:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number in range(n):
            picture = np.rot90(numbered(number, *size), -rotation // 90)
            if number == 0:
                stream.height, stream.width = picture.shape[:2]
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            if ticks:
                frame.pts, frame.time_base = ticks[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


TICKS = list(itertools.accumulate(np.random.default_rng(0).integers(10, 90, N - 1).tolist(), initial=0))
SHORT_GOP = {"x264-params": "keyint=12:min-keyint=1:bframes=3:log-level=none"}
KINDS: dict[str, dict[str, Any]] = {
    # name: what `make` is given; `exact` says whether decord may be trusted
    "b_frames_long_gop.mp4": {"codec": "libx264", "options": {"g": "250", "bf": "3"}, "exact": True},
    "b_frames_short_gop.mp4": {"codec": "libx264", "options": SHORT_GOP, "exact": True},
    "b_frames.mkv": {"codec": "libx264", "options": SHORT_GOP, "exact": True},
    "b_frames.mov": {"codec": "libx264", "options": SHORT_GOP, "exact": True},
    "variable_rate.mp4": {"codec": "libx264", "options": SHORT_GOP, "ticks": TICKS, "exact": True},
    "single.mp4": {"codec": "libx264", "options": {}, "n": 1, "exact": True},
    "turned_90.mp4": {"codec": "libx264", "options": {}, "rotation": 90, "exact": True},
    "turned_180.mp4": {"codec": "libx264", "options": {}, "rotation": 180, "exact": True},
    "turned_270.mov": {"codec": "libx264", "options": {}, "rotation": 270, "exact": True},
    "full_range.mp4": {"codec": "libx264", "options": SHORT_GOP, "pix_fmt": "yuvj420p", "exact": True},
    "open_gop.mp4": {"codec": "libx264", "options": {"x264-params": "keyint=12:open-gop=1:bframes=3:log-level=none"}},
    "intra_refresh.mp4": {"codec": "libx264", "options": {"x264-params": "keyint=30:intra-refresh=1:bframes=0"}},
    "odd.mp4": {"codec": "libx264", "options": {}, "pix_fmt": "yuv444p", "size": (65, 49)},
    "odd.webm": {"codec": "libvpx-vp9", "options": {"cpu-used": "8", "deadline": "realtime"}, "size": (65, 49)},
    "vp8.webm": {"codec": "libvpx", "options": {"g": "20", "cpu-used": "8", "auto-alt-ref": "1"}},
    "ten_bits.mp4": {"codec": "libx264", "options": SHORT_GOP, "pix_fmt": "yuv420p10le"},
    "mpeg4.avi": {"codec": "mpeg4", "options": {"g": "12", "bf": "2", "b": "1M"}},
    "b_frames.avi": {"codec": "libx264", "options": SHORT_GOP},
    "mpeg4.mp4": {"codec": "mpeg4", "options": {"g": "12", "bf": "2", "b": "1M"}},
    "broadcast.ts": {"codec": "libx264", "options": SHORT_GOP},
    "mpeg2.mpg": {"codec": "mpeg2video", "options": {"g": "12", "bf": "2"}},
    "open_gop_hevc.mp4": {"codec": "libx265", "options": {"x265-params": "keyint=12:bframes=3:pools=1:log-level=none"}},
    "av1.mp4": {"codec": "libsvtav1", "options": {"preset": "13", "svtav1-params": "lp=1:keyint=24"}},
    "animation.gif": {"codec": "gif", "options": {}, "pix_fmt": "gray"},
}  # fmt: skip


# What torchcodec can seek in besides: it keeps every packet's time, and decodes open GOPs but those of H.264.
SOUGHT = {"odd.mp4", "odd.webm", "vp8.webm", "ten_bits.mp4", "mpeg4.mp4", "open_gop_hevc.mp4", "av1.mp4"}


def torchcodec_lacks() -> str:
    """Why torchcodec cannot be tested here; empty where it can."""
    try:
        importlib.import_module("torchcodec.decoders").VideoDecoder(b"no video")
    except ImportError as error:
        return str(error)
    except (OSError, RuntimeError, ValueError) as error:
        return str(error).strip().partition("\n")[0] if "Could not load" in str(error) else ""
    return ""


LACKS = torchcodec_lacks()
TORCHCODEC = pytest.param("torchcodec", marks=pytest.mark.skipif(bool(LACKS), reason=f"NO TORCHCODEC: {LACKS}"))
DECODERS = ["auto", "decord", "pyav", TORCHCODEC]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for name, how in KINDS.items():
        make(folder / name, **{key: value for key, value in how.items() if key != "exact"})
    return folder


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("name", KINDS)
def test_frames_are_those_asked_for(videos: Path, name: str, decoder: str) -> None:
    n_source, is_exact = KINDS[name].get("n", N), KINDS[name].get("exact", False)
    if decoder in ("decord", "torchcodec") and not (is_exact or (decoder == "torchcodec" and name in SOUGHT)):
        with pytest.raises(DecodeError, match=f"{decoder} is not exact"):
            read(videos / name, FrameSpec(8, decoder=decoder), SQUASH)
        return
    for n_frames in (1, 3, 8, 25):
        video = read(videos / name, FrameSpec(n_frames, decoder=decoder), SQUASH)
        assert [read_number(crop) for crop in video.pixels] == segment_centres(n_source, n_frames).tolist()
        assert video.indices.tolist() == segment_centres(n_source, n_frames).tolist()
        assert video.n_source_frames == n_source
        assert video.n_repeated == max(0, n_frames - n_source)
        times = np.array(TICKS) / 1000 if "ticks" in KINDS[name] else np.arange(n_source) / 25
        np.testing.assert_allclose(video.timestamps_s, times[video.indices], atol=1.1e-3)  # mkv counts milliseconds
        if decoder == "auto":
            assert video.decoder == ("decord" if is_exact else "pyav")
        else:
            assert video.decoder == decoder


SAMPLINGS = {
    "uniform": FrameSpec(8),
    "random": FrameSpec(8, "random", seed=3, draws=3),
    "dense": FrameSpec(5, "dense", stride=4, clips=4),
    "fps": FrameSpec(None, "fps", rate_fps=7.0),
    "all": FrameSpec(None, "all"),
    "crops": FrameSpec(3, "random", seed=3, draws=2, crops="random", flip=True),
}


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize(("start_s", "end_s"), [(None, None), (0.8, 2.1), (None, 0.05)])
def test_every_sampling_of_every_part(
    videos: Path, sampling: str, decoder: str, start_s: float | None, end_s: float | None
) -> None:
    spec = dataclasses.replace(SAMPLINGS[sampling], decoder=decoder)
    for name in (
        "b_frames_long_gop.mp4",
        "variable_rate.mp4",
        "turned_90.mp4",
        "mpeg4.avi",
        "odd.webm",
        "open_gop_hevc.mp4",
        "av1.mp4",
    ):
        if decoder == "decord" and not KINDS[name].get("exact"):
            continue
        if decoder == "torchcodec" and name not in SOUGHT and not KINDS[name].get("exact"):
            continue
        times = np.array(TICKS) / 1000 if "ticks" in KINDS[name] else np.arange(N) / 25
        inside = np.flatnonzero((times >= (start_s or 0) - 1e-4) & (times < (end_s or np.inf) - 1e-4))
        wanted = inside[sample(times[inside], spec, key="v").frames]
        sink = Crops()
        video = decode(videos / name, spec, SQUASH, sink, key="v", start_s=start_s, end_s=end_s)
        assert video.views == tuple(range(spec.n_views))
        np.testing.assert_array_equal(video.indices, wanted)
        np.testing.assert_allclose(video.timestamps_s, times[wanted], atol=1.1e-3)
        assert len(sink) == len({*zip(video.rows.ravel().tolist(), strict=True)}) == video.rows.max() + 1
        if spec.crops is None:
            np.testing.assert_array_equal(np.array([read_number(crop) for crop in sink])[video.rows], wanted)


@pytest.mark.parametrize("decoder", DECODERS)
def test_only_the_views_asked_for(videos: Path, decoder: str) -> None:
    spec = FrameSpec(4, "random", seed=1, draws=5, decoder=decoder)
    path = videos / "b_frames.mkv"
    every = decode(path, spec, SQUASH, Crops(), key="v")
    sink = Crops()
    some = decode(path, spec, SQUASH, sink, key="v", views=[1, 4])
    assert some.views == (1, 4)
    np.testing.assert_array_equal(some.indices, every.indices[[1, 4]])
    np.testing.assert_array_equal(np.array([read_number(crop) for crop in sink])[some.rows], some.indices)


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_part_without_frames_and_a_view_too_long_are_refused(videos: Path, decoder: str) -> None:
    with pytest.raises(DecodeError, match=r"no frames in the segment: 900.0 to None s, but the last is at 3.56 s"):
        read(videos / "b_frames.mkv", FrameSpec(4, decoder=decoder), start_s=900.0)
    with pytest.raises(DecodeError, match="too long: 90 frames, at most 89 are taken"):
        read(videos / "b_frames.mkv", FrameSpec(None, "all", decoder=decoder), options=DecodeOptions(max_frames=89))


def test_pixels_are_contiguous_bytes_and_the_file_is_known_by_its_hash(videos: Path) -> None:
    video = read(videos / "b_frames.mkv", FrameSpec(3), SQUASH)
    assert video.pixels.shape == (3, 3, 96, 96)
    assert video.pixels.dtype == np.uint8
    assert video.pixels.flags.c_contiguous
    assert video.content_sha256 == hashlib.sha256((videos / "b_frames.mkv").read_bytes()).hexdigest()


def test_both_decoders_give_the_same_bits(videos: Path) -> None:
    for name in (name for name, how in KINDS.items() if how.get("exact")):
        ours = [read(videos / name, FrameSpec(5, decoder=decoder), SQUASH).pixels for decoder in ("decord", "pyav")]
        np.testing.assert_array_equal(*ours, err_msg=name)


def test_decord_reads_large_videos_in_batches(videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contract, "_BATCH_BYTES", 3 * 3 * 96 * 64)  # three pictures
    video = read(videos / "b_frames_short_gop.mp4", FrameSpec(25, decoder="decord"), SQUASH)
    assert [read_number(crop) for crop in video.pixels] == segment_centres(N, 25).tolist()


def test_auto_turns_to_pyav_where_decord_refuses_or_repeats_a_picture(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_video(tmp_path / "still.mp4", [numbered(5)] * 20, fps=10)
    assert read(tmp_path / "still.mp4", FrameSpec(4), SQUASH).decoder == "pyav"
    assert read(tmp_path / "still.mp4", FrameSpec(4, decoder="decord"), SQUASH).decoder == "decord"

    def refuse(*_: object) -> None:
        raise by_decord.NotByDecord("decord miscounts")

    monkeypatch.setattr(by_decord, "_trust", refuse)
    assert read(videos / "b_frames.mkv", FrameSpec(4), SQUASH).decoder == "pyav"
    with pytest.raises(DecodeError, match="miscounts"):
        read(videos / "b_frames.mkv", FrameSpec(4, decoder="decord"), SQUASH)


def test_damage_is_heard_where_the_standard_error_is_closed(sound: Path, tmp_path: Path) -> None:
    begin, size = packets(sound / "h264.mp4")[27]
    noise = np.random.default_rng(0).bytes(size // 2)
    path = overwrite(sound / "h264.mp4", tmp_path / "damaged.mp4", (begin + size // 3, noise))
    code = (
        "import os, sys; from coldframe.extract.frames import *; from coldframe.extract.specs import *; os.close(2)\n"
        "for path in sys.argv[1:]:\n"
        "    try: print(decode(path, FrameSpec(8, decoder='decord'), TransformSpec(32, (0,)*3, (1,)*3), Crops()).decoder)\n"
        "    except DecodeError as error: print(error.reason)"
    )
    command = [sys.executable, "-c", code, str(sound / "h264.mp4"), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("decord\ncorrupt: [h264] ")


def test_decord2_is_refused(videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read(videos / "b_frames.mkv", FrameSpec(2)).decoder == "decord"
    monkeypatch.setattr(by_decord, "version", lambda name: {"decord": "0.6.0", "decord2": "2.0.0"}[name])
    assert read(videos / "b_frames.mkv", FrameSpec(2)).decoder == "pyav"
    with pytest.raises(DecodeError, match=r"^decord2 does not tell of damage: install decord in its place, or use "):
        read(videos / "b_frames.mkv", FrameSpec(2, decoder="decord"))


def test_pyav_recounts_where_packets_promise_other_frames_than_come(
    videos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = inspect(str(videos / "b_frames.avi"))
    promised = dataclasses.replace(source, timestamps_s=np.arange(N + 3) / 25)
    monkeypatch.setattr(frames_file, "inspect", lambda _: promised)
    video = read(videos / "b_frames.avi", FrameSpec(8, decoder="pyav"), SQUASH)
    assert [read_number(crop) for crop in video.pixels] == segment_centres(N, 8).tolist()
    assert video.n_source_frames == N


def test_pyav_never_holds_the_full_size_video(tmp_path: Path) -> None:
    write_video(tmp_path / "big.mp4", (numbered(i, 640, 480) for i in range(40)), fps=25)
    tracemalloc.start()
    read(tmp_path / "big.mp4", FrameSpec(32, decoder="pyav"), SQUASH)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 32 * 3 * 96 * 96 * 3 + 5 * 3 * 640 * 480


# ------------------------------------------------------------------------------------------------- what is no video


def cut(path: Path, share: float, target: Path) -> Path:
    data = path.read_bytes()
    target.write_bytes(data[: int(len(data) * share)])
    return target


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that are no whole video, by what is wrong with them."""
    folder = tmp_path_factory.mktemp("broken")
    rng = np.random.default_rng(0)
    noisy = [rng.integers(0, 255, (64, 96, 3), dtype=np.uint8) for _ in range(60)]
    (folder / "folder").mkdir()
    (folder / "empty.mp4").touch()
    (folder / "text.txt").write_text("this is no video\n" * 50)
    (folder / "text.mp4").write_text("this is no video\n" * 50)
    (folder / "noise.mp4").write_bytes(rng.bytes(50_000))
    write_video(folder / "whole.mp4", noisy, fps=25)
    write_video(folder / "whole.mkv", noisy, fps=25)
    write_video(folder / "whole.avi", noisy, fps=25, codec="mpeg4")
    with av.open(str(folder / "index_first.mp4"), "w", options={"movflags": "faststart"}) as container:
        stream: Any = container.add_stream("libx264", rate=25, options={"g": "10"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for picture in noisy:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    for share, whole in ((0.6, "whole.mp4"), (0.6, "whole.mkv"), (0.6, "whole.avi"), (0.6, "index_first.mp4")):
        cut(folder / whole, share, folder / f"cut_{whole}")
    data = bytearray((folder / "index_first.mp4").read_bytes())
    data[len(data) // 2 : len(data) * 2 // 3] = bytes(len(data) * 2 // 3 - len(data) // 2)
    (folder / "hole.mp4").write_bytes(data)
    for name in ("sound.mp3", "sound_with_cover.mp3"):
        with av.open(str(folder / name), "w") as container:
            sound: Any = container.add_stream("mp3", rate=16000)
            if "cover" in name:
                cover: Any = container.add_stream("png", rate=1)
                cover.width, cover.height, cover.pix_fmt, cover.disposition = 96, 64, "rgb24", Disposition.attached_pic
                container.mux(cover.encode(av.VideoFrame.from_ndarray(numbered(1), format="rgb24")))
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
            silence.rate = 16000
            container.mux(sound.encode(silence))
            container.mux(sound.encode())
    return folder


@pytest.mark.parametrize("decoder", ["auto", "pyav"])
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("absent.mp4", "file is missing"),
        ("folder", "not a regular file"),
        ("empty.mp4", "empty file"),
        ("text.txt", "not a video: FFmpeg would draw the text"),
        ("text.mp4", "not a video"),
        ("noise.mp4", "not a video"),
        ("sound.mp3", "no video stream"),
        ("sound_with_cover.mp3", "no video stream"),
        ("cut_whole.mp4", "truncated: the index is missing"),
        ("cut_whole.mkv", "truncated: "),
        ("cut_whole.avi", "truncated: "),
        ("cut_index_first.mp4", "truncated: "),
        ("hole.mp4", "corrupt: "),
    ],
)
def test_what_is_no_whole_video_is_refused_with_a_reason(broken: Path, name: str, reason: str, decoder: str) -> None:
    with pytest.raises(DecodeError) as caught:
        read(broken / name, FrameSpec(4, decoder=decoder), SQUASH)
    assert caught.value.reason.startswith(reason)
    assert "\n" not in caught.value.reason
    assert isinstance(caught.value, ColdframeError)
    assert isinstance(caught.value, OSError)


def test_decoders_are_silent(broken: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("hole.mp4", "noise.mp4", "cut_index_first.mp4", "whole.mp4"):
        for decoder in ("auto", "decord", "pyav"):
            with suppress(DecodeError):
                read(broken / name, FrameSpec(4, decoder=decoder), SQUASH)
    assert capfd.readouterr() == ("", "")


def test_a_tag_in_another_alphabet_is_no_obstacle(tmp_path: Path) -> None:
    path = tmp_path / "tagged.avi"
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "XXXX"
        stream: Any = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(numbered(7), format="rgb24")))
        container.mux(stream.encode())
    path.write_bytes(path.read_bytes().replace(b"XXXX", b"\xe9t\xe9!"))
    assert read_number(read(path, FrameSpec(1), SQUASH).pixels[0]) == 7


# ------------------------------------------------------------------------------------- damage, salvage, times that lie

M = 60  # frames of a video that is to be damaged
TEXTURE = np.random.default_rng(0).integers(-20, 21, (16, 24, 1)).repeat(8, 0).repeat(8, 1)


def checked(number: int) -> np.ndarray:
    """A picture that spells a number below 64 and its complement, so that a garbled one is none."""
    blocks = numbered(number | (~number & 63) << 6, 192, 128) * 0.8 + 20
    return np.clip(blocks + np.roll(TEXTURE, 3 * number, 1), 0, 255).astype(np.uint8)


def seen_in(video: Any) -> list[int]:
    """The numbers of checked pictures; -1 where one is garbled."""
    codes = [read_number(crop) for crop in video.pixels]
    return [code & 63 if code & 63 ^ code >> 6 == 63 else -1 for code in codes]


CLOSED = {"x264-params": "keyint=12:min-keyint=12:scenecut=0:bframes=2:log-level=none"}
OPEN = {"x264-params": "keyint=12:min-keyint=12:scenecut=0:open-gop=1:bframes=2:log-level=none"}
SOUND: dict[str, tuple[str, dict[str, str]]] = {
    "h264.mp4": ("libx264", CLOSED),
    "h264.mkv": ("libx264", CLOSED),
    "open.mkv": ("libx264", OPEN),
    "open.ts": ("libx264", OPEN),
    "hashed.mkv": ("libx265", {"x265-params": "keyint=12:min-keyint=12:bframes=2:hash=1:pools=1:log-level=none"}),
    "mpeg4.mp4": ("mpeg4", {"g": "12", "bf": "2", "b": "2M"}),
    "mpeg4.avi": ("mpeg4", {"g": "12", "bf": "0", "b": "2M"}),
    "vp9.webm": ("libvpx-vp9", {"cpu-used": "8", "deadline": "realtime", "g": "12"}),
    "av1.mkv": ("libsvtav1", {"preset": "13", "crf": "20", "svtav1-params": "lp=1:keyint=12"}),
    "mpeg2.ts": ("mpeg2video", {"g": "12", "bf": "2"}),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    for name, (codec, options) in SOUND.items():
        write_video(folder / name, (checked(i) for i in range(M)), fps=25, codec=codec, options=options)
    with av.open(str(folder / "index_first.mp4"), "w", options={"movflags": "faststart"}) as container:
        remux(folder / "h264.mp4", container)
    return folder


def remux(path: Path, target: Any, change: Any = lambda number, packet: True) -> None:
    """Copy packets in the order of the file; `change` may alter each, and drops it by saying False."""
    with av.open(str(path)) as source:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        for number, packet in enumerate(p for p in source.demux(stream) if p.size):
            if change(number, packet):
                packet.stream = copy
                target.mux(packet)


def packets(path: Path) -> list[tuple[int, int]]:
    """Place and size of each packet of a file, in the order of decoding."""
    with av.open(str(path)) as container:
        return [(p.pos, p.size) for p in container.demux(video=0) if p.size]


def overwrite(path: Path, target: Path, *spans: tuple[int, bytes]) -> Path:
    data = bytearray(path.read_bytes())
    for begin, new in spans:
        data[begin : begin + len(new)] = new
    target.write_bytes(data)
    return target


LENIENT = DecodeOptions(salvage=0.1)
WHOLE = FrameSpec(None, "all", decoder="pyav")


@pytest.mark.parametrize("name", SOUND)
def test_sound_files_of_every_kind_have_no_sign_of_damage(sound: Path, name: str) -> None:
    video = read(sound / name, WHOLE)
    assert seen_in(video) == video.indices.tolist() == list(range(M))
    assert video.kept == 1


@pytest.mark.parametrize("name", SOUND)
def test_a_damaged_picture_costs_what_leans_on_it_and_moves_no_other(sound: Path, tmp_path: Path, name: str) -> None:
    begin, size = packets(sound / name)[27]  # in the third of five groups of pictures
    noise = np.random.default_rng(0).bytes(size // 2) if name != "mpeg2.ts" else bytes(188)
    path = overwrite(sound / name, tmp_path / name, (begin + size // 3, noise))
    with pytest.raises(DecodeError, match=r"^corrupt: [0-9]+ of [0-9]+ frames could be decoded: "):
        read(path, FrameSpec(8))
    video = read(path, WHOLE, options=LENIENT)
    assert seen_in(video) == video.indices.tolist()
    lost = sorted(set(range(M)) - set(video.indices.tolist()))
    if name == "mpeg4.avi":  # which counts: after a loss no number is sure
        assert lost == list(range(lost[0], M))
        assert 20 < lost[0] < 28
    else:
        n_groups = 2 if name == "open.ts" else 1  # the decoder stumbles over what the next group should forget
        assert 1 <= len(lost) <= 13 * n_groups
        assert 20 < lost[0] < lost[-1] < 24 + 16 * n_groups
    assert video.kept == pytest.approx(1 - len(lost) / M)
    assert video.n_source_frames == M


@pytest.mark.parametrize("decoder", DECODERS)
def test_no_back_end_takes_damage_for_a_picture(sound: Path, tmp_path: Path, decoder: str) -> None:
    n_refused = n_garbled = 0
    for number in range(1, M, 4):
        begin, size = packets(sound / "h264.mp4")[number]
        flipped = bytes(255 ^ byte for byte in (sound / "h264.mp4").read_bytes()[begin + size // 2 :][: size // 4])
        path = overwrite(sound / "h264.mp4", tmp_path / "flipped.mp4", (begin + size // 2, flipped))
        try:
            video = read(path, FrameSpec(30, decoder=decoder))
        except DecodeError as error:
            assert "corrupt: " in error.reason
            n_refused += 1
        else:
            assert {*seen_in(video)} <= {*video.indices.tolist(), -1}
            n_garbled += -1 in seen_in(video)
    assert n_refused >= 12
    assert n_garbled <= 2  # what can be read as a picture is one


@pytest.mark.parametrize("decoder", ["auto", "pyav"])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_salvage_samples_what_is_there(sound: Path, tmp_path: Path, sampling: str, decoder: str) -> None:
    spec = dataclasses.replace(SAMPLINGS[sampling], decoder=decoder)
    path = cut(sound / "index_first.mp4", 0.6, tmp_path / "cut.mp4")
    video = read(path, spec, options=LENIENT, key="v")
    there = read(path, WHOLE, options=LENIENT).indices
    assert 0.4 < video.kept < 0.7
    assert video.kept == pytest.approx(len(there) / M, abs=0.05)
    wanted = sample(np.arange(video.n_source_frames) / 25, spec, "v").frames[0]
    if not np.isin(wanted, there).all():
        wanted = there[sample(there / 25, spec, "v").frames[0]]
    np.testing.assert_array_equal(video.indices, wanted)
    if spec.crops is None:
        assert seen_in(video) == video.indices.tolist()


@pytest.mark.parametrize("share", [0.5, 0.9])
@pytest.mark.parametrize("name", ["index_first.mp4", "h264.mkv", "vp9.webm", "av1.mkv", "mpeg4.avi"])
def test_the_begin_of_a_truncated_file_can_be_had(sound: Path, tmp_path: Path, name: str, share: float) -> None:
    path = cut(sound / name, share, tmp_path / name)
    with pytest.raises(DecodeError, match=r"^truncated: [0-9.]+ of [0-9.]+ (frames|seconds)$"):
        read(path, FrameSpec(8))
    video = read(path, FrameSpec(12), options=DecodeOptions(salvage=share - 0.25))
    assert seen_in(video) == video.indices.tolist()
    assert share - 0.25 < video.kept < 1
    with pytest.raises(DecodeError):
        read(path, FrameSpec(12), options=DecodeOptions(salvage=0.99))


@pytest.mark.parametrize("how", ["zeros", "noise", "gone"])
@pytest.mark.parametrize("name", ["h264.mp4", "h264.mkv", "open.mkv", "vp9.webm", "av1.mkv", "mpeg4.avi", "mpeg2.ts"])
def test_a_hole_in_the_middle(sound: Path, tmp_path: Path, name: str, how: str) -> None:
    (begin, _), (end, _) = packets(sound / name)[25], packets(sound / name)[30]
    data = (sound / name).read_bytes()
    filling = {"zeros": bytes(end - begin), "noise": np.random.default_rng(0).bytes(end - begin), "gone": b""}[how]
    path = tmp_path / name
    path.write_bytes(data[: begin + 9] + filling + data[end + 9 :])
    with pytest.raises(DecodeError, match=r"^(corrupt|truncated): "):
        read(path, FrameSpec(8))
    if name == "h264.mp4" and how == "gone":  # the index is not where the header says
        return
    video = read(path, FrameSpec(12), options=LENIENT)
    assert seen_in(video) == np.rint(video.timestamps_s * 25).tolist()
    assert 0.1 <= video.kept < 1


@pytest.mark.parametrize("decoder", ["auto", "pyav"])
@pytest.mark.parametrize("name", ["h264.mp4", "h264.mkv", "vp9.webm", "mpeg4.avi", "mpeg2.ts"])
def test_garbage_after_the_end_is_no_damage(sound: Path, tmp_path: Path, name: str, decoder: str) -> None:
    for garbage in (bytes(5000), np.random.default_rng(0).bytes(5000)):
        (tmp_path / name).write_bytes((sound / name).read_bytes() + garbage)
        video = read(tmp_path / name, FrameSpec(12, decoder=decoder))
        assert seen_in(video) == segment_centres(M, 12).tolist()
        assert video.kept == 1


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ModuleNotFoundError, "torchcodec is not installed: install it, or use the decoder auto"),
        (
            RuntimeError,
            "torchcodec finds no FFmpeg that fits: install FFmpeg's shared libraries, or use the decoder auto",
        ),
    ],
)
def test_torchcodec_that_cannot_be_loaded_says_what_it_lacks(
    sound: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception], reason: str
) -> None:
    class Finder(MetaPathFinder):
        def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
            if fullname.startswith("torchcodec"):
                raise error("Could not load libtorchcodec. Likely causes:\nmany\n")

    for name in [name for name in sys.modules if name.startswith("torchcodec")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    with pytest.raises(DecodeError, match=f"^{reason}$"):
        read(sound / "h264.mp4", FrameSpec(2, decoder="torchcodec"))


def test_times_that_lie_move_no_frame(tmp_path: Path) -> None:
    write_video(tmp_path / "true.mkv", (checked(i) for i in range(M)), 25, codec="mjpeg", pix_fmt="yuvj420p")
    for name, times in {
        "double": [*range(20), *range(19, M - 1)],
        "swapped": [*range(20), 21, 20, *range(22, M)],
        "back": [*range(30), *range(M - 30)],
    }.items():

        def change(number: int, packet: Any, times: list[int] = times) -> bool:
            packet.pts, packet.dts = times[number] * 40, (number - 40) * 40
            return True

        with av.open(str(tmp_path / "lies.mkv"), "w") as container:
            remux(tmp_path / "true.mkv", container, change)
        for decoder in ("auto", "pyav"):
            video = read(tmp_path / "lies.mkv", FrameSpec(20, decoder=decoder))
            assert seen_in(video) == video.indices.tolist() == segment_centres(M, 20).tolist(), name


def test_an_edit_list_cuts_frames(sound: Path, tmp_path: Path) -> None:
    def earlier(number: int, packet: Any) -> bool:
        ticks = round(7 * 0.04 / packet.time_base)
        packet.pts, packet.dts = packet.pts - ticks, packet.dts - ticks
        return True

    with av.open(str(tmp_path / "edited.mp4"), "w", options={"avoid_negative_ts": "disabled"}) as container:
        remux(sound / "h264.mp4", container, earlier)
    for decoder in ("auto", "pyav"):
        video = read(tmp_path / "edited.mp4", FrameSpec(None, "all", decoder=decoder))
        assert seen_in(video) == list(range(7, M))
        assert video.indices.tolist() == list(range(M - 7))
    with pytest.raises(DecodeError, match="decord mis"):
        read(tmp_path / "edited.mp4", FrameSpec(4, decoder="decord"))


def test_a_video_of_an_unknown_kind_is_refused(sound: Path, tmp_path: Path) -> None:
    data = (sound / "vp9.webm").read_bytes()
    (tmp_path / "odd.webm").write_bytes(data.replace(b"V_VP9", b"V_XP9"))
    with pytest.raises(DecodeError, match="no decoder for this kind of video"):
        read(tmp_path / "odd.webm", FrameSpec(4))


# ------------------------------------------------------------------------------------------------------- writing


def test_a_video_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    def stops() -> Iterator[np.ndarray]:
        yield numbered(0)
        raise RuntimeError("stop")

    path = tmp_path / "new" / "clip.mp4"
    with pytest.raises(RuntimeError, match="stop"):
        write_video(path, stops(), fps=10)
    assert list(path.parent.iterdir()) == []
    write_video(path, [numbered(i) for i in range(6)], fps=10, options={"crf": "10"})
    first = path.read_bytes()
    assert [read_number(crop) for crop in read(path, FrameSpec(6), SQUASH).pixels] == list(range(6))
    assert read(path, FrameSpec(6), SQUASH).timestamps_s.tolist() == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])
    write_video(path, np.stack([numbered(i) for i in range(6)]), fps=10, options={"crf": "10"})
    assert path.read_bytes() == first
    assert [file.name for file in path.parent.iterdir()] == ["clip.mp4"]


# ---------------------------------------------------------------------------------------------------- real files

REAL = {
    # what PyAV decodes from end to end; decord 0.6 counts 74, 179, 90 and 82, and cannot open the fifth
    "hard/unlabelled/clip-video-encode_vid1.mp4": (56, "pyav"),  # edit list
    "hard/unlabelled/clip-video-encode_vid2.mp4": (134, "pyav"),
    "singles/golf/hmdb51_Golf_Tips_-_Hit_The_Driver_300__Yards____golf_f_nm_np1_fr_med_0.avi": (89, "pyav"),
    "singles/shoot_bow/hmdb51_6arrowswithin30seconds_shoot_bow_f_nm_np1_fr_med_3.avi": (81, "pyav"),
    "hard/unlabelled/torchcodec_av1_video.mkv": (125, "pyav"),
    "hard/unlabelled/torchcodec_h265_video.mp4": (10, "pyav"),  # open GOPs
    "hard/unlabelled/torchcodec_h264_10bits.mp4": (30, "pyav"),
    "hard/unlabelled/decord_video_90.mov": (3, "decord"),  # turned
    "hard/unlabelled/torchcodec_nasa_13013.mp4": (390, "decord"),  # two video streams
    "singles/tai_chi/st-gcn_ta_chi.mp4": (300, "decord"),
    "ucf101/apply_eye_makeup/ucf25f_v_000009.mp4": (25, "decord"),
    "ucf101/apply_eye_makeup/v_ApplyEyeMakeup_g01_c01.avi": (164, "pyav"),
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_real_files(shared: Path, name: str) -> None:
    path = shared / "data" / "videos" / name
    if not path.is_file():
        pytest.skip(f"no {path}")
    n_source, decoder = REAL[name]
    transform = TransformSpec(64, ZEROS, ONES)
    video = read(path, FrameSpec(8), transform)
    assert (video.n_source_frames, video.decoder) == (n_source, decoder)

    # The packets' promise is kept, so that one pass is enough: HMDB51's have a placeholder too many.
    assert len(inspect(str(path)).timestamps_s) == n_source
    with av.open(str(path)) as container:  # from end to end, without any index
        stream: Any = container.streams.best("video")
        pictures = [np.rot90(f.to_ndarray(format="rgb24"), f.rotation // 90) for f in container.decode(stream)]
    assert len(pictures) == n_source
    for crop, index in zip(video.pixels, video.indices, strict=True):
        np.testing.assert_array_equal(crop, resize_and_crop(pictures[index], transform))


def test_what_is_not_a_regular_file_is_never_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    for path in (tmp_path / "pipe.mp4", tmp_path, Path("/dev/zero")):
        with pytest.raises(DecodeError, match=r"^not a regular file$"):
            read(path, FrameSpec(), SQUASH)
