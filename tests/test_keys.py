"""The keys of a recipe: what TRL's source says of its own, the reference made of them, and `--help`."""

import dataclasses
import subprocess
import sys
import typing
from pathlib import Path

import pydantic
import pytest
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType
from transformers.training_args import OptimizerNames
from trl import DPOConfig, ModelConfig, SFTConfig

from core.config import entries
from core.config.keys import keys_of, reference
from core.config.parsing import look_over
from core.config.reading import load
from core.config.trl_keys import ACCEPTED, DEFAULTS, OURS, PLAIN, RANGES, REFUSED, RENAMED
from core.data import preferences
from core.runtime.text import did_you_mean

ROOT = Path(__file__).parents[1]
# A source that each script can read.
FIRST_LINE = {
    "dpo.py": ["--datasets.0.columns", "{prompt: p, chosen: c, rejected: r}"],
    "evaluate.py": ["--datasets.0.columns", "{prompt: p, chosen: c, rejected: r}"],
    "sft.py": ["--datasets.0.columns", "{conversation: m}"],
}
HEAVY = {"torch", "trl", "transformers", "datasets"}
KINDS = [("dpo", DPOConfig), ("sft", SFTConfig), ("evaluate", DPOConfig)]


@pytest.mark.parametrize(("kind", "config"), KINDS)
def test_the_source_of_trl_is_read_as_it_is(kind, config):
    """Its fields, types and defaults; each is accepted or refused, or ours by the same name."""
    theirs = {entry.name: entry for entry in (*dataclasses.fields(config), *dataclasses.fields(ModelConfig))}
    theirs = {name: entry for name, entry in theirs.items() if not name.startswith("_")}
    assert len(ACCEPTED[kind]) > 80 and not set(ACCEPTED[kind]) & set(REFUSED[kind])
    assert {*ACCEPTED[kind], *REFUSED[kind]} == set(theirs) - (set(OURS) - set(REFUSED[kind]))
    for name, key in ACCEPTED[kind].items():
        factory, default = theirs[name].default_factory, theirs[name].default
        default = factory() if factory is not dataclasses.MISSING else getattr(default, "value", default)
        assert key.default == default, name
        if name in RANGES:
            assert not {"bool", "bool | None"} & {key.annotation}, f"{name} needs no range"
        else:
            assert PLAIN[key.annotation] == theirs[name].type, name
        if default is not None:
            pydantic.TypeAdapter(keys_of(kind)[name].type).validate_python(default, strict=True)


def test_one_default_holds_for_both_stages_where_the_checks_read_it():
    differ = {name for name, key in ACCEPTED["sft"].items() if key.default != DEFAULTS[name]}
    assert differ == {"learning_rate", "loss_type"}


def test_the_ranges_are_of_accepted_keys_and_agree_with_transformers_on_choices():
    assert set(RANGES) <= set(ACCEPTED["dpo"]) | set(ACCEPTED["sft"])

    def choices(key: str) -> set[str]:
        return set(typing.get_args(RANGES[key]))

    assert choices("lr_scheduler_type") == {entry.value for entry in SchedulerType}
    assert choices("eval_strategy") == choices("logging_strategy") == {entry.value for entry in IntervalStrategy}
    assert choices("save_strategy") == {entry.value for entry in SaveStrategy}
    assert choices("optim") < {entry.value for entry in OptimizerNames}


def test_renamed_keys_are_none_of_dpos():
    assert not set(RENAMED) & set(keys_of("dpo"))
    for key, ours in RENAMED.items():  # what likeness finds needs no row
        assert did_you_mean(key, keys_of("dpo")) != f"; did you mean {ours}?", key


def test_row_columns_are_those_of_the_rows():
    """Written out twice, so that a recipe is read without the libraries of the rows."""
    assert tuple(preferences.FEATURES) == entries.ROW_COLUMNS


# -------------------------------------------------------------------------------------------------- reference and help


def test_the_reference_is_what_the_code_says():
    assert (ROOT / "recipes/KEYS.md").read_text(encoding="utf-8") == reference() + "\n", "run `make keys`"


@pytest.mark.parametrize("kind", ["dpo", "sft", "evaluate"])
def test_every_key_is_described_and_helped_with_and_its_example_is_in_range(kind, capsys):
    with pytest.raises(SystemExit) as ended:
        look_over(kind, ["--help"])
    assert ended.value.code == 0
    printed, keys = capsys.readouterr().out, keys_of(kind)
    assert f"recipes/{kind}.py" in printed and len(keys) > 100
    for name, key in keys.items():
        assert key.description and "\n" not in key.description, name
        assert (f"- `{name}`: {key.description} (" in printed) == (not name.startswith("eval_datasets.")), name
        if key.example:
            value, _ = load(key.example, name)
            assert value != key.default, f"{name}: an example of the default shows nothing"
            pydantic.TypeAdapter(key.type, config={"strict": True}).validate_python(value)
        else:
            assert not key.ours or any(other.startswith(f"{name}.") for other in keys), f"{name} has no example"


@pytest.mark.parametrize("script", ["dpo.py", "sft.py", "evaluate.py", "check.py"])
def test_help_and_a_misspelt_key_need_neither_torch_nor_trl(script, tmp_path):
    """They take seconds to import, under a launcher in every process."""
    done, imported = run(script, "--help")
    assert done.returncode == 0 and "- `learning_rate`: " in done.stdout
    assert ("--gpu_memory" in done.stdout) == (script == "check.py")
    assert "core.config.keys" in imported and not HEAVY & imported
    if script == "check.py":  # which goes on with what is right
        return
    recipe = tmp_path / "my.yaml"
    recipe.write_text("model_name_or_path: tiny\noutput_dir: o\ndatasets: [{path: x}]\nlerning_rate: 1\n")
    done, imported = run(script, "--config", str(recipe))
    assert done.returncode == 2
    assert "line 4: lerning_rate: unknown key; did you mean learning_rate?" in done.stderr
    assert "core.config.keys" in imported and not HEAVY & imported


@pytest.mark.parametrize("script", ["dpo.py", "sft.py", "evaluate.py"])
def test_the_first_line_says_what_runs_before_torch_is_imported(script, tmp_path):
    recipe = tmp_path / "my.yaml"
    recipe.write_text("model_name_or_path: tiny\noutput_dir: runs/o\ndatasets: [{path: x}]\n")
    argv = [script, "--config", str(recipe), *FIRST_LINE[script]]
    code = f"""if True:
        import builtins, os, runpy, sys
        def said(*words, **_):
            os.write(1, f"{{words[0]}} {{sorted({HEAVY!r} & sys.modules.keys())}}".encode())
            os._exit(0)
        builtins.print, sys.argv = said, {argv!r}
        runpy.run_path({script!r}, run_name="__main__")"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT / "recipes", capture_output=True, text=True)
    assert done.stdout == f"{recipe} by recipes/{script}, into runs/o []", done.stderr


def run(script: str, *argv: str) -> tuple[subprocess.CompletedProcess, set[str]]:
    """A script in a process of its own, and the modules that it imported."""
    command = [sys.executable, "-X", "importtime", script, *argv]
    done = subprocess.run(command, cwd=ROOT / "recipes", capture_output=True, text=True)
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time")]
    return done, {line.rpartition("|")[2].strip() for line in lines}
