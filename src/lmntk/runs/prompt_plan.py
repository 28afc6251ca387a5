"""The kernel runs that rank prompts: one for each prompt and split, and where their results go."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from lmntk.data.tasks import TASKS, Task
from lmntk.errors import FileError, SettingError
from lmntk.prompts.label_words import parse_mapping, read_mapping
from lmntk.prompts.prompt_files import all_lines, all_prompts
from lmntk.prompts.templates import Template
from lmntk.runs.behaviour_plan import Case
from lmntk.runs.case_run import CaseRun
from lmntk.runs.script_run import digest, hashes, weight_files

_TASK_KEYS = {task.key: task for task in TASKS.values()}


@dataclass(frozen=True)
class Prompt:
    """A template and the label words.

    Attributes:
        template: The template.
        words: The label and the label word of each class, in the order of the logits.
    """

    template: str
    words: tuple[tuple[str, str], ...]

    @property
    def mapping(self) -> str:
        """The label words as the setting `mapping` has them."""
        return str(dict(self.words))

    @property
    def short_words(self) -> str:
        """``terrible / great``."""
        return " / ".join(word for _, word in self.words)

    @functools.cached_property
    def name(self) -> str:
        """The name of its folder of runs."""
        return f"prompt-{digest([self.template, self.words])[:10]}"


@dataclass(frozen=True)
class PromptSources:
    """Where prompts come from: every template goes with every mapping, and pairs as they are.

    Attributes:
        templates: Templates.
        mappings: Mappings, as `parse_mapping` reads them.
        template_path: A file with a template on each line.
        mapping_path: A file with a mapping on each line.
        prompt_path: A file with a template, a tab and its mapping on each line, such as LM-BFF's search writes.
        top: How many lines of each file are taken, from the first; None takes all.
        own: Whether the task's own template and mapping are among them.
    """

    templates: Sequence[str] = ()
    mappings: Sequence[str] = ()
    template_path: str | None = None
    mapping_path: str | None = None
    prompt_path: str | None = None
    top: int | None = None
    own: bool = True

    def prompts(self, task_name: str) -> list[Prompt]:
        """Return the prompts for a task, each once; the task's own first.

        Raises:
            SettingError: There is none, or a mapping does not fit the task.
            FileError: A file cannot be read.
            TemplateError: A template is misspelt.
        """
        task = _TASK_KEYS.get(task_name.lower())
        templates = [*([task.template] if task and self.own else []), *self.templates]
        mappings: list[str | Mapping[str, str]] = [*([task.mapping] if task and self.own else []), *self.mappings]
        if self.template_path is not None:
            templates += all_lines(self.template_path, "template")[: self.top]
        if self.mapping_path is not None:
            mappings += all_lines(self.mapping_path, "mapping")[: self.top]
        pairs: list[tuple[str, str | Mapping[str, str]]] = [*product(templates, mappings)]
        if self.prompt_path is not None:
            pairs += all_prompts(self.prompt_path)[: self.top]
        found = dict.fromkeys(_checked(template, mapping, task) for template, mapping in pairs)
        if not found:
            kind = "mappings" if templates else "templates"
            raise SettingError(f"there is no prompt to rank: give `{kind}`, or a file of them", setting=kind)
        return [*found]


def _checked(template: str, mapping: str | Mapping[str, str], task: Task | None) -> Prompt:
    """Check a prompt as far as the task is known; its tokens are checked by its run."""
    words = read_mapping(mapping) if task is None else parse_mapping(mapping, task.labels)
    if task is not None:
        Template.parse(template, task.num_sentences, len(task.labels), task.name)
    return Prompt(template, tuple(words.items()))


@dataclass(frozen=True)
class PromptCell:
    """What a run is of: a prompt on one split."""

    case: Case
    k: int
    seed: int
    prompt: Prompt


@dataclass(frozen=True, eq=False)
class PromptRun(CaseRun):
    """The kernel run of a prompt.

    Attributes:
        plan: What all of them share.
        cell: What it is of.
    """

    plan: "PromptPlan"
    cell: PromptCell
    trainer = "kernel"

    def __str__(self) -> str:
        """``*cls**sent_0*_It_was*mask*. terrible / great, seed 13``."""
        prompt = self.cell.prompt
        return f"{prompt.template} {prompt.short_words}, seed {self.cell.seed}"

    @property
    def kind(self) -> str:
        """What the run does, for estimates."""
        return f"kernel {self.plan.formula}"

    @property
    def folder(self) -> Path:
        """``output/CASE/PROMPT/K-SEED``."""
        return self.plan.output / self.cell.case.name / self.cell.prompt.name / self.split.name

    @property
    def tag(self) -> str:
        """TAG of run_fewshot.sh."""
        return f"prompts-{self.cell.case.name}-{self.cell.prompt.name}"

    @property
    def flags(self) -> list[str]:
        """The settings as words, and last those that the user gives to every run."""
        own = {
            "disable_tqdm": "True", "kernel_formula": self.plan.formula, "template": self.cell.prompt.template,
            "mapping": self.cell.prompt.mapping, "do_eval": str("dev" in self.evaluated),
            "do_predict": str("test" in self.evaluated),
        }  # fmt: skip
        return [*(f"--{name}={value}" for name, value in own.items()), *self.plan.further]

    @property
    def evaluated(self) -> tuple[str, ...]:
        """Dev; test only where it is asked for, or where there is no dev."""
        has_dev = self.cell.case.has_dev(self.cell.k, self.cell.seed)
        return (*(("dev",) if has_dev else ()), *(("test",) if self.plan.with_test or not has_dev else ()))


@dataclass(frozen=True)
class PromptPlan:
    """All runs of a ranking.

    Attributes:
        output: Everything is written below this folder.
        model: A folder, or a name on the model hub.
        case: The task with its splits.
        k: The training examples of each class.
        seeds: The seeds of the k-shot splits.
        prompts: The prompts.
        formula: The kernel formula.
        with_test: Whether test is predicted too.
        further: Further words for run.py, given to every run.
    """

    output: Path
    model: str
    case: Case
    k: int
    seeds: Sequence[int]
    prompts: Sequence[Prompt]
    formula: str
    with_test: bool
    further: Sequence[str] = ()

    @functools.cached_property
    def model_hashes(self) -> dict[str, str]:
        """The hashes of the model's files; none for a name on the hub."""
        return hashes(weight_files(Path(self.model)))

    @functools.cached_property
    def runs(self) -> dict[Prompt, list[PromptRun]]:
        """The runs of each prompt, one for each seed."""
        return {
            prompt: [PromptRun(self, PromptCell(self.case, self.k, seed, prompt)) for seed in self.seeds]
            for prompt in self.prompts
        }

    def check(self) -> None:
        """Check that there are splits, and that no finished run would be lost.

        Raises:
            FileError: A split is missing.
            SettingError: Runs of other settings are there.
        """
        for seed in self.seeds:
            folder = self.case.split(self.k, seed)
            if not folder.is_dir():
                sentence = f"there is no split {folder}: draw it with `lmntk splits`, or leave out this K or this seed"
                raise FileError(sentence, path=folder)
        for run in (run for runs in self.runs.values() for run in runs):
            run.refuse_stale()
