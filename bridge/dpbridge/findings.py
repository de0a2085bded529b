"""What `check` answers: findings, and the table that they make."""

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass

_HEADER = ("", "what", "where", "why", "replacement")
_WIDTHS = (8, 32, 40, 44, 44)


@dataclass(frozen=True)
class Finding:
    """One thing that training runs into, or that is good to know before.

    Attributes:
        what: A layer's class, an op, or another part.
        where: The path of the module, or the line of the user's code; empty if there is none.
        why: What is the matter.
        replacement: What to do instead.
        blocks: Whether training is refused for it. Otherwise it is a note.
    """

    what: str
    where: str
    why: str
    replacement: str
    blocks: bool = True


@dataclass(frozen=True)
class Report:
    """All that was found; prints as a table.

    Attributes:
        findings: Those that block training first.
        gradients_agree: Whether the gradients of the compiled program are torch's own, or None
            where there was no program to compare.

    >>> print(Report((Finding("BatchNorm1d", "1", "It mixes examples", "nn.GroupNorm(1, 8)"),)))
             what         where  why                replacement
    refused  BatchNorm1d  1      It mixes examples  nn.GroupNorm(1, 8)
    <BLANKLINE>
    Gradients were not compared.
    """

    findings: tuple[Finding, ...]
    gradients_agree: bool | None = None

    @property
    def ok(self) -> bool:
        """Whether training can begin: nothing blocks it, and gradients were compared and agree."""
        return self.gradients_agree is True and not any(f.blocks for f in self.findings)

    def raise_if_not_ok(self) -> None:
        """Raises NotImplementedError with the table, unless all is well."""
        if not self.ok:
            raise NotImplementedError(
                "`model` must be one that can be trained privately, got findings against it. Make "
                f"the replacements.\n{self}"
            )

    def __str__(self) -> str:
        lines = [_OUTCOME[self.gradients_agree]]
        if self.findings:
            rows = [_row(finding) for finding in self.findings]
            lines = [*_table([_HEADER, *rows]), "", *lines]
        return "\n".join(lines)


_OUTCOME = {
    True: "Gradients of the compiled program agree with torch's on this batch.",
    False: "Gradients of the compiled program do not agree with torch's.",
    None: "Gradients were not compared.",
}


def ordered(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Returns each finding once, those that block first."""
    return tuple(sorted(dict.fromkeys(findings), key=lambda finding: not finding.blocks))


def _row(finding: Finding) -> tuple[str, ...]:
    level = "refused" if finding.blocks else "note"
    return level, finding.what, finding.where, finding.why, finding.replacement


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    wrapped = [[_wrap(*pair) for pair in zip(row, _WIDTHS, strict=True)] for row in rows]
    columns = zip(*wrapped, strict=True)
    widths = [max(len(line) for cell in column for line in cell) for column in columns]
    return [line for row in wrapped for line in _lines(row, widths)]


def _wrap(text: str, width: int) -> list[str]:
    # A path longer than the column is cut: nothing else keeps the table aligned.
    return textwrap.wrap(text, width, break_on_hyphens=False) or [""]


def _lines(row: list[list[str]], widths: list[int]) -> list[str]:
    height = max(map(len, row))
    padded = [cell + [""] * (height - len(cell)) for cell in row]
    return [
        "  ".join(f"{text:<{width}}" for text, width in zip(line, widths, strict=True)).rstrip()
        for line in zip(*padded, strict=True)
    ]
