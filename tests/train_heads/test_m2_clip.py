"""M2-CLIP against recordings of the published code, against frozen CLIP, and against itself computed otherwise."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from einops import rearrange
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from torch.nn.functional import cross_entropy, normalize

from coldframe.data_manifests.errors import ConfigError
from coldframe.extract.batches import FeatureBatch
from coldframe.extract.specs import SpecMismatch
from coldframe.extract.text_tower import TextTower
from coldframe.extract.towers import Tower
from coldframe.train_heads import heads
from coldframe.train_heads.checkpoint import trained_tensors
from coldframe.train_heads.losses import same_class_contrastive
from coldframe.train_heads.masked_words import masked_word_loss
from coldframe.train_heads.optim import build_optimiser
from coldframe.train_heads.reach import Reach
from coldframe.train_heads.specs import HeadContext, TrainSpec

HEAD = heads.find("m2_clip")
CLASSES = ("ApplyEyeMakeup", "jump", "swim back", "wave")
OFFICIAL: Any = HEAD.official
EXACT: Any = {"atol": 1e-5, "rtol": 1e-5}
RECORDED: Any = {"atol": 1e-4, "rtol": 1e-4}


@pytest.fixture(scope="module")
def tower() -> Tower:
    torch.manual_seed(3)
    vision = CLIPVisionCfg(layers=4, width=32, head_width=8, patch_size=4, image_size=12)
    text = CLIPTextCfg(width=16, heads=2, layers=3)
    return Tower(CLIP(16, vision, text, quick_gelu=True), device="cpu")


@pytest.fixture
def build(tower):
    """A head of the small tower; `moved` puts its weights away from where they start."""

    def built(moved=True, names=CLASSES, trained=(), **settings):
        torch.manual_seed(0)
        context = HeadContext(tower.shape, 4, tuple(names), lambda: tower, tuple(trained))
        module = HEAD.build(HEAD.config(width=8, **settings), context).eval()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter) * moved)
        return module

    return built


@pytest.fixture
def batch(tower):
    """Three videos of four frames, with every feature that a reach asks for."""
    pixels = torch.randint(0, 256, (3, 4, 3, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    found = tower.encode_frames(pixels.flatten(0, 1), ["tokens.0", "tokens.2", "tokens.3", "cls.4", "embedding"])
    features = {name: rearrange(tensor, "(b t) ... -> b t ...", b=3) for name, tensor in found.items()}
    mask = torch.ones(3, 4, dtype=torch.bool)
    return FeatureBatch(features | {"pixels": pixels}, mask, torch.tensor([0, 2, 2]), ("a", "b", "c"))


# The published code


def words_as_tokens(texts):
    """A tokenizer of 512 ids for recordings, which have token ids and no words."""
    ids = torch.zeros(len(texts), 77, dtype=torch.long)
    for row, text in zip(ids, texts, strict=True):
        inside = [1 + sum(map(ord, word)) % 500 for word in text.lower().split()]
        row[: len(inside) + 2] = torch.tensor([510, *inside, 511])
    return ids


@pytest.fixture
def published(recorded, monkeypatch):
    """(recording, head with its weights, its tokens as a batch) of every recording."""
    found = []
    for rec in recorded("M2-CLIP"):
        monkeypatch.setattr(rec.tower, "tokenize", words_as_tokens)
        names = tuple(f"class number{i}" for i in range(rec.sizes["classes"]))
        context = HeadContext(rec.tower.shape, rec.sizes["T"], names, lambda rec=rec: rec.tower)
        config, state = OFFICIAL.read(rec.named("head."), context, HEAD.config())
        module: Any = HEAD.build(config, context).eval()
        assert trained_tensors(module).keys() == state.keys()
        module.load_state_dict(state, strict=False)
        module.reach = replace(module.reach, feature="tokens.0")
        module.decoder.tower = TextTower(with_fusion_block(rec), "recorded")
        frames = rearrange(rec["frames"], "b c t h w -> (b t) c h w")
        tokens = rec.tower.encode_images(frames, ["tokens.0"])["tokens.0"]
        mask = torch.ones(rec.sizes["B"], rec.sizes["T"], dtype=torch.bool)
        features = {"tokens.0": rearrange(tokens, "(b t) s d -> b t s d", b=rec.sizes["B"])}
        found.append((rec, module, FeatureBatch(features, mask, mask.sum(1), tuple("v" * len(mask)))))
    return found


def whole(module, ids):
    """Every token of sentences [B, S] behind the last text block, [B, S, D_t]."""
    return module.sentences.read(ids, torch.arange(ids.shape[1]).expand_as(ids))


def with_fusion_block(rec):
    """The recorded CLIP, its last text block replaced by the recorded fusion block, which has weights of its own there."""
    model = copy.deepcopy(rec.tower.model)
    block = model.transformer.resblocks[-1]
    fusion = rec.named(f"head.transformer.resblocks.{rec.sizes['text_layers']}.")
    block.load_state_dict({name: fusion[name] for name in block.state_dict()})
    return model


@torch.no_grad()
def test_videos_are_the_recorded_ones(published):
    for rec, module, batch in published:
        classes = module.class_tokens(batch, None)
        torch.testing.assert_close(module.embed_frames(classes, None), rec["frame_embedding"], **RECORDED)
        torch.testing.assert_close(module(batch).embedding, rec["video_embedding"], **RECORDED)
        torch.testing.assert_close(module.classify(classes.mean(dim=1)), rec["class_logits"], **RECORDED)


@torch.no_grad()
def test_texts_are_the_recorded_ones(published):
    for rec, module, _ in published:
        stream = whole(module, rec["token_ids"])
        torch.testing.assert_close(stream, rec["text_hidden"], **RECORDED)
        embedding = module.tower.text.project(stream, rec["token_ids"].argmax(dim=-1))
        torch.testing.assert_close(embedding, rec["text_embedding"], **RECORDED)


@torch.no_grad()
def test_words_are_the_recorded_ones(published):
    for rec, module, _ in published:
        ids = rec["token_ids"][: rec.sizes["B"]]
        logits = module.decoder(whole(module, ids), rec["frame_embedding"], None)
        torch.testing.assert_close(logits, rec["mlm_logits"], **RECORDED)
        torch.testing.assert_close(masked_word_loss(logits, rec["mlm_labels"]), rec["mlm_loss"], **RECORDED)


def test_checkpoints_are_written_as_they_were_read(published):
    for rec, module, _ in published:
        fusion = f"transformer.resblocks.{rec.sizes['text_layers']}."
        theirs = rec.named("head.")
        expected = {n: t for n, t in theirs.items() if "adapter" in n or not n.startswith(fusion)}
        written = OFFICIAL.write(module.config, trained_tensors(module))
        assert written.keys() == expected.keys()
        assert all(torch.equal(written[name], expected[name]) for name in expected)


def test_sizes_of_a_checkpoint_become_the_config(published):
    for rec, module, _ in published:
        sizes = rec.sizes
        assert module.config.width == sizes["adapter_width"]
        assert module.config.n_words == sizes["mlm_vocabulary"]
        assert module.config.text_layers == sizes["text_adapter_layers_counting_the_cross_block"] - 1
        assert module.config.places == "mlp"
        assert module.config.reach == 0


@pytest.mark.parametrize("settings", [{"places": "both"}, {"reach": -1}, {"reach": 2, "text_layers": 2}])
def test_other_forms_have_their_names_too(build, tower, settings):
    """Written and read again, a checkpoint tells its form."""
    module = build(**settings)
    context = HeadContext(tower.shape, 4, CLASSES, lambda: tower)
    state = trained_tensors(module)
    config, read = OFFICIAL.read(OFFICIAL.write(module.config, state), context, HEAD.config())
    again: Any = HEAD.build(config, context)
    assert again.reach == module.reach
    assert config.places == module.config.places
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], state[name]) for name in state)


def test_a_checkpoint_of_something_else_is_refused(build, tower):
    module = build()
    weights = OFFICIAL.write(module.config, trained_tensors(module))
    del weights["visual.t_adapter.conv.bias"]
    context = HeadContext(tower.shape, 4, CLASSES, lambda: tower)
    with pytest.raises(SpecMismatch, match=r"missing visual\.t_adapter\.conv\.bias"):
        OFFICIAL.read(weights, context, HEAD.config())


# Frozen CLIP


@pytest.mark.parametrize("places", ["mlp", "both"])
@pytest.mark.parametrize("reach", [0, 2, -1])
@torch.no_grad()
def test_untrained_it_is_frozen_clip(build, batch, tower, reach, places):
    module = build(moved=False, reach=reach, places=places)
    texts = tower.encode_text([f"A video of {name}" for name in ("apply eye makeup", *CLASSES[1:])])
    frames = module.embed_frames(module.class_tokens(batch, None), None)
    torch.testing.assert_close(frames, batch["embedding"], **EXACT)
    torch.testing.assert_close(module.sentences(), texts, **EXACT)
    expected = tower.logit_scale * normalize(batch["embedding"].mean(dim=1), dim=-1) @ normalize(texts, dim=-1).T
    torch.testing.assert_close(module(batch).logits, expected, atol=1e-4, rtol=1e-4)


def test_the_published_draw_of_text_adapters_is_not(build, tower):
    frozen = tower.encode_text(["A video of jump"])[0]
    original = build(moved=False, text_init="original").sentences()[1]
    assert (original - frozen).norm() > 0.01 * frozen.norm()


# The same, computed otherwise


@pytest.mark.parametrize("places", ["mlp", "both"])
@pytest.mark.parametrize("layer", [2, 3])
def test_from_the_middle_it_is_the_same_as_from_pixels(build, batch, layer, places):
    """With adapters in the blocks above k alone, tokens.k, tokens.0 and pixels say the same; so do gradients."""
    middle = build(reach=layer, places=places)
    outputs = {}
    for feature in ("pixels", "tokens.0", f"tokens.{layer}"):
        reach = middle.reach if feature == f"tokens.{layer}" else Reach(0, middle.reach.n_blocks, feature)
        module = build(reach=layer, places=places)
        module.reach = reach
        output = module(batch)
        output.logits.square().sum().backward()
        outputs[feature] = (
            output.embedding.detach(),
            [p.grad for p in module.visual.parameters() if p.grad is not None],
        )
    for feature in ("pixels", "tokens.0"):
        torch.testing.assert_close(outputs[feature][0], outputs[f"tokens.{layer}"][0], **EXACT)
        for grad, expected in zip(outputs[feature][1], outputs[f"tokens.{layer}"][1], strict=True):
            torch.testing.assert_close(grad, expected, atol=1e-4 * float(expected.abs().max() + 1), rtol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"text_layers": 2}, {"places": "both"}])
def test_kept_texts_are_those_of_a_whole_pass(build, tower, settings):
    module = build(**settings)
    ids = tower.tokenize([f"A video of {name}" for name in ("apply eye makeup", *CLASSES[1:])])
    expected = tower.text.project(whole(module, ids), ids.argmax(dim=-1))
    torch.testing.assert_close(module.sentences(), expected, **EXACT)
    with torch.no_grad():
        torch.testing.assert_close(module.sentences(), expected, **EXACT)


def test_a_short_video_is_the_same_with_padding(build, batch):
    module = build(places="both")
    short = FeatureBatch({"pixels": batch["pixels"][:, :3]}, batch.mask[:, :3], batch.labels, batch.video_ids)
    padded = replace(batch, mask=batch.mask.clone())
    padded.mask[:, 3] = False
    torch.testing.assert_close(module(padded).logits, module(short).logits, atol=1e-4, rtol=1e-4)
    for name, term in module(short).losses.items():
        torch.testing.assert_close(module(padded).losses[name], term, atol=1e-4, rtol=1e-4)


def test_recomputed_activations_give_the_same_gradients(build, batch):
    gradients = []
    for is_recomputed in (False, True):
        module = build(places="both", checkpoint=is_recomputed)
        module(batch).logits.square().sum().backward()
        gradients.append([p.grad for p in module.parameters() if p.grad is not None])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-4)


# Training


def total(output):
    return torch.stack(list(output.losses.values())).sum()


@pytest.mark.parametrize(
    "settings", [{}, {"places": "both"}, {"reach": -2}, {"reach": -1}, {"masked_share": 0.0}, {"scores": "mean"}]
)
def test_every_loss_teaches_what_it_can(build, batch, tower, settings):
    module = build(**settings).train()
    output = module(batch)
    assert output.logits is None
    total(output).backward()
    untouched = {name for name, p in module.named_parameters() if p.grad is None or not p.grad.any()}
    assert untouched == set(module.idle)
    assert all(parameter.grad is None for parameter in tower.model.parameters())


def test_the_losses_are_the_published_sum(build, batch):
    """In evaluation nothing is drawn, so each term can be made again from what the parts say."""
    module, labels = build(), batch.labels
    output = module(batch)
    classes = module.class_tokens(batch, None)
    frames = module.embed_frames(classes, None)
    similarity = module.compare(frames.mean(dim=1), module.sentences())
    ids, words = module.masked(labels)
    found = module.decoder(whole(module, ids), frames, None)
    expected = {
        "contrastive": same_class_contrastive(similarity[:, labels], labels) / 2,
        "cross_modal": cross_entropy(similarity, labels) / 2,
        "classification": cross_entropy(module.classify(classes.mean(dim=1)), labels),
        "masked_words": cross_entropy(found.flatten(0, 1), words.flatten(), ignore_index=-100) / 10,
    }
    assert output.losses.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(output.losses[name], value, **EXACT)


def test_a_double_softmax_hardly_varies(build, batch):
    """Cross-entropy of probabilities of C classes lies between log(e + C - 1) - 1 and log(e + C - 1); that of logits not."""
    highest = torch.tensor(len(CLASSES) - 1 + torch.e).log()
    plain, published = [], []
    for i in range(len(CLASSES)):
        taught = replace(batch, labels=torch.full((3,), i))
        plain.append(2 * build()(taught).losses["cross_modal"])
        published.append(2 * build(double_softmax=True)(taught).losses["cross_modal"])
    assert all(highest - 1 <= term <= highest for term in published)
    assert max(plain) > highest
    assert min(plain) < highest - 1


def test_masked_sentences_reach_the_contrastive_loss_where_asked(build, batch):
    plain, published = build()(batch).losses, build(masked_contrastive=True)(batch).losses
    assert plain["contrastive"] != published["contrastive"]
    assert torch.equal(plain["cross_modal"], published["cross_modal"])


def test_without_masked_words_the_other_losses_stay(build, batch):
    with_words, without = build()(batch).losses, build(masked_share=0.0)(batch).losses
    assert with_words.keys() - without.keys() == {"masked_words"}
    assert all(torch.equal(with_words[name], term) for name, term in without.items())


@pytest.mark.parametrize("reach", [0, -1])
def test_training_makes_it_better_and_evaluation_sees_it(build, batch, reach):
    """torch's fused optimiser tells nobody that it changed a parameter: what is kept of the texts must notice."""
    module = build(moved=False, reach=reach, dropout=0.0)
    with torch.no_grad():
        before = module(batch).logits
    optimiser = build_optimiser(module, TrainSpec(lr=1e-2))
    module.train()
    losses = []
    for _ in range(12):
        loss = total(module(batch))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    module.eval()
    with torch.no_grad():
        after = module(batch).logits
        kept = module.sentences()
    torch.testing.assert_close(kept, module.sentences())
    assert not torch.allclose(before, after)


def test_what_is_drawn_comes_from_the_seed(build, batch):
    module = build(names=("ride a very long red bike", *CLASSES[1:]), dropout=0.0).train()

    def words(seed):
        torch.manual_seed(seed)
        return float(module(batch).losses["masked_words"].detach())

    assert words(1) == words(1)
    assert len({words(seed) for seed in range(5)}) > 1


# Classes that it was not trained on


def test_unseen_names_are_scored_by_their_texts(build, batch):
    trained = build()
    unseen = build(names=("box", "fence"), trained=CLASSES)
    assert trained_tensors(unseen).keys() == trained_tensors(trained).keys()
    unseen.load_state_dict(trained_tensors(trained), strict=False)
    output = unseen(batch)
    assert output.logits.shape == (3, 2)
    assert not output.losses
    torch.testing.assert_close(output.embedding, trained(batch).embedding)


@pytest.mark.parametrize("scores", ["classifier", "mean"])
def test_the_classifier_knows_its_own_classes_alone(build, batch, scores):
    with pytest.raises(ConfigError, match="box"):
        build(names=("jump", "box"), trained=CLASSES, scores=scores)
    trained = build(scores=scores)
    fewer = build(names=("swim back", "jump"), trained=CLASSES, scores=scores)
    fewer.load_state_dict(trained_tensors(trained), strict=False)
    if scores == "classifier":
        torch.testing.assert_close(fewer(batch).logits, trained(batch).logits[:, [2, 1]])
    assert fewer(batch).logits.shape == (3, 2)


def test_the_mean_of_both_scores_is_a_mean_of_probabilities(build, batch):
    by = {scores: build(scores=scores)(batch).logits.softmax(dim=-1) for scores in ("text", "classifier", "mean")}
    torch.testing.assert_close(by["mean"], (by["text"] + by["classifier"]) / 2)


@torch.no_grad()
def test_blending_moves_unseen_classes_alone(build, tower):
    names = ("jump", "box")
    adapted = normalize(build(names=names, trained=CLASSES).sentences(), dim=-1)
    frozen = normalize(tower.encode_text(["A video of jump", "A video of box"]), dim=-1)
    for share in (0.0, 0.25):
        blended = build(names=names, trained=CLASSES, text_blend=share).sentences()
        torch.testing.assert_close(blended[0], adapted[0], **EXACT)
        torch.testing.assert_close(blended[1], share * adapted[1] + (1 - share) * frozen[1], **EXACT)


def test_it_trains_on_what_it_scores(build, batch):
    with pytest.raises(ConfigError, match="other classes"):
        build(names=("box", "fence"), trained=CLASSES).train()(batch)
    with pytest.raises(ConfigError, match="words"):
        build(n_words=5).train()(batch)


@pytest.mark.parametrize(
    "wrong",
    [
        {"places": "attention"},
        {"scores": "names"},
        {"text_init": "zero"},
        {"width": 0},
        {"masked_share": 1.5},
        {"template": "a video"},
        {"masked_share": 0.0, "masked_contrastive": True},
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ConfigError):
        HEAD.config(**wrong)


def test_more_text_blocks_than_there_are(build):
    with pytest.raises(ConfigError, match="1 to 3"):
        build(text_layers=4)


# Size


@pytest.mark.parametrize(
    ("config", "n_classes", "expected"),
    [
        (
            HEAD.config(n_words=520),
            400,
            {"visual": 14_247_936, "text": 788_224, "temporal": 263_936, "classifier": 307_600, "words": 530_440},
        ),
        (
            HEAD.config(places="both", n_words=234),
            174,
            {"visual": 28_495_872, "text": 10_246_912, "temporal": 263_936, "classifier": 133_806, "words": 383_722},
        ),
    ],
)
def test_as_many_parameters_as_published(config, n_classes, expected):
    """16.14 M for Kinetics-400 and 39.5 M for SSv2, of a tower with the widths and depths of ViT-B/16."""
    shape_tower = wide_tower(text_layers=1 if config.places == "mlp" else 12)
    names = tuple(f"class {chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(n_classes))
    module = HEAD.build(config, HeadContext(shape_tower.shape, 8, names, lambda: shape_tower))
    seen = dict.fromkeys(expected, 0)
    for name, parameter in module.named_parameters():
        part = name.split(".")[0]
        kind = {"sentences": "text", "decoder": "words"}.get(part, part)
        seen["text" if name.startswith("decoder.insert.") else kind] += parameter.numel()
    assert seen == expected


def wide_tower(text_layers: int) -> Tower:
    """ViT-B/16 in its sizes, but for the frozen weights, which are not counted: blocks share theirs."""
    model: Any = CLIP(512, CLIPVisionCfg(layers=1), CLIPTextCfg(layers=1), quick_gelu=True)
    for blocks, n_blocks in ((model.visual.transformer.resblocks, 12), (model.transformer.resblocks, text_layers)):
        blocks.extend((n_blocks - 1) * [blocks[0]])
    return Tower(model, device="cpu")
