"""Draw solved examples for each query, and extend the query's template to show them.

The draws and the templates are those of LM-BFF (Gao et al. 2021, arXiv 2012.15723): the same prompts come out for the
same seed. That fixes numpy's legacy generator, one permutation of the candidates per query, and the order of all steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from lmntk.data.examples import Example
from lmntk.data.tasks import MIDDLE_SCORE, Task
from lmntk.errors import Bounds, DataError, EmbeddingsError, SettingError, check_numbers
from lmntk.prompts.sentence_embeddings import unit_vectors
from lmntk.prompts.templates import MASK, LiteralPart, Part, SentencePart, SpecialPart, Template

_CLS = SpecialPart("cls")


DEMONSTRATION_BOUNDS = (
    Bounds("num_demo", 1),
    Bounds("gpt3_in_context_num", 1),
    Bounds("demo_filter_rate", 0, 1, above=True),
)
"""The values that the numbers of `DemonstrationSettings` can take."""


@dataclass(frozen=True)
class DemonstrationSettings:
    """How demonstrations are drawn and shown.

    Attributes:
        num_demo: Demonstrations of each class (prompt-demo).
        in_context: Where random examples go in in-context learning, before or after the query; empty for prompt-demo.
        in_context_num: How many random examples, at most as many as there are.
        filter_rate: Share of each class that is similar enough to be drawn, if there is a filter.
        filter_model: Name of the sentence embeddings that measure similarity; None draws from all examples.
        auto: Whether `template_with_demonstrations` extends the template; otherwise it already shows demonstrations.

    Raises:
        SettingError: A number is out of its bounds.
    """

    num_demo: int = 1
    in_context: Literal["", "head", "tail"] = ""
    in_context_num: int = 32
    filter_rate: float = 0.5
    filter_model: str | None = None
    auto: bool = True

    def __post_init__(self) -> None:
        """Refuse numbers that leave nothing to draw."""
        numbers = (self.num_demo, self.in_context_num, self.filter_rate)
        settings = (bounds.setting for bounds in DEMONSTRATION_BOUNDS)
        check_numbers(DEMONSTRATION_BOUNDS, dict(zip(settings, numbers, strict=True)))


@dataclass(frozen=True)
class Demonstrations:
    """The demonstrations of one query.

    Attributes:
        texts: Texts of all demonstrations, to be appended to the query's own.
        context_labels: Class ids of the in-context examples; empty otherwise, where the template names the classes.
    """

    texts: tuple[str, ...]
    context_labels: tuple[int, ...]


class DemonstrationSampler:
    """Draws demonstrations for the queries of one split.

    Attributes:
        shown: How many demonstrations a prompt shows. In context it is what the query with the fewest candidates
            allows; a regression shows only the low half of its scale, as published.
        num_sentences: Number of texts of a query and its demonstrations, the high half included.
    """

    def __init__(
        self,
        task: Task,
        support: Sequence[Example],
        settings: DemonstrationSettings,
        generator: np.random.RandomState,
        *,
        excludes_query: bool,
        support_embeddings: np.ndarray | None = None,
        query_embeddings: np.ndarray | None = None,
    ) -> None:
        """Check that there are enough candidates for every query.

        Args:
            task: The task of the examples.
            support: All N train examples, in file order.
            settings: What to draw.
            generator: The generator that all splits share; they are drawn one after the other.
            excludes_query: Whether the queries are the train examples, of which none is its own demonstration.
            support_embeddings: Embeddings of the train examples, `[N, d]`, for a filter.
            query_embeddings: Embeddings of the queries, `[queries, d]`, for a filter.

        Raises:
            DataError: A class has too few train examples.
            SettingError: The filter keeps too few of them.
            EmbeddingsError: The embeddings of train examples and queries differ in dimension.
        """
        self._task, self._support, self._settings, self._generator = task, support, settings, generator
        self._excludes_query = excludes_query
        self._classes = [_class_of(task, example.label) for example in support]
        self._limit = len(support)  # Of each class.
        counts = [self._classes.count(index) for index in range(len(task.labels))]
        self._require_candidates(counts)
        if settings.filter_model is not None:
            if support_embeddings is None or query_embeddings is None:
                raise ValueError("a filter needs the embeddings of support and queries")
            self._support_vectors, self._query_vectors = map(unit_vectors, (support_embeddings, query_embeddings))
            self._limit = self._filter_limit()
        if settings.in_context:
            # A train query leaves its own class one candidate fewer, which the limit may hide.
            loses_one = excludes_query and any(0 < count <= self._limit for count in counts)
            found = sum(min(count, self._limit) for count in counts) - (1 if loses_one else 0)
            self.shown = drawn = min(settings.in_context_num, found)
        else:
            drawn = settings.num_demo * len(task.labels)
            self.shown = settings.num_demo if task.regression else drawn
        self.num_sentences = task.num_sentences * (1 + drawn)

    def draw(self, query_index: int, generator: np.random.RandomState | None = None) -> Demonstrations:
        """Draw the demonstrations of one query; the generator moves on by one permutation.

        The candidates are permuted. Each class in turn gives the first `num_demo` of its own; in-context examples are
        the first ones of any class.

        Args:
            query_index: The query's index in its split.
            generator: The generator; None takes the one that all splits share.
        """
        candidates = self._candidates(query_index)
        permuted = (generator or self._generator).permutation(len(candidates))
        order = [candidates[place] for place in permuted]
        context_labels: tuple[int, ...] = ()
        if self._settings.in_context:
            chosen = order[: self.shown]
            context_labels = tuple(self._classes[index] for index in chosen)
        else:
            chosen = []
            for wanted in range(len(self._task.labels)):
                chosen += [index for index in order if self._classes[index] == wanted][: self._settings.num_demo]
        return Demonstrations(tuple(text for index in chosen for text in self._support[index].texts), context_labels)

    def _candidates(self, query_index: int) -> list[int]:
        """Return the indices to draw from: all in file order, or those that the filter keeps, most similar first."""
        own = query_index if self._excludes_query else None
        candidates = [index for index in range(len(self._support)) if index != own]
        if self._settings.filter_model is None:
            return candidates
        # One sum per vector, not a BLAS product: equal vectors must be equally similar for ties to keep file order.
        cosines = (self._support_vectors * self._query_vectors[query_index]).sum(axis=1)
        candidates.sort(key=lambda index: cosines[index], reverse=True)
        kept = []
        room = [self._limit] * len(self._task.labels)
        for index in candidates:
            if room[self._classes[index]]:
                room[self._classes[index]] -= 1
                kept.append(index)
        return kept

    def _require_candidates(self, counts: Sequence[int]) -> None:
        """Check that every query has enough candidates before any filter."""
        name, settings, own = self._task.name, self._settings, 1 if self._excludes_query else 0
        why = ", as the query itself does not count" if own else ""
        if settings.in_context and sum(counts) <= own:
            setting = f"gpt3_in_context_{settings.in_context}"
            raise SettingError(
                f"`{setting}` finds no example to show: train has {sum(counts)} of {name}{why}; raise K, or "
                "leave it out",
                setting=setting,
            )
        needed = 0 if settings.in_context else settings.num_demo + own
        fewer = f"lower `num_demo` (now {settings.num_demo}), " if settings.num_demo > 1 else ""
        for label, count in zip(self._task.labels, counts, strict=True):
            if count < needed:
                scores = f" (the {'low' if label == self._task.labels[0] else 'high'} half of the scores)"
                raise DataError(
                    f"train has {count} of class '{label}'{scores if self._task.regression else ''} of {name}, but "
                    f"prompt-demo needs {needed} of each class{why}: raise K, {fewer}or "
                    "`few_shot_type=prompt`",
                    **{"label": label, "count": count, "needed": needed},
                )

    def _filter_limit(self) -> int:
        """Return how many of each class the filter keeps for a query."""
        settings, widths = self._settings, (self._support_vectors.shape[1], self._query_vectors.shape[1])
        if widths[0] != widths[1]:
            model = settings.filter_model
            cause = f"`demo_filter_model={model}`: train has embeddings of {widths[0]} dimensions, queries {widths[1]}"
            raise EmbeddingsError(f"{cause}; compute both with one model", cause=cause, model=Path(model or "").name)
        share = (len(self._support) - (1 if self._excludes_query else 0)) // len(self._task.labels)
        limit = int(share * settings.filter_rate)
        needed = 1 if settings.in_context else settings.num_demo
        if limit < needed:
            remedy = f"raise `demo_filter_rate` (now {settings.filter_rate:g})"
            if share < needed:
                remedy = "raise K, or leave out `demo_filter`"
            raise SettingError(
                f"`demo_filter` keeps {limit} of {share} candidates of each class of {self._task.name}, but prompts "
                f"need {needed}: {remedy}",
                **{"setting": "demo_filter_rate", "value": settings.filter_rate},
            )
        return limit


def template_with_demonstrations(
    template: str, task: Task, settings: DemonstrationSettings, shown: int, causal: bool = False
) -> str:
    """Extend the template of a query by demonstrations, in LM-BFF's order.

    A demonstration is the query's template without ``*cls*``, with its own sentences, and with its label word in place
    of the mask. Demonstrations follow the query. In-context examples for the head precede it in reverse order, so that
    the first one is next to the query; ``*cls*`` stays before the query's own part.

    A causal model reads nothing after the query: it gets ``*cls*`` first, then the demonstrations in the same order,
    those of in-context examples for the head included, then the query.

    Args:
        template: The query's template.
        task: The task, which gives the number of sentences and labels.
        settings: How demonstrations are shown; without `auto` the template is returned as it is.
        shown: Number of demonstrations, from `DemonstrationSampler.shown`.
        causal: Whether the template is for a causal model.

    Raises:
        TemplateError: The template does not fit the task; see `Template.parse`.

    Examples:
        >>> from lmntk.data.tasks import find_task
        >>> template_with_demonstrations("*cls**sent_0**mask*", find_task("SST-2"), DemonstrationSettings(), shown=2)
        '*cls**sent_0**mask**sent_1**label_0**sent_2**label_1*'
    """
    if not settings.auto:
        return template
    parts = Template.parse(template, task.num_sentences, len(task.labels), task.name).parts
    words = list(zip(filter(None, template.split("*")), parts, strict=True))
    ones = []
    for position in range(shown):
        label = f"labelx_{position}" if settings.in_context else f"label_{position // settings.num_demo}"
        ones.append(_write(words, task.num_sentences * (1 + position), label))
    in_front = settings.in_context == "head"
    demonstrations = "".join(reversed(ones) if in_front else ones)
    if causal:
        start = "*cls*" if _CLS in parts else ""
        return start + demonstrations + _write([(word, part) for word, part in words if part != _CLS])
    return demonstrations + _write(words) if in_front else _write(words) + demonstrations


def _write(words: Sequence[tuple[str, Part]], first_sentence: int = 0, label: str = "") -> str:
    """Write the parts of a template as text, as a demonstration if a label is given.

    Each variable gets its own two stars, so that the text next to it does not become part of it.
    """
    text, after_literal = "", False
    for word, part in words:
        if label and part == _CLS:
            continue
        if label and part == MASK:
            word = label
        elif isinstance(part, SentencePart):
            word = f"{word.rpartition('_')[0]}_{part.index + first_sentence}"
        literal = isinstance(part, LiteralPart)
        if literal:
            text += f"*{word}" if after_literal else word
        else:
            text += f"*{word}*"
        after_literal = literal
    return text


def _class_of(task: Task, label: str) -> int:
    """Return the class id, or a score's half of the scale. LM-BFF counts the middle as low here: see `MIDDLE_SCORE`."""
    return int(float(label) > MIDDLE_SCORE) if task.regression else task.labels.index(label)
