"""What a report says of a run in words and numbers, as HTML."""

import html
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lmntk.analysis.summary import KernelStudy, Study
from lmntk.storage.run_files import is_zero_shot
from lmntk.storage.wording import quantity

METRICS = {"acc": "accuracy", "f1": "F1", "mcc": "Matthews correlation", "pearson": "Pearson correlation"}


def escaped(value: object) -> str:
    """Write a user's text as HTML."""
    return html.escape(str(value), quote=True)


def quoted(texts: Sequence[str]) -> str:
    """Write sentences below each other, each in its script's direction."""
    return "<br>".join(f'<bdi dir="auto">{escaped(text)}</bdi>' for text in texts)


def percent(value: float | None) -> str:
    """Write a fraction in percent, and nothing where there is none."""
    return "" if value is None else "–" if np.isnan(value) else f"{100 * value:.1f}"


def cosine(value: float | None) -> str:
    """Write a number from −1 to 1, and nothing where there is none."""
    return "" if value is None else "–" if np.isnan(value) else f"{value:.3f}"


def short(value: float) -> str:
    """Write a number above 0 with as many digits as one reads."""
    if np.isnan(value):
        return "–"
    if np.isinf(value):
        return "∞"
    if value < 1e6:
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    digits, power = f"{value:.1e}".split("e")
    return f"{digits} × 10<sup>{int(power)}</sup>"


def metric_of(study: Study) -> str:
    """Name the metric of a run's task."""
    return METRICS.get(study.metric, study.metric)


def method_of(study: Study) -> str:
    """Say in a few words how a run predicts."""
    record, description, kernel = study.run.record, study.run.description, study.kernel
    adapters = ", LoRA" if description.get("lora") or record.get("apply_lora") else ""
    if kernel is not None or record.get("trainer") == "kernel":
        formula = description.get("formula") or record.get("kernel_formula")
        formula = formula or ("asymmetric" if kernel is not None and kernel.asymmetric else "")
        return f"kernel{f', {formula}' if formula else ''}{adapters}"
    if not record:
        return "not told"
    if is_zero_shot(record):
        return "zero-shot"
    if record.get("trainer") == "linearhead":
        return "linear head"
    return f"fine-tuning, {record.get('optimizer', '')}{adapters}"


def solver_of(study: Study) -> str:
    """Say how the kernel predicts; nothing of a run without."""
    if study.kernel is None:
        return ""
    solving = study.kernel.solving
    gamma = f", γ = {solving.settings.gamma:g}" if solving.solver == "asym" else ""
    return f"{solving.solver}, λ = {solving.settings.regularization:g}{gamma}{', from f₀' if solving.adjusts else ''}"


def score_of(study: Study, split: str) -> str:
    """Say how well a run predicts a split."""
    value = study.scores[split]
    if study.metric == "acc" and split in study.splits:
        return f"{percent(value)} % of {quantity(len(study.splits[split].labels), 'example')} right"
    return f"{metric_of(study)} {percent(value)}{' %' if study.metric == 'acc' else ''}"


def lead(studies: Sequence[Study]) -> str:
    """Say what the runs are, and the result in a sentence."""
    if len(studies) == 1:
        return f'<p class="lead">{_what_it_is(studies[0])} {_result(studies[0])}</p>'
    models = ", ".join(dict.fromkeys(filter(None, map(_model, studies)))) or "models that the folders do not name"
    scored = [study for study in studies if _main_split(study) in study.scores]
    best = max(scored, key=lambda study: study.scores[_main_split(study)], default=None)
    told = ""
    if best is not None:
        split = _main_split(best)
        told = f" Best on {escaped(split)} is <strong>{escaped(best.name)}</strong>, {score_of(best, split)}."
        told += _guess(best)
    first = next((study.kernel for study in studies if study.kernel is not None), None)
    prompts = {_prompt(study, study.kernel) for study in studies if study.kernel is not None}
    same = prompts.pop() if len(prompts) == 1 else ""
    kernels = f'<p class="note">The kernels: {_sizes(first)}. {same}</p>' if first is not None else ""
    return f'<p class="lead">{quantity(len(studies), "run")} of {escaped(models)}.{told}</p>{kernels}'


def _model(study: Study) -> str:
    name = study.run.record.get("model_name_or_path") or study.run.description.get("model") or ""
    return Path(name).name if Path(name).is_absolute() else str(name)


def _what_it_is(study: Study) -> str:
    model = escaped(_model(study) or "a model that the folder does not name")
    if study.kernel is None:
        method = method_of(study)
        return f"{escaped(method[0].upper() + method[1:])}: <strong>{model}</strong>."
    told = study.run.description.get("formula")
    which = f"The {f'{escaped(told)} ' if told else ''}kernel of <strong>{model}</strong>"
    return f"{which}: {_sizes(study.kernel)}. {_prompt(study, study.kernel)}"


def _sizes(kernel: KernelStudy) -> str:
    others = " and ".join(f"{other.shape[1]:,} {escaped(split)}" for split, other in kernel.others.items())
    logits = "one logit, f₁ − f₀" if kernel.num_logits == 1 else f"{kernel.num_logits} logits"
    return f"{kernel.train.shape[0]:,} training examples × {others or 'themselves'}, {logits}"


def _prompt(study: Study, kernel: KernelStudy) -> str:
    """Examples a class, template and data, as far as they are told."""
    counts = np.bincount(kernel.classes["train"], minlength=kernel.num_classes)
    per_class = f"{counts[0]} examples a class" if len(set(counts)) == 1 else "Classes of different sizes"
    templates = study.run.description.get("template") or []
    if study.run.description.get("few_shot_type") == "finetune":
        return f"{per_class}, plain texts without a prompt."
    if not templates:
        return f"{per_class}; the folder does not say which prompt."
    file = (study.run.description.get("data_files") or {}).get("train")
    # What is in front says which machine it was.
    data = f" Data: <code>{escaped('/'.join(Path(file).parts[-5:-1]))}</code>." if file else ""
    more = f" and {len(templates) - 1} more" if len(templates) > 1 else ""
    return f"{per_class}, asked as <code>{escaped(templates[0])}</code>{more}.{data}"


def _main_split(study: Study) -> str:
    return next((split for split in ("test", "dev") if split in study.scores), "test")


def _guess(study: Study) -> str:
    """What always guessing the largest class would reach."""
    split = study.splits.get(_main_split(study))
    if study.metric != "acc" or split is None:
        return ""
    largest = np.bincount(split.labels.astype(int)).max() / len(split.labels)
    return f" Always guessing the largest class is right for {percent(largest)} %."


def _result(study: Study) -> str:
    split = _main_split(study)
    if split not in study.scores:
        return "Nothing is predicted."
    beside = f" (dev {percent(study.scores['dev'])} %)" if split != "dev" and "dev" in study.scores else ""
    by = f"With {escaped(solver_of(study))} it has " if study.kernel is not None else "It has "
    return f"{by}<strong>{score_of(study, split)}</strong> on {split}{beside}.{_guess(study)}"
