"""Attention over pairs that lie end to end in one row and share their prompts: see `prefix.py` for the layout.

A pair of k prompt, n chosen and m rejected tokens is two sequences of queries, (P, C_1 … C_(n−1)) and (P_k, R_1 …
R_(m−1)). The first attends causally to itself; the second to P_1 … P_(k−1) and causally to itself. The cost is that of
the pairs' own lengths, and no mask over the row is built. With m = 0 there is no second sequence: so a conversation
lies among others (`padding_free.py`).
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "prefix_shared"  # our name among transformers' attention implementations
SHORT = 128  # tokens; up to here a call for each sequence takes longer than attention to padding does

PairLengths = tuple[tuple[int, int, int], ...]  # (k, n, m) of each pair, in tokens; m = 0: one sequence of k + n − 1


class PackedKeys(NamedTuple):
    """The S sequences of queries (two of a pair) and the keys of each, as `varlen_attn` takes them."""

    # Where in the row each key lies; a prompt's keys are named twice. None: each once, in order. int64
    key_index: torch.Tensor | None
    query_starts: torch.Tensor  # first query of each sequence, and the end. Shape (S + 1,), int32
    key_starts: torch.Tensor  # first key of each sequence, and the end. Shape (S + 1,), int32
    longest_query: int
    longest_key: int


def packed_keys(pair_lengths: PairLengths, device: torch.device | str = "cpu") -> PackedKeys:
    """The keys of each sequence of queries, on `device`."""
    index, queries, keys, start = [], [], [], 0
    for k, n, m in pair_lengths:
        second = start + k + n - 1
        index.append(torch.arange(start, second))
        queries.append(k + n - 1)
        keys.append(k + n - 1)
        if m:
            index += [torch.arange(start, start + k - 1), torch.arange(second, second + m)]
            queries.append(m)
            keys.append(k - 1 + m)
        start = second + m
    query_starts, key_starts = (
        F.pad(torch.tensor(sizes).cumsum(0), (1, 0)).to(device, torch.int32) for sizes in (queries, keys)
    )
    shares = any(m for _, _, m in pair_lengths)
    key_index = torch.cat(index).to(device) if shares else None
    return PackedKeys(key_index, query_starts, key_starts, max(queries), max(keys))


def prefix_shared_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    pair_lengths: PairLengths | None = None,
    packed: PackedKeys | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """
    transformers' attention interface; plain sdpa for a batch that isn't shared.

    Args:
        query: shape (1, H, T, D). key, value: shape (1, H_kv, T, D), H a multiple of H_kv.
        pair_lengths: of prompt, chosen and rejected of each pair.
        packed: the same for `varlen_attn`, which is used where it can be.

    Returns:
        The attention's output, shape (1, T, H, D), and None for the weights.
    """
    if pair_lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    assert all(kwargs.get(name) is None for name in ("softcap", "s_aux", "position_bias")), "not over shared pairs"
    assert not kwargs.get("dropout"), "no dropout over shared pairs"
    if packed is not None and has_varlen_kernel(query):
        return _attend_packed(query, key, value, scaling, packed), None
    lengths = [k + n - 1 for k, n, _ in pair_lengths]
    if max(lengths) <= SHORT and not any(m for _, _, m in pair_lengths):
        return _attend_short(query, key, value, scaling, lengths), None
    return _attend_pair_by_pair(query, key, value, scaling, pair_lengths), None


def has_varlen_kernel(query: torch.Tensor) -> bool:
    """Whether torch's variable-length FlashAttention takes these queries; it has no CPU and no float32 form."""
    return (
        query.is_cuda
        and _attention_dtype(query) in (torch.float16, torch.bfloat16)
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= 256
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def _attention_dtype(query: torch.Tensor) -> torch.dtype:
    """Autocast knows sdpa but not `varlen_attn`, and rotary embeddings leave float32 queries under it."""
    device = query.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype


def _attend_packed(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, packed: PackedKeys
) -> torch.Tensor:
    """
    All pairs in one call. With fewer queries than keys FlashAttention aligns the causal mask to the bottom right, so
    the second sequence's first query, P_k, sees the prompt and itself.

    Not run on a GPU yet: the tests run it over a slow form of `varlen_attn`.
    """
    dtype = _attention_dtype(query)
    query, key, value = (x[0].transpose(0, 1).to(dtype) for x in (query, key, value))  # (T, heads, D)
    if packed.key_index is not None:
        key, value = (x.index_select(0, packed.key_index) for x in (key, value))
    return varlen_attn(
        query,
        key,
        value,
        packed.query_starts,
        packed.key_starts,
        packed.longest_query,
        packed.longest_key,
        scale=scaling,
        window_size=(-1, 0),  # causal
        enable_gqa=query.shape[1] != key.shape[1],
    ).unsqueeze(0)


def _attend_pair_by_pair(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, pair_lengths: PairLengths
) -> torch.Tensor:
    """A call of sdpa for each sequence, in any dtype on any device."""
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    # One split per tensor: its backward is one concatenation, where a slice's is a row of zeros for each pair.
    sizes = [size for k, n, m in pair_lengths for size in (k + n - 1, m) if size]
    queries, keys, values = (x.split(sizes, dim=2) for x in (query, key, value))
    outputs = []
    for k, _, m in pair_lengths:
        first = len(outputs)
        outputs.append(
            F.scaled_dot_product_attention(queries[first], keys[first], values[first], is_causal=True, scale=scaling)
        )
        if not m:
            continue
        second = first + 1
        visible = torch.ones(m, k - 1 + m, dtype=torch.bool, device=query.device).tril(k - 1)
        outputs.append(
            F.scaled_dot_product_attention(
                queries[second],
                torch.cat([keys[first][:, :, : k - 1], keys[second]], dim=2),
                torch.cat([values[first][:, :, : k - 1], values[second]], dim=2),
                attn_mask=visible,
                scale=scaling,
            )
        )
    return torch.cat([output.transpose(1, 2) for output in outputs], dim=1)


def _attend_short(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, lengths: list[int]
) -> torch.Tensor:
    """
    One call of sdpa for sequences that share nothing, padded for it alone: padding stands behind a sequence's own
    tokens, so that a causal mask hides it from them.
    """
    groups, longest = query.shape[1] // key.shape[1], max(lengths)
    own = torch.cat([torch.arange(row * longest, row * longest + length) for row, length in enumerate(lengths)])
    own = own.to(query.device)

    def padded(x: torch.Tensor) -> torch.Tensor:
        rows = x.new_zeros(len(lengths) * longest, x.shape[1], x.shape[3])
        rows = rows.index_copy(0, own, x[0].transpose(0, 1))
        return rows.unflatten(0, (len(lengths), longest)).transpose(1, 2)  # (sequences, heads, tokens, D)

    query, key, value = padded(query), repeat_kv(padded(key), groups), repeat_kv(padded(value), groups)
    output = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    return output.transpose(1, 2).flatten(0, 1).index_select(0, own).unsqueeze(0)


AttentionInterface.register(ATTENTION, prefix_shared_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
