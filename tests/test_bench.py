"""The bench: both trainers are given the same rows and give the same losses, bounds by hand, refusals in one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import bench
from benchmark import generated, measuring
from benchmark.generated import LENGTHS, SHAPES, Shape, generate_pairs, prepare_workload, random_model, token_bound
from benchmark.measuring import Comparison, Figures, measure_memory, time_rounds, time_selection
from core.config.parsing import build, resolve
from core.runtime.errors import RecipeError

SMALL = ["--max_length=256", "--per_device_train_batch_size=2", "--pairs_per_update=4", "--use_cpu=true"]
STEP, REFERENCE, OPTIMIZER, PEAK = measuring.STEP, measuring.REFERENCE, measuring.OPTIMIZER, measuring.PEAK


def workload_of(*keys, updates=3):
    _, command = bench.parse([*SMALL, *keys])
    return prepare_workload(build(resolve("dpo", command)), updates)


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    """One round on 12 of the rows of a file: micro-batches of two, two to an update, two layers."""
    path = tmp_path_factory.mktemp("rows") / "pairs.jsonl"
    rows = [
        {"prompt": prompt, "good": chosen, "bad": rejected}
        for prompt, chosen, rejected in generate_pairs(30, LENGTHS["hh-rlhf"], seed=3)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generated, "VOCABULARY", 512)
        patch.setitem(SHAPES, "tiny", Shape(2, 32, 4, 2, 64, 512))
        comparison = Comparison(
            workload_of(
                "--model", "tiny", "--dataset", str(path),
                "--datasets.0.columns", "{prompt: prompt, chosen: good, rejected: bad}", "--learning_rate", "1e-3",
            )
        )  # fmt: skip
        measure_memory(comparison)
        time_rounds(comparison, rounds=1)
        yield comparison


def test_both_trainers_see_the_same_rows_and_give_the_same_losses(comparison):
    """Six micro-batches a side; the losses move away from ln 2, so that equal ones say something."""
    (stock,), (shared,) = comparison.runs["stock"], comparison.runs["shared"]
    assert comparison.sharing
    assert comparison.loss_gap() < 1e-5
    assert set(comparison.order) == set(range(12)) and comparison.order != list(range(12))
    assert len(stock.losses) == len(shared.losses) == 6
    assert max(abs(loss - np.log(2)) for loss in stock.losses) > 1e-3
    assert len(stock.step_seconds) == len(shared.step_seconds) == 2  # the first of three warms up
    assert min(stock.costs[REFERENCE], shared.costs[REFERENCE]) > 0


def test_costs_are_of_all_timed_updates(comparison):
    """4 pairs an update: a step of 2 s on average is 500 ms a pair."""
    run = comparison.runs["stock"][0]
    assert run.costs[STEP] == pytest.approx(sum(run.step_seconds) * 1000 / 8)


def test_the_optimizer_holds_two_moments_of_what_is_trained(comparison):
    """Adam in float32: 8 bytes a weight, and a step count for each of the tensors."""
    model = comparison.workload.build_model()
    everything, tensors = sum(p.numel() for p in model.parameters()), len(list(model.parameters()))
    held = {name: runs[0].costs[OPTIMIZER] * 2**30 for name, runs in comparison.runs.items()}
    assert held["stock"] == held["shared"] == 8 * everything + 4 * tensors
    assert held["other"] == 8 * 2 * 32 * 64 + 4 * 2  # down_proj of two layers


def test_ratios_are_medians_over_the_rounds(comparison):
    """Stock 6, 8 and 9 ms, here 2, 4 and 3 ms: medians 8 and 3, ratios 3, 2 and 3; memory is of a run of its own."""
    made = Comparison(comparison.workload, peaks={"stock": 6, "shared": 2, "other": 1})
    for name, steps in {"stock": (6, 8, 9), "shared": (2, 4, 3)}.items():
        made.runs[name] = [Figures([], [], {STEP: step, REFERENCE: 1, OPTIMIZER: 2}) for step in steps]
    table = made.table("stock", "shared")
    assert table == {STEP: (8, 3, 3), REFERENCE: (1, 1, 1), OPTIMIZER: (2, 2, 1), PEAK: (6, 2, 3)}
    assert made.table("shared", "stock")[PEAK] == (2, 6, 1 / 3)


def test_losses_that_differ_are_refused(comparison, monkeypatch):
    (stock,), (shared,) = comparison.runs["stock"], comparison.runs["shared"]
    moved = Figures(stock.step_seconds, [loss + 0.5 for loss in shared.losses], shared.costs)
    monkeypatch.setattr(measuring, "run_stock", lambda *_: stock)
    monkeypatch.setattr(measuring, "run_shared", lambda *_: moved)
    again = Comparison(comparison.workload, peaks=comparison.peaks)
    with pytest.raises(RecipeError, match=r"the losses of the two trainers differ by up to 0\.5"):
        time_rounds(again, rounds=1)


def test_token_bounds_by_hand(comparison):
    """
    Two micro-batches of two pairs. Rows (k, n, m): (10, 5, 3), (4, 2, 8), (6, 1, 1), (2, 2, 2).
    Rows 0 and 1: padded 2·2·max(15, 12) = 60, shared 17 + 13 = 30: 2. Rows 3 and 2: 4·7 = 28, 5 + 7 = 12: 7/3.
    Together: 88 / 42, also with a fifth row that fills no micro-batch.
    """
    lengths = np.array([[10, 5, 3], [4, 2, 8], [6, 1, 1], [2, 2, 2], [90, 9, 9]])
    assert [token_bound(lengths[rows], 2) for rows in ([0, 1], [3, 2])] == pytest.approx([2, 28 / 12])
    assert token_bound(lengths[[0, 1, 3, 2]], 2) == pytest.approx(88 / 42)
    assert token_bound(lengths[[0, 1, 3, 2, 4]], 2) == pytest.approx(88 / 42)
    drawn, bounds = measuring.token_lengths(comparison.workload.rows), comparison.token_bounds()
    assert bounds[STEP] == token_bound(drawn[comparison.order[4:12]], 2)  # the first update warms up
    assert bounds[REFERENCE] == token_bound(drawn, 2)
    assert 12 == len(drawn) < len(comparison.workload.source_lengths) <= 30
    assert not Comparison(comparison.workload, sharing=False).token_bounds()


def test_the_report_leaves_every_run(comparison, tmp_path, capsys):
    selections = [{"rows": 1000, "kept": 900, "seconds": 2.0, "gib": 0.5}]
    bench.show(comparison)
    bench.write(tmp_path / "out", [comparison], selections)
    shown, source = capsys.readouterr().out, comparison.workload.source_lengths
    assert f"over all {len(source)} rows that the selection leaves: {token_bound(source, 2):.2f}\n" in shown
    assert "All weights against down_proj" in shown
    bound, ratio = comparison.token_bounds()[STEP], comparison.table("stock", "shared")[STEP][-1]
    (line,) = [line for line in shown.splitlines() if STEP in line and "tokens" not in line and f"{bound:.2f}" in line]
    assert f"{ratio:.2f} | " in line
    document = json.loads((tmp_path / "out/bench.json").read_text())
    (found,) = document["workloads"]
    assert found["runs"]["stock"][0]["losses"] == comparison.runs["stock"][0].losses
    assert document["selection"] == selections
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
    run = time_selection(600)
    assert run["rows"] == 600 and 200 < run["kept"] <= (600 - 40) * 9 // 10
    assert run["seconds"] > 0 and run["gib"] >= 0


def test_what_does_not_fit_is_told_after_the_rest_is_reported(comparison, monkeypatch, tmp_path):
    """Two plans of which the first needs more memory than there is; and what a workload gave is written at once."""
    outcomes = iter([torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"), None])

    def measured(*_):
        if outcome := next(outcomes):
            raise outcome

    monkeypatch.setattr(measuring, "measure_memory", measured)
    monkeypatch.setattr(measuring, "time_rounds", lambda *_: None)
    monkeypatch.setattr(measuring, "time_selection", lambda _: json.loads((tmp_path / "bench.json").read_text()))
    monkeypatch.setattr(measuring, "Comparison", lambda _: comparison)
    monkeypatch.setattr(generated, "prepare_workload", lambda *_: comparison.workload)
    monkeypatch.setattr(bench, "prepare_environment", lambda: None)
    monkeypatch.setattr(bench, "take_one_gpu", lambda: None)
    monkeypatch.setattr(bench, "ON_CPU", [[], []])
    monkeypatch.setattr(sys, "argv", ["bench.py", "--selection_rows", "--output_dir", str(tmp_path)])
    with pytest.raises(
        RecipeError, match=r"pairs.jsonl, model tiny: CUDA out of memory\. Tried to allocate 2\.00 GiB\.$"
    ):
        bench.main.__wrapped__()  # without the exit of the whole process
    assert len(json.loads((tmp_path / "bench.json").read_text())["workloads"]) == 1


@pytest.mark.parametrize(("given", "taken"), [(None, "0"), ("2,3", "2"), ("GPU-8a,GPU-8b", "GPU-8a"), ("", "")])
def test_one_gpu_is_taken(given, taken, monkeypatch):
    """With several in sight a Trainer in one process would spread each micro-batch over them by nn.DataParallel."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "restored afterwards")
    if given is None:
        del os.environ["CUDA_VISIBLE_DEVICES"]
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = given
    bench.take_one_gpu()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == taken


# ------------------------------------------------------------------------------------------------ peak memory

START = """
import torch
from benchmark.measuring import PeakMemory, allocate
MIB = 2**20
"""
PEAKS = {
    "what stays after an earlier block does not count": """
kept = torch.ones(8 * MIB)
with PeakMemory() as memory:
    held = torch.ones(16 * MIB)
    del held
""",
    # glibc by itself would keep the pieces: it takes blocks from the heap that are smaller than one that was freed,
    # and small blocks lie on top of them.
    "what is freed first makes room for the rest": """
torch.ones(2 * MIB)
allocate("returned")
with PeakMemory() as memory:
    held = [torch.ones(MIB // 4) for _ in range(64)]
    small = [torch.ones(10_000) for _ in range(4)]
    del held
    held = torch.ones(16 * MIB)
""",
}


@pytest.mark.parametrize("code", PEAKS.values(), ids=list(PEAKS))
def test_a_peak_of_64_mib(code):
    """Each in a fresh process, whose heap no other test has filled."""
    assert 60 < float(printed(START + code + "print(memory.peak_bytes / MIB)")) < 80


def test_kept_memory_costs_no_page_fault_again():
    """Page faults of 64 MiB in pieces of 4 MiB, written and freed, in parts of 64 MiB: counted, not timed."""
    figures = printed(
        START
        + """
import resource
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [torch.ones(MIB) for _ in range(16)]
    del held
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize() / (64 * MIB)
for how in ("returned", "kept"):
    allocate(how)
    torch.ones(24 * MIB)
    print(faults(), faults())
"""
    )
    *returned, kept, kept_again = map(float, figures.split())
    assert min(returned) > 0.9 and max(kept, kept_again) < 0.2


def printed(code: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(Path(bench.__file__).parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


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
        (["--dataset", "FEW", "--datasets.0.columns.prompt", "prompt"], r"rows are left .* 3 updates need 12"),
    ],
)
def test_what_cannot_be_measured_is_refused(keys, message, tmp_path):
    few = tmp_path / "few.jsonl"
    rows = generate_pairs(6, LENGTHS["hh-rlhf"], seed=0)
    lines = (json.dumps(dict(zip(("prompt", "chosen", "rejected"), row, strict=True))) for row in rows)
    few.write_text("\n".join(lines))
    with pytest.raises(RecipeError, match=message):
        workload_of(*(str(few) if key == "FEW" else key for key in keys))


def test_the_script_refuses_in_one_line_and_at_once():
    done = subprocess.run([sys.executable, bench.__file__, "--bata", "1"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "did you mean beta?" in done.stderr
