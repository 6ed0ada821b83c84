"""Whatever is done to a file's bytes, each frame that comes is the frame asked for, or the video is reported."""

from __future__ import annotations

from collections import Counter, defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any

import av
import av.logging
import numpy as np
import pytest

from coldframe.extract.crops import resize_and_crop
from coldframe.extract.frames import Crops, DecodeOptions, decode, write_video
from coldframe.extract.specs import FrameSpec, TransformSpec
from coldframe.extract.workers import Chunk, DecodePool, Failure, Job

pytestmark = pytest.mark.slow

N, EACH, EACH_REAL = 60, 92, 20  # frames of a drawn video; mutations of each video
TINY = TransformSpec(96, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "bilinear", "squash")
TEXTURE = np.random.default_rng(0).integers(-20, 21, (16, 24, 1)).repeat(8, 0).repeat(8, 1)
GOPS = "keyint=12:min-keyint=12:scenecut=0:bframes=2:log-level=none"
DRAWN: dict[str, tuple[str, dict[str, str]]] = {
    "h264.mp4": ("libx264", {"x264-params": GOPS}),
    "hevc.mkv": ("libx265", {"x265-params": f"{GOPS}:pools=1:frame-threads=1"}),
    "vp9.webm": ("libvpx-vp9", {"cpu-used": "8", "deadline": "realtime", "g": "12"}),
    "mpeg4.avi": ("mpeg4", {"g": "12", "bf": "0", "b": "1M"}),
    "mpeg2.ts": ("mpeg2video", {"g": "12", "bf": "2"}),
}
REAL = ("hard/unlabelled/decord_video_90.mov", "hard/unlabelled/torchcodec_av1_video.mkv")


def drawn(number: int) -> np.ndarray:
    """A picture whose 4 × 3 blocks spell a number below 64 and its complement, so that a garbled one is none."""
    code = number | (~number & 63) << 6
    bits = np.array([code >> bit & 1 for bit in range(12)]).reshape(3, 4)
    picture = bits.repeat(43, 0)[:128].repeat(48, 1)[:, :192, None] * 172 + 36
    return np.clip(np.repeat(picture, 3, axis=2) + np.roll(TEXTURE, 3 * number, 1), 0, 255).astype(np.uint8)


def number_in(crop: np.ndarray) -> int:
    """The number that a crop [3, 96, 96] spells; -1 where it is garbled."""
    bits = [crop[:, 16 + 32 * row, 12 + 24 * column].mean() > 128 for row in range(3) for column in range(4)]
    code = sum(int(bit) << place for place, bit in enumerate(bits))
    return code & 63 if code & 63 ^ code >> 6 == 63 else -1


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """A file with some bits flipped, a run of zeros or noise, or bytes that are gone, come in or doubled."""
    found, begin, length = bytearray(data), int(rng.integers(len(data))), int(rng.integers(1, len(data) // 20))
    end = min(begin + length, len(data))
    match rng.integers(7):
        case 0 | 1:
            for place in rng.integers(len(data), size=int(rng.integers(1, 5))):
                found[place] ^= 1 << int(rng.integers(8))
        case 2:
            found[begin:end] = bytes(end - begin)
        case 3:
            found[begin:end] = rng.bytes(end - begin)
        case 4:
            del found[begin:end]
        case 5:
            found[begin:begin] = rng.bytes(end - begin)
        case _:
            found[begin:begin] = found[begin:end]
    return bytes(found)


def decoded(paths: list[Path], spec: FrameSpec, salvage: float | None) -> dict[str, tuple[Any, np.ndarray | None]]:
    """What a pool of two workers makes of the files: answer, and the crops of its one view."""
    found: dict[str, tuple[Any, np.ndarray | None]] = {}
    crops: dict[str, list[np.ndarray]] = defaultdict(list)
    with DecodePool(spec, TINY, workers=2, timeout_s=20.0, options=DecodeOptions(salvage=salvage)) as pool:
        for key, part in pool.decode(Job(path.name, str(path)) for path in paths):
            if isinstance(part, Chunk):
                crops[key] = [*crops[key][: 0 if part.first == 0 else None], *part.crops]
            else:
                found[key] = part, None if isinstance(part, Failure) else np.stack(crops[key])[part.rows[0]]
    return found


def as_it_says(path: Path) -> tuple[list[np.ndarray], bool]:
    """The crops of all pictures that FFmpeg gives from end to end, and whether anything tells of damage."""
    crops: list[np.ndarray] = []
    is_damaged = False
    av.logging.set_level(av.logging.INFO)
    try:
        with av.logging.Capture() as log, av.open(str(path)) as container:
            stream = container.streams.best("video")
            assert isinstance(stream, av.VideoStream)
            stream.codec_context.thread_count = 1
            stream.codec_context.options = {"err_detect": "crccheck+bitstream+buffer+explode"}
            with suppress(av.FFmpegError):
                for packet in container.demux(stream):
                    frames: list[av.VideoFrame] = []
                    try:
                        frames = packet.decode()
                    except av.FFmpegError:
                        is_damaged = True
                    is_damaged |= any(frame.is_corrupt for frame in frames)
                    for frame in frames:
                        rgb = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
                        crops.append(resize_and_crop(rgb, TINY))
            is_damaged |= any(level <= av.logging.ERROR or "concealing" in text for level, _, text in log)
    finally:
        av.logging.set_level(None)
    return crops, is_damaged


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, shared: Path) -> dict[Path, list[np.ndarray]]:
    """Every crop of each sound video."""
    folder = tmp_path_factory.mktemp("sound")
    for name, (codec, options) in DRAWN.items():
        write_video(folder / name, (drawn(i) for i in range(N)), 25, codec=codec, options=options)
    found: dict[Path, list[np.ndarray]] = {}
    for path in (*(folder / name for name in DRAWN), *(shared / "data" / "videos" / name for name in REAL)):
        if path.is_file():
            decode(path, FrameSpec(None, "all", decoder="pyav"), TINY, crops := Crops())
            found[path] = list(crops)
    return found


@pytest.fixture(scope="module")
def mutants(tmp_path_factory: pytest.TempPathFactory, sound: dict[Path, list[np.ndarray]]) -> list[Path]:
    """500 damaged files, `<seed>.<name of the sound one>`."""
    folder, paths = tmp_path_factory.mktemp("mutants"), []
    for number, path in enumerate(sound):
        for seed in range(EACH if path.name in DRAWN else EACH_REAL):
            paths.append(folder / f"{seed}.{path.name}")
            paths[-1].write_bytes(mutated(path.read_bytes(), np.random.default_rng([seed, number])))
    return paths


def test_whole_videos_alone(mutants: list[Path], sound: dict[Path, list[np.ndarray]]) -> None:
    """A picture that is not the one asked for is, to the bit, what FFmpeg shows there without any sign of damage."""
    crops_of = {path.name: crops for path, crops in sound.items()}
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for key, (answer, crops) in decoded(mutants, FrameSpec(8), None).items():
        name, path = key.partition(".")[2], mutants[0].with_name(key)
        if crops is None:
            assert "\n" not in answer.reason
            counts[name]["reported"] += 1
            continue
        kinds = [kind(name, at, crop, crops_of[name]) for at, crop in zip(answer.indices[0], crops, strict=True)]
        counts[name][next((worst for worst in ("another", "garbled") if worst in kinds), "right")] += 1
        if {*kinds} != {"right"}:
            said, is_damaged = as_it_says(path)
            assert not is_damaged, key
            for place, crop in zip(answer.indices[0], crops, strict=True):
                np.testing.assert_array_equal(crop, said[place], err_msg=key)
    report(counts)
    total = sum(counts.values(), Counter())
    assert total["right"] + total["reported"] >= 0.95 * total.total()
    assert total["another"] <= 0.005 * total.total()
    assert all(count["reported"] > 0.5 * count.total() for count in counts.values())


def test_salvage(mutants: list[Path], sound: dict[Path, list[np.ndarray]]) -> None:
    """What is left of a damaged file is right, at its time; without its begin, all times are earlier."""
    drawn_alone = [path for path in mutants if path.name.partition(".")[2] in DRAWN]
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for key, (answer, crops) in decoded(drawn_alone, FrameSpec(8), 0.1).items():
        name = key.partition(".")[2]
        if crops is None:
            counts[name]["reported"] += 1
            continue
        late = np.array([number_in(crop) for crop in crops]) - np.rint(answer.timestamps_s[0] * 25).astype(int)
        late = late[np.array([number_in(crop) for crop in crops]) >= 0]
        worst = "garbled" if len(late) < len(crops) else "right"
        counts[name]["another" if len({*late.tolist()}) > 1 else worst] += 1
    report(counts)
    total = sum(counts.values(), Counter())
    assert total["right"] > 0.6 * total.total()
    assert total["garbled"] <= 0.07 * total.total()
    assert total["another"] <= 0.01 * total.total()


def report(counts: dict[str, Counter[str]]) -> None:
    """For `pytest -s`."""
    for name, count in counts.items():
        print(f"{name:28}", *(f"{n} {what}" for what, n in sorted(count.items())))


def kind(name: str, place: int, crop: np.ndarray, sound: list[np.ndarray]) -> str:
    """Whether a crop is the frame of its place, another frame, or none."""
    if name in DRAWN:
        number = number_in(crop)
        return "right" if number == place else "garbled" if number < 0 else "another"
    apart = [np.abs(crop.astype(int) - other).mean() for other in sound]
    nearest = int(np.argmin(apart))
    if place < len(apart) and apart[place] <= apart[nearest] + 0.5:
        return "right" if apart[place] < 1 else "garbled"
    return "another" if apart[nearest] < 1 else "garbled"
