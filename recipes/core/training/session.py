"""The opening of a run, the same for every script: recipe, network, ranks, model path and output folder."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from core.config.parsing import Run, build, resolve, save_recipe
from core.config.schema import DatasetEntry, Kind
from core.runtime.environment import check_model_path, go_offline_if_local, spare_cpu_compile, versions
from core.runtime.errors import RecipeError
from core.runtime.launching import check_launched
from core.runtime.output_folder import check_writable, claim_output_dir, existing_parent
from core.training.tracking import start_wandb

if TYPE_CHECKING:
    from core.selection.audit import Audit


def open_run(kind: Kind) -> Run:
    """
    Check the recipe before anything is loaded, join the ranks, and claim the output folder.

    Raises:
        RecipeError: on every rank, whichever found the fault.
    """
    try:
        settings = resolve(kind)
    except RecipeError as error:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            from core.runtime.ranks import join_processes

            join_processes(fault=str(error))  # tells the other ranks, which may have another recipe, and raises
        raise
    values = settings.values
    entries: list[DatasetEntry] = [*settings.recipe.datasets, *settings.recipe.eval_datasets]
    models = [values["model_name_or_path"], values.get("reference_model"), values.get("chat_template_path")]
    go_offline_if_local([*models, *(entry.path for entry in entries)])

    # torch takes seconds to import: a misspelt key is told before.
    from core.runtime.ranks import (
        agree,
        check_shared_folder,
        check_world,
        deepspeed_is_asked_for,
        first_rank_decides,
        join_processes,
        rank,
    )

    spare_cpu_compile()
    join_processes(timeout=settings.training.get("ddp_timeout", 1800))
    check_world(settings.recipe.num_processes, deepspeed_is_asked_for())
    check_launched(settings.training)
    agree("recipe", values)
    agree("versions", versions())
    first_rank_decides(lambda: check_model_path(values["model_name_or_path"], values.get("model_revision")))
    if kind == "evaluate":
        if values.get("reference_model"):
            first_rank_decides(lambda: check_model_path(values["reference_model"]))
        first_rank_decides(lambda: check_writable(Path(values["output_dir"])))
    else:
        resuming = bool(values.get("resume_from_checkpoint"))
        first_rank_decides(lambda: claim_output_dir(values["output_dir"], values, resuming))
        check_shared_folder(existing_parent(Path(values["output_dir"])))
    resolved = build(settings)
    if rank() == 0:
        for line in resolved.announcements:
            print(f"note: {line}", flush=True)
    return resolved


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
