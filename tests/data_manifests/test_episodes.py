from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from coldframe.data_manifests import ConfigError, EpisodeList, EpisodeSpec, ManifestError, draw_episodes

SIZES = (4, 9, 20, 7, 5, 30, 4)
IDS = [f"class{c}/video{i:02}.mp4" for c, n in enumerate(SIZES) for i in range(n)]
LABELS = [10 * c for c, n in enumerate(SIZES) for _ in range(n)]
SPEC = EpisodeSpec(n_way=5, n_shot=2, n_query=2, n_episodes=400, seed=7)


def one_at_a_time(ids: list[str], labels: list[int], spec: EpisodeSpec) -> list[list[tuple[int, list[str]]]]:
    """The textbook: take from a list what a random number points at; the same bits, none of the arrays."""
    videos = {label: sorted(v for v, c in zip(ids, labels, strict=True) if c == label) for label in sorted(set(labels))}
    n_each = spec.n_shot + spec.n_query
    stream = np.random.PCG64(spec.seed)
    episodes = []
    for _ in range(spec.n_episodes):
        bits = [int(b) for b in stream.random_raw(spec.n_way * (1 + n_each))]
        classes = list(videos)
        ways = [classes.pop(bits.pop(0) % len(classes)) for _ in range(spec.n_way)]
        episode = []
        for way in ways:
            left = list(videos[way])
            episode.append((way, [left.pop(bits.pop(0) % len(left)) for _ in range(n_each)]))
        episodes.append(episode)
    return episodes


@pytest.mark.parametrize("spec", [SPEC, EpisodeSpec(7, 1, 3, 50, seed=0), EpisodeSpec(2, 3, 1, 1, seed=2**63)])
def test_arrays_are_what_taking_one_at_a_time_gives(spec: EpisodeSpec) -> None:
    drawn = draw_episodes(IDS, LABELS, spec)
    for row, episode in enumerate(one_at_a_time(IDS, LABELS, spec)):
        assert drawn.class_ids[row].tolist() == [way for way, _ in episode]
        both = np.concatenate([drawn.support[row], drawn.query[row]], axis=-1)  # [W, K + Q]
        assert [[drawn.bank_ids[i] for i in way] for way in both.tolist()] == [videos for _, videos in episode]


def test_shapes_and_the_bank() -> None:
    drawn = draw_episodes(IDS, LABELS, SPEC)
    assert len(drawn) == 400
    assert drawn.class_ids.shape == (400, 5)
    assert drawn.support.shape == (400, 5, 2)
    assert drawn.query.shape == (400, 5, 2)
    assert drawn.bank_ids == tuple(sorted(IDS))
    assert {a.dtype for a in (drawn.class_ids, drawn.support, drawn.query)} == {np.dtype(np.int64)}


def test_classes_are_distinct_and_no_video_is_support_and_query() -> None:
    drawn = draw_episodes(IDS, LABELS, SPEC)
    label_of = dict(zip(IDS, LABELS, strict=True))
    of_row = np.array([label_of[v] for v in drawn.bank_ids])
    rows = np.concatenate([drawn.support, drawn.query], axis=-1)  # [n, W, K + Q]
    assert all(len(set(ways)) == 5 for ways in drawn.class_ids.tolist())
    assert all(len(set(np.ravel(episode))) == 5 * 4 for episode in rows)
    assert (of_row[rows] == drawn.class_ids[..., None]).all()


def test_the_list_is_the_same_tomorrow_and_elsewhere() -> None:
    drawn = draw_episodes(IDS, LABELS, SPEC)
    assert drawn.class_ids[0].tolist() == [30, 60, 10, 40, 20]
    assert drawn.support[0].tolist() == [[33, 38], [76, 78], [10, 11], [42, 44], [14, 17]]
    assert drawn.fingerprint == "44165bf0c46611d9"


def test_the_order_of_the_videos_does_not_matter() -> None:
    order = np.random.default_rng(0).permutation(len(IDS))
    shuffled = draw_episodes([IDS[i] for i in order], np.array(LABELS)[order], SPEC)
    assert shuffled.fingerprint == draw_episodes(IDS, LABELS, SPEC).fingerprint


def test_a_shorter_list_is_the_beginning_of_a_longer_one() -> None:
    long, short = draw_episodes(IDS, LABELS, SPEC), draw_episodes(IDS, LABELS, replace(SPEC, n_episodes=30))
    assert (long.support[:30] == short.support).all()
    assert (long.query[:30] == short.query).all()
    assert long.fingerprint != short.fingerprint


def test_fingerprint_changes_with_seed_and_bank() -> None:
    drawn = draw_episodes(IDS, LABELS, SPEC)
    assert draw_episodes(IDS, LABELS, replace(SPEC, seed=8)).fingerprint != drawn.fingerprint
    renamed = [*IDS[:-1], IDS[-1] + "x"]
    assert draw_episodes(renamed, LABELS, SPEC).fingerprint != drawn.fingerprint


def test_draws_are_uniform() -> None:
    spec = EpisodeSpec(n_way=3, n_shot=1, n_query=1, n_episodes=20_000, seed=1)
    drawn = draw_episodes(IDS, LABELS, spec)
    ways = Counter(drawn.class_ids.ravel().tolist())
    expected, deviation = 20_000 * 3 / 7, (20_000 * 3 / 7 * 4 / 7) ** 0.5
    assert all(abs(n - expected) < 5 * deviation for n in ways.values())
    for place in (drawn.support, drawn.query):  # of the class of 4, each video is a quarter, as support and as query
        few = Counter(place[drawn.class_ids == 0].ravel().tolist())
        n = sum(few.values())
        assert len(few) == 4
        assert all(abs(seen - n / 4) < 5 * (n * 3 / 16) ** 0.5 for seen in few.values())
    pairs = Counter(map(tuple, drawn.class_ids[:, :2].tolist()))  # order matters, and is uniform too
    assert len(pairs) == 42
    assert all(abs(seen - 20_000 / 42) < 5 * (20_000 / 42) ** 0.5 for seen in pairs.values())


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    drawn = draw_episodes(IDS, LABELS, SPEC)
    drawn.save(tmp_path / "episodes")
    assert [p.name for p in tmp_path.iterdir()] == ["episodes"]
    again = EpisodeList.load(tmp_path / "episodes")
    assert again.spec == drawn.spec
    assert again.bank_ids == drawn.bank_ids
    assert (again.class_ids == drawn.class_ids).all()
    assert (again.support == drawn.support).all()
    assert (again.query == drawn.query).all()
    assert again.fingerprint == drawn.fingerprint


def test_a_list_does_not_change(tmp_path: Path) -> None:
    drawn = draw_episodes(IDS, LABELS, SPEC)
    drawn.save(tmp_path / "e.npz")
    for episodes in (drawn, EpisodeList.load(tmp_path / "e.npz")):
        with pytest.raises(ValueError, match="read-only"):
            episodes.query[0, 0, 0] = 0


def rewritten(path: Path, **changes: object) -> Path:
    """A saved list in which some parts were replaced."""
    found = dict(np.load(path, allow_pickle=False))
    header = json.loads(found["header"].tobytes())
    for name, value in changes.items():
        if name in header:
            header[name] = value
        else:
            found[name] = np.asarray(value)
    found["header"] = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
    np.savez(path, **found)
    return path


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("query", "changed since it was written"),
        ("spec", "changed since it was written"),
        ("bank_ids", "changed since it was written"),
        ("format_version", "version 9"),
        ("cut", "not an episode list"),
        ("flipped", "not an episode list"),
        ("text", "not an episode list"),
        ("other", "not an episode list"),
        ("pickle", "not an episode list"),
    ],
)
def test_a_list_that_is_not_what_was_saved_is_refused(tmp_path: Path, change: str, words: str) -> None:
    path = tmp_path / "e.npz"
    drawn = draw_episodes(IDS, LABELS, SPEC)
    drawn.save(path)
    data = path.read_bytes()
    match change:
        case "query":
            query = drawn.query.copy()
            query[3, 2, 1] += 1
            rewritten(path, query=query)
        case "spec":
            rewritten(path, spec={"n_way": 5, "n_shot": 2, "n_query": 2, "n_episodes": 400, "seed": 8})
        case "bank_ids":
            rewritten(path, bank_ids=[*drawn.bank_ids[:-1], "another.mp4"])
        case "format_version":
            rewritten(path, format_version=9)
        case "cut":
            path.write_bytes(data[: len(data) // 2])
        case "flipped":
            path.write_bytes(data[:2000] + bytes(255 - b for b in data[2000:2100]) + data[2100:])
        case "text":
            path.write_text("episodes")
        case "other":
            np.savez(path, x=np.arange(3))
        case "pickle":
            np.savez(path, header=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ManifestError, match=words):
        EpisodeList.load(path)


def test_too_little_to_draw_from() -> None:
    with pytest.raises(ManifestError, match=r"class 0 \(4\), class 40 \(5\), class 60 \(4\).*expected 6 each"):
        draw_episodes(IDS, LABELS, EpisodeSpec(n_shot=5))
    names = {0: "run", 10: "sit", 20: "fly", 30: "dig", 40: "hop", 50: "nod", 60: "cut"}
    table = [names.get(label, "") for label in range(61)]
    with pytest.raises(ManifestError, match=r"run \(4\), hop \(5\), cut \(4\)"):
        draw_episodes(IDS, LABELS, EpisodeSpec(n_shot=5), table)
    with pytest.raises(ManifestError, match=r"too few classes.*found 7 classes.*expected 8 \(n_way\)"):
        draw_episodes(IDS, LABELS, EpisodeSpec(n_way=8))
    with pytest.raises(ManifestError, match="found 0 classes"):
        draw_episodes([], [], EpisodeSpec())


def test_videos_that_cannot_be_drawn() -> None:
    with pytest.raises(ManifestError, match=r"there twice: class0/video00\.mp4"):
        draw_episodes([*IDS, IDS[0]], [*LABELS, 0], SPEC)
    with pytest.raises(ManifestError, match=r"have none: zzz\.mp4"):
        draw_episodes([*IDS, "zzz.mp4"], [*LABELS, -1], SPEC)
    with pytest.raises(ValueError, match="zip"):
        draw_episodes(IDS, LABELS[:-1], SPEC)


@pytest.mark.parametrize("setting", [{"n_way": 1}, {"n_shot": 0}, {"n_query": 0}, {"n_episodes": 0}, {"seed": -1}])
def test_specs_that_draw_nothing(setting: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="cannot be drawn"):
        EpisodeSpec(**setting)
