"""The shipped weights: small, readable by open_clip, as recorded, and good at what they are for."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from coldframe.data_manifests.drawn import MOTIONS, plan_clips
from coldframe.extract import tiny
from coldframe.extract.tiny import facts, make

Shipped = tuple[Any, make.Transform]
RECORD = tiny.WEIGHTS.with_name("RECORD.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def shipped() -> Shipped:
    """The model as open_clip loads it, and open_clip's evaluation transform."""
    return make.load(tiny.WEIGHTS)


def test_the_weights_are_small() -> None:
    assert tiny.WEIGHTS.stat().st_size <= 8_000_000
    assert {value.dtype for value in load_file(tiny.WEIGHTS).values()} == {torch.float16}


def test_the_record_is_of_these_weights() -> None:
    assert sha256(tiny.WEIGHTS.read_bytes()).hexdigest() in RECORD
    assert f"{tiny.WEIGHTS.stat().st_size:,}, half precision" in RECORD


def test_the_record_claims_what_the_weights_are_for() -> None:
    claimed = {kind: [] for kind in ("shape", "colour", "place")}
    for kind, percent in re.findall(r"\| (shape|colour|place) of .* \| ([0-9.]+)% \|", RECORD):
        claimed[kind].append(float(percent))
    assert min(claimed["shape"]) >= 85
    assert min(claimed["colour"] + claimed["place"]) >= 95


def test_open_clip_loads_it_with_its_own_tokenizer_and_quick_gelu(shipped: Shipped) -> None:
    model, transform = shipped
    assert type(model).__name__ == "CLIP"
    assert type(open_clip.get_tokenizer(tiny.CONFIG.stem)) is open_clip.SimpleTokenizer
    blocks = model.visual.transformer.resblocks
    assert len(blocks) >= 4  # the EVL decoder reads five consecutive token maps
    assert type(blocks[0].mlp.gelu).__name__ == "QuickGELU"
    assert model.visual.grid_size == (8, 8)
    size = json.loads(tiny.CONFIG.read_text())["vision_cfg"]["image_size"]
    assert transform(Image.new("RGB", (90, 96))).shape == (3, size, size)


def test_it_names_what_it_sees(shipped: Shipped) -> None:
    scores = make.zero_shot(*shipped, n_pictures=200, rng=np.random.default_rng(7))
    for what, score in scores.items():
        assert score > (0.75 if what.startswith("place") else 0.85), what


def test_a_caption_is_true_of_what_it_does_not_contradict() -> None:
    rng = np.random.default_rng(3)
    shown = facts.draw_facts(40, rng)
    told = facts.tell(shown, (facts.COLOUR, facts.SHAPE))
    by_hand = [[(a[1], a[2]) == (b[1], b[2]) for b in shown.tolist()] for a in shown.tolist()]
    assert np.array_equal(facts.is_true(shown, told), by_hand)
    for row in told:
        words = facts.caption(row, rng)
        assert facts.WORDS[facts.COLOUR][row[facts.COLOUR]] in words
        assert facts.WORDS[facts.SHAPE][row[facts.SHAPE]] in words
        assert not re.search(r"\b(top|bottom|left|right|centre|small|large)\b", words)


def test_a_size_without_a_name_is_not_told() -> None:
    nameless = facts.WORDS[facts.SIZE].index("")
    assert facts.tell(np.array([[nameless, 1, 2, 3], [0, 1, 2, 3]]), range(4)).tolist() == [[-1, 1, 2, 3], [0, 1, 2, 3]]


def test_every_caption_fits() -> None:
    rng = np.random.default_rng(0)
    told = facts.tell(facts.draw_facts(400, rng), range(4))
    tokens = open_clip.get_tokenizer("ViT-B-32")([facts.caption(row, rng) for row in told])
    assert (tokens != 0).sum(dim=1).max() <= facts.LONGEST_CAPTION


def test_the_loss_counts_every_true_pair() -> None:
    logits = torch.tensor([[2.0, 2.0, -1.0], [0.0, 0.0, 3.0]])
    truth = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    rows, columns = torch.log_softmax(logits, dim=1), torch.log_softmax(logits, dim=0)
    to_text = -((rows[0, 0] + rows[0, 1]) / 2 + rows[1, 2]) / 2
    to_image = -(columns[0, 0] + columns[0, 1] + columns[1, 2]) / 3
    assert make.contrastive_loss(logits, truth).item() == pytest.approx(((to_text + to_image) / 2).item())


def test_chosen_patches_keep_the_class_token() -> None:
    choice = make.ChosenPatches()
    choice.chosen = torch.tensor([[3, 0], [1, 2]])
    tokens = torch.arange(2 * 5).reshape(2, 5, 1)  # CLS, then patches 0 to 3
    assert choice(tokens).squeeze(2).tolist() == [[0, 4, 1], [5, 7, 8]]


def test_the_patches_that_are_chosen_lie_on_the_shape(shipped: Shipped) -> None:
    lesson = make.draw_lesson(16, 12, (8, 8), shipped[1], np.random.default_rng(1))
    assert lesson.distance.shape == (16, 12)
    assert lesson.distance.median() < 1.2
    assert all(len(set(row)) == 12 for row in lesson.seen.tolist())


def test_a_few_steps_make_a_file_of_the_same_layout(tmp_path: Path) -> None:
    out = tmp_path / "toy.safetensors"
    make.main(["--steps", "2", "--batch-size", "4", "--warmup-steps", "1", "--out", str(out), "--threads", "1"])
    made, shipped = load_file(out), load_file(tiny.WEIGHTS)
    assert {name: value.shape for name, value in made.items()} == {name: v.shape for name, v in shipped.items()}
    assert sha256(out.read_bytes()).hexdigest() in (tmp_path / "RECORD.md").read_text(encoding="utf-8")


def test_frames_tell_places_but_their_average_does_not_tell_motions(shipped: Shipped) -> None:
    """On eight frames of a clip: a linear probe of all of them reads the motion, a linear probe of their mean cannot."""
    model, transform = shipped
    clips = plan_clips(12, seed=4)
    frames = [frame for clip in clips for frame in clip.draw(8, 64)]
    with torch.inference_mode():
        pixels = torch.stack([transform(Image.fromarray(frame)) for frame in frames])
        embedding = torch.cat([model.encode_image(part, normalize=True) for part in pixels.split(96)])
    embedding = embedding.reshape(len(clips), 8, -1).numpy()  # [V, T, E]
    labels = np.array([MOTIONS.index(clip.motion) for clip in clips])
    is_test = np.array([clip.split != "train" for clip in clips])
    assert linear_probe(embedding.reshape(len(clips), -1), labels, is_test) > 0.8
    assert linear_probe(embedding.mean(axis=1), labels, is_test) < 0.4


def linear_probe(features: np.ndarray, labels: np.ndarray, is_test: np.ndarray) -> float:
    """Ridge regression onto one-hot labels; accuracy on the test rows."""
    features = features - features[~is_test].mean(axis=0)
    kernel = features @ features[~is_test].T
    ridge = 0.01 * np.trace(kernel[~is_test]) / (~is_test).sum() * np.eye((~is_test).sum())
    weights = np.linalg.solve(kernel[~is_test] + ridge, np.eye(len(MOTIONS))[labels[~is_test]])
    return ((kernel[is_test] @ weights).argmax(axis=1) == labels[is_test]).mean()


def test_its_paths_are_had_without_torch() -> None:
    code = "import sys, coldframe.extract.tiny; sys.exit('torch' in sys.modules or 'open_clip' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
