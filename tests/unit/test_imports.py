"""Which part may import which: the arrows of docs/architecture.md, and what the command line may need."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "beaker_sessions"
NAME = PACKAGE.name

COMMON = {"", "errors", "model", "grammar", "ids", "settings", "bodies", "wire", "exposition", "trust", "integrity"}
# part -> the parts below it, which alone it may import. A part is a module of the package or a directory of them; the
# longest that matches counts.
BELOW: dict[str, set[str]] = {
    "": set(),
    "errors": set(),
    "model": set(),
    "grammar": {"errors"},
    "ids": {"errors"},
    "settings": {"errors", "model", "transport"},
    "bodies": {"errors", "model", "grammar", "ids"},
    "wire": {"errors", "model", "grammar", "ids", "bodies"},
    "transport": {"errors"},
    "client": {"", "errors", "transport"},
    "exposition": set(),
    "trust": {"errors"},
    "integrity": set(),
    "sandbox": {"errors", "model", "grammar", "trust"},
    "executor": {*COMMON, "client", "transport", "sandbox"},
    "server": {*COMMON, "transport"},
    "cli": {"", "errors", "client", "transport"},
}
# inside the server: the store knows nothing of the rules, and nobody but the rules knows of the store
STORE = ("server.store", "server.tables", "server.migrations")
WEB = ("server.routes", "server.guard", "server.main", "server.console")
STANDARD_LIBRARY_ALONE = ("", "errors", "transport", "client", "cli")
PYTHON_OF_FOREIGN_IMAGES = (3, 9)


def modules() -> dict[str, Path]:
    """Module name within the package ("" for the package itself) -> file."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = path
    return found


MODULES = modules()


def imports(module: str, top_level: bool = False) -> set[str]:
    """Absolute names of what a module imports, `TYPE_CHECKING` blocks and functions' own imports included.

    top_level: only what is imported as soon as the module is.
    """
    path = MODULES[module]
    package = [NAME, *module.split(".")] if module else [NAME]
    if path.name != "__init__.py":
        package.pop()
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                inside = origin.partition(".")[2]
                name = f"{inside}.{alias.name}" if inside else alias.name
                is_module = origin.split(".")[0] == NAME and name in MODULES
                found.add(f"{origin}.{alias.name}" if is_module else origin)
    return found


def own(names: set[str]) -> set[str]:
    """Those within the package, named as in MODULES."""
    return {name.partition(".")[2] for name in names if name.split(".")[0] == NAME}


def part(module: str) -> str:
    return module.split(".")[0]


def below(module: str, parents: tuple[str, ...]) -> bool:
    return any(module == parent or module.startswith(f"{parent}.") for parent in parents)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_one_way(module: str) -> None:
    allowed = BELOW[part(module)] | {part(module)}
    wrong = {name for name in own(imports(module)) if part(name) not in allowed}
    assert not wrong, f"{module} must not import {sorted(wrong)}"


def test_only_the_rules_of_the_server_touch_the_store() -> None:
    for module in MODULES:
        if (below(module, WEB) and module != "server.main") or not below(module, ("server",)):
            assert not [name for name in own(imports(module)) if below(name, STORE)], module


def test_the_store_knows_no_rules() -> None:
    for module in MODULES:
        if below(module, STORE):
            known = {name for name in own(imports(module)) if below(name, ("server",)) and name != "server"}
            assert all(below(name, STORE) for name in known), module


def test_executor_decides_without_knowing_drivers() -> None:
    """The wiring chooses the driver; all else knows the interface alone."""
    for module in MODULES:
        if below(module, ("executor",)) and module != "executor.main":
            drivers = {"sandbox.docker", "sandbox.oci", "sandbox.fake"}
            assert not [name for name in own(imports(module)) if below(name, tuple(drivers))], module


def test_nothing_is_imported_in_a_circle() -> None:
    graph = {module: own(imports(module, top_level=True)) & set(MODULES) - {module} for module in MODULES}
    # Importing a module imports the packages that it is in; that is no choice of its author.
    while leaves := {module for module, needs in graph.items() if not needs}:
        graph = {module: needs - leaves for module, needs in graph.items() if module not in leaves}
    assert not graph, f"in or above a circle: {sorted(graph)}"


def test_the_package_itself_imports_nothing() -> None:
    assert not imports("")


@pytest.mark.parametrize("module", [name for name in sorted(MODULES) if below(name, STANDARD_LIBRARY_ALONE)])
def test_the_command_line_needs_the_standard_library_alone(module: str) -> None:
    foreign = {name.split(".")[0] for name in imports(module)} - set(sys.stdlib_module_names) - {NAME}
    assert not foreign


@pytest.mark.parametrize("module", [name for name in sorted(MODULES) if below(name, STANDARD_LIBRARY_ALONE)])
def test_the_command_line_is_written_for_the_python_of_foreign_images(module: str) -> None:
    ast.parse(MODULES[module].read_text(), feature_version=PYTHON_OF_FOREIGN_IMAGES)
