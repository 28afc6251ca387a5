#!/usr/bin/env python3
"""Which architectures of transformers can be asked, and how fast: tries all, writes the page architectures.md.

Every architecture is saved as a checkpoint of random weights, loaded as any other, and asked about prompts of several
lengths. All engines and formulas are compared with gradients taken one example and one logit at a time, by autograd in
float64, and these with gradients of transformers' own model. It takes some twenty minutes.

    python tools/try_architectures.py
    python tools/try_architectures.py --only bert fnet gpt2    # these rows of the page
"""

import argparse
import logging
import re
import signal
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import torch
import transformers
from torch import Tensor
from tqdm import tqdm

from architectures.tiny import VOCABULARY, architectures, tiny_config
from lmntk.config.tool_parser import Parser, run_tool
from lmntk.data.tasks import find_task
from lmntk.errors import Bounds, UsageError, check_numbers
from lmntk.kernels import ENGINES, FORMULAS, KernelProblem, ModuleModel
from lmntk.kernels.assembly import assemble, make_engine
from lmntk.models.families import AUTO_CLASSES, CAUSAL
from lmntk.models.loading import LoadOptions, load_prompt_model
from lmntk.models.pretrained import load_config
from lmntk.models.prompt_model import PromptModel
from lmntk.prompts.features import Collator, Feature, FeatureDataset, FeatureExamples
from lmntk.storage.atomic import write_atomically

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference" / "architectures.md"
TRAIN, X = (6, 9, 7), (8, 5)
LABEL_WORDS = (11, 7)
FIRST_PLAIN_TOKEN = 5
NOISE = 0.15
# What float64 keeps, and what is left of it where transformers computes in float32 on the way.
EXACT, CLOSE = 1e-12, 1e-5
# A gradient below this share of the largest is zero but for rounding: its sign is chance.
CHANCE = 1e-11
MOST_SECONDS = 100


@dataclass(frozen=True)
class Row:
    """What became of an architecture.

    Attributes:
        architecture: As transformers calls it.
        family: ``"masked"`` or ``"causal"``.
        found: ``right``, or why not.
        speed: How much of it the factored engine takes.
        notes: What else is to be known.
    """

    architecture: str
    family: str
    found: str
    speed: str = ""
    notes: str = ""


def save_checkpoint(architecture: str, family: str, folder: str, **settings: object) -> None:
    """Write a tiny checkpoint whose every parameter is random, after transformers has read a prompt with it."""
    torch.manual_seed(0)
    lm = AUTO_CLASSES[family].from_config(tiny_config(architecture, family, **settings)).eval()
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(NOISE * torch.randn_like(parameter))
        lm(input_ids=torch.arange(FIRST_PLAIN_TOKEN, FIRST_PLAIN_TOKEN + X[0])[None])
    lm.save_pretrained(folder)


def prompts(name: str, lengths: Sequence[int], family: str, seed: int) -> FeatureDataset:
    """Draw prompts of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    features = []
    for length in lengths:
        ids = torch.randint(FIRST_PLAIN_TOKEN, VOCABULARY, (length,), generator=generator).tolist()
        position = length - 1 if family == CAUSAL else int(torch.randint(length, (1,), generator=generator))
        features.append(Feature(ids, [0] * length, position, 0))
    return FeatureDataset(name, find_task("SST-2"), features)


def gradients(logits_of_each: Iterable[Tensor], parameters: Sequence[Tensor]) -> Tensor:
    """Return the gradients of examples' logits ``[1, C]``, by one backward pass each: ``[N, C, p]``."""
    rows = []
    for logits in logits_of_each:
        for logit in logits[0]:
            found = torch.autograd.grad(logit, parameters, retain_graph=True, materialize_grads=True, allow_unused=True)
            rows.append(torch.cat([part.flatten() for part in found]))
    return torch.stack(rows).unflatten(0, (-1, len(LABEL_WORDS)))


def kernel(train: Tensor, x: Tensor, formula: str) -> Tensor:
    """Return the kernel of gradients ``[N, C, p]``: ``[D, N, C, X, C]``."""
    return torch.stack(
        [
            torch.einsum("iap,jbp->iajb", train.sign() if way.sign_train else train, x.sign() if way.sign_x else x)
            for way in FORMULAS[formula].directions
        ]
    )


def difference(found: Tensor, truth: Tensor) -> float:
    """Return ‖found − truth‖ / ‖truth‖."""
    return float((found - truth).norm() / truth.norm())


def compare(model: PromptModel, family: str, folder: str) -> tuple[dict[str, float], list[str]]:
    """Compare all engines with the oracle, and the oracle with transformers' own model.

    Returns:
        The largest error of each engine, and the parameters that the factored engine leaves to the `jacobian` engine.
    """
    sides = [
        FeatureExamples(
            prompts(name, lengths, family, seed), Collator(0, segments=False), torch.device("cpu"), model.equal_lengths
        )
        for name, lengths, seed in (("train", TRAIN, 1), ("test", X, 2))
    ]
    own = dict(model.named_parameters())
    truths = [gradients((model(**side.batch([i])) for i in range(len(side))), list(own.values())) for side in sides]
    # The segments that BERT is given here are no part of the checkpoint.
    config = load_config(folder, family=family)
    config.tie_word_embeddings = False
    plain = AUTO_CLASSES[family].from_pretrained(folder, config=config, dtype=torch.float64).eval()
    if plain._can_set_experts_implementation():
        plain.set_experts_implementation("eager")
    theirs = [
        gradients(
            (
                plain(input_ids=batch["input_ids"]).logits[:, int(batch["mask_pos"]), list(LABEL_WORDS)]
                for batch in (side.batch([i]) for i in range(len(side)))
            ),
            list(plain.parameters()),
        )
        for side in sides
    ]
    errors = {"transformers": difference(kernel(truths[0], truths[1], "sgd"), kernel(theirs[0], theirs[1], "sgd"))}
    sizes = [parameter.numel() for parameter in own.values()]
    largest = max(float(truth.abs().max()) for truth in truths)
    chance = [
        bool(((part != 0) & (part.abs() < CHANCE * largest)).any())
        for part in torch.cat([truth.flatten(0, 1) for truth in truths]).split(sizes, dim=1)
    ]
    left: list[str] = []
    tokens = {token for i in range(len(sides[0])) for token in sides[0].batch([i])["input_ids"][0].tolist()}
    model.requires_grad_(False)
    for name in ENGINES:
        for formula in FORMULAS if name == "factored" else ("sgd", "signgd"):
            kept = [formula == "sgd" or not doubtful for doubtful in chance]
            counted = torch.cat([torch.full((size,), keep) for size, keep in zip(sizes, kept, strict=True)])
            logits_fn, params = model.as_function([n for n, keep in zip(own, kept, strict=True) if keep], tokens)
            problem = KernelProblem(
                train=sides[0],
                x=sides[1],
                formula=FORMULAS[formula],
                num_logits=len(LABEL_WORDS),
                model=ModuleModel(logits_fn, model),
                params=params,
            )
            engine = make_engine(problem, name)
            plan = engine.plan()
            with torch.no_grad():
                found = assemble(engine.blocks(plan), plan, problem)
            truth = kernel(truths[0][..., counted], truths[1][..., counted], formula)
            errors[name] = max(errors.get(name, 0.0), difference(found, truth))
            left = getattr(engine, "fallback_parameters", left) if formula == "sgd" else left
    return errors, left


def try_one(architecture: str, family: str, **settings: object) -> Row:
    """Try an architecture."""
    row = partial(Row, architecture + "".join(f", {name}={value}" for name, value in settings.items()), family)
    with tempfile.TemporaryDirectory() as folder:
        try:
            save_checkpoint(architecture, family, folder, **settings)
        except Exception as error:  # configurations check themselves, each in its own way
            return row(f"not tried: no tiny model ({_short(error)})")
        try:
            config, options = load_config(folder, family=family), LoadOptions(dtype=torch.float64)
            model = load_prompt_model(folder, config, LABEL_WORDS, options)
        except UsageError as error:
            reason = error.data.get("reason") or str(error).replace(folder, "…")
            return row(f"refused: {reason}".replace("|", "/"))
        number = sum(parameter.numel() for parameter in model.parameters())
        try:
            errors, left = compare(model, family, folder)
        except Exception as error:  # so do models
            return row(f"fails: {_short(error)}")
        names = dict(model.named_parameters())
    rest = sum(names[name].numel() for name in left)
    speed = "in full" if not left else "not at all" if rest == number else f"{100 * (1 - rest / number):.0f} %"
    # A forward derivative that is as far off shows that it is the model that computes in float32.
    in_float32 = max(errors["jvp"], errors["transformers"]) > EXACT
    allowed = {name: CLOSE if name != "factored" or in_float32 else EXACT for name in errors}
    wrong = {name: error for name, error in errors.items() if not error <= allowed[name]}
    close = {name: error for name, error in errors.items() if name not in wrong and not error <= EXACT}
    notes = ["equal lengths only"] if model.equal_lengths else []
    notes += [f"{name} to {error:.0e}" for name, error in close.items() if name != "transformers"]
    found = "right" if not wrong else "wrong: " + ", ".join(f"{name} {error:.1e}" for name, error in wrong.items())
    return row(found, speed, ", ".join(notes))


def try_quietly(case: tuple[str, str, dict[str, object]]) -> Row:
    """Try an architecture in a process of its own, for some minutes."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    signal.signal(signal.SIGALRM, _give_up)
    signal.alarm(MOST_SECONDS)
    try:
        return try_one(case[0], case[1], **case[2])
    except TimeoutError:
        return Row(case[0], case[1], f"not tried: it takes more than {MOST_SECONDS} seconds")
    except Exception as error:  # one architecture is not to end the others' trials
        return Row(case[0], case[1], f"fails: {_short(error)}")
    finally:
        signal.alarm(0)


def _give_up(*_: object) -> None:
    raise TimeoutError


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split()).split('. ')[0][:100]}".replace("|", "/")


# Settings that make another head or another attention of an architecture.
VARIANTS: list[tuple[str, str, dict[str, object]]] = [
    ("deberta", "masked", {"legacy": False}),
    ("deberta-v2", "masked", {"legacy": False}),
    ("deberta-v2", "masked", {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}),
    ("falcon", "causal", {"alibi": True}),
    ("gpt_neox", "causal", {"use_parallel_residual": False}),
]


def write_page(rows: Sequence[Row], page: Path) -> None:
    """Write the table."""
    counts = {word: sum(row.found.startswith(word) for row in rows) for word in ("right", "refused", "not tried")}
    lines = [
        TEXT.format(version=transformers.__version__, torch=torch.__version__.partition("+")[0], **{
            name.replace(" ", "_"): count for name, count in counts.items()
        }),
        "| architecture | form | found | factored | notes |",
        "|---|---|---|---|---|",
        *(
            f"| {row.architecture} | {row.family} | {row.found} | {row.speed} | {row.notes} |"
            for row in sorted(rows, key=lambda row: (row.family != "masked", row.architecture))
        ),
    ]  # fmt: skip
    write_atomically(page, lambda file: file.write(("\n".join(lines) + "\n").encode()))


def rows_of(page: Path) -> list[Row]:
    """Read the table of an earlier run, where there is one with this version of transformers."""
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    if f"transformers {transformers.__version__} " not in text:
        return []
    lines = [line for line in text.splitlines() if re.match(r"\| [^|]+ \| (?:masked|causal) \|", line)]
    return [Row(*(cell.strip() for cell in line.strip("|").split("|"))) for line in lines]


TEXT = """# Architectures

What `tools/try_architectures.py` found of architectures that transformers {version} loads as masked or causal
language models, with torch {torch}: {right} are right, {refused} are refused, {not_tried} were not tried. Each was
tried as a model of two layers of 16 features with random weights, asked about prompts of several lengths. The script
makes this page again for a later version of transformers.

* **right**: the kernels of `sgd` and `signgd` by all three engines, and those of `asymmetric_signgd` by the factored
  engine, are those of gradients taken one example and one logit at a time, to 1e-12 in float64. These are the gradients
  of transformers' own model. Where transformers computes in float32 on the way, an engine that differentiates in
  another order comes to 1e-5 at worst; the notes say to what.
* **refused**: the program stops when it has loaded such a model, with one sentence that names the architecture and the
  reason in the table. It asks every model about a few short prompts of random tokens: alone, beside others, and padded.
  The logits of the label words must be those that transformers gives for the whole vocabulary.
* **not tried**: no tiny model could be made, or it takes too long. Such a model, and one that is not in the table, goes
  through the same questions when it is loaded.
* **factored** is how many of the parameters the fast engine takes; the `jacobian` engine takes the rest. The numbers
  are those of tiny models, where embeddings weigh more than in large ones.
* **equal lengths only**: the logits change with padding, although it is masked. Prompts share a batch only where they
  are equally long, in kernels, evaluation, training and linear heads; a warning says so. Results do not depend on the
  batch size, but take more time.

BigBird is asked with full attention, whatever its configuration says: its own choice depends on the length of the first
prompt that it meets. Experts (mixtures) are computed one by one.
"""


def try_all(args: argparse.Namespace) -> None:
    """Try the architectures that a command line names, print what was found, and write the page."""
    check_numbers([Bounds("processes", 1)], vars(args))
    cases = [(name, family, {}) for name, family in architectures()] + VARIANTS
    cases = [case for case in cases if not args.only or case[0] in args.only]
    with ProcessPoolExecutor(args.processes) as pool:
        rows = []
        for row in tqdm(pool.map(try_quietly, cases), total=len(cases), unit="architecture"):
            rows.append(row)
            print(f"{row.architecture} ({row.family}): {row.found} {row.speed} {row.notes}".rstrip(), flush=True)
    tried = {(row.architecture, row.family) for row in rows}
    before = rows_of(args.output) if args.only else []
    write_page([*rows, *(row for row in before if (row.architecture, row.family) not in tried)], args.output)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these architectures alone")
    parser.add_argument("--output", type=Path, default=PAGE, help="the page (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="how many at a time (default: %(default)s)")
    return run_tool(parser, try_all, argv)


if __name__ == "__main__":
    sys.exit(main())
