"""What the doctor finds, and the page that shows it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from svl.core.errors import SvlError, is_out_of_memory, reason_of
from svl.text.escaping import for_terminal
from svl.text.redaction import redact_text

Level = Literal["ok", "note", "fails"]
MARKS: dict[Level, str] = {"ok": "ok   ", "note": "note ", "fails": "FAILS"}


@dataclass(frozen=True)
class Finding:
    """One line: `fails` if a run of this configuration cannot work for that reason, `note` if it may not."""

    level: Level
    text: str


@dataclass
class Section:
    """What was found about one thing."""

    title: str
    findings: list[Finding] = field(default_factory=list)

    def ok(self, text: str) -> None:
        """Something is as it must be."""
        self.findings.append(Finding("ok", text))

    def note(self, text: str) -> None:
        """Something to know."""
        self.findings.append(Finding("note", text))

    def fails(self, text: str) -> None:
        """Something that ends a run."""
        self.findings.append(Finding("fails", text))

    @contextmanager
    def examined(self, what: str) -> Iterator[None]:
        """Within the block, an error of any library becomes a line that fails; what follows the block goes on."""
        try:
            yield
        except SvlError as error:
            self.fails(str(error))
        except Exception as error:
            if is_out_of_memory(error):
                raise
            self.fails(f"{what}: {reason_of(error)}")


def page(sections: list[Section]) -> str:
    """The findings as text for a terminal."""
    lines = []
    for section in sections:
        lines.append(section.title)
        for finding in section.findings:
            text = for_terminal(redact_text(" ".join(finding.text.split())))
            lines.append(f"  {MARKS[finding.level]} {text}")
        lines.append("")
    failures = sum(finding.level == "fails" for section in sections for finding in section.findings)
    lines.append(f"{failures} of these will end a run" if failures else "nothing found that would end a run")
    return "\n".join(lines)


def can_work(sections: list[Section]) -> bool:
    """Whether no finding fails."""
    return all(finding.level != "fails" for section in sections for finding in section.findings)
