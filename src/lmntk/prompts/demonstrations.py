"""Which solved examples go with a query, and the template that shows them.

The draws and the templates are those of LM-BFF (Gao et al. 2021, arXiv 2012.15723): the same prompts come out for the
same seed. That fixes numpy's legacy generator, one permutation of the candidates a query, and the order of everything.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lmntk.data.examples import Example
from lmntk.data.tasks import MIDDLE_SCORE, Task
from lmntk.errors import UsageError
from lmntk.prompts.sentence_embeddings import _how_to_embed, _unit
from lmntk.prompts.templates import MASK, LiteralPart, Part, SentencePart, SpecialPart, Template

_CLS = SpecialPart("cls")


@dataclass(frozen=True)
class DemonstrationSettings:
    """How demonstrations are drawn and shown; the flags' values.

    Attributes:
        num_demo: Demonstrations of each class (prompt-demo).
        in_context: Where random examples go in in-context learning, before or after the query; empty for prompt-demo.
        in_context_num: How many random examples, at most as many as there are.
        filter_rate: Share of each class that is similar enough to be drawn, where there is a filter.
        filter_model: Name of the sentence embeddings that tell what is similar; None draws among all.
        auto: Whether `template_with_demonstrations` extends the template, or it shows demonstrations as it is.

    Raises:
        UsageError: A number is out of its range.
    """

    num_demo: int = 1
    in_context: Literal["", "head", "tail"] = ""
    in_context_num: int = 32
    filter_rate: float = 0.5
    filter_model: str | None = None
    auto: bool = True

    def __post_init__(self) -> None:
        """Refuse numbers that leave nothing to draw."""
        for flag, number in (("num_demo", self.num_demo), ("gpt3_in_context_num", self.in_context_num)):
            if number < 1:
                raise UsageError(f"--{flag} is {number}, but must be at least 1")
        if not 0 < self.filter_rate <= 1:
            raise UsageError(f"--demo_filter_rate is {self.filter_rate:g}, but must be above 0 and at most 1")


@dataclass(frozen=True)
class Demonstrations:
    """What one query gets.

    Attributes:
        texts: Texts of all demonstrations, to be put behind the query's own.
        context_labels: Class ids of the in-context examples; empty otherwise, where the template names the classes.
    """

    texts: tuple[str, ...]
    context_labels: tuple[int, ...]


class DemonstrationSampler:
    """Draws demonstrations for the queries of one split.

    Attributes:
        shown: How many a prompt shows: in context, what the query with the fewest candidates allows; of the two halves
            of a regression only the low one, as published.
        num_sentences: How many texts a query and its demonstrations have, the high half included.
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
        """Check that every query will find its demonstrations.

        Args:
            task: What the labels mean.
            support: All N train examples, in file order.
            settings: What to draw.
            generator: Shared by all splits, which are drawn one after the other.
            excludes_query: Whether the queries are the train examples, of which none is its own demonstration.
            support_embeddings: `[N, d]`, needed for a filter.
            query_embeddings: `[queries, d]`, needed for a filter.

        Raises:
            UsageError: A query would have too few candidates, or the embeddings differ in dimension.
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
            self._support_rows, self._query_rows = _unit(support_embeddings), _unit(query_embeddings)
            self._limit = self._filter_limit()
        if settings.in_context:
            # A train query leaves its own class one candidate fewer, which the limit may hide.
            fewer = excludes_query and any(0 < count <= self._limit for count in counts)
            found = sum(min(count, self._limit) for count in counts) - fewer
            self.shown = drawn = min(settings.in_context_num, found)
        else:
            drawn = settings.num_demo * len(task.labels)
            self.shown = settings.num_demo if task.regression else drawn
        self.num_sentences = task.num_sentences * (1 + drawn)

    def draw(self, query_index: int, generator: np.random.RandomState | None = None) -> Demonstrations:
        """Draw for one query of the split; the generator, by default the shared one, moves on by one permutation.

        Every class gives the first `num_demo` of the permuted candidates, class after class; in-context examples are
        the first of them, whatever their class.
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
        """Indices of the examples to draw from: in file order, or those the filter keeps, most similar first."""
        own = query_index if self._excludes_query else None
        candidates = [index for index in range(len(self._support)) if index != own]
        if self._settings.filter_model is None:
            return candidates
        # Row by row, not as one BLAS product: equal rows must be equally similar for ties to stay in file order.
        cosines = (self._support_rows * self._query_rows[query_index]).sum(axis=1)
        candidates.sort(key=lambda index: cosines[index], reverse=True)
        kept = []
        room = [self._limit] * len(self._task.labels)
        for index in candidates:
            if room[self._classes[index]]:
                room[self._classes[index]] -= 1
                kept.append(index)
        return kept

    def _require_candidates(self, counts: Sequence[int]) -> None:
        """Make sure that every query has as many as it needs, a filter aside."""
        name, settings = self._task.name, self._settings
        why = ", as the query itself does not count" if self._excludes_query else ""
        if settings.in_context and sum(counts) <= self._excludes_query:
            raise UsageError(
                f"--gpt3_in_context_{settings.in_context} finds no example to show: train has {sum(counts)} of "
                f"{name}{why}; raise K, or leave the flag out"
            )
        needed = 0 if settings.in_context else settings.num_demo + self._excludes_query
        fewer = f"lower --num_demo (now {settings.num_demo}), " if settings.num_demo > 1 else ""
        for label, count in zip(self._task.labels, counts, strict=True):
            if count < needed:
                scores = f" (the {'low' if label == self._task.labels[0] else 'high'} half of the scores)"
                raise UsageError(
                    f"train has {count} of class '{label}'{scores if self._task.regression else ''} of {name}, but "
                    f"prompt-demo needs {needed} of each class{why}: raise K, {fewer}or give --few_shot_type prompt"
                )

    def _filter_limit(self) -> int:
        """How many of each class the filter keeps for a query."""
        settings, widths = self._settings, (self._support_rows.shape[1], self._query_rows.shape[1])
        if widths[0] != widths[1]:
            raise UsageError(
                f"--demo_filter_model {settings.filter_model}: train has embeddings of {widths[0]} dimensions and the "
                f"queries of {widths[1]}; {_how_to_embed(settings.filter_model)} makes both anew"
            )
        share = (len(self._support) - self._excludes_query) // len(self._task.labels)
        limit = int(share * settings.filter_rate)
        needed = 1 if settings.in_context else settings.num_demo
        if limit < needed:
            raise_rate = f"raise --demo_filter_rate (now {settings.filter_rate:g})"
            raise UsageError(
                f"--demo_filter keeps {limit} of {share} candidates a class of {self._task.name}, but prompts need "
                f"{needed}: {raise_rate if share >= needed else 'raise K, or leave out --demo_filter'}"
            )
        return limit


def template_with_demonstrations(
    template: str, task: Task, settings: DemonstrationSettings, shown: int, causal: bool = False
) -> str:
    """Extend the template of a query by as many demonstrations as are `shown`; without `settings.auto`, leave it.

    A demonstration is the query's template without ``*cls*``, with its own sentences, and its label word in the place
    of the mask. It goes behind what is there. In-context examples for the head go in front of what is there, one after
    the other: the first of them stands next to the query, and ``*cls*`` stays where it was, in front of the query's
    own part. So LM-BFF has it.

    A causal model reads nothing behind the query: it gets ``*cls*`` first, then the demonstrations in the same order,
    those of in-context examples for the head included, then the query.

    Raises:
        UsageError: The query's template does not fit the task; see `Template.parse`.
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
    """Put a template together again, as a demonstration where a label is given.

    Each variable gets two stars of its own: nothing put next to it becomes part of it.
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
        text += f"*{word}*" if not literal else f"*{word}" if after_literal else word
        after_literal = literal
    return text


def _class_of(task: Task, label: str) -> int:
    """The class id; of a score, its half of the scale. LM-BFF counts the middle as low here (see `MIDDLE_SCORE`)."""
    return int(float(label) > MIDDLE_SCORE) if task.regression else task.labels.index(label)
