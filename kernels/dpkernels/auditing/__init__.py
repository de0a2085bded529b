"""Empirical audits: how much privacy an attacker can be shown to take away, at least.

`audit_plan` attacks a plan. `insert_canaries` and the canaries beside it are for audits of one's
own training, and `CanaryScoreAuditor` turns the scores of any attack into bounds of epsilon.
"""

from dpkernels.auditing.auditor import CanaryScoreAuditor
from dpkernels.auditing.bootstrap import BootstrapParams
from dpkernels.auditing.canaries import (
    GradientCanaries,
    InsertedCanaries,
    insert_canaries,
    mislabelled_canaries,
)
from dpkernels.auditing.plan_audit import AuditReport, audit_plan
from dpkernels.auditing.thresholds import (
    Bonferroni,
    Explicit,
    MultiSplit,
    Split,
    ThresholdStrategy,
)

__all__ = [
    "AuditReport",
    "Bonferroni",
    "BootstrapParams",
    "CanaryScoreAuditor",
    "Explicit",
    "GradientCanaries",
    "InsertedCanaries",
    "MultiSplit",
    "Split",
    "ThresholdStrategy",
    "audit_plan",
    "insert_canaries",
    "mislabelled_canaries",
]
