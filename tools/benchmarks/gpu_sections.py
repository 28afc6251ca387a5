"""What tools/check_gpu.sh measures on one device: exactness, two models, and where the time goes.

Each section runs in its own process and reports row by row. It samples less where its time is short, and a failure
becomes a row.
"""

import copy
import gc
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from numpy import ndarray

from benchmarks.engines import (
    PUBLISHED,
    dense_flops,
    make_engine,
    relative_error,
    seconds_of_sampled_jacobians,
    seconds_per_sampled_pair,
)
from benchmarks.inputs import Inputs, Job, load_inputs, load_model, make_problem, true_kernel
from benchmarks.run_times import seconds_of_kernel
from lmntk.errors import first_sentence
from lmntk.kernels import ENGINES, FORMULAS, Engine
from lmntk.kernels.memory import peak_bytes
from lmntk.kernels.timing import StageTimer, clock, product_flops
from lmntk.models.prompt_model import PromptModel

Row = dict[str, Any]
Report = Callable[[Row], None]

FLOAT32, TF32 = "float32", "TF32"
PRECISIONS = {FLOAT32: "highest", TF32: "high"}
"""The precisions of float32 products, as `torch.set_float32_matmul_precision` calls them."""

ALLOWED_ERROR = 2e-6
"""Largest relative error of a kernel in float32; a formula that takes signs may count a few entries otherwise."""

ALLOWED_SIGN_ERROR = 5e-3

NOISE = ("key.bias", "c_attn.bias")
"""Ends of the names of parameters, some of whose gradients are zero except for rounding, and whose signs are noise."""

FEW, MANY = "K = 16", "K = 512"
TRAIN_SIZES = {FEW: 32, MANY: 1024}  # of a task with two labels
TEST_SIZE = 872  # of SST-2


@dataclass(frozen=True)
class Settings:
    """How a section runs.

    Attributes:
        device: The device, as torch calls it.
        tiny: Tiny models and few examples in place of the real ones.
        seconds: How long the section may take.
    """

    device: str
    tiny: bool
    seconds: float

    def job(self, model: str, train: int, x: int, formula: str = "sgd", binary: bool = False) -> Job:
        """Return a job on prompts of random tokens with the lengths of SST-2's."""
        return Job(
            **{"model": model, "task_name": "SST-2", "template": None, "data_dir": None, "original_dir": None},
            **{"train_examples": train, "x_examples": x, "formula": formula, "sample_tiles": 0, "times_only": False},
            **{"binary": binary or FORMULAS[formula].is_asymmetric, "memory_gb": None, "device": self.device},
            threads=torch.get_num_threads(),
        )


class Recorder:
    """Reports the rows of a section, as long as there is time.

    Args:
        settings: The section's device and time.
        report: Takes each row.
        section: The section's name.
    """

    def __init__(self, settings: Settings, report: Report, section: str) -> None:
        self._end = time.monotonic() + settings.seconds
        self._device = torch.device(settings.device)
        self._report = report
        self._section = section

    @property
    def left(self) -> float:
        """The seconds that are left."""
        return self._end - time.monotonic()

    def measure(self, known: Row, work: Callable[..., Row], *arguments: Any) -> bool:
        """Report a row with what `work` finds, or why it found nothing; return whether it found anything.

        Args:
            known: Cells of the row that are known before.
            work: Returns further cells; called with `arguments`.
            *arguments: The arguments of `work`.
        """
        row = {"section": self._section} | known
        if self.left <= 0:
            self._report(row | {"note": "no time was left"})
            return False
        cause = None
        try:
            self._release_memory()
            start = clock(self._device)
            row |= work(*arguments)
            row["measuring_seconds"] = clock(self._device) - start
            row["peak_memory_gb"] = peak_bytes(self._device) / 2**30
        except Exception as error:  # whatever fails on a new device is a result
            cause = f"{type(error).__name__}: {first_sentence(error)}"
        # The error, and the tensors that it holds, are gone here.
        self._report(row if cause is None else row | {"note": cause})
        return cause is None

    def _release_memory(self) -> None:
        """Forget the peak, and release what a failed measurement still holds; main memory is not that short."""
        if self._device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)


def allow(precision: str) -> None:
    """Choose the precision of float32 products from now on, and measure their rate anew when it is needed."""
    torch.set_float32_matmul_precision(PRECISIONS[precision])
    product_flops.cache_clear()


def describe(device: torch.device) -> Row:
    """Return what the device is, and the rates of its large float32 products in both precisions."""
    cells: Row = {"device": platform.processor() or platform.machine(), "torch": torch.__version__}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        cells |= {"device": properties.name, "memory_gb": properties.total_memory / 2**30, "cuda": torch.version.cuda}
    for precision in (TF32, FLOAT32):
        allow(precision)
        cells[f"{precision}_gflops"] = product_flops(device, torch.float32) / 1e9
    return cells


def check_exactness(settings: Settings, report: Report) -> None:
    """Compare every engine with plain float64 autograd, one example and one logit at a time, on the device."""
    recorder = Recorder(settings, report, "exactness")
    recorder.measure({"engine": "matrix product"}, describe, torch.device(settings.device))
    allow(FLOAT32)
    for formula in FORMULAS:
        for architecture in ("bert", "roberta", "gpt2", "llama"):
            job = replace(settings.job(f"tiny-{architecture}", 3, 3, formula), left_out=NOISE)
            known = {"model": job.model, "formula": formula, "n_train": 3, "n_x": 3}
            truth = _Truth(job)
            if recorder.measure(known | {"engine": "autograd", "precision": "float64"}, truth.find):
                for engine in ENGINES:
                    recorder.measure(known | {"engine": engine, "precision": FLOAT32}, truth.error_of, engine)


class _Truth:
    """A kernel by plain autograd."""

    def __init__(self, job: Job) -> None:
        self._job, self._inputs = job, load_inputs(job)

    def find(self) -> Row:
        dtypes = {False: torch.float64, True: torch.float32}
        models = {signed: load_model(self._job, self._inputs, dtype) for signed, dtype in dtypes.items()}
        self._model, self._kernel = models[True], true_kernel(self._job, self._inputs, models).numpy()
        return {}

    def error_of(self, engine: str) -> Row:
        size = self._kernel.shape[1]
        error = relative_error(self._job, engine, self._model, self._inputs, self._kernel, examples=size)
        allowed = ALLOWED_SIGN_ERROR if FORMULAS[self._job.formula].signed else ALLOWED_ERROR
        return {"relative_error": error, "exact": error <= allowed}


class ModelMeasurements:
    """The measurements of one model on the device.

    Args:
        settings: The section's device and size.
        recorder: Knows how much time is left.
        model: A key of `SHAPES`.
        binary: One logit difference in place of two logits.
        truth_examples: Examples on either side whose kernel is computed by autograd.
    """

    SHARE_OF_TIME_LEFT: ClassVar[float] = 0.3

    def __init__(self, settings: Settings, recorder: Recorder, model: str, binary: bool, truth_examples: int) -> None:
        self._recorder = recorder
        sizes = {FEW: 4, MANY: 8} if settings.tiny else TRAIN_SIZES
        x = 12 if settings.tiny else TEST_SIZE
        self.jobs = {size: settings.job(model, train, x, binary=binary) for size, train in sizes.items()}
        self._inputs: dict[str, Inputs] = {size: load_inputs(job) for size, job in self.jobs.items()}
        self._truth_examples = truth_examples
        self._truth: ndarray | None = None
        self._published_per_pair: float | None = None

    def load(self) -> Row:
        """Load the model."""
        self._model = load_model(self.jobs[FEW], self._inputs[FEW], torch.float32)
        return {"parameters": sum(parameter.numel() for parameter in self._model.parameters())}

    def find_truth(self) -> Row:
        """Compute the kernel of some examples by autograd in float64."""
        models: dict[bool, PromptModel] = {False: copy.deepcopy(self._model).double()}
        self._truth = true_kernel(self.jobs[FEW], self._inputs[FEW].first(self._truth_examples), models).numpy()
        return {}

    def measure(self, engine: str, size: str) -> Row:
        """Measure an engine or the published method, whole or on samples."""
        job, inputs = self.jobs[size], self._inputs[size]
        # The published problem changes its model.
        model = copy.deepcopy(self._model) if engine == PUBLISHED else self._model
        problem = make_problem(job, model, inputs, published=engine == PUBLISHED)
        made = make_engine(job, engine, problem)
        pairs = job.train_examples * job.x_examples
        row: Row = {"sampled": True}
        if engine == PUBLISHED:
            row["seconds"] = pairs * seconds_per_sampled_pair(made)
            self._published_per_pair = self._published_per_pair or row["seconds"] / pairs
        elif engine == "jacobian":
            row["seconds"] = seconds_of_sampled_jacobians(made)
        else:
            row |= self._sampled(made)
            row["fallback_parameters"] = made.fallback_parameters
        rate = product_flops(job.torch_device, torch.float32)
        row |= {"seconds_per_pair": row["seconds"] / pairs, "matmul_gflops": rate / 1e9}
        row["roofline_fraction"] = dense_flops(model, problem) / row["seconds"] / rate
        if self._published_per_pair is not None:
            row["speedup_over_published"] = self._published_per_pair / row["seconds_per_pair"]
        if self._truth is not None and size == FEW:
            row["relative_error"] = relative_error(job, engine, model, inputs, self._truth)
        return row

    def stages(self, size: str) -> Row:
        """Measure the stages of the factored engine; waiting for the device at each of them costs time."""
        job = self.jobs[size]
        problem = make_problem(job, self._model, self._inputs[size])
        made = ENGINES["factored"](problem, job.budget, timer=StageTimer(job.torch_device))
        row = self._sampled(made)
        return row | {"seconds_by_stage": {name: round(value, 4) for name, value in made.timer.seconds.items()}}

    def _sampled(self, engine: Engine) -> Row:
        """Time a kernel, or as many of its tiles as fit into some of the time by the engine's own estimate."""
        plan = engine.plan()
        tiles = len(list(plan))
        expected = plan.seconds(engine.estimate_cost(plan))  # this warms the device up, too
        affordable = self.SHARE_OF_TIME_LEFT * self._recorder.left * tiles / max(expected, 1e-9)
        sampled = max(1, min(tiles, int(affordable)))
        seconds, _ = seconds_of_kernel(engine, 0 if sampled == tiles else sampled)
        cells = {"seconds": seconds, "sampled": sampled < tiles, "expected_seconds": expected}
        return cells | {"tiles": tiles, "sampled_tiles": sampled}


def measure_roberta(settings: Settings, report: Report) -> None:
    """Measure RoBERTa-base's shape with random weights: the published method and the engines, K = 16 and K = 512."""
    model = "tiny-roberta" if settings.tiny else "roberta-base"
    recorder = Recorder(settings, report, "RoBERTa-base")
    _measure_model(ModelMeasurements(settings, recorder, model, False, truth_examples=4), recorder, (FEW, MANY))


def measure_llama(settings: Settings, report: Report) -> None:
    """Measure a Llama of 1.2 billion parameters, one logit difference, K = 16."""
    model = "tiny-llama" if settings.tiny else "llama-1b"
    recorder = Recorder(settings, report, "Llama 1.2 B")
    _measure_model(ModelMeasurements(settings, recorder, model, True, truth_examples=2), recorder, (FEW,))


def _measure_model(measurements: ModelMeasurements, recorder: Recorder, sizes: Sequence[str]) -> None:
    """Measure first what matters most: float32, then the stages, then TF32."""
    common: Row = {"model": measurements.jobs[FEW].model, "formula": "sgd"}
    allow(FLOAT32)
    if not recorder.measure(common | {"engine": "loading"}, measurements.load):
        return
    recorder.measure(common | {"engine": "autograd", "precision": "float64"}, measurements.find_truth)
    known = {
        size: common | {"n_train": job.train_examples, "n_x": job.x_examples} for size, job in measurements.jobs.items()
    }
    engines = [(PUBLISHED, FEW), *(("factored", size) for size in sizes), ("jacobian", FEW)]
    for precision in PRECISIONS:
        allow(precision)
        for engine, size in engines:
            cells = known[size] | {"engine": engine, "precision": precision}
            recorder.measure(cells, measurements.measure, engine, size)
        if precision == FLOAT32:
            for size in sizes:
                cells = known[size] | {"engine": "factored, by stages", "precision": precision}
                recorder.measure(cells, measurements.stages, size)


SECTIONS: dict[str, tuple[Callable[[Settings, Report], None], float]] = {
    "exactness": (check_exactness, 0.2),
    "RoBERTa-base": (measure_roberta, 0.5),
    "Llama 1.2 B": (measure_llama, 0.3),
}
"""The sections in their order, and the share of the time that each may take."""
