"""Training: one loop from weights and accepted samples to better weights.

Belongs here: the order of the samples, a step's loss, the optimiser and its schedule, and saved
states from which a killed run continues. Not: which samples were accepted (acceptance.py), the
likelihood of one (tasks/), or where weights are kept (models/).

This is a loop of our own and not Transformers' Trainer, for four guarantees that can be read off the
code: a sample's weight scales its gradient exactly; a step is normalised by the tokens of the whole
step, so accumulation changes nothing; the order depends only on the samples and the seed; and a run
killed at any moment and repeated on a CPU ends in exactly the weights of an uninterrupted run.

Not supported: several processes, gradient checkpointing, loss scaling for float16 (such devices
train in float32).
"""

import hashlib
import logging
import math
import os
import pickle
import random
import time
from array import array
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from rsft_pipeline.devices import Device, own_rng
from rsft_pipeline.lineage import digest
from rsft_pipeline.models.configuration import context_of
from rsft_pipeline.recipe.training import Training

log = logging.getLogger(__name__)

GROUPS = 8  # the fewest groups in a step, if samples of one prompt are kept together
WORTH_SHARING = 32  # from this many prompt tokens on, keeping a prompt's samples together is worth it


class TrainingError(RuntimeError):
    """Samples that cannot be trained on, or a loss that stopped being a number."""


@dataclass(frozen=True)
class Sample:
    """An accepted candidate as it is trained on: the token ids that were drawn, never re-encoded text."""

    candidate_id: str
    prompt_ids: list[int]
    completion_ids: list[int]  # including the EOS, if it was drawn
    weight: float = 1.0


class Step(NamedTuple):
    """One optimiser step."""

    step: int  # from 1
    loss: float  # Σ w·NLL / Σ tokens, nats per token
    learning_rate: float
    tokens: int  # completion tokens
    grad_norm: float  # before clipping


@dataclass
class History:
    """What the training did, including the earlier steps of a resumed run."""

    steps: list[Step] = field(default_factory=list)
    seconds: float = 0.0
    resumed_from: int = 0  # the last step of the saved state that was resumed; 0: trained from the start

    @property
    def tokens(self) -> int:
        """Completion tokens trained on, counted again in each epoch."""
        return sum(step.tokens for step in self.steps)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


def fit(
    model,
    samples: Sequence[Sample],
    training: Training,
    *,
    task: ModuleType,
    start: str,
    seed: int,
    device: Device,
    pad_id: int,
    scratch: Path,
    on_step: Callable[[int, int, float, int], None] = lambda step, steps, loss, tokens: None,
) -> History:
    """Train the model's trainable parameters in place, in float32 (autocast to bf16 where the device says so).

    A step minimises Σᵢ wᵢ·NLLᵢ / Σᵢ Tᵢ over all of its samples, NLLᵢ and Tᵢ being the summed negative
    log-likelihood and the number of sample i's completion tokens.

    Args:
        model: on the device, its parameters in float32; `requires_grad` says which train.
        task: the module for the model's kind: `collate(samples, pad_id)` and `token_losses(model, batch)`.
        start: identifies the untrained model completely (its digest and what was made trainable): a state
            saved from another start, other samples, settings or seed is not resumed.
        scratch: folder of the saved state. A repeated call with the same arguments continues from it; the
            caller deletes it once the checkpoint is safe.
        on_step: called after each step with its number, the number of steps, its loss and its tokens.

    Raises:
        TrainingError: no samples, one without prompt or completion or longer than the model's context,
            nothing trainable, or a loss or gradient that is not finite; the message names the candidates.
    """
    import torch

    _check(samples, model)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise TrainingError("no parameter of the model is trainable: look at the recipe's `model.train`")
    if any(parameter.dtype != torch.float32 for parameter in parameters.values()):
        raise TrainingError("the trainable weights are not float32: load the model with train=True")
    steps = plan(_shareable(samples, task), training.batch_size, training.epochs, seed)
    optimizer = _optimizer(parameters.values(), training)
    state = State(Path(scratch) / "state.pt", _fingerprint(samples, training, start, seed, device, parameters))

    with own_rng(device.kind):
        torch.manual_seed(seed)
        history = state.restore(parameters, optimizer) or History()
        began = time.perf_counter() - history.seconds
        model.train()
        for number, chosen in enumerate(steps[history.resumed_from :], start=history.resumed_from + 1):
            batch = [samples[i] for i in chosen]
            tokens = sum(len(sample.completion_ids) for sample in batch)
            loss = torch.zeros((), device=device.kind)
            for part in parts(batch, training.accumulation, part_tokens(device.kind)):
                loss += _backward(model, part, tokens, task, device, pad_id)
            norm = torch.nn.utils.clip_grad_norm_(parameters.values(), training.clip)
            loss, norm = torch.stack([loss, norm]).tolist()  # one wait for the device, not two
            if not math.isfinite(loss) or not math.isfinite(norm):
                raise TrainingError(
                    f"step {number} of {len(steps)}: the loss is {loss} and the gradient's norm {norm}; a lower "
                    f"`training.learning_rate` may help. Candidates: {', '.join(s.candidate_id for s in batch[:8])}"
                    f"{', …' if len(batch) > 8 else ''}"
                )
            rate = training.learning_rate * factor(number, len(steps), training)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
            history.steps.append(Step(number, loss, rate, tokens, norm))
            history.seconds = time.perf_counter() - began
            if number % training.save_every == 0:
                state.save(parameters, optimizer, history)
            on_step(number, len(steps), loss, tokens)
        model.eval()
    return history


def _backward(model, part: Sequence[Sample], tokens: int, task: ModuleType, device: Device, pad_id: int):
    """Add a part's gradients to those of its step, which has so many tokens. Returns the part's share of the loss."""
    import torch

    inputs = {name: tensor.to(device.kind) for name, tensor in task.collate(part, pad_id).items()}
    weights = torch.tensor([sample.weight for sample in part], device=device.kind)
    with torch.autocast(device.kind, torch.bfloat16, enabled=device.dtype == "bfloat16"):
        loss = (weights * task.token_losses(model, inputs)).sum() / tokens
    loss.backward()
    return loss.detach()


# --- the order of the samples -----------------------------------------------------------------


def plan(prompts: Sequence[Hashable], batch_size: int, epochs: float, seed: int) -> list[list[int]]:
    """Which samples each step consists of: positions in `prompts`, which holds each sample's prompt.

    Every epoch is a new shuffle, the last one cut short if `epochs` is not whole; steps may span two
    epochs, so that all but the last have `batch_size` samples. Shuffled are groups of samples of one
    prompt, each at most 1 / GROUPS of a step, because what a group has in common is computed only once.
    Length plays no part in the order: in a step of short samples a token would count for more than in a
    step of long ones.
    """
    rng = random.Random(seed)
    of_prompt: dict[Hashable, list[int]] = {}
    for i, prompt in enumerate(prompts):
        of_prompt.setdefault(prompt, []).append(i)
    size = max(1, batch_size // GROUPS)
    order: list[int] = []
    total = max(1, round(epochs * len(prompts)))
    while len(order) < total:
        groups = []
        for same in of_prompt.values():
            same = rng.sample(same, len(same))
            groups += [same[i : i + size] for i in range(0, len(same), size)]
        rng.shuffle(groups)
        order += [i for group in groups for i in group]
    return [order[i : min(i + batch_size, total)] for i in range(0, total, batch_size)]


def _shareable(samples: Sequence[Sample], task: ModuleType) -> list[Hashable]:
    """Each sample's prompt, if the task computes a prompt once for all its samples and that is worth it.

    Otherwise each sample is its own group: several of one prompt make a step less varied.
    """
    shares = getattr(task, "SHARES_PROMPTS", False)
    return [
        tuple(sample.prompt_ids) if shares and len(sample.prompt_ids) >= WORTH_SHARING else i
        for i, sample in enumerate(samples)
    ]


def factor(step: int, steps: int, training: Training) -> float:
    """The learning rate's share of its peak, in (0, 1], at a step counted from 1: warm-up, then decay to 0."""
    warmup = round(training.warmup * steps)
    if step <= warmup:
        return step / (warmup + 1)
    done = (step - 1 - warmup) / (steps - warmup)
    match training.schedule:
        case "constant":
            return 1.0
        case "linear":
            return 1.0 - done
        case "cosine":
            return (1.0 + math.cos(math.pi * done)) / 2


def parts(batch: Sequence[Sample], count: int, tokens: int) -> list[list[Sample]]:
    """A step's samples in parts that are computed one after another.

    Samples of one prompt are neighbours (a task may compute what they share once), and so are those of similar length.

    Args:
        count: a part has at most 1 / `count` of the samples, rounded up.
        tokens: a part has at most this many, padding included; a longer sample is a part of its own.
    """
    of_prompt: dict[tuple[int, ...], list[Sample]] = {}
    for sample in sorted(batch, key=_length):
        of_prompt.setdefault(tuple(sample.prompt_ids), []).append(sample)
    ordered = [sample for same in sorted(of_prompt.values(), key=lambda same: _length(same[-1])) for sample in same]
    most = math.ceil(len(batch) / count)  # samples
    found: list[list[Sample]] = []
    longest = 0
    for sample in ordered:
        longest = max(longest, _length(sample))
        if not found or len(found[-1]) == most or longest * (len(found[-1]) + 1) > tokens:
            found.append([])
            longest = _length(sample)
        found[-1].append(sample)
    return found


def part_tokens(device: str) -> int:
    """The most tokens in a part on this kind of device."""
    return 1024 if device == "cpu" else 8192


def _length(sample: Sample) -> int:
    return len(sample.prompt_ids) + len(sample.completion_ids)


def _optimizer(parameters, training: Training):
    """AdamW; vectors (norms and biases) have no weight decay."""
    import torch

    parameters = list(parameters)
    return torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": training.weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=training.learning_rate,
        fused=True,
    )


def _check(samples: Sequence[Sample], model) -> None:
    if not samples:
        raise TrainingError("there are no samples to train on")
    context = context_of(model.config) or math.inf
    for sample in samples:
        if not sample.completion_ids:
            raise TrainingError(f"candidate {sample.candidate_id} has no completion tokens: nothing would be trained")
        if not sample.prompt_ids:
            raise TrainingError(f"candidate {sample.candidate_id} has no prompt tokens to predict its first token from")
        if (length := room(sample, model)) > context:
            raise TrainingError(
                f"candidate {sample.candidate_id} has {length} tokens; the model's context is {context}"
            )


def room(sample: Sample, model) -> int:
    """Tokens of the model's context that a sample takes up.

    An encoder-decoder has its context twice, for the prompt and for the completion; a classifier's label needs none.
    """
    lengths = len(sample.prompt_ids), len(sample.completion_ids)
    apart = model.config.is_encoder_decoder or not model.can_generate()
    return max(lengths) if apart else sum(lengths)


# --- continuing after a kill ------------------------------------------------------------------


class State:
    """A training's saved state: one file, replaced atomically, that only the same training resumes."""

    def __init__(self, path: Path, fingerprint: str):
        self.path, self.fingerprint = path, fingerprint

    def save(self, parameters: dict, optimizer, history: History) -> None:
        import torch

        self.path.parent.mkdir(parents=True, exist_ok=True)
        rng = {"cpu": torch.get_rng_state()}
        if next(iter(parameters.values())).is_cuda:
            rng["cuda"] = torch.cuda.get_rng_state()
        temporary = self.path.with_suffix(f".{os.getpid()}")
        with open(temporary, "wb") as file:
            torch.save(
                {
                    "fingerprint": self.fingerprint,
                    "weights": {name: p.detach() for name, p in parameters.items()},
                    "optimizer": optimizer.state_dict(),
                    "rng": rng,
                    "steps": [tuple(step) for step in history.steps],
                    "seconds": history.seconds,
                },
                file,
            )
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)

    def restore(self, parameters: dict, optimizer) -> History | None:
        """Restore the saved state; if there is none of this training, change nothing and return None."""
        import torch

        if not self.path.exists():
            return None
        try:
            saved = torch.load(self.path, map_location="cpu", weights_only=True)
        except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
            log.warning("%s cannot be read (%s): training starts from the beginning", self.path, error)
            return None
        if saved["fingerprint"] != self.fingerprint:
            log.warning("%s is of other samples, settings or weights: training starts from the beginning", self.path)
            return None
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(saved["weights"][name])
        optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["rng"]["cpu"])
        if "cuda" in saved["rng"]:
            torch.cuda.set_rng_state(saved["rng"]["cuda"])
        steps = [Step(*step) for step in saved["steps"]]
        log.info("training goes on after step %d", len(steps))
        return History(steps, saved["seconds"], resumed_from=len(steps))


def _fingerprint(samples, training: Training, start: str, seed: int, device: Device, parameters: dict) -> str:
    """Digest of everything that the weights after a given step depend on."""
    drawn = hashlib.sha256()
    for sample in samples:
        drawn.update(repr((sample.candidate_id, sample.weight, len(sample.prompt_ids))).encode())
        drawn.update(array("q", [*sample.prompt_ids, *sample.completion_ids]).tobytes())
    shapes = {name: list(parameter.shape) for name, parameter in parameters.items()}
    settings = training.model_dump(mode="json", exclude={"save_every", "start", "data"})
    return digest([drawn.hexdigest(), settings, start, seed, device.kind, device.dtype, shapes])
