"""Alignment metrics against worked numbers, recorded outputs of the published code, and a cell-by-cell second form."""

import itertools
import json
import math

import pytest
import torch
from safetensors import safe_open

from coldframe.train_heads.alignment import METRICS, bi_mhm, bi_mhm_cost, frame_distance, mean_cosine, otam, otam_cost

MIXED = torch.tensor([[((3 * i + 5 * j) % 7) / 10 for j in range(4)] for i in range(4)], dtype=torch.float64)
RAMP = torch.tensor([[abs(i - j) / 8 for j in range(4)] for i in range(4)], dtype=torch.float64)


def cell_by_cell(distance: torch.Tensor, lam: float) -> float:
    """The published recursion as it is written, in its product form: Z = exp(-C / lam), float64."""
    n_rows, n_columns = distance.shape
    kappa = [[math.exp(-d / lam) for d in row] for row in distance.tolist()]
    z = [[1.0] + [0.0] * (n_columns + 1) for _ in range(n_rows)]
    for m in range(1, n_columns + 2):
        z[0][m] = z[0][m - 1] * (kappa[0][m - 1] if m <= n_columns else 1)
    for l, m in itertools.product(range(1, n_rows), range(1, n_columns + 2)):  # noqa: E741
        if m == 1:
            z[l][m] = kappa[l][0] * (z[l - 1][0] + z[l - 1][1] + z[l][0])
        elif m <= n_columns:
            z[l][m] = kappa[l][m - 1] * (z[l - 1][m - 1] + z[l][m - 1])
        else:
            z[l][m] = z[l - 1][m - 1] + z[l - 1][m] + z[l][m - 1]
    return -lam * math.log(z[-1][-1])


def best_path(distance: torch.Tensor) -> float:
    """The cheapest row path by trying all: each column once, the row stays or advances by one."""
    n_rows, n_columns = distance.shape
    costs = []
    for start, steps in itertools.product(range(n_rows), itertools.product((0, 1), repeat=n_columns - 1)):
        rows = list(itertools.accumulate(steps, initial=start))
        if rows[-1] < n_rows:
            costs.append(sum(float(distance[row, column]) for column, row in enumerate(rows)))
    return min(costs)


@pytest.mark.parametrize(
    ("distance", "lam", "expected"),
    [
        (torch.zeros(8, 8), 0.1, -0.8435549202375727),
        (torch.zeros(8, 8), 0.5, -4.217774601187863),
        (torch.ones(8, 8), 0.1, 7.250832183701852),
        (torch.ones(8, 8), 0.5, 4.203566940839695),
        (1 - torch.eye(8), 0.01, 0.0),
        (1 - torch.eye(8), 0.1, -2.270048e-05),
        (1 - torch.eye(8), 0.5, -0.3732930197260738),
        (MIXED, 0.1, 0.2115250693497088),
        (MIXED.T, 0.1, 0.39128031443121497),
        (MIXED, 0.5, -1.1216242530846252),
        (MIXED.T, 0.5, -0.9861176467959571),
        (RAMP, 0.1, -0.13795149445279561),
        (RAMP, 0.5, -1.7574539345375044),
    ],
)
def test_otam_gives_the_worked_numbers(distance, lam, expected):
    assert otam_cost(distance.double(), lam, both_directions=False).item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("length", "n_paths"), [(1, 1), (2, 6), (3, 24), (4, 80), (5, 240), (8, 4608), (16, 4456448)])
def test_otam_counts_every_path_once(length, n_paths):
    cost = otam_cost(torch.zeros(length, length, dtype=torch.float64), 1.0, both_directions=False)
    assert math.exp(-cost) == pytest.approx(n_paths, rel=1e-9)


def test_bi_mhm_gives_the_worked_numbers():
    assert bi_mhm_cost(MIXED).item() == pytest.approx(0.3)
    assert bi_mhm_cost(RAMP).item() == 0


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1), (3, 7), (6, 4)])
@pytest.mark.parametrize("lam", [0.1, 0.5])
def test_otam_equals_the_recursion_cell_by_cell(shape, lam):
    distance = 2 * torch.rand(3, 2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cost = otam_cost(distance, lam)
    assert cost.shape == (3, 2)
    for i, j in itertools.product(range(3), range(2)):
        expected = cell_by_cell(distance[i, j], lam) + cell_by_cell(distance[i, j].T, lam)
        assert cost[i, j].item() == pytest.approx(expected, abs=1e-12)


def test_otam_becomes_the_cheapest_path():
    generator = torch.Generator().manual_seed(1)
    distance = torch.rand(60, 5, 5, dtype=torch.float64, generator=generator)
    soft = otam_cost(distance, 1e-4, both_directions=False)
    hard = torch.tensor([best_path(d) for d in distance], dtype=torch.float64)
    torch.testing.assert_close(soft, hard, atol=2e-4, rtol=0)


def test_otam_stays_finite_where_the_product_form_overflows():
    distance = 2 * torch.rand(50, 32, 32, generator=torch.Generator().manual_seed(2))
    soft = otam_cost(distance, 0.1, both_directions=False)
    torch.testing.assert_close(
        soft, otam_cost(distance.double(), 0.1, both_directions=False).float(), atol=1e-5, rtol=0
    )


def test_gradients_are_the_shares_of_paths_through_a_cell():
    distance = torch.rand(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    (gradient,) = torch.autograd.grad(otam_cost(distance, 0.3, both_directions=False), distance)
    assert (gradient >= 0).all()
    assert (gradient <= 1 + 1e-12).all()
    torch.testing.assert_close(gradient.sum(0)[1:], torch.ones(4, dtype=torch.float64))  # each column is matched once
    assert torch.autograd.gradcheck(lambda d: otam_cost(d, 0.3), distance)
    assert torch.autograd.gradcheck(bi_mhm_cost, distance)


def test_both_directions_together_are_symmetric():
    a, b = torch.randn(2, 3, 6, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    for metric in METRICS.values():
        torch.testing.assert_close(metric(a, b), metric(b, a).T)
    assert not torch.allclose(otam(a, b, both_directions=False), otam(b, a, both_directions=False).T)


def test_only_otam_feels_the_order_of_frames():
    query, support = torch.randn(2, 4, 8, 16, generator=torch.Generator().manual_seed(5))
    shuffled = query[:, torch.tensor([3, 0, 7, 1, 5, 2, 6, 4])]
    torch.testing.assert_close(bi_mhm(shuffled, support), bi_mhm(query, support))
    torch.testing.assert_close(mean_cosine(shuffled, support), mean_cosine(query, support))
    assert (otam(shuffled, support) - otam(query, support)).abs().min() > 1e-3


@pytest.mark.parametrize("name", METRICS)
def test_padding_has_no_influence(name):
    """Videos of 3 to 8 frames, padded with anything, score as the videos alone; and no gradient reaches the padding."""
    metric, generator = METRICS[name], torch.Generator().manual_seed(6)
    query = torch.randn(3, 8, 16, dtype=torch.float64, generator=generator)
    support = torch.randn(4, 6, 16, dtype=torch.float64, generator=generator)
    q_mask = torch.arange(8) < torch.tensor([[3], [8], [1]])
    s_mask = torch.arange(6) < torch.tensor([[6], [2], [5], [1]])
    q = query.masked_fill(~q_mask[..., None], 1e4).requires_grad_()
    s = support.masked_fill(~s_mask[..., None], 0).requires_grad_()
    logits = metric(q, s, q_mask, s_mask)
    for i, j in itertools.product(range(3), range(4)):
        alone = metric(query[i : i + 1, q_mask[i]], support[j : j + 1, s_mask[j]])
        torch.testing.assert_close(logits[i : i + 1, j : j + 1], alone)
    logits.sum().backward()
    assert q.grad is not None
    assert s.grad is not None
    assert q.grad.isfinite().all()
    assert not q.grad[~q_mask].any()
    assert not s.grad[~s_mask].any()


def test_leading_axes_are_episodes():
    query, support = torch.randn(2, 5, 3, 4, 8, generator=torch.Generator().manual_seed(7))
    for metric in METRICS.values():
        batched = metric(query, support)
        assert batched.shape == (5, 3, 3)
        for episode in range(5):
            torch.testing.assert_close(batched[episode], metric(query[episode], support[episode]))


def test_frame_distance_is_one_minus_cosine():
    query = torch.tensor([[[3.0, 4.0], [0.0, 0.0]]])
    support = torch.tensor([[[4.0, 3.0], [-3.0, -4.0], [-4.0, 3.0]]])
    torch.testing.assert_close(frame_distance(query, support)[0, 0], torch.tensor([[0.04, 2.0, 1.0], [1.0, 1.0, 1.0]]))
    assert frame_distance(query, support, eps=0.01)[0, 0, 0, 0].item() == pytest.approx(1 - 24 / 25.01)


def test_published_code_agrees(golden):
    n_checked = 0
    for path in sorted(golden.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            if file.metadata()["what"] == "few-shot metrics":
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                check_recorded(tensors, json.loads(file.metadata()["config"]))
                n_checked += 1
    if not n_checked:
        pytest.skip(f"no recorded few-shot metrics in {golden}")


def check_recorded(recorded, config):
    query, support = recorded["query"], recorded["support"]
    by_class = torch.argsort(recorded["support_labels"], stable=True)

    def class_logits(pairwise):
        return pairwise[:, by_class].unflatten(1, (config["way"], config["shot"])).mean(dim=2)

    def close(ours, theirs):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)

    close(frame_distance(query, support, eps=0.01), recorded["frame_distance_eps0.01"])
    for lam in (0.1, 0.5):
        ours = otam(query, support, lam=lam, eps=0.01)
        close(ours.abs(), recorded[f"otam_lambda{lam}.pairwise"].abs())
        close(class_logits(ours), recorded[f"otam_lambda{lam}.logits"])
    ours = bi_mhm(query, support)
    close(ours.abs(), recorded["bi_mhm.pairwise"].abs())
    close(class_logits(ours), recorded["bi_mhm.logits"])
