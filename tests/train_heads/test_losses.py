"""Losses against recordings and against arithmetic by hand."""

from math import exp, log

import torch
from torch.nn.functional import normalize

from coldframe.train_heads.losses import same_class_contrastive


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
