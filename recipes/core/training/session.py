"""The opening of a run, the same for every script: recipe, network, ranks, model path and output folder."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from core.config.parsing import Resolved, Run, Settings, build, resolve, save_recipe
from core.config.schema import Kind
from core.runtime.environment import spare_cpu_compile, versions
from core.runtime.errors import RecipeError
from core.runtime.launching import check_launched
from core.runtime.network import check_model_path, go_offline_if_local
from core.runtime.output_folder import check_no_run, check_writable, claim_output_dir, existing_parent
from core.runtime.run_lock import check_free, hold
from core.runtime.text import without_secrets
from core.training.tracking import start_wandb

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from core.modeling.precision import Precision
    from core.modeling.skeleton import Skeleton
    from core.selection.audit import Audit


class Opened(NamedTuple):
    """What is known of the model before its weights are read; None: what it takes was refused (check.py goes on)."""

    skeleton: "Skeleton | None"
    tokenizer: "PreTrainedTokenizerBase | None"
    precision: "Precision | None"
    note: str | None  # what loading would mend


def open_run(kind: Kind) -> Run:
    """
    Check the recipe before anything is loaded, join the ranks, and claim the output folder.

    Raises:
        RecipeError: on every rank, whichever found the fault.
    """
    settings = _read_recipe(kind)
    if os.environ.get("RANK", "0") == "0":
        told = f"{settings.path} by recipes/{kind}.py, into {settings.values['output_dir']}"
        print(without_secrets(told), flush=True)
    go_offline_if_local(places(settings))

    # torch takes seconds to import: a misspelt key is told before.
    from core.runtime.ranks import agree, join_processes, rank

    spare_cpu_compile()
    join_processes(timeout=settings.training.get("ddp_timeout", 1800))
    check_launched(settings.training, settings.recipe.num_processes)
    agree("recipe", settings.values)
    agree("versions", versions())
    check_models(settings)
    claim_folder(settings)
    resolved = build(settings)
    if rank() == 0:
        for line in resolved.announcements:
            print(f"note: {without_secrets(line)}", flush=True)
    return resolved


def _read_recipe(kind: Kind) -> Settings:
    """The recipe of this rank; what is wrong with it is told to the others too, which may have another."""
    try:
        return resolve(kind)
    except RecipeError as error:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            from core.runtime.ranks import join_processes

            join_processes(fault=str(error))  # raises
        raise


def places(settings: Settings) -> list[str | None]:
    """What the recipe reads: paths, or names of the Hub."""
    models = [settings.values.get(key) for key in ("model_name_or_path", "reference_model", "chat_template_path")]
    if settings.kind == "evaluate":
        models += [*compared_models(settings).values(), *(judge.model for judge in settings.recipe.judges)]
    return [*models, *(entry.path for entry in (*settings.recipe.datasets, *settings.recipe.eval_datasets))]


def check_models(settings: Settings) -> None:
    from core.runtime.ranks import first_rank_decides

    values = settings.values
    first_rank_decides(lambda: check_model_path(values["model_name_or_path"], values.get("model_revision")))
    if settings.kind == "evaluate":
        others = [*settings.recipe.models.values(), *(judge.model for judge in settings.recipe.judges)]
        for path in filter(None, [values.get("reference_model"), *others]):
            first_rank_decides(lambda path=path: check_model_path(path))


def compared_models(resolved: Resolved) -> dict[str, str]:
    """Of an evaluation: the name and path of each model, in the order of its tables."""
    path = resolved.values["model_name_or_path"]
    return resolved.recipe.models or {Path(path).name: path}


def open_model(
    resolved: Run,
    mixed: str | None = None,
    zero_stage: int | None = None,
    attempt: Callable[..., Any] = lambda step, *arguments: step(*arguments),
) -> "Opened":
    """
    All that can be known of the model before its weights are read: what a run refuses here, and `check.py` tells.

    Args:
        resolved: the recipe; its model is there (`check_models`).
        mixed, zero_stage: the launch (0: no DeepSpeed); None: the one that this process is part of.
        attempt: calls a step with its arguments. A run stops at the first that refuses; of `check.py`, which collects,
            such a step gives None, and what needs it is left out.

    Raises:
        RecipeError: as the steps do.
    """
    from core.data.chat_template import check_answer_marks
    from core.data.tokens import load_tokenizer
    from core.modeling import skeleton
    from core.modeling.policy import check_config, check_learning, check_start, stored_config
    from core.modeling.precision import asked_dtype, precision_of
    from core.modeling.quantised import check_launch

    model, recipe, args = resolved.model, resolved.recipe, resolved.training
    patterns, path, trains = recipe.trainable_parameters, model.model_name_or_path, resolved.kind != "evaluate"
    if not trains:  # what a run has saved, of which an adapter is no start of another
        model, patterns = replace(model, use_peft=False), None
    config = attempt(stored_config, model)
    if config is None:  # which the tokenizer reads too
        return Opened(None, None, None, None)
    tokenizer = attempt(load_tokenizer, model, recipe)
    mixed = args.mixed_precision if mixed is None else mixed
    if zero_stage is None:
        zero_stage = 0 if args.deepspeed_plugin is None else args.deepspeed_plugin.zero_stage
    precision = precision_of(asked_dtype(model, config), mixed, bool(zero_stage))
    attempt(check_start, model, zero_stage)
    attempt(check_launch, model, args.optim.value, bool(zero_stage))
    attempt(skeleton.check_stored, config, path)
    note = attempt(skeleton.check_generation, model)
    if tokenizer is not None:
        attempt(check_config, config, tokenizer, args)
        if getattr(args, "assistant_only_loss", False):
            attempt(check_answer_marks, tokenizer)
    causal_lm = attempt(skeleton.build_empty, config, model, precision)
    if causal_lm is None:
        return Opened(None, tokenizer, precision, note)
    attempt(skeleton.check_positions, causal_lm, args.max_length, path)
    attempt(skeleton.check_tensors, model)
    chosen = attempt(skeleton.choose, causal_lm, model, patterns, precision)
    if chosen is not None and trains:
        attempt(skeleton.check_trains, chosen, args, path)
        attempt(check_learning, causal_lm, model, args, recipe.save_dtype, precision)
    return Opened(chosen, tokenizer, precision, note)


def claim_folder(settings: Settings, only_look: bool = False) -> None:
    """
    A run must have the folder for itself, on every node, and an evaluation one that is no run's. Either keeps others
    out until its end, unless it is only to look (check.py).
    """
    from core.runtime.ranks import check_shared_folder, first_rank_decides

    values, folder = settings.values, Path(settings.values["output_dir"])

    def look() -> None:
        if settings.kind == "evaluate":
            check_writable(folder)
            check_no_run(folder)
        else:
            claim_output_dir(folder, values, bool(values.get("resume_from_checkpoint")))

    def claim() -> None:
        check_free(folder)
        look()  # before the lock, which a refused start would leave in another run's folder
        if not only_look:
            hold(folder, values)
            look()  # again, for a run that has come and gone meanwhile

    first_rank_decides(claim)
    if settings.kind != "evaluate":
        check_shared_folder(existing_parent(folder))


def begin(resolved: Run, audit: "Audit | None" = None) -> None:
    """Put the resolved recipe and the selection's audit into the output folder, and start wandb; on every rank."""
    from core.runtime.ranks import first_rank_decides

    folder = Path(resolved.training.output_dir)

    def write() -> None:
        save_recipe(resolved, folder)
        if audit is not None:
            audit.save(folder)
        if "wandb" in resolved.training.report_to:
            selection = folder / "selection.json" if audit is not None else None
            reason = start_wandb(folder, resolved.values, selection, resolved.training.run_name)
            if reason:
                print(f"note: wandb is offline: {reason}", flush=True)

    first_rank_decides(write)
