"""
Hold a checkpoint against preference rows (loss, rewards, both accuracies, per pair class and role), and let it answer.

    accelerate launch recipes/evaluate.py --config runs/my-run/recipe.yaml --model_name_or_path runs/my-run \
        --reference_model path/of/the/start --output_dir runs/my-evaluation [--prompts prompts.txt]
"""

from dataclasses import replace

from core.runtime.environment import prepare_environment
from core.runtime.errors import exits_cleanly


@exits_cleanly
def main() -> None:
    prepare_environment()  # before the first import of torch
    from core.training.session import open_model, open_run

    # ---------------------------------------------------------------- the run
    resolved = open_run("evaluate")
    recipe, args = resolved.recipe, resolved.training

    # torch, transformers and TRL take seconds to import: a misspelt key is told before.
    from core.data.tokens import with_system_message
    from core.modeling.generation import answer_prompts, read_prompts
    from core.modeling.policy import load_policy, share_prefixes
    from core.reporting.results import show_selection, write_evaluation
    from core.runtime.ranks import rank
    from core.selection.pairs import prepare_pairs
    from core.training.trainer import ShiftedMarginTrainer

    tokenizer = open_model(resolved).tokenizer
    prompts = read_prompts(recipe.prompts) if recipe.prompts else []
    trained = recipe.trainable_parameters
    model = load_policy(resolved.model, trained, args, trains=False)

    # ---------------------------------------------------------------- preference rows
    entries = recipe.eval_datasets or recipe.datasets
    if entries:
        pairs = prepare_pairs(entries, recipe, args, tokenizer, evaluation=True)
        if rank() == 0:
            show_selection(pairs, recipe.margin, args.beta, "evaluation")
        reference = None
        if recipe.reference_model:
            reference = load_policy(resolved.model, trained, args, recipe.reference_model, trains=False)
        args.precompute_ref_log_probs = False
        trainer = ShiftedMarginTrainer(
            model=model,
            ref_model=reference,
            processing_class=tokenizer,
            args=args,
            train_dataset=pairs.dataset,
            eval_dataset=pairs.dataset,
            # Without a reference, rewards are beta times the checkpoint's own log-probabilities.
            margin=replace(recipe.margin, reference_free=reference is None),
            replay=recipe.selection.replay,
            prefix_sharing=share_prefixes(recipe.prefix_sharing, model, args.max_length),
        )
        write_evaluation(trainer, trainer.evaluate())

    # ---------------------------------------------------------------- answers
    if prompts:
        prompts = [with_system_message(prompt, recipe.system_message) for prompt in prompts]
        answer_prompts(model, tokenizer, prompts, recipe.max_new_tokens, args)


if __name__ == "__main__":
    main()
