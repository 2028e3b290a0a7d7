"""
This project's trainer against stock TRL, in turn in one process: same weights, rows, micro-batches and precision.

    python recipes/bench.py                                      # on rows and models that are generated
    python recipes/bench.py --model PATH --dataset FILE [--config RECIPE.yaml] [--key value …]

Both train plain DPO, so that their losses must agree, with the reference computed before. Of the recipe (without
--config recipes/benchmark/bench.yaml) model, sources, selection, lengths, batch, optimizer and precision count.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from core.config.parsing import build, resolve
from core.runtime.environment import prepare_environment, versions
from core.runtime.errors import RecipeError, exits_cleanly
from core.runtime.network import go_offline_if_local

DEFAULT = Path(__file__).parent / "benchmark/bench.yaml"
# What is run where the user names neither a model nor rows: sizes and sources of recipes/benchmark/generated.py.
ON_CPU = [
    ["--model_name_or_path=6x384", "--datasets.0.path=generated/hh-rlhf"],
    ["--model_name_or_path=4x256", "--datasets.0.path=generated/UltraFeedback"],
]
HALF = ["--dtype=bfloat16", "--bf16=true", "--gradient_checkpointing=true"]
ON_GPU = [  # not run yet
    [*HALF, f"--datasets.0.path=generated/{source}", f"--model_name_or_path={size}", *trained]
    for size, trained in (("0.5b", []), ("7b", ["--trainable_parameters=[down_proj]"]))
    for source in ("hh-rlhf", "UltraFeedback")
]


@exits_cleanly
def main() -> None:
    options, keys = parse(sys.argv[1:])
    first = resolve("dpo", keys)  # a misspelt key is told now: torch, transformers and TRL take seconds to import
    prepare_environment()  # before the first import of torch
    go_offline_if_local([options.model, options.dataset])
    os.environ.setdefault("TQDM_DISABLE", "1")  # the tables are what it is for
    take_one_gpu()
    import torch

    from benchmark.generated import prepare_workload
    from benchmark.measuring import compare, time_selection

    plans = [[]]
    if not (options.model or options.dataset or options.config):
        plans = ON_GPU if torch.cuda.is_available() else ON_CPU
    comparisons, selections = [], []
    for plan in plans:
        resolved = build(resolve("dpo", [*keys, *plan]) if plan else first)
        workload = prepare_workload(resolved, options.updates + 1)  # the first update warms up
        print(f"== {workload.title}", flush=True)
        try:
            comparisons.append(compare(workload, options.rounds))
        except torch.OutOfMemoryError as error:
            raise RecipeError(
                f"{workload.title}: {str(error).splitlines()[0]}; lower per_device_train_batch_size or max_length"
            ) from error
        show(comparisons[-1])
        write(options.output_dir, comparisons, selections)
    for rows in options.selection_rows:
        selections.append(run := time_selection(rows))
        print(
            f"\nselection of {rows:,} generated pairs: {run['kept']:,} kept in {run['seconds']:.1f} s, "
            f"{run['gib']:.2f} GiB above the imports; tokenising them before took {run['tokenising']:.1f} s"
        )
        write(options.output_dir, comparisons, selections)
    print(f"\n{options.output_dir / 'bench.json'} holds every run", flush=True)


def take_one_gpu() -> None:
    """Hide all GPUs but the first, on which transformers' Trainer would spread each micro-batch by nn.DataParallel."""
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """
    The bench's own options, and a command line for the recipe's parser, which takes or refuses the rest.

    Raises:
        RecipeError: an option's value is missing or not in its range.
    """
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        exit_on_error=False,
    )
    add = parser.add_argument
    add("--model", help="a folder, a model on the Hub, or a size of recipes/benchmark/generated.py (4x256)")
    add("--dataset", help="a file or data set of pairs, put in as datasets.0.path")
    add("--config", help="a recipe of recipes/dpo.py, for columns that are not chosen and rejected")
    add("--rounds", type=count, default=3, help="paired runs, of which the median is shown (3)")
    add("--updates", type=count, default=6, help="timed updates in each run (6)")
    add("--selection_rows", type=count, nargs="*", default=[100_000], help="pairs to select among (100000); or none")
    add("--output_dir", type=Path, default=Path("runs/bench"), help="of bench.json and bench.png")
    try:
        options, rest = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise RecipeError(f"command line: {error}") from error
    keys = ["--config", options.config or str(DEFAULT), *rest]
    if options.model:
        keys.append(f"--model_name_or_path={options.model}")
    if options.dataset:
        keys.append(f"--datasets.0.path={options.dataset}")
    return options, keys


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


# ------------------------------------------------------------------------------------------ table, bench.json, plot


def show(comparison: dict[str, Any]) -> None:
    """The table, with what the number of tokens alone would give beside the ratios."""
    from core.reporting.tables import number, print_table  # with torch

    header = ["stock TRL", "here", "ratio", "tokens alone"]
    rows = [[name, *(number(costs[column], 2) for column in header)] for name, costs in comparison["table"].items()]
    print_table(comparison["title"], ["", *header], rows)
    print(f"losses differ by at most {comparison['loss_gap']:.1g}", flush=True)


def write(folder: Path, comparisons: list[dict[str, Any]], selections: list[dict[str, float]]) -> None:
    """Write bench.json, with every run, and bench.png, with the ratios, as far as they are measured."""
    import torch
    from matplotlib.figure import Figure

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    machine = {"device": device, "cores": len(os.sched_getaffinity(0)), "threads": torch.get_num_threads()}
    found = {"machine": machine | versions(), "workloads": comparisons, "selection": selections}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench.json").write_text(json.dumps(found, indent=1) + "\n")
    figure = Figure(figsize=(8, 2 + len(comparisons)), layout="constrained")
    axes = figure.subplots()
    for comparison in comparisons:
        for name, costs in comparison["table"].items():
            label = f"{comparison['title']}\n{name}"
            axes.barh(label, costs["ratio"], color="C0")
            if costs["tokens alone"]:
                axes.plot(costs["tokens alone"], label, "k|", markersize=20)
    axes.set_xlabel("stock TRL's cost in multiples of this project's; the strokes: what the tokens alone would give")
    figure.savefig(folder / "bench.png")


if __name__ == "__main__":
    main()
