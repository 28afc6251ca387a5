"""The flags of run.py: six dataclasses, and the command line or JSON file that fills them.

The names are frozen, since scripts and papers use them. Flags whose default is None, and whose help says so, are
completed from the task's row in data/tasks.py, or else from the general defaults below.
"""

import copy
import dataclasses
import functools
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from transformers import HfArgumentParser
from transformers import TrainingArguments as TransformersTrainingArguments

from lmntk.config import as_published
from lmntk.config.command_words import check_words
from lmntk.config.flag_fields import flag, required
from lmntk.config.kernel_arguments import KernelArguments
from lmntk.config.legacy_flags import full_name, is_flag, translate
from lmntk.config.old_arguments import OldArguments, translate_old_flags
from lmntk.data.tasks import TASKS, join_columns
from lmntk.distributed import rejoin_after_restart
from lmntk.errors import UsageError
from lmntk.kernels.tiling import TileRequest
from lmntk.solvers.candidates import AUTO
from lmntk.storage.run_results import is_zero_shot

GENERAL_MAX_SEQ_LENGTH = 128
GENERAL_NUM_SAMPLE = 16
GENERAL_LORA_RANK = 8
GENERAL_LORA_ALPHA = 16

_FROM_TASK = "default: the task's own"


class ActiveTrainer(StrEnum):
    """The trainer that predicts in a run; all but the last are values of `trainer`."""

    STANDARD = "standard"
    KERNEL = "kernel"
    LINEARISED = "linearised"
    LINEARHEAD = "linearhead"
    ZERO_SHOT = "zero-shot"


@dataclass
class ModelArguments:
    """The model, and how it is asked."""

    _argument_group_name = "Model"

    model_name_or_path: str = required("The folder of a pre-trained model, or its name on the model hub.")
    config_name: str | None = flag("The configuration, if it is not the model's own.")
    tokenizer_name: str | None = flag("The tokenizer, if it is not the model's own.")
    cache_dir: str | None = flag("The folder of downloaded models and of converted GGUF files.")
    few_shot_type: str = flag(
        "finetune: classification head on the plain text; prompt: label words at the mask of a template; "
        "prompt-demo: the same with solved examples in the prompt.",
        "prompt-demo",
        ("finetune", "prompt", "prompt-demo"),
    )
    model_family: str | None = flag(
        "Masked or causal language model; default: what the checkpoint's config says.",
        choices=("masked", "causal"),
    )
    gguf_file: str | None = flag(
        "The name of a GGUF file in the model's folder, which holds the weights; it is converted once, into "
        "--cache_dir, or else into converted-models beside the folder of k-shot splits."
    )
    segments: bool = flag(
        "Tell BERT which sentence each token belongs to; with --no_segments all belong to the first.", True
    )
    random_segment: bool = flag("Draw all segment (token type) embeddings at random; BERT only.", False)
    l2_loss: bool = flag("Train with the squared error instead of the cross entropy.", False)
    use_task_word: bool = flag("Take the logits of the label words; always so here, accepted for old scripts.", False)
    apply_lora: bool = flag("Adapt the attention's query and value projections with LoRA.", False)
    lora_r: int | None = flag(f"Rank of the LoRA matrices; default: that of loaded adapters, else {GENERAL_LORA_RANK}.")
    lora_alpha: int | None = flag(
        f"Numerator of LoRA's scale, alpha / r; default: that of loaded adapters, else {GENERAL_LORA_ALPHA}."
    )


@dataclass
class DataArguments:
    """The examples, and the prompts made of them."""

    _argument_group_name = "Data and prompts"

    task_name: str = required(
        f"The task, in lower or upper case: {', '.join(TASKS)}; or custom, or any other name, with --custom_columns."
    )
    data_dir: str = required(
        "The folder of the task's train, dev and test files, made by tools/generate_k_shot_data.py."
    )
    custom_columns: str | None = flag(
        "For your own CSV, TSV or JSON-lines files: the names of the text columns and, last, of the label column, e.g. "
        "text,label; for a file without a header their numbers, from 0. Needs --mapping, whose keys are the labels, "
        "and --template."
    )
    num_k: int = flag("Training examples per class, for the record; the data folder decides.", 16)
    tag: str = flag("A word to find this run by in the log.", "")
    max_seq_length: int | None = flag(
        f"Longest sequence, in tokens; {_FROM_TASK}, else {GENERAL_MAX_SEQ_LENGTH}. Longer ones are cut."
    )
    first_sent_limit: int | None = flag(f"Longest first sentence, in tokens; {_FROM_TASK}, else no limit.")
    other_sent_limit: int | None = flag(f"Longest other sentence, in tokens; {_FROM_TASK}, else no limit.")
    task_defaults: bool = flag(
        "Complete lengths and --num_sample from the task's own; with --no_task_defaults from the general defaults.",
        True,
    )
    use_full_length: bool = flag("Let sequences be as long as the model can read.", False)
    truncate_head: bool = flag("Cut the beginning of long texts, not the end.", False)
    truncate_demonstrations_only: bool = flag("Let --truncate_head affect prompts with demonstrations only.", False)
    template: str | None = flag(f"Prompt template, e.g. '*cls**sent_0*_It_was*mask*.*sep+*'; {_FROM_TASK}.")
    mapping: str | None = flag(
        f"Label words as a Python dictionary, e.g. \"{{'0':'terrible','1':'great'}}\"; {_FROM_TASK}."
    )
    template_path: str | None = flag("File with one template per line.")
    template_id: int | None = flag("Line of --template_path to use, from 0; default: all lines.")
    top_n_template: int | None = flag("Use the first n lines of --template_path together.")
    mapping_path: str | None = flag("File with one mapping per line.")
    mapping_id: int | None = flag("Line of --mapping_path to use, from 0.")
    prompt_path: str | None = flag("File with a template, a tab and a mapping per line.")
    prompt_id: int | None = flag("Line of --prompt_path to use, from 0.")
    num_sample: int | None = flag(
        "Draws of demonstrations per dev and test example, whose logits are averaged; "
        f"{_FROM_TASK}, else {GENERAL_NUM_SAMPLE}."
    )
    num_demo: int = flag("Demonstrations per class.", 1)
    auto_demo: bool = flag("Make the template for demonstrations from the plain template.", True)
    double_demo: bool = flag("Double --max_seq_length to make room for demonstrations.", False)
    demo_filter: bool = flag("Draw demonstrations from the most similar examples only.", False)
    demo_filter_rate: float = flag("Share of each class that counts as most similar.", 0.5)
    demo_filter_model: str | None = flag("Name of the sentence embeddings in the data folder that measure similarity.")
    gpt3_in_context_head: bool = flag("In-context learning: random examples before the query.", False)
    gpt3_in_context_tail: bool = flag("In-context learning: random examples after the query.", False)
    gpt3_in_context_num: int = flag("Number of in-context examples.", 32)
    overwrite_cache: bool = flag("Read the data files again; always so here, accepted for old scripts.", False)
    debug_mode: bool = flag("Log more details.", False)


@dataclass
class RunArguments:
    """How a run trains, evaluates and records its results."""

    _argument_group_name = "Training and evaluation"

    as_published: bool = flag(
        "Take the published program's value of every setting in docs/reference/as-published.md that is not given.",
        False,
    )
    trainer: str = flag(
        "standard: fine-tune; kernel: predict with the kernel; linearised: fine-tune the model's tangent at its "
        "pre-trained weights; linearhead: fit the last layer only.",
        "standard",
        [trainer.value for trainer in ActiveTrainer if trainer != ActiveTrainer.ZERO_SHOT],
    )
    no_train: bool = flag("Evaluate the model as it is (zero-shot), with any trainer.", False)
    no_predict: bool = flag("Leave out the test set, even with --do_predict.", False)
    overwrite_output_dir: bool = flag(
        "Fine-tune into an output folder that is not empty; runs with kernels may always continue in theirs.", False
    )
    random_model_init: bool = flag(
        "Draw all weights at random, with --seed, instead of loading the checkpoint's.", False
    )
    from_linearhead: bool = flag("Fit the last layer first, then train or compute the kernel from there.", False)
    linear_head_halved: bool = flag(
        "Linear head of two classes: fit a softmax over both rows, and give the head half of its log-odds.", False
    )
    plain_lbfgs: bool = flag(
        "logistic and linear heads: take the weights at which L-BFGS ends, even short of the minimum.",
        False,
    )
    linear_head_order: str = flag(
        "Order of the train examples in the linear head's cross-validation: of the file, or of the training sampler.",
        "file",
        ("file", "sampler"),
    )
    optimizer: str = flag("AdamW or plain SGD.", "adam", ("adam", "sgd"))
    optimizer_variant: str = flag("signgd: step along the gradient's sign; needs --optimizer sgd.", "", ("", "signgd"))
    fix_layers: int = flag("Freeze the embeddings and the first n layers.", 0)
    clip_frozen: bool = flag("Count the gradients of frozen layers in the norm for --max_grad_norm.", False)
    decay_head_norm: bool = flag(
        "Decay all weights except those named bias or LayerNorm.weight: also RoBERTa's lm_head.layer_norm.weight.",
        False,
    )
    evaluate_during_training: bool = flag("Evaluate on dev while training and keep the best model.", False)
    save_at_last: bool = flag("Keep the last model instead of the best on dev.", False)
    save_logit: bool = flag("Write the test logits to <task>-<model_id>-<array_id>.npy for an ensemble.", False)
    save_logit_dir: str | None = flag("Folder for --save_logit.")
    save_logit_pairs: bool = flag("With --save_logit, write a single logit f as the two logits -f and f.", False)
    model_id: int = flag("Number of the prompt in an ensemble.", -1)
    array_id: int = flag("Number of the run in an ensemble.", -1)
    sweep: bool = flag("Put each run into a new folder inside the output folder.", False)


@dataclass
class TransformersArguments(TransformersTrainingArguments):
    """The flags of transformers' Trainer."""

    _argument_group_name = "The flags of transformers' Trainer"

    output_dir: str = required("Folder for results, kernels and models.")
    ddp_timeout: int = flag("Seconds that processes wait for each other: a day.", 24 * 3600)


@dataclass
class TrainingArguments(KernelArguments, RunArguments, OldArguments, TransformersArguments):
    """Everything about the run itself: kernels, training, and the arguments of transformers' Trainer.

    Attributes:
        train_tile: Train examples in a kernel tile: `per_device_train_batch_size` if the user gave it; None lets the
            engine choose.
        x_tile: The same for X examples and `per_device_eval_batch_size`.
        published_settings: The settings whose value `as_published` has changed.
        kernel_selection: How the solver's settings were chosen among candidates, for the record; None without any.
        keeps_checkpoints: Whether the user said when to save checkpoints; if so they stay after training.
    """

    train_tile: int | None = dataclasses.field(default=None, init=False)
    x_tile: int | None = dataclasses.field(default=None, init=False)
    published_settings: tuple[str, ...] = dataclasses.field(default=(), init=False)
    kernel_selection: dict[str, Any] | None = dataclasses.field(default=None, init=False)
    keeps_checkpoints: bool = dataclasses.field(default=False, init=False)

    def __post_init__(self) -> None:
        """Let `no_train` and `no_predict` override the `do_…` settings that run_fewshot.sh always passes."""
        on_cpu = self.use_cpu or not torch.cuda.is_available()
        rejoin_after_restart(self.ddp_backend or ("gloo" if on_cpu else "nccl"), timedelta(seconds=self.ddp_timeout))
        translate_old_flags(self)
        self.read_solver_settings()
        super().__post_init__()
        self.do_train = self.do_train and not self.no_train
        self.do_predict = self.do_predict and not self.no_predict

    @property
    def active_trainer(self) -> "ActiveTrainer":
        """The trainer that predicts: ``ZERO_SHOT`` where `trainer` has nothing to train."""
        return ActiveTrainer.ZERO_SHOT if is_zero_shot(vars(self)) else ActiveTrainer(self.trainer)

    @property
    def tiles(self) -> TileRequest:
        """The tile sizes that the user asks for."""
        return TileRequest(self.train_tile, self.x_tile)

    @property
    def fits_linear_head(self) -> bool:
        """Whether the last layer is fitted, alone or first."""
        trainer = self.active_trainer
        return trainer == ActiveTrainer.LINEARHEAD or (self.from_linearhead and trainer != ActiveTrainer.ZERO_SHOT)

    def with_changes(self, **changes: Any) -> "TrainingArguments":
        """Return a copy with other values.

        `dataclasses.replace` would call ``__post_init__`` again, which joins processes and picks devices.

        Args:
            **changes: The fields to change, and their values.
        """
        changed = copy.copy(self)
        for name, value in changes.items():
            setattr(changed, name, value)
        return changed


# The parser gets the parts of TrainingArguments, which --help shows as groups.
_GROUPS = (ModelArguments, DataArguments, KernelArguments, RunArguments, OldArguments, TransformersArguments)


def parse_arguments(argv: Sequence[str]) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    """Read a command line: ``--flag value …``, or the name of a JSON file with the same, or the file and then flags.

    Unambiguous abbreviations of flags and old spellings are understood; the last of repeated flags counts.

    Args:
        argv: The command line without the program's name.

    Returns:
        The arguments of the model, the data and the run; `validation.check_arguments` checks which go together.

    Raises:
        UsageError: A flag that does not exist, lacks its value, or has one that it cannot take.
        SystemExit: Status 0, after printing the help.
    """
    flags = flag_names()
    if argv and argv[0].endswith(".json"):
        argv = [*_read_config(Path(argv[0]), flags), *argv[1:]]
    check_words(argv)
    argv = translate(argv, flags)
    given = {token[2:].partition("=")[0] for token in argv if is_flag(token)}
    own = vars(make_parser().parse_args(argv))
    values = as_published.applied(own, given)
    model = ModelArguments(**_values_of(ModelArguments, values))
    data = DataArguments(**_values_of(DataArguments, values))
    try:
        training = TrainingArguments(**_values_of(TrainingArguments, values))
    except (ValueError, ImportError, OSError) as error:  # transformers' own objections
        raise UsageError(" ".join(str(error).split())) from error
    training.published_settings = tuple(name for name in own if values[name] != own[name])
    if "per_device_train_batch_size" in given:
        training.train_tile = training.per_device_train_batch_size
    if "per_device_eval_batch_size" in given:
        training.x_tile = training.per_device_eval_batch_size
    if (training.resume_from_checkpoint or "").lower() in ("false", "no", "none", ""):
        training.resume_from_checkpoint = None
    wants_some = bool(given & {"save_steps", "save_strategy", "save_total_limit"})
    training.keeps_checkpoints = wants_some and training.save_strategy != "no"
    return model, data, training


class _Parser(HfArgumentParser):
    """A parser that raises UsageError instead of printing its usage, which is pages long."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(_as_sentence(message))


@functools.cache
def make_parser() -> HfArgumentParser:
    """Return the parser of run.py's flags, written out in full."""
    parser = _Parser(
        cast(Any, _GROUPS),  # its annotation asks for instances where it means classes
        prog="run.py",
        usage="run.py --flag value … | run.py config.json",
        description="Few-shot text classification with a language model: by its kernel, by training, or as it is.",
        allow_abbrev=False,  # legacy_flags.translate has written all names out
    )
    for action in parser._actions:
        if action.dest in AUTO:  # HfArgumentParser takes what may be a number or a text for a number
            action.type = str
    return parser


def _as_sentence(message: str) -> str:
    """Turn argparse's message into a sentence that names each flag once."""
    message = re.sub(r"(--\w+)/--[\w-]+", r"\1", message.removeprefix("argument "))
    missing = message.removeprefix("the following arguments are required: ")
    if missing != message:
        return f"{missing} must be given; run.py --help explains every flag"
    stray = message.removeprefix("unrecognized arguments: ")
    if stray != message:
        return f"'{stray}' belongs to no flag: a value follows its --flag, and one with spaces needs quotes"
    return message


def flag_names() -> set[str]:
    """Return the names of all flags, and of the ``no_`` forms of flags that are on by default."""
    fields = [field for group in _GROUPS for field in dataclasses.fields(group) if field.init]
    names = {field.name for field in fields}
    return names | {f"no_{field.name}" for field in fields if field.default is True} | {"help"}


def _values_of(group: type, values: Mapping[str, Any]) -> dict[str, Any]:
    return {field.name: values[field.name] for field in dataclasses.fields(group) if field.init}


def _read_config(path: Path, flags: Collection[str]) -> list[str]:
    """Turn a JSON object into the equivalent command line, which is then checked as usual; null means not given."""
    try:
        config = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_once_each)
    except OSError as error:
        raise UsageError(f"cannot read the configuration file {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise UsageError(f'{path} must hold one JSON object, {{"flag": value, …}}')
    argv: list[str] = []
    for key, value in config.items():
        try:
            flag = f"--{full_name(key, flags)}"
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from error
        if flag == "--custom_columns" and isinstance(value, list):
            argv.append(f"{flag}={join_columns(map(str, value))}")
        elif flag.removeprefix("--") in (*AUTO, "kernel_steps") and isinstance(value, list):
            argv.append(f"{flag}={','.join(map(str, value))}")
        elif isinstance(value, list):
            argv += [flag, *map(str, value)]
        elif value is not None:
            argv.append(f"{flag}={json.dumps(value) if isinstance(value, dict) else value}")
    return argv


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the dictionary of a JSON object; refuse repeated keys, of which json would silently keep the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"'{next(name for name in names if names.count(name) > 1)}' is given twice")
    return found
