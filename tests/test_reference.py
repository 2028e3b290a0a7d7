"""The reference cache against one-by-one forwards of a tiny model; damage, kills and writers are real."""

import json
import os
import random
import re
import shutil
import signal
import time
import warnings

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset, List, Value
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from trl import DPOConfig, ModelConfig

from conftest import build_model
from core.modeling import reference
from core.modeling.policy import load_policy
from core.modeling.reference import cached_logps, reference_gaps
from core.modeling.reference_cache import ReferenceCache, open_cache, sequence_keys, weights_digest
from core.runtime.errors import RecipeError
from processes import run_ranks

FILES = "*.safetensors"


def make_rows(count: int, seed: int = 0) -> list[dict]:
    """Pairs of 1 to 12 tokens a part, every length different from row to row."""
    draw = random.Random(seed)
    part = lambda: [draw.randrange(3, 320) for _ in range(draw.randint(1, 12))]  # noqa: E731
    return [
        {"prompt_ids": part(), "chosen_ids": part(), "rejected_ids": part(), "row_id": f"made:{i}", "margin": float(i)}
        for i in range(count)
    ]


def swapped(row: dict) -> dict:
    return row | {"chosen_ids": row["rejected_ids"], "rejected_ids": row["chosen_ids"]}


class OneByOne:
    """The slow, obvious reference: one unpadded forward per answer. Keeps the ids of the rows it was asked for."""

    def __init__(self, model: torch.nn.Module | None = None):
        self.model = (model or build_model()).eval()
        self.asked: list[list[str]] = []

    def logp(self, prompt: list[int], answer: list[int]) -> float:
        with torch.no_grad():
            logits = self.model(torch.tensor([prompt + answer])).logits[0]
        steps = torch.log_softmax(logits, dim=-1)[len(prompt) - 1 : -1]
        return sum(steps[i, token].item() for i, token in enumerate(answer))

    def __call__(self, examples: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
        self.asked.append([example["row_id"] for example in examples])
        sides = (
            [self.logp(row["prompt_ids"], row[side]) for row in examples] for side in ("chosen_ids", "rejected_ids")
        )
        return tuple(torch.tensor(side) for side in sides)

    def rows(self) -> list[str]:
        return sorted(row for asked in self.asked for row in asked)


def run(rows: list[dict] | Dataset, cache: ReferenceCache, compute, batch_size: int = 4, **options) -> np.ndarray:
    """Chosen and rejected log-probabilities, shape (rows, 2)."""
    rows = rows if isinstance(rows, Dataset) else Dataset.from_list(rows)
    accelerator = options.pop("accelerator", None) or Accelerator(cpu=True)
    return np.stack(cached_logps(rows, cache, compute, accelerator, batch_size, **options), axis=1)


def expected(rows: list[dict]) -> np.ndarray:
    slow = OneByOne()
    return np.array(
        [[slow.logp(row["prompt_ids"], row[side]) for side in ("chosen_ids", "rejected_ids")] for row in rows]
    )


@pytest.fixture
def cache(tmp_path) -> ReferenceCache:
    return ReferenceCache(tmp_path / "cache", "weights-float32")


# ---------------------------------------------------------------------------------------------------- hit and miss


def test_values_stand_by_their_rows(cache):
    rows = make_rows(23)
    compute = OneByOne()
    np.testing.assert_allclose(run(rows, cache, compute), expected(rows), rtol=1e-6)
    assert compute.rows() == sorted(row["row_id"] for row in rows)


def test_a_cached_sweep_makes_no_forward(cache):
    """Other margins, another order, relabelled pairs, integers of another width, a view of the rows: all are hits."""
    rows = make_rows(12)
    first = run(rows, cache, OneByOne())
    compute = OneByOne()
    narrow = Dataset.from_list(rows).cast_column("chosen_ids", List(Value("int32")))
    for again, expected_logps in [
        ([row | {"margin": -1.0} for row in rows], first),
        (rows[::-2], first[::-2]),
        ([swapped(row) for row in rows], first[:, ::-1]),
        (narrow, first),
        (Dataset.from_list(rows).select([7, 2, 2]), first[[7, 2, 2]]),
    ]:
        assert (run(again, cache, compute) == expected_logps).all()
    assert compute.asked == []


def test_a_changed_row_computes_one_row(cache):
    rows = make_rows(12)
    run(rows, cache, OneByOne())
    rows[5] = rows[5] | {"rejected_ids": rows[5]["rejected_ids"] + [7]}
    compute = OneByOne()
    np.testing.assert_allclose(run(rows, cache, compute), expected(rows), rtol=1e-6)
    assert compute.asked == [["made:5"]]


def test_a_sequence_is_computed_once_however_often_it_appears(cache):
    """The second row is the first relabelled; the third shares a chosen answer with it and brings one of its own."""
    row, other = make_rows(2)
    rows = [
        row,
        swapped(row) | {"row_id": "swapped"},
        row | {"rejected_ids": other["rejected_ids"], "row_id": "third"},
        row | {"row_id": "again"},
    ]
    compute = OneByOne()
    np.testing.assert_allclose(run(rows, cache, compute), expected(rows), rtol=1e-6)
    assert compute.rows() == ["made:0", "third"]


def test_keys_see_the_boundary_of_prompt_and_answer():
    rows = [
        {"prompt_ids": [5, 6], "chosen_ids": [7, 8], "rejected_ids": [7]},
        {"prompt_ids": [5], "chosen_ids": [6, 7, 8], "rejected_ids": [6, 7]},
        {"prompt_ids": [5, 6], "chosen_ids": [7, 8], "rejected_ids": [7, 8]},
    ]
    keys, lengths = sequence_keys(Dataset.from_list(rows))
    assert lengths.tolist() == [[2, 2, 1], [1, 3, 2], [2, 2, 2]]
    assert len({key for pair in keys for key in pair}) == 4  # of six sequences, [5, 6 | 7, 8] comes three times
    assert keys[0][0] == keys[2][0] == keys[2][1]


@pytest.mark.parametrize(
    ("lengths", "batch_size", "padded", "expected_batches"),
    [
        # Pairs of 4, 9, 3, 8, 3 and 4 tokens: the budget is 9 + 8, and 4 + 4 + 3 + 3 are less.
        ([(2, 1, 1), (7, 1, 1), (1, 1, 1), (6, 1, 1), (1, 1, 1), (2, 1, 1)], 2, False, [[1, 3], [0, 5, 2, 4]]),
        ([(3, 1, 1)] * 3, 1, False, [[0], [1], [2]]),
        # The longer answers' rows have 2 + 9 = 11, 8 + 1, 4 + 1, 1 + 3 and 2 tokens: the budget is 2 pairs of 11. A
        # third one of 5 would be padded to 11, but three pairs padded to 5 fit.
        ([(1, 1, 1), (2, 9, 1), (4, 1, 1), (8, 1, 1), (1, 3, 3)], 2, True, [[1, 3], [2, 4, 0]]),
        ([], 2, True, []),
    ],
)
def test_micro_batches_are_longest_first_under_the_token_budget(lengths, batch_size, padded, expected_batches):
    lengths = np.array(lengths, dtype=np.int64).reshape(-1, 3)
    found = reference._micro_batches(np.arange(len(lengths)), lengths, batch_size, padded)
    assert [batch.tolist() for batch in found] == expected_batches


def test_no_random_number_is_drawn(cache):
    torch.manual_seed(3)
    random.seed(3)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    run(make_rows(9), cache, lambda examples: (torch.ones(len(examples)), torch.ones(len(examples))))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), np.random.get_state()[1].tolist())


def test_a_value_that_is_not_finite_is_refused_and_not_kept(cache):
    rows = make_rows(5)

    def compute(examples):
        chosen = torch.tensor([float("nan") if row["row_id"] == "made:3" else -1.0 for row in examples])
        return chosen, -2 * torch.ones(len(examples))

    with pytest.raises(
        RecipeError, match=r"gives 1 of 5 rows no finite log-probability, the first is row 3 \(made:3\)"
    ):
        run(rows, cache, compute)
    again = OneByOne()
    run(rows, cache, again)
    assert again.rows() == ["made:3"]


# ---------------------------------------------------------------------------------------------------- the disk


def test_a_damaged_shard_is_computed_again(cache):
    rows = make_rows(12)
    run(rows[:6], cache, OneByOne())
    (damaged,) = cache.folder.glob(FILES)
    run(rows[6:], cache, OneByOne())
    content = bytearray(damaged.read_bytes())
    content[-3] ^= 1  # a bit of the last log-probability
    damaged.write_bytes(content)
    compute = OneByOne()
    with pytest.warns(UserWarning, match="is damaged: its rows are computed again"):
        np.testing.assert_allclose(run(rows, cache, compute), expected(rows), rtol=1e-6)
    assert compute.rows() == [f"made:{i}" for i in range(6)]


def write_many(writer: int, cache: ReferenceCache) -> int:
    for part in range(40):
        keys, logps = entries(writer % 3, part)  # writers 0 and 3 write the same
        cache.append(keys, logps)
    return len(list(cache.folder.glob(FILES)))


def entries(writer: int, part: int, count: int = 20) -> tuple[list[bytes], np.ndarray]:
    draw = np.random.default_rng([writer, part])
    return [draw.bytes(16) for _ in range(count)], draw.normal(size=count)


def test_concurrent_writers_and_a_reader(cache):
    def work(rank: int) -> int:
        if rank < 4:
            return write_many(rank, cache)
        known = dict(pair for i in range(120) for pair in zip(*entries(i // 40, i % 40), strict=True))
        seen = 0
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a file that is read half written would be called damaged
            while seen < 120:
                logps = cache.lookup(list(known))
                found = ~np.isnan(logps)
                assert (logps[found] == np.array(list(known.values()))[found]).all()
                assert found.sum() >= seen * 20
                seen = int(found.sum()) // 20
        return seen

    assert run_ranks(5, work)[4] == 120
    assert sorted(path.suffix for path in cache.folder.iterdir()) == [".safetensors"] * 120


def test_a_kill_in_mid_write_loses_one_flush(cache, monkeypatch):
    """The process is killed between writing its third shard aside and renaming it; the first two are kept."""
    rows = make_rows(12)
    child = os.fork()
    if not child:
        replace, writes = os.replace, []

        def die_at_the_third(source, target):
            writes.append(target)
            if len(writes) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)

        os.replace = die_at_the_third
        try:
            run(rows, cache, OneByOne(), batch_size=2, flush_seconds=0.0)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert len(list(cache.folder.glob(FILES))) == 2
    assert len(list(cache.folder.glob("*.tmp"))) == 1

    whole, rest = OneByOne(), OneByOne()
    run(rows, ReferenceCache(cache.folder.parent, "fresh"), whole, batch_size=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_allclose(run(rows, cache, rest), expected(rows), rtol=1e-6)
    assert rest.rows() == sorted(row for batch in whole.asked[2:] for row in batch)


def test_what_is_computed_before_an_error_is_kept(cache):
    rows = make_rows(12)

    class Fails(OneByOne):
        def __call__(self, examples):
            if len(self.asked) == 2:
                raise RuntimeError("out of memory")
            return super().__call__(examples)

    failing = Fails()
    with pytest.raises(RuntimeError, match="out of memory"):
        run(rows, cache, failing, batch_size=2)
    compute = OneByOne()
    run(rows, cache, compute, batch_size=2)
    assert sorted(compute.rows() + failing.rows()) == sorted(row["row_id"] for row in rows)


def test_a_disk_that_takes_nothing_costs_only_the_cache(cache):
    rows = make_rows(3)
    shutil.rmtree(cache.folder)
    with pytest.warns(UserWarning, match="No such file or directory; 6 reference log-probabilities are not kept"):
        np.testing.assert_allclose(run(rows, cache, OneByOne()), expected(rows), rtol=1e-6)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match="reference_cache .*file/space: Not a directory"):
        ReferenceCache(tmp_path / "file", "space")


def test_a_million_keys(cache):
    """A lookup that compared key by key would show here. Some keys end in zero bytes, which are part of them."""
    keys, logps = entries(0, 0, 1_000_000)
    keys[:2] = [b"key" + bytes(13), b"key" + bytes(12) + b"a"]
    cache.append(keys[:500_000], logps[:500_000])
    cache.append(keys[500_000:900_000], logps[500_000:900_000])
    start = time.perf_counter()
    values = cache.lookup(keys)
    assert time.perf_counter() - start < 10  # about a second on one core
    assert (values[:900_000] == logps[:900_000]).all() and np.isnan(values[900_000:]).all()


# ---------------------------------------------------------------------------------------------------- several ranks


def run_rank(rank: int, folders: list[str], rows: list[dict]) -> tuple[np.ndarray, list[list[str]]]:
    compute = OneByOne()
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == len(folders)
    return run(
        rows, ReferenceCache(folders[rank], "space"), compute, batch_size=2, accelerator=accelerator
    ), compute.asked


def test_ranks_without_a_common_disk(tmp_path):
    """Each rank computes its share, in as many forwards; all get the same values, and the next run needs none."""
    rows = make_rows(11)
    folders = [str(tmp_path / f"node{rank}") for rank in range(3)]
    results = run_ranks(3, run_rank, folders, rows)
    calls = [asked for _, asked in results]
    assert len({len(asked) for asked in calls}) == 1
    assert len({row for asked in calls for batch in asked for row in batch}) == 11
    assert sum(len(batch) for asked in calls for batch in asked) < 11 + 2 * 3  # shared out, but for a repeat or two
    for values, _ in results:
        np.testing.assert_allclose(values, expected(rows), rtol=1e-6)
        assert (values == results[0][0]).all()

    for values, asked in run_ranks(3, run_rank, folders[::-1], rows):
        assert asked == []
        assert (values == results[0][0]).all()


# ---------------------------------------------------------------------------------------------------- weights


def test_the_digest_follows_the_weights_and_not_their_path(model_folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(model_folder, copy)
    assert weights_digest(copy) == weights_digest(model_folder)


def test_the_digest_follows_what_the_config_computes(model_folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(model_folder, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"transformers_version": "9", "_name_or_path": "elsewhere"}))
    assert weights_digest(copy) == weights_digest(model_folder)
    for change in ({"sliding_window": 8}, {"dtype": "bfloat16"}):
        (copy / "config.json").write_text(json.dumps(config | change))
        assert weights_digest(copy) != weights_digest(model_folder)


def test_every_shard_enters_the_digest(tmp_path):
    build_model().save_pretrained(tmp_path, max_shard_size="50KB")
    shards = sorted(tmp_path.glob(FILES))
    assert len(shards) >= 2
    digests = {weights_digest(tmp_path)}
    for shard in shards:
        whole = shard.read_bytes()
        shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        digests.add(weights_digest(tmp_path))
        shard.write_bytes(whole)
    assert len(digests) == 1 + len(shards)


def test_an_adapter_counts_with_its_base(model_folder, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(model_folder, base)
    model = get_peft_model(build_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(tmp_path / "adapter")
    digests = [weights_digest(base), weights_digest(tmp_path / "adapter")]

    for file in (tmp_path / "adapter" / "adapter_model.safetensors", base / "model.safetensors"):
        tensors = load_file(file)
        save_file({name: tensor + 1 for name, tensor in tensors.items()}, file)
        digests.append(weights_digest(tmp_path / "adapter"))
    assert len(set(digests)) == 4


def test_the_cache_tells_precisions_apart(model_folder, tmp_path, monkeypatch):
    """The launcher's too, which no key of the recipe names; and DeepSpeed casts weights where autocast does not."""

    def name(dtype="float32", trained=None, launched="no", deepspeed=None, **keys):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
        args = DPOConfig(output_dir=str(tmp_path), use_cpu=True, **({"bf16": False} | keys))
        args.deepspeed_plugin = deepspeed
        model = ModelConfig(model_name_or_path=model_folder, dtype=dtype)
        loaded = load_policy(model, trained, args)
        return open_cache(str(tmp_path / "cache"), model, args, loaded).folder.name

    names = [
        name(), name(bf16=True), name("bfloat16", ["down_proj"], bf16=True), name("bfloat16", ["norm"], bf16=True),
        name(deepspeed=object(), bf16=True),
    ]  # fmt: skip
    assert len(set(names)) == 5 and name(launched="bf16") == names[1] and name(deepspeed=object()) == names[0]
    assert name("bfloat16") == names[0] and name("bfloat16", bf16=True) == names[1], "float32 where all is trained"
    assert all(re.fullmatch(r"[\w-]+", name) for name in names)  # folder names everywhere


def test_a_shard_that_is_removed_meanwhile_is_a_miss(cache):
    rows = make_rows(3)
    run(rows, cache, OneByOne())
    (cache.folder / f"{'0' * 32}.safetensors").symlink_to(cache.folder / "gone")
    compute = OneByOne()
    run(rows, cache, compute)
    assert compute.asked == []


def digest_on_rank(rank: int, folder: str) -> str:
    Accelerator(cpu=True)
    return weights_digest(folder if rank == 0 else folder + "/gone")


def test_rank_0_digests_for_all(model_folder):
    assert run_ranks(2, digest_on_rank, model_folder) == [weights_digest(model_folder)] * 2


# ---------------------------------------------------------------------------------------------------- the model itself


@pytest.mark.parametrize("sharing", [True, False], ids=["shared", "padded"])
def test_gaps_of_a_selection_are_the_models_and_are_kept_for_the_run(model_folder, tmp_path, sharing):
    """Its own forward against one by one; a second pass, as the run's trainer makes it, has nothing to compute."""
    rows = make_rows(9)
    args = DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, per_device_train_batch_size=2)
    settings = ModelConfig(model_name_or_path=model_folder, dtype="float32")
    cached = {"cache_folder": str(tmp_path / "cache"), "prefix_sharing": sharing, "pad_token_id": 0}
    gaps = reference_gaps(Dataset.from_list(rows), settings, args, **cached)
    np.testing.assert_allclose(gaps, expected(rows) @ [1, -1], rtol=1e-4, atol=1e-4)
    compute = OneByOne()
    assert (
        run(rows, open_cache(cached["cache_folder"], settings, args, build_model()), compute) @ [1, -1] == gaps
    ).all()
    assert compute.asked == []
    lengths = np.array([[len(row["chosen_ids"]), len(row["rejected_ids"])] for row in rows])
    assert (lengths[:, 0] != lengths[:, 1]).any()
    by_token = reference_gaps(Dataset.from_list(rows), settings, args, **cached, per_token=True)
    np.testing.assert_allclose(by_token, (expected(rows) / lengths) @ [1, -1], rtol=1e-4, atol=1e-4)
