"""Parts of a kernel by layer, kind, and weight or bias: against the oracle, in every engine, and their sum."""

from dataclasses import replace

import pytest
import torch

import oracle
from engine_problems import TOLERANCE, gradients_by_name, names_of, problem_of, sides
from lmntk.kernels import Tuning, assemble, make_engine
from lmntk.kernels.layers import LAYERS
from lmntk.models.parameter_parts import kind_of, parts_of
from lmntk.models.parameters import ParameterFilter
from lmntk.storage.part_names import PART_KEYS, split_part_name
from tiny_models import ARCHITECTURES, tiny_prompt_model

USUAL = Tuning()
DENSE = Tuning(dense_efficiency=1e9)
GRAM = Tuning(dense_efficiency=1e-9)
BITS = Tuning(sign_bits_flops=0)


def kernels(engine, architecture, formula="sgd", keys=PART_KEYS, tuning=USUAL):
    """The parts of a tiny model's kernel, ``[D, N, C, X, C]``, the parameters of each, and the kernel without parts."""
    model = tiny_prompt_model(architecture)
    names = names_of(model, ParameterFilter(), noise=False)
    problem = problem_of(model, names, *sides(architecture), formula)
    apart = replace(problem, part_of=parts_of(names, model, keys))
    both = []
    for one in (apart, problem):
        chosen = make_engine(one, engine, tuning=tuning)
        plan = chosen.plan()
        both.append(assemble(chosen.blocks(plan), plan, one))
    parts = dict(zip(apart.parts, both[0].unflatten(0, (len(apart.parts), -1)), strict=True))
    members = {part: [name for name, own in apart.part_of.items() if own == part] for part in parts}
    return parts, members, both[1]


@pytest.mark.parametrize(
    ("engine", "architecture", "formula", "tuning"),
    [
        *(("factored", name, "sgd", USUAL) for name in ("modernbert", "gpt2", "opt-projected", "qwen3")),
        *(("factored", "bert", "sgd", tuning) for tuning in (DENSE, GRAM)),
        *(("factored", "bert", formula, USUAL) for formula in ("signgd", "asymmetric_signgd")),
        ("factored", "qwen2", "signgd", BITS),
        ("jacobian", "bert", "asymmetric_signgd", USUAL),
    ],
)
def test_every_part_is_the_kernel_of_its_own_parameters(engine, architecture, formula, tuning) -> None:
    parts, members, whole = kernels(engine, architecture, formula, tuning=tuning)
    for part, values in parts.items():
        of_train, of_x = (
            torch.cat([side[name] for name in members[part]], -1) for side in gradients_by_name(architecture)
        )
        truth = oracle.kernel(of_train, of_x, formula).reshape(values.shape)
        assert oracle.relative_error(values, truth) <= TOLERANCE[torch.float64], part
    assert oracle.relative_error(sum(parts.values()), whole) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("keys", [("kind",), ("weight-or-bias",), ("layer", "kind")])
def test_coarser_parts_are_sums_of_finer_ones(keys) -> None:
    finest, _, _ = kernels("factored", "bert")
    parts, _, _ = kernels("factored", "bert", keys=keys)
    for part, values in parts.items():
        wanted = split_part_name(part, keys)
        own = [kernel for name, kernel in finest.items() if wanted.items() <= split_part_name(name, PART_KEYS).items()]
        assert oracle.relative_error(sum(own), values) <= TOLERANCE[torch.float64], part


def test_parts_of_unknown_layer_types_come_from_whole_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    known, _, _ = kernels("factored", "bert")
    monkeypatch.delitem(LAYERS, torch.nn.LayerNorm)
    for part, values in kernels("factored", "bert")[0].items():
        assert oracle.relative_error(values, known[part]) <= TOLERANCE[torch.float64], part


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_parameter_has_the_kind_that_its_architecture_gives_it(architecture: str) -> None:
    model = tiny_prompt_model(architecture)
    names = [name for name, _ in model.named_parameters()]
    kinds = parts_of(names, model, ("kind",))
    fused = architecture in ("modernbert", "gpt2")
    attention = {"query-key-value"} if fused else {"query", "key", "value"}
    others = {"other"} if architecture == "opt-projected" else set()
    assert set(kinds.values()) == {"embedding", *attention, "output", "feed-forward", "norm", *others, "head"}
    assert [name for name in kinds if kinds[name] == "head"] == [
        n for n in kinds if not n.startswith(model.base_prefix)
    ]
    inside = {name: kind for name, kind in kinds.items() if ".1." in name and name.startswith(model.base_prefix)}
    for kind, count in {**dict.fromkeys(attention, 1), "output": 1}.items():
        weights = [name for name, own in inside.items() if own == kind and name.endswith("weight")]
        assert len(weights) == count, kind
    assert len([name for name, own in inside.items() if own == "feed-forward" and name.endswith("weight")]) in (2, 3)


@pytest.mark.parametrize(
    ("name", "shape", "kind"),
    [
        ("encoder.albert_layer_groups.0.albert_layers.0.attention.query.weight", (4, 4), "query"),
        ("encoder.albert_layer_groups.0.albert_layers.0.attention.dense.bias", (4,), "output"),
        ("encoder.albert_layer_groups.0.albert_layers.0.ffn_output.weight", (4, 4), "feed-forward"),
        ("encoder.layer.1.attention.self.q_bias", (4,), "query"),
        ("encoder.layer.1.attention.self.v_bias", (4,), "value"),
        ("layers.1.mlp.experts.gate_up_proj", (2, 4, 4), "feed-forward"),
        ("layers.1.block_sparse_moe.input_linear.weight", (2, 4, 4), "feed-forward"),
        ("layers.1.conv.weight", (4, 1, 2), "other"),
    ],
)
def test_shared_layers_lone_biases_and_experts_have_the_kind_of_their_place(name, shape, kind) -> None:
    model = torch.nn.Module()
    place, (*path, own) = model, f"lm.base.{name}".split(".")
    for part in path:
        place.add_module(part, torch.nn.Module())
        place = place.get_submodule(part)
    place.register_parameter(own, torch.nn.Parameter(torch.zeros(shape)))
    if own == "bias":
        place.weight = torch.nn.Parameter(torch.zeros(4, 4))
    model.base_prefix = "lm.base."
    assert kind_of(f"lm.base.{name}", model) == kind
