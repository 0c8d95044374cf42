"""Sampling: which candidates a round draws, in which waves and passes, and the backend that draws them.

A candidate's id is known before it is drawn (lineage.candidate_id), so a wave that was persisted is
never drawn again, and one that was not is drawn whole. Not: how tokens come out of a model (decoding/),
nor where candidates are kept (store.py).
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Protocol

from rsft_pipeline import lineage, models
from rsft_pipeline.devices import Device, release
from rsft_pipeline.recipe.recipe import Recipe
from rsft_pipeline.recipe.sampling import Sampling
from rsft_pipeline.training import Sample

EVALUATION = "evaluation"  # the scope of held-out draws, which rounds share: each policy is drawn from once


@dataclass(frozen=True)
class Asked:
    """A prompt as the policy reads it."""

    prompt_id: str
    prompt_ids: tuple[int, ...]
    reference: str | None


@dataclass(frozen=True)
class Request:
    """A candidate to draw."""

    candidate_id: str
    asked: Asked
    draw: int
    seed: int

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        return self.asked.prompt_ids


@dataclass(frozen=True)
class Candidate:
    """A drawn candidate. `token_ids` are kept as sampled, including the stop token."""

    request: Request
    text: str
    token_ids: list[int]
    finish_reason: str
    log_q: float | None  # None: it was not sampled
    log_p: float


class Session(Protocol):
    """A policy ready to be drawn from."""

    def draw(self, requests: Sequence[Request], sampling: Sampling) -> list[Candidate]:
        """One candidate for each request, in their order."""


def settings(sampling: Sampling, seed: int, answers: str | None = None) -> str:
    """Hash of the settings that determine a draw; how many are drawn, and how they are batched, is not among them.

    Args:
        answers: digest of the reference answers, see Round; it counts only if these are the candidates.
    """
    shaping = sampling.model_dump(include={"source", "temperature", "top_p", "top_k", "max_tokens", "stop"})
    given = {"answers": answers} if answers and sampling.source == "reference" else {}
    return lineage.digest({**shaping, "seed": seed, **given})


def evaluation_sampling(recipe: Recipe) -> Sampling:
    """How held-out candidates are drawn: like the round's, but from the evaluated weights and as `evaluation` says."""
    how = recipe.evaluation
    changed = {"source": "policy", "teacher": None, "until": None, "temperature": how.temperature, "draws": how.draws}
    return recipe.sampling.model_copy(update=changed | ({"top_k": 1} if how.greedy else {}))


def choose(prompts: Sequence[dict], number: int | None, salt: str) -> list[dict]:
    """`number` of the prompts, by hash with the salt: another salt chooses others; their order plays no part."""
    if number is None or number >= len(prompts):
        return list(prompts)
    return sorted(prompts, key=lambda prompt: lineage.digest([salt, prompt["prompt_id"]]))[:number]


def waves(
    recipe: Recipe,
    scope: str,
    policy: str,
    asked: Sequence[Asked],
    sampling: Sampling,
    draws: range,
    answers: str | None = None,
) -> list[list[Request]]:
    """The candidates of a scope, in waves: all draws of a prompt together, prompts of similar length together.

    With `until`, which may end a pass early, prompts are assigned to waves in the order of a hash instead: those that
    were drawn for are then a random sample of all.

    Args:
        scope: the round's key, or EVALUATION.
        policy: digest of the weights.
        draws: which draws of each prompt.
        answers: see `settings`.
    """
    name, seed, hashed = recipe.name, recipe.seed, settings(sampling, recipe.seed, answers)

    def of(prompt: Asked) -> list[Request]:
        ids = [lineage.candidate_id(name, scope, policy, prompt.prompt_id, n, hashed) for n in draws]
        return [Request(i, prompt, n, lineage.seed_of(i, seed)) for n, i in zip(draws, ids, strict=True)]

    def by_length(prompt: Asked) -> tuple:
        return len(prompt.prompt_ids), prompt.prompt_id

    size = max(1, sampling.wave_size // len(draws))  # prompts
    if sampling.until:
        asked = sorted(asked, key=lambda prompt: lineage.digest([scope, draws.start, prompt.prompt_id]))
        parts = [sorted(asked[i : i + size], key=by_length) for i in range(0, len(asked), size)]
    else:
        asked = sorted(asked, key=by_length)
        parts = [asked[i : i + size] for i in range(0, len(asked), size)]
    return [[request for prompt in part for request in of(prompt)] for part in parts]


def passes(sampling: Sampling) -> list[range]:
    """The draws of each pass over the prompts: one pass, or with `until` several."""
    return [
        range(i, min(i + sampling.draws, sampling.most_draws)) for i in range(0, sampling.most_draws, sampling.draws)
    ]


def pending(plan: Sequence[Sequence[Request]], there: Collection[str]) -> Iterator[tuple[int, list[Request]]]:
    """The waves that still miss candidates: each wave's number and its missing requests."""
    for number, wave in enumerate(plan):
        if missing := [request for request in wave if request.candidate_id not in there]:
            yield number, missing


class InProcess:
    """The backend that draws in this process, with Transformers: loads the policy, and releases its memory later."""

    def __init__(self, policy: Path, recipe: Recipe, task: ModuleType, device: Device):
        self.policy, self.recipe, self.task, self.device = policy, recipe, task, device

    def __enter__(self) -> "InProcess":
        self.model = models.load(self.policy, self.device, task=self.recipe.task)
        self.tokenizer = models.tokenizer(self.policy)
        return self

    def __exit__(self, *_: object) -> None:
        self.model = None
        release(self.device.kind)

    def draw(self, requests: Sequence[Request], sampling: Sampling) -> list[Candidate]:
        if sampling.source == "reference":
            return self._rate(requests)
        return self.task.draw(self.model, self.tokenizer, requests, sampling)

    def _rate(self, requests: Sequence[Request]) -> list[Candidate]:
        """The reference answers, with their probability under the policy; nothing is sampled."""
        asked = list({request.asked: None for request in requests})
        texts = [prompt.reference for prompt in asked]
        ids = dict(zip(asked, self.task.completion_ids(self.model, self.tokenizer, texts), strict=True))
        samples = [Sample(prompt.prompt_id, prompt.prompt_ids, ids[prompt]) for prompt in asked]
        rated = self.task.log_probabilities(self.model, samples, self.tokenizer.pad_token_id)
        log_p = dict(zip(asked, rated, strict=True))
        return [
            Candidate(request, request.asked.reference, ids[request.asked], "stop", None, log_p[request.asked])
            for request in requests
        ]
