"""Where JAX Privacy is installed: the same numbers, where its own are sound."""

import numpy as np
import pytest

from dpkernels import auditing

upstream = pytest.importorskip("jax_privacy.auditing")
pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)
SCORES = {
    "apart": (RNG.normal(2, 1, 400), RNG.normal(0, 1, 300)),
    "near": (RNG.normal(0.5, 1, 100), RNG.normal(0, 1, 120)),
    "tied": (RNG.integers(0, 6, 200), RNG.integers(0, 4, 200)),
}


@pytest.fixture(params=SCORES)
def auditors(request):
    scores = SCORES[request.param]
    return auditing.CanaryScoreAuditor(*scores), upstream.CanaryScoreAuditor(*scores)


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("epsilon_clopper_pearson", (0.05,)),
        ("epsilon_clopper_pearson", (0.2, 0.01)),
        ("epsilon_clopper_pearson", (0.05, 0.01, False)),
        ("epsilon_one_run", (0.05, 1e-5)),
        ("epsilon_one_run", (0.5, 0.001)),
        ("epsilon_one_run_fdp", (0.05, 1e-5)),
        ("epsilon_one_run_fdp", (0.5, 0.001)),
    ],
)
@pytest.mark.parametrize("threshold", [-1.0, 1.0, 2.5, 4.0])
def test_bound_at_a_threshold_is_the_same(auditors, method, arguments, threshold):
    ours, theirs = (
        getattr(auditor, method)(*arguments, threshold_strategy=module.Explicit(threshold))
        for auditor, module in zip(auditors, (auditing, upstream), strict=True)
    )
    assert ours == pytest.approx(theirs, abs=3e-6)


@pytest.mark.parametrize(
    "options",
    [{}, {"prevalence": 0.3}, {"prevalence": 0.5, "significance": 0.05}, {"significance": 0.1}],
)
def test_max_accuracy_is_the_same_or_less(auditors, options):
    # Theirs also mixes two thresholds, which gains nothing but in the bound from above.
    ours, theirs = (auditor.max_accuracy(**options) for auditor in auditors)
    assert ours == pytest.approx(theirs, rel=0.02)


def test_curve_lies_below_its_hull(auditors):
    # Theirs is the hull of the ROC curve: attacks that choose between thresholds by a coin.
    ours, theirs = (auditor.tpr_at_given_fpr(np.linspace(0, 1, 50)) for auditor in auditors)
    assert np.all(ours <= theirs + 1e-9)
    assert np.max(theirs - ours) < 0.15


@pytest.mark.parametrize("arguments", [(1,), (20,), (20, 0.01, False)])
def test_raw_counts_is_at_most_that_of_the_hull(auditors, arguments):
    ours, theirs = (auditor.epsilon_raw_counts(*arguments) for auditor in auditors)
    assert ours <= theirs + 1e-9
    assert ours == pytest.approx(theirs, abs=0.35)


def test_signatures_accept_the_same_names():
    auditor = auditing.CanaryScoreAuditor(in_canary_scores=[1.0], out_canary_scores=[0.0])
    auditor.epsilon_clopper_pearson(significance=0.1, delta=0.0, one_sided=True)
    auditor.epsilon_from_gdp(significance=0.1, delta=0.1, eps_tol=1e-3)
    auditor.epsilon_one_run(significance=0.1, delta=0.1, one_sided=True)
    auditor.epsilon_raw_counts(min_count=1, delta=0.0, one_sided=True)
    for name in ("Bonferroni", "Explicit", "Split", "MultiSplit", "BootstrapParams"):
        assert set(getattr(auditing, name).__init__.__code__.co_varnames) >= set(
            getattr(getattr(upstream, name), "__dataclass_fields__", {})
        )
