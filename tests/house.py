"""The house in figures: files, lines, classes, importers, and which folder imports which.

    python tests/house.py [CHECKOUT]     print them, of this checkout or another one
    python tests/house.py --index        write the rows and the file list of docs/architecture.md

Owns: how the package is measured. `__init__.py`, `demo/` and the command-line entry are not counted.
Does not know: which figures are allowed (`test_architecture.py`).
"""

import argparse
import ast
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[1]
PROGRAMS = (
    "adaptive_retraining_daemon",
    "tft_inference_daemon",
    "tft_trainer",
    "data_buffer",
    "drift_monitor",
)
NOT_COUNTED = ("__init__", "__main__", "cli")


@dataclass(frozen=True)
class House:
    """One checkout's package and programs, parsed."""

    root: Path

    @cached_property
    def modules(self) -> Mapping[str, Path]:
        """Return every module of the package and the programs by its dotted name."""
        package = sorted((self.root / "fleetcast").rglob("*.py"))
        programs = (self.root / f"{name}.py" for name in PROGRAMS)
        return {self._name_of(path): path for path in (*package, *filter(Path.exists, programs))}

    @cached_property
    def trees(self) -> Mapping[str, ast.Module]:
        """Return the parsed modules."""
        return {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in self.modules.items()}

    @cached_property
    def counted(self) -> tuple[str, ...]:
        """Return the package's modules that the figures are about."""
        return tuple(
            name
            for name, path in self.modules.items()
            if name not in PROGRAMS and path.stem not in NOT_COUNTED and "fleetcast.demo" not in name
        )

    def _name_of(self, path: Path) -> str:
        parts = path.relative_to(self.root).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    def imports(self, name: str, *, with_types: bool = True) -> set[str]:
        """Return the modules of the house that a module imports, those inside functions too."""
        found = imports_of(self.trees[name], self.modules, with_types=with_types)
        return {module for module in found if module in self.modules} - {name}

    def folder_imports(self) -> dict[str, set[str]]:
        """Return which folder imports which."""
        table: dict[str, set[str]] = {}
        for name in self.modules:
            targets = table.setdefault(folder_of(name), set())
            targets |= {folder_of(found) for found in self.imports(name)} - {folder_of(name)}
        return table

    def file_cycle(self, *, with_types: bool = True) -> set[str]:
        """Return the modules that import each other in a ring, with what stands on them."""
        return ring({name: self.imports(name, with_types=with_types) for name in self.modules})

    def importers(self) -> Counter[str]:
        """Return by how many modules each counted module is imported."""
        counts = Counter(dict.fromkeys(self.counted, 0))
        for name in self.modules:
            counts.update(found for found in self.imports(name) if found in counts)
        return counts

    def lines(self) -> dict[str, int]:
        """Return the length of each counted file."""
        return {name: len(self.modules[name].read_text("utf-8").splitlines()) for name in self.counted}

    def program_lines(self) -> dict[str, int]:
        """Return the length of each root program."""
        programs = (name for name in PROGRAMS if name in self.modules)
        return {name: len(self.modules[name].read_text("utf-8").splitlines()) for name in programs}

    def n_classes(self) -> int:
        """Return how many classes the package and the programs define."""
        trees = [self.trees[name] for name in (*self.counted, *self.program_lines())]
        return sum(isinstance(node, ast.ClassDef) for tree in trees for node in ast.walk(tree))


def folder_of(name: str) -> str:
    """Return the box of the picture a module is in; a file on top of the package is a box of its own.

    >>> [folder_of(name) for name in ("fleetcast.drift.seasonal.quorum", "fleetcast.clock", "fleetcast.live")]
    ['drift.seasonal', 'ground', 'live']
    """
    parts = name.split(".")
    if len(parts) == 1:
        return name if name in PROGRAMS else "ground"
    if len(parts) == 2 and not (ROOT / "fleetcast" / parts[1]).is_dir():
        return parts[1] if parts[1] in ON_TOP else "ground"
    inner = parts[1:] if (ROOT / "fleetcast" / Path(*parts[1:])).is_dir() else parts[1:-1]
    return ".".join(inner)


ON_TOP = ("inference", "client", "live", "cli", "__main__")


def imports_of(tree: ast.AST, modules: Mapping[str, Path], *, with_types: bool = True) -> Iterator[str]:
    """Yield every imported module; `from package import module` names the module."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            full = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (name if name in modules else node.module for name in full)
        elif with_types or not is_type_checking(node):
            yield from imports_of(node, modules, with_types=with_types)


def is_type_checking(node: ast.AST) -> bool:
    """Return whether a statement is read by type checkers only."""
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def ring(needs: Mapping[str, set[str]]) -> set[str]:
    """Return what is left of a graph when everything that needs nothing is taken away, again and again."""
    waiting = dict(needs)
    while free := {name for name, wanted in waiting.items() if not wanted & waiting.keys()}:
        waiting = {name: wanted for name, wanted in waiting.items() if name not in free}
    return set(waiting)


def rows_table(rows: Mapping[str, set[str]]) -> str:
    """Return which folder may import which, as a table."""
    lines = ["| folder | imports |", "|---|---|"]
    for folder, wanted in rows.items():
        names = ", ".join(f"`{name}`" for name in sorted(wanted)) or "the ground floor alone"
        lines += [f"| `{folder}` | {names} |"] if folder != "ground" else []
    return "\n".join(lines)


def file_list(house: House) -> str:
    """Return one line for every folder and file, out of their docstrings."""
    by_folder: dict[str, list[str]] = {}
    for name, path in house.modules.items():
        docstring = (ast.get_docstring(house.trees[name]) or "").split("\n")[0]
        folder = path.parent.relative_to(house.root).as_posix()
        lines = by_folder.setdefault(folder, [])
        if path.stem == "__init__":
            lines.insert(0, f"| **{folder}/** | **{docstring}** |")
        else:
            lines.append(f"| `{path.name}` | {docstring} |")
    lines = [line for folder in sorted(by_folder) for line in by_folder[folder]]
    return "\n".join(["| file | what it is |", "|---|---|", *lines])


def with_index(document: str, house: House, rows: Mapping[str, set[str]]) -> str:
    """Return a document with its generated sections made anew."""
    for section, text in (("rows", rows_table(rows)), ("files", file_list(house))):
        begin, end = document.index(f"<!-- {section}:"), document.index(f"<!-- end {section} -->")
        head = document[begin : document.index("\n", begin)]
        document = f"{document[:begin]}{head}\n{text}\n{document[end:]}"
    return document


def main(argv: Sequence[str] | None = None) -> int:
    """Print the figures of one checkout, or write the index of this one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkout", nargs="?", type=Path, default=ROOT, help="default: this one")
    parser.add_argument(
        "--index", action="store_true", help="write docs/architecture.md's rows and file list"
    )
    options = parser.parse_args(argv)
    if options.index:
        from test_architecture import ROWS

        page = ROOT / "docs" / "architecture.md"
        page.write_text(with_index(page.read_text("utf-8"), House(ROOT), ROWS), encoding="utf-8")
        return 0
    house = House(options.checkout.resolve())
    lines = house.lines()
    single = sorted(name for name, count in house.importers().items() if count == 1)
    n_lines = sum(lines.values())
    print(f"files            {len(lines)}")
    print(f"lines            {n_lines} (median {median(lines.values()):.0f}, longest {max(lines.values())})")
    print(f"with programs    {n_lines + sum(house.program_lines().values())}")
    print(f"classes          {house.n_classes()}")
    print(f"single importer  {len(single)}: {', '.join(name.removeprefix('fleetcast.') for name in single)}")
    print(f"in a file ring   {len(house.file_cycle())}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
