"""
Which script a recipe is for: sft.py, dpo.py or evaluate.py. `python recipes/core/runtime/stage.py my.yaml` prints
the name of it.

The keys tell: some are of one stage alone, and every recipe here has one of them. For a recipe that has none, the
words of its file name do: `sft`, and not `dpo`.
"""

import re
import sys
from pathlib import Path

SFT_KEYS = "conversations_per_update", "packing", "assistant_only_loss", "completion_only_loss"
DPO_KEYS = "pairs_per_update", "margin", "selection", "beta", "reference_cache", "prefix_sharing"
EVALUATE_KEYS = "prompt_sets", "models", "judges"


def stage_of(recipe: str | Path) -> str:
    """`sft`, `dpo` or `evaluate`; a recipe that cannot be read is dpo's, whose script says what is wrong with it."""
    try:
        keys = set(re.findall(r"^(\w+):", Path(recipe).read_text(encoding="utf-8"), re.MULTILINE))
    except (OSError, UnicodeDecodeError):
        keys = set()
    if keys & {*EVALUATE_KEYS}:
        return "evaluate"
    if keys & {*SFT_KEYS, *DPO_KEYS}:
        return "dpo" if keys & {*DPO_KEYS} else "sft"
    words = re.split(r"[^a-z]+", Path(recipe).stem.lower())
    return "sft" if "sft" in words and "dpo" not in words else "dpo"


if __name__ == "__main__":
    print(stage_of(sys.argv[1]))
