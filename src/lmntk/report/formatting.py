"""The words and numbers of a report, as HTML."""

import html
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lmntk.analysis.scores import METRIC_NAMES
from lmntk.analysis.summary import KernelSummary, RunSummary
from lmntk.storage.run_results import is_zero_shot
from lmntk.storage.wording import quantity


def escaped(value: object) -> str:
    """Return a user's text as HTML."""
    return html.escape(str(value), quote=True)


def quoted(texts: Sequence[str]) -> str:
    """Return sentences one below the other, each in the direction of its script."""
    return "<br>".join(f'<bdi dir="auto">{escaped(text)}</bdi>' for text in texts)


def percent(value: float | None) -> str:
    """Return a fraction in percent, a dash for NaN, nothing for None.

    Examples:
        >>> percent(0.5), percent(float("nan")), percent(None)
        ('50.0', '–', '')
    """
    return "" if value is None else _number(100 * value, ".1f")


def cosine(value: float | None) -> str:
    """Return a number from −1 to 1, a dash for NaN, nothing for None."""
    return "" if value is None else _number(value, ".3f")


def _number(value: float, form: str) -> str:
    return "–" if np.isnan(value) else format(value, form)


def short(value: float) -> str:
    """Return a number above 0 with few digits.

    Examples:
        >>> short(12.345), short(123456), short(1.23e8)
        ('12.3', '123,456', '1.2 × 10<sup>8</sup>')
    """
    if np.isnan(value):
        return "–"
    if np.isinf(value):
        return "∞"
    if value < 1e6:
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    digits, power = f"{value:.1e}".split("e")
    return f"{digits} × 10<sup>{int(power)}</sup>"


def metric_of(summary: RunSummary) -> str:
    """Return the name of the metric of a run's task."""
    return METRIC_NAMES.get(summary.metric, summary.metric)


def method_of(summary: RunSummary) -> str:
    """Describe in a few words how a run predicts."""
    record, description, kernel = summary.run.record, summary.run.description, summary.kernel
    adapters = ", LoRA" if description.get("lora") or record.get("apply_lora") else ""
    if kernel is not None or record.get("trainer") == "kernel":
        formula = description.get("formula") or record.get("kernel_formula")
        formula = formula or ("asymmetric" if kernel is not None and kernel.asymmetric else "")
        return f"kernel{f', {formula}' if formula else ''}{adapters}"
    if not record:
        return "unknown"
    if is_zero_shot(record):
        return "zero-shot"
    if record.get("trainer") == "linearhead":
        return "linear head"
    how = "linearised training" if record.get("trainer") == "linearised" else "fine-tuning"
    return f"{how}, {record.get('optimizer', '')}{adapters}"


def solver_of(summary: RunSummary) -> str:
    """Describe the solver of a run's kernel; empty without a kernel."""
    if summary.kernel is None:
        return ""
    choice = summary.kernel.solver
    words = f"{choice.solver}, λ = {choice.settings.regularization:g}"
    words += f", γ = {choice.settings.gamma:g}" if choice.solver == "asym" else ""
    return words + (", from f₀" if choice.adjust_for_init else "")


def score_of(summary: RunSummary, split: str) -> str:
    """Describe how well a run predicts a split."""
    value = summary.scores[split]
    if summary.metric == "acc" and split in summary.splits:
        return f"{percent(value)} % of {quantity(len(summary.splits[split].labels), 'example')} right"
    return f"{metric_of(summary)} {percent(value)}{' %' if summary.metric == 'acc' else ''}"


def lead(summaries: Sequence[RunSummary]) -> str:
    """Describe the runs and their result in a paragraph."""
    if len(summaries) == 1:
        return f'<p class="lead">{_what_it_is(summaries[0])} {_result(summaries[0])}</p>'
    models = ", ".join(dict.fromkeys(filter(None, map(_model, summaries)))) or "unknown models"
    scored = [summary for summary in summaries if _main_split(summary) in summary.scores]
    best = max(scored, key=lambda summary: summary.scores[_main_split(summary)], default=None)
    result = ""
    if best is not None:
        split = _main_split(best)
        result = f" Best on {escaped(split)} is <strong>{escaped(best.name)}</strong>, {score_of(best, split)}."
        result += _guess(best)
    first = next((summary.kernel for summary in summaries if summary.kernel is not None), None)
    prompts = {_prompt(summary, summary.kernel) for summary in summaries if summary.kernel is not None}
    shared = prompts.pop() if len(prompts) == 1 else ""
    kernels = f'<p class="note">The kernels: {_sizes(first)}. {shared}</p>' if first is not None else ""
    return f'<p class="lead">{quantity(len(summaries), "run")} of {escaped(models)}.{result}</p>{kernels}'


def _model(summary: RunSummary) -> str:
    name = summary.run.record.get("model_name_or_path") or summary.run.description.get("model") or ""
    return Path(name).name if Path(name).is_absolute() else str(name)


def _what_it_is(summary: RunSummary) -> str:
    model = escaped(_model(summary) or "an unknown model")
    if summary.kernel is None:
        method = method_of(summary)
        return f"{escaped(method[0].upper() + method[1:])}: <strong>{model}</strong>."
    formula = summary.run.description.get("formula")
    which = f"The {f'{escaped(formula)} ' if formula else ''}kernel of <strong>{model}</strong>"
    return f"{which}: {_sizes(summary.kernel)}. {_prompt(summary, summary.kernel)}"


def _sizes(kernel: KernelSummary) -> str:
    others = " and ".join(f"{other.shape[1]:,} {escaped(split)}" for split, other in kernel.others.items())
    logits = "one logit, f₁ − f₀" if kernel.num_logits == 1 else f"{kernel.num_logits} logits"
    return f"{kernel.train.shape[0]:,} training examples × {others or 'themselves'}, {logits}"


def _prompt(summary: RunSummary, kernel: KernelSummary) -> str:
    """Describe the number of examples per class, the template and the data, as far as they are recorded."""
    counts = np.bincount(kernel.classes["train"], minlength=kernel.num_classes)
    per_class = f"{counts[0]} examples a class" if len(set(counts)) == 1 else "Classes of different sizes"
    templates = summary.run.description.get("template") or []
    if summary.run.description.get("few_shot_type") == "finetune":
        return f"{per_class}, plain texts without a prompt."
    if not templates:
        return f"{per_class}; the folder does not say which prompt."
    file = (summary.run.description.get("data_files") or {}).get("train")
    # The first folders of the path belong to the machine.
    data = f" Data: <code>{escaped('/'.join(Path(file).parts[-5:-1]))}</code>." if file else ""
    more = f" and {len(templates) - 1} more" if len(templates) > 1 else ""
    return f"{per_class}, asked as <code>{escaped(templates[0])}</code>{more}.{data}"


def _main_split(summary: RunSummary) -> str:
    return next((split for split in ("test", "dev") if split in summary.scores), "test")


def _guess(summary: RunSummary) -> str:
    """Give the accuracy of always guessing the largest class."""
    split = summary.splits.get(_main_split(summary))
    if summary.metric != "acc" or split is None:
        return ""
    largest = np.bincount(split.labels.astype(int)).max() / len(split.labels)
    return f" Always guessing the largest class is right for {percent(largest)} %."


def _result(summary: RunSummary) -> str:
    split = _main_split(summary)
    if split not in summary.scores:
        return "It has no predictions."
    beside = f" (dev {percent(summary.scores['dev'])} %)" if split != "dev" and "dev" in summary.scores else ""
    by = f"With {escaped(solver_of(summary))} it has " if summary.kernel is not None else "It has "
    return f"{by}<strong>{score_of(summary, split)}</strong> on {split}{beside}.{_guess(summary)}"
