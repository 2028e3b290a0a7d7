"""
Teach a model to answer, the stage before preferences: TRL's SFTTrainer over the sources of a recipe.

    accelerate launch --config_file accelerate_configs/zero3.yaml recipes/sft.py --config my.yaml [--key value …]
"""

from core.runtime.environment import prepare_environment
from core.runtime.errors import exits_cleanly


@exits_cleanly
def main() -> None:
    prepare_environment()  # before the first import of torch
    from core.training.session import begin, open_model, open_run

    # ---------------------------------------------------------------- the run
    resolved = open_run("sft")
    recipe, args = resolved.recipe, resolved.training

    # torch, transformers and TRL take seconds to import: a misspelt key is told before.
    from core.data.chat_template import template_errors
    from core.data.preferences import load_conversations
    from core.data.tokens import ids_digest, lead_with
    from core.modeling.padding_free import omits_padding
    from core.modeling.parameters import lora_config
    from core.modeling.policy import load_policy
    from core.modeling.proof import verify_saved
    from core.modeling.reference_cache import weights_digest
    from core.planning.disk import check_room
    from core.reporting.results import finish, show_lengths
    from core.runtime.ranks import agree, caches_in_turn, rank
    from core.runtime.watch import Watch
    from core.training.checkpoints import check_fits, checkpoint_to_resume, launched_as
    from core.training.stopping import StopOnSignal
    from core.training.trainer import ConversationTrainer

    watch, stop = Watch(), StopOnSignal()
    checkpoint = checkpoint_to_resume(args.resume_from_checkpoint, args.output_dir, resolved.values)

    # ---------------------------------------------------------------- conversations that end in the answer to learn
    tokenizer = open_model(resolved).tokenizer

    def conversations(entries):
        return lead_with(recipe.system_message, load_conversations(entries, args.seed, args.dataset_num_proc))

    train = caches_in_turn(lambda: conversations(recipe.datasets))
    held_out = caches_in_turn(lambda: conversations(recipe.eval_datasets)) if recipe.eval_datasets else None

    # ---------------------------------------------------------------- the model, and what of it is trained
    model = load_policy(resolved.model, recipe.trainable_parameters, args)
    check_room(model, resolved, len(train))

    # ---------------------------------------------------------------- train, save, prove what was saved, report
    with template_errors():  # TRL renders the conversations
        trainer = ConversationTrainer(
            model=model,
            args=args,
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=tokenizer,
            omits_padding=omits_padding(recipe.padding_free, model, args),
            peft_config=lora_config(resolved.model, recipe.trainable_parameters, model),
            callbacks=[stop],
        )
    trainer.recipe, trainer.rows_digest = resolved.values, ids_digest(trainer.train_dataset, ["input_ids"])
    trainer.begun_from, trainer.save_dtype = resolved.model, recipe.save_dtype
    if resolved.model.use_peft:  # a checkpoint has the adapter alone
        trainer.base_digest = weights_digest(resolved.model.model_name_or_path, resolved.model.model_revision)
    agree("conversations", trainer.rows_digest)
    if rank() == 0:
        show_lengths(trainer, len(train))
    if checkpoint is not None:
        check_fits(checkpoint, launched_as(trainer))
    begin(resolved)
    output = trainer.train(resume_from_checkpoint=checkpoint)
    stop.exit_if_stopped(trainer.state.global_step)
    trainer.save_final()
    shown = trainer.train_dataset[:4]["input_ids"]
    verify_saved(args.output_dir, resolved.model, trainer.model, trainer.accelerator, shown)
    finish(trainer, output)
    watch.stop()


if __name__ == "__main__":
    main()
