"""Runs that are killed, damaged, stopped and resumed: each ends with the weights and losses of one that was not."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers.utils import logging

from conftest import build_model
from core.runtime import environment
from core.runtime.environment import versions
from core.runtime.errors import INTERRUPTED, SAVED_ON_SIGNAL, USER_ERROR, RecipeError, exits_cleanly
from core.runtime.output_folder import recipe_digest
from core.training import stopping
from core.training.checkpoints import check_fits, checkpoint_to_resume, newest_complete
from core.training.manifest import MANIFEST, Manifest, Origin, Trained, damage, seal
from core.training.stopping import StopOnSignal
from processes import CAN_MOUNT, in_fork
from tiny_run import SAVE_EVERY, STEPS, Options, launch, outcome


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    """The folder of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("unbroken")
    assert launch(Options(str(folder))) == [0]
    return folder


def origin(world_size: int, zero_stage: int | None, batch_per_update: int) -> Origin:
    return Origin(world_size=world_size, zero_stage=zero_stage, batch_per_update=batch_per_update)


ALONE = origin(1, None, 4)


def assert_same_run(folder: Path, reference: Path) -> str | None:
    """Losses and weights bit for bit; returns the checkpoint that the run went on from."""
    checkpoint, losses, weights = outcome(folder)
    _, expected_losses, expected_weights = outcome(reference)
    assert len(losses) == STEPS
    assert losses == expected_losses
    assert weights.keys() == expected_weights.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, expected_weights[name]), name
    return checkpoint


def saved(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def test_an_unbroken_run_keeps_the_newest_and_leaves_nothing_aside(unbroken):
    assert saved(unbroken) == ["checkpoint-6", "checkpoint-8"]  # save_total_limit 2
    assert sorted(os.listdir(unbroken)) == ["checkpoint-6", "checkpoint-8", "final", "losses.json"]
    manifest = json.loads((unbroken / "checkpoint-8" / MANIFEST).read_text())
    assert manifest["step"] == 8 and manifest["world_size"] == 1 and manifest["zero_stage"] is None
    assert manifest["batch_per_update"] == 4
    assert manifest["trained"]["tensors"] == 21 and manifest["recipe"] is None
    assert manifest["rows"] is None and manifest["versions"] == versions()
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= set(
        manifest["files"]
    )
    assert damage(unbroken / "checkpoint-8") is None
    for folder in ("checkpoint-8", "final"):
        assert json.loads((unbroken / folder / "config.json").read_text())["use_cache"] is True, "it trains without"


# Where a save may be interrupted: while its folder fills, at the manifest, at the rename, and while an old one is
# removed. `occurrence` picks the save: the first leaves nothing to go on from.
KILLS = {
    "first save, first file": ("open", ".saving/checkpoint-2", 1, None),
    "second save, first file": ("open", ".saving/checkpoint-4", 1, "checkpoint-2"),
    "second save, optimizer": ("open", ".saving/checkpoint-4/optimizer.pt", 1, "checkpoint-2"),
    "second save, trainer state": ("open", ".saving/checkpoint-4/trainer_state.json", 1, "checkpoint-2"),
    "second save, manifest": ("open", "checkpoint-4/.manifest.json.", 1, "checkpoint-2"),
    "second save, seal": ("os.rename", "checkpoint-4/.manifest.json.", 1, "checkpoint-2"),
    "third save, put in place": ("os.rename", ".saving/checkpoint-6", 2, "checkpoint-4"),
    "third save, old one removed": ("shutil.rmtree", "/checkpoint-2", 1, "checkpoint-6"),
    "after the last save": ("open", "/final/", 1, "checkpoint-8"),
}


@pytest.mark.parametrize("where", KILLS)
def test_kill_during_a_save(where, unbroken, tmp_path):
    event, part, occurrence, goes_on_from = KILLS[where]
    assert launch(Options(str(tmp_path), die_at=(event, part, occurrence))) == [-9]
    assert not (tmp_path / "losses.json").exists()
    assert all(damage(tmp_path / name) is None for name in saved(tmp_path)), "what bears the name is whole"
    assert launch(Options(str(tmp_path), resume="auto")) == [0]
    checkpoint = assert_same_run(tmp_path, unbroken)
    assert checkpoint == (goes_on_from and str(tmp_path / goes_on_from))
    assert not (tmp_path / ".saving").exists()


def copy_run(unbroken: Path, folder: Path) -> Path:
    """The run's folder as a crash would have left it: two checkpoints and no end."""
    for name in saved(unbroken):
        shutil.copytree(unbroken / name, folder / name)
    return folder / "checkpoint-8"


def truncate(newest: Path) -> str:
    weights = newest / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 100)
    return r"model.safetensors has 1\d\d,\d{3} bytes instead of 1\d\d,\d{3}"


def lose_a_file(newest: Path) -> str:
    (newest / "optimizer.pt").unlink()  # transformers would go on with a fresh optimizer
    return "optimizer.pt is missing"


def empty(newest: Path) -> str:
    for path in newest.iterdir():
        path.unlink()
    return "it has no manifest.json: it was never finished"


def add_a_file(newest: Path) -> str:
    (newest / "model-00002-of-00002.safetensors").write_bytes(b"of another run")
    return "model-00002-of-00002.safetensors is not of it"


def flip_a_bit(newest: Path) -> str:
    state = newest / "optimizer.pt"
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.write_bytes(content)
    return "optimizer.pt has changed since it was saved"


def half_written(newest: Path) -> str:
    (newest / MANIFEST).unlink()
    (newest / "trainer_state.json").write_text('{"epoch": 0.8, "global_st')
    return "it has no manifest.json: it was never finished"


def another_step(newest: Path) -> str:
    shutil.copy(newest.parent / "checkpoint-6" / MANIFEST, newest / MANIFEST)
    return "its manifest.json is of step 6"


def unreadable_manifest(newest: Path) -> str:
    (newest / MANIFEST).write_text("[1]")
    return "its manifest.json is damaged, or of another version of this project"


def link_a_file(newest: Path) -> str:
    shutil.move(newest / "optimizer.pt", newest.parent / "elsewhere.pt")
    (newest / "optimizer.pt").symlink_to(newest.parent / "elsewhere.pt")
    return "optimizer.pt is a symbolic link, which is not followed"


def link_it(newest: Path) -> str:
    (newest.parent / "elsewhere").mkdir()
    newest.rename(newest.parent / "elsewhere" / newest.name)
    newest.symlink_to(newest.parent / "elsewhere" / newest.name)
    return "it is a symbolic link, which is not followed"


DAMAGES = [truncate, lose_a_file, empty, add_a_file, flip_a_bit, half_written, another_step, unreadable_manifest]
DAMAGES += [link_a_file, link_it]


@pytest.mark.parametrize("spoil", DAMAGES, ids=lambda spoil: spoil.__name__)
def test_a_damaged_checkpoint_is_stepped_over(spoil, unbroken, tmp_path, caplog):
    newest = copy_run(unbroken, tmp_path)
    fault = spoil(newest)
    assert re.fullmatch(fault, damage(newest))
    with caplog.at_level("WARNING", logger="transformers"):
        logging.enable_propagation()
        assert newest_complete(tmp_path) == str(tmp_path / "checkpoint-6")
    assert re.search(f"stepping over {re.escape(str(newest))}: {fault}", caplog.text)


def test_a_run_goes_on_over_a_damaged_checkpoint_and_replaces_it(unbroken, tmp_path):
    newest = copy_run(unbroken, tmp_path)
    flip_a_bit(newest)
    assert launch(Options(str(tmp_path), resume="auto")) == [0]
    assert assert_same_run(tmp_path, unbroken) == str(tmp_path / "checkpoint-6")
    assert damage(newest) is None


def test_a_damaged_later_checkpoint_does_not_push_out_a_whole_one(unbroken, tmp_path):
    """With one checkpoint kept and checkpoint-8 damaged, the run from 6 must not delete the 7 that it saves."""
    newest = copy_run(unbroken, tmp_path)
    flip_a_bit(newest)
    options = Options(str(tmp_path), resume="auto", arguments={"save_total_limit": 1}, signal_at=7)
    assert launch(options) == [SAVED_ON_SIGNAL]
    assert newest_complete(tmp_path) == str(tmp_path / "checkpoint-7")


def test_nothing_whole_is_an_error(unbroken, tmp_path):
    copy_run(unbroken, tmp_path)
    for name in saved(tmp_path):
        flip_a_bit(tmp_path / name)
    with pytest.raises(RecipeError, match="no checkpoint is whole.*checkpoint-8: optimizer.pt.*checkpoint-6: opt"):
        newest_complete(tmp_path)
    assert newest_complete(tmp_path / "elsewhere") is None


def test_what_resume_from_checkpoint_means(unbroken, tmp_path):
    assert checkpoint_to_resume(None, unbroken) is None
    assert checkpoint_to_resume(False, unbroken) is None
    assert checkpoint_to_resume("auto", unbroken) == str(unbroken / "checkpoint-8")
    assert checkpoint_to_resume(True, unbroken) == str(unbroken / "checkpoint-8")
    older = str(unbroken / "checkpoint-6")
    assert checkpoint_to_resume(older, tmp_path) == older
    with pytest.raises(RecipeError, match="resume_from_checkpoint: .*nowhere: it is not a folder"):
        checkpoint_to_resume(str(tmp_path / "nowhere"), tmp_path)


def test_a_checkpoint_without_its_optimizer_is_refused(unbroken, tmp_path):
    """Trainer would go on from it with a fresh optimizer and schedule, and say nothing."""
    (tmp_path / "run").mkdir()
    options = Options(str(tmp_path / "run"), steps=3, arguments={"save_only_model": True})
    assert launch(options) == [0]
    newest = tmp_path / "run" / "checkpoint-3"
    assert damage(newest) is None and not (newest / "optimizer.pt").exists()
    options.resume = "auto"
    assert launch(options) == [USER_ERROR]
    way_out = f"train on from its weights as a new run (model_name_or_path: {newest}, another output_dir)"
    without = "it was saved without its optimizer (save_only_model)"
    refused = f"no checkpoint can be gone on from (checkpoint-3: {without}; checkpoint-2: {without}); {way_out}"
    with pytest.raises(RecipeError, match=re.escape(refused)):
        checkpoint_to_resume("auto", newest.parent)
    with pytest.raises(RecipeError, match=re.escape(f"checkpoint-3: {without}; {way_out}")):
        checkpoint_to_resume(str(newest), tmp_path)
    shutil.copytree(unbroken / "checkpoint-6", tmp_path / "both" / "checkpoint-6")
    shutil.move(newest, tmp_path / "both" / "checkpoint-8")
    (tmp_path / "both" / "checkpoint-8" / MANIFEST).unlink()
    seal(tmp_path / "both" / "checkpoint-8", 8, ALONE)
    assert newest_complete(tmp_path / "both") == str(tmp_path / "both" / "checkpoint-6")


@pytest.mark.parametrize(
    ("then", "now", "message"),
    [
        ((2, 3, 8), (4, 3, 8), "split over 2 processes and this run has 4; start it with --num_processes 2"),
        ((2, 3, 8), (2, None, 8), "saved under DeepSpeed ZeRO-3; this run has no DeepSpeed"),
        ((1, None, 8), (1, 2, 8), "saved under no DeepSpeed; this run has DeepSpeed ZeRO-2"),
        ((1, None, 8), (2, None, 16), "updates of 8 rows and this run's have 16"),
        ((1, None, 8), (2, None, 8), None),
        ((2, 3, 8), (2, 3, 8), None),
    ],
)
def test_which_launch_may_go_on(then, now, message, tmp_path):
    seal(tmp_path, 5, origin(*then))
    if message is None:
        check_fits(tmp_path, origin(*now))
    else:
        with pytest.raises(RecipeError, match=re.escape(message)):
            check_fits(tmp_path, origin(*now))


def test_other_rows_are_refused_and_other_versions_told(tmp_path, caplog):
    """A trainer that was not told its rows has no digest, which is held against none."""
    unknown = Origin(world_size=1, zero_stage=None, batch_per_update=8)
    versions = {"torch": "2.9", "trl": "1.0", "peft": "0.18"}
    ours = unknown.model_copy(update={"rows": "a", "versions": versions})
    logging.enable_propagation()
    for then in (unknown, unknown.model_copy(update={"versions": versions}), ours):
        seal(tmp_path, 5, then)
        check_fits(tmp_path, ours)
    check_fits(tmp_path, unknown.model_copy(update={"versions": versions}))
    assert not caplog.records
    check_fits(tmp_path, ours.model_copy(update={"versions": {"torch": "2.10", "trl": "1.0"}}))
    assert f"other versions than {tmp_path} was saved with (torch 2.9 → 2.10, peft 0.18 → None)" in caplog.text
    assert len(caplog.records) == 1
    way_out = rf"put back .*, or train on .* \(model_name_or_path: {tmp_path}, another output_dir\)"
    with pytest.raises(RecipeError, match=f"{tmp_path} is of other training rows: .*; {way_out}"):
        check_fits(tmp_path, ours.model_copy(update={"rows": "b"}))


def test_other_trained_weights_and_another_reference_are_refused(tmp_path):
    trained = [Trained.of(build_model()), Trained.of(build_model(intermediate_size=48))]
    model = build_model()
    for name, weight in model.named_parameters():
        weight.requires_grad_("down_proj" in name)
    ours = ALONE.model_copy(update={"trained": trained[0], "reference": "v1-abc-float32"})
    seal(tmp_path, 5, ours)
    check_fits(tmp_path, ours)
    for other, here in ((trained[1], 21), (Trained.of(model), 2)):
        with pytest.raises(RecipeError, match=rf"other trained weights \(21 tensors there, {here} here"):
            check_fits(tmp_path, ours.model_copy(update={"trained": other}))
    with pytest.raises(RecipeError, match="is of another reference: the weights of model_name_or_path"):
        check_fits(tmp_path, ours.model_copy(update={"reference": "v1-abd-float32"}))


RECIPE = {
    "model_name_or_path": "base", "learning_rate": 1e-6, "beta": 0.1, "lr_scheduler_type": "cosine", "seed": 1,
    "weight_decay": 0.0, "dtype": "float32", "trainable_parameters": ["down_proj"], "pairs_per_update": 4,
    "datasets": [{"path": "https://me:hunter2hunter2@host/a.jsonl"}], "output_dir": "a", "save_steps": 2,
}  # fmt: skip


def recipe_checkpoint(folder: Path, files: dict[str, str] | None = None) -> Path:
    checkpoint = folder / "checkpoint-5"
    for name, text in ({"optimizer.pt": "x"} if files is None else files).items():
        (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
        (checkpoint / name).write_text(text)
    seal(checkpoint, 5, Origin.with_recipe(RECIPE, world_size=1, zero_stage=None, batch_per_update=4))
    return checkpoint


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_name_or_path", "other"), ("learning_rate", 0.5), ("beta", 0.2), ("lr_scheduler_type", "linear"),
        ("seed", 2), ("weight_decay", 0.1), ("dtype", "bfloat16"), ("trainable_parameters", ["up_proj"]),
        ("pairs_per_update", 8), ("datasets", [{"path": "b.jsonl"}]), ("max_steps", 9), ("beta", None),
    ],
)  # fmt: skip
def test_a_checkpoint_by_its_path_is_not_gone_on_with_by_another_recipe(key, value, tmp_path):
    checkpoint = recipe_checkpoint(tmp_path)
    ours = RECIPE | {key: value}
    shown = [] if key == "datasets" else [f"({key}: {RECIPE.get(key)!r} there, {value!r} here)"]
    with pytest.raises(RecipeError) as refused:
        checkpoint_to_resume(str(checkpoint), tmp_path / "new", ours)
    for part in [*shown, key, "is of another recipe", f"model_name_or_path: {checkpoint}, another output_dir"]:
        assert part in str(refused.value)


def test_what_does_not_change_the_run_may_change_and_is_said(tmp_path, capsys):
    checkpoint = recipe_checkpoint(tmp_path)
    assert "hunter2" not in (checkpoint / MANIFEST).read_text()
    ours = RECIPE | {"output_dir": "b", "save_steps": 3, "resume_from_checkpoint": str(checkpoint), "max_steps": None}
    assert checkpoint_to_resume(str(checkpoint), tmp_path / "new", ours) == str(checkpoint)
    said = f"going on from {checkpoint}, with output_dir: 'a' there, 'b' here; save_steps: 2 there, 3 here\n"
    assert capsys.readouterr().out == said
    assert checkpoint_to_resume("auto", tmp_path, ours) == str(checkpoint)
    with pytest.raises(RecipeError, match="beta: 0.1 there, 1 here"):
        checkpoint_to_resume("auto", tmp_path, ours | {"beta": 1})


def test_pickles_are_read_below_the_runs_own_folder_alone(tmp_path):
    checkpoint = recipe_checkpoint(tmp_path / "stranger", {"global_step5/states.pt": "x"})
    with pytest.raises(RecipeError, match=f"DeepSpeed unpickles .*output_dir: {checkpoint.parent}, resume_from_che"):
        checkpoint_to_resume(str(checkpoint), tmp_path / "new", RECIPE)
    (tmp_path / "new").symlink_to(tmp_path / "elsewhere")
    assert checkpoint_to_resume(str(checkpoint), checkpoint.parent, RECIPE) == str(checkpoint)


def test_no_flipped_bit_of_a_manifest_passes(tmp_path):
    """All of them, one by one: each is damage, in a line, and none an error of another kind."""
    checkpoint = recipe_checkpoint(tmp_path)
    whole = (checkpoint / MANIFEST).read_bytes()
    assert damage(checkpoint) is None and Manifest.read(checkpoint).recipe_digest == recipe_digest(RECIPE)
    for bit in range(8 * len(whole)):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError):
            Manifest.parse(bytes(content))
        if bit % 97 == 0:
            (checkpoint / MANIFEST).write_bytes(content)
            assert damage(checkpoint) == "its manifest.json is damaged, or of another version of this project", bit
    for size in range(len(whole)):
        with pytest.raises(ValueError):
            Manifest.parse(whole[:size])


def test_no_link_is_followed_when_a_checkpoint_is_saved(tmp_path, unbroken):
    """`.saving`, the place of the new checkpoint and an old one lead to what is somebody else's."""
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "mine").write_text("mine")
    folder = tmp_path / "run"
    folder.mkdir()
    for name in (".saving", "checkpoint-1", "checkpoint-2", "checkpoint-4"):
        (folder / name).symlink_to(precious if name != "checkpoint-4" else tmp_path / "nowhere")
    assert launch(Options(str(folder))) == [0]
    assert_same_run(folder, unbroken)
    assert os.listdir(precious) == ["mine"] and (precious / "mine").read_text() == "mine"
    assert (folder / "checkpoint-1").is_symlink(), "it is not this run's to remove"
    assert not (folder / ".saving").is_symlink() and damage(folder / "checkpoint-8") is None


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_saves_and_exits_with_its_own_code(name, unbroken, tmp_path):
    """The signal comes in step 3, which no save is due at."""
    assert launch(Options(str(tmp_path), signal_at=3, signal=signal.Signals[name])) == [SAVED_ON_SIGNAL]
    assert saved(tmp_path) == ["checkpoint-2", "checkpoint-3"]
    assert launch(Options(str(tmp_path), resume="auto")) == [0]
    assert assert_same_run(tmp_path, unbroken) == str(tmp_path / "checkpoint-3")


def test_a_second_ctrl_c_does_not_wait_for_the_save():
    def hasty():
        stop = StopOnSignal()
        stop.training = True
        os.kill(os.getpid(), signal.SIGINT)
        print("still here", flush=True)
        os.kill(os.getpid(), signal.SIGINT)

    assert in_fork(exits_cleanly(hasty)) == (INTERRUPTED, "still here\n", "")


def test_a_stopped_run_leaves_when_all_is_told(monkeypatch, capsys):
    """Slurm kills the other nodes soon after the first has left: rank 0's line and its wandb run come before."""
    order = []

    def record(name: str, code: int | None = None) -> None:
        order.append((name, code, capsys.readouterr().out[:28]))

    run = SimpleNamespace(finish=lambda exit_code: record("finish", exit_code))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(run=run))
    monkeypatch.setattr(stopping.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(stopping.dist, "barrier", lambda: record("barrier"))
    monkeypatch.setattr(stopping, "leave", lambda code: record("leave", code))
    monkeypatch.setattr(environment.signal, "signal", lambda *_: None)
    stop = StopOnSignal()
    stop.stopped = True
    stop.exit_if_stopped(3)
    assert order == [
        ("finish", SAVED_ON_SIGNAL, "stopped by a signal at step "),
        ("barrier", None, ""),
        ("leave", SAVED_ON_SIGNAL, ""),
    ]


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGINT"])
def test_a_signal_before_the_first_update_ends_the_run_with_the_code_of_a_saved_one(name, tmp_path, monkeypatch):
    """In a reference pass: what it has in hand is kept, since the exit passes through its `finally`."""
    (tmp_path / "code").touch()
    monkeypatch.setenv("LAUNCH_EXIT_CODE", str(tmp_path / "code"))

    def reference_pass():
        StopOnSignal()
        try:
            os.kill(os.getpid(), signal.Signals[name])
            time.sleep(5)
        finally:
            (tmp_path / "flushed").touch()

    code, output, _ = in_fork(exits_cleanly(reference_pass))
    assert code == SAVED_ON_SIGNAL and (tmp_path / "flushed").exists()
    assert output == f"stopped by {name} before the first update; start again as before\n"
    assert (tmp_path / "code").read_text() == "75", "what launch.sh ends with"


@pytest.mark.parametrize("early", [True, False], ids=["in the last save", "after it"])
@pytest.mark.parametrize(
    ("saved", "only_model", "code"), [(8, False, 75), (6, False, 0), (8, True, 0), (None, False, 75)]
)
def test_a_signal_after_the_last_update_ends_the_run_if_it_can_go_on_from_there(early, saved, only_model, code):
    """The run is one of 8 updates; saved None: it goes on from checkpoint-8. If it can't go on, it finishes."""

    def end_of_a_run():
        stop = StopOnSignal()
        stop.on_train_begin(None, SimpleNamespace(global_step=0 if saved else 8), None)
        if saved:
            stop.on_save(SimpleNamespace(save_only_model=only_model), SimpleNamespace(global_step=saved), None)
        if early:
            os.kill(os.getpid(), signal.SIGTERM)
        stop.exit_if_stopped(8)
        os.kill(os.getpid(), signal.SIGTERM)

    line = "stopped by SIGTERM after the last update, which is saved; start again with resume_from_checkpoint: auto\n"
    assert in_fork(exits_cleanly(end_of_a_run)) == (code, line if code else "", "")


def test_a_forked_worker_ends_by_its_pools_signal_alone():
    """datasets ends its workers by SIGTERM; they inherit the handler, and must not speak for the run."""

    def pool():
        StopOnSignal()
        ready, started = os.pipe()
        worker = os.fork()
        if worker == 0:
            os.write(started, b"1")  # Python forgets signals that come while it forks
            time.sleep(30)
            os._exit(0)
        os.read(ready, 1)
        os.kill(worker, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) == -signal.SIGTERM

    assert in_fork(exits_cleanly(pool)) == (0, "", "")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl"),
        RuntimeError("I/O error: No space left on device (os error 28)"),  # safetensors
        RuntimeError("[enforce fail at inline_container.cc] . unexpected pos 1249856 vs 1249744"),  # torch
    ],
)
def test_a_full_disk_is_one_line_wherever_it_shows(error):
    def write():
        raise error

    code, _, output = in_fork(exits_cleanly(write))
    assert code == USER_ERROR
    assert re.fullmatch(r"error: a disk of \S+ is full \(.*\); make room and go on by resume.*\n", output)


@pytest.mark.slow
@pytest.mark.skipif(not CAN_MOUNT, reason="needs the right to mount a small disk")
def test_a_full_disk_keeps_the_last_good_checkpoint(unbroken, tmp_path):
    """
    A disk of 1.2 MB holds two checkpoints of about 0.5 MB, not the third, which is written before the first is
    removed. The run says so, exits with a user's error and leaves the two intact.
    """
    size = sum(path.stat().st_size for path in (unbroken / "checkpoint-8").iterdir())
    script = f"""
mount -t tmpfs -o size={int(2.4 * size) // 1024}k none {tmp_path}
{sys.executable} - <<'END'
import sys
sys.path[:0] = {sys.path!r}
import os
os.environ["ACCELERATE_USE_CPU"] = "true"
from processes import CAN_MOUNT, in_fork
from conftest import build_model
from tiny_run import Options, run
run(Options({str(tmp_path)!r}))
END
echo exit $?; ls {tmp_path}
{sys.executable} - <<'END'
import sys
sys.path[:0] = {sys.path!r}
from core.training.checkpoints import damage
from pathlib import Path
print("damage", [damage(path) for path in sorted(Path({str(tmp_path)!r}).glob("checkpoint-*"))])
END
"""
    done = subprocess.run(["unshare", "-m", "sh", "-c", script], capture_output=True, text=True)
    assert f"exit {USER_ERROR}" in done.stdout, done.stderr
    message = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(message) == 1 and "is full, so the checkpoint of step 6 was not saved" in message[0]
    assert "resume_from_checkpoint: auto" in message[0] and "Traceback" not in done.stderr
    assert "damage [None, None]" in done.stdout and ".saving" not in done.stdout


# ------------------------------------------------------------------------------------------ several processes


@pytest.fixture(scope="module")
def unbroken_on_two(tmp_path_factory) -> dict[int | None, Path]:
    """Unbroken runs on two processes: DDP and ZeRO-3."""
    folders = {}
    for stage in (None, 3):
        folders[stage] = tmp_path_factory.mktemp(f"unbroken-zero-{stage}")
        assert launch(Options(str(folders[stage]), processes=2, zero_stage=stage, accumulation=1)) == [0, 0]
    return folders


@pytest.mark.slow
@pytest.mark.parametrize("stage", [None, 3])
@pytest.mark.parametrize("kill", [("open", ".saving/checkpoint-6", 1), ("os.rename", ".manifest.json.", 3)])
def test_two_processes_go_on_bit_for_bit(stage, kill, unbroken_on_two, tmp_path):
    options = {"processes": 2, "zero_stage": stage, "accumulation": 1}
    exits = launch(Options(str(tmp_path), **options, die_at=kill))
    assert exits[0] == -9 and exits[1] != 0
    assert saved(tmp_path) == ["checkpoint-2", "checkpoint-4"]
    assert launch(Options(str(tmp_path), **options, resume="auto")) == [0, 0]
    assert assert_same_run(tmp_path, unbroken_on_two[stage]) == str(tmp_path / "checkpoint-4")


@pytest.mark.slow
def test_sigterm_on_one_rank_stops_both(unbroken_on_two, tmp_path):
    options = {"processes": 2, "zero_stage": 3, "accumulation": 1}
    exits = launch(Options(str(tmp_path), **options, signal_at=5, signal_rank=1))
    assert exits == [SAVED_ON_SIGNAL, SAVED_ON_SIGNAL]
    assert saved(tmp_path)[-1] == "checkpoint-5"
    assert launch(Options(str(tmp_path), **options, resume="auto")) == [0, 0]
    assert_same_run(tmp_path, unbroken_on_two[3])


@pytest.mark.slow
def test_another_number_of_processes(unbroken_on_two, tmp_path):
    """
    DDP on two processes, gone on with by one that accumulates twice: without dropout the losses are the same to float
    rounding (1e-5). ZeRO-3 refuses, with the way out.
    """
    still = {"max_grad_norm": 1.0}
    two = Options(str(tmp_path), processes=2, accumulation=1, dropout=0.0, arguments=still)
    assert launch(two) == [0, 0]
    _, expected, weights = outcome(tmp_path)
    shutil.rmtree(tmp_path / "checkpoint-8")
    (tmp_path / "losses.json").unlink()
    assert launch(Options(str(tmp_path), dropout=0.0, accumulation=2, resume="auto", arguments=still)) == [0]
    checkpoint, losses, resumed = outcome(tmp_path)
    assert checkpoint == str(tmp_path / "checkpoint-6")
    assert losses == pytest.approx(expected, abs=1e-5)
    for name, weight in resumed.items():
        torch.testing.assert_close(weight, weights[name], atol=1e-5, rtol=0)
    other = tmp_path / "zero"
    shutil.copytree(unbroken_on_two[3], other)
    assert launch(Options(str(other), zero_stage=3, resume="auto")) == [USER_ERROR]


def test_the_run_saves_in_the_middle(unbroken):
    assert STEPS % SAVE_EVERY == 0 and STEPS // SAVE_EVERY >= 3, "the tests above count on several saves"
