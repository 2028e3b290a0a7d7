"""QLoRA on several processes, and what no launch of DeepSpeed can do for it."""

import json
import runpy
import sys

import pytest
import torch
import yaml

from architectures import save_architecture
from processes import CONFIGS, ROOT, exit_codes, start_ranks
from test_qlora_street import ON_CPU, WIDE, of_7b, run, write_pairs


def on_a_rank(rank: int, arguments: list[str]) -> None:
    torch.set_num_threads(1)
    sys.argv = ["dpo.py", *arguments]
    runpy.run_path(str(ROOT / "recipes/dpo.py"), run_name="__main__")


def test_two_processes_share_out_the_rows_of_one(tmp_path):
    """Under DDP, each with the quantised model whole: the losses of one process with twice the accumulation."""
    model, losses = str(save_architecture(tmp_path / "llama", "llama", **WIDE)), []
    for processes in (1, 2):
        recipe = of_7b(write_pairs(tmp_path), model, tmp_path / f"on {processes}", **ON_CPU, optim="sgd", max_steps=2)
        recipe |= {"per_device_train_batch_size": 4, "pairs_per_update": 8, "logging_steps": 1, "learning_rate": 0.1}
        if processes == 1:
            code, output, errors = run("dpo.py", recipe, tmp_path)
            assert code == 0, output + errors
        else:
            (tmp_path / "two.yaml").write_text(yaml.safe_dump(recipe))
            ranks = start_ranks(2, None, on_a_rank, [f"--config={tmp_path / 'two.yaml'}"])
            assert exit_codes(ranks, 100) == [0, 0]
        logged = map(json.loads, (tmp_path / f"on {processes}/metrics.jsonl").read_text().splitlines())
        losses.append([line["loss"] for line in logged if "loss" in line])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 2


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"load_in_4bit": True, "optim": "adamw_torch"}, "load_in_4bit: DeepSpeed cannot share out quantised weights"),
        ({"load_in_4bit": False, "optim": "adamw_8bit"}, "optim: adamw_8bit: DeepSpeed shares out"),
    ],
    ids=["weights", "optimizer"],
)
def test_deepspeed_is_refused_by_check_and_run(keys, told, tmp_path):
    model = str(save_architecture(tmp_path / "llama", "llama", **WIDE))
    recipe = of_7b(write_pairs(tmp_path), model, tmp_path / "out", **ON_CPU, **keys)
    code, output, errors = run("check.py", recipe, tmp_path, f"--accelerate_config={CONFIGS / 'zero3-cpu.yaml'}")
    assert code == 2 and told in output, output + errors
    ranks = start_ranks(1, 2, on_a_rank, [f"--config={tmp_path / 'recipe.yaml'}"])
    assert exit_codes(ranks, 100) == [2]
    assert not (tmp_path / "out/adapter_model.safetensors").exists()
