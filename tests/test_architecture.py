"""The rows of the picture, the owners of third-party libraries, and the house rules a machine can check."""

import ast
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from house import PROGRAMS, ROOT, House, folder_of, imports_of

DAEMONS = PROGRAMS[:2]
HOUSE = House(ROOT)
MODULES = HOUSE.modules
# A row a folder, as in docs/architecture.md: what it may import beside itself and the ground floor.
GROUND = "ground"
ROWS: dict[str, set[str]] = {
    GROUND: set(),
    "ingest": set(),
    "prometheus": {"ingest"},
    "storage": {"ingest"},
    "forecast": set(),
    "forecast.experts": {"forecast"},
    "capacity": set(),
    "promotion": {"forecast"},
    "sources": set(),
    "alerts": {"sources"},
    "drift.literal": set(),
    "drift.seasonal": {"forecast"},
    "drift": {"storage", "forecast", "drift.literal", "drift.seasonal"},
    "training": {"forecast", "forecast.experts", "drift", "drift.literal", "drift.seasonal", "storage"},
    "serving": {
        "alerts",
        "capacity",
        "forecast",
        "forecast.experts",
        "ingest",
        "prometheus",
        "promotion",
        "storage",
    },
    "api": {"serving", "ingest", "prometheus", "promotion"},
    "retraining": {
        "alerts",
        "storage",
        "sources",
        "forecast",
        "promotion",
        "drift",
        "drift.literal",
        "drift.seasonal",
        "training",
    },
    "inference": {
        "api",
        "serving",
        "storage",
        "ingest",
        "prometheus",
        "forecast",
        "promotion",
        "retraining",
    },
    "cluster": {"serving", "training"},
    "console": {"alerts", "prometheus", "promotion", "sources", "storage"},
    "client": {"sources", "ingest"},
    "backfill": {"sources", "prometheus", "ingest"},
    "live": {"sources"},
    "demo": {"forecast", "promotion", "sources", "storage"},
    "cli": set(),  # names the programs it runs; imports none
    "__main__": {"cli"},
}
TOP = set(ROWS)  # the programs, on top of everything but each other
# a library: the folders and files that may import it
OWNERS = {
    "torch": {"forecast.checkpoint", "training"},  # a checkpoint is written with it, and read without
    "pytorch_forecasting": {"training"},
    "lightning": {"training"},
    "threadpoolctl": {"forecast"},
    "ray": {"cluster"},
    "requests": {"sources.client", "outbound"},
    "psutil": {"sources.agent", "retraining.quiet"},
    "fastapi": {"api"},
    "starlette": {"api"},
    "uvicorn": {"api"},
    "msgspec": {"api", "ingest", "serving"},
    "google": {"prometheus"},
    "crc32c": {"storage"},
    "prometheus_client": {"serving", "retraining", "inference"},  # inference makes the registry
    "matplotlib": {"drift.figure"},
    "scipy": set(),
    "sklearn": set(),
}
NOT_ON_THE_GROUND = ("pandas", "pyarrow")
DURABLE_OWNERS = {"files", "storage.log"}
LOCK_OWNER = "locks"
MAX_FILES = 152  # with shards on Ray, and a network that needs torch in trainings only
MAX_FILE_LINES = 500
LONG_FILE_LINES = 400  # a warning: look for the seam
MAX_SINGLE_IMPORTERS = 28  # with the decoder of remote-write 2.0, which only the intake of writes asks
MAX_FUNCTION_LINES = 40
MAX_PARAMETERS = 7
SHORT_FUNCTION_LINES = 5  # says what it does without a docstring
NOUNS_IN_ED = ("feed", "speed", "need", "seed")
VAGUE_NAMES = ("util", "helper", "common", "manager", "misc")
every_module = pytest.mark.parametrize("name", sorted(MODULES))


def tree_of(name: str) -> ast.Module:
    return HOUSE.trees[name]


def short(name: str) -> str:
    """Return a module's name inside the package."""
    return name.removeprefix("fleetcast.")


def is_owner(name: str, owners: set[str]) -> bool:
    return short(name) in owners or folder_of(name) in owners


def functions(name: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree_of(name)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def body_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    body = node.body[1:] if ast.get_docstring(node) else node.body
    return (node.end_lineno or 0) - body[0].lineno + 1 if body else 0


def attributes(name: str) -> Iterator[str]:
    return (ast.unparse(node) for node in ast.walk(tree_of(name)) if isinstance(node, ast.Attribute))


@every_module
def test_a_folder_imports_only_what_its_row_names(name: str) -> None:
    here = folder_of(name)
    allowed = {here, GROUND} | (TOP if name in PROGRAMS else ROWS.get(here, set()))
    allowed |= {"data_buffer", "drift_monitor"} if name in PROGRAMS else set()
    foreign = {found for found in HOUSE.imports(name) if folder_of(found) not in allowed}
    assert foreign == set(), f"{here} may import {sorted(allowed)}"


def test_no_two_folders_import_each_other() -> None:
    table = HOUSE.folder_imports()
    pairs = {(a, b) for a, found in table.items() for b in found if a < b and a in table.get(b, set())}
    assert pairs == set()


def test_every_folder_has_a_row() -> None:
    assert {folder_of(name) for name in MODULES if name not in PROGRAMS} == set(ROWS)


@every_module
def test_no_module_imports_a_daemon_or_the_trainer(name: str) -> None:
    assert HOUSE.imports(name) & {*DAEMONS, "tft_trainer"} == set()


def test_only_the_command_runs_a_program_by_its_name_and_imports_none_for_that() -> None:
    assert [name for name in MODULES if "importlib.import_module" in attributes(name)] == ["fleetcast.cli"]
    assert HOUSE.imports("fleetcast.cli").isdisjoint(PROGRAMS)


def test_there_is_no_import_cycle() -> None:
    assert HOUSE.file_cycle() == set()


def test_the_house_has_few_rooms() -> None:
    assert len(HOUSE.counted) <= MAX_FILES
    single = [name for name, count in HOUSE.importers().items() if count == 1]
    assert len(single) <= MAX_SINGLE_IMPORTERS, f"pages of their one importer? {single}"


@every_module
def test_a_third_party_library_is_imported_by_its_owner_only(name: str) -> None:
    libraries = {found.split(".")[0] for found in imports_of(tree_of(name), MODULES)}
    foreign = {library for library in libraries & OWNERS.keys() if not is_owner(name, OWNERS[library])}
    assert foreign == set()
    if folder_of(name) == GROUND and short(name) != "bins":
        assert libraries.isdisjoint(NOT_ON_THE_GROUND)


@every_module
def test_only_the_clock_reads_the_time(name: str) -> None:
    if short(name) == "clock":
        return
    assert "time" not in set(imports_of(tree_of(name), MODULES))
    readers = ("datetime.now", "datetime.utcnow", "datetime.today", "date.today")
    assert [found for found in attributes(name) if found.endswith(readers)] == []


@every_module
def test_only_files_and_the_log_make_things_durable_and_only_locks_locks(name: str) -> None:
    if short(name) in DURABLE_OWNERS:
        return
    durable = ("os.replace", "os.rename", "os.fsync", "os.fdatasync")
    assert [found for found in attributes(name) if found in durable] == []
    assert short(name) == LOCK_OWNER or "fcntl" not in set(imports_of(tree_of(name), MODULES))


@every_module
def test_nothing_unpickles_or_evaluates(name: str) -> None:
    assert {"cloudpickle", "joblib", "marshal", "shelve"}.isdisjoint(imports_of(tree_of(name), MODULES))
    calls = [node for node in ast.walk(tree_of(name)) if isinstance(node, ast.Call)]
    for call in calls:
        called = ast.unparse(call.func)
        assert called not in ("eval", "exec"), ast.unparse(call)
        assert not called.startswith("pickle."), ast.unparse(call)  # its exceptions may be caught
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if called == "torch.load":
            assert keywords.get("weights_only") == "True", ast.unparse(call)
        if called == "np.load":
            assert keywords.get("allow_pickle", "False") == "False", ast.unparse(call)


@every_module
def test_a_file_is_a_chapter_of_readable_length(name: str) -> None:
    lines = len(MODULES[name].read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_FILE_LINES, f"{MODULES[name].name} has {lines} lines: cut it where the story turns"
    if lines > LONG_FILE_LINES:
        warnings.warn(f"{name} has {lines} lines, near the limit of a chapter", stacklevel=1)
    assert not any(vague in name for vague in VAGUE_NAMES)


@every_module
def test_functions_are_short(name: str) -> None:
    long = {node.name: n for node in functions(name) if (n := body_lines(node)) > MAX_FUNCTION_LINES}
    assert long == {}


@every_module
def test_functions_take_few_parameters(name: str) -> None:
    def count(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
        given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        return sum(item.arg not in ("self", "cls") for item in given)

    crowded = {node.name: n for node in functions(name) if (n := count(node)) > MAX_PARAMETERS}
    assert crowded == {}


@every_module
def test_a_function_is_a_verb_or_what_it_returns_not_a_participle(name: str) -> None:
    participles = {
        node.name
        for node in functions(name)
        if re.fullmatch(r"_*[a-z]+ed(_of)?", node.name) and node.name.strip("_") not in NOUNS_IN_ED
    }
    assert participles == set()


@every_module
def test_modules_classes_and_public_functions_say_what_they_do(name: str) -> None:
    tree = tree_of(name)
    assert ast.get_docstring(tree), "the module says nothing about itself"
    public = [
        node
        for scope in (tree, *(node for node in tree.body if isinstance(node, ast.ClassDef)))
        for node in scope.body
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and not node.name.startswith("_")
        and not any(
            "overload" in ast.unparse(item) or ".setter" in ast.unparse(item) for item in node.decorator_list
        )
    ]
    silent = [
        node.name
        for node in public
        if not ast.get_docstring(node)
        and not is_protocol_method(tree, node)
        and (isinstance(node, ast.ClassDef) or body_lines(node) > SHORT_FUNCTION_LINES)
    ]
    assert silent == []


def is_protocol_method(tree: ast.Module, node: ast.AST) -> bool:
    protocols = [
        scope
        for scope in tree.body
        if isinstance(scope, ast.ClassDef) and any("Protocol" in ast.unparse(base) for base in scope.bases)
    ]
    # what a base class or protocol documents already
    inherited = ("now", "format", "forward", "training_step", "configure_optimizers", "on_train_epoch_end")
    return any(node in scope.body for scope in protocols) or getattr(node, "name", "") in inherited


@every_module
def test_errors_are_caught_narrowly(name: str) -> None:
    for node in ast.walk(tree_of(name)):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"bare except in line {node.lineno}"
            assert "BaseException" not in ast.unparse(node.type) or reraises(node), f"line {node.lineno}"


def test_threads_are_watched() -> None:
    """A thread that `fleetcast.workers` did not begin can end without a word."""
    found = {
        name
        for name in MODULES
        for node in ast.walk(tree_of(name))
        if isinstance(node, ast.Attribute | ast.Name)
        and ast.unparse(node).split(".")[-1] in ("Thread", "Timer")
    }
    assert found == {"fleetcast.workers"}


def reraises(handler: ast.ExceptHandler) -> bool:
    return any(isinstance(node, ast.Raise) and node.exc is None for node in ast.walk(handler))


@every_module
def test_there_is_no_leftover_and_no_emoji(name: str) -> None:
    text = MODULES[name].read_text(encoding="utf-8")
    assert "TODO" not in text
    assert "FIXME" not in text
    assert [char for char in text if ord(char) > 0x2BFF] == []


def loaded_after(code: str, tmp_path: Path) -> set[str]:
    """Return the modules a fresh interpreter holds after `code`."""
    watched = "import sys\n" + code + "\nprint('\\n' + ' '.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", watched],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_answers_without_torch_pandas_and_scipy(program: str, tmp_path: Path) -> None:
    code = (
        f"import runpy\nsys.argv = ['{program}.py', '--help']\n"
        f"try: runpy.run_path({str(ROOT / program)!r} + '.py', run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
    )
    assert loaded_after(code, tmp_path).isdisjoint({"torch", "pandas", "scipy", "pyarrow", "lightning"})


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["version", "--json"]], ids=" ".join)
def test_the_command_answers_without_torch_pandas_and_scipy(arguments: list[str], tmp_path: Path) -> None:
    code = (
        f"from fleetcast.cli import main\ntry: code = main({arguments!r})\n"
        "except SystemExit as end: code = end.code\nassert code == 0, code\n"
    )
    assert loaded_after(code, tmp_path).isdisjoint({"torch", "pandas", "scipy", "pyarrow", "lightning"})


@pytest.mark.parametrize("name", [*PROGRAMS, "fleetcast.sources.replay"])
def test_importing_does_nothing(name: str, tmp_path: Path) -> None:
    code = (
        f"import {name}, logging, threading, signal\n"
        "assert not logging.getLogger().handlers\n"
        "assert threading.active_count() == 1\n"
        "assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL\n"
    )
    assert loaded_after(code, tmp_path).isdisjoint({"torch", "scipy"})
    assert list(tmp_path.iterdir()) == []
