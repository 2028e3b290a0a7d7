"""
Memory that a run takes on each device, told before anything is loaded.

With N parameters, P of them trained, n processes and k states of the optimizer (AdamW: 2), what stays between two
micro-batches on one device is, without DeepSpeed (f bytes a frozen weight: those of `dtype`, or 4 without bf16 or
fp16),

    | weights          | (N − P)·f + P·4: what is trained is float32 whatever `dtype` says (modeling/precision.py) |
    | gradients        | P·4, DDP twice                                                                            |
    | optimizer        | k·P·4                                                                                     |

and under DeepSpeed, of which w is 2 with bf16 or fp16 (it casts the whole model, and keeps float32 masters of the
trained weights), else 4:

    |                  | ZeRO-2              | ZeRO-3                                           |
    |------------------|---------------------|--------------------------------------------------|
    | weights          | N·w                 | N·w / n, and min(N, 1.05·10⁹)·w of them gathered |
    | gradients        | P·w / n             | P·w / n                                          |
    | master weights   | 4·P / n             | 4·P / n, none where w = 4                        |
    | optimizer        | 4·k·P / n           | 4·k·P / n                                        |
    | reduction bucket | 5·10⁸·w             | (5·10⁸ + min(P, 5·10⁸))·w                        |

LoRA's adapters are P like any other; over weights of 4 or 8 bits those take 0.516 bytes each, or 1 and a little
(modeling/quantised.py), and a layer's are made wide for each product, which the trace has. An AdamW of 8 bits has a
byte and a constant for each 256 of them in the place of each state's 4 bytes; a paged one is counted as if it stayed.
DDP keeps each gradient a second time, in its buckets. A live reference is held as the policy is. ZeRO-3 releases a
gathered weight only when another 10⁹ elements are alive (stage3_max_live_parameters, and 5·10⁷ fetched ahead), so that
a small model is whole on each device. Its reduce-scatter copies what the bucket holds. An offloaded optimizer takes
its masters and states to the host, and the gradients with them.

On top come, never at once:

- **the forward and backward of the largest micro-batch**: no formula, but a trace (memory_trace.py).
- **a gathering** under ZeRO-3: the buffer that all processes fill, from which each weight is then copied. It holds
  what is fetched ahead, min(N, 5·10⁷)·w.
- **the update** under ZeRO: a float32 copy of this process's gradients, 4·P / n (ZeRO-3: of at most 10⁹ elements).
- **the proof of what was saved**: rank 0 loads the saved weights, N·w or N·4 where they are float32, on the host, and
  scores a row with them. Only where the device is the CPU is that its memory, beside weights whose gradients are gone.
  Of an adapter it reads the file alone, P·4, but for ZeRO-3.

Not in it: the context of CUDA and NCCL, the imports of a CPU process, fragmentation, and what glibc keeps of freed
memory. Held against the peaks of whole CPU runs in float32 with 63.4 M parameters and gradient checkpointing, imports
subtracted and freed memory given back at once (`make torture ARGS="-k memory"`): one process 1.10 GiB estimated and
1.15 measured, down_proj alone 0.64 and 0.58; ZeRO-3 on two processes 1.53 and 1.55, down_proj alone 0.81 and 0.93. As
glibc keeps freed memory by itself, such runs took 0.3 to 0.6 GiB more. No GPU was measured.
"""

from dataclasses import dataclass

from core.modeling.precision import Precision
from core.planning.disk import OPTIMIZER_STATES
from core.runtime.launching import Launch

BUCKET = 500_000_000  # elements; DeepSpeed's reduce_bucket_size
PREFETCHED = 50_000_000  # elements; stage3_prefetch_bucket_size
GATHERED = 1_000_000_000 + PREFETCHED  # elements; stage3_max_live_parameters comes first
PROOF = "proof of what was saved (rank 0)"
SUB_GROUP = 1_000_000_000  # elements; the part of the weights that ZeRO-3 updates at a time


@dataclass(frozen=True)
class Part:
    """A line of the estimate."""

    name: str
    formula: str
    bytes: float
    on_host: bool = False


@dataclass(frozen=True)
class Work:
    """What a run asks of the memory beside the size of its model."""

    launch: Launch
    precision: Precision
    optim: str
    live_reference: bool = False  # a second model, whole or split as the policy
    adapter: bool = False  # the model is saved as an adapter
    quantised: int = 0  # elements of frozen weights in 4 or 8 bits …
    quantised_bytes: int = 0  # … and what they take


def states(total: int, trained: int, work: Work) -> list[Part]:
    """What stays between two micro-batches; see the table above. `total` is N, `trained` P."""
    launch, held, k = work.launch, work.precision, OPTIMIZER_STATES[work.optim]
    n, stage, w = launch.world_size, launch.zero_stage, held.trained.itemsize
    N, P = f"{total / 1e9:.3f}e9", f"{trained / 1e9:.3f}e9"
    if not stage:
        twice = 2 if n > 1 else 1
        weights = held.itemsize(total - work.quantised, trained) + work.quantised_bytes
        formula = f"{(total - work.quantised - trained) / 1e9:.3f}e9 x {held.frozen.itemsize} B + {P} x {w} B"
        if work.quantised:
            bits = work.quantised_bytes / work.quantised
            formula += f" + {work.quantised / 1e9:.3f}e9 x {bits:.3f} B quantised"
        parts = [
            Part("weights", formula, weights),
            Part("gradients", f"{P} x {w} B{' x 2 (DDP buckets)' if twice == 2 else ''}", trained * w * twice),
            Part("optimizer", f"{P} x {k:g} states x {w} B", trained * k * w),
        ]
        return parts + ([Part("reference model", formula, weights)] if work.live_reference else [])
    split = n if stage == 3 else 1
    away, host = launch.offload_param and stage == 3, launch.offload_optimizer
    parts = [Part("weights", f"{N} x {w} B / {split}", total * w / split, away)]
    if stage == 3:
        gathered = min(total, GATHERED)
        parts.append(Part("gathered weights", f"min({N}, {GATHERED / 1e9:g}e9) x {w} B", gathered * w))
    parts.append(Part("gradients", f"{P} x {w} B / {n}", trained * w / n, host))
    if w == 2 or stage < 3:
        parts.append(Part("master weights", f"{P} x 4 B / {n}", trained * 4 / n, host))
    parts.append(Part("optimizer", f"{P} x {k} states x 4 B / {n}", trained * k * 4 / n, host))
    # On a CPU the bucket is memory only as far as it is filled.
    filled = min(trained, BUCKET)
    bucket = filled if launch.use_cpu else BUCKET
    parts.append(Part("reduction bucket", f"{bucket / 1e9:.3f}e9 x {w} B", bucket * w))
    if stage == 3:
        parts.append(Part("copy of the bucket", f"min({P}, {BUCKET / 1e9:g}e9) x {w} B", filled * w))
    if work.live_reference:
        parts.append(Part("reference model", f"{N} x {w} B / {split}", total * w / split))
    return parts


def phases(total: int, trained: int, micro_batch: int, proof: int, work: Work) -> list[Part]:
    """What comes on top of `states`, one at a time; `micro_batch` and `proof` are traced bytes."""
    n, stage, w = work.launch.world_size, work.launch.zero_stage, work.precision.trained.itemsize
    found = [Part("forward and backward", "traced", micro_batch)]
    if stage == 3:
        ahead = min(total, PREFETCHED)
        found.append(Part("gathering of weights", f"{ahead / 1e9:.3f}e9 x {w} B", ahead * w))
    if stage:
        own = min(trained / n, SUB_GROUP) if stage == 3 else trained / n
        found.append(Part("update", f"{own / 1e9:.3f}e9 x 4 B", own * 4, work.launch.offload_optimizer))
    if work.adapter and stage < 3:
        return [*found, Part(PROOF, f"{trained / 1e9:.3f}e9 x {w} B", trained * w, on_host=not work.launch.use_cpu)]
    formula = f"{total / 1e9:.3f}e9 x {w} B + {proof / 2**30:.2f} GiB traced"
    needed = total * w + proof
    if work.launch.use_cpu and not stage:  # DeepSpeed's gradients stay in their buffers
        formula += f" - {trained / 1e9:.3f}e9 x {w} B of gradients"
        needed -= trained * w
    return [*found, Part(PROOF, formula, needed, on_host=not work.launch.use_cpu)]
