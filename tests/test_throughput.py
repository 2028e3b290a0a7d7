import pytest
from accelerate import PartialState

from conftest import build_model
from core.runtime.ranks import join_processes
from core.training.throughput import Throughput, matmul_parameters, peak_flops, training_flops
from processes import run_ranks

# Per layer of the tiny Mistral: q and o 32×32, k and v 32×16, three 32×64 in the MLP, two norms of 32.
LAYER = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32
BODY = 2 * LAYER + 32  # 18,592 with the last norm
EMBEDDING = 320 * 32


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_parameters_that_a_token_is_multiplied_with():
    model = build_model()
    assert matmul_parameters(model) == (BODY + EMBEDDING, BODY + EMBEDDING)  # the head, and not the look-up
    assert matmul_parameters(build_model(tie_word_embeddings=True)) == (BODY + EMBEDDING, BODY + EMBEDDING)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "down_proj" in name
    assert matmul_parameters(model) == (BODY + EMBEDDING, 2 * 32 * 64)


def test_flops_of_a_token():
    """6N where all is trained; Mistral-7B with down_proj alone: 4·7.11e9 + 2·1.88e9."""
    assert training_flops(1000, 1000) == 6000
    assert training_flops(7_110_660_096, 1_879_048_192) == 32_200_736_768


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("AMD Instinct MI300X", 1307e12),
        ("NVIDIA A10G", None),
        ("NVIDIA L40", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H200 MIG 1g.18gb", None),
        ("", None),
    ],
)
def test_peak_of_a_device_by_its_name(name, flops):
    assert peak_flops(name) == flops


def test_figures_by_hand():
    """
    Two steps of 2 s and 3 s with 40 s of evaluation between: 5 s. 8 pairs and 1000 of 4000 tokens a micro-batch, two
    micro-batches: 16/5 pairs/s, 2000/5 = 400 tokens/s, 1 − 2000/8000 saved. N = 28,832 all trained on an A100:
    400·6·28,832/312e12.
    """
    clock = Clock()
    throughput = Throughput(build_model(), "NVIDIA A100-SXM4-80GB", clock)
    clock.now += 50  # set-up, before the first step
    throughput.on_train_begin()
    clock.now += 2
    throughput.count(8, 1000, 4000)
    throughput.on_step_end()
    clock.now += 40
    throughput.on_evaluate()
    clock.now += 3
    throughput.count(8, 1000, 4000)
    throughput.on_step_end()
    clock.now += 7  # saving
    throughput.on_save()
    figures = throughput.report()
    assert figures.pop("peak_memory_gib") > 0
    assert figures == pytest.approx(
        {
            "pairs_per_second": 3.2,
            "tokens_per_second": 400,
            "tokens_saved": 0.75,
            "mfu": 400 * 6 * 28_832 / 312e12,
        }
    )

    clock.now += 4  # the next report counts from here alone
    throughput.count(2, 100, 100)
    throughput.on_step_end()
    figures = throughput.report()
    assert (figures["pairs_per_second"], figures["tokens_per_second"], figures["tokens_saved"]) == (0.5, 25, 0)
    assert throughput.report() == {}


def work_of_a_rank(rank):
    join_processes()
    PartialState(cpu=True)
    clock = Clock()
    throughput = Throughput(build_model(), ["NVIDIA H200", ""][rank], clock)
    throughput.on_train_begin()
    clock.now += 2 + 2 * rank
    throughput.count(8, 1000 + 2000 * rank, 4000)
    throughput.on_step_end()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("core.training.throughput.peak_memory", lambda: (3 + 2 * rank) * 2**30)
        return throughput.report()


def test_figures_of_all_ranks():
    """
    Work is summed and time is the slower rank's: 16 pairs and 1000 + 3000 of 8000 tokens in 4 s. Memory is the
    fuller's, and MFU, on a known GPU alone, a share of both.
    """
    expected = {"pairs_per_second": 4, "tokens_per_second": 1000, "tokens_saved": 0.5, "peak_memory_gib": 5}
    known, unknown = run_ranks(2, work_of_a_rank)
    assert known == pytest.approx(expected | {"mfu": 1000 * 6 * 28_832 / (2 * 989e12)})
    assert unknown == expected
