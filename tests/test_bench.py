"""The bench: both trainers are given the same rows and give the same losses, bounds by hand, refusals in one line."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import bench
from benchmark import generated, paired_runs, workloads
from benchmark.bench_report import Measure, against_all_weights, against_stock, cells, report
from benchmark.generated import LENGTHS, SHAPES, Shape, generate_pairs, random_model
from benchmark.paired_runs import Comparison, loss_gap, measure_memory, time_rounds, token_bound
from benchmark.selection_rate import SelectionRun, time_selection
from benchmark.workloads import prepare_workload
from core.config.parsing import build, resolve
from core.runtime.errors import RecipeError
from core.training.throughput import GIB

SMALL = ["--max_length=256", "--per_device_train_batch_size=2", "--pairs_per_update=4", "--use_cpu=true"]


def workload_of(*keys, updates=3, reference_pairs=0):
    _, command = bench.parse([*SMALL, *keys])
    return prepare_workload(build(resolve("dpo", command)), updates, reference_pairs)


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    """One round on 14 rows of a file, 12 of them trained on: micro-batches of two, two to an update, two layers."""
    path = tmp_path_factory.mktemp("rows") / "pairs.jsonl"
    rows = [
        {"prompt": prompt, "good": chosen, "bad": rejected}
        for prompt, chosen, rejected in generate_pairs(30, LENGTHS["hh-rlhf"], seed=3)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generated, "VOCABULARY", 512)
        patch.setitem(SHAPES, "tiny", Shape(2, 32, 4, 2, 64, 512))
        workload = workload_of(
            "--model", "tiny", "--dataset", str(path),
            "--datasets.0.columns", "{prompt: prompt, chosen: good, rejected: bad}", "--learning_rate", "1e-3",
            reference_pairs=13,
        )  # fmt: skip
        comparison = measure_memory(workload)
        time_rounds(comparison, rounds=1)
        yield comparison


def test_both_trainers_see_the_same_rows_and_give_the_same_losses(comparison):
    """Six micro-batches a side; the losses move away from ln 2, so that equal ones say something."""
    assert comparison.sharing
    assert loss_gap(comparison) < 1e-5
    for stock, shared in zip(comparison.stock, comparison.shared, strict=True):
        assert stock.order == shared.order and set(stock.order) == set(range(14))
        assert len(stock.losses) == len(shared.losses) == 6
        assert max(abs(loss - np.log(2)) for loss in stock.losses) > 1e-3
        assert len(stock.step_seconds) == len(shared.step_seconds) == 2  # the first of three warms up
        assert stock.reference_seconds > 0 and shared.reference_seconds > 0


def test_the_reference_pass_covers_rows_that_no_update_needs(comparison):
    """Its rate counts 14 pairs in 7 micro-batches; the updates' bound is of the 12 that they train on."""
    for runs, seconds in [(comparison.stock, 7.0), (comparison.shared, 2.0)]:
        runs[0].reference_seconds = seconds
    step, reference, _ = against_stock(comparison)
    assert (reference.left, reference.right, reference.ratio) == (2.0, 7.0, 3.5)
    lengths, order = comparison.workload.lengths(), comparison.shared[0].order
    assert step.bound == token_bound(lengths[order[4:12]], 2)  # the first update of two micro-batches warms up


def test_the_second_reference_pass_makes_no_forward(comparison):
    assert [run.second_pass_forwards for run in comparison.shared + comparison.other] == [0, 0]


def test_the_optimizer_holds_two_moments_of_what_is_trained(comparison):
    """Adam in float32: 8 bytes a weight, and a step count for each of the tensors."""
    model = comparison.workload.build_model()
    everything = sum(p.numel() for p in model.parameters())
    tensors = len(list(model.parameters()))
    assert comparison.shared[0].optimizer_bytes == 8 * everything + 4 * tensors
    assert comparison.other[0].optimizer_bytes == 8 * 2 * 32 * 64 + 4 * 2  # down_proj of two layers


def test_losses_that_differ_are_refused(comparison, monkeypatch):
    monkeypatch.setattr(paired_runs, "loss_gap", lambda _: 0.5)
    runs = iter(comparison.stock + comparison.shared + comparison.other)
    monkeypatch.setattr(paired_runs, "run_stock", lambda *_: next(runs))
    monkeypatch.setattr(paired_runs, "run_shared", lambda *_: next(runs))
    peaks = {"peak_bytes": comparison.peak_bytes}
    again = Comparison(comparison.workload, comparison.sharing, comparison.dtype, **peaks)
    with pytest.raises(RecipeError, match=r"the losses of the two trainers differ by up to 0\.5"):
        time_rounds(again, rounds=1)


def test_each_contender_has_its_peak_memory(comparison):
    """Of the run that was made for it; down_proj alone takes less, and the ratio is of the two that a line names."""
    assert set(comparison.peak_bytes) == {"stock", "shared", "other"} and min(comparison.peak_bytes.values()) > 0
    made = Comparison(comparison.workload, True, torch.float32, comparison.stock, comparison.shared, comparison.other)
    made.peak_bytes = {"stock": 6 * GIB, "shared": 2 * GIB, "other": GIB}
    (*_, trainers), (*_, weights) = against_stock(made), against_all_weights(made)
    assert (trainers.left, trainers.right, trainers.ratio) == (6, 2, 3)
    assert (weights.left, weights.right, weights.ratio) == (2, 1, 2)
    made.workload = dataclasses.replace(made.workload, trained=["down_proj"])  # the other one then trains all
    (*_, weights) = against_all_weights(made)
    assert (weights.left, weights.right, weights.ratio) == (1, 2, 0.5)


def test_token_bounds_by_hand():
    """
    Two micro-batches of two pairs. Rows (k, n, m): (10, 5, 3), (4, 2, 8), (6, 1, 1), (2, 2, 2).
    Rows 0 and 1: padded 2·2·max(15, 12) = 60, shared 17 + 13 = 30: 2. Rows 3 and 2: 4·7 = 28, 5 + 7 = 12: 7/3.
    Together: 88 / 42, also with a fifth row that fills no micro-batch.
    """
    lengths = np.array([[10, 5, 3], [4, 2, 8], [6, 1, 1], [2, 2, 2], [90, 9, 9]])
    assert [token_bound(lengths[rows], 2) for rows in ([0, 1], [3, 2])] == pytest.approx([2, 28 / 12])
    assert token_bound(lengths[[0, 1, 3, 2]], 2) == pytest.approx(88 / 42)
    assert token_bound(lengths[[0, 1, 3, 2, 4]], 2) == pytest.approx(88 / 42)


def test_the_source_has_more_rows_than_are_drawn(comparison):
    assert 14 == len(comparison.workload.rows) < len(comparison.workload.source_lengths) <= 30


def test_ratios_are_of_all_timed_updates(comparison):
    """Stock 6 and 8 s, here 2 and 4 s: 14/6; 4 pairs an update, so 8/14 and 8/6 pairs/s."""
    for run, steps in [(comparison.stock[0], [6.0, 8.0]), (comparison.shared[0], [2.0, 4.0])]:
        run.step_seconds = steps
    step, reference, memory = against_stock(comparison)
    assert (step.left, step.right, step.ratio) == pytest.approx((8 / 14, 8 / 6, 14 / 6))
    assert step.bound > 1.5 and reference.bound > 1.5 and memory.bound is None
    _, optimizer, _ = against_all_weights(comparison)
    assert optimizer.ratio == comparison.shared[0].optimizer_bytes / comparison.other[0].optimizer_bytes
    assert cells(Measure("x", "GiB", 1.5, 0.5, [2.0, 4.0, 3.0], 2.0)) == ("x", "1.5 GiB", "0.5 GiB", "3.00", "2.00")


def test_the_report_leaves_every_run(comparison, tmp_path, capsys):
    report([comparison], [SelectionRun(1000, 900, 2.0, GIB // 2)], tmp_path / "out")
    shown = capsys.readouterr().out
    source = comparison.workload.source_lengths
    assert f"over all {len(source)} rows that the selection leaves: {token_bound(source, 2):.2f}\n" in shown
    assert "training step" in shown and "second reference pass: 0 forwards" in shown
    assert "1,000" in shown and " 500 " in shown and "0.50" in shown
    document = json.loads((tmp_path / "out/bench.json").read_text())
    (found,) = document["workloads"]
    assert found["stock"][0]["losses"] == comparison.stock[0].losses
    assert (tmp_path / "out/bench.png").read_bytes()[:4] == b"\x89PNG"


def test_generated_lengths_are_the_measured_ones():
    """Words, nearly a token each: medians and means of 20,000 pairs within a twentieth of UltraFeedback's."""
    lengths = LENGTHS["UltraFeedback"]
    pairs = list(generate_pairs(20_000, lengths, seed=0))
    for texts, (middle, mean) in zip(
        zip(*pairs, strict=True), (lengths.prompt, lengths.chosen, lengths.rejected), strict=True
    ):
        words = [text.count(" ") + 1 for text in texts]
        assert np.median(words) == pytest.approx(middle, rel=0.05)
        assert np.mean(words) == pytest.approx(mean, rel=0.05)
    assert pairs[:5] == list(generate_pairs(20_000, lengths, seed=0))[:5] and pairs[0] != pairs[1]


def test_generated_rows_and_models_are_the_same_each_time():
    one, two = (workload_of("--datasets.0.path=generated/hh-rlhf", updates=1) for _ in range(2))
    assert one.rows["prompt_ids"] == two.rows["prompt_ids"]
    assert set(one.rows["margin"]) == {0.0} and set(one.rows["is_buffer"]) == {False}
    models = (random_model(Shape(1, 16, 2, 1, 32, 50), torch.float32, seed=1) for _ in range(2))
    assert all(map(torch.equal, *(model.parameters() for model in models)))


def test_selection_drops_what_is_made_to_be_dropped():
    """
    600 rows in one run of 60s: 10 identical pairs, 10 repeated ones and 10 labelled both ways (20 rows go); then the
    score filter keeps 90 % of what the other rules leave.
    """
    run = time_selection(600, processes=1)
    assert run.rows == 600 and 200 < run.kept <= (600 - 40) * 9 // 10
    assert run.seconds > 0 and run.peak_bytes >= 0


def test_what_does_not_fit_is_told_after_the_rest_is_reported(comparison, monkeypatch, tmp_path):
    """Two plans of which the first needs more memory than there is."""

    outcomes = iter([torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"), comparison])

    def measured(*_):
        outcome = next(outcomes)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(paired_runs, "measure_memory", measured)
    monkeypatch.setattr(paired_runs, "time_rounds", lambda *_: None)
    monkeypatch.setattr(workloads, "prepare_workload", lambda *_: comparison.workload)
    monkeypatch.setattr(bench, "prepare_environment", lambda: None)
    monkeypatch.setattr(bench, "ON_CPU", [[], []])
    monkeypatch.setattr(sys, "argv", ["bench.py", "--selection_rows", "--output_dir", str(tmp_path)])
    with pytest.raises(
        RecipeError, match=r"pairs.jsonl, model tiny: CUDA out of memory\. Tried to allocate 2\.00 GiB\.$"
    ):
        bench.main.__wrapped__()  # without the exit of the whole process
    assert len(json.loads((tmp_path / "bench.json").read_text())["workloads"]) == 1


# ---------------------------------------------------------------------------------------------- refusals
REFUSALS = [
    (["--rounds", "0"], "command line: argument --rounds: '0' is no whole number of at least 1"),
    (["--updates"], "command line: argument --updates: expected one argument"),
    (["--selection_rows", "many"], "command line: argument --selection_rows: 'many' is no whole number"),
    (["--round", "2"], "command line: round: unknown key"),
    (["--lerning_rate", "1e-4"], "did you mean learning_rate?"),
    (["--config", "absent.yaml"], "absent.yaml: no such recipe"),
    (["--datasets.0.colums", "{}"], "datasets.0.colums: unknown key; did you mean columns?"),
    (["pairs.jsonl"], "command line: 'pairs.jsonl' belongs to no key"),
]


@pytest.mark.parametrize(("argv", "message"), REFUSALS, ids=[" ".join(argv) for argv, _ in REFUSALS])
def test_wrong_options_are_refused(argv, message):
    with pytest.raises(RecipeError) as caught:
        _, keys = bench.parse(argv)
        resolve("dpo", keys)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["--model", "/no/such/folder"], "no such folder"),
        (["--datasets.0.path=generated/ultrafeedback"], "no such lengths; did you mean UltraFeedback?"),
        (["--use_peft", "true"], "the bench trains weights themselves"),
    ],
)
def test_what_cannot_be_measured_is_refused(keys, message):
    with pytest.raises(RecipeError, match=message):
        workload_of(*keys)


def test_too_few_rows_are_refused(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = generate_pairs(6, LENGTHS["hh-rlhf"], seed=0)
    lines = (json.dumps(dict(zip(("prompt", "chosen", "rejected"), row, strict=True))) for row in rows)
    path.write_text("\n".join(lines))
    with pytest.raises(
        RecipeError, match=r"rows are left by the selection, and 3 updates and a reference pass over 0 pairs need 12"
    ):
        workload_of("--dataset", str(path), "--datasets.0.columns.prompt", "prompt")


def test_the_script_refuses_in_one_line_and_at_once():
    script = Path(bench.__file__)
    done = subprocess.run([sys.executable, script, "--bata", "1"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "did you mean beta?" in done.stderr
