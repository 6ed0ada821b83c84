"""EZ-CLIP against recordings of the original, its counted sizes, and what it must not change."""

import json
from dataclasses import replace
from math import prod
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import normalize

from coldframe.cli import main
from coldframe.data_manifests import Manifest, VideoRecord
from coldframe.data_manifests.drawn import plan_clips
from coldframe.data_manifests.errors import ConfigError
from coldframe.extract import FeatureStore
from coldframe.extract.batches import FeatureBatch, FeatureDataset
from coldframe.extract.blocks import Insert
from coldframe.extract.frames import write_video
from coldframe.extract.specs import SpecMismatch
from coldframe.extract.summary import pack, summarise
from coldframe.extract.towers import Tower, load_tower
from coldframe.train_heads.checkpoint import load_checkpoint, trained_tensors
from coldframe.train_heads.heads.ez_clip import HEAD, Config
from coldframe.train_heads.losses import motion_loss, same_class_contrastive
from coldframe.train_heads.specs import HeadContext

CLASSES = ("brush_hair", "jump", "swim")
POSITIONS = "visual.temporal_embedding"


@pytest.fixture(scope="module")
def tower() -> Tower:
    return load_tower("coldframe-tiny", "random", device="cpu", seed=3)


@pytest.fixture(scope="module")
def batch(tower: Tower) -> FeatureBatch:
    """Four videos of three frames: pixels, and every layer of the frozen tower."""
    generator = torch.Generator().manual_seed(0)
    side = tower.spec.transform.size_px
    pixels = torch.randint(0, 256, (4, 3, 3, side, side), dtype=torch.uint8, generator=generator)
    names = ["embedding", *(f"{kind}.{k}" for k in range(5) for kind in ("tokens", "cls"))]
    features = {name: x.unflatten(0, (4, 3)) for name, x in tower.encode_frames(pixels.flatten(0, 1), names).items()}
    mask = torch.ones(4, 3, dtype=torch.bool)
    return FeatureBatch(features | {"pixels": pixels}, mask, torch.tensor([0, 2, 1, 0]), ("",) * 4)


def build(tower: Tower, n_frames: int = 3, names: tuple[str, ...] = CLASSES, **settings: Any) -> Any:
    torch.manual_seed(0)
    return HEAD.build(Config(**settings), HeadContext(tower.shape, n_frames, names, lambda: tower)).eval()


def perturbed(head: Any) -> Any:
    """The head with every trained tensor away from where it starts."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return head


# ---- against the original


def test_recorded_outputs(recorded, monkeypatch):
    for rec in recorded("EZ-CLIP"):
        weights, tower, frames = rec.named("head."), rec.tower, rec["frames"]
        names = tuple(f"class {i}" for i in range(len(rec["token_ids"])))
        context = HeadContext(tower.shape, frames.shape[1], names, lambda tower=tower: tower)
        monkeypatch.setattr(tower, "normalise", lambda frames: frames)  # recorded after it
        monkeypatch.setattr(tower, "tokenize", lambda texts, rec=rec: rec["token_ids"][: len(texts)])

        config, state = HEAD.official.read(weights, context, Config())
        assert config.temporal_embedding == bool(weights[POSITIONS].any())
        assert config.reach == 0
        head: Any = HEAD.build(config, context).eval()
        assert head.load_state_dict(state, strict=True)
        mask = torch.ones(frames.shape[:2], dtype=torch.bool)
        batch = FeatureBatch({"pixels": frames}, mask, torch.zeros(len(frames), dtype=torch.long), ("",) * len(frames))

        close = {"atol": 1e-4, "rtol": 1e-4}
        with torch.no_grad():
            found, output, texts = head.frames(batch), head(batch), head.texts.all()[:, 0]
            torch.testing.assert_close(found, rec["frame_embedding"], **close)
            torch.testing.assert_close(output.embedding, rec["video_embedding"], **close)
            torch.testing.assert_close(texts, rec["text_embedding"], **close)
            torch.testing.assert_close(motion_loss(found, mask), rec["motion_loss"], **close)
            video, labels = rec["loss.video_embedding"], rec["loss.labels"].long()
            cosine = normalize(video, dim=-1) @ normalize(head.texts.of(labels), dim=-1).T
            torch.testing.assert_close(same_class_contrastive(100 * cosine, labels), rec["loss.contrastive"], **close)
            wanted = normalize(rec["video_embedding"], dim=-1) @ normalize(rec["text_embedding"], dim=-1).T
            torch.testing.assert_close(output.logits, tower.logit_scale * wanted, **close)

        written = HEAD.official.write(config, trained_tensors(head))
        assert written.keys() == weights.keys()
        assert all(torch.equal(written[name], weights[name]) for name in weights)


@pytest.mark.parametrize(
    ("layers", "width", "text_width", "prompts", "exact"),
    [
        (12, 768, 512, True, 5_204_736),
        (12, 768, 512, False, 5_204_736 - 73_728),
        (24, 1024, 768, True, 24 * 525_568 + 12 * 295_872 + 24 * 8 * 1024),
    ],
)
def test_parameter_counts_of_the_published_models(tower, layers, width, text_width, prompts, exact):
    shape = replace(tower.shape, layers=layers, width=width, text_width=text_width, text_layers=12)
    head = HEAD.build(Config(prompts=prompts), HeadContext(shape, 8, CLASSES, lambda: tower))
    count = sum(prod(parameter.shape) for parameter in head.parameters())
    assert count == exact
    assert layers == 12 or f"{count / 1e6:.2f}" == "16.36"


# ---- what it is at first, and where it may start


def test_without_its_token_it_starts_as_the_frozen_clip(tower, batch):
    head = build(tower, prompts=False)
    torch.testing.assert_close(head.frames(batch), batch["embedding"], atol=1e-5, rtol=1e-5)
    wanted = tower.encode_text([f"a video of a person {name}." for name in ("brush hair", "jump", "swim")])
    torch.testing.assert_close(head.texts.all()[:, 0], wanted, atol=1e-5, rtol=1e-5)
    with_token = build(tower).frames(batch)
    assert not torch.allclose(with_token, batch["embedding"], atol=1e-4)  # its token takes part of the attention


@pytest.mark.parametrize("temporal_adapters", [False, True])
def test_blocks_below_its_reach_are_a_constant_of_the_frame(tower, batch, temporal_adapters):
    """From tokens.2 it is what it is from pixels when the blocks below are left as they are."""
    settings = {"temporal_adapters": temporal_adapters, "prompts": not temporal_adapters}
    head = perturbed(build(tower, reach=2, **settings))
    assert HEAD.needs(head.config) == ("tokens.2", "names")
    assert len(head.image) == 2
    tokens = tower.resume(tower.start(batch["pixels"]), 0, inserts=head.image, mask=batch.mask)
    torch.testing.assert_close(head.frames(batch), tower.project(tokens), atol=1e-5, rtol=1e-5)
    counted_from_the_end = perturbed(build(tower, reach=-3, **settings))
    assert torch.equal(counted_from_the_end.frames(batch), head.frames(batch))


def test_behind_the_tower_only_texts_are_trained(tower, batch):
    head = build(tower, reach=-1).train()
    assert HEAD.needs(head.config) == ("cls.-1", "names")
    assert not len(head.image)
    torch.testing.assert_close(head.frames(batch), batch["embedding"], atol=1e-5, rtol=1e-5)
    sum(head(batch).losses.values()).backward()


@pytest.mark.parametrize("settings", [{}, {"prompts": False, "temporal_adapters": True}])
def test_frames_know_of_each_other_only_through_attention_along_time(tower, batch, settings):
    other = replace(batch, features={"pixels": batch["pixels"].clone()})
    other["pixels"][:, 2] = 255 - other["pixels"][:, 2]
    head = perturbed(build(tower, **settings))
    first, changed = (head.frames(one)[:, 0] for one in (batch, other))
    assert not torch.allclose(first, changed, atol=1e-4)
    masked = replace(batch, mask=torch.tensor([True, True, False]).expand(4, 3))
    first, changed = (head.frames(replace(one, mask=masked.mask))[:, :2] for one in (batch, other))
    torch.testing.assert_close(first, changed, atol=1e-6, rtol=0)


def test_the_order_of_frames_is_felt_through_the_prompts_alone(tower, batch):
    backwards = replace(batch, features={"pixels": batch["pixels"].flip(1)})
    head = perturbed(build(tower))
    assert not torch.allclose(head(batch).logits, head(backwards).logits, atol=1e-4)
    with torch.no_grad():
        for insert in head.image:
            insert.prompt.copy_(insert.prompt[:1].expand_as(insert.prompt))
    torch.testing.assert_close(head(batch).logits, head(backwards).logits, atol=1e-4, rtol=1e-4)


def test_a_prompt_in_the_first_changed_block_alone(tower, batch):
    head = build(tower, reach=1, deep=False)
    assert [insert.prompt is not None for insert in head.image] == [True, False, False]
    assert head.image[0].prompt.shape == (3, tower.shape.width)
    assert head.image[0].prompt.abs().max() <= (6 / (768 + tower.shape.width)) ** 0.5
    assert head(batch).logits.isfinite().all()


# ---- training


def test_a_training_step_publishes_its_losses_and_no_scores(tower, batch):
    head = build(tower, drop_path=0.0, prompt_dropout=0.0, motion_weight=0.5).train()
    output = head(batch)
    assert output.logits is None
    frames = head.frames(batch)
    video, texts = frames.mean(dim=1), head.texts.all()[batch.labels, 0]
    similarity = tower.logit_scale * normalize(video, dim=-1) @ normalize(texts, dim=-1).T
    contrastive = same_class_contrastive(similarity, batch.labels)
    torch.testing.assert_close(output.losses["contrastive"], contrastive, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(output.losses["motion"], 0.5 * motion_loss(frames, batch.mask))


def test_every_parameter_learns_from_the_losses(tower, batch):
    head = perturbed(build(tower)).train()
    sum(head(batch).losses.values()).backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


def test_a_few_steps_fit_four_videos(tower, batch):
    """The losses fall, and the videos are recognised."""
    head = build(tower, reach=2, drop_path=0.0, prompt_dropout=0.0, checkpoint=True).train()
    optimiser = torch.optim.AdamW(head.parameters(), lr=3e-3)
    seen = []
    for _ in range(40):
        loss = sum(head(batch).losses.values())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        seen.append(float(loss.detach()))
    assert seen[-1] < 0.7 * seen[0]
    assert torch.equal(head.eval()(batch).logits.argmax(dim=1), batch.labels)


def test_checkpointing_changes_no_gradient(tower, batch):
    gradients = []
    for checkpoint in (False, True):
        head = perturbed(build(tower, checkpoint=checkpoint)).train()
        torch.manual_seed(7)
        loss = sum(head(batch).losses.values())
        gradients.append(torch.autograd.grad(loss, list(head.parameters())))
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)


def test_branches_are_dropped_more_and_more_and_only_in_training(tower, batch):
    head = build(tower, drop_path=0.3)
    rates = [insert.drop_path.rate for insert in head.image]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])
    assert [i.drop_path.rate for i in head.texts.inserts] == pytest.approx(rates[: tower.shape.text_layers])
    assert [i.drop_path.rate for i in build(tower, drop_path=0.3, reach=-2).image] == pytest.approx([0.3])
    assert torch.equal(head(batch).logits, head(batch).logits)
    head.train()
    assert not torch.equal(head.frames(batch), head.frames(batch))


def test_autocast(tower, batch):
    head = perturbed(build(tower))
    exact = head(batch).embedding
    with torch.autocast("cpu", torch.bfloat16):
        rounded = head(batch).embedding
        losses = head.train()(batch).losses
        sum(losses.values()).backward()
    assert 0 < (rounded - exact).abs().max() < 0.1 * exact.abs().max()
    assert all(loss.dtype == torch.float32 for loss in losses.values())


# ---- texts


def test_scores_of_sixteen_sentences_are_their_mean_probabilities(tower, batch):
    head = perturbed(build(tower, template="actionclip"))
    assert head.texts.all().shape == (3, 16, tower.shape.embed_dim)
    output = head(batch)
    each = normalize(output.embedding, dim=-1) @ normalize(head.texts.all(), dim=-1).permute(1, 2, 0)
    wanted = (tower.logit_scale * each).softmax(dim=-1).mean(dim=0)
    torch.testing.assert_close(output.logits.exp(), wanted, atol=1e-5, rtol=1e-4)
    sum(head.train()(batch).losses.values()).backward()


def test_descriptions_stand_in_the_place_of_the_template(tower, tmp_path):
    path = tmp_path / "texts.csv"
    path.write_text(
        'SNo, Class Name, description\n0, Jump, "to jump, high"\n1, Brush Hair, hair is brushed\n2,swim,to swim\n'
    )
    head = build(tower, descriptions=str(path))
    wanted = tower.encode_text(["hair is brushed", "to jump, high", "to swim"])
    torch.testing.assert_close(head.texts.all()[:, 0], wanted, atol=1e-5, rtol=1e-5)
    with pytest.raises(ConfigError, match="wave"):
        build(tower, names=(*CLASSES, "wave"), descriptions=str(path))


# ---- settings and checkpoints


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"temporal_adapters": True}, "in the place of prompts"),
        ({"adapter_ratio": 0}, "adapter_ratio"),
        ({"motion_weight": -1.0}, "motion_weight"),
        ({"drop_path": 1.0}, "drop_path"),
        ({"prompt_dropout": -0.1}, "prompt_dropout"),
        ({"template": "a video"}, "no class name"),
    ],
)
def test_what_cannot_be_built_is_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        Config(**settings)


def test_more_frames_than_the_prompt_has_are_refused(tower, batch):
    with pytest.raises(SpecMismatch, match="more frames"):
        build(tower, n_frames=2)(batch)
    assert build(tower, n_frames=5)(batch).logits.isfinite().all()  # padded to the longest of a batch


@pytest.mark.parametrize(
    "settings",
    [{}, {"deep": False}, {"prompts": False}, {"prompts": False, "temporal_adapters": True}, {"adapter_ratio": 8}],
)
def test_official_names_there_and_back(tower, settings):
    head = perturbed(build(tower, **settings))
    context = HeadContext(tower.shape, 3, CLASSES, lambda: tower)
    weights = HEAD.official.write(head.config, trained_tensors(head))
    config, state = HEAD.official.read(weights, context, Config(motion_weight=0.5))
    assert config == Config(motion_weight=0.5, **settings)
    assert state.keys() == trained_tensors(head).keys()
    assert all(torch.equal(state[name], value) for name, value in trained_tensors(head).items())


def test_official_prompts_are_stretched_to_the_frames_of_the_store(tower):
    head = build(tower, n_frames=2)
    with torch.no_grad():
        head.image[0].prompt.copy_(torch.tensor([[0.0], [1.0]]).expand(2, tower.shape.width))
    weights = HEAD.official.write(head.config, trained_tensors(head))
    _, state = HEAD.official.read(weights, HeadContext(tower.shape, 4, CLASSES, lambda: tower), Config())
    torch.testing.assert_close(state["image.0.prompt"][:, 3], torch.tensor([0, 0.25, 0.75, 1]))
    build(tower, n_frames=4).load_state_dict(state)


def test_official_weights_that_are_not_these_are_named(tower):
    context = HeadContext(tower.shape, 3, CLASSES, lambda: tower)
    head = build(tower)
    weights = HEAD.official.write(head.config, trained_tensors(head))
    weights[f"{POSITIONS}.x"] = weights.pop("transformer.resblocks.1.Adapter.D_fc2.bias")
    with pytest.raises(SpecMismatch, match=r"missing transformer\.resblocks\.1.*unknown visual\.temporal_embedding\.x"):
        HEAD.official.read(weights, context, Config())
    with pytest.raises(ConfigError, match="every block"):
        HEAD.official.write(Config(reach=2), {})


def test_frames_are_shifted_by_their_own_place_in_videos_shorter_than_the_heads(tower, batch):
    """Four videos of three frames are twelve, which six places would share out otherwise."""
    head = build(tower, n_frames=6, temporal_embedding=True)
    head.offset.copy_(torch.randn_like(head.offset))
    shorter = build(tower, n_frames=3, temporal_embedding=True)
    state = {name: tensor[:3] if tensor.shape[:1] == (6,) else tensor for name, tensor in head.state_dict().items()}
    shorter.load_state_dict(state)
    with torch.no_grad():
        found, wanted = head.frames(batch), shorter.frames(batch)
    torch.testing.assert_close(found, wanted)
    with pytest.raises(SpecMismatch, match="more frames than the head"):
        build(tower, n_frames=2, prompts=False, temporal_embedding=True).frames(batch)


def test_shifts_of_frames_are_written_without_prompts_too(tower):
    head = build(tower, prompts=False, temporal_embedding=True)
    head.offset.fill_(0.5)
    weights = HEAD.official.write(head.config, trained_tensors(head))
    config, state = HEAD.official.read(weights, HeadContext(tower.shape, 3, CLASSES, lambda: tower), Config())
    assert (config.prompts, config.temporal_embedding) == (False, True)
    assert torch.equal(state["offset"], head.offset)


def test_the_frozen_tower_is_not_the_heads(tower):
    assert not any("resblocks" in name for name in build(tower).state_dict())
    assert all(isinstance(parameter, nn.Parameter) for parameter in build(tower).parameters())


# ---- the last block without its patches


def with_summary(tower: Tower, batch: FeatureBatch, dtype: torch.dtype = torch.float32) -> FeatureBatch:
    summary = pack(summarise(batch["tokens.3"], tower.block(4)))
    return replace(batch, features={"summary.3": summary.to(dtype), "tokens.3": batch["tokens.3"].to(dtype)})


@pytest.mark.parametrize("prompts", [True, False])
@pytest.mark.parametrize("is_training", [True, False])
def test_compact_features_are_the_tokens(tower, batch, prompts, is_training):
    """Forward, losses and every gradient, with branches dropped and a padded frame."""
    both = with_summary(tower, batch)
    both = replace(both, mask=torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 1, 1]], dtype=torch.bool))
    settings = {"reach": -2, "prompts": prompts, "drop_path": 0.3}
    results = []
    for compact in (False, True):
        head = perturbed(build(tower, compact=compact, **settings)).train(is_training)
        torch.manual_seed(11)
        output = head(both)
        frames = head.eval().frames(both)
        loss = sum(output.losses.values()) if is_training else output.logits.square().sum()
        results.append((frames, output.embedding, *torch.autograd.grad(loss, list(head.parameters()))))
    assert HEAD.needs(Config(compact=True, **settings)) == ("summary.-2", "names")
    for tokens, summary in zip(*results, strict=True):
        scale = tokens.abs().max().clamp_min(1)
        torch.testing.assert_close(summary / scale, tokens / scale, atol=1e-5, rtol=1e-5)
    assert results[0][2].any()


def test_compact_features_of_sixteen_bits(tower, batch):
    head = perturbed(build(tower, compact=True, reach=-2))
    exact = head.frames(with_summary(tower, batch))
    rounded = head.frames(with_summary(tower, batch, torch.float16).to("cpu", torch.float32))
    assert 0 < (rounded - exact).abs().max() < 2e-3 * exact.abs().max()


def test_compact_features_train_under_autocast(tower, batch):
    head = perturbed(build(tower, compact=True, reach=-2)).train()
    with torch.autocast("cpu", torch.bfloat16):
        sum(head(with_summary(tower, batch)).losses.values()).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in head.parameters())


@pytest.mark.parametrize(
    "settings", [{"reach": 0}, {"reach": -3}, {"reach": -2, "prompts": False, "temporal_adapters": True}]
)
def test_compact_features_suit_the_last_block_alone(settings):
    with pytest.raises(ConfigError, match="reach=-2"):
        Config(compact=True, **settings)


def test_it_trains_from_a_store_and_scores_classes_it_never_saw(tmp_path, capsys):
    """By the commands a user types; the compact features of a real float16 store say what its pixels say."""

    def coldframe(*arguments: object) -> dict[str, Any]:
        with pytest.raises(SystemExit) as left:
            main([str(a) for a in (*arguments, "--json")])
        out, err = capsys.readouterr()
        assert not left.value.code, err
        return json.loads(out)

    names = ("left", "right", "star")
    records = []
    for number, clip in enumerate(plan_clips(4)[:12]):
        write_video(tmp_path / "videos" / f"{number}.mp4", clip.draw(n_frames=8, size_px=64), fps=12)
        split = ("train", "train", "val", "test")[number % 4]
        records.append(VideoRecord(f"{number}.mp4", f"{number}.mp4", number // 4, split))
    Manifest("drawn", str(tmp_path / "videos"), names, tuple(records)).write(tmp_path / "m.csv")
    store, run = tmp_path / "store", tmp_path / "run"
    coldframe("extract", tmp_path / "m.csv", "--store", store, "--model", "coldframe-tiny", "--frames", "3",
              "--workers", "1", "--features", "pixels,summary.-2", "--quiet")  # fmt: skip
    coldframe("train-head", "ez_clip", "--store", store, "--out", run, "--set", "compact=true", "--set", "reach=-2",
              "--set", "epochs=2", "--quiet")  # fmt: skip

    opened = FeatureStore.open(store)
    compact: Any = load_checkpoint(run).predictor(opened, device="cpu").module
    from_pixels: Any = HEAD.build(
        replace(compact.config, reach=0, compact=False), HeadContext(opened.shape, 3, names, lambda: compact.tower)
    ).eval()
    from_pixels.image = nn.ModuleList([Insert(), Insert(), Insert(), *compact.image])
    from_pixels.texts = compact.texts
    data = (
        FeatureDataset(opened, opened.ids, [0] * len(opened.ids), ["pixels", "summary.-2"])
        .all()
        .to("cpu", torch.float32)
    )
    wanted = from_pixels.frames(data)
    assert (compact.frames(data) - wanted).abs().max() < 2e-3 * wanted.abs().max()

    unseen = load_checkpoint(run).predictor(opened, ("falling", "rising"), device="cpu")
    assert unseen.logits(data).shape == (12, 2)
    assert unseen.uses_class_names
    result = coldframe("eval", "closed_set", "--store", store, "--checkpoint", run, "--results", tmp_path / "r.jsonl")
    assert result["n"] == 3
