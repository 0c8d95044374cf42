"""The plain loop: draws from any model that writes, each with its own copy of its prompt's keys and values.

It serves the models whose attention cannot be shared, and the other loops are tested against it.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from rsft_pipeline.decoding.draws import Draw, Drawn, Shape, choose, uniforms
from rsft_pipeline.decoding.memory import PREFILL_TOKENS, ROWS
from rsft_pipeline.models import configuration


def draw(
    model: Any, draws: Sequence[tuple[int, Draw]], shape: Shape, pad_id: int, at_once: int
) -> Iterator[tuple[int, Drawn]]:
    """Make the draws in batches of prompts of equal length: not every model ignores padding."""
    for batch in _batches(draws, min(at_once, ROWS[model.device.type])):
        yield from _alike(model, batch, shape, pad_id)


def _batches(draws: Sequence[tuple[int, Draw]], rows: int) -> Iterator[list[tuple[int, Draw]]]:
    """The draws in batches of equal prompt length, of at most `rows` draws and as many prompts as one pass can read."""
    batch: list[tuple[int, Draw]] = []
    prompts: set[tuple[int, ...]] = set()
    for one in sorted(draws, key=lambda one: (len(one[1].prompt_ids), one[1].prompt_ids)):
        prompt = one[1].prompt_ids
        another = len(prompt) > len(batch[0][1].prompt_ids) if batch else False
        unread = prompt not in prompts and (len(prompts) + 1) * len(prompt) > PREFILL_TOKENS
        if batch and (len(batch) == rows or another or unread):
            yield batch
            batch, prompts = [], set()
        batch.append(one)
        prompts.add(prompt)
    if batch:
        yield batch


def _alike(model: Any, draws: Sequence[tuple[int, Draw]], shape: Shape, pad_id: int) -> Iterator[tuple[int, Drawn]]:
    """Draw one batch: each row has its own copy of its prompt's keys and values.

    Args:
        draws: draws whose prompts have the same length.

    Yields:
        Number and result of each draw.
    """
    import torch

    device = model.device
    prompts = list(dict.fromkeys(draw.prompt_ids for _, draw in draws))
    place = {prompt: i for i, prompt in enumerate(prompts)}
    kept = _kept(model)
    logits = kept.read(prompts)
    row = torch.tensor([place[draw.prompt_ids] for _, draw in draws], device=device)  # of each draw's logits
    kept.select(row)
    u = torch.from_numpy(uniforms([draw.seed for _, draw in draws], shape.max_tokens)).to(device)
    stops = torch.tensor(sorted(shape.stop_ids), dtype=torch.long, device=device)

    tokens = torch.full((len(draws), shape.max_tokens), pad_id, device=device)
    lengths = torch.full((len(draws),), shape.max_tokens, device=device)
    stopped = torch.zeros(len(draws), dtype=torch.bool, device=device)
    log_q = torch.zeros(len(draws), dtype=torch.float64, device=device)
    log_p = torch.zeros(len(draws), dtype=torch.float64, device=device)
    alive = torch.arange(len(draws), device=device)
    for step in range(shape.max_tokens):
        chosen, step_q, step_p = choose(logits, row, u[alive, step], shape)
        tokens[alive, step] = chosen
        log_q[alive] += step_q
        log_p[alive] += step_p
        ended = torch.isin(chosen, stops)
        stopped[alive[ended]] = True
        lengths[alive[ended]] = step + 1
        if ended.any():
            keep = (~ended).nonzero().squeeze(-1)
            if not len(keep):
                break
            kept.select(keep)
            alive, chosen = alive[keep], chosen[keep]
        if step + 1 == shape.max_tokens:
            break
        logits, row = kept.follow(chosen[:, None]), torch.arange(len(chosen), device=device)
    for (number, _), ids, n, end, q, p in zip(
        draws, tokens.tolist(), lengths.tolist(), stopped.tolist(), log_q.tolist(), log_p.tolist(), strict=True
    ):
        yield number, Drawn(ids[:n], end, q, p)


def _kept(model: Any) -> "_Causal":
    return (_EncoderDecoder if model.config.is_encoder_decoder else _Causal)(model)


class _Causal:
    """What the plain loop keeps of a causal model's rows, which all have the same length."""

    def __init__(self, model: Any):
        self.model = model

    def read(self, prompts: Sequence[Sequence[int]]) -> Any:
        """Logits of what follows each prompt, [prompts, vocabulary]. Afterwards the rows are the prompts."""
        import torch
        from transformers import DynamicCache

        self.cache = DynamicCache(config=self.model.config)
        self.position = configuration.first_position(self.model.config)
        return self.follow(torch.tensor(prompts, device=self.model.device))

    def select(self, rows: Any) -> None:
        """Keep the rows of these indices, or repeat them."""
        self.cache.reorder_cache(rows)

    def follow(self, tokens: Any) -> Any:
        """Logits of what follows each row and its next tokens, int64 [rows, tokens]: [rows, vocabulary]."""
        import torch

        rows, length = tokens.shape
        positions = torch.arange(self.position, self.position + length, device=tokens.device).expand(rows, length)
        self.position += length
        return self.model(
            input_ids=tokens, position_ids=positions, past_key_values=self.cache, logits_to_keep=1
        ).logits[:, -1]


class _EncoderDecoder(_Causal):
    """The same for an encoder-decoder."""

    def read(self, prompts: Sequence[Sequence[int]]) -> Any:
        from rsft_pipeline.decoding.shared_encoder import read

        out, self.mask = read(self.model, prompts, 0)  # of equal length: nothing is padded
        self.states, self.cache = out.encoder_last_hidden_state, out.past_key_values
        return out.logits[:, -1]

    def select(self, rows: Any) -> None:
        self.cache.reorder_cache(rows)
        self.mask, self.states = self.mask[rows], self.states[rows]

    def follow(self, tokens: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutput

        return self.model(
            encoder_outputs=BaseModelOutput(self.states),
            attention_mask=self.mask,
            decoder_input_ids=tokens,
            past_key_values=self.cache,
            use_cache=True,
        ).logits[:, -1]
