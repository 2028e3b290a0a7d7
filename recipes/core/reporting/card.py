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

from core.config.trl_keys import DEFAULTS
from core.objective.losses import row_margin
from core.objective.margins import class_table
from core.objective.presets import Margin
from core.reporting.tables import Rows, evaluation_table, group_table, is_numeric, margin_table, number, stage_table
from core.runtime.environment import versions
from core.training.records import Record, evaluations, read_metrics, series

TEMPLATE = Path(__file__).with_name("card.md.jinja")
# The columns of the card that this project reproduces, wxzhang/dpo-selective-buffer-spo-shift.
TRAINING_COLUMNS = {
    "Validation Loss": "loss",
    "Rewards/chosen": "rewards/chosen",
    "Rewards/rejected": "rewards/rejected",
    "Rewards/accuracies": "rewards/accuracies",
    "Rewards/margins": "rewards/margins",
    "Logps/rejected": "logps/rejected",
    "Logps/chosen": "logps/chosen",
    "Logits/rejected": "logits/rejected",
    "Logits/chosen": "logits/chosen",
}
ROWS_OF_A_LOG = 20
PLOTS = ("loss", "rewards", "margins", "accuracies", "margin_histogram")
FORMULAS = {
    "logistic": "−log σ(βΔ − m)",
    "hinge": "max(0, 1 + m − βΔ)",
    "squared": "(Δ − m/β)²",
    "signed": "−log σ(sign(m)·βΔ·|2m|^p)",
    "soft": "−q·log σ(βΔ) − (1 − q)·log σ(−βΔ), q = clip((1 + m)/2, ε, 1 − ε)",
}
SOURCES = {
    "dpo": ("DPO", "2305.18290", "Eq. 7"),
    "odpo": ("ODPO", "2402.10571", ""),
    "safedpo": ("SafeDPO", "2505.20065", ""),
    "simpo": ("SimPO", "2405.14734", ""),
    "ipo": ("IPO", "2310.12036", "Eq. 17"),
    "bfpo": ("BFPO", "2408.15313", ""),
    "bfpo_noshift": ("BFPO without its shift α", "2408.15313", ""),
    "bfpo_signed": ("the sign-flipping form of BFPO", "2504.20106", "Eq. 7"),
    "bfpo_soft": ("BFPO's table with a soft label", "2408.15313", ""),
}
SETTINGS = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "optim",
    "weight_decay",
    "max_grad_norm",
    "num_train_epochs",
    "max_steps",
    "max_length",
    "bf16",
    "fp16",
    "gradient_checkpointing",
    "trainable_parameters",
    "use_peft",
    "lora_r",
    "lora_alpha",
    "lora_target_modules",
    "prefix_sharing",
    "seed",
)
SECRETS = {"token", "hub_token", "push_to_hub_token"}
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
ABSOLUTE = re.compile(r"(file://|~|/|[A-Za-z]:\\)")
ACCESS_TOKEN = re.compile(r"hf_[A-Za-z0-9]{20,}")


def write_card(output_dir: str | os.PathLike, world_size: int | None = None) -> Path:
    """
    Write `output_dir/README.md` from the run's recipe.yaml and metrics.jsonl and, where they are there,
    selection.json, results.json and plots/*.png. Of the machine it names nothing: absolute paths are cut to their last
    part, tokens are left out.

    Args:
        world_size: processes that trained; None where that is no longer known.

    Raises:
        RecipeError: metrics.jsonl is not there or not readable.
    """
    folder = Path(output_dir)
    recipe = _public(yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8")))
    records = read_metrics(folder)
    evaluated = evaluations(records)
    before = evaluated[0] if evaluated and evaluated[0]["step"] == 0 else {}
    base = recipe["model_name_or_path"]
    margin = Margin(**recipe["margin"]) if "margin" in recipe else None
    beta = recipe.get("beta", DEFAULTS["beta"])
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown
    )
    environment.filters |= {"markdown": markdown_table, "number": number, "link": _hub_link}
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        front_matter=yaml.safe_dump(_front_matter(folder, recipe), sort_keys=False, allow_unicode=True),
        name=folder.resolve().name,
        base=base,
        datasets=[entry["path"] for entry in recipe["datasets"]],
        last=evaluated[-1] if evaluated else {},
        evaluation=evaluation_table(before, evaluated[-1]) if evaluated and margin else None,
        training=training_table(records),
        results=_results(folder),
        margin=margin,
        beta=beta,
        preset=SOURCES.get(margin.preset) if margin else None,
        formula=_formula(margin) if margin else None,
        classes=_class_margins(margin, beta) if margin else None,
        selection=_selection(folder),
        batch=_batch(recipe, world_size),
        settings=_settings(recipe),
        recipe=yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True),
        versions=[list(item) for item in versions().items()],
        plots=[name for name in PLOTS if (folder / "plots" / f"{name}.png").is_file()],
    )
    path = folder / "README.md"
    path.write_text(text, encoding="utf-8")
    return path


def training_table(records: list[Record]) -> tuple[list[str], Rows]:
    """
    A row per evaluation with the last training loss logged by then; of a run without one, rows of the training log
    instead, `ROWS_OF_A_LOG` at most. Columns that no row has are left out.
    """
    shown, prefix = evaluations(records), "eval_"
    if not shown:
        shown, prefix = [record for record in records if "loss" in record], ""
        places = np.linspace(0, len(shown) - 1, min(len(shown), ROWS_OF_A_LOG)).round().astype(int)
        shown = [shown[place] for place in places]
    columns = {name: prefix + key for name, key in TRAINING_COLUMNS.items() if prefix + key != "loss"}
    columns = {name: key for name, key in columns.items() if any(key in record for record in shown)}
    steps, losses = series(records, "loss")
    rows = []
    for record in shown:
        logged = [loss for step, loss in zip(steps, losses, strict=True) if step <= record["step"]]
        rows.append(
            [
                number(logged[-1]) if logged else "No log",
                number(record["epoch"]),
                str(record["step"]),
                *(number(record.get(key)) for key in columns.values()),
            ]
        )
    return ["Training Loss", "Epoch", "Step", *columns], rows


def markdown_table(table: tuple[Sequence[str], Rows]) -> str:
    """Header and rows as a Markdown table, columns of numbers to the right."""
    header, rows = table
    rule = ["--:" if is_numeric(row[index] for row in rows) else ":--" for index in range(len(header))]
    lines = [[str(cell).replace("|", r"\|") for cell in line] for line in (header, rule, *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _public(value: Any) -> Any:
    """A recipe without tokens and without this machine's paths."""
    if isinstance(value, dict):
        return {key: _public(v) for key, v in value.items() if key not in SECRETS}
    if isinstance(value, list):
        return [_public(v) for v in value]
    if isinstance(value, str):
        if ABSOLUTE.match(value):
            return re.split(r"[/\\]", value.rstrip("/\\"))[-1]
        return ACCESS_TOKEN.sub("hf_…", value)
    return value


def _front_matter(folder: Path, recipe: dict[str, Any]) -> dict[str, Any]:
    adapter = (folder / "adapter_config.json").is_file()
    tags = ["trl", "sft"]
    if "margin" in recipe:
        tags = ["trl", "dpo", "preference-optimization", "safety", "selective-buffer", "shifted-reward-margin"]
    matter = {"library_name": "peft" if adapter else "transformers", "pipeline_tag": "text-generation"}
    if _on_hub(recipe["model_name_or_path"]):
        matter["base_model"] = recipe["model_name_or_path"]
    sources = [entry["path"] for entry in recipe["datasets"] if _on_hub(entry["path"])]
    if sources:
        matter["datasets"] = list(dict.fromkeys(sources))
    return matter | {"tags": tags}


def _on_hub(name: str) -> bool:
    return bool(HUB_ID.fullmatch(name)) and not name.startswith(".") and not os.path.exists(name)


def _hub_link(name: str, kind: str = "") -> str:
    return f"[{name}](https://huggingface.co/{kind}{name})" if _on_hub(name) else f"`{name}`"


def _formula(margin: Margin) -> str:
    return "(βΔ − m)²" if margin.link == "squared" and margin.scaled else FORMULAS[margin.link]


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
    total = recipe.get("pairs_per_update") or recipe.get("conversations_per_update")
    if total:  # the run has fitted the accumulation to it
        accumulation = total // (device * world_size)
    processes = "process" if world_size == 1 else "processes"
    return (
        f"{device} per device × {accumulation} accumulated × {world_size} {processes} = "
        f"{device * accumulation * world_size}"
    )


def _settings(recipe: dict[str, Any]) -> Rows:
    shown = {key: recipe[key] for key in SETTINGS if recipe.get(key) not in (None, False, [])}
    if not recipe.get("use_peft"):
        shown.setdefault("trainable_parameters", "all")
    return [
        [key, f"`{', '.join(map(str, value)) if isinstance(value, list) else value}`"] for key, value in shown.items()
    ]


def _results(folder: Path) -> tuple[list[str], Rows] | None:
    """What an evaluation of the run's own (results.json: measure → before and after) has found, if there was one."""
    path = folder / "results.json"
    if not path.is_file():
        return None
    results = json.loads(path.read_text(encoding="utf-8"))
    rows = [
        [name.replace("_", " "), number(values["before"]), number(values["after"])]
        for name, values in results.items()
        if isinstance(values, dict) and {"before", "after"} <= values.keys()
    ]
    return ["Measure", "Before", "After"], rows


def _selection(folder: Path) -> dict[str, Any] | None:
    path = folder / "selection.json"
    if not path.is_file():
        return None
    selection = json.loads(path.read_text(encoding="utf-8"))
    counts = selection["counts"]
    groups = {"Pair class": "by_class", "Source": "by_source", "Role": "by_role"}
    tables = [stage_table(counts), *(group_table(name, counts[key]) for name, key in groups.items())]
    return selection | {"tables": tables}
