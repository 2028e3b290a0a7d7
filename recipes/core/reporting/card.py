"""The model card: README.md of an output folder, made of the files that the run has left there."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import yaml
from huggingface_hub import ModelCardData

from core.config.trl_keys import DEFAULTS
from core.objective.losses import row_margin
from core.objective.margins import class_table
from core.objective.presets import Margin
from core.reporting.tables import (
    Rows,
    before_and_after,
    comparable,
    evaluation_table,
    group_table,
    is_numeric,
    margin_table,
    number,
    stage_table,
)
from core.runtime.environment import versions
from core.runtime.text import printable, without_secrets
from core.training.records import Record, evaluations, read_metrics, series

TEMPLATE = Path(__file__).with_name("card.md.jinja")
# The columns of the card that this project reproduces, wxzhang/dpo-selective-buffer-spo-shift.
TRAINING_COLUMNS = (
    "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins",
    "logps/rejected", "logps/chosen", "logits/rejected", "logits/chosen",
)  # fmt: skip
ROWS_OF_A_LOG = 20
PLOTS = ("loss", "rewards", "reward_margins", "accuracies", "histograms")
SECRETS = {"token", "hub_token", "push_to_hub_token"}
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
ABSOLUTE = re.compile(r"(file://|~|/|[A-Za-z]:\\)")


def write_card(output_dir: str | os.PathLike, world_size: int | None = None) -> Path:
    """
    Write `output_dir/README.md` from the run's recipe.yaml and metrics.jsonl and, where they are there,
    selection.json (of a preference run), results.json and plots/*.png. Of the machine it names nothing: absolute paths
    are cut to their last part, tokens are left out.

    Args:
        world_size: processes that trained; None where that is no longer known.

    Raises:
        RecipeError: metrics.jsonl is not there or not readable.
    """
    folder = Path(output_dir)
    recipe = _public(yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8")))
    margin = Margin(**recipe["margin"]) if "margin" in recipe else None
    beta = recipe.get("beta", DEFAULTS["beta"])
    selection = _read_json(folder / "selection.json") if margin else None
    records = comparable(read_metrics(folder), margin is None or margin.reference_free)
    before, after = before_and_after(records)
    adapter, base = _read_json(folder / "adapter_config.json"), recipe["model_name_or_path"]
    if adapter is not None:
        base = _public(adapter.get("base_model_name_or_path") or base)  # the recipe's may be an adapter itself
    trained = recipe.get("trainable_parameters") or recipe.get("lora_target_modules") or []
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "markdown": markdown_text,
        "table": markdown_table,
        "fenced": fenced,
        "link": _hub_link,
        "number": number,
    }
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        metadata=_metadata(recipe, adapter is not None, base, margin, selection).to_yaml(),
        name=folder.resolve().name,
        base=recipe["model_name_or_path"],
        sources={role: _paths(recipe, role) for role in ("task", "buffer")},
        adapter=adapter is not None,
        under=base,
        quantised=next((bits for bits in (4, 8) if recipe.get(f"load_in_{bits}bit")), None),
        options=_quantisation(recipe),
        before=before,
        after=after,
        evaluation=evaluation_table(before, after) if after and margin else None,
        training=training_table(records),
        results=_results(folder),
        margin=margin,
        beta=beta,
        classes=_class_margins(margin, beta) if margin else None,
        selection=selection,
        tables=_selection_tables(selection["counts"]) if selection else [],
        trained=", ".join([trained] if isinstance(trained, str) else trained),
        batch=_batch(recipe, world_size),
        recipe=yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True),
        versions=[list(item) for item in versions().items()],
        plots=[name for name in PLOTS if (folder / "plots" / f"{name}.png").is_file()],
    )
    path = folder / "README.md"
    path.write_text(text + "\n", encoding="utf-8")
    return path


def training_table(records: list[Record]) -> tuple[list[str], Rows]:
    """
    A row per evaluation with the last training loss logged by then; of a run without one, rows of the training log
    instead, `ROWS_OF_A_LOG` at most. Columns that no row has are left out.
    """
    shown, prefix, columns = evaluations(records), "eval_", {"Validation Loss": "eval_loss"}
    if not shown:
        shown, prefix, columns = [record for record in records if "loss" in record], "", {}
        places = np.linspace(0, len(shown) - 1, min(len(shown), ROWS_OF_A_LOG)).round().astype(int)
        shown = [shown[place] for place in places]
    columns |= {name.capitalize(): prefix + name for name in TRAINING_COLUMNS}
    columns = {name: key for name, key in columns.items() if any(key in record for record in shown)}
    steps, losses = series(records, "loss")
    rows = []
    for record in shown:
        logged = [loss for step, loss in zip(steps, losses, strict=True) if step <= record["step"]]
        start = [number(logged[-1]) if logged else "No log", number(record["epoch"]), str(record["step"])]
        rows.append(start + [number(record.get(key)) for key in columns.values()])
    return ["Training Loss", "Epoch", "Step", *columns], rows


# ---------------------------------------------------------------- Markdown, in which names and ids may hold anything
def markdown_text(text: str) -> str:
    """Words of others as Markdown that shows them as they are: no HTML, link, emphasis, line or cell of their own."""
    return re.sub(r"[\\`*\[\]<>|]", r"\\\g<0>", printable(text))


def markdown_table(table: tuple[Sequence[str], Rows]) -> str:
    """Header and rows as a Markdown table, columns of numbers to the right."""
    header, rows = table
    rule = ["--:" if is_numeric(row[index] for row in rows) else ":--" for index in range(len(header))]
    lines = [list(map(markdown_text, header)), rule, *(list(map(markdown_text, row)) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def fenced(text: str, language: str) -> str:
    """A block of code, in a fence longer than any that stands in it."""
    fence = "`" * max([3, *(1 + len(run) for run in re.findall("`+", text))])
    lines = [printable(line) for line in text.rstrip("\n").split("\n")]
    return "\n".join([fence + language, *lines, fence])


def _hub_link(name: str, kind: str = "") -> str:
    if _on_hub(name):
        return f"[{name}](https://huggingface.co/{kind}{name})"
    return "`" + printable(name).replace("`", "'") + "`"


# ---------------------------------------------------------------- what the run's files say
def _read_json(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _public(value: Any) -> Any:
    """A recipe without tokens and without this machine's paths."""
    if isinstance(value, dict):
        return {key: _public(v) for key, v in value.items() if key not in SECRETS}
    if isinstance(value, list):
        return [_public(v) for v in value]
    if isinstance(value, str):
        if ABSOLUTE.match(value):
            return re.split(r"[/\\]", value.rstrip("/\\"))[-1]
        return without_secrets(value)
    return value


def _paths(recipe: dict[str, Any], role: str) -> list[str]:
    return [entry["path"] for entry in recipe["datasets"] if entry.get("role", "task") == role]


def _on_hub(name: str) -> bool:
    return bool(HUB_ID.fullmatch(name)) and not name.startswith(".") and not os.path.exists(name)


def _metadata(
    recipe: dict[str, Any], adapter: bool, base: str, margin: Margin | None, selection: dict[str, Any] | None
) -> ModelCardData:
    """What the Hub searches by; only what is so. A recipe tells no licence, so that the card has none."""
    sources = [entry["path"] for entry in recipe["datasets"] if _on_hub(entry["path"])]
    tags = ["trl", "dpo", "preference-optimization"] if margin else ["trl", "sft"]
    if margin and (margin.a, margin.b, margin.k, margin.c) != (0, 0, 0, 0):
        tags.append("shifted-reward-margin")
    if selection:
        counts = selection["counts"]
        if any(count for name, count in counts["by_class"]["after"].items() if "unsafe" in name):
            tags.append("safety")
        if counts["by_role"]["after"].get("buffer"):
            tags.append("selective-buffer")
    return ModelCardData(
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        base_model=base if _on_hub(base) else None,
        datasets=list(dict.fromkeys(sources)) or None,
        tags=tags,
    )


def _quantisation(recipe: dict[str, Any]) -> str:
    """The arguments of transformers' BitsAndBytesConfig."""
    if recipe.get("load_in_8bit"):
        return "load_in_8bit=True"
    kind, nested = recipe.get("bnb_4bit_quant_type", "nf4"), bool(recipe.get("use_bnb_nested_quant"))
    return f'load_in_4bit=True, bnb_4bit_quant_type="{kind}", bnb_4bit_use_double_quant={nested}'


def _class_margins(margin: Margin, beta: float) -> tuple[list[str], Rows] | None:
    """Margin, target and first loss of each pair class; None where rows of a class differ in their margins."""
    if margin.k or margin.indicator == "severity":
        return None
    labelled = np.arange(4)
    values = row_margin(margin.a, margin.b, 0.0, margin.c, margin.phi, labelled < 2, labelled % 2 == 0)
    header, rows = margin_table(class_table(labelled, np.zeros(4, dtype=bool), values, margin, beta))
    return [header[1], *header[3:]], [[row[1], *row[3:]] for row in rows]


def _batch(recipe: dict[str, Any], world_size: int | None) -> str | None:
    """The arithmetic of an update, e.g. "2 per device × 8 accumulated × 2 processes = 32"."""
    if world_size is None:
        return None
    device = recipe.get("per_device_train_batch_size", DEFAULTS["per_device_train_batch_size"])
    accumulation = recipe.get("gradient_accumulation_steps", DEFAULTS["gradient_accumulation_steps"])
    total = recipe.get("pairs_per_update") or recipe.get("conversations_per_update")  # what accumulation is fitted to
    total = total or device * accumulation * world_size
    processes = "process" if world_size == 1 else "processes"
    return f"{device} per device × {total // device // world_size} accumulated × {world_size} {processes} = {total}"


def _results(folder: Path) -> tuple[list[str], Rows] | None:
    """What an evaluation of the run's own (results.json: measure → before and after) has found, if there was one."""
    try:
        results = _read_json(folder / "results.json") or {}
    except ValueError as error:
        results = {}
        print(f"note: {folder / 'results.json'} is no JSON ({error}), so the card leaves it out", flush=True)
    rows = [
        [name.replace("_", " "), number(values["before"]), number(values["after"])]
        for name, values in (results.items() if isinstance(results, dict) else ())
        if isinstance(values, dict) and {"before", "after"} <= values.keys()
    ]
    return ["Measure", "Before", "After"], rows


def _selection_tables(counts: dict[str, Any]) -> list[tuple[list[str], Rows]]:
    """By stage, and by pair class, source and role where there is more than one of them."""
    kinds = {"Pair class": "by_class", "Source": "by_source", "Role": "by_role"}
    groups = [group_table(name, counts[key]) for name, key in kinds.items() if len(counts[key]["before"]) > 1]
    return [stage_table(counts), *groups]
