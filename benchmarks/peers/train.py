"""One way to train, as a process that trains on request. benchmarks/training.py starts it and compares the times.

    <interpreter> benchmarks/peers/train.py WAY FOLDER

Runs in the peers' environment (requirements.txt) and imports nothing from this project, except for the way
`ours`, which runs in the project's. FOLDER holds the cases. Reads one request per line from standard input,
`{"case": …, "samples": …, "epochs": …, "batch_size": …, "learning_rate": …, "seed": …, "evaluate": …}`, trains
the case's model from its initial weights and answers with a line of JSON: seconds and processor seconds, the
process's peak memory, the loss of each step and, if asked, the loss on all samples afterwards, computed in
the same way for all.
"""

import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments


class Clock(TrainerCallback):
    """Times only the steps: what a Trainer does before the first and after the last is not counted."""

    def on_train_begin(self, *_, **__):
        self.start()

    def on_train_end(self, *_, **__):
        self.stop()

    def start(self):
        self.began = time.perf_counter(), time.process_time()

    def stop(self):
        self.seconds, self.processor = time.perf_counter() - self.began[0], time.process_time() - self.began[1]


def ours(model, samples: list[dict], request: dict, folder: str, clock: Clock) -> list[float]:
    from rsft_pipeline.devices import Device
    from rsft_pipeline.recipe.training import Training
    from rsft_pipeline.tasks import causal
    from rsft_pipeline.training import Sample, fit

    settings = {name: request[name] for name in ("epochs", "batch_size", "learning_rate")}
    clock.start()
    history = fit(
        model,
        [Sample(str(i), sample["prompt"], sample["completion"]) for i, sample in enumerate(samples)],
        Training(**settings, schedule="constant", warmup=0.0, save_every=10**9),
        task=causal,
        start="benchmark",
        seed=request["seed"],
        device=Device("cpu", "float32"),
        pad_id=0,
        scratch=Path(folder),
    )
    clock.stop()
    return [step.loss for step in history.steps]


def arguments(request: dict, folder: str) -> dict:
    """What all Trainers get; everything else has its default (such as AdamW, and gradients clipped to norm 1)."""
    return {
        "output_dir": folder,
        "num_train_epochs": request["epochs"],
        "per_device_train_batch_size": request["batch_size"],
        "learning_rate": request["learning_rate"],
        "lr_scheduler_type": "constant",
        "seed": request["seed"],
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": [],
        "logging_steps": 1,
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }


def rows(samples: list[dict]) -> list[dict]:
    return [
        {
            "input_ids": (ids := [*sample["prompt"], *sample["completion"]]),
            "attention_mask": [1] * len(ids),
            "labels": [*[-100] * len(sample["prompt"]), *sample["completion"]],
        }
        for sample in samples
    ]


def padded(batch: list[dict]) -> dict[str, torch.Tensor]:
    """What DataCollatorForSeq2Seq does with token ids, without the tokenizer that it asks for."""
    return {
        name: torch.nn.utils.rnn.pad_sequence([torch.tensor(row[name]) for row in batch], True, filler)
        for name, filler in (("input_ids", 0), ("attention_mask", 0), ("labels", -100))
    }


def run(trainer: Trainer, clock: Clock) -> list[float]:
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(clock)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def trainer(model, samples: list[dict], request: dict, folder: str, clock: Clock, **settings) -> list[float]:
    told = TrainingArguments(**arguments(request, folder), **settings)
    return run(Trainer(model=model, args=told, train_dataset=rows(samples), data_collator=padded), clock)


def trainer_by_length(*given) -> list[float]:
    return trainer(*given, train_sampling_strategy="group_by_length")


def trl(model, samples: list[dict], request: dict, folder: str, clock: Clock, **settings) -> list[float]:
    from datasets import Dataset, disable_progress_bars
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    disable_progress_bars()
    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, "<unk>")),
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
    )
    # By default it computes every layer twice to save memory, and in bf16, which is slow on CPUs.
    told = SFTConfig(
        **arguments(request, folder),
        gradient_checkpointing=False,
        bf16=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        **settings,
    )
    data = Dataset.from_list([{name: row[name] for name in ("input_ids", "labels")} for row in rows(samples)])
    return run(SFTTrainer(model=model, args=told, train_dataset=data, processing_class=tokenizer), clock)


def trl_padding_free(*given) -> list[float]:
    return trl(*given, padding_free=True, max_length=None)


WAYS = {way.__name__: way for way in (ours, trainer, trainer_by_length, trl, trl_padding_free)}


def loss_of(model, samples: list[dict]) -> float:
    """Nats per completion token over all samples, each computed alone."""
    total, tokens = 0.0, 0
    model.eval()
    with torch.no_grad():
        for sample in samples:
            ids, start = torch.tensor([sample["prompt"] + sample["completion"]]), len(sample["prompt"])
            scores = model(ids).logits[0, start - 1 : -1]
            total += torch.nn.functional.cross_entropy(scores.double(), ids[0, start:], reduction="sum").item()
            tokens += len(sample["completion"])
    return total / tokens


def main() -> None:
    way, cases = WAYS[sys.argv[1]], Path(sys.argv[2])
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print must not mix with answers
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    for line in sys.stdin:
        request = json.loads(line)
        folder = cases / request["case"]
        samples = json.loads((folder / "samples.json").read_text("utf-8"))[: request["samples"]]
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        clock = Clock()
        with tempfile.TemporaryDirectory() as scratch:
            losses = way(model, samples, request, scratch, clock)
        answer = {"seconds": clock.seconds, "processor_seconds": clock.processor, "losses": losses}
        answer["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # of the process so far
        if request["evaluate"]:
            answer["loss_after"] = loss_of(model, samples)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
