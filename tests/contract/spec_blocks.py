"""The printed blocks of docs/spec.md, and who tests each of them.

Every block is known by its key (heading, number under it, language) and by its content: a block
that is added or edited has no test until one is written.
"""

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

ROOT = Path(__file__).parents[2]
SPEC = ROOT / "docs" / "spec.md"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
HEADING = re.compile(r"^(#{2,4}) (.+)$", re.M)
Test = TypeVar("Test", bound=Callable[..., object])


@dataclass(frozen=True)
class Block:
    """One fenced block as printed."""

    key: str
    language: str
    text: str

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()[:8]

    def commands(self) -> list[str]:
        """Return the shell commands of the block, comments and example output left out.

        A command goes on while a quote is open or a line ends with a backslash or a pipe.
        """
        lines = self.text.split("\n# Example output:\n")[0].splitlines()
        found: list[str] = []
        is_open = False
        for line in lines:
            if not is_open and (not line.strip() or line.startswith("#")):
                continue
            found[-1:] = [f"{found[-1]}\n{line}"] if is_open else [*found[-1:], line]
            is_open = _goes_on(found[-1])
        return found


def _goes_on(command: str) -> bool:
    bare = re.sub(r'\\"', "", command)
    quotes = re.sub(r"'[^']*'" if bare.count('"') == 0 else r'"[^"]*"', "", bare)
    return quotes.count("'") % 2 == 1 or quotes.count('"') % 2 == 1 or command.endswith(("\\", "|"))


def commands(document: Path) -> list[str]:
    """Return the commands of a document's shell blocks, as printed, in order."""
    blocks = [Block("", *match.groups()) for match in FENCE.finditer(document.read_text(encoding="utf-8"))]
    return [command for block in blocks if block.language == "bash" for command in block.commands()]


def _blocks() -> Iterator[Block]:
    text = SPEC.read_text(encoding="utf-8")
    headings = [(match.start(), _slug(match.group(2))) for match in HEADING.finditer(text)]
    counts: dict[str, int] = {}
    for match in FENCE.finditer(text):
        heading = [slug for start, slug in headings if start < match.start()][-1]
        counts[heading] = counts.get(heading, 0) + 1
        number = f"-{counts[heading]}" if counts[heading] > 1 else ""
        yield Block(f"{heading}{number}", match.group(1), match.group(2))


def _slug(heading: str) -> str:
    words = re.findall(r"[a-z0-9_.]+", heading.lower())
    return "-".join(words)


BLOCKS = {block.key: block for block in _blocks()}
TESTED: dict[str, str] = {}  # key -> digest its test was written for


def covers(key: str, digest: str) -> Callable[[Test], Test]:
    """Mark a test as the one that runs the block `key` in the version `digest`."""

    def mark(test: Test) -> Test:
        TESTED[key] = digest
        return test

    return mark
