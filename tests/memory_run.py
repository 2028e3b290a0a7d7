"""
Memory that the real recipes/dpo.py takes on CPU processes, and what recipes/check.py says of it. As a script it is a
process of the run that measures itself: from before the model is loaded to the end, the imports subtracted, and with
freed memory given back at once, as the estimate has it.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
LAYERS, WIDTH, VOCABULARY = 9, 512, 32_000  # 63.4 million parameters, of which a sixth are of down_proj
RECIPE = {
    "dtype": "float32",
    "margin": {"preset": "dpo"},
    "learning_rate": 1.0e-4,
    "per_device_train_batch_size": 4,
    "pairs_per_update": 8,
    "max_length": 512,
    "max_steps": 2,
    "bf16": False,
    "use_cpu": True,
    "save_strategy": "no",
}


def prepare(folder: Path) -> Path:
    """A model of random weights, rows of hh-rlhf's lengths and a recipe under `folder`; returns the recipe."""
    import torch

    from benchmark.generated import LENGTHS, generate_pairs, random_model, train_tokenizer

    pairs = list(generate_pairs(120, LENGTHS["hh-rlhf"], seed=3))
    rows = folder / "pairs.jsonl"
    lines = (json.dumps(dict(zip(("prompt", "chosen", "rejected"), pair, strict=True))) for pair in pairs)
    rows.write_text("\n".join(lines) + "\n")
    model = folder / "model"
    train_tokenizer(text for pair in pairs for text in pair).save_pretrained(model)
    random_model((LAYERS, WIDTH, 8, 2, 1792, VOCABULARY), torch.float32, seed=0).save_pretrained(model)
    columns = {key: key for key in ("prompt", "chosen", "rejected")}
    places = {"model_name_or_path": str(model), "output_dir": str(folder / "run")}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(places | {"datasets": [{"path": str(rows), "columns": columns}]} | RECIPE))
    return path


def estimated(recipe: Path, config: Path, arguments: Sequence[str]) -> float:
    """GiB of each process, as recipes/check.py prints it."""
    command = [sys.executable, str(ROOT / "recipes/check.py"), "--config", str(recipe), *arguments]
    done = subprocess.run([*command, "--accelerate_config", str(config)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return float(re.search(r"\| peak .*\| *([\d.]+) \|", done.stdout)[1])


def measured(recipe: Path, config: Path, arguments: Sequence[str], folder: Path) -> float:
    """GiB of the process that takes most."""
    folder.mkdir()
    run = ["--output_dir", str(folder / "run"), "--reference_cache", str(folder / "reference"), *arguments]
    command = [sys.executable, str(ROOT / "recipes/core/runtime/accelerate_launch.py"), "--config_file", str(config)]
    done = subprocess.run(
        [*command, __file__, "--config", str(recipe), *run],
        capture_output=True, text=True, env=os.environ | {"MEASURED": str(folder)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return max(float(path.read_text()) for path in folder.glob("*.gib"))


def main() -> None:
    sys.path.insert(0, str(ROOT / "recipes"))
    import dpo
    from core.runtime.environment import prepare_environment

    prepare_environment()
    from benchmark.measuring import PeakMemory
    from core.modeling import policy
    from core.training.throughput import GIB

    memory, load = PeakMemory(), policy.load_model

    def load_model(*arguments, **keywords):
        if not hasattr(memory, "before"):
            memory.__enter__()
        return load(*arguments, **keywords)

    policy.load_model = load_model
    dpo.main.__wrapped__()
    memory.__exit__()
    Path(os.environ["MEASURED"], f"{os.environ.get('RANK', '0')}.gib").write_text(str(memory.peak_bytes / GIB))
    os._exit(0)  # as the script does: DeepSpeed's threads would not end


if __name__ == "__main__":
    main()
