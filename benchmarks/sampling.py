"""Sampling benchmark: N draws of each prompt, by the shared-prefix sampler and by what people would use instead.

    python -m benchmarks.sampling                       # on a CPU: some minutes
    python -m benchmarks.sampling qwen2-1.5b qwen2-7b   # on a GPU
    python -m benchmarks.sampling t5-small --out docs/benchmarks/seq2seq   # an encoder-decoder, on a CPU

All ways run in one process, in turns, on the same random weights and prompts. A ratio is the median
of the ratios within a turn: absolute times do not carry over to other machines, and other load affects
all ways of a turn alike. Results go to docs/benchmarks: JSON, a Markdown table and a plot.

The floor is what the draws would cost if only the weights had to be applied: on a CPU the linear layers
alone on the same number of tokens (each prompt once); on a GPU the larger of two times, plus reading the
prompts: the bytes to read in each step (weights, each prompt's prefix once, suffixes) over the measured
memory bandwidth, and the arithmetic over the measured rate.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import transformers

from benchmarks.results import FOLDER, bars, publish, table
from rsft_pipeline import decoding
from rsft_pipeline.decoding import Draw, Shape, plain
from rsft_pipeline.decoding.memory import state_bytes

# The lengths of GSM8K's test questions at 16 evenly spaced quantiles, in tokens: 4 characters per token, and 40
# tokens of chat template.
GSM8K = (67, 73, 77, 80, 83, 87, 91, 94, 97, 100, 104, 110, 114, 122, 133, 157)


@dataclass(frozen=True)
class Case:
    """A model's architecture, and what is drawn from it."""

    config: transformers.PreTrainedConfig
    lengths: tuple[int, ...]  # tokens of each prompt
    draws: int
    tokens: int  # longest completion
    stop_share: float = 0.0  # of the vocabulary: with random weights, about the probability of ending at each token


def llama_7m() -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=4096,
        tie_word_embeddings=True,
    )


def qwen2(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocabulary: int, tied: bool):
    return transformers.Qwen2Config(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
    )


CPU_CASES = {
    "mixed-prompts": lambda: Case(llama_7m(), tuple(range(60, 241, 12)), 16, 64),
    "short-prompts": lambda: Case(llama_7m(), (10,) * 16, 16, 64),
    "uneven-ends": lambda: Case(llama_7m(), tuple(range(60, 241, 12)), 16, 96, stop_share=1 / 32),
}
GPU_CASES = {
    "qwen2-1.5b": lambda: Case(qwen2(1536, 8960, 28, 12, 2, 151936, True), GSM8K, 64, 256),
    "qwen2-1.5b-uneven": lambda: Case(qwen2(1536, 8960, 28, 12, 2, 151936, True), GSM8K, 64, 256, stop_share=1 / 128),
    "qwen2-7b": lambda: Case(qwen2(3584, 18944, 28, 28, 4, 152064, False), GSM8K, 64, 256),
    "qwen2-7b-16": lambda: Case(qwen2(3584, 18944, 28, 28, 4, 152064, False), GSM8K, 16, 256),
}


def t5_small() -> transformers.T5Config:
    return transformers.T5Config(decoder_start_token_id=0)  # the defaults are t5-small's sizes


ENCODER_DECODER_CASES = {
    "t5-small": lambda: Case(t5_small(), tuple(range(60, 241, 12)), 16, 64),
    "t5-small-uneven": lambda: Case(t5_small(), tuple(range(60, 241, 12)), 16, 96, stop_share=1 / 32),
}


@dataclass
class Work:
    """A model, and the draws to make for each prompt, with seeds."""

    model: transformers.PreTrainedModel
    prompts: list[list[int]]
    draws: int
    shape: Shape

    def __post_init__(self) -> None:
        self.device = self.model.device.type
        self.encoder_decoder = self.model.config.is_encoder_decoder
        self.asked = [
            Draw(tuple(prompt), 1000 * i + draw) for i, prompt in enumerate(self.prompts) for draw in range(self.draws)
        ]

    # Each method below is a way to make all the draws, and returns how many tokens they have.

    def shared_prefix(self) -> int:
        return sum(len(drawn.token_ids) for drawn in decoding.decode(self.model, self.asked, self.shape, 0))

    def plain_loop(self) -> int:
        """This project's loop for models that cannot share: ended rows leave, each row has its own prefix."""
        with torch.inference_mode():
            drawn = list(plain.draw(self.model, list(enumerate(self.asked)), self.shape, 0, len(self.asked)))
        return sum(len(one.token_ids) for _, one in drawn)

    def generate(self) -> int:
        """Transformers' `generate`, one call for 16 prompts, padded on the left, an encoder's on the right."""
        return sum(self._generate(self.prompts[i : i + 16]) for i in range(0, len(self.prompts), 16))

    def generate_each(self) -> int:
        """The same with one call for each prompt, as in TRL's BestOfNSampler until it was removed."""
        return sum(self._generate([prompt]) for prompt in self.prompts)

    def _generate(self, prompts: list[list[int]]) -> int:
        width = max(map(len, prompts))
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, prompt in enumerate(prompts):
            columns = slice(len(prompt)) if self.encoder_decoder else slice(width - len(prompt), width)
            ids[i, columns] = torch.tensor(prompt)
            mask[i, columns] = 1
        with torch.inference_mode():
            out = self.model.generate(
                input_ids=ids.to(self.device),
                attention_mask=mask.to(self.device),
                generation_config=self._generation(),
            )
        first = 1 if self.encoder_decoder else width  # the decoder's start token, or the prompts
        return sum(map(self._length, out[:, first:].tolist()))

    def generate_batch(self) -> int:
        """Transformers' continuous batching, which forks a prompt's draws from one prefill."""
        cache = None
        if self.device == "cpu":  # by default its cache would fill nine tenths of the memory, taking a minute
            tokens = len(self.asked) * (max(map(len, self.prompts)) + self.shape.max_tokens)
            cache = transformers.ContinuousBatchingConfig(
                page_size=16, num_blocks=tokens // 16 + 64, max_batch_tokens=2048
            )
        out = self.model.generate_batch(
            inputs=self.prompts,
            generation_config=self._generation(),
            continuous_batching_config=cache,
            progress_bar=False,
        )
        if len(out) != len(self.asked):
            raise RuntimeError(f"generate_batch returned {len(out)} of {len(self.asked)} draws")
        return sum(len(one.generated_tokens) for one in out.values())

    def _generation(self) -> transformers.GenerationConfig:
        return transformers.GenerationConfig(
            do_sample=True,
            top_k=0,
            top_p=1.0,
            max_new_tokens=self.shape.max_tokens,
            num_return_sequences=self.draws,
            eos_token_id=sorted(self.shape.stop_ids) or None,
            pad_token_id=0,
            decoder_start_token_id=0 if self.encoder_decoder else None,
        )

    def _length(self, ids: list[int]) -> int:
        ended = [i for i, token in enumerate(ids) if token in self.shape.stop_ids]
        return ended[0] + 1 if ended else len(ids)


def random_model(case: Case, device: str) -> transformers.PreTrainedModel:
    """The case's model, with random weights."""
    torch.manual_seed(0)
    kind = transformers.AutoModelForSeq2SeqLM if case.config.is_encoder_decoder else transformers.AutoModelForCausalLM
    with torch.device(device):
        model = kind.from_config(case.config, dtype=torch.bfloat16 if device == "cuda" else torch.float32).eval()
    model.generation_config = transformers.GenerationConfig(pad_token_id=0, decoder_start_token_id=0)
    return model


def random_work(case: Case, model: transformers.PreTrainedModel) -> Work:
    """Prompts of random tokens, and as many stop tokens as the case says."""
    generator = np.random.default_rng(0)
    vocabulary = case.config.vocab_size
    stops = frozenset(int(i) for i in generator.choice(vocabulary, int(vocabulary * case.stop_share), False))
    prompts = [[int(i) for i in generator.integers(0, vocabulary, length)] for length in case.lengths]
    return Work(model, prompts, case.draws, Shape(1.0, 1.0, None, case.tokens, stops))


WAYS = ("shared_prefix", "plain_loop", "generate", "generate_each", "generate_batch")


# --- the floor --------------------------------------------------------------------------------


def floor(work: Work, tokens: int) -> float:
    """The fewest seconds in which `tokens` tokens can be drawn; see the top of this file."""
    return _bytes_floor(work, tokens) if work.device == "cuda" else _linear_floor(work, tokens)


def _linear_floor(work: Work, tokens: int) -> float:
    layers = {name: module for name, module in work.model.named_modules() if isinstance(module, torch.nn.Linear)}
    head = work.model.get_output_embeddings()
    if work.encoder_decoder:  # in T5's decoder, a prompt passes only through cross-attention's keys and values
        prompts = {
            n for n in layers if n.startswith("encoder.") or n.endswith(("EncDecAttention.k", "EncDecAttention.v"))
        }
        of_prompts = [layers[name] for name in prompts]
        of_draws = [layer for name, layer in layers.items() if name not in prompts]
    else:
        of_prompts, of_draws = [layer for layer in layers.values() if layer is not head], list(layers.values())
    inputs = {width: torch.randn(256, width) for width in {layer.in_features for layer in layers.values()}}
    with torch.inference_mode():
        a_draw = _time(lambda: [layer(inputs[layer.in_features]) for layer in of_draws], 8)
        a_prompt = _time(lambda: [layer(inputs[layer.in_features]) for layer in of_prompts], 8)
    return (a_draw * tokens + a_prompt * sum(map(len, work.prompts))) / 256


def _bytes_floor(work: Work, tokens: int) -> float:
    model, prompt_tokens = work.model, sum(map(len, work.prompts))
    rows, steps = len(work.asked), tokens / len(work.asked)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    if not model.config.tie_word_embeddings:  # only the rows' own vectors of the input embedding are read
        weights -= model.get_input_embeddings().weight.nbytes
    prefixes = state_bytes(model, prompt_tokens)
    suffixes = rows * state_bytes(model, 1) * steps / 2  # half as long on average
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / _time(lambda: target.copy_(source), 20)
    square = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    rate = 2 * 8192**3 / _time(lambda: square @ square, 20)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    bytes_seconds = steps * (weights + prefixes + suffixes) / bandwidth
    arithmetic_seconds = 2 * parameters * tokens / rate
    print(
        f"  bandwidth {bandwidth / 1e12:.2f} TB/s, {rate / 1e12:.0f} TFLOP/s; "
        f"bytes {bytes_seconds:.2f} s, arithmetic {arithmetic_seconds:.2f} s"
    )
    return max(bytes_seconds, arithmetic_seconds) + 2 * parameters * prompt_tokens / rate


def _time(call: Callable[[], object], times: int) -> float:
    """Median seconds of a call."""
    found = []
    for _ in range(times):
        _synchronize()
        start = time.perf_counter()
        call()
        _synchronize()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# --- measuring --------------------------------------------------------------------------------


def measure(name: str, case: Case, device: str, turns: int, ways: list[str]) -> dict:
    """Seconds and tokens of each way in each turn, and the floor of each turn."""
    model = random_model(case, device)
    result: dict = {
        "case": name,
        "config": type(case.config).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "lengths": case.lengths,
        "draws": case.draws,
        "tokens": case.tokens,
        "stop_share": case.stop_share,
        "state_bytes_per_draw": state_bytes(model, case.tokens),
        "state_bytes_per_prefix_token": state_bytes(model, 1),
        "ways": {},
        "errors": {},
        "floor_seconds": [],
    }
    small = replace(case, lengths=case.lengths[:2], draws=2, tokens=4)
    for turn in range(turns + 1):  # the first warms up
        work = random_work(small if device == "cpu" and turn == 0 else case, model)
        for way in ways:
            if way in result["errors"] or (turn > 1 and _hopeless(result, way)):
                continue
            try:
                if device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                _synchronize()
                start = time.perf_counter()
                tokens = getattr(work, way)()
                _synchronize()
                seconds = time.perf_counter() - start
            except Exception as error:  # a peer that does not run here is part of the result
                result["errors"][way] = f"{type(error).__name__}: {error}"[:300]
                result["ways"].pop(way, None)
                print(f"  {way}: {result['errors'][way]}", flush=True)
                continue
            finally:
                gc.collect()
                if device == "cuda":
                    torch.cuda.empty_cache()
            peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
            print(f"  turn {turn} {way:15} {seconds:8.2f} s {tokens:8d} tokens", flush=True)
            if turn:
                found = result["ways"].setdefault(way, {"seconds": [], "tokens": [], "peak_bytes": peak})
                found["seconds"].append(seconds)
                found["tokens"].append(tokens)
        if turn:
            drawn = result["ways"]["shared_prefix"]["tokens"][-1]
            result["floor_seconds"].append(floor(work, drawn))
    return result


def _hopeless(result: dict, way: str) -> bool:
    """Whether a way took over 3 times as long as `generate` in its first turn, so that one turn is enough."""
    ways = result["ways"]
    return "generate" in ways and ways[way]["seconds"][0] > 3 * ways["generate"]["seconds"][0]


def summary(result: dict) -> list[dict]:
    """A line for each way: medians, and medians over the turns of its speed relative to `generate` and to the floor."""
    rows = len(result["lengths"]) * result["draws"]
    per_token = {
        way: [s / t for s, t in zip(found["seconds"], found["tokens"], strict=True)]
        for way, found in result["ways"].items()
    }
    # A way that was not repeated is compared with the first turn of the others.
    floor_per_token = [
        s / t for s, t in zip(result["floor_seconds"], result["ways"]["shared_prefix"]["tokens"], strict=True)
    ]
    lines = []
    for way, found in result["ways"].items():
        mine = per_token[way]
        over = per_token.get("generate")
        lines.append(
            {
                "way": way,
                "seconds": statistics.median(found["seconds"]),
                "tokens_per_second": 1 / statistics.median(mine),
                "samples_per_second": rows / statistics.median(found["seconds"]),
                "over_generate": over and statistics.median(g / m for g, m in zip(over, mine, strict=False)),
                "of_floor": statistics.median(f / m for f, m in zip(floor_per_token, mine, strict=False)),
                "peak_gb": found["peak_bytes"] and found["peak_bytes"] / 1e9,
            }
        )
    return lines


# --- writing ----------------------------------------------------------------------------------


def report(result: dict) -> str:
    """A case as Markdown."""
    lengths = result["lengths"]
    ends = f"up to {result['tokens']} tokens, each ending with probability {result['stop_share']:.3f}"
    drawn = ends if result["stop_share"] else f"{result['tokens']} tokens"
    lines = [
        f"### {result['case']}",
        "",
        f"{result['parameters'] / 1e6:,.0f} M parameters; {len(lengths)} prompts of {min(lengths)} to {max(lengths)} "
        f"tokens × {result['draws']} draws × {drawn}; {len(result['floor_seconds'])} turns. State: "
        f"{result['state_bytes_per_draw'] / 1e6:.2f} MB a draw, "
        f"{result['state_bytes_per_prefix_token'] / 1e3:.1f} kB a token of a prompt.",
        "",
        table(
            ["way", "seconds", "tokens/s", "samples/s", "× `generate`", "of the floor", "peak memory"],
            (
                [
                    line["way"],
                    f"{line['seconds']:.2f}",
                    f"{line['tokens_per_second']:,.0f}",
                    f"{line['samples_per_second']:.1f}",
                    "" if line["over_generate"] is None else f"{line['over_generate']:.2f}",
                    f"{line['of_floor']:.2f}",
                    "" if line["peak_gb"] is None else f"{line['peak_gb']:.1f} GB",
                ]
                for line in summary(result)
            ),
        ),
        *(f"\n{way} did not run: {error}" for way, error in result["errors"].items()),
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    cases = {**CPU_CASES, **GPU_CASES, **ENCODER_DECODER_CASES}
    parser.add_argument("cases", nargs="*", metavar="case", help="default: those of this machine's device")
    parser.add_argument("--turns", type=int, default=3, help="measured turns, after one that warms up")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder for the results")
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.cases) - set(cases)):
        parser.error(f"unknown case {', '.join(unknown)}; there are {', '.join(cases)}")
    if "shared_prefix" not in arguments.ways:
        parser.error("--ways needs shared_prefix, which is compared with the others")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    names = arguments.cases or list(GPU_CASES if device == "cuda" else CPU_CASES)
    results = []
    for name in names:
        print(name, flush=True)
        results.append(measure(name, cases[name](), device, arguments.turns, arguments.ways))
    panels = {
        result["case"]: {line["way"]: [line["over_generate"]] for line in summary(result) if line["over_generate"]}
        for result in results
    }
    publish(
        arguments.out,
        f"sampling_{device}",
        {
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
            "results": results,
            "summary": {result["case"]: summary(result) for result in results},
        },
        "\n\n".join(map(report, results)),
        bars(panels, "speed over generate", "{:.1f}×"),
    )


if __name__ == "__main__":
    main()
