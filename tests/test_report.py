import io
import json
import math
import shutil

import pytest
import torch
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from core.reporting.tables import (
    before_and_after,
    comparable,
    evaluation_table,
    group_table,
    margin_table,
    number,
    print_table,
    stage_table,
)
from core.runtime.errors import RecipeError
from core.runtime.text import printable
from core.training.records import MetricsFile, evaluations, read_metrics, series

TIMINGS = ("runtime", "per_second")  # of the machine, not of the run


class Line(torch.nn.Module):
    """y = w·x, with the interface that Trainer wants."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor([0.5]))

    def forward(self, x, labels):
        return {"loss": ((self.w * x - labels) ** 2).mean()}


def train(output_dir, steps=6, resume=None, **arguments):
    rows = [{"x": torch.tensor([float(i)]), "labels": torch.tensor([2.0 * i])} for i in range(1, 13)]
    settings = {
        "output_dir": str(output_dir),
        "max_steps": steps,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "eval_on_start": True,
        "save_steps": 4,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,
    }
    trainer = Trainer(
        model=Line(),
        args=TrainingArguments(**(settings | arguments)),
        train_dataset=rows,
        eval_dataset=rows[:4],
        callbacks=[MetricsFile()],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def without_timings(output_dir):
    """The lines of metrics.jsonl as they stand, those of wall-clock figures aside."""
    lines = (output_dir / "metrics.jsonl").read_text().splitlines()
    records = [{k: v for k, v in json.loads(line).items() if not k.endswith(TIMINGS)} for line in lines]
    return [json.dumps(record) for record in records if "train_loss" not in record]


def test_every_logged_record_is_a_line_with_step_and_epoch_first(tmp_path):
    trainer = train(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [list(line)[:2] for line in lines] == [["step", "epoch"]] * len(lines)
    assert lines == trainer.state.log_history
    kinds = [(line["step"], "eval" if "eval_loss" in line else "train") for line in lines]
    evaluated = [(0, "eval"), (2, "eval"), (4, "eval"), (6, "eval")]
    assert [kind for kind in kinds if kind[1] == "eval"] == evaluated
    assert [kind[0] for kind in kinds if kind[1] == "train"] == [1, 2, 3, 4, 5, 6, 6]  # the last: the run's summary


def test_a_resumed_run_leaves_the_file_of_one_that_never_stopped(tmp_path):
    train(tmp_path / "whole")
    expected = without_timings(tmp_path / "whole")

    train(tmp_path / "resumed")  # logs beyond its checkpoint at step 4, as a run that is killed later has
    with open(tmp_path / "resumed" / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "epo')  # and in the middle of a line
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-6")
    train(tmp_path / "resumed", resume=str(tmp_path / "resumed" / "checkpoint-4"))
    assert without_timings(tmp_path / "resumed") == expected


def test_a_resumed_run_keeps_what_its_checkpoint_knows_where_the_file_is_gone(tmp_path):
    train(tmp_path)
    expected = without_timings(tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    train(tmp_path, resume=str(tmp_path / "checkpoint-4"))
    assert without_timings(tmp_path) == expected


def test_a_fresh_run_empties_the_file(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 99, "epoch": 9.0, "loss": 1.0}\n')
    train(tmp_path, steps=2, save_strategy="no")
    assert max(record["step"] for record in read_metrics(tmp_path)) == 2


def test_numbers_without_a_sign_in_json_survive(tmp_path):
    trainer = train(tmp_path, steps=1, save_strategy="no")
    trainer.log({"loss": float("nan"), "a": float("inf"), "b": float("-inf"), "note": "nothing"})
    last = (tmp_path / "metrics.jsonl").read_text().splitlines()[-1]
    json.loads(last, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    record = read_metrics(tmp_path)[-1]
    assert math.isnan(record["loss"]) and (record["a"], record["b"]) == (math.inf, -math.inf)
    assert record["note"] == "nothing"


def test_other_ranks_write_nothing(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    state = TrainerState(is_world_process_zero=False, log_history=[{"step": 1, "epoch": 0.1, "loss": 1.0}])
    MetricsFile().on_train_begin(args, state, TrainerControl())
    MetricsFile().on_log(args, state, TrainerControl())
    assert list(tmp_path.iterdir()) == []


def test_reading_leaves_out_a_torn_last_line_and_names_any_other(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "epoch": 0.5, "loss": 2.0}\n{"step": 2, "ep')
    assert read_metrics(tmp_path) == [{"step": 1, "epoch": 0.5, "loss": 2.0}]
    path.write_text('{"step": 1}\n{"step": 2, "ep\n{"step": 3}\n')
    with pytest.raises(RecipeError, match=r"metrics\.jsonl, line 2"):
        read_metrics(tmp_path)
    with pytest.raises(RecipeError, match="not there"):
        read_metrics(tmp_path / "nowhere")


def test_series_and_evaluations_take_the_last_record_of_a_step():
    records = [
        {"step": 4, "eval_loss": 3.0},
        {"step": 2, "loss": 5.0},
        {"step": 0, "eval_loss": 9.0},
        {"step": 4, "eval_loss": 2.5},
    ]
    assert series(records, "eval_loss") == ([0, 4], [9.0, 2.5])
    assert series(records, "loss") == ([2], [5.0])
    assert evaluations(records) == [records[2], records[3]]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.69314718, "0.6931"),
        (-0.00001, "0.0000"),
        (99.99999, "100.0000"),
        (2897.34, "2897.3"),
        (-287.56, "-287.6"),
        (59478, "59,478"),
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
        (None, "–"),
    ],
)
def test_numbers_as_they_are_printed(value, text):
    assert number(value) == text


def test_evaluation_table_compares_each_group_with_its_start():
    before = {"eval_loss": 6250.0, "eval_rewards/margins": 0.0}
    before |= {"eval_unsafe_safe/loss": 10000.0}
    after = {"eval_loss": 1132.46, "eval_rewards/margins": -0.0034, "eval_accuracy_helpful": 0.4956}
    after |= {"eval_accuracy_target": 0.9271, "eval_unsafe_safe/loss": 1801.7, "eval_safe_safe/loss": 41.5}
    classes = [["safe/safe", "41.5000", "–", "–", "–"], ["unsafe/safe", "10000.0 → 1801.7", "–", "–", "–"]]
    assert evaluation_table(before, after) == (
        ["Pairs", "Loss", "Reward margin", "Helpful accuracy", "Target accuracy"],
        [["all", "6250.0 → 1132.5", "0.000 → -0.003", "0.496", "0.927"], *classes],
    )
    # With both roles the loss is their sum, which is no mean over all pairs.
    _, rows = evaluation_table(before, after | {"eval_task/loss": 1090.96, "eval_buffer/loss": 41.5})
    assert rows == [
        ["task + λ·buffer", "6250.0 → 1132.5", "–", "–", "–"],
        ["all", "–", "0.000 → -0.003", "0.496", "0.927"],
        *classes,
        ["task", "1091.0", "–", "–", "–"],
        ["buffer", "41.5000", "–", "–", "–"],
    ]


def test_what_all_pairs_say_is_said_once():
    """Rows without labels, of a single role: class and role would repeat the first row."""
    after = {f"eval_{group}loss": 0.5 for group in ("", "unlabelled/", "task/")}
    assert evaluation_table({}, after)[1] == [["all", "0.5000", "–", "–", "–"]]


def test_accuracies_of_a_policy_that_is_its_reference_are_left_out():
    start = {"step": 0, "eval_loss": 0.69, "eval_accuracy_helpful": 0.0, "eval_rewards/accuracies": 0.0}
    first = {"step": 1, "loss": 0.69, "safe_safe/accuracy_target": 0.0, "mean_token_accuracy": 0.5}
    later = {"step": 2, "eval_loss": 0.6, "eval_accuracy_helpful": 0.5}
    shown = comparable([start, first, later], reference_free=False)
    assert shown == [{"step": 0, "eval_loss": 0.69}, {"step": 1, "loss": 0.69, "mean_token_accuracy": 0.5}, later]
    assert before_and_after(shown) == (shown[0], later)
    assert comparable([start, first, later], reference_free=True) == [start, first, later]
    assert before_and_after([later]) == ({}, later) and before_and_after([]) == ({}, {})


def test_margin_and_selection_tables():
    header, rows = margin_table([("task", "unsafe/safe", 1234, -1.0, -100.0, 10000.0)])
    assert rows == [["task", "unsafe/safe", "1,234", "-1.0000", "-100.0", "10000.0"]]
    assert header[-1] == "Loss at Δ = 0"
    stages = [
        {"stage": "hygiene", "reason": "identical", "dropped": 12},
        {"stage": "hygiene", "reason": "ties", "dropped": 88},
        {"stage": "quotas", "reason": "source", "dropped": 200},
    ]
    assert stage_table({"rows": 1300, "stages": stages}) == (
        ["Stage", "Reason", "Dropped", "Left"],
        [
            ["rows", "read", "–", "1,300"],
            ["hygiene", "identical", "12", "1,288"],
            ["hygiene", "ties", "88", "1,200"],
            ["quotas", "source", "200", "1,000"],
        ],
    )
    assert group_table("Source", {"before": {"pku": 1300, "uf": 7}, "after": {"pku": 1200, "uf": 0}}) == (
        ["Source", "Before", "After"],
        [["pku", "1,300", "1,200"], ["uf", "7", "0"]],
    )


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_table_is_plain_outside_a_terminal():
    file = io.StringIO()
    reason = "a long reason that no log should break " * 4 + "[bold]x[/bold]"
    print_table("What [went]", ["Reason", "Rows"], [[reason, "12"], ["ties", "1,000"]], file=file)
    lines = file.getvalue().split("\n")
    width = len(reason)
    assert lines == [
        "",
        "What [went]",
        f"| {'Reason':{width}} |  Rows |",
        f"|-{'-' * width}-|-------|",
        f"| {reason} |    12 |",
        f"| {'ties':{width}} | 1,000 |",
        "",
    ]


def test_what_others_wrote_steers_no_terminal():
    """Line breaks, terminal escapes, bidirectional marks and lone surrogates; joiners and wide spaces are kept."""
    assert printable("a\n\x1b[31m\u202e\u2066\u2028\ud800\x9b") == r"a\n\x1b[31m\u202e\u2066\u2028\ud800\x9b"
    assert printable("نمی\u200cخواهم 日\u3000本 👩\u200d🔬 é |") == "نمی\u200cخواهم 日\u3000本 👩\u200d🔬 é |"
    file = io.StringIO()
    print_table("t\x1b[2J", ["h\u202e"], [["c\nd"]], file=file)
    assert file.getvalue() == "\nt\\x1b[2J\n| h\\u202e |\n|---------|\n| c\\nd    |\n"


def test_a_table_on_a_terminal_is_ruled_and_fits_its_width(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    file = Terminal()
    cells = ["1132.5 → 415.6", "0.000 → -0.003", "0.500 → 0.496", "0.500 → 0.927"]
    header, _ = evaluation_table({}, {"eval_loss": 1.0})
    print_table("T", header, [["unsafe/unsafe", *cells]], file=file)
    assert "─" in file.getvalue() and "\x1b[" in file.getvalue()
    assert any(all(cell in line for cell in cells) for line in file.getvalue().splitlines())


def test_only_rank_0_talks(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    print_table("T", ["a"], [["1"]])
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("RANK", "0")
    print_table("T", ["a"], [["1"]])
    assert capsys.readouterr().out == "\nT\n| a |\n|---|\n| 1 |\n"
