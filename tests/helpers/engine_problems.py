"""Kernel problems over tiny models: the train and x sides, the parameters that count, the tolerances."""

import functools

import torch

import oracle
from lmntk.kernels import FORMULAS, BatchedExamples, KernelProblem, ModuleModel
from lmntk.models.parameters import select_parameters
from tiny_models import (
    has_noise_for_a_gradient,
    prompts_for,
    tiny_prompt_model,
)

# SPEC: exact means 1e-12 in float64 and 2e-6 in float32, against float64.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}


def problem_of(model, names, train, x, formula="sgd"):
    model.requires_grad_(False)
    tokens = {int(token) for prompt in train for token in prompt["input_ids"][0]}
    logits_fn, params = model.as_function(names, tokens)
    return KernelProblem(
        train=BatchedExamples(train),
        x=None if x is None else BatchedExamples(x),
        formula=FORMULAS[formula],
        num_logits=model.num_logits,
        model=ModuleModel(logits_fn, model, partial_rows=model.partial_rows(names)),
        params=params,
    )


def oracle_gradients(model, names, prompts):
    model.requires_grad_(True)
    own = dict(model.named_parameters())
    return oracle.gradients(lambda prompt: model(**prompt), [own[name] for name in names], prompts)


def names_of(model, chosen, noise=True):
    return [name for name in select_parameters(model, chosen) if noise or not has_noise_for_a_gradient(name)]


def sides(architecture):
    return prompts_for(architecture, [4, 6, 4], seed=1), prompts_for(architecture, [5, 6, 6], seed=2)


@functools.cache
def gradients_by_name(architecture):
    """The oracle's gradients of both sides, ``[N, C, p]`` for each parameter: float64, and transformers' attention."""
    model = tiny_prompt_model(architecture, our_attention=False)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    found = [
        oracle_gradients(model, list(sizes), prompts).split(list(sizes.values()), dim=-1)
        for prompts in sides(architecture)
    ]
    return [dict(zip(sizes, parts, strict=True)) for parts in found]


def longer_sides(architecture):
    return prompts_for(architecture, [12, 13, 5, 13, 12], seed=3), prompts_for(architecture, [13, 9, 12, 13], seed=4)
