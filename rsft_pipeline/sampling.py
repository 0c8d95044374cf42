"""Sampling: which candidates a round draws, in which waves, and the backend that draws them.

A candidate's id is known before it is drawn (lineage.candidate_id), so a wave that was persisted is
never drawn again and one that was not is drawn whole. Not here: how tokens come out of a model
(decoding.py) and where candidates are kept (store.py).
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Protocol

from rsft_pipeline import lineage, models
from rsft_pipeline.devices import Device, release
from rsft_pipeline.recipe import Recipe, Sampling

EVALUATION = "evaluation"  # the scope of held-out draws: the same weights are drawn from once


@dataclass(frozen=True)
class Request:
    """A candidate to draw."""

    candidate_id: str
    prompt_id: str
    prompt_ids: tuple[int, ...]
    draw: int
    seed: int


@dataclass(frozen=True)
class Candidate:
    """A candidate drawn. `token_ids` are kept as sampled, the stop token included."""

    request: Request
    text: str
    token_ids: list[int]
    finish_reason: str
    log_q: float
    log_p: float


class Session(Protocol):
    """A policy ready to be drawn from."""

    def draw(self, requests: Sequence[Request], sampling: Sampling) -> list[Candidate]:
        """One candidate for each request, in their order."""


def settings(sampling: Sampling, seed: int) -> str:
    """Hash of what shapes a draw. How many are drawn, and how they are batched, does not."""
    shaping = sampling.model_dump(include={"temperature", "top_p", "top_k", "max_tokens", "stop"})
    return lineage.digest({**shaping, "seed": seed})


def choose(prompts: Sequence[dict], number: int | None, salt: str) -> list[dict]:
    """`number` of the prompts, by hash with the salt: another salt chooses others; order plays no part."""
    if number is None or number >= len(prompts):
        return list(prompts)
    return sorted(prompts, key=lambda prompt: lineage.digest([salt, prompt["prompt_id"]]))[:number]


def waves(
    recipe: Recipe, scope: str, policy: str, prompts: Sequence[tuple[str, tuple[int, ...]]], sampling: Sampling
) -> list[list[Request]]:
    """The candidates of a scope, in waves: all draws of a prompt together, prompts of like length together.

    Args:
        scope: the round's key, or EVALUATION.
        policy: digest of the weights.
        prompts: prompt id and token ids of each.
    """
    hashed = settings(sampling, recipe.seed)
    requests = []
    for prompt_id, prompt_ids in sorted(prompts, key=lambda prompt: (len(prompt[1]), prompt[0])):
        for draw in range(sampling.draws):
            candidate = lineage.candidate_id(recipe.name, scope, policy, prompt_id, draw, hashed)
            requests.append(Request(candidate, prompt_id, prompt_ids, draw, lineage.seed_of(candidate, recipe.seed)))
    size = max(1, sampling.wave_size // sampling.draws) * sampling.draws
    return [requests[i : i + size] for i in range(0, len(requests), size)]


def pending(plan: Sequence[Sequence[Request]], there: Collection[str]) -> Iterator[tuple[int, list[Request]]]:
    """The waves that still miss candidates: their number and what is missing."""
    for number, wave in enumerate(plan):
        if missing := [request for request in wave if request.candidate_id not in there]:
            yield number, missing


class InProcess:
    """The backend that draws in this process, with Transformers: loads the policy, gives its memory back."""

    def __init__(self, policy: Path, recipe: Recipe, task: ModuleType, device: Device):
        self.policy, self.recipe, self.task, self.device = policy, recipe, task, device

    def __enter__(self) -> "InProcess":
        self.model = models.load(self.policy, self.device, task=self.recipe.task).eval()
        self.tokenizer = models.tokenizer(self.policy)
        return self

    def __exit__(self, *_: object) -> None:
        self.model = None
        release(self.device)

    def draw(self, requests: Sequence[Request], sampling: Sampling) -> list[Candidate]:
        return self.task.draw(self.model, self.tokenizer, requests, sampling)
