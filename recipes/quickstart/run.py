"""
The quickstart, from nothing: a small grammar, a small model, both stages of training, and the model judged before and
after on requests that it has not met.

    python recipes/quickstart/run.py [--seed 0] [--output_dir runs/quickstart] [--accelerate_config FILE] \
        [--key value …]

Further options go to the second stage (recipes/dpo.py), e.g. `--margin.preset dpo`.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import count
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the modules in recipes/

from core.config.parsing import resolve
from core.runtime.environment import prepare_environment
from core.runtime.errors import RecipeError, exits_cleanly

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "recipes" / "quickstart"
DEFAULT_FOLDER = Path("runs/quickstart")


@exits_cleanly
def main() -> None:
    options, overrides = parse()
    resolve("dpo", ["--config", str(RECIPES / "dpo.yaml"), *overrides])  # a misspelt key is told now
    folder, seed = free_folder(options.output_dir), options.seed
    data, started = folder / "data", time.time()
    os.environ["HF_HUB_OFFLINE"] = "1"  # everything is made here
    prepare_environment()
    from prepare import prepare, sample_pairs  # torch and transformers take seconds to import

    print("== 1 of 5: data, tokenizer and an untrained model", flush=True)
    prepare(folder, seed)

    print("== 2 of 5: supervised fine-tuning", flush=True)
    settings = {"model_name_or_path": folder / "untrained", "output_dir": folder / "sft", "seed": seed}
    launch("sft", options.accelerate_config, settings | {"datasets.0.path": data / "sft.jsonl"})

    print("== 3 of 5: pairs, sampled from the model so far", flush=True)
    sample_pairs(folder, seed)

    print("== 4 of 5: preferences", flush=True)
    sources = {
        "datasets.0.path": data / "task.jsonl",
        "datasets.1.path": data / "buffer.jsonl",
        "eval_datasets.0.path": data / "eval.jsonl",
    }
    settings = {"model_name_or_path": folder / "sft", "output_dir": folder / "dpo", "seed": seed}
    launch("dpo", options.accelerate_config, settings | sources, overrides)

    print("== 5 of 5: held-out requests, before and after", flush=True)
    from judge import compare

    compare(folder / "sft", folder / "dpo", seed)
    print(f"\n{time.time() - started:.0f} s. The model card: {folder / 'dpo' / 'README.md'}", flush=True)


def parse() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output_dir", type=Path, help=f"default: {DEFAULT_FOLDER}, or the first free number after it"
    )
    parser.add_argument("--accelerate_config", default=str(ROOT / "accelerate_configs" / "cpu.yaml"))
    return parser.parse_known_args()


def free_folder(wanted: Path | None) -> Path:
    """
    Where the run goes: `wanted`, or the default with a number if an earlier run is there.

    Raises:
        RecipeError: `wanted` is not empty.
    """
    if wanted is not None:
        if wanted.exists() and (not wanted.is_dir() or any(wanted.iterdir())):
            raise RecipeError(f"output_dir {wanted} is not empty; choose another folder, or delete it")
        return wanted
    folder, numbers = DEFAULT_FOLDER, count(2)
    while folder.exists():
        folder = DEFAULT_FOLDER.with_name(f"{DEFAULT_FOLDER.name}-{next(numbers)}")
    if folder != DEFAULT_FOLDER:
        print(f"note: {DEFAULT_FOLDER} holds an earlier run; this one goes to {folder}", flush=True)
    return folder


def launch(stage: str, accelerate_config: str, settings: dict[str, str | int | Path], overrides: Sequence[str] = ()):
    """Run a stage as a user would: `accelerate launch`, its YAML and overrides. If it fails, so does this process."""
    scripts = ROOT / "recipes"
    command = [sys.executable, str(scripts / "core/runtime/accelerate_launch.py"), "--config_file", accelerate_config]
    command += [str(scripts / f"{stage}.py"), "--config", str(RECIPES / f"{stage}.yaml")]
    code = subprocess.run([*command, *(f"--{key}={value}" for key, value in settings.items()), *overrides]).returncode
    if code:
        print(f"error: stage {stage} failed with exit code {code}; its message is above", file=sys.stderr, flush=True)
        raise SystemExit(code)


if __name__ == "__main__":
    main()
