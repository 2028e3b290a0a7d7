"""
Is it safer, still helpful, and by how much? Hold models against preference rows (loss, rewards and both accuracies by
pair class and role, against a reference) and let them answer sets of prompts, which judges look at.

    accelerate launch recipes/evaluate.py --config recipes/smollm2-135m/evaluation.yaml --output_dir runs/evaluation \
        --models.base path/of/the/start --models.tuned runs/my-run [--require "[over_refusal <= 0.1]"]
"""

from dataclasses import replace

from core.runtime.environment import prepare_environment
from core.runtime.errors import exits_cleanly


@exits_cleanly
def main() -> None:
    prepare_environment()  # before the first import of torch
    from core.training.session import compared_models, open_model, open_run

    # ---------------------------------------------------------------- the models, and what they are held against
    resolved = open_run("evaluate")
    recipe, args = resolved.recipe, resolved.training

    # torch, transformers and TRL take seconds to import: a misspelt key is told before.
    from core.judging.answering import judge_answers, read_sets
    from core.modeling.policy import load_policy, share_prefixes
    from core.reporting.behaviour import read_requirements
    from core.reporting.results import show_selection, write_evaluation
    from core.runtime.ranks import rank
    from core.selection.pairs import prepare_pairs
    from core.training.trainer import ShiftedMarginTrainer

    sets = read_sets(recipe)
    require = read_requirements(recipe.require, [entry for entry, _ in sets])
    models = compared_models(resolved)
    reference_path = recipe.reference_model or (next(iter(models.values())) if len(models) > 1 else None)
    entries = recipe.eval_datasets or recipe.datasets
    args.precompute_ref_log_probs = False
    pairs_of, judged, shown = {}, {}, set()

    for name, path in models.items():
        settings = replace(resolved.model, model_name_or_path=path)
        tokenizer = open_model(replace(resolved, model=settings)).tokenizer
        model = load_policy(settings, recipe.trainable_parameters, args, trains=False)

        # ------------------------------------------------------------ preference rows
        if entries and (path != reference_path or len(models) == 1):
            pairs = prepare_pairs(entries, recipe, args, tokenizer, evaluation=True)
            if rank() == 0 and not shown:
                show_selection(pairs, recipe.margin, args.beta, "evaluation")
            shown.add(name)
            reference = None
            if reference_path:
                reference = load_policy(settings, recipe.trainable_parameters, args, reference_path, trains=False)
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
            pairs_of[name] = trainer.evaluate()
            del trainer, reference

        # ------------------------------------------------------------ answers
        if sets:
            judged[name] = judge_answers(model, tokenizer, sets, recipe, args, name)
        del model
    write_evaluation(args.output_dir, models, reference_path, pairs_of, [entry for entry, _ in sets], judged, require)


if __name__ == "__main__":
    main()
