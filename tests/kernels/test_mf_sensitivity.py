"""Sensitivities against every participation pattern there is, for small matrices."""

import itertools

import numpy as np
import pytest

from dpkernels.matrix_factorization import sensitivity as se

N = 7
SCHEMES = [(1, None), (1, 2), (2, None), (2, 1), (3, None), (3, 2), (7, None), (9, 4)]
schemes = pytest.mark.parametrize(("min_sep", "most"), SCHEMES)
MATRICES = {
    "signed": np.tril(np.random.default_rng(0).normal(size=(N, N))),
    "full": np.random.default_rng(1).normal(size=(N, N)),
    "tall": np.random.default_rng(2).normal(size=(N + 2, N)),
    "non_negative": np.tril(np.random.default_rng(3).uniform(size=(N, N))),
}
matrices = pytest.mark.parametrize("C", MATRICES.values(), ids=MATRICES)


def patterns(n, min_sep, most):
    """All sets of steps that are `min_sep` or more apart, found by looking at all sets."""
    for chosen in itertools.product([False, True], repeat=n):
        steps = np.flatnonzero(chosen)
        if (np.diff(steps) >= min_sep).all() and len(steps) <= (most or n):
            yield steps


def worst(C, all_patterns):
    """The sensitivity over contributions of +1 and -1: all there are for scalars."""
    moved = (
        np.linalg.norm(C[:, steps] @ signs)
        for steps in all_patterns
        for signs in itertools.product([-1, 1], repeat=len(steps))
    )
    return max(moved)


@schemes
def test_max_participations_is_the_longest_pattern(min_sep, most):
    longest = max(len(steps) for steps in patterns(N, min_sep, most))
    assert se.minsep_true_max_participations(N, min_sep, max_participations=most) == longest


@schemes
@pytest.mark.parametrize("sign", [1, -1])
def test_max_participation_for_linear_fn_is_the_best_pattern(min_sep, most, sign):
    x = sign * np.array([1.0, 5, 2, 4, -3, 7, 6])
    best = max(x[steps].sum() for steps in patterns(N, min_sep, most))
    assert se.max_participation_for_linear_fn(x, min_sep, max_participations=most) == best


@matrices
def test_single_participation_is_the_largest_column(C):
    expected = worst(C, patterns(N, 1, 1))
    assert se.single_participation_sensitivity(C) == pytest.approx(expected, rel=1e-12)


@matrices
@schemes
def test_min_sep_upper_bound_is_never_below(C, min_sep, most):
    bound = se.get_min_sep_sensitivity_upper_bound(C, min_sep, max_participations=most)
    assert bound >= worst(C, patterns(N, min_sep, most)) * (1 - 1e-12)


@pytest.mark.parametrize(("min_sep", "most"), [(1, None), (1, 1), (7, None), (4, 1)])
def test_min_sep_upper_bound_is_met_where_patterns_cannot_differ(min_sep, most):
    C = MATRICES["non_negative"]
    bound = se.get_min_sep_sensitivity_upper_bound(C, min_sep, max_participations=most)
    assert bound == pytest.approx(worst(C, patterns(N, min_sep, most)), rel=1e-12)


@pytest.mark.parametrize(("min_sep", "most"), [(3, None), (3, 2), (4, None), (4, 1)])
@pytest.mark.parametrize("name", ["signed", "non_negative"])
def test_banded_sensitivity_is_exact(name, min_sep, most):
    C = MATRICES[name] * se.banded_lower_triangular_mask(N, 3)
    found = se.get_sensitivity_banded(C, min_sep, max_participations=most)
    assert found == pytest.approx(worst(C, patterns(N, min_sep, most)), rel=1e-12)


def test_banded_sensitivity_refuses_columns_that_meet():
    C = MATRICES["signed"] * se.banded_lower_triangular_mask(N, 3)
    with pytest.raises(ValueError, match=r"`X` must be zero where \|i - j\| >= min_sep = 2"):
        se.get_sensitivity_banded(C, 2)


def test_banded_sensitivity_adds_what_rounding_left():
    X = np.eye(2)
    X[0, 1] = X[1, 0] = 1e-13
    assert se.get_sensitivity_banded_for_X(X, 1) >= np.sqrt(2 + 2e-13)


@pytest.mark.parametrize("epochs", [1, 2, 3, 6])
@pytest.mark.parametrize("name", ["signed", "non_negative"])
def test_fixed_epochs_are_bounded(name, epochs):
    C, period = MATRICES[name][:6, :6], 6 // epochs
    expected = worst(C, [np.arange(start, 6, period) for start in range(period)])
    found = se.fixed_epoch_sensitivity(C, epochs)
    assert found >= expected * (1 - 1e-12)
    if name == "non_negative":
        assert found == pytest.approx(expected, rel=1e-12)


@matrices
def test_forms_for_c_are_those_for_its_gram_matrix(C):
    X = C.T @ C
    assert se.get_min_sep_sensitivity_upper_bound_for_X(
        X, 2
    ) == se.get_min_sep_sensitivity_upper_bound(C, 2)
    assert se.fixed_epoch_sensitivity_for_X(X, 7) == se.fixed_epoch_sensitivity(C, 7)


def test_masks():
    assert se.banded_lower_triangular_mask(3, 2).tolist() == [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    assert se.banded_symmetric_mask(3, 2).tolist() == [[1, 1, 0], [1, 1, 1], [0, 1, 1]]
    assert se.banded_symmetric_mask(2, 9).tolist() == [[1, 1], [1, 1]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: se.fixed_epoch_sensitivity(np.eye(6), 4), "`epochs` must divide 6"),
        (lambda: se.fixed_epoch_sensitivity(np.eye(6), 0), "`epochs` must be at least 1"),
        (lambda: se.banded_symmetric_mask(3, 0), "`num_bands` must be at least 1"),
        (lambda: se.minsep_true_max_participations(5, 0), "`min_sep` must be at least 1"),
        (lambda: se.get_sensitivity_banded(np.eye(3), 0), "`min_sep` must be at least 1"),
        (
            lambda: se.minsep_true_max_participations(5, 1, max_participations=0),
            "`max_participations` must be at least 1",
        ),
        (lambda: se.single_participation_sensitivity(np.ones(3)), "`C` must be a non-empty matrix"),
        (lambda: se.single_participation_sensitivity([[np.nan]]), "matrix of finite numbers"),
        (lambda: se.fixed_epoch_sensitivity_for_X(np.tri(3), 1), "`X` must be symmetric"),
        (lambda: se.fixed_epoch_sensitivity_for_X(-np.eye(3), 1), "must not be negative on its"),
        (lambda: se.max_participation_for_linear_fn([[1.0]]), "`x` must be a non-empty vector"),
    ],
)
def test_arguments_out_of_range_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
