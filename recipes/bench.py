"""
This project's trainer against stock TRL, in turn in one process: same weights, rows, micro-batches and precision.

    python recipes/bench.py                                      # on rows and models that are generated
    python recipes/bench.py --model PATH --dataset FILE [--config RECIPE.yaml] [--key value …]

Both train plain DPO, so that their losses must agree, with the reference computed before. Of the recipe (without
--config recipes/benchmark/bench.yaml) model, sources, selection, lengths, batch, optimizer and precision count.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import NoReturn

from core.config.parsing import build, resolve
from core.runtime.environment import prepare_environment
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
    import torch

    from benchmark.process_memory import share_one_heap

    share_one_heap()
    from benchmark.bench_report import report
    from benchmark.paired_runs import measure_memory, time_rounds
    from benchmark.selection_rate import time_selection
    from benchmark.workloads import prepare_workload

    # ---------------------------------------------------------------- the two trainers: what fits, and its peak memory
    plans = [[]]
    if not (options.model or options.dataset or options.config):
        plans = ON_GPU if torch.cuda.is_available() else ON_CPU
    comparisons, too_large = [], []
    for plan in plans:
        resolved = build(resolve("dpo", [*keys, *plan]) if plan else first)
        # The first update warms up.
        workload = prepare_workload(resolved, options.updates + 1, options.reference_pairs)
        print(f"== peak memory of {workload.title}", flush=True)
        try:
            comparisons.append(measure_memory(workload))
        except torch.OutOfMemoryError as error:
            too_large.append(f"{workload.title}: {str(error).splitlines()[0]}")

    # ---------------------------------------------------------------- in turn, for their times
    for comparison in comparisons:
        print(f"== times of {comparison.workload.title}", flush=True)
        time_rounds(comparison, options.rounds)

    # ---------------------------------------------------------------- selection
    selections = []
    for rows in options.selection_rows:
        print(f"== selection of {rows:,} generated pairs", flush=True)
        selections.append(time_selection(rows, processes=options.selection_processes))

    report(comparisons, selections, options.output_dir)
    if too_large:
        raise RecipeError(f"not measured; lower per_device_train_batch_size or max_length: {'; '.join(too_large)}")


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
    parser.add_argument("--reference_pairs", type=count, default=96, help="pairs in the reference pass, at least (96)")
    parser.add_argument(
        "--selection_rows", type=count, nargs="*", default=[100_000], help="pairs to select among (100000); or nothing"
    )
    parser.add_argument("--selection_processes", type=count, default=2)
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


if __name__ == "__main__":
    main()
