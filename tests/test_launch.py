"""The launch configurations are what the pinned accelerate accepts; the launchers derive the settings of each node."""

from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))


def launch_arguments(config: Path):
    """What `accelerate launch --config_file config recipes/dpo.py` resolves to."""
    parser = launch_command_parser()
    return _validate_launch_command(parser.parse_args(["--config_file", str(config), "recipes/dpo.py"]))[0]


def test_every_configuration_is_there():
    names = {config.stem for config in CONFIGS}
    assert names == {"cpu", "gpu", "ddp", "zero2", "zero3", "zero3-offload", "zero3-nodes", "zero3-cpu"}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.stem)
def test_accelerate_accepts_every_key(config):
    """
    accelerate refuses unknown keys at the top level; inside `deepspeed_config` it takes anything, so these are held
    against the launcher's own arguments.
    """
    loaded = load_config_from_file(str(config))
    known = vars(launch_command_parser().parse_args(["x.py"]))
    assert set(loaded.deepspeed_config) <= set(known)
    assert config.read_text().startswith("# ")


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.stem)
def test_the_launcher_arrives_at_what_the_file_says(config):
    said = yaml.safe_load(config.read_text())
    arguments = launch_arguments(config)
    assert arguments.num_processes == said["num_processes"]
    assert arguments.num_machines == said["num_machines"]
    assert bool(arguments.use_deepspeed) == (said["distributed_type"] == "DEEPSPEED")
    assert bool(arguments.multi_gpu) == (said["distributed_type"] == "MULTI_GPU")
    for key, value in said.get("deepspeed_config", {}).items():
        assert str(getattr(arguments, key)).lower() == str(value).lower(), key
