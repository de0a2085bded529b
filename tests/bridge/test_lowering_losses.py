"""Losses of torch.nn: values and gradients, in every reduction, at corners and ties."""

import pytest
import torch
import torch.nn.functional as F

from lowering_checks import (
    BATCH,
    assert_same,
    compare,
    integers,
    normal,
    positive,
    requirements,
    tied,
)

REDUCTIONS = ("none", "mean", "sum")
KL_REDUCTIONS = ("none", "batchmean", "sum")  # of "mean", torch warns


def in_all_reductions(function, **options):
    return lambda *args: [function(*args, reduction=name, **options) for name in REDUCTIONS]


def labels(*shape, classes=5, ignored=None):
    """Random labels; about a third of them `ignored`, if it is given."""
    target = integers(*shape, low=0, high=classes)
    if ignored is not None:
        target[integers(*shape, low=0, high=3) == 0] = ignored
    return target


def signs(*shape):
    return integers(*shape, low=0, high=2) * 2 - 1


def between_zero_and_one():
    return torch.tensor([[0.0, 1.0, 0.0, 1.0, 0.3, 0.6, 1e-9]] * BATCH).double()


CROSS_ENTROPY = {
    "plain": {},
    "smooth": {"label_smoothing": 0.1},
    "ignore": {"ignore_index": 2},
    "smooth, ignore": {"label_smoothing": 0.1, "ignore_index": 2},
}
WEIGHTS = normal(5).abs()

CASES = {
    **{
        f"cross_entropy, {name}": (
            in_all_reductions(F.cross_entropy, **options),
            normal(4, 5),
            labels(4, ignored=options.get("ignore_index", -100)),
        )
        for name, options in CROSS_ENTROPY.items()
    },
    **{
        f"cross_entropy, weights, {name}": (
            lambda x, y, w, options=options: in_all_reductions(
                F.cross_entropy, weight=w.detach(), **options
            )(x, y),
            normal(4, 5),
            labels(4, ignored=options.get("ignore_index", -100)),
            WEIGHTS,
        )
        for name, options in CROSS_ENTROPY.items()
    },
    **{
        f"cross_entropy, soft targets, {name}": (
            lambda x, y, w, options=options: [
                *in_all_reductions(F.cross_entropy, weight=w.detach(), **options)(x, y.softmax(1)),
                F.cross_entropy(x, y.softmax(1), **options),
            ],
            normal(4, 5, 2),
            normal(4, 5, 2),
            WEIGHTS,
        )
        for name, options in CROSS_ENTROPY.items()
        if "ignore_index" not in options
    },
    "cross_entropy over space": (
        in_all_reductions(F.cross_entropy, label_smoothing=0.1),
        normal(2, 5, 3, 2),
        labels(2, 3, 2, ignored=-100),
    ),
    "cross_entropy of one row": (in_all_reductions(F.cross_entropy), normal(5), labels()),
    "cross_entropy of nothing": (
        lambda x, y: [F.cross_entropy(x, y), F.cross_entropy(x, y, label_smoothing=0.1)],
        normal(2, 5),
        torch.full((BATCH, 2), -100),
    ),
    "nll_loss": (
        lambda x, y, w: [
            *in_all_reductions(F.nll_loss)(x, y),
            *in_all_reductions(F.nll_loss, weight=w.detach(), ignore_index=1)(x, y),
        ],
        normal(4, 5),
        labels(4),
        WEIGHTS,
    ),
    "nll_loss over space": (in_all_reductions(F.nll_loss), normal(2, 5, 3), labels(2, 3)),
    "mse_loss": (in_all_reductions(F.mse_loss), tied(3, 4), tied(3, 4)),
    "l1_loss at ties": (in_all_reductions(F.l1_loss), tied(3, 4), tied(3, 4)),
    "smooth_l1_loss at ties": (in_all_reductions(F.smooth_l1_loss), tied(3, 4), tied(3, 4)),
    "smooth_l1_loss with beta": (
        lambda x, y: [F.smooth_l1_loss(x, y, beta=b) for b in (0.0, 0.5, 2.0)],
        tied(3, 4),
        tied(3, 4),
    ),
    "huber_loss at ties": (in_all_reductions(F.huber_loss), tied(3, 4), tied(3, 4)),
    "huber_loss with delta": (lambda x, y: F.huber_loss(x, y, delta=0.5), tied(3, 4), tied(3, 4)),
    "binary_cross_entropy": (
        lambda x, y, w: [
            *in_all_reductions(F.binary_cross_entropy)(x / 1.2, y / 1.2),
            F.binary_cross_entropy(x / 1.2, y / 1.2, weight=w.detach()),
        ],
        positive(3, 4),
        positive(3, 4),
        positive(4),
    ),
    "binary_cross_entropy at ends": (
        lambda x, y: F.binary_cross_entropy(x, y.detach()),
        between_zero_and_one(),
        between_zero_and_one().flip(1).round(),
    ),
    "binary_cross_entropy_with_logits": (
        lambda x, y, w: [
            *in_all_reductions(F.binary_cross_entropy_with_logits)(x, y),
            F.binary_cross_entropy_with_logits(x, y, weight=w.detach()),
            F.binary_cross_entropy_with_logits(x, y, pos_weight=w.detach()),
        ],
        tied(3, 4) * 20,
        positive(3, 4),
        positive(4),
    ),
    "kl_div": (
        lambda x, y: [F.kl_div(x, y, reduction=name) for name in KL_REDUCTIONS],
        normal(3, 4),
        positive(3, 4),
    ),
    "kl_div of logarithms": (
        lambda x, y: [F.kl_div(x, y, reduction=name, log_target=True) for name in KL_REDUCTIONS],
        normal(3, 4),
        normal(3, 4),
    ),
    "kl_div with zeros": (
        lambda x, y: F.kl_div(x, y.detach(), reduction="batchmean"),
        normal(3, 4),
        tied(3, 4).abs(),
    ),
    "poisson_nll_loss": (
        lambda x, y: [
            F.poisson_nll_loss(x, y),
            F.poisson_nll_loss(x, y, full=True),
            F.poisson_nll_loss(x.abs(), y, log_input=False, reduction="sum"),
        ],
        normal(3, 4),
        integers(3, 4, low=0, high=4),
    ),
    "soft_margin_loss": (in_all_reductions(F.soft_margin_loss), normal(3, 4), signs(3, 4)),
    "hinge_embedding_loss": (in_all_reductions(F.hinge_embedding_loss), tied(3, 4), signs(3, 4)),
    "margin_ranking_loss": (
        in_all_reductions(F.margin_ranking_loss, margin=1.0),
        tied(4),
        tied(4),
        signs(4),
    ),
    "cosine_embedding_loss": (
        in_all_reductions(F.cosine_embedding_loss, margin=0.1),
        normal(3, 4),
        normal(3, 4),
        signs(3),
    ),
    "cosine_similarity": (
        lambda x, y: [F.cosine_similarity(x, y), F.cosine_similarity(x, y, dim=0, eps=5.0)],
        normal(3, 4),
        normal(3, 4),
    ),
    "cosine_similarity of zeros": (
        F.cosine_similarity,
        torch.zeros(BATCH, 2, 3).double(),
        normal(2, 3),
    ),
    "pairwise_distance": (
        lambda x, y: [F.pairwise_distance(x, y), F.pairwise_distance(x, y, 1, keepdim=True)],
        normal(3, 4),
        normal(3, 4),
    ),
    "cdist": (lambda x, y: [torch.cdist(x, y), torch.cdist(x, y, p=1)], tied(3, 4), tied(2, 4)),
    "triplet_margin_loss": (
        lambda a, p, n: [
            *in_all_reductions(F.triplet_margin_loss)(a, p, n),
            F.triplet_margin_loss(a, p, n, swap=True),
        ],
        normal(3, 4),
        normal(3, 4),
        normal(3, 4),
    ),
    "multi_margin_loss": (
        lambda x, y, w: [
            *in_all_reductions(F.multi_margin_loss)(x, y),
            F.multi_margin_loss(x, y, p=2, margin=0.5, weight=w.detach()),
            F.multi_margin_loss(x[0], y[0]),
        ],
        normal(3, 5),
        labels(3),
        WEIGHTS,
    ),
    "multilabel_soft_margin_loss": (
        in_all_reductions(F.multilabel_soft_margin_loss),
        normal(3, 5),
        integers(3, 5, low=0, high=2),
    ),
}


@pytest.fixture(scope="module")
def results():
    return compare(CASES)


@pytest.mark.parametrize("name", CASES)
def test_loss_equals_torch(results, name):
    assert_same(results[name], rtol=1e-8)  # torch's pi in the Poisson loss is a float32


@pytest.mark.parametrize("label", [-1, 3, -101])
@pytest.mark.parametrize("loss", [F.cross_entropy, F.nll_loss, F.multi_margin_loss])
def test_label_out_of_range_is_reported(loss, label):
    (held,) = requirements(loss, torch.randn(1, 3), torch.tensor([label]))
    assert not held[0]
    assert "labels must be in [0, 3)" in held[1]


def test_ignored_label_is_in_range():
    (held,) = requirements(F.cross_entropy, torch.randn(1, 3), torch.tensor([-100]))
    assert held[0]


def test_probability_out_of_range_is_reported():
    (held,) = requirements(F.binary_cross_entropy, torch.tensor([1.5]), torch.tensor([1.0]))
    assert not held[0]
