"""Losses against recordings and against arithmetic by hand."""

from math import exp, log

import torch
from torch.nn.functional import normalize

from coldframe.train_heads.losses import motion_loss, same_class_contrastive


def test_contrastive_loss_is_the_recorded_one(recorded):
    for rec in recorded("EZ-CLIP"):
        labels = rec["loss.labels"].long()
        videos = normalize(rec["loss.video_embedding"], dim=-1)
        texts = normalize(rec["text_embedding"], dim=-1)[labels]
        loss = same_class_contrastive(100 * videos @ texts.T, labels)
        torch.testing.assert_close(loss, rec["loss.contrastive"], atol=1e-4, rtol=1e-4)


def test_contrastive_loss_by_hand():
    """Two classes, logits of zero: the entropy that the target lacks of the uniform one."""
    high = 1 / (1 + exp(-10))
    entropy = -high * log(high) - (1 - high) * log(1 - high)
    loss = same_class_contrastive(torch.zeros(2, 2), torch.tensor([0, 1]))
    torch.testing.assert_close(loss, torch.tensor(log(2) - entropy))


def test_texts_of_one_class_share_the_mass():
    """Where all are of one class, the uniform matching is the right one."""
    labels = torch.tensor([3, 3, 3])
    assert same_class_contrastive(torch.zeros(3, 3), labels).abs() < 1e-6
    assert same_class_contrastive(torch.eye(3), labels) > 0.01


def test_both_directions_count():
    """Rows alone would not see that two videos want one text."""
    labels, logits = torch.tensor([0, 1]), torch.tensor([[4.0, 1.0], [2.0, 0.0]])
    one, other = same_class_contrastive(logits, labels), same_class_contrastive(logits.T, labels)
    torch.testing.assert_close(one, other)


def test_order_of_the_batch_does_not_matter():
    torch.manual_seed(0)
    labels, logits, order = torch.tensor([0, 1, 1, 2]), torch.randn(4, 4), torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(
        same_class_contrastive(logits[order][:, order], labels[order]), same_class_contrastive(logits, labels)
    )


def test_motion_loss_is_the_recorded_one(recorded):
    for rec in recorded("EZ-CLIP"):
        frames = rec["frame_embedding"]
        loss = motion_loss(frames, torch.ones(frames.shape[:2], dtype=torch.bool))
        torch.testing.assert_close(loss, rec["motion_loss"], atol=1e-4, rtol=1e-4)


def test_motion_loss_by_hand():
    """One channel, frames 0, 2, 6: differences 1, 3, 2; variance 28/3 about 8/3."""
    frames = torch.tensor([[[0.0], [2.0], [6.0]]])
    loss = motion_loss(frames, torch.ones(1, 3, dtype=torch.bool))
    torch.testing.assert_close(loss, torch.tensor(1 / (2 + 28 / 3 + 1)))


def test_motion_loss_of_padded_videos():
    """C is the mean over all real frames, V over videos; what stands in the padding has no part, nor a gradient."""
    frames = torch.full((2, 4, 1), float("nan"))
    frames[0, :3] = torch.tensor([[0.0], [2.0], [6.0]])
    frames[1, 0] = 5.0  # a single frame neither moves nor varies
    frames.requires_grad_()
    loss = motion_loss(frames, torch.tensor([[True, True, True, False], [True, False, False, False]]))
    torch.testing.assert_close(loss, torch.tensor(1 / (6 / 4 + 28 / 3 / 2 + 1)))
    loss.backward()
    assert frames.grad is not None
    assert frames.grad.isfinite().all()
    assert frames.grad[0, :3].all()
    assert not frames.grad[0, 3:].any()
    assert not frames.grad[1].any()
