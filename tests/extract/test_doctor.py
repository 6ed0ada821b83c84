"""A sound machine is found sound, and everything that is broken here on purpose is found broken."""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.video.frame import PictureType

from coldframe.cli import main
from coldframe.data_manifests.errors import ConfigError
from coldframe.extract import crops, doctor, frames, towers
from coldframe.extract.doctor import Check, examine

SOUND = Check("load", "ok", "")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Exit code and output of `coldframe doctor`."""
    with pytest.raises(SystemExit) as left:
        main(["doctor", *arguments])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return int(left.value.code or 0), out


def test_the_program_finds_this_machine_fit(tmp_path: Path) -> None:
    program = "from coldframe.cli import main; main(['doctor', '--json', '--store', 'new/store'])"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    states = {check["name"]: check["state"] for check in found["checks"]}
    assert found["fit"] is True
    for name in ("load pyav", "frames by auto", "frames by pyav", "pre-processing", "tower on cpu", "store folder"):
        assert states[name] == "ok", found["checks"]
    assert "failed" not in {check["state"] for check in found["checks"] if check["needed"]}
    assert "\n" not in "".join(check["detail"] for check in found["checks"])
    assert "libavcodec" in found["versions"]["FFmpeg of av"]
    assert list(tmp_path.iterdir()) == []


# Decoders that do not load


@pytest.mark.parametrize(
    ("code", "reason", "needed"),
    [
        ("raise ImportError('libx.so: no such file')", "ImportError: libx.so: no such file", False),
        ("raise OSError('libx.so is of another machine')", "OSError: libx.so is of another machine", True),
        ("import os, sys; sys.stderr.write('wrong glibc\\n'); sys.stderr.flush(); os.abort()",
         "import decord crashed (signal 6): wrong glibc", True),
        ("import os; os._exit(4)", "import decord ended (code 4)", True),
        ("import time; time.sleep(60)", "import decord: no end after 1 s", True),
    ],
)  # fmt: skip
def test_a_decoder_that_does_not_load(
    code: str, reason: str, needed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "decord.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    found = doctor._load_decoder("decord", "decord", 1.0 if "sleep" in code else 20.0)
    assert found == Check("load decord", "failed", reason, needed)


def test_a_decoder_that_is_not_installed() -> None:
    assert doctor._load_decoder("decord", "no_such_module", 1.0).state == "skipped"
    assert doctor._load_decoder("pyav", "no_such_module", 1.0).state == "failed"


def test_the_program_lives_without_av_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "av").mkdir()
    (tmp_path / "av" / "__init__.py").write_text("import os; os.abort()")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    program = "from coldframe.cli import main; main(['doctor'])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("FAILED   load pyav ") and "crashed (signal 6)" in line]
    for name in ("frames", "pre-processing", "tower on cpu"):
        assert [line for line in lines if line.startswith(f"skipped  {name} ")], done.stdout
    assert done.stdout.splitlines()[-1].startswith("NOT fit")


# Wrong frames


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("drawn") / "numbered.mp4"
    doctor._draw_video(path)
    return path


def test_the_drawn_video_has_b_frames_and_tells_its_frames_apart(video: Path) -> None:
    with av.open(str(video)) as container:
        kinds = [PictureType(frame.pict_type).name for frame in container.decode(video=0)]
    assert len(kinds) == doctor._N_DRAWN
    assert kinds.count("B") > len(kinds) / 2
    assert kinds.count("I") >= 3
    pictures = [doctor._numbered(number).transpose(2, 0, 1) for number in range(256)]
    assert [doctor._read_number(picture) for picture in pictures] == list(range(256))


def test_frames_other_than_those_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = doctor._numbered
    monkeypatch.setattr(doctor, "_numbered", lambda number: right(number + 1))
    doctor._draw_video(tmp_path / "late.mp4")
    with pytest.raises(doctor._CheckFailed, match=r"shows frames \[4, "):
        doctor._check_decoder("pyav", True, tmp_path / "late.mp4", 20.0, {})


def test_decoders_that_disagree(video: Path) -> None:
    seen = {"decord": np.zeros((doctor._N_ASKED, 3, 64, 64), np.uint8)}
    with pytest.raises(doctor._CheckFailed, match="not those of decord"):
        doctor._check_decoder("pyav", True, video, 20.0, seen)


def test_auto_is_not_tried_where_decord_would_break_it() -> None:
    loaded = dict.fromkeys(doctor.DECODERS, SOUND) | {"decord": Check("load decord", "failed", "no end after 8 s")}
    found = {check.name: check for check in doctor._check_frames(loaded, 20.0)}
    assert found["frames by auto"].state == found["frames by decord"].state == "skipped"
    assert found["frames by pyav"].state == "ok"


def test_an_ffmpeg_that_cannot_encode_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "write_video", partial(frames.write_video, codec="libnone"))
    [found] = doctor._check_frames(dict.fromkeys(doctor.DECODERS, SOUND), 20.0)
    assert found.state == "skipped"
    assert "libnone" in found.detail


def test_a_full_disk_is_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor.tempfile, "tempdir", str(tmp_path / "gone"))
    [found] = doctor._check_frames(dict.fromkeys(doctor.DECODERS, SOUND), 20.0)
    assert found.state == "failed"


# Wrong pre-processing, wrong towers


def test_a_wrong_crop_is_found_and_the_exit_code_is_3(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = crops.resize_and_crop
    monkeypatch.setattr(crops, "resize_and_crop", lambda rgb, transform: right(rgb, transform)[::-1].copy())  # BGR
    monkeypatch.setattr(doctor, "_check_frames", lambda *_: ())  # slow, and not what is broken
    code, out = run(capsys)
    assert code == 3
    failed = [line for line in out.splitlines() if line.startswith("FAILED")]
    assert [line.split()[1] for line in failed][:2] == ["pre-processing", "tower"]
    assert "are not open_clip's" in failed[0]
    assert "cosine" in failed[1]


def test_one_value_that_is_off_by_one_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = crops.resize_and_crop

    def nearly(rgb: np.ndarray, transform: object) -> np.ndarray:
        crop = right(rgb, transform)
        crop[0, 0, 0] ^= 1
        return crop

    monkeypatch.setattr(crops, "resize_and_crop", nearly)
    with pytest.raises(doctor._CheckFailed, match="1 of 12288 values at 64 pixels"):
        doctor._check_transforms()


def test_another_order_of_scaling_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def scaled(self: towers.Tower, pixels: np.ndarray) -> torch.Tensor:
        return (torch.from_numpy(pixels) - 255 * self._mean) / (255 * self._std)

    monkeypatch.setattr(towers.Tower, "normalise", scaled)
    with pytest.raises(doctor._CheckFailed, match="up to"):
        doctor._check_transforms()


def test_weights_that_are_slightly_off_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = towers.load_tower

    def damaged(*args: object, **kwargs: object) -> towers.Tower:
        tower = right(*args, **kwargs)
        tower.visual.transformer.resblocks[0].mlp.c_fc.bias[0] += 0.3
        return tower

    assert "recorded" in doctor._check_tower("cpu", ("fp32", "bf16"))
    monkeypatch.setattr(towers, "load_tower", damaged)
    with pytest.raises(doctor._CheckFailed, match="is off by"):
        doctor._check_tower("cpu", ("fp32",))


# GPUs


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_torch_does_not_see_is_a_failure_unless_it_is_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [check.state for check in doctor._check_gpus(SOUND)] == ["skipped"]
    (tmp_path / "0000:01:00.0").mkdir()
    monkeypatch.setattr(doctor, "_GPUS", tmp_path)
    [found] = doctor._check_gpus(SOUND)
    assert (found.state, found.needed) == ("failed", True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert [check.state for check in doctor._check_gpus(SOUND)] == ["skipped"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_every_gpu_is_used() -> None:
    found = list(doctor._check_gpus(SOUND))
    assert len(found) == torch.cuda.device_count() + 1
    assert {check.state for check in found} == {"ok"}, found


# Folders


def test_locks_that_do_not_exclude(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "lock, rename and fsync work" in doctor._check_folder(tmp_path)
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    with pytest.raises(doctor._CheckFailed, match="second writer"):
        doctor._check_folder(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written() -> None:
    found = doctor._attempt("store folder", lambda: doctor._check_folder(Path("/proc/self")))
    assert found.state == "failed"
    assert "/proc/self" in found.detail


@pytest.mark.parametrize("store", ["file", "file/below", "s3://bucket/store"])
def test_what_is_no_folder_is_refused(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="folder of this machine"):
        examine(Path(store))
