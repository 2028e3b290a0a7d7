"""
Align a model on preference pairs: selective buffer, shifted reward margin, selective parameters.

    accelerate launch --config_file accelerate_configs/zero3.yaml recipes/dpo.py --config my.yaml [--key value …]
"""

from functools import partial

from core.runtime.environment import prepare_environment
from core.runtime.errors import exits_cleanly


@exits_cleanly
def main() -> None:
    prepare_environment()  # before the first import of torch
    from core.training.session import begin, open_model, open_run

    # ---------------------------------------------------------------- the run
    resolved = open_run("dpo")
    recipe, args = resolved.recipe, resolved.training

    # torch, transformers and TRL take seconds to import: a misspelt key is told before.
    from core.modeling.parameters import lora_config
    from core.modeling.policy import load_policy, share_prefixes
    from core.modeling.proof import verify_saved
    from core.modeling.reference import reference_gaps
    from core.modeling.reference_cache import open_cache, weights_digest
    from core.planning.disk import check_room
    from core.reporting.results import finish, show_selection
    from core.runtime.ranks import agree, rank
    from core.runtime.watch import Watch
    from core.selection.buffer import PER_TOKEN, refuse_overlap
    from core.selection.pairs import prepare_pairs
    from core.training.checkpoints import check_fits, checkpoint_to_resume, launched_as
    from core.training.stopping import StopOnSignal
    from core.training.trainer import ShiftedMarginTrainer

    watch, stop = Watch(), StopOnSignal()
    checkpoint = checkpoint_to_resume(args.resume_from_checkpoint, args.output_dir, resolved.values)
    if recipe.eval_datasets:
        args.eval_on_start = True  # the "before" of every table; a run that goes on has it

    # ---------------------------------------------------------------- rows: load, tokenise, select, give margins
    tokenizer = open_model(resolved).tokenizer
    held_out = None
    if recipe.eval_datasets:
        held_out = prepare_pairs(recipe.eval_datasets, recipe, args, tokenizer, evaluation=True)
    gaps = partial(
        reference_gaps,
        settings=resolved.model,
        args=args,
        trained=recipe.trainable_parameters,
        prefix_sharing=recipe.prefix_sharing,
        cache_folder=recipe.reference_cache,
        pad_token_id=tokenizer.pad_token_id,
        per_token=recipe.selection.score is not None and recipe.selection.score.signal == PER_TOKEN,
    )
    train = prepare_pairs(recipe.datasets, recipe, args, tokenizer, held_out=held_out, reference_gaps=gaps)
    if held_out is not None:
        refuse_overlap(train.audit, held_out.audit)
        agree("evaluation rows", held_out.digest)
    rows_digest = train.digest()
    agree("training rows", rows_digest)
    if rank() == 0:
        show_selection(train, recipe.margin, args.beta)
        if held_out is not None:
            show_selection(held_out, recipe.margin, args.beta, "evaluation")

    # ---------------------------------------------------------------- the policy, and what of it is trained
    model = load_policy(resolved.model, recipe.trainable_parameters, args)
    check_room(model, resolved, len(train.dataset))
    lora = lora_config(resolved.model, recipe.trainable_parameters, model)

    # ---------------------------------------------------------------- the trainer
    live = not (args.precompute_ref_log_probs or resolved.model.use_peft or recipe.margin.reference_free)
    cached = args.precompute_ref_log_probs and not recipe.margin.reference_free
    trainer = ShiftedMarginTrainer(
        model=model,
        ref_model=load_policy(resolved.model, recipe.trainable_parameters, args) if live else None,
        processing_class=tokenizer,
        args=args,
        train_dataset=train.dataset,
        eval_dataset=held_out and held_out.dataset,
        margin=recipe.margin,
        replay=recipe.selection.replay,
        prefix_sharing=share_prefixes(recipe.prefix_sharing, model, args.max_length, lora),
        reference_cache=open_cache(recipe.reference_cache, resolved.model, args, model) if cached else None,
        peft_config=lora,
        callbacks=[stop],
    )
    trainer.recipe, trainer.rows_digest = resolved.values, rows_digest
    trainer.begun_from, trainer.save_dtype = resolved.model, recipe.save_dtype
    if resolved.model.use_peft and not cached:
        trainer.base_digest = weights_digest(resolved.model.model_name_or_path, resolved.model.model_revision)
    if checkpoint is not None:
        check_fits(checkpoint, launched_as(trainer))

    # ---------------------------------------------------------------- train, save, prove what was saved, report
    begin(resolved, train.audit)
    output = trainer.train(resume_from_checkpoint=checkpoint)
    stop.exit_if_stopped(trainer.state.global_step)
    trainer.save_final()
    shown = train.token_ids(2)
    verify_saved(args.output_dir, resolved.model, trainer.model, trainer.accelerator, shown)
    finish(trainer, output, held_out, recipe.margin)
    watch.stop()


if __name__ == "__main__":
    main()
