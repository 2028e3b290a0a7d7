"""The rooms of recipes/core and the arrows between them: nobody imports upwards."""

import ast
from pathlib import Path

CORE = Path(__file__).parents[1] / "recipes/core"
# From the ground up: a package may import those that stand in its row.
MAY_IMPORT = {
    "runtime": set(),
    "objective": {"runtime"},
    "config": {"runtime", "objective"},
    "data": {"runtime", "objective", "config"},
    "selection": {"runtime", "objective", "config", "data"},
    "modeling": {"runtime", "config"},
    "judging": {"runtime", "objective", "config", "data", "modeling"},
    "training": {"runtime", "objective", "config", "data", "selection", "modeling"},
    "reporting": {"runtime", "objective", "config", "data", "selection", "modeling", "judging", "training"},
    "planning": {
        "runtime",
        "objective",
        "config",
        "data",
        "selection",
        "modeling",
        "judging",
        "training",
        "reporting",
    },
}


def imports(path: Path) -> set[str]:
    """Modules of this project that a file imports, those that it imports late included, by their dotted names."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: say where the module is from the top: from core..."
            names |= {f"{node.module}.{name.name}" for name in node.names}
        elif isinstance(node, ast.Import):
            names |= {name.name for name in node.names}
    return {name for name in names if name.startswith("core.")}


def test_every_room_has_its_row():
    rooms = {path.name for path in CORE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert rooms == set(MAY_IMPORT)
    assert all((CORE / room / "__init__.py").is_file() for room in rooms), (
        "an installed package of that name would win"
    )
    assert {path.name for path in CORE.glob("*.py")} == {"__init__.py"}


def test_no_arrow_runs_upwards():
    modules = sorted(CORE.rglob("*.py"))
    assert len(modules) >= 40
    upwards = [
        f"{path.relative_to(CORE)} imports {name}"
        for path in modules
        for name in sorted(imports(path))
        if name.split(".")[1] not in MAY_IMPORT[path.parent.name] | {path.parent.name}
    ]
    assert not upwards, "\n".join(upwards)
