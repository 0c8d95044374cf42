"""Padding: rows of different lengths as one tensor."""

from collections.abc import Sequence
from typing import Any


def right_padded(rows: Sequence[Sequence[int]], filler: int) -> Any:
    """Rows of numbers as one tensor, int64 [rows, longest]."""
    import torch

    tensors = [torch.tensor(row) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=filler)


def left_padded(prompts: Sequence[Sequence[int]], pad_id: int, device: Any) -> tuple[Any, Any, Any]:
    """Token ids, mask and position ids of prompts, each int64 [prompts, longest].

    Padded on the left, so that every prompt ends where the next token goes.
    """
    import torch

    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad_id)
    mask = torch.zeros((len(prompts), width), dtype=torch.long)
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt) :] = torch.tensor(prompt)
        mask[i, width - len(prompt) :] = 1
    mask = mask.to(device)
    return ids.to(device), mask, (mask.cumsum(-1) - 1).clamp(min=0)
