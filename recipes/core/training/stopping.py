"""The end of a run by a signal: the update is finished and saved, and the exit code says so."""

import signal
import sys
from typing import NoReturn

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from core.runtime.environment import answer_signals
from core.runtime.errors import INTERRUPTED, SAVED_ON_SIGNAL, leave
from core.runtime.ranks import rank


class StopOnSignal(TrainerCallback):
    """
    SIGTERM or SIGUSR1 (preemption, Slurm's signal before the end) or Ctrl-C on any rank: all of them finish the
    update, save, and stop. After `train`, `exit_if_stopped` ends the process with `SAVED_ON_SIGNAL`; before the first
    update there is nothing to save, and the process ends with it at once (what a reference pass has computed is kept).
    So it does after the last one, if that is saved: a resumed run does the rest again. A second Ctrl-C does not wait.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self.when = "before the first update; start again as before"
        self.saved = 0  # the step of the newest checkpoint that a run can go on from
        self.training = self.stopped = False
        answer_signals(self._note)

    def _note(self, name: str) -> None:
        if name == self.received == signal.SIGINT.name:
            leave(INTERRUPTED)
        self.received = name
        if not self.training:
            self._end()

    def _end(self) -> NoReturn:
        print(f"stopped by {self.received} {self.when}", flush=True)
        raise SystemExit(SAVED_ON_SIGNAL)

    def on_train_begin(self, args, state, control, **kwargs):
        self.training = True
        self.saved = state.global_step  # of a run that goes on

    def on_save(self, args, state, control, **kwargs):
        self.saved = 0 if args.save_only_model else state.global_step

    def on_step_end(self, args, state, control, **kwargs):
        stop = self.received is not None
        if dist.is_initialized():
            flag = torch.tensor(int(stop), device=args.device)
            dist.all_reduce(flag, dist.ReduceOp.MAX)
            stop = bool(flag)
        if stop:
            self.stopped = control.should_save = control.should_training_stop = True

    def exit_if_stopped(self, step: int) -> None:
        """End the process if a signal stopped the training at `step`, which is saved; call it after `train`."""
        if not self.stopped:
            if self.saved == step:
                self.when = "after the last update, which is saved; start again with resume_from_checkpoint: auto"
                self.training = False
                if self.received is not None:  # since the end of the last update
                    self._end()
            return
        if rank() == 0:
            print(
                f"stopped by a signal at step {step}, which is saved; start again with resume_from_checkpoint: auto",
                flush=True,
            )
        if run := getattr(sys.modules.get("wandb"), "run", None):
            run.finish(exit_code=SAVED_ON_SIGNAL)
        if dist.is_initialized():
            # Rank 0 may still be putting the checkpoint in place, or wandb be sending: a node that has ended has
            # Slurm kill the others.
            dist.barrier()
        leave(SAVED_ON_SIGNAL)
