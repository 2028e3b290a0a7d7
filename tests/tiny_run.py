"""
A run of seconds for tests that must kill, damage and resume it: a Trainer with this project's checkpoints, tripwires,
signals and watch. As a script (`accelerate launch tests/tiny_run.py '{"output_dir": …}'`) it takes the `Options` as
JSON.
"""

import json
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

STEPS, SAVE_EVERY = 8, 2


@dataclass
class Options:
    """What a test asks of the run."""

    output_dir: str
    processes: int = 1
    zero_stage: int | None = None
    resume: str | None = None  # as resume_from_checkpoint in a recipe
    batch: int = 2
    accumulation: int = 2
    steps: int = STEPS
    dropout: float = 0.1  # a resume that loses the random state is seen
    arguments: dict = field(default_factory=dict)  # more TrainingArguments
    die_at: tuple[str, str, int] | None = None  # audit event, part of its first argument, which occurrence
    signal_at: int | None = None  # the step that the signal arrives in
    signal: int = signal.SIGTERM
    signal_rank: int = 0
    seconds_per_step: float = 0.0  # for tests that do something to it from outside


def launch(options: Options, timeout: float = 120.0) -> list[int]:
    """Run on `options.processes` processes; their exit codes (−9: killed)."""
    from processes import exit_codes, start_ranks

    return exit_codes(start_ranks(options.processes, options.zero_stage, _rank, options), timeout, left_alone=5)


def _rank(rank: int, options: Options) -> None:
    run(options)


def run(options: Options) -> None:
    """Train as one of the processes that the environment tells of, then leave."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from conftest import build_model
    from core.runtime.environment import spare_cpu_compile
    from core.runtime.errors import exits_cleanly
    from core.runtime.ranks import join_processes, rank
    from core.runtime.watch import Watch
    from core.training.checkpoints import CompleteCheckpoints, check_fits, checkpoint_to_resume, launched_as
    from core.training.stopping import StopOnSignal
    from core.training.tripwires import Tripwires

    torch.set_num_threads(1)

    class TinyTrainer(Tripwires, CompleteCheckpoints, Trainer):
        pass

    class Interference(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            time.sleep(options.seconds_per_step)
            if state.global_step + 1 == options.signal_at and rank() == options.signal_rank:
                os.kill(os.getpid(), options.signal)

    @exits_cleanly
    def work() -> None:
        spare_cpu_compile()
        join_processes(timeout=60)
        watch = Watch(lost_after=10)
        if options.die_at and rank() == 0:
            _die_at(*options.die_at)
        arguments = {"per_device_train_batch_size": options.batch, "gradient_accumulation_steps": options.accumulation}
        arguments |= {"max_steps": options.steps, "save_steps": SAVE_EVERY, "save_total_limit": 2, "logging_steps": 1}
        arguments |= {"learning_rate": 1e-2, "report_to": "none", "use_cpu": True, "disable_tqdm": True, "seed": 1}
        arguments |= {"bf16": False, "save_strategy": "steps"}
        args = TrainingArguments(options.output_dir, **(arguments | options.arguments))
        rows = torch.randint(3, 320, (40, 12), generator=torch.Generator().manual_seed(7)).tolist()
        data = [{"input_ids": row, "labels": row} for row in rows]
        model = build_model(attention_dropout=options.dropout)
        stop = StopOnSignal()
        trainer = TinyTrainer(model, args, train_dataset=data, callbacks=[stop, Interference()])
        checkpoint = checkpoint_to_resume(options.resume, options.output_dir)
        if checkpoint:
            check_fits(checkpoint, launched_as(trainer))
        trainer.train(resume_from_checkpoint=checkpoint)
        stop.exit_if_stopped(trainer.state.global_step)
        trainer.save_model(str(Path(options.output_dir) / "final"))
        if rank() == 0:
            losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
            (Path(options.output_dir) / "losses.json").write_text(json.dumps([checkpoint, losses]))
        watch.stop()

    work()
    sys.stdout.flush()
    os._exit(0)


def _die_at(event: str, part: str, occurrence: int) -> None:
    """kill −9 this process at the nth audit event of that name whose first argument contains `part`."""
    seen = 0

    def hook(name: str, args: tuple) -> None:
        nonlocal seen
        if name == event and part in str(args[0]):
            seen += 1
            if seen == occurrence:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def outcome(output_dir: Path) -> tuple[str | None, list[float], dict]:
    """The checkpoint that a finished run went on from, its losses and its weights."""
    from safetensors.torch import load_file

    checkpoint, losses = json.loads((output_dir / "losses.json").read_text())
    return checkpoint, losses, load_file(output_dir / "final" / "model.safetensors")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
    from core.runtime.environment import prepare_environment

    prepare_environment()
    asked = Options(**json.loads(sys.argv[1]))
    asked.resume = sys.argv[sys.argv.index("--resume_from_checkpoint") + 1] if len(sys.argv) > 2 else asked.resume
    run(asked)
