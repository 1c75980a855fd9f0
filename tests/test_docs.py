"""The documents and the programs say the same: settings, commands, flags, exit codes, metric names, links."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from house import House, with_index
from test_architecture import ROWS

from fleetcast.cli import COMMANDS
from fleetcast.errors import ExitCode
from fleetcast.retraining.telemetry import PREFIX
from fleetcast.serving.telemetry import GAUGES
from fleetcast.settings import page

ROOT = Path(__file__).parents[1]
SPEC = ROOT / "docs" / "spec.md"
DOCUMENTS = sorted(
    path
    for path in [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("models/*.md"),
        *ROOT.glob("samples/*.md"),
    ]
    if path != SPEC  # the user's own; tests/contract runs it
)
README = ROOT / "README.md"
every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


def shell_lines(document: Path) -> Iterator[str]:
    """Yield the commands of the document's shell blocks, continuation lines joined."""
    for block in re.findall(r"^```(?:bash|sh|console)\n(.*?)^```", document.read_text(), re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            command = line.removeprefix("$ ").strip()
            if command and not command.startswith("#"):
                yield command


def code_spans(document: Path) -> list[str]:
    """Return what stands in single backticks, outside of blocks."""
    prose = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.M | re.S)
    return re.findall(r"`([^`\n]+)`", prose)


@cache
def help_of(program: tuple[str, ...]) -> str:
    done = subprocess.run(
        [sys.executable, *program, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout


def test_the_settings_page_is_made_from_the_dataclasses() -> None:
    written = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert written == page(), "run `make docs`"


@every_document
def test_make_targets_named_in_a_document_exist(document: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    spans = [*shell_lines(document), *code_spans(document)]
    named = {match[1] for text in spans if (match := re.match(r"make ([a-z-]+)$", text))}
    assert named <= targets


@every_document
def test_programs_and_flags_shown_in_a_document_exist(document: Path) -> None:
    pattern = re.compile(r"\bpython3? (?:-m ((?:fleetcast|benchmarks)[\w.]*)|([\w/]+\.py))([^|>;&]*)")
    for command in [*shell_lines(document), *code_spans(document)]:
        for module, script, rest in pattern.findall(command):
            if module == "fleetcast":
                continue  # its flags are those of a subcommand: test_commands_shown_in_a_document_exist
            if module:
                program: tuple[str, ...] = ("-m", module)
                place = ROOT / module.replace(".", "/")
                assert place.with_suffix(".py").exists() or (place / "__main__.py").exists(), command
            else:
                program = (script,)
                assert (ROOT / script).exists(), command
            flags = re.findall(r"(?<=\s)--[a-z][a-z-]+", rest)
            missing = [flag for flag in flags if flag not in help_of(program)]
            assert missing == [], command


@every_document
def test_files_named_in_a_document_exist(document: Path) -> None:
    named = {
        match[0]
        for text in code_spans(document)
        for match in re.finditer(
            r"(?<![\w./-])(fleetcast|benchmarks|tests|docs|deploy|samples)/[\w./-]+\.\w+", text
        )
    }
    assert sorted(name for name in named if not (ROOT / name).exists()) == []


@every_document
def test_commands_shown_in_a_document_exist(document: Path) -> None:
    for text in [*shell_lines(document), *code_spans(document)]:
        if match := re.match(r"(?:[\w./]*python3? -m )?fleetcast ([a-z-]+)([^|>;&]*)", text):
            command, rest = match.groups()
            assert command in {*COMMANDS, "version"}, text
            flags = re.findall(r"(?<=\s)--[a-z][a-z-]+", rest) if command in COMMANDS else []
            missing = [flag for flag in flags if flag not in help_of(("-m", "fleetcast", command))]
            assert missing == [], text


@every_document
def test_links_within_the_repository_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", document.read_text())
    assert [link for link in links if not (document.parent / link).exists()] == []


@every_document
def test_no_document_names_a_path_of_the_machine_it_was_written_on(document: Path) -> None:
    assert not re.search(r"(?<![\w.])/(work|root|home/\w+)/", document.read_text())


def test_every_sentence_names_its_actor() -> None:
    texts = [
        *DOCUMENTS,
        *ROOT.glob("*.py"),
        *ROOT.glob("fleetcast/**/*.py"),
        *ROOT.glob("benchmarks/**/*.py"),
    ]
    vague = re.compile(
        r"\b(nobody|anybody|somebody|everybody|whoever|what serves|is told of|learned from by)\b", re.I
    )
    found = [
        f"{path.name}: {hit}" for path in texts for hit in vague.findall(path.read_text(encoding="utf-8"))
    ]
    assert found == []


def test_git_ignores_every_file_that_a_program_writes_where_it_works() -> None:
    texts = [
        path.read_text("utf-8")
        for path in [
            *ROOT.glob("*.py"),
            *ROOT.glob("fleetcast/retraining/*.py"),
            *ROOT.glob("fleetcast/alerts/*.py"),
        ]
    ]
    assigned = re.compile(r'^(?:TEXTFILE|[A-Z]+_FILE) = (?:Path\()?"([^"]+)"', re.M)
    names = {name for text in texts for name in assigned.findall(text)} - {
        "base_training.state"
    }  # checkpoints/
    assert len(names) >= 8
    answer = subprocess.run(
        ["git", "check-ignore", "--no-index", *names, "data_buffer/x", "checkpoints/x"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if answer.returncode > 1:
        pytest.skip("no git checkout")
    assert names - set(answer.stdout.split()) == set()


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 150


def test_the_readme_starts_with_the_demo_and_names_the_test_command() -> None:
    commands = list(shell_lines(README))
    assert "make demo" in commands
    assert "make test" in commands
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_the_readme_shows_every_program_and_folder() -> None:
    text = README.read_text()
    programs = [path.name for path in ROOT.glob("*.py")]
    folders = ["fleetcast/", "benchmarks/", "samples/", "tests/", "deploy/", "docs/"]
    boxes = [f"  {path.parent.name}/" for path in ROOT.glob("fleetcast/*/__init__.py")]
    assert [name for name in [*programs, *folders, *boxes] if name not in text] == []


def test_every_exit_code_is_documented() -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    assert [int(code) for code in ExitCode if not re.search(rf"^\| `?{int(code)}`? \|", text, re.M)] == []


def test_every_log_line_worth_knowing_is_written_by_the_code() -> None:
    text = (
        (ROOT / "docs" / "operations.md")
        .read_text()
        .split("\n## Log lines worth knowing\n")[1]
        .split("\n## ")[0]
    )
    lines = [
        span for row in re.findall(r"^\| (`.*?) \|", text, re.M) for span in re.findall(r"`([^`]+)`", row)
    ]
    pieces = {piece.strip() for line in lines for piece in line.split("...")} - {""}
    sources = [*ROOT.glob("*.py"), *(ROOT / "fleetcast").rglob("*.py")]
    code = re.sub(r'"\s*\n\s*f?"', "", "\n".join(path.read_text() for path in sources))
    assert len(lines) > 10, "the table moved"
    assert sorted(piece for piece in pieces if piece not in code) == []


def exported_metrics() -> set[str]:
    """Return the names of the Prometheus metrics that are declared anywhere in the package."""
    found = set()
    for path in (ROOT / "fleetcast").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in (
                "Counter",
                "Gauge",
                "Histogram",
                "Summary",
                "CounterMetricFamily",
                "GaugeMetricFamily",
                "_by_label",
            ):
                first = node.args[0] if node.args else None
                if isinstance(first, ast.Constant) and isinstance(first.value, str):
                    found.add(first.value)
    found |= {f"fleetcast_{name}" for name in GAUGES}
    text = (ROOT / "fleetcast" / "retraining" / "telemetry.py").read_text()
    named = re.findall(r'(?:_gauge|_label)\(\s*"(\w+)"|PREFIX \+ "(\w+)"', text)
    return found | {PREFIX + (one or other) for one, other in named}


def test_every_exported_metric_is_documented() -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    assert len(exported_metrics()) > 40, "found too few: did the declarations move?"
    assert sorted(name for name in exported_metrics() if not re.search(rf"`{name}(_total)?[`{{]", text)) == []


def test_every_settings_part_is_used_by_the_code_that_it_is_for() -> None:
    sources = [path for path in [*ROOT.glob("*.py"), *(ROOT / "fleetcast").rglob("*.py")]]
    text = "\n".join(path.read_text() for path in sources if not path.name.startswith("setting"))
    from fleetcast.settings import every_setting

    unused = [info.key for info in every_setting() if not re.search(rf"\b{info.name}\b", text)]
    assert unused == []


def test_the_architecture_lists_every_row_and_every_file_as_its_docstring_says() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert page == with_index(page, House(ROOT), ROWS), "run `python tests/house.py --index`"


def test_every_question_of_the_architecture_is_answered_by_one_file() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    questions = re.findall(r"^\| (.*\?) \| `(.*?)` \|$", page, re.M)
    assert len(questions) >= 10
    files = {path for folder in (ROOT, ROOT / "fleetcast") for path in folder.rglob("*.py")}
    unknown = [a for _, a in questions if not {ROOT / a, ROOT / "fleetcast" / a} & files]
    assert unknown == []
