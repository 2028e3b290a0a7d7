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
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from core.config.parsing import build, resolve
from core.runtime.environment import prepare_environment, versions
from core.runtime.errors import RecipeError, exits_cleanly
from core.runtime.network import go_offline_if_local

if TYPE_CHECKING:
    from benchmark.measuring import Comparison

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
SELECTIVE = ["down_proj"]  # trained in the other run where the recipe trains all


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
    from benchmark.measuring import Comparison, measure_memory, time_rounds, time_selection

    # ---------------------------------------------------------------- the two trainers: what fits, and its peak memory
    plans = [[]]
    if not (options.model or options.dataset or options.config):
        plans = ON_GPU if torch.cuda.is_available() else ON_CPU
    comparisons, selections, too_large = [], [], []
    for plan in plans:
        resolved = build(resolve("dpo", [*keys, *plan]) if plan else first)
        # The first update warms up.
        comparison = Comparison(prepare_workload(resolved, options.updates + 1))
        print(f"== peak memory of {comparison.workload.title}", flush=True)
        try:
            measure_memory(comparison)
            comparisons.append(comparison)
        except torch.OutOfMemoryError as error:
            too_large.append(f"{comparison.workload.title}: {str(error).splitlines()[0]}")

    # ---------------------------------------------------------------- in turn, for their times
    for index, comparison in enumerate(comparisons):
        print(f"== times of {comparison.workload.title}", flush=True)
        time_rounds(comparison, options.rounds)
        show(comparison)
        write(options.output_dir, comparisons[: index + 1], selections)

    # ---------------------------------------------------------------- selection
    for rows in options.selection_rows:
        print(f"== selection of {rows:,} generated pairs", flush=True)
        selections.append(run := time_selection(rows))
        print(
            f"{run['kept']:,} kept in {run['seconds']:.1f} s, {rows / run['seconds']:,.0f} pairs/s, "
            f"{run['gib']:.2f} GiB above the imports"
        )
        write(options.output_dir, comparisons, selections)

    print(f"\n{options.output_dir / 'bench.json'} holds every run", flush=True)
    if too_large:
        raise RecipeError(f"not measured; lower per_device_train_batch_size or max_length: {'; '.join(too_large)}")


def take_one_gpu() -> None:
    """Hide all GPUs but the first, on which transformers' Trainer would spread each micro-batch by nn.DataParallel."""
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """
    The bench's own options, and a command line for the recipe's parser, which takes or refuses the rest.

    Raises:
        RecipeError: an option's value is missing or not in its range.
    """
    parser = OneLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument(
        "--model", help="a folder, a model on the Hub, or a size of recipes/benchmark/generated.py (4x256)"
    )
    parser.add_argument("--dataset", help="a file or data set of pairs, put in as datasets.0.path")
    parser.add_argument("--config", help="a recipe of recipes/dpo.py, for columns that are not chosen and rejected")
    parser.add_argument("--rounds", type=count, default=3, help="paired runs, of which the median is shown (3)")
    parser.add_argument("--updates", type=count, default=6, help="timed updates in each run (6)")
    parser.add_argument(
        "--selection_rows", type=count, nargs="*", default=[100_000], help="pairs to select among (100000); or nothing"
    )
    parser.add_argument("--output_dir", type=Path, default=Path("runs/bench"), help="of bench.json and bench.png")
    options, rest = parser.parse_known_args(argv)
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


class OneLine(argparse.ArgumentParser):
    """A parser whose refusals are this project's."""

    def error(self, message: str) -> NoReturn:
        raise RecipeError(f"command line: {message}")


# ------------------------------------------------------------------------------------------ tables, bench.json, plot


def show(comparison: "Comparison") -> None:
    """Both tables, with what the number of tokens alone would give beside the ratios."""
    from core.reporting.tables import print_table  # with torch

    work, bounds = comparison.workload, comparison.token_bounds()
    selected = ", ".join(work.trained or SELECTIVE)

    def table(title: str, left: str, right: str, names: list[str]) -> None:
        rows = [
            [name, f"{one:.3g}", f"{other:.3g}", f"{ratio:.2f}", f"{bounds[name]:.2f}" if name in bounds else ""]
            for name, (one, other, ratio) in comparison.table(left, right).items()
        ]
        print_table(title, ["", *names], [row[: len(names) + 1] for row in rows])

    pairs = f"{work.args.per_device_train_batch_size} pairs a micro-batch"
    trained = f", {selected} trained" if work.trained else ""
    names = ["stock TRL", "here", "ratio", "tokens alone"]
    table(f"{work.title}, {pairs}, {work.precision}{trained}", "stock", "shared", names)
    sides = ("other", "shared") if work.trained else ("shared", "other")
    table(f"All weights against {selected}", *sides, ["all", selected, "ratio"])
    if bounds:
        every = f"{len(work.source_lengths):,} rows that the selection leaves"
        print(f"tokens alone, over all {every}: {bounds['all rows']:.2f}")
    print(f"losses differ by at most {comparison.loss_gap():.1g}", flush=True)


def write(folder: Path, comparisons: list["Comparison"], selections: list[dict[str, float]]) -> None:
    """Write bench.json, with every run, and bench.png, with the ratios, as far as they are measured."""
    import torch
    from matplotlib.figure import Figure

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    machine = {"device": device, "cores": len(os.sched_getaffinity(0)), "threads": torch.get_num_threads()}
    workloads = [
        {"title": comparison.workload.title, "against stock TRL": comparison.table("stock", "shared")}
        | {"tokens alone": comparison.token_bounds(), "peaks": comparison.peaks}
        | {"runs": {name: [asdict(run) for run in runs] for name, runs in comparison.runs.items()}}
        for comparison in comparisons
    ]
    found = {"machine": machine | versions(), "workloads": workloads, "selection": selections}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench.json").write_text(json.dumps(found, indent=1) + "\n")
    figure = Figure(figsize=(8, 2 + len(comparisons)), dpi=120, layout="constrained")
    axes = figure.subplots()
    for comparison in comparisons:
        table, bounds = comparison.table("stock", "shared"), comparison.token_bounds()
        names = {f"{comparison.workload.title}\n{name}": name for name in bounds if name in table}
        axes.barh(list(names), [table[name][-1] for name in names.values()], color="C0")
        axes.plot([bounds[name] for name in names.values()], list(names), "k|", markersize=20)
    axes.set_xlabel("times as fast as stock TRL; the strokes: what the tokens alone would give")
    figure.savefig(folder / "bench.png")


if __name__ == "__main__":
    main()
