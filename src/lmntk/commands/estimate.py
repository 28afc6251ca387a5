"""What the kernels of a k-shot task cost on one and on many GPUs: by counting alone, without model and GPU.

The plan is the factored engine's own: its tiles, its memory, and how it assigns tiles to processes. What the engine
measures on the machine is counted here instead: the factors' bytes, from the shape of a BERT or RoBERTa whose last
layer computes one position, and seconds, from flops. `run.py --dry_run` measures on the machine itself.

    python tools/estimate_kernel_cost.py --shape roberta-large
    python tools/estimate_kernel_cost.py --shape 1b --k 16 --processes 1 8
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace

from lmntk.config.tool_parser import Parser, run_tool
from lmntk.errors import Bounds, SettingError, check_numbers
from lmntk.kernels import FORMULAS, TileRequest
from lmntk.kernels.cost_model import FLOAT32, SHAPES, CostEstimate, DeviceTooSmallError, KernelTask
from lmntk.kernels.tuning import DEFAULT_TUNING
from lmntk.storage.tables import format_table
from lmntk.storage.wording import duration

SIZES = ("layers", "hidden", "intermediate", "vocabulary")
TILES = ("per_device_train_batch_size", "per_device_eval_batch_size")
COUNTS = (*SIZES, *TILES, "k", "classes", "logits", "x_examples", "tokens", "processes")
BOUNDS = (
    *(Bounds(name, 1, 10**6) for name in COUNTS),
    Bounds("rate", 1e-6, 1e9),
    Bounds("memory_gb", 0, 1e9, above=True),
)


def make_parser() -> Parser:
    """Return the flags."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="roberta-large", help="the model (default roberta-large)")
    for name in (*SIZES, *TILES):
        parser.add_argument(f"--{name}", type=int, help="as in run.py" if name in TILES else "replaces the shape's")
    parser.add_argument("--k", type=int, default=512, help="train examples, and dev examples, a class (default 512)")
    parser.add_argument("--classes", type=int, default=2, help="classes of the task (default 2)")
    parser.add_argument("--logits", type=int, help="1 under --binary_classification (default: one a class)")
    parser.add_argument("--x_examples", type=int, default=1000, help="test examples (default 1000)")
    parser.add_argument("--tokens", type=int, default=30, help="mean length of a prompt (default 30)")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 64], help="one a device (default 1 64)")
    parser.add_argument("--rate", type=float, default=40, help="TFLOP/s of large float32 matrix products (default 40)")
    parser.add_argument("--memory_gb", type=float, default=80, help="memory of a device, in 2**30 bytes (default 80)")
    parser.add_argument("--formula", choices=FORMULAS, default="sgd", help="the kernel (default sgd)")
    return parser


def task_of(given: argparse.Namespace) -> KernelTask:
    """Return the kernels that the flags describe."""
    check_numbers(BOUNDS, vars(given))
    formula = FORMULAS[given.formula]
    logits = given.logits or (1 if formula.is_asymmetric else given.classes)
    if formula.is_asymmetric and logits != 1:
        raise SettingError(f"`formula={given.formula}` takes `logits=1`", setting="logits")
    sizes = {name: size for name in SIZES if (size := getattr(given, name))}
    per_split = given.k * given.classes
    return KernelTask(
        shape=replace(SHAPES[given.shape], **sizes),
        sizes={"train": per_split, "dev": per_split, "test": given.x_examples},
        tokens=given.tokens,
        formula=formula,
        num_logits=logits,
        product_flops=given.rate * 1e12,
        device_bytes=given.memory_gb * 2**30,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table of costs; return the exit status."""
    return run_tool(make_parser(), _print_estimates, argv)


def _print_estimates(given: argparse.Namespace) -> None:
    task = task_of(given)
    tiles = TileRequest(*(getattr(given, name) for name in TILES))
    try:
        alone = task.estimate(1)
        found = [task.estimate(number, tiles) for number in given.processes]
    except DeviceTooSmallError as error:
        least = error.needed / 2**30 + 0.05
        raise SettingError(
            f"`memory_gb`: the tiles of train × {error.split} take {least:.1f} GB with the model", setting="memory_gb"
        ) from error
    print(format_table([_row(estimate, alone) for estimate in found], "markdown"))
    kernels, parameters = alone.kernels, task.shape.parameters
    print(
        f"{parameters / 1e6:.0f} M parameters, {given.rate:g} TFLOP/s, of which products of factors reach "
        f"{DEFAULT_TUNING.product_efficiency:.0%}. Disk: checkpoint {FLOAT32 * parameters / 2**30:.2f} GB, kernels "
        f"{sum(kernels) / 2**30:.2f}, tiles {max(kernels) / 2**30:.2f}. The first process takes up to "
        f"{2 * max(kernels) / 2**30:.2f} GB of the machine's own memory for a kernel."
    )


def _row(estimate: CostEstimate, alone: CostEstimate) -> dict[str, str]:
    """Return a line of the table; the speed-up is over one process in tiles of its own choice."""
    return {
        "processes": str(estimate.processes),
        "tiles": str(estimate.tiles),
        **{f"train × {split}": duration(seconds) for split, seconds in estimate.seconds.items()},
        "all": duration(estimate.total_seconds),
        "speed-up": f"{alone.total_seconds / estimate.total_seconds:.1f}",
        "GPU memory each": f"{estimate.memory / 2**30:.1f} GB",
        "disk": f"{estimate.disk / 2**30:.1f} GB",
        "slowest / mean": f"{estimate.balance:.2f}",
    }
