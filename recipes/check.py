"""
Look a run over before it starts, without a GPU and without its weights: the recipe, the rows, the batch, the memory,
the disk. Nothing is written into the output folder.

    python recipes/check.py --config my.yaml --accelerate_config accelerate_configs/zero3.yaml [--key value …]

    python recipes/check.py --data my.jsonl

`make check RECIPE=… ACCELERATE=… ARGS=…` and `make check DATA=…` are the same. The second shows the columns of a file
or folder of rows and the lines of a recipe that would read it; it chooses nothing and so ends with exit code 2.

The recipe's keys say whether it is one of sft.py or dpo.py (core/runtime/stage.py). Exit code 0, or 2 with the list of
everything that is wrong.
"""

import argparse
import dataclasses
import sys
from typing import NoReturn

from core.config.keys import keys_of, listing
from core.config.parsing import Run, Settings, build, look_over
from core.planning.findings import Findings
from core.runtime.environment import prepare_environment
from core.runtime.errors import USER_ERROR, RecipeError, exits_cleanly
from core.runtime.launching import Launch, launch_faults, read_launch
from core.runtime.network import go_offline_if_local
from core.runtime.stage import stage_of
from core.training.session import claim_folder, places

OF_NOMINAL = 79.6 / 80  # GiB that a card of 80 "GB" has, for each of them


@exits_cleanly
def main() -> None:
    prepare_environment()  # before the first import of torch
    options, overrides = parse_options()
    if options.data:
        propose_mapping(options.data)
    findings = Findings()

    # ---------------------------------------------------------------- what is asked for: recipe and launch config
    launch = findings.attempt(read_launch, options.accelerate_config, options.num_processes)
    kind = stage_of(options.config)
    if kind == "evaluate":
        raise RecipeError(
            f"{options.config} is a list for recipes/evaluate.py, which checks it itself before it loads a model; "
            "check is for recipes that train"
        )
    argv = ["--config", options.config, *overrides]
    looked_over = findings.attempt(look_over, kind, argv, launch and launch.world_size)
    if looked_over is None:
        leave(findings)
    asked, wrong, contradictory = looked_over
    for fault in [*wrong, *contradictory]:
        findings.fault(fault)
    if launch is None:
        launch = Launch("no launch config", "NO", 1)  # the rest is checked as one process
    for fault in launch_faults(launch, asked.training):
        findings.fault(fault)
    go_offline_if_local(places(asked))
    print(f"{options.config} by recipes/{kind}.py on {launch}")
    for line in asked.announcements:
        findings.note(line)

    # TRL and transformers take seconds to import: a misspelt key is told before where it is all.
    import datasets

    from core.modeling.padding_free import omits_padding
    from core.modeling.policy import share_prefixes
    from core.planning import estimates, inspection
    from core.training.checkpoints import check_fits, checkpoint_to_resume
    from core.training.manifest import asked_of

    datasets.disable_progress_bars()
    resolved = findings.attempt(build_anywhere, asked)
    if resolved is None:
        leave(findings)
    recipe = resolved.recipe
    findings.attempt(claim_folder, resolved, only_look=True)
    args = resolved.training
    checkpoint = findings.attempt(checkpoint_to_resume, args.resume_from_checkpoint, args.output_dir, resolved.values)
    if checkpoint is not None:
        findings.attempt(check_fits, checkpoint, asked_of(launch, args))
    inspection.show_network(resolved)
    mixed = mixed_precision(asked, launch)
    model, tokenizer, precision, _ = inspection.inspect_model(resolved, mixed, launch.zero_stage, findings)

    # ---------------------------------------------------------------- rows, batch, steps
    end_to_end = False
    if model is not None:
        if kind == "sft":
            end_to_end = omits_padding(recipe.padding_free, model.policy, args)
        else:
            end_to_end = share_prefixes(recipe.prefix_sharing, model.policy, args.max_length)
    steps, largest = estimates.inspect_rows(resolved, launch, tokenizer, end_to_end, findings)

    # ---------------------------------------------------------------- memory and disk
    if model is None:
        findings.note("without the model's config, memory and disk are not estimated")
        leave(findings)
    if largest is None:
        findings.note("rows without tokens: memory is estimated as if every one filled max_length")
        largest = estimates.worst_micro_batch(resolved, end_to_end)
    limit = options.gpu_memory and options.gpu_memory * OF_NOMINAL * 2**30
    estimates.inspect_memory(resolved, launch, model, largest, precision, limit, findings)
    estimates.inspect_disk(resolved, launch, model, precision, steps, findings)
    leave(findings)


def parse_options() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="\n".join(["Any key of the recipe may be given here too. Those of dpo.py:", *listing(keys_of("dpo"))]),
    )
    parser.add_argument("--config", help="the recipe")
    parser.add_argument("--accelerate_config", help="the launch config")
    parser.add_argument("--data", help="instead of both: rows that no recipe names yet, to propose a mapping")
    parser.add_argument("--num_processes", type=int, help="in its place, as accelerate launch --num_processes")
    parser.add_argument(
        "--gpu_memory",
        type=float,
        help="of each GPU, as it is sold (80: 79.6 GiB), to compare",
    )
    options, overrides = parser.parse_known_args()
    if options.data is None:
        missing = [key for key in ("config", "accelerate_config") if getattr(options, key) is None]
        if missing:
            parser.error(f"the following arguments are required: {', '.join(f'--{key}' for key in missing)}")
    elif given := [key for key, value in vars(options).items() if key != "data" and value is not None] + overrides:
        parser.error(f"--data stands alone; remove {given[0]}")
    return options, overrides


def propose_mapping(path: str) -> NoReturn:
    import datasets

    from core.planning.proposal import propose

    datasets.disable_progress_bars()
    propose(path)


def build_anywhere(asked: Settings) -> Run:
    """TRL's configuration objects on this machine, whatever the run's own has."""
    here = {"use_cpu": True, "bf16": False, "fp16": False, "tf32": None}
    return build(dataclasses.replace(asked, training=asked.training | here))


def mixed_precision(asked: Settings, launch: Launch) -> str:
    """What the forward runs in: the recipe's, of which bf16 is TRL's default, or the launcher's."""
    fp16, bf16 = asked.training.get("fp16"), asked.training.get("bf16")
    return "fp16" if fp16 else "bf16" if bf16 or bf16 is None else launch.mixed_precision


def leave(findings: Findings) -> NoReturn:
    """Print what was found and end."""
    sys.exit(USER_ERROR if findings.report() else 0)


if __name__ == "__main__":
    main()
