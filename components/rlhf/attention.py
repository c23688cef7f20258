"""Attention on a CPU: plain matrix products for rows that are short, the library's kernel for long ones.

For rows as short as preferences are, torch's fused kernel takes up to four times as long on a CPU as matrix products (forward and
backward in bfloat16: 8.6 against 2.1 ms at 8 x 96 tokens, 16 against 9 at 2 x 400). It wins where the T^2 scores no longer fit.

Shapes: B rows, K key-value heads, G query heads of each, T queries, S keys, D head size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHORT_ROWS = "short_rows"
LONGEST = 512  # keys; beyond, the scores of a row and head take more than a megabyte


def use_short_rows(model: PreTrainedModel) -> None:
    """Makes a model attend with `short_rows`, if it uses torch's kernel now. It pays on a CPU."""
    if model.config._attn_implementation != "sdpa":
        return
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(SHORT_ROWS, short_rows)
    AttentionMaskInterface.register(SHORT_ROWS, sdpa_mask)
    model.set_attn_implementation(SHORT_ROWS)


def short_rows(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As `sdpa_attention_forward` of transformers: queries [B, K G, T, D], keys and values [B, K, S, D] give [B, T, K G, D]."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    rows, heads, queries, size = query.shape
    kv_heads, keys = key.shape[1:3]
    unusual = dropout or any(kwargs.get(name) is not None for name in ("is_causal", "position_bias", "softcap", "cache"))
    if keys > LONGEST or unusual or size != value.shape[-1] or (attention_mask is None and queries not in (1, keys)):
        result, _ = sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
        return result, None
    bias = _bias(attention_mask, queries, keys, query)
    groups = heads // kv_heads
    bias_NTS = bias.expand(rows, heads, queries, keys).reshape(rows * kv_heads, groups * queries, keys)
    query_NTD = query.reshape(rows * kv_heads, groups * queries, size)
    key_NSD, value_NSD = (each.reshape(rows * kv_heads, keys, size) for each in (key, value))
    scale = size**-0.5 if scaling is None else scaling
    scores_NTS = torch.baddbmm(bias_NTS, query_NTD, key_NSD.transpose(1, 2), alpha=scale)
    mixed_NTD = torch.bmm(torch.softmax(scores_NTS, -1), value_NSD)
    return mixed_NTD.view(rows, heads, queries, size).transpose(1, 2).contiguous(), None


def _bias(mask: Tensor | None, queries: int, keys: int, query: Tensor) -> Tensor:
    """What is added to the scores, [.., T, S]: 0, or the lowest number where a query may not look."""
    lowest = torch.finfo(query.dtype).min
    if mask is not None and mask.dtype != torch.bool:
        return mask[..., :keys].to(query.dtype)
    if mask is None:
        if queries == 1:
            return query.new_zeros(())
        mask = torch.ones((queries, keys), dtype=torch.bool, device=query.device).tril()
    return torch.where(mask[..., :keys], 0.0, lowest).to(query.dtype)
