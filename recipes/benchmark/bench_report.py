"""What the bench leaves: tables on the terminal, every measured value in bench.json, and bench.png."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median

import torch
from matplotlib.figure import Figure

from benchmark.paired_runs import SELECTIVE, Comparison, Run, loss_gap, token_bound
from benchmark.selection_rate import SelectionRun
from core.reporting.tables import print_table
from core.runtime.environment import versions
from core.training.throughput import GIB


@dataclass
class Measure:
    """One quantity of both contenders: medians in `unit`, and the ratio of each pair of runs (of updates)."""

    name: str
    unit: str
    left: float  # stock TRL; or all weights trained
    right: float  # this project; or selected weights trained
    ratios: list[float]  # above 1: this project, or the selection, is better
    bound: float | None = None  # what the tokens alone would give

    @property
    def ratio(self) -> float:
        return median(self.ratios)


def report(comparisons: list[Comparison], selections: list[SelectionRun], folder: Path) -> None:
    """Print the tables, and write bench.json and bench.png to the folder."""
    results = []
    for comparison in comparisons:
        title = describe(comparison)
        trainers, weights = against_stock(comparison), against_all_weights(comparison)
        print_table(title, ("", "stock TRL", "here", "ratio", "tokens alone"), [cells(m) for m in trainers])
        selected = ", ".join(comparison.workload.trained or SELECTIVE)
        header = ("", "all", selected, "ratio")
        print_table(f"All weights against {selected}", header, [cells(measure)[:4] for measure in weights])
        shared = comparison.shared
        if comparison.sharing:
            lengths, batch = comparison.workload.source_lengths, comparison.workload.args.per_device_train_batch_size
            whole = token_bound(lengths, batch)
            print(f"tokens alone, over all {len(lengths):,} rows that the selection leaves: {whole:.2f}")
        print(
            f"second reference pass: {max(run.second_pass_forwards for run in shared)} forwards, "
            f"{median(run.second_pass_seconds for run in shared):.2f} s; "
            f"losses differ by at most {loss_gap(comparison):.1g}"
        )
        runs = {name: [asdict(run) for run in getattr(comparison, name)] for name in ("stock", "shared", "other")}
        measures = [asdict(measure) | {"ratio": measure.ratio} for measure in trainers + weights]
        results.append({"title": title, "measures": measures, "peak_bytes": comparison.peak_bytes} | runs)
    if selections:
        header = ("pairs", "kept", "seconds", "pairs/s", "GiB above the imports")
        print_table("Selection, all stages on", header, [selection_cells(run) for run in selections])
    folder.mkdir(parents=True, exist_ok=True)
    document = {"machine": machine(), "workloads": results, "selection": [asdict(run) for run in selections]}
    (folder / "bench.json").write_text(json.dumps(document, indent=1) + "\n")
    plot(comparisons).savefig(folder / "bench.png")
    print(f"\n{folder / 'bench.json'} and bench.png hold every run", flush=True)


def describe(comparison: Comparison) -> str:
    work = comparison.workload
    precision = (
        "bf16" if work.args.bf16 else "fp16" if work.args.fp16 else str(comparison.dtype).removeprefix("torch.")
    )
    trained = f", {', '.join(work.trained)} trained" if work.trained else ""
    batch = work.args.per_device_train_batch_size
    return f"{work.name}: model {work.model_name}, {batch} pairs a micro-batch, {precision}{trained}"


def against_stock(comparison: Comparison) -> list[Measure]:
    """Training step, reference pass and peak memory of stock TRL and of this project."""
    work, pairs = comparison.workload, comparison.workload.rows_per_update
    batch = work.args.per_device_train_batch_size
    lengths, together = work.lengths(), list(zip(comparison.stock, comparison.shared, strict=True))
    steps, reference = 1.0, 1.0
    if comparison.sharing:
        timed = comparison.shared[0].order[pairs : work.updates * pairs]
        steps, reference = token_bound(lengths[timed], batch), token_bound(lengths, batch)
    return [
        Measure(
            "training step",
            "pairs/s",
            *(pairs / median(map(seconds, runs)) for runs in (comparison.stock, comparison.shared)),
            step_ratios(comparison.stock, comparison.shared),
            steps,
        ),
        Measure(
            "reference pass",
            "pairs/s",
            *(len(lengths) / median(run.reference_seconds for run in runs) for runs in zip(*together, strict=True)),
            [stock.reference_seconds / shared.reference_seconds for stock, shared in together],
            reference,
        ),
        peak_memory(comparison, "stock", "shared"),
    ]


def against_all_weights(comparison: Comparison) -> list[Measure]:
    """Training step, memory of the optimizer and peak memory: this project, training all weights and some."""
    names = ("other", "shared") if comparison.workload.trained else ("shared", "other")
    full, selected = (getattr(comparison, name) for name in names)
    pairs = comparison.workload.rows_per_update
    return [
        Measure(
            "training step",
            "pairs/s",
            *(pairs / median(map(seconds, runs)) for runs in (full, selected)),
            step_ratios(full, selected),
        ),
        Measure(
            "optimizer memory",
            "GiB",
            *(median(run.optimizer_bytes for run in runs) / GIB for runs in (full, selected)),
            [one.optimizer_bytes / other.optimizer_bytes for one, other in zip(full, selected, strict=True)],
        ),
        peak_memory(comparison, *names),
    ]


def peak_memory(comparison: Comparison, left: str, right: str) -> Measure:
    """Of the runs that were made for it, one of each contender."""
    one, other = (comparison.peak_bytes[name] for name in (left, right))
    return Measure("peak memory", "GiB", one / GIB, other / GIB, [one / other])


def seconds(run: Run) -> float:
    """Of an update, on average: what most updates take says little where a few long rows cost most of the time."""
    return mean(run.step_seconds)


def step_ratios(slower: list[Run], faster: list[Run]) -> list[float]:
    """Of each round, whose runs train on the same rows."""
    return [seconds(one) / seconds(other) for one, other in zip(slower, faster, strict=True)]


def cells(measure: Measure) -> tuple[str, ...]:
    values = (f"{value:.3g} {measure.unit}" for value in (measure.left, measure.right))
    return measure.name, *values, f"{measure.ratio:.2f}", f"{measure.bound:.2f}" if measure.bound else ""


def selection_cells(run: SelectionRun) -> tuple[str, ...]:
    rate = run.rows / run.seconds
    return f"{run.rows:,}", f"{run.kept:,}", f"{run.seconds:.1f}", f"{rate:,.0f}", f"{run.peak_bytes / GIB:.2f}"


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {"device": device, "cores": len(os.sched_getaffinity(0)), "threads": torch.get_num_threads()} | versions()


def plot(comparisons: list[Comparison]) -> Figure:
    """A row for each measure that has a token bound: the paired runs, their median, and the bound."""
    rows = [
        (f"{comparison.workload.name} ({comparison.workload.model_name})\n{measure.name}", measure)
        for comparison in comparisons
        for measure in against_stock(comparison)
        if measure.bound
    ][::-1]  # the first on top
    figure = Figure(figsize=(8, 1.2 + 0.7 * len(rows)), dpi=120, layout="constrained")
    axes = figure.subplots()
    for height, (_, measure) in enumerate(rows):
        first = height == 0
        axes.barh(height, measure.ratio, height=0.6, color="#0072B2", alpha=0.6, label="median" if first else None)
        axes.plot(
            measure.ratios, [height] * len(measure.ratios), "k|", markersize=9, label="paired runs" if first else None
        )
        axes.plot(
            [measure.bound] * 2,
            [height - 0.4, height + 0.4],
            color="#D55E00",
            linewidth=2,
            label="what the tokens alone would give" if first else None,
        )
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.set_xlabel("times as fast as stock TRL")
    axes.set_xlim(left=0)
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure
