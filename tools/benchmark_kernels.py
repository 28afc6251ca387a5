#!/usr/bin/env python3
"""How fast, how exact and how large the kernel engines are, all in one run on one machine.

Every engine runs in a process of its own, so that its peak memory is its own. The yardstick is the published method:
the `jvp` engine over whole parameters and the whole vocabulary's logits, tiles of 1 × 1, timed on a sample of pairs.
The published method and the `jacobian` engine are timed on samples, since they would take hours.

    python tools/benchmark_kernels.py --model models/minilm --data_dir data/k-shot-1k-test/SST-2/16-42
    python tools/benchmark_kernels.py --shape bert-base --data_dir data/k-shot-1k-test/SST-2/16-42
    python tools/benchmark_kernels.py --quick
"""

import argparse
import json
import multiprocessing
import sys
import time
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import torch
from torch import Tensor
from tqdm import tqdm

from lmntk.errors import UsageError
from lmntk.kernels import ENGINES, FORMULAS, KernelProblem, assemble
from lmntk.kernels.machine import DEFAULT_FRACTION, free_bytes, peak_bytes, product_flops, seconds_by_stage
from lmntk.models.prompt_model import PromptModel
from lmntk.results import write_atomically
from lmntk.tasks import find_task

PUBLISHED = "published"
# Layers, features, heads, features between: the shapes that have names here, filled with random weights.
SHAPES = {"quick": (2, 128, 2, 512), "minilm": (6, 384, 12, 1536), "bert-base": (12, 768, 12, 3072)}
VOCABULARY = 30522
SAMPLED_PAIRS = 8
TRUTH_BYTES = 3 * 2**30


@dataclass(frozen=True)
class Job:
    """What is measured; small enough to be sent to another process.

    Attributes:
        model: A checkpoint folder or a key of `SHAPES`.
        task_name: The task whose prompts are used.
        data_dir: Its k-shot folder; None for random tokens of realistic lengths.
        train_examples: N; more than the split has are made by repeating it with other tokens.
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


class Prompts:
    """Prompts of known lengths; batches are padded to the longest of them."""

    padded = True

    def __init__(self, rows: list[tuple[list[int], int]], segments: bool) -> None:
        self.rows = rows
        self.shapes = [len(ids) for ids, _ in rows]
        self.segments = segments

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: Any) -> dict[str, Tensor]:
        """Pad on the right; the mask is there only where there is padding."""
        chosen = [self.rows[index] for index in indices]
        longest = max(len(ids) for ids, _ in chosen)
        batch = {"input_ids": torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in chosen])}
        if any(len(ids) < longest for ids, _ in chosen):
            batch["attention_mask"] = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in chosen])
        if self.segments:
            batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
        batch["mask_pos"] = torch.tensor([position for _, position in chosen])
        return batch


def load(job: Job, dtype: torch.dtype = torch.float32) -> tuple[PromptModel, Prompts, Prompts]:
    """Return the model and the prompts of both sides."""
    task = find_task(job.task_name)
    if job.model in SHAPES:
        model, label_words, tokenizer = _random_model(job), (2307, 6659), None
    else:
        from lmntk.models.loading import load_config, load_prompt_model, load_tokenizer
        from lmntk.prompts import label_word_ids

        tokenizer = load_tokenizer(job.model)
        label_words = tuple(label_word_ids(task.mapping, task.labels, tokenizer))
        model = load_prompt_model(job.model, load_config(job.model), label_words, binary_classification=job.binary)
    model = model.to(dtype).requires_grad_(False)
    segments = model.lm.config.model_type == "bert"
    train = _prompts(job, task, tokenizer, "train", job.train_examples)
    x = _prompts(job, task, tokenizer, "test", job.x_examples)
    return model, Prompts(train, segments), Prompts(x, segments)


def _random_model(job: Job) -> PromptModel:
    from transformers import BertConfig, BertForMaskedLM

    from lmntk.models.attention import use_plain_attention

    layers, features, heads, between = SHAPES[job.model]
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=features,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=between,
        tie_word_embeddings=False,
    )
    lm = BertForMaskedLM._from_config(config, attn_implementation="eager").eval()
    use_plain_attention(lm)
    return PromptModel(lm, (2307, 6659), job.binary)


def _prompts(job: Job, task: Any, tokenizer: Any, split: str, count: int) -> list[tuple[list[int], int]]:
    generator = torch.Generator().manual_seed(0 if split == "train" else 1)
    rows: list[tuple[list[int], int]] = []
    if tokenizer is not None and job.data_dir is not None:
        from lmntk.examples import read_examples, split_file
        from lmntk.features import FeatureDataset
        from lmntk.prompts import Limits
        from lmntk.templates import Template

        template = Template.parse(task.template, task.num_sentences, len(task.labels), task.name)
        examples = read_examples(task, split_file(task, job.data_dir, split))[:count]
        data = FeatureDataset.build(split, task, examples, [template], tokenizer, Limits())
        rows = [(feature.input_ids, feature.mask_position) for feature in data.features]
    real = len(rows)
    while len(rows) < count:
        # SST-2's prompts have 8 to 60 tokens, 29 on average; further ones copy the lengths of those that are there.
        drawn = torch.randn(1, generator=generator).mul(10).add(29).clamp(8, 60)
        length = len(rows[len(rows) % real][0]) if real else int(drawn)
        ids = torch.randint(1000, VOCABULARY, (length,), generator=generator).tolist()
        rows.append((ids, length - 3))
    return rows[:count]


def make_problem(job: Job, model: PromptModel, train: Prompts, x: Prompts, published: bool = False) -> KernelProblem:
    """Return the kernel to compute; as published, nothing is narrowed to the rows that matter."""
    names = [name for name, _ in model.named_parameters()]
    if published:
        params = {name: parameter.detach() for name, parameter in model.named_parameters()}
        decoder = model.lm.get_output_embeddings()
        label_words = decoder.label_word_ids.clone()
        # All tokens' logits, from which the label words' are picked.
        decoder.label_word_ids = torch.arange(len(decoder.weight))
        binary, model.binary_classification = model.binary_classification, False

        def logits_fn(params: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
            logits = torch.func.functional_call(model, params, kwargs=batch)[:, label_words]
            return logits[:, 1:] - logits[:, :1] if binary else logits

        return KernelProblem(logits_fn, params, train, x, FORMULAS[job.formula], 1 if binary else len(label_words))
    tokens = {token for ids, _ in train.rows for token in ids}
    logits_fn, params = model.as_function(names, tokens)
    formula = FORMULAS[job.formula]
    return KernelProblem(logits_fn, params, train, x, formula, model.num_logits, model, lambda batch: model(**batch))


def measure(job: Job, engine: str) -> dict[str, Any]:
    """Measure one engine, in a process that does nothing else."""
    torch.set_num_threads(job.threads)
    model, train, x = load(job)
    problem = make_problem(job, model, train, x, published=engine == PUBLISHED)
    pairs = len(train) * len(x)
    before = peak_bytes(torch.device("cpu"))
    if engine in (PUBLISHED, "jvp"):
        seconds = pairs * _seconds_per_sampled_pair(problem)
    elif engine == "jacobian":
        seconds = _seconds_of_sampled_jacobians(problem, job)
    else:
        seconds = _seconds(ENGINES[engine](problem, _budget(job)), job)
    rate = product_flops(torch.device("cpu"), torch.float32)
    row: dict[str, Any] = {
        "engine": engine,
        "formula": job.formula,
        "model": job.model,
        "n_train": len(train),
        "n_x": len(x),
        "logits": problem.num_logits,
        "threads": job.threads,
        "seconds": seconds,
        "seconds_per_pair": seconds / pairs,
        "peak_memory_gb": peak_bytes(torch.device("cpu")) / 2**30,
        "model_memory_gb": before / 2**30,
        "matmul_gflops": rate / 1e9,
        "roofline_fraction": dense_flops(model, train, x, problem.num_logits) / seconds / rate,
        "seconds_by_stage": {name: round(value, 3) for name, value in seconds_by_stage.items()},
    }
    return row


def _budget(job: Job) -> int:
    return int((job.memory_gb or DEFAULT_FRACTION * free_bytes(torch.device("cpu")) / 2**30) * 2**30)


def _seconds(engine: Any, job: Job) -> float:
    """Time a whole kernel, or its first tiles, from which the rest is told."""
    plan = engine.plan()
    tiles = [tile.pairs for tile in plan]
    seconds_by_stage.clear()
    marks = [time.perf_counter()]
    for _ in islice(engine.blocks(plan), job.sample_tiles or None):
        marks.append(time.perf_counter())
    if not job.sample_tiles or job.sample_tiles >= len(tiles):
        return marks[-1] - marks[0]
    # The first tile propagates the train examples too, which happens once.
    per_pair = (marks[-1] - marks[1]) / sum(tiles[1 : job.sample_tiles])
    return marks[1] - marks[0] + per_pair * sum(tiles[1:])


def _seconds_per_sampled_pair(problem: KernelProblem) -> float:
    """Time 1 × 1 tiles of one train example, whose own gradients count for all its tiles and are left out."""
    engine = ENGINES["jvp"](replace(problem, module=None), 2**60)
    step = max(1, len(problem.x_examples) // SAMPLED_PAIRS)
    ordered = sorted(range(len(problem.x_examples)), key=lambda index: problem.x_examples.shapes[index])
    chosen = ordered[step // 2 :: step][:SAMPLED_PAIRS]
    plan = replace(engine.plan(), rows=(((problem.typical_example,), tuple((index,) for index in chosen)),))
    marks = []
    for _ in range(2):  # the second time everything is warm
        marks = [time.perf_counter() for _ in engine.blocks(plan)]
    return (marks[-1] - marks[0]) / (len(marks) - 1)


def _seconds_of_sampled_jacobians(problem: KernelProblem, job: Job) -> float:
    """Time the gradients of all train examples and of two X tiles of eight."""
    engine = ENGINES["jacobian"](replace(problem, module=None), _budget(job))
    plan = engine.plan(x_tile=8)
    first = [replace(plan, rows=tuple((train, xs[:count]) for train, xs in plan.rows)) for count in (1, 3)]
    seconds = []
    for part in (first[0], *first):
        start = time.perf_counter()
        for _ in engine.blocks(part):
            pass
        seconds.append(time.perf_counter() - start)
    per_x = (seconds[2] - seconds[1]) / (first[1].pairs - first[0].pairs) * len(problem.train)
    return seconds[1] + per_x * (len(problem.x_examples) - 8)


def dense_flops(model: PromptModel, train: Prompts, x: Prompts, c: int) -> float:
    """Count what dense gradients would take: 1 + C passes, forming, contraction, in linear layers alone."""
    tokens, x_tokens = sum(train.shapes), sum(x.shapes)
    decoder = model.lm.get_output_embeddings()
    weights = sum(
        module.weight.numel()
        for module in model.modules()
        if isinstance(module, torch.nn.Linear) and module is not decoder
    )
    propagation = 2 * (1 + c) * weights * (tokens + x_tokens)
    return propagation + 2 * c * weights * (tokens + x_tokens) + 2 * weights * c**2 * len(train) * len(x)


def relative_errors(job: Job, engines: list[str]) -> dict[str, float]:
    """Compare engines with float64 autograd, one example and logit at a time, on as many examples as memory takes."""
    torch.set_num_threads(job.threads)
    model, train, x = load(job, torch.float64)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    size = max(1, min(8, int(TRUTH_BYTES // (16 * numbers * model.num_logits)), len(train), len(x)))
    few_train, few_x = Prompts(train.rows[:size], train.segments), Prompts(x.rows[:size], x.segments)
    model.requires_grad_(True)
    gradients = [_gradients(model, rows) for rows in (few_train, few_x)]
    sides = [[g.sign() if sign else g for g in side] for side, sign in zip(gradients, _signs(job), strict=True)]
    truth = torch.stack([torch.stack([left @ right for right in sides[1]]) for left in sides[0]])
    truth = truth.view(size, model.num_logits, size, model.num_logits)
    del gradients, sides
    model, _, _ = load(job)
    problem = make_problem(job, model, few_train, few_x)
    errors = {}
    for name in engines:
        engine = ENGINES["jvp" if name == PUBLISHED else name](problem, _budget(job))
        plan = engine.plan()
        found = assemble(engine.blocks(plan), plan, problem)[0]
        errors[name] = float((found - truth).norm() / truth.norm())
    return errors


def _signs(job: Job) -> tuple[bool, bool]:
    direction = FORMULAS[job.formula].directions[0]
    return direction.sign_train, direction.sign_x


def _gradients(model: PromptModel, prompts: Prompts) -> list[Tensor]:
    found = []
    parameters = list(model.parameters())
    for index in range(len(prompts)):
        logits = model(**prompts.batch([index]))[0]
        for logit in logits:
            parts = torch.autograd.grad(logit, parameters, retain_graph=True, allow_unused=True)
            found.append(
                torch.cat(
                    [
                        (torch.zeros_like(own) if part is None else part).flatten()
                        for own, part in zip(parameters, parts, strict=True)
                    ]
                )
            )
    return found


def parse(argv: list[str]) -> tuple[list[Job], list[str], str | None]:
    """Read the command line: the jobs, the engines, and the JSON file to write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint folder of a masked language model")
    parser.add_argument("--shape", choices=SHAPES, help="a BERT of that shape with random weights, in place of --model")
    parser.add_argument("--task_name", default="SST-2", help="the task whose prompts are used (default SST-2)")
    parser.add_argument("--data_dir", help="its k-shot folder; not given: random tokens of SST-2's lengths")
    parser.add_argument("--engines", nargs="+", default=["factored"], choices=list(ENGINES), help="what to measure")
    parser.add_argument("--train_examples", nargs="+", type=int, default=[32], help="N, one or several (default 32)")
    parser.add_argument("--x_examples", type=int, default=1000, help="X (default 1000)")
    parser.add_argument("--formula", nargs="+", default=["sgd"], choices=FORMULAS, help="one or several formulas")
    parser.add_argument("--binary_classification", action="store_true", help="one logit difference, not two logits")
    parser.add_argument("--threads", nargs="+", type=int, default=[torch.get_num_threads()], help="one or several")
    parser.add_argument("--memory_gb", type=float, help="budget of the engines (default: 60%% of what is free)")
    parser.add_argument("--sample_tiles", type=int, default=0, help="time so many tiles and scale up (default: all)")
    parser.add_argument("--quick", action="store_true", help="a small model and few examples, under a minute")
    parser.add_argument("--json", metavar="FILE", help="write the measurements there, a list of objects")
    given = parser.parse_args(argv)
    if given.quick:
        given.shape, given.train_examples, given.x_examples = given.shape or "quick", [16], 64
        given.engines = list(ENGINES) if given.engines == ["factored"] else given.engines
    if (given.model is None) == (given.shape is None):
        raise UsageError("name either a checkpoint folder with --model or a shape with --shape, or pass --quick")
    if given.sample_tiles == 1:
        raise UsageError("--sample_tiles 1 tells nothing: the first tile is not like the others; take 2 or more")
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


def main(argv: list[str]) -> int:
    """Measure, print a table, write JSON; return the exit status."""
    try:
        jobs, engines, json_file = parse(argv)
        rows = []
        with tqdm(total=len(jobs) * (len(engines) + 1), unit="measurement") as bar:
            for job in jobs:
                measured = []
                for engine in engines:
                    bar.set_description(f"{engine}, {job.formula}, N = {job.train_examples}, {job.threads} threads")
                    measured.append(_alone(measure, job, engine))
                    bar.update()
                bar.set_description("float64 autograd")
                errors = _alone(relative_errors, job, engines)
                bar.update()
                yardstick = measured[0]["seconds_per_pair"]
                for row in measured:
                    row["speedup_over_jvp"] = yardstick / row["seconds_per_pair"]
                    row["relative_error"] = errors[row["engine"]]
                rows += measured
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(rows))
    if json_file:
        text = json.dumps(rows, indent=2) + "\n"
        write_atomically(Path(json_file), lambda file: file.write(text.encode()))
        print(f"\nmeasurements are in {json_file}")
    return 0


def _alone(work: Any, *arguments: Any) -> Any:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, arguments)


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
