"""Reads the lessons: their blocks of code, and the steps of the blocks that show a terminal.

A console block is what one terminal shows. Its first line names the terminal, as in `# worker 1`.
Blocks with the same name are the same terminal: one bash, open through the whole document. In them

- `$ COMMAND` is typed at the prompt, and so is `> MORE` of a command that goes on; `^C` is Ctrl+C;
- each other line is output, and must come next in this terminal. `…` stands for any text in a
  line; a line that is only `…` stands for any number of lines, also none.

What a terminal prints and no block shows is an error, and so is a terminal that is not back at its
prompt when the next command, or the end of the document, is due. The comment
`<!-- not run: REASON -->` on the line before a block leaves it out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

from tools import ROOT

README = ROOT / "README.md"
ANYTHING = "…"


class LessonError(AssertionError):
    """What happens is not what the text shows."""


@dataclass(frozen=True)
class Step:
    """A line of a console block."""

    document: Path
    line: int
    terminal: str
    text: str

    @property
    def is_command(self) -> bool:
        """Whether this line is typed, behind bash's prompt or its prompt for more."""
        return self.text.startswith(("$ ", "> "))

    def matches(self, came: str) -> bool:
        """Tell whether this line shows the line that came. Spaces at its end are not seen."""
        parts = map(re.escape, self.text.expandtabs().rstrip().split(ANYTHING))
        return re.fullmatch(".*".join(parts), came.expandtabs().rstrip()) is not None

    def fails(self, why: str) -> LessonError:
        """Return the error that says where this is in the text, and why it fails."""
        where = f"{self.document.parent.name}/{self.document.name}, line {self.line}"
        return LessonError(f"{where}, terminal '{self.terminal}': {why}")


@dataclass(frozen=True)
class Block:
    """A block of code in a document."""

    document: Path
    section: str  # the heading `## …` that it is under
    line: int  # of its opening fence
    language: str
    source: str
    is_run: bool

    @property
    def steps(self) -> list[Step]:
        """The lines of a console block, without the terminal's name. Raises LessonError."""
        name, *lines = self.source.splitlines() or [""]
        if not name.startswith("# ") or not lines:
            error = Step(self.document, self.line, name, "").fails
            raise error("a console block is `# NAME`, the terminal's, and then what it shows")
        first = self.line + 2
        return [Step(self.document, first + i, name[2:], text) for i, text in enumerate(lines)]


def blocks(document: Path) -> list[Block]:
    """Return all blocks of code of a Markdown document."""
    found, section = [], ""
    tokens = MarkdownIt().parse(document.read_text(encoding="utf-8"))
    for before, token in pairwise([Token("", "", 0), *tokens]):
        if before.type == "heading_open" and before.tag == "h2":
            section = token.content
        if token.type in ("fence", "code_block"):
            assert token.map
            line, language = token.map[0] + 1, token.info.strip()
            is_run = not re.match(r"<!-- not run: \S.* -->", before.content)
            found.append(Block(document, section, line, language, token.content, is_run))
    return found


def steps(document: Path, section: str | None = None) -> list[Step]:
    """Return the steps to play, of a document or of one of its sections. Raises LessonError."""
    return [
        step
        for block in blocks(document)
        if block.language == "console" and block.is_run and section in (None, block.section)
        for step in block.steps
    ]


def lessons() -> list[Path]:
    """Return the lessons, in the order in which README.md links to them."""
    links = re.findall(r"\]\((\w+/\w+\.md)\)", README.read_text(encoding="utf-8"))
    return [ROOT / link for link in dict.fromkeys(links)]


def without_docker(command: str) -> str:
    """Return what to type for this command without Docker, as the table in README.md has it."""
    row = re.compile(r"^\| `(docker [^`…]+)…?` \| `([^`…]+)", re.MULTILINE)
    for docker, instead in row.findall(README.read_text(encoding="utf-8")):
        command = command.replace(docker, instead)
    return command
