"""The kernel of language-model prompts as a scikit-learn classifier: the numbers of run.py, from texts in memory."""

import contextlib
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from types import SimpleNamespace
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import Tags
from sklearn.utils.validation import check_is_fitted
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmntk import solvers
from lmntk.data.examples import Example
from lmntk.data.tasks import Task, custom_task, find_task
from lmntk.errors import DataError, ModelError, NoLeaveOneOutError, SettingError, SolverError, UsageError
from lmntk.experiment.classifier_checks import check_arguments
from lmntk.experiment.fit_solver import fit_solver
from lmntk.experiment.prompt_kernel import PromptKernel
from lmntk.experiment.provenance import hash_of_weights
from lmntk.experiment.texts import match_label_words, read_labels, read_texts
from lmntk.kernels.projection_check import DEFAULT_EXAMPLES
from lmntk.solvers.candidates import Given
from lmntk.solvers.gaussian_process import GaussianProcess
from lmntk.solvers.influence import influence
from lmntk.solvers.problem import predicted_classes
from lmntk.solvers.ridge_problem import RidgeProblem
from lmntk.storage.part_names import read_part_keys

logger = logging.getLogger(__name__)

ARGUMENTS = {
    "kernel_formula": "formula",
    "kernel_solver": "solver",
    "mapping": "label_words",
    "model_name_or_path": "model",
    "tokenizer_name": "tokenizer",
}
"""The settings of run.py that have another name as arguments."""


@dataclass(eq=False, repr=False)
class KernelClassifier(ClassifierMixin, BaseEstimator):
    """Classify texts with the empirical neural tangent kernel of a language model's prompts.

    The arguments are the settings of run.py, under the same names and with the same defaults; `formula`, `solver`,
    `label_words`, `model` and `tokenizer` stand for ``--kernel_formula``, ``--kernel_solver``, ``--mapping``,
    ``--model_name_or_path`` and ``--tokenizer_name``. On the same texts kernels and logits are those of run.py with
    ``--few_shot_type prompt``, bit for bit.

    A name, folder or file is loaded once for each `fit`. A model that is passed is never changed: `fit` works on a
    copy. `sklearn.base.clone` shares it with the clone. A pickle of a fitted classifier holds the train texts and their
    kernel; what is loaded from `model` is loaded again at the first prediction, and must have the same weights.

    Args:
        model: A name on the model hub, a folder, a GGUF file, or a masked or causal language model of transformers.
        template: The prompt, such as ``"*cls**sent_0*_It_was*mask*.*sep+*"``.
        label_words: A word for each label, in the order of the logits; or a list of words for the sorted labels.
        task_name: A task of ``lmntk tasks`` whose template, label words and limits apply where none are given.
        formula: ``"sgd"``, ``"signgd"`` or ``"asymmetric_signgd"``.
        solver: ``"lstsq"``, ``"logistic"``, ``"svr"``, ``"svc"`` or ``"asym"``.
        kernel_regularization: Added to the kernel's diagonal, in units of its largest singular value: a number, a list
            of candidates, or ``"auto"``, among which exact leave-one-out of `lstsq` chooses.
        kernel_gamma: Weight of the errors in the solver `asym`.
        kernel_lambda: Weight of the first direction in predictions of `asym`, 0 to 1.
        flattened_targets: Whether `logistic` and `svc` fit one model of two classes to the flattened kernel.
        plain_lbfgs: Whether `logistic` takes the weights at which L-BFGS ends.
        binary_classification: Whether two classes share one logit, the second label word's less the first's.
        adjust_for_init: Whether to fit what the untrained model's logits leave over, and add them back.
        f0_scaling: What the untrained logits are divided by for `adjust_for_init`; 0 means no adjustment. A number, a
            list of candidates, or ``"auto"``.
        exclude_embeddings: Whether to leave out the gradients of the embeddings.
        exclude_head: Whether to leave out the gradients of the language-model head.
        only_biases: Whether to use the gradients of biases alone.
        exclude_first_layers: How many layers' gradients are left out, from the first.
        kernel_parts: What parameters are told apart by in `parts_`: ``"layer"``, ``"kind"``, ``"weight-or-bias"``, or
            several of them, separated by commas.
        kernel_engine: ``"auto"``, ``"factored"``, ``"jacobian"`` or ``"jvp"``; ``"projected"`` for an estimate.
        projection_width: The width of the estimate, 64 by default.
        projection_seed: The seed of its random matrices.
        projection_check: The texts of each side on which its error is measured.
        projection_tolerance: The relative error of its entries on the train texts that chooses the width; beside a
            width, `fit` refuses that width if its error is larger.
        kernel_dtype: Number type of the model and its gradients: ``"float32"``, ``"float64"``, or ``"bfloat16"``, which
            has a percent of error, for half the memory and more speed on processors with instructions for it.
        kernel_memory_gb: Memory in GB that a kernel may take; by default 60% of what is free.
        per_device_train_batch_size: Train texts in a tile of the kernel; by default what suits the engine.
        per_device_eval_batch_size: The same for the texts on the other axis.
        max_seq_length: Longest prompt in tokens, 128 unless the task says otherwise; longer ones are cut.
        first_sent_limit: Longest first sentence in tokens.
        other_sent_limit: Longest other sentence in tokens.
        truncate_head: Whether a prompt that is too long is cut at its beginning.
        use_full_length: Whether prompts may be as long as the model can read.
        segments: Whether BERT is given segment ids of its sentences.
        apply_lora: Whether to use LoRA adapters, those in the folder `model` or new ones.
        lora_r: Rank of new adapters, 8 by default.
        lora_alpha: Scale of new adapters over their rank, 16 by default.
        tokenizer: A tokenizer, its name or its folder; by default the one beside the model.
        gguf_file: Name of a GGUF file in the folder `model`.
        model_family: ``"masked"`` or ``"causal"``, where an architecture has both forms.
        cache_dir: Folder for downloads and converted GGUF files; by default these go beside the GGUF file.
        use_cpu: Whether to leave a GPU alone.
        seed: Seed of weights that the checkpoint lacks, such as new adapters'.
        verbose: Whether to show progress bars.

    Attributes:
        classes_: The labels in the order of the logits.
        projection_error_: Of an estimate, the relative errors of `train_kernel_` as some train texts show them, by
            name; see docs/explanation/projection.md. None for an exact kernel.
        train_kernel_: The kernel of the train texts, as `kernel` returns it.
        parts_: With `kernel_parts`, the parts of `train_kernel_` by name, which sum to it; empty without.
        loo_: The leave-one-out logits of the train texts, with `lstsq`.
        selected_: The numbers of the solver's settings, by name, of which leave-one-out chose those with candidates.

    Example:
        >>> from lmntk import KernelClassifier
        >>> classifier = KernelClassifier("roberta-base", task_name="SST-2", solver="svr")
        >>> classifier.get_params()["solver"]
        'svr'
        >>> classifier.fit(["a great film", "boring"], [1, 0]).predict(["funny"])  # doctest: +SKIP
        array([1])
    """

    model: str | os.PathLike[str] | PreTrainedModel
    _: KW_ONLY
    template: str | None = None
    label_words: Mapping[Any, str] | Sequence[str] | None = None
    task_name: str | None = None
    formula: str = "sgd"
    solver: str = "lstsq"
    kernel_regularization: Given = 0.0
    kernel_gamma: Given = 1.0
    kernel_lambda: Given = 0.5
    flattened_targets: bool = False
    plain_lbfgs: bool = False
    binary_classification: bool = False
    adjust_for_init: bool = False
    f0_scaling: Given = 1.0
    exclude_embeddings: bool = False
    exclude_head: bool = False
    only_biases: bool = False
    exclude_first_layers: int = 0
    kernel_parts: str | None = None
    kernel_engine: str = "auto"
    projection_width: int | None = None
    projection_seed: int = 0
    projection_check: int = DEFAULT_EXAMPLES
    projection_tolerance: float | None = None
    kernel_dtype: str = "float32"
    kernel_memory_gb: float | None = None
    per_device_train_batch_size: int | None = None
    per_device_eval_batch_size: int | None = None
    max_seq_length: int | None = None
    first_sent_limit: int | None = None
    other_sent_limit: int | None = None
    truncate_head: bool = False
    use_full_length: bool = False
    segments: bool = True
    apply_lora: bool = False
    lora_r: int | None = None
    lora_alpha: int | None = None
    tokenizer: str | os.PathLike[str] | PreTrainedTokenizerBase | None = None
    gguf_file: str | None = None
    model_family: str | None = None
    cache_dir: str | None = None
    use_cpu: bool = False
    seed: int = 42
    verbose: bool = False

    def fit(self, texts: Any, labels: Any) -> "KernelClassifier":
        """Load the model, compute the kernel of the train texts with themselves, and fit the solver to it.

        Args:
            texts: Strings, or rows of several sentences each: a list, an array, a pandas Series or DataFrame.
            labels: One label of any type for each text.

        Raises:
            UsageError: An argument, a text or a label cannot be used; the sentence names it.
        """
        with _arguments_in_sentences():
            check_arguments(self)
            keys = () if self.kernel_parts is None else read_part_keys(self.kernel_parts)
            sentences = read_texts(texts)
            values = read_labels(labels, len(sentences))
            task, words, classes = self._task(values, len(sentences[0]))
            names = map(str, values.tolist())
            train = task, words, [Example(*pair) for pair in zip(sentences, names, strict=True)]
            arguments = SimpleNamespace(**{field.name: getattr(self, field.name) for field in fields(KernelClassifier)})
            prompts = PromptKernel(arguments, *train)
            weights = hash_of_weights(prompts.model)
            error = prompts.settle_projection()
            kernel, parts = prompts.kernel_and_parts(keys) if keys else (prompts.kernel(), {})
            solver, chosen, problem = fit_solver(arguments, prompts, kernel)
        # Only now, since a `fit` that fails must leave an earlier one as it was.
        self._train, self._arguments, self._weights, self.classes_ = train, arguments, weights, classes
        self.projection_error_ = error
        self._prompts: PromptKernel | None = prompts
        self._solver: solvers.FittedSolver | None = solver
        self.train_kernel_, self._parts, self.selected_, self._problem = kernel, parts, chosen, problem
        return self

    @property
    def parts_(self) -> dict[str, np.ndarray]:
        """With `kernel_parts`, the parts of `train_kernel_` by name, which sum to it; empty without.

        Raises:
            NotFittedError: `fit` was not called.
        """
        check_is_fitted(self)
        return self._parts

    @property
    def loo_(self) -> np.ndarray:
        """The logits of each train text, predicted by `lstsq` fitted to all others: float64 ``[N, C]``.

        They are exact, in closed form; λ is in units of the largest singular value of the whole kernel.

        Raises:
            NotFittedError: `fit` was not called.
            NoLeaveOneOutError: The solver is another, or the kernel is singular; names a λ that would do.
        """
        try:
            return self._least_squares("loo_").leave_one_out()
        except SolverError as error:
            raise NoLeaveOneOutError(str(error), **error.data) from error

    def influence(self, texts: Any) -> np.ndarray:
        """Return what each train text adds to the logits of texts: the prediction less that of a fit without it.

        Args:
            texts: As for `fit`.

        Returns:
            float64 ``[N, X, C]``, in units of logits: N train texts, X texts, C logits; exact, in closed form.

        Raises:
            NotFittedError: `fit` was not called.
            SolverError: The solver is another than `lstsq`, or the kernel is singular.
            UsageError: A text cannot be used.
        """
        problem = self._least_squares("influence")
        problem.left_out.check_defined(problem.settings.regularization)  # before the kernel is computed
        return influence(problem, self.kernel(texts))

    def predict_std(self, texts: Any) -> np.ndarray:
        """Return the standard deviations of the logits of texts by the Gaussian process of `lstsq`.

        Args:
            texts: As for `fit`.

        Returns:
            float64 ``[X, C]``, in units of logits, without the noise; see `lmntk.solvers.gaussian_process`.

        Raises:
            NotFittedError: `fit` was not called.
            SolverError: The solver is another than `lstsq`, the kernel is asymmetric or singular, or rounding hides the
                variance.
            UsageError: A text cannot be used.
        """
        problem = self._least_squares("predict_std")
        with _arguments_in_sentences():
            process = GaussianProcess(problem)  # before the kernel is computed
            prompts = self._loaded()
            data = prompts.prompts_of(read_texts(texts))
            covariance = process.covariance(prompts.kernel(data), prompts.diagonal(data))
        return np.sqrt(np.diagonal(covariance, axis1=1, axis2=2))

    def _least_squares(self, asked: str) -> RidgeProblem:
        """Return the least-squares problem that `fit` has solved."""
        check_is_fitted(self)
        if self._problem is None:
            solver = self._arguments.solver
            sentence = f"`{asked}` is in closed form for `solver='lstsq'` alone, and `fit` took {solver}"
            raise SolverError(sentence, solver=solver)
        return self._problem

    def kernel(self, texts: Any = None) -> np.ndarray:
        """Compute the kernel of the train texts with others.

        Args:
            texts: As for `fit`; None stands for the train texts.

        Returns:
            float64 ``[N, C, X, C]``, or ``[2, N, C, X, C]`` for `asymmetric_signgd`: N train texts, X texts, C logits.

        Raises:
            NotFittedError: `fit` was not called.
            UsageError: A text cannot be used.
        """
        check_is_fitted(self)
        if texts is None:
            return self.train_kernel_
        with _arguments_in_sentences():
            prompts = self._loaded()
            return prompts.kernel(prompts.prompts_of(read_texts(texts)))

    def predict_logits(self, texts: Any) -> np.ndarray:
        """Predict the logits of texts: what run.py writes into its tables of predictions.

        Args:
            texts: As for `fit`.

        Returns:
            float64 ``[X, C]``, a column for each of `classes_`; with `binary_classification` ``[X, 1]``, where a
            number above 0 stands for the second class.

        Raises:
            NotFittedError: `fit` was not called.
            UsageError: A text cannot be used.
        """
        check_is_fitted(self)
        with _arguments_in_sentences():
            prompts = self._loaded()
            self._solver = self._solver or fit_solver(self._arguments, prompts, self.train_kernel_)[0]
            data = prompts.prompts_of(read_texts(texts))
            f0 = prompts.logits(data) if self._arguments.adjust_for_init else None
            unknown = np.full(
                len(data), -1 if self._arguments.binary_classification else 0
            )  # only the loss depends on labels
            return self._solver.predict(prompts.kernel(data), unknown, f0, "predict").logits

    def predict(self, texts: Any) -> np.ndarray:
        """Predict the labels of texts, ``[X]``; arguments and errors are those of `predict_logits`."""
        logits = self.predict_logits(texts)
        return self.classes_[predicted_classes(logits)]

    def __sklearn_clone__(self) -> "KernelClassifier":
        """An unfitted classifier with the same arguments: a model that was passed is shared, not copied."""
        return type(self)(**self.get_params(deep=False))

    def __sklearn_tags__(self) -> Tags:
        """Tell scikit-learn that this takes texts."""
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array, tags.input_tags.string, tags.no_validation = False, True, True
        return tags

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled: all but the loaded model and the solver's closures, which are made again when needed."""
        state = super().__getstate__()
        return state | {name: None for name in ("_prompts", "_solver") if name in state}

    def _task(self, labels: np.ndarray, num_sentences: int) -> tuple[Task, dict[str, str], np.ndarray]:
        """Return the task of the train texts, its label words, and the labels in the order of the logits."""
        if self.task_name is None:
            if self.template is None:
                raise SettingError(
                    "`template` is missing: give one, as in '*cls**sent_0*_It_was*mask*.*sep+*', or a `task_name`",
                    setting="template", value=None,
                )  # fmt: skip
            words, classes = match_label_words(labels, self.label_words)
            task = custom_task([*(f"text {number}" for number in range(num_sentences)), "label"], [*words])
        else:
            task = find_task(self.task_name)
            if task.regression or task.num_sentences != num_sentences:
                what = "is a regression task" if task.regression else f"has {task.num_sentences} sentences an example"
                raise SettingError(f"`task_name`: {task.name} {what}", setting="task_name", value=task.name)
            given = task.mapping if self.label_words is None else self.label_words
            words, classes = match_label_words(labels, given)
        if len(words) < 2 or (self.binary_classification and len(words) > 2):
            needed = "`binary_classification` needs two" if self.binary_classification else "there must be two or more"
            raise SettingError(
                f"`label_words` has {len(words)} classes, but {needed}", setting="label_words", value=self.label_words
            )
        if len(set(labels.tolist())) < 2:
            raise DataError(
                f"`labels` are all {labels.tolist()[0]!r}: train texts must be of two classes at least", example=None
            )
        return task, words, classes

    def _loaded(self) -> PromptKernel:
        """Return the model and its prompts, loaded where that was not done yet or was left out of a pickle."""
        if self._prompts is None:
            prompts = PromptKernel(self._arguments, *self._train)
            if self._weights != hash_of_weights(prompts.model):
                raise ModelError("`model` has other weights than at `fit`: call `fit` again", model=str(self.model))
            self._prompts = prompts
        return self._prompts


@contextlib.contextmanager
def _arguments_in_sentences() -> Iterator[None]:
    """Let errors name arguments of `KernelClassifier` where they name other settings of run.py."""
    try:
        yield
    except UsageError as error:
        sentence = re.sub("`(" + "|".join(ARGUMENTS) + r")\b", lambda match: "`" + ARGUMENTS[match[1]], str(error))
        error.args = (sentence,)
        raise
