"""
A real chat model becomes safe: SmolLM2-135M-Instruct through both stages on a laptop, then judged at its start, after
each stage, on prompts that it has not met.

    python recipes/smollm2-135m/run.py --xstest xstest_prompts.csv --harmbench harmbench_val.csv \
        [--safety pairs.jsonl] [--helpful pairs.jsonl] [--model PATH] [--seed 0] [--output_dir runs/smollm2-135m] \
        [--key value …]

Further options go to the second stage (recipes/dpo.py), e.g. `--margin.preset dpo`.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the modules in recipes/

from core.config.parsing import resolve
from core.runtime.environment import prepare_environment
from core.runtime.errors import RecipeError, exits_cleanly
from core.runtime.network import go_offline_if_local

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "recipes"
HERE = RECIPES / "smollm2-135m"


@exits_cleanly
def main() -> None:
    options, overrides = parse()
    resolve("dpo", ["--config", str(HERE / "dpo.yaml"), *overrides])  # a misspelt key is told now
    folder, started = options.output_dir, time.time()
    if folder.exists() and any(folder.iterdir()):
        raise RecipeError(f"output_dir {folder} is not empty; choose another folder, or delete it")
    go_offline_if_local([options.model])
    prepare_environment()
    from prepare import prepare  # torch and transformers take seconds to import

    data, stages = folder / "data", {"sft": folder / "sft", "dpo": folder / "dpo"}
    print("== 1 of 4: the start's own answers, and what both stages train on", flush=True)
    held_out = [(options.xstest, "prompt"), (options.harmbench, "Behavior")]
    prepare(data, options.model, options.seed, options.safety, options.helpful, held_out)

    print(f"== 2 of 4: supervised fine-tuning ({time.time() - started:.0f} s)", flush=True)
    settings = {"model_name_or_path": options.model, "output_dir": stages["sft"], "seed": options.seed}
    launch("sft", settings | {"datasets.0.path": data / "sft.jsonl"})

    print(f"== 3 of 4: preferences ({time.time() - started:.0f} s)", flush=True)
    settings = {"model_name_or_path": stages["sft"], "output_dir": stages["dpo"], "seed": options.seed}
    sources = {f"datasets.{index}.path": data / f"{name}.jsonl" for index, name in enumerate(("task", "buffer"))}
    launch("dpo", settings | sources, overrides)

    print(f"== 4 of 4: the start, and what came of each stage ({time.time() - started:.0f} s)", flush=True)
    models = {"start": options.model} | stages
    settings = {f"models.{name}": path for name, path in models.items()} | {"model_name_or_path": options.model}
    sets = {f"prompt_sets.{index}.path": path for index, path in enumerate([options.xstest] * 2 + [options.harmbench])}
    launch("evaluate", settings | sets | {"output_dir": folder / "evaluation"})
    print(f"\n{time.time() - started:.0f} s. The models, their cards and the evaluation are in {folder}", flush=True)


def parse() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="a path, or a name on the Hub")
    parser.add_argument("--xstest", required=True, help="XSTest's xstest_prompts.csv (CC-BY-4.0)")
    parser.add_argument("--harmbench", required=True, help="HarmBench's harmbench_behaviors_text_val.csv (MIT)")
    parser.add_argument("--safety", help="pairs as JSON lines: prompt, chosen (the safer answer), rejected")
    parser.add_argument("--helpful", help="pairs of harmless prompts as JSON lines, e.g. of UltraFeedback")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/smollm2-135m"))
    return parser.parse_known_args()


def launch(stage: str, settings: dict[str, str | int | Path], overrides: Sequence[str] = ()) -> None:
    """Run a stage as a user would: `accelerate launch`, its YAML and overrides. If it fails, so does this process."""
    command = [sys.executable, str(RECIPES / "core/runtime/accelerate_launch.py")]
    command += ["--config_file", str(ROOT / "accelerate_configs" / "cpu.yaml"), str(RECIPES / f"{stage}.py")]
    name = "evaluation" if stage == "evaluate" else stage
    command += ["--config", str(HERE / f"{name}.yaml"), *(f"--{key}={value}" for key, value in settings.items())]
    code = subprocess.run([*command, *overrides]).returncode
    if code:
        print(f"error: stage {stage} failed with exit code {code}; its message is above", file=sys.stderr, flush=True)
        raise SystemExit(code)


if __name__ == "__main__":
    main()
