#!/usr/bin/env python3
"""How fast, how exact and how large the kernel engines are, all in one run on one machine.

Every engine runs in a process of its own, so that its peak memory is its own. The yardstick is the published method:
the `jvp` engine over whole parameters and the whole vocabulary's logits, tiles of 1 × 1. It and the `jacobian` engine
are timed on samples, since they would take hours. Errors are those of a part of the kernel, 8 × 8 examples at most,
against gradients by plain autograd. Those of signgd count gradients too that are zero but for rounding, such as the
key biases' of attention: no two computations agree on the signs of these.

    python tools/benchmark_kernels.py --model models/minilm --data_dir data/k-shot-1k-test/SST-2/16-42
    python tools/benchmark_kernels.py --shape bert-base --formula sgd signgd
    python tools/benchmark_kernels.py --quick
"""

import argparse
import copy
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import torch
from numpy import ndarray
from torch import Tensor
from tqdm import tqdm
from transformers import BertConfig, PretrainedConfig

from lmntk.arguments import DataArguments
from lmntk.build import resolve_prompts
from lmntk.errors import UsageError, suggest
from lmntk.examples import read_examples, split_file
from lmntk.features import Collator, Feature, FeatureDataset
from lmntk.kernels import ENGINES, FORMULAS, Engine, KernelProblem, MemoryBudgetError, assemble
from lmntk.kernels.formulas import Direction
from lmntk.kernels.machine import DEFAULT_FRACTION, free_bytes, peak_bytes, product_flops, seconds_by_stage
from lmntk.models.loading import load_config, load_prompt_model, load_tokenizer, max_positions
from lmntk.models.prompt_model import PromptModel
from lmntk.prompts import label_word_ids
from lmntk.results import write_atomically
from lmntk.tasks import find_task
from lmntk.templates import Template
from lmntk.trainers.kernel import FeatureExamples

PUBLISHED = "published"
# Layers, features, heads, features between: the BERTs that have names here, filled with random weights.
SHAPES = {"quick": (2, 128, 2, 512), "minilm": (6, 384, 12, 1536), "bert-base": (12, 768, 12, 3072)}
FIRST_LABEL_WORD = 2000  # of a model without a tokenizer
SAMPLED_PAIRS = 8
ERROR_EXAMPLES = {PUBLISHED: 2, "jvp": 2}  # on either side, by engine: these two take a second a pair
MOST_ERROR_EXAMPLES = 8
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Job:
    """What is measured; small enough to be sent to another process.

    Attributes:
        model: A checkpoint folder or a key of `SHAPES`.
        task_name: The task whose prompts are used.
        data_dir: Its k-shot folder; None for random tokens of realistic lengths.
        train_examples: N; beyond what the split has, prompts are random tokens of the lengths that it has.
        x_examples: X.
        formula: A key of `FORMULAS`.
        binary: One logit difference in place of two logits.
        threads: How many threads torch may use.
        memory_gb: The engine's budget.
        sample_tiles: Time that many tiles and scale up; 0 for all.
    """

    model: str
    task_name: str
    data_dir: str | None
    train_examples: int
    x_examples: int
    formula: str
    binary: bool
    threads: int
    memory_gb: float | None
    sample_tiles: int

    @property
    def budget(self) -> int:
        """What an engine may take beside the model, in bytes."""
        return int(DEFAULT_FRACTION * free_bytes(CPU) if self.memory_gb is None else self.memory_gb * 2**30)


@dataclass(frozen=True)
class Inputs:
    """What a job's model is asked: prompts of both sides, and the tokens whose logits count."""

    config: PretrainedConfig
    label_words: list[int]
    train: FeatureDataset
    x: FeatureDataset

    def first(self, size: int) -> "Inputs":
        """Return the first `size` examples of either side."""
        cut = [replace(side, features=side.features[:size]) for side in (self.train, self.x)]
        return replace(self, train=cut[0], x=cut[1])

    def examples(self, side: FeatureDataset) -> FeatureExamples:
        """Return a side as engines take it."""
        pad = self.config.pad_token_id
        return FeatureExamples(side, Collator(0 if pad is None else pad, self.config.model_type == "bert"), CPU)


def load_inputs(job: Job) -> Inputs:
    """Read or draw the prompts."""
    task = find_task(job.task_name)
    features: dict[str, list[Feature]] = {"train": [], "test": []}
    if job.model in SHAPES:
        layers, width, heads, between = SHAPES[job.model]
        sizes = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads}
        config = BertConfig(**sizes, intermediate_size=between)
        label_words = [FIRST_LABEL_WORD + label for label in range(len(task.labels))]
    else:
        config, tokenizer = load_config(job.model), load_tokenizer(job.model)
        prompts = resolve_prompts(task, DataArguments(task.name, job.data_dir or ""), max_positions(config))
        label_words = label_word_ids(prompts.mapping, task.labels, tokenizer)
        templates = [
            Template.parse(text, task.num_sentences, len(task.labels), task.name) for text in prompts.templates
        ]
        for split, count in (("train", job.train_examples), ("test", job.x_examples)):
            if job.data_dir is not None:
                rows = read_examples(task, split_file(task, job.data_dir, split))[:count]
                data = FeatureDataset.build(split, task, rows, templates, tokenizer, prompts.limits, label_words)
                features[split] = data.features
    train = _filled_up(features["train"], job.train_examples, config.vocab_size, seed=0)
    x = _filled_up(features["test"], job.x_examples, config.vocab_size, seed=1)
    return Inputs(config, label_words, FeatureDataset("train", task, train), FeatureDataset("test", task, x))


def _filled_up(features: list[Feature], count: int, vocabulary: int, seed: int) -> list[Feature]:
    """Add prompts of random tokens until there are `count`; they have the lengths of those that are there."""
    generator = torch.Generator().manual_seed(seed)
    # SST-2's prompts have 8 to 60 tokens, 29 on average.
    drawn = torch.randn(count, generator=generator).mul(10).add(29).clamp(8, 60).int().tolist()
    lengths = [len(feature.input_ids) for feature in features] or drawn
    filled = list(features)
    for number in range(len(features), count):
        length = lengths[number % len(lengths)]
        ids = torch.randint(min(1000, vocabulary // 2), vocabulary, (length,), generator=generator).tolist()
        filled.append(Feature(ids, [0] * length, length - 3, 0))
    return filled


def load_model(job: Job, inputs: Inputs, dtype: torch.dtype) -> PromptModel:
    """Return the checkpoint, or random weights of the shape; always the same."""
    return load_prompt_model(
        job.model,
        copy.deepcopy(inputs.config),
        inputs.label_words,
        binary_classification=job.binary,
        random_init=job.model in SHAPES,
        dtype=dtype,
    ).requires_grad_(False)


def make_problem(job: Job, model: PromptModel, inputs: Inputs, published: bool = False) -> KernelProblem:
    """Return the kernel to compute; as published, nothing is narrowed to the rows that matter."""
    formula, num_logits = FORMULAS[job.formula], model.num_logits
    train, x = inputs.examples(inputs.train), inputs.examples(inputs.x)
    if published:
        params = {name: parameter.detach() for name, parameter in model.named_parameters()}
        # All tokens' logits, from which the label words' are picked.
        decoder = model.lm.get_output_embeddings()
        decoder.label_word_ids = torch.arange(len(decoder.weight))
        model.binary_classification = False
        for module in model.modules():
            vars(module).pop("forward", None)  # the last layer's, which computes one position only

        def all_logits_fn(params: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
            logits = torch.func.functional_call(model, params, kwargs=batch)[:, inputs.label_words]
            return logits[:, 1:] - logits[:, :1] if job.binary else logits

        return KernelProblem(all_logits_fn, params, train, x, formula, num_logits)
    tokens = {token for feature in inputs.train.features for token in feature.input_ids}
    logits_fn, params = model.as_function([name for name, _ in model.named_parameters()], tokens)
    return KernelProblem(logits_fn, params, train, x, formula, num_logits, model, lambda batch: model(**batch))


def make_engine(job: Job, engine: str, problem: KernelProblem) -> Engine:
    """Return an engine with the job's budget; the yardstick has no choice of tiles, and takes what it needs."""
    if engine in (PUBLISHED, "jvp"):
        return ENGINES["jvp"](problem, 2**60)
    return ENGINES[engine](problem, job.budget)


def measure(job: Job, engine: str, truth: ndarray | None) -> tuple[dict[str, Any], ndarray]:
    """Measure one engine, in a process that does nothing else.

    Args:
        job: What is measured.
        engine: A key of `ENGINES`, or `PUBLISHED`.
        truth: What `true_kernel` says, if it was asked already.

    Returns:
        A row of the table, and `truth`.
    """
    torch.set_num_threads(job.threads)
    inputs = load_inputs(job)
    model = load_model(job, inputs, torch.float32)
    problem = make_problem(job, model, inputs, published=engine == PUBLISHED)
    pairs = job.train_examples * job.x_examples
    before = peak_bytes(CPU)
    made = make_engine(job, engine, problem)
    if engine in (PUBLISHED, "jvp"):
        seconds = pairs * _seconds_per_sampled_pair(made)
    elif engine == "jacobian":
        seconds = _seconds_of_sampled_jacobians(made)
    else:
        seconds = _seconds(made, job.sample_tiles)
    peak = peak_bytes(CPU)
    rate = product_flops(CPU, torch.float32)
    row = {
        "engine": engine,
        "formula": job.formula,
        "model": job.model,
        "n_train": job.train_examples,
        "n_x": job.x_examples,
        "logits": problem.num_logits,
        "threads": job.threads,
        "seconds": seconds,
        "seconds_per_pair": seconds / pairs,
        "peak_memory_gb": peak / 2**30,
        "model_memory_gb": before / 2**30,
        "matmul_gflops": rate / 1e9,
        "roofline_fraction": dense_flops(model, problem) / seconds / rate,
        "seconds_by_stage": {name: round(value, 3) for name, value in seconds_by_stage.items()},
    }
    if truth is None:
        truth = true_kernel(job, inputs.first(MOST_ERROR_EXAMPLES)).numpy()
    return row | {"relative_error": relative_error(job, engine, inputs, truth)}, truth


def _seconds(engine: Engine, sample_tiles: int) -> float:
    """Time a whole kernel, or its first tiles, from which the rest is told."""
    plan = engine.plan()
    tiles = [tile.pairs for tile in plan]
    seconds_by_stage.clear()
    marks = [time.perf_counter()]
    for _ in islice(engine.blocks(plan), sample_tiles or None):
        marks.append(time.perf_counter())
    if not sample_tiles or sample_tiles >= len(tiles):
        return marks[-1] - marks[0]
    # The first tile propagates the train examples too, which happens once.
    per_pair = (marks[-1] - marks[1]) / sum(tiles[1:sample_tiles])
    return marks[1] - marks[0] + per_pair * sum(tiles[1:])


def _seconds_per_sampled_pair(engine: Engine) -> float:
    """Time 1 × 1 tiles of one train example, whose own gradients count for all its tiles and are left out."""
    problem = engine.problem
    ordered = sorted(range(len(problem.x_examples)), key=lambda index: problem.x_examples.shapes[index])
    step = max(1, len(ordered) // SAMPLED_PAIRS)
    chosen = (ordered[step // 2 :: step] * 2)[:SAMPLED_PAIRS]
    plan = replace(engine.plan(), rows=(((problem.typical_example,), tuple((index,) for index in chosen)),))
    marks: list[float] = []
    for _ in range(2):  # the second time everything is warm
        marks = [time.perf_counter() for _ in engine.blocks(plan)]
    return (marks[-1] - marks[0]) / (len(marks) - 1)


def _seconds_of_sampled_jacobians(engine: Engine) -> float:
    """Time the gradients of all train examples and of the first three X tiles of eight, and scale the latter up."""
    plan = engine.plan(x_tile=8)
    ((train, x_tiles),) = plan.rows
    list(engine.blocks(replace(plan, rows=((train[:1], (x_tiles[0][:1],)),))))  # so that everything is warm
    tiles = min(3, len(x_tiles))
    marks = [time.perf_counter()]
    for _ in engine.blocks(replace(plan, rows=((train, x_tiles[:tiles]),))):
        marks.append(time.perf_counter())
    if tiles == len(x_tiles):
        return marks[-1] - marks[0]
    # A group of parameters at a time, of which the first tile takes the train examples' gradients too.
    per_tile = sum(marks[first + 2] - marks[first] for first in range(1, len(marks), 3)) / 2
    return marks[-1] - marks[0] + per_tile * (plan.x_size / 8 - 3)


def dense_flops(model: PromptModel, problem: KernelProblem) -> float:
    """Count what dense gradients would take: 1 + C passes, forming, contraction, in linear layers alone."""
    tokens, c = sum(problem.train.shapes) + sum(problem.x_examples.shapes), problem.num_logits
    decoder = model.lm.get_output_embeddings()
    weights = sum(
        module.weight.numel()
        for module in model.modules()
        if isinstance(module, torch.nn.Linear) and module is not decoder
    )
    per_token = 2 * (1 + c) * weights + 2 * c * weights
    return per_token * tokens + 2 * weights * c**2 * len(problem.train) * len(problem.x_examples)


def relative_error(job: Job, engine: str, inputs: Inputs, truth: ndarray) -> float:
    """Compare an engine with plain autograd on the first examples of either side."""
    inputs = inputs.first(ERROR_EXAMPLES.get(engine, MOST_ERROR_EXAMPLES))
    problem = make_problem(job, load_model(job, inputs, torch.float32), inputs, published=engine == PUBLISHED)
    made = make_engine(job, engine, problem)
    plan = made.plan()
    found = assemble(made.blocks(plan), plan, problem)
    expected = torch.from_numpy(truth)[:, : plan.train_size, :, : plan.x_size]
    return float((found - expected).norm() / expected.norm())


def true_kernel(job: Job, inputs: Inputs) -> Tensor:
    """Return the kernel, float64 ``[D, n, C, x, C]``, from gradients taken one example and one logit at a time.

    They are float64, but where a side takes signs, those of float32 gradients count: close to zero the two differ, and
    an engine that works in float32 is right to count its own.
    """
    models = {signed: load_model(job, inputs, torch.float32 if signed else torch.float64) for signed in (False, True)}
    return torch.stack(
        [_true_direction(job, inputs, direction, models) for direction in FORMULAS[job.formula].directions]
    )


def _true_direction(job: Job, inputs: Inputs, direction: Direction, models: dict[bool, PromptModel]) -> Tensor:
    train, x = inputs.examples(inputs.train), inputs.examples(inputs.x)
    c, numbers = models[False].num_logits, sum(parameter.numel() for parameter in models[False].parameters())
    kernel = torch.zeros(len(train), c, len(x), c, dtype=torch.float64)
    # As many train examples at a time as half of the budget holds gradients of.
    together = min(len(train), max(1, job.budget // (2 * 8 * c * numbers)))
    held = torch.empty(together, c, numbers, dtype=torch.float64)
    for start in range(0, len(train), together):
        part = range(start, min(start + together, len(train)))
        for row, index in enumerate(part):
            for a, gradient in enumerate(_gradients(models[direction.sign_train], train, index, direction.sign_train)):
                held[row, a] = gradient
        for j in range(len(x)):
            for b, gradient in enumerate(_gradients(models[direction.sign_x], x, j, direction.sign_x)):
                kernel[part.start : part.stop, :, j, b] = held[: len(part)] @ gradient
    return kernel


def _gradients(model: PromptModel, examples: FeatureExamples, index: int, signed: bool) -> Iterator[Tensor]:
    """Yield the gradient of each logit of an example, or its sign, over all parameters: float64 ``[p]``."""
    parameters = list(model.requires_grad_(True).parameters())
    for logit in model(**examples.batch([index]))[0]:
        parts = torch.autograd.grad(logit, parameters, retain_graph=True, materialize_grads=True)
        gradient = torch.cat([part.flatten() for part in parts])
        yield (gradient.sign_() if signed else gradient).double()


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are usage errors like all others."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def parse(argv: list[str]) -> tuple[list[Job], list[str], str | None]:
    """Read the command line: the jobs, the engines, and the JSON file to write."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint folder of a masked language model")
    parser.add_argument("--shape", choices=SHAPES, help="a BERT of that shape with random weights, in place of --model")
    parser.add_argument("--task_name", default="SST-2", help="the task whose prompts are used (default SST-2)")
    parser.add_argument("--data_dir", help="its k-shot folder; not given: random tokens of SST-2's lengths")
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), help="what to measure (default factored)")
    parser.add_argument("--train_examples", nargs="+", type=int, help="N, one or several (default 32)")
    parser.add_argument("--x_examples", type=int, help="X (default 1000)")
    parser.add_argument("--formula", nargs="+", default=["sgd"], choices=FORMULAS, help="one or several formulas")
    parser.add_argument("--binary_classification", action="store_true", help="one logit difference, not two logits")
    parser.add_argument("--threads", nargs="+", type=int, default=[torch.get_num_threads()], help="one or several")
    parser.add_argument("--memory_gb", type=float, help="budget of the engines (default: 60%% of what is free)")
    parser.add_argument("--sample_tiles", type=int, default=0, help="time so many tiles and scale up (default: all)")
    parser.add_argument("--quick", action="store_true", help="all engines, a small model, 16 × 64: under a minute")
    parser.add_argument("--json", metavar="FILE", help="write the measurements there, a list of objects")
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")]
        raise UsageError(suggest(unknown[0].split("=")[0], flags, "flag"))
    if given.quick and given.model is None:
        given.shape = given.shape or "quick"
    given.engines = given.engines or (list(ENGINES) if given.quick else ["factored"])
    given.train_examples = given.train_examples or ([16] if given.quick else [32])
    given.x_examples = given.x_examples if given.x_examples is not None else (64 if given.quick else 1000)
    _check(given)
    jobs = [
        Job(
            model=given.model or given.shape,
            task_name=given.task_name,
            data_dir=given.data_dir,
            train_examples=n,
            x_examples=given.x_examples,
            formula=formula,
            binary=given.binary_classification or FORMULAS[formula].two_directions,
            threads=threads,
            memory_gb=given.memory_gb,
            sample_tiles=given.sample_tiles,
        )
        for threads in given.threads
        for n in given.train_examples
        for formula in given.formula
    ]
    return jobs, [PUBLISHED, *given.engines], given.json


def _check(given: argparse.Namespace) -> None:
    """Refuse, before minutes are spent, what cannot work."""
    task = find_task(given.task_name)
    if (given.model is None) == (given.shape is None):
        raise UsageError("name either a checkpoint folder with --model or a shape with --shape, or pass --quick")
    if given.model is not None and not Path(given.model).is_dir():
        raise UsageError(f"--model: there is no folder {given.model}; it takes one with a checkpoint and its tokenizer")
    if given.data_dir is not None:
        if given.shape is not None:
            raise UsageError("--data_dir needs --model: a --shape has no tokenizer to read sentences with")
        for split in ("train", "test"):
            split_file(task, given.data_dir, split)
    for flag in ("train_examples", "threads", "x_examples"):
        value = getattr(given, flag)
        if min(value if isinstance(value, list) else [value]) < 1:
            raise UsageError(f"--{flag} must be at least 1")
    if given.memory_gb is not None and given.memory_gb <= 0:
        raise UsageError("--memory_gb must be more than 0")
    if given.sample_tiles == 1 or given.sample_tiles < 0:
        raise UsageError("--sample_tiles takes 0 for all tiles, or 2 and more: the first tile is not like the others")
    one_logit = [formula for formula in given.formula if FORMULAS[formula].two_directions]
    if (given.binary_classification or one_logit) and len(task.labels) != 2:
        cause = "--binary_classification" if given.binary_classification else f"--formula {one_logit[0]}"
        raise UsageError(f"{cause} takes tasks of two classes, but {task.name} has {len(task.labels)}")
    if given.json is not None and not Path(given.json).resolve().parent.is_dir():
        raise UsageError(f"--json: there is no folder {Path(given.json).resolve().parent}")


def main(argv: list[str]) -> int:
    """Measure, print a table, write JSON; return the exit status."""
    try:
        jobs, engines, json_file = parse(argv)
        rows = []
        with tqdm(total=len(jobs) * len(engines), unit="measurement") as bar:
            for job in jobs:
                measured, truth = [], None
                for engine in engines:
                    bar.set_description(f"{engine}, {job.formula}, N = {job.train_examples}, {job.threads} threads")
                    row, truth = in_own_process(measure, job, engine, truth)
                    measured.append(row)
                    bar.update()
                yardstick = measured[0]["seconds_per_pair"]
                rows += [row | {"speedup_over_jvp": yardstick / row["seconds_per_pair"]} for row in measured]
        print(table(rows))
        if json_file:
            text = json.dumps(rows, indent=2) + "\n"
            write_atomically(Path(json_file), lambda file: file.write(text.encode()))
            print(f"\nmeasurements are in {json_file}")
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def in_own_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """Do the work in a process that does nothing else."""
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(_told_in_a_sentence, work, *arguments).result()
    except BrokenProcessPool as error:
        raise UsageError("a measurement was killed, likely for want of memory: give less with --memory_gb") from error


def _told_in_a_sentence(work: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return work(*arguments)
    except MemoryBudgetError as error:
        raise UsageError(f"--memory_gb: {error}") from None


def table(rows: list[dict[str, Any]]) -> str:
    """Return the measurements as a Markdown table."""
    head = ["engine", "formula", "N × X", "C", "threads", "seconds", "s / pair", "speed-up", "error", "peak GB"]
    head += ["GFLOP/s", "roofline", "where the time went"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        stages = ", ".join(f"{name} {value:.1f} s" for name, value in row["seconds_by_stage"].items())
        cells = [row["engine"], row["formula"], f"{row['n_train']} × {row['n_x']}", row["logits"], row["threads"]]
        cells += [f"{row['seconds']:.1f}", f"{row['seconds_per_pair']:.2e}", f"{row['speedup_over_jvp']:.1f}"]
        cells += [f"{row['relative_error']:.1e}", f"{row['peak_memory_gb']:.1f}", f"{row['matmul_gflops']:.0f}"]
        cells += [f"{row['roofline_fraction']:.2f}", stages]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
