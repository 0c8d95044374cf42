"""Shared-prefix decoding: a prompt is read once, and all its draws attend to the same keys and values of it.

A *row* is a completion in progress, with all the draws of its prompt that have chosen the same tokens so far: they
are computed once, and separate when they choose differently. The model runs Transformers' own code, layer by layer:
only its cache (cache.py) and its attention function (attention.py) are ours.

Belongs here: the loop that keeps many draws going at once. Not: what a draw is and how a token is chosen (draws.py).

This module imports torch and transformers; import it inside functions.
"""

import contextlib
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch  # noqa: TID253
from transformers import DynamicCache, PreTrainedModel  # noqa: TID253
from transformers.cache_utils import Cache  # noqa: TID253

from rsft_pipeline.decoding import cpu_attention
from rsft_pipeline.decoding.attention import attention_of, windows
from rsft_pipeline.decoding.cache import CompiledCache, SharedPrefixCache
from rsft_pipeline.decoding.draws import Draw, Drawn, Shape, choose, uniforms
from rsft_pipeline.decoding.memory import PREFILL_TOKENS, ROWS
from rsft_pipeline.padding import left_padded

Waiting = deque[tuple[int, Draw]]  # draws of one prompt that have not begun, each with its number
PREFILL_PADDING = 1.25  # largest ratio of the longest to the shortest prompt that are read in one pass
STRIDE = {"cuda": 8}  # steps between checks which rows have ended, for which the host has to wait; 1 elsewhere


def draw(
    model: Any, draws: Sequence[tuple[int, Draw]], shape: Shape, pad_id: int, at_once: int
) -> Iterator[tuple[int, Drawn]]:
    """Make the draws, at most `at_once` at a time: number and result of each, in the order in which they end.

    Raises:
        Unsupported: the model does something that this module does not compute; the message says what.
    """
    loop = Loop(model, draws, shape, pad_id, at_once)
    with attention_of(model), contextlib.closing(loop.cache):
        yield from loop.run()


class Prefix(NamedTuple):
    """A prompt that has been read."""

    length: int  # tokens
    waiting: Waiting
    logits: torch.Tensor  # of the first token of a completion, [vocabulary]


class Loop:
    """Draws in progress, and the rows that they are on. Finished draws leave, waiting ones begin, until none waits.

    A row's state is at the row's index in each tensor, a draw's random numbers at the draw's index. Rows, draws and
    places are kept without holes: the last ones move into holes. The host knows every suffix's length without asking
    the device, so that nothing waits between two checks which rows have ended.
    """

    def __init__(
        self, model: PreTrainedModel, draws: Sequence[tuple[int, Draw]], shape: Shape, pad_id: int, capacity: int
    ):
        """Args:
        draws: number and draw of each to make.
        capacity: the most draws at once; each may eventually need a row of its own.
        """
        self.model, self.shape, self.pad_id, self.device = model, shape, pad_id, model.device
        by_prompt: dict[tuple[int, ...], Waiting] = {}
        for number, draw in draws:
            by_prompt.setdefault(draw.prompt_ids, deque()).append((number, draw))
        self.unread = deque(by_prompt.items())  # prompts not read yet, with their draws
        self.capacity = capacity = min(capacity, len(draws))
        self.busy = min(capacity, ROWS[self.device.type])
        most = max(map(len, by_prompt.values()))
        # Twice as many prompts as capacity needs, so that the last draws of a few prompts do not keep others out.
        self.places = min(len(by_prompt), 2 * -(-capacity // most))
        longest = max(map(len, by_prompt))
        self.cache = self._cache(longest)

        def zeros(*size: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(size, dtype=dtype, device=self.device)

        self.u = zeros(capacity, shape.max_tokens, dtype=torch.float64)
        self.token = zeros(capacity, dtype=torch.long)
        self.alive = zeros(capacity, dtype=torch.bool)
        self.stopped = zeros(capacity, dtype=torch.bool)
        self.drawn = zeros(capacity, dtype=torch.long)
        self.log_q = zeros(capacity, dtype=torch.float64)
        self.log_p = zeros(capacity, dtype=torch.float64)
        self.tokens = zeros(capacity, shape.max_tokens, dtype=torch.long)
        self.states = [self.token, self.alive, self.stopped, self.drawn, self.log_q, self.log_p, self.tokens]
        self.stops = torch.tensor(sorted(shape.stop_ids), dtype=torch.long, device=self.device)
        # On the host: for each draw its number and row; for each row its place and age; for each place its prompt.
        self.number: list[int] = []
        self.row: list[int] = []
        self.place: list[int] = []
        self.age: list[int] = []
        self.prompts: list[Prefix] = []

    def _cache(self, longest: int) -> SharedPrefixCache:
        """The cache for prompts of up to `longest` tokens and their draws."""
        tokens = self.shape.max_tokens
        compiled = cpu_attention.usable(self.device, self.model.dtype)
        return (CompiledCache if compiled else SharedPrefixCache)(
            [None if w is None or longest + tokens <= w else w for w in windows(self.model)],
            self.places,
            self.capacity,
            longest,
            max(1, tokens - 1),
            self.device,
        )

    def run(self) -> Iterator[tuple[int, Drawn]]:
        """Number and result of each draw, as it ends."""
        while self.unread or self.prompts:
            self._admit()
            yield from self._release()
            if self.number:
                self._arrange()
                left = self.shape.max_tokens - 1 - max(self.age)
                shared = len(self.row) > len(self.place)  # then check after each step, because rows may split
                for _ in range(1 if shared else min(left, STRIDE.get(self.device.type, 1))):
                    self._step()
                yield from self._release()

    # --- a step -----------------------------------------------------------------------------

    def _arrange(self) -> None:
        """Tell the device which place each row has, and which row each draw."""
        longest = max(prompt.length for prompt in self.prompts)
        self.cache.seat(self.place, len(self.prompts), longest, self.device)
        self.row_of_draw = torch.tensor(self.row, device=self.device)

    def _step(self) -> None:
        """One more token for every draw."""
        rows, cache, row = len(self.place), self.cache, self.row_of_draw
        cache.look(rows, max(self.age))
        logits = self._logits(rows)
        cache.age[:rows] += 1
        cache.position[:rows] += 1
        self.age = [age + 1 for age in self.age]
        age = cache.age[row]
        chosen = choose(logits, row, self.u[: len(row)].gather(1, age[:, None])[:, 0], self.shape)
        if len(self.row) > rows:
            row = self._part(chosen[0])
        self._note(row, age, *chosen)

    def _logits(self, rows: int) -> torch.Tensor:
        """Logits of what follows each row's newest token, [rows, vocabulary]."""
        return self.model(
            input_ids=self.token[:rows, None],
            position_ids=self.cache.position[:rows, None],
            past_key_values=self.cache,
            use_cache=True,
            shared_prefix=self.cache,
        ).logits[:, -1]

    def _part(self, chosen: torch.Tensor) -> torch.Tensor:
        """Split rows whose draws chose different tokens: one group keeps the row, each other group gets a new one.

        Returns:
            The row of each draw.
        """
        before, new = _groups(self.row, chosen)
        parting = np.r_[False, before[1:] == before[:-1]]
        rows = np.where(parting, len(self.place) - 1 + np.cumsum(parting), before)
        source, target = before[parting].tolist(), rows[parting].tolist()
        if source:
            self._copy(source, target)
        self.place += [self.place[row] for row in source]
        self.age += [self.age[row] for row in source]
        self.row = rows[new].tolist()
        return torch.tensor(self.row, device=self.device)

    def _note(
        self, row: torch.Tensor, age: torch.Tensor, chosen: torch.Tensor, log_q: torch.Tensor, log_p: torch.Tensor
    ) -> None:
        """Record each draw's newest token in its row, unless it has ended. Draws of one row write the same values."""
        alive = self.alive[row]
        self.token[row] = chosen
        self.tokens[row, age] = chosen
        self.log_q[row] += log_q.where(alive, 0.0)
        self.log_p[row] += log_p.where(alive, 0.0)
        self.drawn[row] += alive
        stopped = torch.isin(chosen, self.stops)
        self.stopped[row] |= stopped & alive
        self.alive[row] &= ~stopped & (age + 1 < self.shape.max_tokens)

    def _copy(self, source: list[int], target: list[int]) -> None:
        """Copy the source rows to the target rows."""
        self.cache.copy_rows(source, target)
        for state in self.states:
            state[target] = state[source]

    # --- leaving and beginning --------------------------------------------------------------

    def _release(self) -> Iterator[tuple[int, Drawn]]:
        """Remove the rows that have ended, with their draws, and the prompts without rows and waiting draws."""
        alive = self.alive[: len(self.place)].tolist()  # the host waits here
        if all(alive):
            return
        results = self._results([row for row, living in enumerate(alive) if not living])
        yield from ((number, results[row]) for number, row in zip(self.number, self.row, strict=True) if not alive[row])
        self._keep_draws([alive[row] for row in self.row])
        self._keep_rows(alive)
        present = set(self.place)
        self._keep_prompts([place in present or bool(prompt.waiting) for place, prompt in enumerate(self.prompts)])

    def _results(self, rows: list[int]) -> dict[int, Drawn]:
        """What was drawn on each of these rows."""
        states = (self.tokens, self.drawn, self.stopped, self.log_q, self.log_p)
        values = zip(*(state[rows].tolist() for state in states), strict=True)
        return {
            row: Drawn(tokens[:drawn], stopped, log_q, log_p)
            for row, (tokens, drawn, stopped, log_q, log_p) in zip(rows, values, strict=True)
        }

    def _keep_draws(self, kept: list[bool]) -> None:
        source, target = _moves(kept)
        self.number, self.row = (_moved(values, source, target, sum(kept)) for values in (self.number, self.row))
        if source:
            self.u[target] = self.u[source]

    def _keep_rows(self, kept: list[bool]) -> None:
        source, target = _moves(kept)
        self.place, self.age = (_moved(values, source, target, sum(kept)) for values in (self.place, self.age))
        if source:
            self._copy(source, target)
            self.row = _renamed(self.row, source, target)

    def _keep_prompts(self, kept: list[bool]) -> None:
        source, target = _moves(kept)
        self.prompts = _moved(self.prompts, source, target, sum(kept))
        if source:
            self.cache.move_places(source, target)
            self.place = _renamed(self.place, source, target)

    def _admit(self) -> None:
        """Begin waiting draws while there is room, reading further prompts once there is room for enough."""
        room = self._room()
        room -= self._start(room)
        if self.unread and room >= max(1, self.busy // 8):
            wanted: list[tuple[tuple[int, ...], Waiting]] = []
            # All draws of a prompt together, if possible: draws that begin later share no rows with earlier ones.
            while self.unread and len(self.prompts) + len(wanted) < self.places and room >= self._together():
                wanted.append(self.unread.popleft())
                room -= len(wanted[-1][1])
            for batch in _batches(wanted):
                self._read(batch)
            self._start(self._room())

    def _room(self) -> int:
        """How many draws may begin: enough to keep the device busy, if they share rows as those in progress do."""
        draws, rows = len(self.row), len(self.place)
        return min(self.capacity - draws, (self.busy - rows) * draws // rows if rows else self.busy)

    def _together(self) -> int:
        """Room that the next prompt's draws need to begin together, but no more than half of the busy rows."""
        return min(len(self.unread[0][1]), max(1, self.busy // 2))

    def _read(self, prompts: list[tuple[tuple[int, ...], Waiting]]) -> None:
        """Read prompts in one forward pass and keep their prefixes."""
        ids, waiting = zip(*prompts, strict=True)
        lengths, (read, logits) = list(map(len, ids)), self._forward(ids)
        self.cache.keep_prefixes(slice(len(self.prompts), len(self.prompts) + len(ids)), read, lengths)
        self.prompts += map(Prefix, lengths, waiting, logits)

    def _forward(self, prompts: Sequence[tuple[int, ...]]) -> tuple[Cache, torch.Tensor]:
        """Keys and values of the prompts, padded, and the logits of what follows each, [prompts, vocabulary]."""
        ids, mask, positions = left_padded(prompts, self.pad_id, self.device)
        read = DynamicCache(config=self.model.config)
        logits = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=read,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        return read, logits

    def _start(self, room: int) -> int:
        """Begin up to `room` waiting draws of the prompts that have been read. Returns how many."""
        first, seeds, places, prompt_of_draw = len(self.number), [], [], []
        for place, prompt in enumerate(self.prompts):
            if prompt.waiting and len(seeds) < room:
                places.append(place)
            while prompt.waiting and len(seeds) < room:
                number, draw = prompt.waiting.popleft()
                self.number.append(number)
                seeds.append(draw.seed)
                prompt_of_draw.append(len(places) - 1)  # index into `places`
        if not seeds:
            return 0
        u = torch.from_numpy(uniforms(seeds, self.shape.max_tokens)).to(self.device)
        self.u[first : len(self.number)] = u
        logits = torch.stack([self.prompts[place].logits for place in places])
        chosen = choose(logits, torch.tensor(prompt_of_draw, device=self.device), u[:, 0], self.shape)
        prompt_of_row, row_of_draw = _groups(prompt_of_draw, chosen[0])
        row_of_draw += len(self.place)
        self._begin([places[i] for i in prompt_of_row])
        self.row += row_of_draw.tolist()
        row = torch.from_numpy(row_of_draw).to(self.device)
        self._note(row, torch.zeros_like(row), *chosen)
        return len(seeds)

    def _begin(self, places: list[int]) -> None:
        """Add a row without tokens for each of these places."""
        rows = slice(len(self.place), len(self.place) + len(places))
        self.place += places
        self.age += [0] * len(places)
        self.cache.begin(rows, places)
        self.drawn[rows] = 0
        self.alive[rows], self.stopped[rows] = True, False
        self.log_q[rows], self.log_p[rows] = 0.0, 0.0


def _batches(prompts: list[tuple[tuple[int, ...], Any]]) -> Iterator[list[tuple[tuple[int, ...], Any]]]:
    """Batches of prompts to read together: of similar length, and at most PREFILL_TOKENS."""
    batch: list[tuple[tuple[int, ...], Any]] = []
    for prompt in sorted(prompts, key=lambda prompt: len(prompt[0])):
        length = len(prompt[0])
        if batch and (length > PREFILL_PADDING * len(batch[0][0]) or length * (len(batch) + 1) > PREFILL_TOKENS):
            yield batch
            batch = []
        batch.append(prompt)
    if batch:
        yield batch


def _moves(kept: Sequence[bool]) -> tuple[list[int], list[int]]:
    """From where to where the last kept entries move to fill the holes in front."""
    number = sum(kept)
    holes = [i for i in range(number) if not kept[i]]
    return [i for i in range(number, len(kept)) if kept[i]], holes


def _groups(of: Sequence[int], chosen: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Groups of draws with the same `of` (row or place) that chose the same token: the `of` of each group, in order,
    and the group of each draw.
    """
    token = chosen.cpu().numpy()
    stride = int(token.max()) + 1
    groups, group = np.unique(np.asarray(of) * stride + token, return_inverse=True)
    return groups // stride, group


def _renamed(values: Sequence[int], source: list[int], target: list[int]) -> list[int]:
    names = dict(zip(source, target, strict=True))
    return [names.get(value, value) for value in values]


def _moved(values: list, source: list[int], target: list[int], number: int) -> list:
    values = list(values)
    for i, j in zip(source, target, strict=True):
        values[j] = values[i]
    return values[:number]
