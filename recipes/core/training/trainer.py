"""TRL's DPOTrainer with the shifted reward margin: one loss override, and the metrics that belong to it."""

import contextlib
import copy
import gc
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from torch.utils.data import Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProgressCallback
from transformers.trainer_utils import IntervalStrategy
from trl import DPOConfig, DPOTrainer, SFTTrainer
from trl.models.utils import disable_gradient_checkpointing, prepare_deepspeed
from trl.trainer.utils import add_fused_lm_head, use_adapter

from core.config.parsing import Run
from core.config.schema import Replay
from core.data.tokens import token_lengths
from core.modeling.policy import load_model, open_cache, share_prefixes
from core.modeling.prefix import (
    HEAD_OUTPUTS,
    PaddedCollator,
    PairOutputs,
    PrefixSharedCollator,
    enable_prefix_sharing,
    pair_logps,
)
from core.modeling.reference import ReferenceCache, reference_logps
from core.objective.losses import shifted_margin_loss, target_sign
from core.objective.margins import link_settings
from core.objective.presets import Margin
from core.selection.replay import EpochCallback, ReplaySampler
from core.training.checkpoints import CompleteCheckpoints
from core.training.metrics import PairMetrics
from core.training.records import LogLine, MetricsFile
from core.training.throughput import Throughput
from core.training.tripwires import Tripwires, check_first_loss, draws_dropout

TRAINING_COLUMNS = [
    "row",
    "prompt_ids",
    "chosen_ids",
    "rejected_ids",
    "margin",
    "pair_class",
    "is_buffer",
    "ref_chosen_logps",
    "ref_rejected_logps",
]


class Recorded(Tripwires, CompleteCheckpoints):
    """What both stages add to TRL's trainers: tripwires, complete checkpoints, metrics.jsonl and a short log line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(MetricsFile())
        if not self.args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(LogLine())


class ShiftedMarginTrainer(Recorded, DPOTrainer):
    """
    DPO with a margin per row (`losses.shifted_margin_loss`), over prefix-shared or padded micro-batches.

    Rewards and reward margins are reported without the shift: β·(log π − log π_ref). Two accuracies are kept
    apart: `accuracy_helpful` = mean[Δ > 0] and `accuracy_target` = mean[sign(m)·Δ > 0].

    Args:
        model: the policy, with its trainable parameters already chosen.
        args: TRL's settings; `precompute_ref_log_probs` chooses between the cached and the live reference pass.
        train_dataset, eval_dataset: rows as `tokens.tokenize_rows` makes them, with the columns `row`, `margin`,
            `pair_class` and `is_buffer`.
        margin: link and switches of the loss.
        replay: proportion of task and buffer rows in a micro-batch, and λ.
        prefix_sharing: compute each pair's prompt once; only where `prefix.unsupported_reason` is None.
        reference_cache: where reference log-probabilities are kept.
    """

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        args: DPOConfig,
        train_dataset: Dataset,
        margin: Margin,
        replay: Replay,
        prefix_sharing: bool,
        reference_cache: ReferenceCache | None = None,
        processing_class: Any,
        **kwargs: Any,
    ) -> None:
        self.margin = margin
        self.replay = replay
        self.reference_cache = reference_cache
        self.prefix_sharing = prefix_sharing
        self.last_rows: torch.Tensor | None = None  # row numbers of the latest micro-batch, for error messages
        self.evaluated: list[torch.Tensor] = []  # log-ratio gaps of the latest evaluation, one (B, 3) a micro-batch
        collator = PrefixSharedCollator() if prefix_sharing else PaddedCollator(processing_class.pad_token_id)
        if prefix_sharing:
            for network in (model, kwargs.get("ref_model")):
                if network is not None:
                    enable_prefix_sharing(network)
        # Without a reference there is nothing to load: the precomputed columns are then zeros.
        precompute = args.precompute_ref_log_probs
        args.precompute_ref_log_probs = precompute or margin.reference_free
        # TRL digests all weights, as float32 and on every rank, for a cache of its own that is not used here.
        with patch("trl.trainer.dpo_trainer.hash_module"):
            super().__init__(
                model=model,
                args=args,
                train_dataset=train_dataset,
                processing_class=processing_class,
                data_collator=collator,
                **kwargs,
            )
        if self.ref_model is not None:
            # TRL leaves the reference's head to log-probabilities alone; one head for both is one code path.
            add_fused_lm_head(self.accelerator.unwrap_model(self.ref_model), outputs=HEAD_OUTPUTS)
        self.throughput = Throughput(self.model)
        self.add_callback(self.throughput)
        self.pair_metrics = {mode: PairMetrics(self.accelerator.device) for mode in ("train", "eval")}

    # Rows arrive tokenised, cut and counted; TRL's own pass would cut and drop without a word.
    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = TRAINING_COLUMNS

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        sampler = ReplaySampler(
            dataset.with_format("arrow")["is_buffer"].to_numpy(),
            token_lengths(dataset).sum(axis=1),
            task=self.replay.task,
            buffer=self.replay.buffer,
            batch_size=self.args.per_device_train_batch_size,
            world_size=self.accelerator.num_processes,
            accumulation=self.args.gradient_accumulation_steps,
            seed=self.args.data_seed if self.args.data_seed is not None else self.args.seed,
        )
        self.remove_callback(EpochCallback)
        self.add_callback(EpochCallback(sampler))
        return sampler

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        if self.margin.reference_free:
            chosen = rejected = np.zeros(len(dataset))
        else:
            chosen, rejected = reference_logps(
                dataset,
                self.reference_cache,
                self._reference_pass,
                batch_size=batch_size,
                padded=not self.prefix_sharing,
                accelerator=self.accelerator,
                description=f"Reference log-probabilities ({name})",
            )
            self._end_reference_engine()
        dataset = dataset.add_column("ref_chosen_logps", chosen)
        return dataset.add_column("ref_rejected_logps", rejected)

    def _reference_pass(self, examples: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Reference log-probabilities of a list of rows. Shapes: (B,) and (B,)."""
        if self._precompute_engine is None and self.ref_model is None and self.is_deepspeed_enabled:
            # The policy is not prepared yet: DeepSpeed's parameters are still on the CPU, or sharded.
            self._precompute_engine = prepare_deepspeed(self.model, self.accelerator)
        model = self._precompute_engine or self.ref_model or self.model
        columns = [{key: example[key] for key in TRAINING_COLUMNS if key in example} for example in examples]
        batch = self._prepare_inputs(self.data_collator(columns))
        with self.accelerator.autocast():
            outputs = self._reference_outputs(model, batch)
        return outputs.chosen_logps, outputs.rejected_logps

    def _end_reference_engine(self) -> None:
        """Take ZeRO-3's hooks off again: beside those of training they fail if they have seen but one forward."""
        engine, self._precompute_engine = self._precompute_engine, None
        if engine is None:
            return
        engine.empty_partition_cache()
        engine.destroy()
        for module in engine.module.modules():
            for name in ("pre_bwd_fn", "post_bwd_fn"):  # they call this engine, and the next one would keep them
                module.__dict__.pop(name, None)

    def _reference_outputs(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> PairOutputs:
        unwrapped = self.accelerator.unwrap_model(self.model)
        # With LoRA the reference is the base model under the adapter.
        adapter = use_adapter(unwrapped, None) if hasattr(unwrapped, "peft_config") else contextlib.nullcontext()
        checkpointing = disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs)
        with torch.no_grad(), checkpointing, adapter:
            return pair_logps(model, batch, statistics=False)

    def _reference_of(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        if "ref_chosen_logps" in batch:
            return batch["ref_chosen_logps"], batch["ref_rejected_logps"]
        outputs = self._reference_outputs(self.ref_model or self.model, batch)
        return outputs.chosen_logps, outputs.rejected_logps

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], return_outputs: bool) -> Any:
        assert not return_outputs, "rewards are logged, not returned: no compute_metrics is passed"
        self.last_rows = inputs["row"]
        policy = pair_logps(model, inputs)
        ref_chosen_logps, ref_rejected_logps = self._reference_of(inputs)

        chosen_logratios = policy.chosen_logps - ref_chosen_logps
        rejected_logratios = policy.rejected_logps - ref_rejected_logps
        if self.margin.length_normalized:
            chosen_logratios = chosen_logratios / policy.chosen_tokens
            rejected_logratios = rejected_logratios / policy.rejected_tokens
        delta = chosen_logratios - rejected_logratios
        losses = shifted_margin_loss(delta, inputs["margin"], **link_settings(self.margin, self.beta))

        first = self.model.training and self.state.global_step == 0
        if first and not self.margin.reference_free and not draws_dropout(self.model):
            gap = policy.chosen_logps - ref_chosen_logps - (policy.rejected_logps - ref_rejected_logps)
            tokens = policy.chosen_tokens + policy.rejected_tokens
            link = link_settings(self.margin, self.beta)
            check_first_loss(losses.detach(), inputs["margin"], gap.detach(), tokens, link, self._forward_dtype())
        self._record(inputs, policy, chosen_logratios, rejected_logratios, losses)
        return role_weighted_mean(losses, inputs["is_buffer"], self.replay.weight)

    def _forward_dtype(self) -> torch.dtype:
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}
        return half.get(self.accelerator.mixed_precision, self.model.dtype)

    @torch.no_grad()
    def _record(
        self,
        inputs: dict[str, torch.Tensor],
        policy: PairOutputs,
        chosen_logratios: torch.Tensor,
        rejected_logratios: torch.Tensor,
        losses: torch.Tensor,
    ) -> None:
        delta = chosen_logratios - rejected_logratios
        stats = torch.stack(
            [
                losses,
                self.beta * chosen_logratios,
                self.beta * rejected_logratios,
                self.beta * delta,
                delta > 0,
                target_sign(inputs["margin"]) * delta > 0,
                policy.chosen_logps,
                policy.rejected_logps,
            ],
            dim=1,
        )
        tokens = torch.stack(
            [
                policy.chosen_tokens,
                policy.rejected_tokens,
                policy.chosen_logits,
                policy.rejected_logits,
                policy.entropy,
                policy.chosen_top1,
            ],
            dim=1,
        )
        rows = (stats, tokens, inputs["pair_class"], inputs["is_buffer"])
        if self.model.training:
            self.pair_metrics["train"].add(*rows)
            computed = inputs["input_ids"].numel()
            lengths = inputs.get("pair_lengths")
            longest = lengths and max(k + max(n, m) for k, n, m in lengths)
            self.throughput.count(len(delta), computed, 2 * len(delta) * longest if lengths else computed)
            return
        # Ranks repeat rows to fill the last batch of an evaluation; gather_for_metrics takes the repeats out.
        rows = self.accelerator.gather_for_metrics(rows)
        self.pair_metrics["eval"].add(*rows)
        gap = policy.chosen_logps - policy.rejected_logps
        self.evaluated.append(
            self.accelerator.gather_for_metrics(torch.stack([gap - delta, gap, inputs["margin"]], dim=1)).cpu()
        )

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        self.evaluated = []
        return super().evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        summary = "train_runtime" in logs  # what ends training; an evaluation may have come before it
        mode = "train" if summary or self.model.training else "eval"
        metrics = self.pair_metrics[mode]
        if not metrics.empty:
            every_rank_saw_all = mode == "eval"
            report = metrics.report(
                (lambda sums: sums) if every_rank_saw_all else self.accelerator.reduce, self.replay.weight
            )
            if summary:
                logs = logs | report | self.throughput.report()  # of the steps since the last log
            else:
                loss = report.pop("loss")
                if mode == "eval":
                    # Trainer's own mean weighs micro-batches by their first dimension and knows no roles.
                    logs["eval_loss"] = loss
                else:
                    logs |= self.throughput.report()
                report = {key: [value] for key, value in report.items()}
                self._metrics[mode] = self._metrics[mode].__class__(list, report)
        super().log(logs, start_time)


class ConversationTrainer(Recorded, SFTTrainer):
    """TRL's SFTTrainer."""


def role_weighted_mean(losses: torch.Tensor, is_buffer: torch.Tensor, weight: float) -> torch.Tensor:
    """
    Mean over task rows + λ·mean over buffer rows (arXiv 2408.15313 at λ = 1 and equal counts).

    Args:
        losses: loss of each pair. Shape: (B,).
        is_buffer: whether a row is replayed. Shape: (B,), bool.
        weight: λ.

    Returns:
        A scalar.
    """
    task, buffer = (~is_buffer).to(losses.dtype), is_buffer.to(losses.dtype)
    # A micro-batch of one role alone has no mean of the other: its sum is 0 as well.
    return (losses * task).sum() / task.sum().clamp(min=1) + weight * (losses * buffer).sum() / buffer.sum().clamp(
        min=1
    )


def reference_gaps(rows: Dataset, resolved: Run, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """
    The signal `reference_gap` of a selection: log π_ref(y_w) − log π_ref(y_l) in nats.

    The pass fills the reference cache, so the run that follows computes none of these rows again.

    Args:
        rows: tokenised rows. N of them.

    Returns:
        Shape: (N,).
    """
    for name, value in {"row": 0, "margin": 0.0, "pair_class": 0, "is_buffer": False}.items():
        rows = rows.add_column(name, np.full(len(rows), value))
    args = copy.copy(resolved.training)
    args.precompute_ref_log_probs = True
    args.eval_strategy, args.load_best_model_at_end = IntervalStrategy.NO, False  # nothing is evaluated here
    model = load_model(resolved.model)
    trainer = ShiftedMarginTrainer(
        model=model,
        args=args,
        train_dataset=rows,
        margin=Margin(),
        replay=Replay(),
        prefix_sharing=share_prefixes(resolved.recipe.prefix_sharing, model, args.max_length),
        reference_cache=open_cache(resolved.recipe.reference_cache, resolved.model, args),
        processing_class=tokenizer,
    )
    scored = trainer.train_dataset
    # The run builds another trainer: no model is to stay beside its own, and DeepSpeed takes one Accelerator at once.
    del model, trainer
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    AcceleratorState._reset_state()
    return np.subtract(scored["ref_chosen_logps"], scored["ref_rejected_logps"])
