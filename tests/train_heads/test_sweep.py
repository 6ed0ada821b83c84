"""A sweep: which runs it is made of, that they are the runs one would have alone, and what is said of them."""

import json
from dataclasses import replace

import pytest

from coldframe.data_manifests.errors import ConfigError, UnknownName
from coldframe.extract.batches import FeatureDataset
from coldframe.extract.store import FeatureStore
from coldframe.train_heads import pipeline, recipes
from coldframe.train_heads.heads.temporal_transformer import Config as TemporalConfig
from coldframe.train_heads.pipeline import train
from coldframe.train_heads.settings import Settings, settings, variants
from coldframe.train_heads.specs import TrainSpec
from coldframe.train_heads.sweep import run_name, sweep

SHORT = ("epochs=3", "batch_size=8", "val_fraction=0.25")


def run(store, manifest, folder, heads, *sets):
    return sweep(store, manifest, variants(heads, None, [*SHORT, *sets]), folder, device="cpu", quiet=True)


# ---- which runs


def test_every_combination_of_listed_values(tmp_path):
    (tmp_path / "recipe.toml").write_text("[head]\nlayers = [1, 2]\n[train]\nlr = [1e-3, 1e-4]\nepochs = 5\n")
    found = variants(["temporal_transformer"], tmp_path / "recipe.toml", ["seed=0,1", "epochs=7"])
    assert len(found) == 8
    assert {head for head, _ in found} == {"temporal_transformer"}
    asked = [(one.head.layers, one.train.lr, one.train.seed, one.train.epochs) for _, one in found]
    assert asked[:3] == [(1, 1e-3, 0, 7), (1, 1e-3, 1, 7), (1, 1e-4, 0, 7)]
    assert variants(["linear_probe"]) == [("linear_probe", settings("linear_probe"))]
    assert len(variants(["linear_probe"], None, ["lr=1e-3,0.001"])) == 1  # the same run


def test_each_head_takes_the_settings_that_it_has(tmp_path):
    heads = ["linear_probe", "temporal_transformer"]
    found = variants(heads, None, ["layers=1,2", "lr=0.1"])
    assert [(head, one.train.lr) for head, one in found] == [
        ("linear_probe", 0.1),
        *[("temporal_transformer", 0.1)] * 2,
    ]
    both = variants(["linear_probe", "trx"], None, ["batch_size=16"])  # one learns from videos, one from episodes
    assert [one.train.batch_size for _, one in both] == [16, 8]
    with pytest.raises(ConfigError, match="per_step"):
        variants(["trx"], None, ["batch_size=16"])
    with pytest.raises(UnknownName, match="layer"):
        variants(heads, None, ["layerz=1"])
    path = tmp_path / "recipe.toml"
    path.write_text('[head]\nname = "temporal_transformer"\ndropout = 0.5\n')
    assert [getattr(one.head, "dropout", None) for _, one in variants(heads, path)][1] == 0.5
    path.write_text("[head]\nlayers = 1\n")
    assert variants(heads, path)[1][1].head.layers == 1
    for text, error, words in (
        ("[head]\nlayerz = 1\n", UnknownName, "layerz"),
        ('[head]\nname = "linear_probe"\nlayers = 1\n', UnknownName, "layers"),
        ('[head]\nname = "evl_decoder"\n', ConfigError, "another head"),
        ("[train]\nlr = []\n", ConfigError, "empty list"),
        ("[train]\nlr = [1e-3, true]\n", ConfigError, "wrong type"),
        ("[episodes]\nn_shot = 5\n", ConfigError, "does not learn from episodes"),
    ):
        path.write_text(text)
        with pytest.raises(error, match=words):
            variants(heads, path)


def test_a_list_is_no_setting_of_one_run(tmp_path):
    with pytest.raises(ConfigError, match=r"wrong type; found '1e-3,1e-4'.*coldframe sweep"):
        settings("linear_probe", None, ["lr=1e-3,1e-4"])
    (tmp_path / "recipe.toml").write_text("[train]\nlr = [1e-3, 1e-4]\n")
    with pytest.raises(ConfigError, match="coldframe sweep"):
        settings("linear_probe", tmp_path / "recipe.toml")


def test_a_setting_that_is_a_list_takes_lists_of_lists(tmp_path, monkeypatch):
    (tmp_path / "heads_with_lists.py").write_text("")
    package = tmp_path / "coldframe_lists"
    package.mkdir()
    (package / "good.py").write_text(
        "from dataclasses import dataclass, replace\n"
        "from coldframe.train_heads.heads.linear_probe import HEAD as PROBE\n"
        "@dataclass(frozen=True)\nclass Config:\n    blocks: tuple[int, ...] = (1,)\n"
        "HEAD = replace(PROBE, config=Config)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    def blocks(toml=None, sets=()):
        return [one.head.blocks for _, one in variants(["coldframe_lists.good"], toml, sets)]

    assert blocks(sets=["blocks=1,2"]) == [(1, 2)]
    assert blocks(sets=["blocks=[1,2],[3]"]) == [(1, 2), (3,)]
    path = tmp_path / "recipe.toml"
    path.write_text("[head]\nblocks = [1, 2]\n")
    assert blocks(path) == [(1, 2)]
    path.write_text("[head]\nblocks = [[1, 2], [3]]\n")
    assert blocks(path) == [(1, 2), (3,)]
    assert run_name("coldframe_lists.good", variants(["coldframe_lists.good"], path)[0][1]).endswith(",blocks=1+2")


def test_a_run_is_named_by_what_differs_from_the_defaults():
    def name(*sets):
        return run_name("temporal_transformer", settings("temporal_transformer", None, sets))

    assert name() == "temporal_transformer"
    assert name("lr=1e-4", "layers=2", "decay_all=true") == "temporal_transformer,layers=2,lr=0.0001,decay_all=true"
    odd = Settings(TemporalConfig(), replace(TrainSpec(), precision="bf16", epochs=10**119))
    assert len(run_name("temporal_transformer", odd)) < 50


def test_a_recipe_of_the_package_can_be_swept():
    found = variants(["clip_fsar"], recipes.find("clip_fsar_hmdb51_1shot").path, ["lr=1e-4,1e-5", "n_shot=1,5"])
    assert [(one.train.lr, one.episodes.n_shot, one.train.batch_size) for _, one in found][1] == (1e-4, 5, 16)


# ---- training


HEADS = ("linear_probe", "attentive_pool", "temporal_transformer")  # the last has dropout
DEEP = ("ez_clip", "m2_clip", "clip_fsar", "trx")  # two of the tower, which they share; two of episodes, with dropout
SMALL = ("reach=-1", "n_way=3", "n_query=2", "episodes_per_epoch=10", "n_val_episodes=10", "per_step=5", "epochs=2")


@pytest.mark.parametrize(("heads", "sets"), [(HEADS, ("heads=2",)), (DEEP, SMALL)])
def test_each_run_is_the_run_alone(store, manifest, tmp_path, heads, sets):
    assert TemporalConfig().dropout > 0
    report = run(store, manifest, tmp_path / "sweep", heads, "lr=1e-2,1e-3", *sets)
    assert len(report.rows) == 2 * len(heads)
    for row in report.rows:
        found = row.checkpoint
        out = tmp_path / "alone" / row.folder.name
        alone = train(store, manifest, row.head, found.config, found.train, out, episodes=found.episodes, device="cpu")
        assert alone.fingerprint == found.fingerprint
        assert (alone.epoch, alone.scores, alone.needs) == (found.epoch, found.scores, found.needs)
        assert {path.name for path in row.folder.iterdir()} == {
            "checkpoint.json",
            "head.safetensors",
            "history.jsonl",
            "settings.toml",
        }
    assert len({row.checkpoint.fingerprint for row in report.rows}) == len(report.rows)


def test_the_cache_is_read_once_for_all(store, manifest, tmp_path, monkeypatch):
    reads, gather = [], FeatureStore.gather

    def watched(self, ids, names, *args, **kwargs):
        reads.append(tuple(names))
        return gather(self, ids, names, *args, **kwargs)

    monkeypatch.setattr(FeatureStore, "gather", watched)
    run(store, manifest, tmp_path / "one", ["linear_probe"])
    alone = len(reads)
    reads.clear()
    run(store, manifest, tmp_path / "all", HEADS, "lr=1e-2,1e-3", "heads=2")
    assert len(reads) == alone
    assert {frozenset(names) for names in reads} == {frozenset({"embedding", "cls.4", "tokens.4"})}
    reads.clear()
    run(store, manifest, tmp_path / "apart", ["linear_probe"], "seed=0,1", "batch_size=8,27", "lr=1e-2,1e-3")
    assert len(reads) == 3 * sum(4 + 1 + 1 + 1 if seed == 0 else 4 + 2 + 1 + 1 for seed in (0, 1))


def test_an_interrupted_sweep_goes_on_and_a_longer_one_trains_what_is_new(store, manifest, tmp_path, monkeypatch):
    whole = run(store, manifest, tmp_path / "whole", HEADS, "heads=2", "seed=0,1")
    batches, calls = FeatureDataset.batches, 0

    def interrupted(self, *args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 9:  # in the second epoch of the second pass
            raise KeyboardInterrupt
        return batches(self, *args, **kwargs)

    monkeypatch.setattr(FeatureDataset, "batches", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(store, manifest, tmp_path / "cut", HEADS, "heads=2", "seed=0,1")
    assert len(list((tmp_path / "cut").glob("*/checkpoint.json"))) == 3  # of the first pass
    monkeypatch.setattr(FeatureDataset, "batches", batches)
    resumed = run(store, manifest, tmp_path / "cut", HEADS, "heads=2", "seed=0,1")
    assert [row.checkpoint.fingerprint for row in resumed.rows] == [row.checkpoint.fingerprint for row in whole.rows]

    trained, fit = [], pipeline.fit
    monkeypatch.setattr(
        pipeline, "fit", lambda runs, *args, **kwargs: (trained.extend(runs), fit(runs, *args, **kwargs))
    )
    longer = run(store, manifest, tmp_path / "cut", HEADS, "heads=2", "seed=0,1,2")
    assert (len(longer.rows), len(trained)) == (9, 3)


def test_what_is_wrong_with_one_run_is_said_before_any_is_trained(store, manifest, tmp_path):
    with pytest.raises(ConfigError, match="share its width"):
        run(store, manifest, tmp_path / "sweep", ["linear_probe", "temporal_transformer"], "heads=2,7")
    assert not (tmp_path / "sweep").exists()
    train(store, manifest, "linear_probe", spec=TrainSpec(epochs=1), out=tmp_path / "run", device="cpu")
    with pytest.raises(ConfigError, match="folder of one run"):
        run(store, manifest, tmp_path / "run", ["linear_probe"])


# ---- the table


def test_the_report_is_sorted_and_marks_the_best(store, manifest, tmp_path):
    report = run(
        store, manifest, tmp_path / "sweep", ["linear_probe", "temporal_transformer"], "lr=1e-2,1e30", "heads=2"
    )
    scores = [row.checkpoint.scores["top_1"] for row in report.rows if row.checkpoint]
    assert scores == sorted(scores, reverse=True)
    assert [row.is_best for row in report.rows] == [True, *[False] * (len(report.rows) - 1)]
    assert report.n_diverged == sum(row.checkpoint is None for row in report.rows) >= 1
    assert report.rows[-1].checkpoint is None
    assert all(set(row.varied) == {"lr"} for row in report.rows)
    told = report.describe().splitlines()
    assert told[0].split("|")[1:4] == ["      ", " head                 ", " lr    "]
    assert told[2].startswith("| best | ")
    assert len({len(line) for line in told[: 2 + len(report.rows)]}) == 1
    assert "diverged at step" in told[-1]
    facts = json.loads(json.dumps(report.to_json()))
    assert facts["runs"][0]["best"]
    assert facts["runs"][0]["scores"]["top_1"] == scores[0]
    assert facts["runs"][-1]["error"]
    assert facts["n_diverged"] == report.n_diverged


def test_scores_of_other_videos_are_no_comparison(store, manifest, tmp_path):
    report = run(store, manifest, tmp_path / "sweep", ["linear_probe"], "seed=0,1", "lr=1e-2,1e-3")
    best = [row for row in report.rows if row.is_best]
    assert {row.validated_on for row in best} == {
        "8 val videos, carved with seed 0",
        "9 val videos, carved with seed 1",  # the video that the store lacks is one of the others
    }
    records = tuple(replace(r, split="val") if r.video_id.endswith("03.mp4") else r for r in manifest.records)
    report = run(store, replace(manifest, records=records), tmp_path / "given", ["linear_probe"], "seed=0,1")
    assert [row.is_best for row in report.rows] == [True, False]
