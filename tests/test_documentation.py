"""What the documentation names exists: paths, commands, make targets, recipe keys; and the rules of the tree hold."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from test_structure import MAY_IMPORT

ROOT = Path(__file__).parents[1]
TRACKED = subprocess.run(
    ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
).stdout.split()
MARKDOWN = [ROOT / name for name in TRACKED if name.endswith(".md")]
TEXTS = [
    ROOT / name
    for name in TRACKED
    if (name.endswith((".md", ".yaml", ".py", ".sh", ".slurm")) or name == "Makefile")
    and not name.startswith("tests/")
]
PLACES = r"(?:recipes|accelerate_configs|tests)/[\w./-]*\w"


def test_there_is_documentation_to_check():
    assert len(MARKDOWN) >= 3
    assert len(TEXTS) >= 50


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_paths_that_are_named_exist_and_links_lead_somewhere(path):
    text = path.read_text(encoding="utf-8")
    named = {ROOT / name.rstrip(".") for name in re.findall(PLACES, text) if "*" not in name}
    if path in MARKDOWN:
        targets = re.findall(r"\]\(([^)#]+)\)", text)
        named |= {path.parent / target for target in targets if "://" not in target}
    assert not [name for name in named if not name.exists()]


def test_make_targets_that_are_named_exist_and_help_lists_every_one():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for path in TEXTS:
        named = set(re.findall(r"(?:^|[\s`])make ([a-z][a-z-]+)(?=[\s`]|$)", path.read_text(encoding="utf-8"), re.M))
        commands = named & {*targets, "check", "bench", "torture", "train", "test", "style"}
        assert commands <= targets, f"{path}: {commands - targets}"
    command = ["make", "--no-print-directory", "help"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {line.split()[0] for line in shown.splitlines()} == targets
    assert all(len(line.split()) > 3 for line in shown.splitlines())


def test_every_requirement_is_an_exact_pin_with_its_reason():
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    assert len(lines) >= 15
    for line in lines:
        assert re.match(r"[\w-]+==[\w.]+(\s+#|$)", line), line


def test_no_module_bears_the_name_of_an_installed_package():
    """`recipes/datasets.py` would shadow Hugging Face's: the scripts have recipes/ as sys.path[0]."""
    top = ROOT / "recipes"
    modules = [path.stem for path in [*top.glob("*.py"), *(path.parent for path in top.glob("*/__init__.py"))]]
    assert {"dpo", "core", "benchmark"} < set(modules)
    own = {str(ROOT), str(top), str(ROOT / "tests")}
    elsewhere = [place for place in sys.path if place not in own and place != ""]
    shadowed = [name for name in modules if importlib.machinery.PathFinder.find_spec(name, elsewhere) is not None]
    assert not shadowed


def test_top_level_holds_what_it_should():
    expected = {
        "recipes", "accelerate_configs", "tests", "Makefile", "requirements.txt", "README.md", "LICENSE",
        "pyproject.toml", "CHANGELOG.md", "CONTRIBUTING.md",
    }  # fmt: skip
    assert {name.split("/")[0] for name in TRACKED if not name.startswith(".")} == expected


def test_readme_is_short_draws_the_rooms_and_says_where_to_read_first():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200
    rooms, files = text.split("holds that, and")[1].split("**Where to read first**")
    assert re.findall(r"^    ([a-z]+) ", rooms, re.M) == list(reversed(MAY_IMPORT))
    first = re.findall(r"^    (recipes/\S+\.py)", files, re.M)
    assert first[0] == "recipes/core/objective/losses.py" and len(first) <= 8


def test_every_recipe_is_in_the_table():
    table = (ROOT / "recipes/README.md").read_text(encoding="utf-8")
    recipes = [path.relative_to(ROOT / "recipes") for path in (ROOT / "recipes").rglob("*.yaml")]
    assert len(recipes) >= 10
    assert not [str(recipe) for recipe in recipes if f"]({recipe})" not in table]
