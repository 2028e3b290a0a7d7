"""Runs that cannot work stop with their cause, and runs that can are left alone."""

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import Trainer, TrainingArguments

from conftest import build_model
from core.modeling.dropout import draws_dropout
from core.runtime.errors import RecipeError
from core.training.tripwires import Movement, Tripwires, check_first_loss


class GuardedTrainer(Tripwires, Trainer):
    """Trainer with one column more: the row's number, which the model does not take."""

    poisoned: int | None = None  # the row whose loss is NaN

    def compute_loss(self, model, inputs, *args, **kwargs):
        rows = inputs.pop("row")
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        return loss * float("nan") if self.poisoned in rows.tolist() else loss


def guarded(tmp_path, model: nn.Module, kind: type = GuardedTrainer, **arguments) -> GuardedTrainer:
    arguments = {"max_steps": 4, "learning_rate": 1e-3, "gradient_accumulation_steps": 2} | arguments
    args = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=2,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
        logging_nan_inf_filter=False,
        **arguments,
    )
    rows = torch.randint(3, 320, (16, 8), generator=torch.Generator().manual_seed(0)).tolist()
    data = Dataset.from_dict({"input_ids": rows, "labels": rows, "row": list(range(16))})
    trainer = kind(model, args, train_dataset=data)
    trainer.train_dataset = data.add_column("row_id", [f"pku:{index}" for index in range(16)])
    # The collator takes numbers only; the names stay in the dataset, for the messages.
    trainer.get_train_dataloader = lambda: torch.utils.data.DataLoader(
        data.with_format("torch"), batch_size=2, shuffle=False
    )
    return trainer


def test_a_sound_run_passes(tmp_path):
    trainer = guarded(tmp_path, build_model())
    trainer.train()
    assert trainer.state.global_step == 4
    assert not trainer._movement.pending, "every weight was seen to move"


def frozen(model: nn.Module) -> None:
    model.requires_grad_(False)


def head_of_zeros(model: nn.Module) -> None:
    """One weight is trained, and no logit depends on anything below the head."""
    model.requires_grad_(False)
    model.model.layers[0].mlp.down_proj.requires_grad_(True)
    model.lm_head.weight.zero_()


def norm_with_nan(model: nn.Module) -> None:
    model.model.norm.weight[3] = float("nan")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (frozen, "no parameter is trained"),
        (head_of_zeros, "step 1: the gradient is zero"),
        (norm_with_nan, "step 1: the loss is NaN"),
    ],
)
def test_a_model_that_cannot_learn_stops_before_an_update(spoil, message, tmp_path):
    model = build_model()
    with torch.no_grad():
        spoil(model)
    with pytest.raises(RecipeError, match=message):
        guarded(tmp_path, model).train()


class Kink(GuardedTrainer):
    """sqrt(x − x) is 0 and its slope is infinite: the loss looks well."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        return loss + (model.lm_head.weight[3, 3] * 0).sqrt()


class Poisoned(GuardedTrainer):
    """Rows 0–3 are update 1, rows 4–7 update 2; row 6 is in the second update's second micro-batch, with row 7."""

    poisoned = 6


class Forgetful(GuardedTrainer):
    """Its optimizer does not hold a weight that is trained."""

    def create_optimizer(self, *args):
        held = [weight for weight in self.model.parameters() if weight is not self.model.lm_head.weight]
        self.optimizer = torch.optim.AdamW(held, lr=1e-3)
        return self.optimizer


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Kink, "step 1: the gradient is NaN or infinite; rows in the batch: pku:0, pku:1"),
        (Poisoned, "step 2: the loss is NaN or infinite; rows in the batch: pku:6, pku:7;"),
        (Forgetful, r"1 of \d+ trained weights have not moved in 2 updates.*: lm_head.weight"),
    ],
)
def test_a_run_that_goes_wrong_names_what_does(kind, message, tmp_path):
    with pytest.raises(RecipeError, match=message):
        guarded(tmp_path, build_model(), kind).train()


def test_warm_up_counts_from_its_first_update(tmp_path):
    """The first update of a warm-up has learning rate 0: nothing moves, and nothing is wrong."""
    trainer = guarded(tmp_path, build_model(), warmup_steps=3)
    trainer.train()
    assert trainer._movement.moving_updates == 3
    assert not trainer._movement.pending


@pytest.mark.parametrize(
    ("dtype", "rate", "due"),
    [
        (torch.float32, 1e-6, True),  # 1.0 + 1e-6 is another float32: eps is 1.2e-7
        (torch.float32, 5e-8, False),  # 1.0 + 5e-8 rounds to 1.0
        (torch.bfloat16, 5e-7, True),  # lost in bfloat16, whose eps is 7.8e-3: no excuse
        (torch.bfloat16, 5e-8, False),  # not even float32 shows it
    ],
)
def test_a_weight_is_due_to_move_when_float32_can_show_it(dtype, rate, due):
    norm = nn.Parameter(torch.ones(64, dtype=dtype))
    movement = Movement({"norm": norm})
    movement.note(rate, True)
    movement.check()  # one update is not two
    movement.note(rate, True)
    if due:
        with pytest.raises(RecipeError, match="1 of 1 trained weights have not moved in 2 updates"):
            movement.check()
    else:
        movement.check()
        assert list(movement.pending) == ["norm"], "still watched"
    with torch.no_grad():
        norm[7] += 0.5
    movement.check()
    assert not movement.pending


@pytest.mark.parametrize(
    ("link", "margin", "at_zero"),
    [
        # softplus(0.5) = ln(1 + e^0.5) = 0.974077; (0.5/0.1)² = 25; ln 2 = 0.693147
        ({"link": "logistic", "beta": 0.1}, 0.5, 0.974077),
        ({"link": "squared", "beta": 0.1}, 0.5, 25.0),
        ({"link": "soft", "beta": 0.1}, 0.5, 0.693147),
    ],
)
def test_first_loss_of_a_wrong_reference(link, margin, at_zero):
    margins, tokens = torch.full((2,), margin), torch.tensor([100.0, 144.0])
    losses = torch.tensor([3.0, 5.0])
    # 0.05 nats over 10 and 12 roots of tokens are 0.0046 a root: float noise of float32.
    check_first_loss(losses, margins, torch.tensor([0.05, -0.05]), tokens, link, torch.float32)
    # 0.5 nats are 0.046 a root: not float32's noise, but bfloat16's.
    check_first_loss(losses, margins, torch.tensor([0.5, -0.5]), tokens, link, torch.bfloat16)
    with pytest.raises(RecipeError, match=f"the loss is 4 instead of {at_zero:.6g}, the {link['link']} link's value"):
        check_first_loss(losses, margins, torch.tensor([0.5, -0.5]), tokens, link, torch.float32)
    # A NaN is left to the check that names its rows.
    check_first_loss(losses, margins, torch.tensor([float("nan"), 0.0]), tokens, link, torch.float32)


def test_dropout_is_seen_wherever_it_is():
    """Mistral's attention draws it by a setting; LoRA by a module of its own, of which 0 is none."""
    assert not draws_dropout(build_model())
    assert draws_dropout(build_model(attention_dropout=0.1))
    assert draws_dropout(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1)))
    assert not draws_dropout(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.0)))
