"""TRL's DPOTrainer with the shifted reward margin: one loss override, and the metrics that belong to it."""

from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from torch.utils.data import Sampler
from transformers import PreTrainedModel, ProgressCallback
from trl import DPOConfig, DPOTrainer, SFTTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import add_fused_lm_head

from core.config.schema import Replay
from core.data.tokens import token_lengths
from core.modeling.dropout import draws_dropout
from core.modeling.padding_free import PaddingFreeCollator, model_inputs
from core.modeling.precision import Precision, hold
from core.modeling.prefix import (
    HEAD_OUTPUTS,
    PairOutputs,
    causal_lm_of,
    collator_for,
    enable_prefix_sharing,
    pair_logps,
)
from core.modeling.reference import as_reference, reference_logps
from core.modeling.reference_cache import ReferenceCache
from core.objective.losses import shifted_margin_loss, target_sign
from core.objective.margins import link_settings
from core.objective.presets import Margin
from core.selection.replay import EpochCallback, ReplaySampler
from core.training.checkpoints import CompleteCheckpoints
from core.training.metrics import PAIR_STATS, TOKEN_STATS, PairMetrics
from core.training.records import LogLine, MetricsFile
from core.training.saving import SavesFinal
from core.training.throughput import Throughput
from core.training.tripwires import Tripwires, check_first_loss

# What a row brings into a micro-batch.
BATCH_COLUMNS = [
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


TRL_REFERENCE = "ref"  # TRL's copy of an adapter that training goes on with


class Recorded(Tripwires, CompleteCheckpoints, SavesFinal):
    """
    What both stages add to TRL's trainers: tripwires, complete checkpoints, the final model, metrics.jsonl and a short
    log line.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.deepspeed_plugin is None:
            # What PEFT has added and copied; what else is trained is so already (`load_policy`).
            hold(self.model, Precision(torch.float32, torch.float32), frozen=False)
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
        self.link = link_settings(margin, args.beta)
        self.replay = replay
        self.reference_cache = reference_cache
        # Of each pair of the latest evaluation: log π(y_w) − log π(y_l) of the reference, of the policy, and m. One
        # tensor of shape (B, 3) for each micro-batch.
        self.evaluated: list[torch.Tensor] = []
        collator = collator_for(model, prefix_sharing, processing_class.pad_token_id)
        if prefix_sharing:
            for network in (model, kwargs.get("ref_model")):
                if network is not None:
                    enable_prefix_sharing(network)
        # Without a reference there is nothing to load: the precomputed columns are then zeros.
        args.precompute_ref_log_probs |= margin.reference_free
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
            add_fused_lm_head(causal_lm_of(self.accelerator.unwrap_model(self.ref_model)), outputs=HEAD_OUTPUTS)
        if isinstance(self.model, PeftModel) and TRL_REFERENCE in self.model.peft_config:
            self.model.delete_adapter(TRL_REFERENCE)  # precomputed, or none; it would be saved too
        self.throughput = Throughput(self.model)
        self.add_callback(self.throughput)
        self.pair_metrics = {mode: PairMetrics(self.accelerator.device) for mode in ("train", "eval")}

    # Rows arrive tokenised, cut and counted; TRL's own pass would cut and drop without a word.
    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = BATCH_COLUMNS

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
            own = getattr(self.model, "is_its_own_reference", False)
            assert not (own and self.state.global_step), "the reference has been trained"
            chosen, rejected = reference_logps(
                self.model,
                self.accelerator,
                dataset,
                self.reference_cache,
                self.data_collator,
                batch_size=batch_size,
                description=f"Reference log-probabilities ({name})",
            )
        dataset = dataset.add_column("ref_chosen_logps", chosen)
        return dataset.add_column("ref_rejected_logps", rejected)

    def _reference_of(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Precomputed, or of a live reference: a model of its own, or the base under the policy's adapter."""
        if "ref_chosen_logps" in batch:
            return batch["ref_chosen_logps"], batch["ref_rejected_logps"]
        with disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            # The reference's own autocast is lost where its head has been replaced after it was prepared.
            with as_reference(self.model), self.accelerator.autocast():
                outputs = pair_logps(self.ref_model or self.model, batch, statistics=False)
        return outputs.chosen_logps, outputs.rejected_logps

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], return_outputs: bool) -> Any:
        assert not return_outputs, "rewards are logged, not returned: no compute_metrics is passed"
        policy = pair_logps(model, inputs, router_loss=self.aux_loss_enabled)
        ref_chosen_logps, ref_rejected_logps = self._reference_of(inputs)
        chosen_logratios = policy.chosen_logps - ref_chosen_logps
        rejected_logratios = policy.rejected_logps - ref_rejected_logps
        summed_delta = chosen_logratios - rejected_logratios
        if self.margin.length_normalized:
            chosen_logratios = chosen_logratios / policy.chosen_tokens
            rejected_logratios = rejected_logratios / policy.rejected_tokens
        losses = shifted_margin_loss(chosen_logratios - rejected_logratios, inputs["margin"], **self.link)

        first = self.model.training and self.state.global_step == 0
        if first and not self.margin.reference_free and not draws_dropout(self.model):
            tokens = policy.chosen_tokens + policy.rejected_tokens
            dtype = self._forward_dtype()
            check_first_loss(losses.detach(), inputs["margin"], summed_delta.detach(), tokens, self.link, dtype)
        self._record(inputs, policy, chosen_logratios, rejected_logratios, losses)
        loss = role_weighted_mean(losses, inputs["is_buffer"], self.replay.weight)
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * policy.router_loss
            mode = "train" if self.model.training else "eval"
            router_loss = self.accelerator.gather_for_metrics(policy.router_loss.detach()).mean().item()
            self._metrics[mode]["aux_loss"].append(router_loss)
        return loss

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
        of_pairs = {
            "loss": losses,
            "rewards/chosen": self.beta * chosen_logratios,
            "rewards/rejected": self.beta * rejected_logratios,
            "rewards/margins": self.beta * delta,
            "accuracy_helpful": delta > 0,
            "accuracy_target": target_sign(inputs["margin"]) * delta > 0,
            "logps/chosen": policy.chosen_logps,
            "logps/rejected": policy.rejected_logps,
        }
        stats = torch.stack([of_pairs[name] for name in PAIR_STATS], dim=1)
        tokens = torch.stack([getattr(policy, name) for name in TOKEN_STATS], dim=1)
        rows = (stats, tokens, inputs["pair_class"], inputs["is_buffer"])
        if self.model.training:
            self.pair_metrics["train"].add(*rows)
            self._count_work(inputs)
            return
        # Ranks repeat rows to fill the last batch of an evaluation; gather_for_metrics takes the repeats out.
        self.pair_metrics["eval"].add(*self.accelerator.gather_for_metrics(rows))
        gap = policy.chosen_logps - policy.rejected_logps
        gaps = torch.stack([gap - delta, gap, inputs["margin"]], dim=1)
        self.evaluated.append(self.accelerator.gather_for_metrics(gaps).cpu())

    def _count_work(self, inputs: dict[str, Any]) -> None:
        pairs, computed = len(inputs["margin"]), inputs["input_ids"].numel()
        padded = computed
        if "pair_lengths" in inputs:
            padded = 2 * pairs * max(k + max(n, m) for k, n, m in inputs["pair_lengths"])
        self.throughput.count(pairs, computed, padded)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        self.evaluated = []
        return super().evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means over pairs to a record of training, of an evaluation, or of the whole run (its summary)."""
        summary = "train_runtime" in logs  # what ends training; an evaluation may have come before it
        mode = "train" if summary or self.model.training else "eval"
        metrics = self.pair_metrics[mode]
        if not metrics.empty:
            # Of an evaluation every rank has gathered all pairs.
            report = metrics.report(self.replay.weight, self.accelerator.reduce if mode == "train" else None)
            if summary:
                # A copy: what `train` returns is the time and mean loss of the run, not the steps since the last log.
                logs = logs | report | self.throughput.report()
            else:
                loss = report.pop("loss")
                if mode == "train":
                    logs |= self.throughput.report()
                else:
                    # Trainer's own mean weighs micro-batches by their first dimension and knows no roles.
                    router = self._metrics["eval"].get("aux_loss", [0.0])
                    logs["eval_loss"] = loss + self.router_aux_loss_coef * sum(router) / len(router)
                self._metrics[mode].update({key: [value] for key, value in report.items()})
        super().log(logs, start_time)


class ConversationTrainer(Recorded, SFTTrainer):
    """
    TRL's SFTTrainer with its loss and metrics, over padded or padding-free micro-batches.

    Args:
        omits_padding: lay conversations end to end; only where `padding_free.omits_padding` says so.
    """

    def __init__(self, *args: Any, omits_padding: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if omits_padding:
            # TRL's own padding_free takes no max_length and no collator, and leaves the rest to FlashAttention.
            self.data_collator = PaddingFreeCollator(self.processing_class.pad_token_id)
            enable_prefix_sharing(self.model)

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if "rows" in inputs:
            inputs = model_inputs(inputs, summed=self.args.loss_type == "nll")
        return super().compute_loss(model, inputs, *args, **kwargs)


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
    task_mean = (losses * task).sum() / task.sum().clamp(min=1)
    buffer_mean = (losses * buffer).sum() / buffer.sum().clamp(min=1)
    return task_mean + weight * buffer_mean
