"""The kernel of a trained model on real sentences, against plain autograd in float64."""

import pytest
import torch

import oracle
from command_line import ROOT
from lmntk.data.examples import Example, read_examples
from lmntk.data.tasks import find_task
from lmntk.kernels import ENGINES, FORMULAS, KernelProblem, ModuleModel
from lmntk.kernels.assembly import assemble, make_engine
from lmntk.models.loading import LoadOptions, load_prompt_model
from lmntk.models.pretrained import load_config, load_tokenizer
from lmntk.prompts.features import Collator, FeatureDataset, FeatureExamples, PromptBuilder
from lmntk.prompts.label_words import label_word_ids
from lmntk.prompts.render import Limits
from lmntk.prompts.templates import Template

MODEL = ROOT / ".cache" / "demo" / "bert-tiny"
SENTENCES = ROOT / "data" / "demo" / "tweets" / "original" / "mr" / "train.csv"
SOME_SENTENCES = (
    "A gripping story, well told.",
    "I could not wait for it to end, and neither could the man who snored beside me.",
    "Lovely!",
    "The plot goes nowhere, slowly.",
    "Two hours of my life that I will never get back, and I paid for them too.",
    "She carries the whole film, and makes it look easy.",
    "Not bad, not good, simply there.",
    "The best thing I have seen this year; bring the children, bring your parents.",
)
SIZE = 8
TASK = find_task("mr")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not MODEL.is_dir(), reason="no BERT-tiny in .cache/demo: examples/demo/fetch_demo_assets.py fetches it"
    ),
]


def load_model(dtype):
    name = str(MODEL)
    label_words = label_word_ids(TASK.mapping, TASK.labels, load_tokenizer(name))
    return load_prompt_model(name, load_config(name), label_words, LoadOptions(dtype=dtype))


@pytest.fixture(scope="module")
def features():
    """Eight and eight prompts as the program makes them, for the train and the X side."""
    rows = read_examples(TASK, SENTENCES) if SENTENCES.is_file() else [Example((s,), "1") for s in SOME_SENTENCES * 2]
    template = Template.parse(TASK.template, TASK.num_sentences, len(TASK.labels), TASK.name)
    data = FeatureDataset.build(
        PromptBuilder("train", TASK, rows[: 2 * SIZE], [template], load_tokenizer(str(MODEL)), Limits())
    )
    return data.features[:SIZE], data.features[SIZE:]


def examples(features):
    return FeatureExamples(FeatureDataset("train", TASK, features), Collator(0, segments=True), torch.device("cpu"))


@pytest.fixture(scope="module")
def truth(features):
    """The kernel ``[8, 2, 8, 2]`` in float64 with transformers' own attention, a pair of examples at a time."""
    model = load_model(torch.float64)
    model.lm.set_attn_implementation("eager")
    own = list(model.parameters())

    def gradients_of_each(side):
        for index in range(SIZE):
            yield oracle.gradients(lambda batch: model(**batch), own, [side.batch([index])])[0]

    train, x = map(examples, features)
    of_train = list(gradients_of_each(train))
    kernel = torch.stack([torch.stack([left @ right.T for left in of_train]) for right in gradients_of_each(x)])
    return kernel.permute(1, 2, 0, 3)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_trained_model_has_the_kernel_of_the_oracle(engine, features, truth):
    """SPEC: 2e-6 in float32 on real models, of which the float32 gradients alone cost 3e-7."""
    size = 2 if engine == "jvp" else SIZE
    train, x = (examples(side[:size]) for side in features)
    model = load_model(torch.float32).requires_grad_(False)
    tokens = {token for feature in features[0][:size] for token in feature.input_ids}
    logits_fn, params = model.as_function([name for name, _ in model.named_parameters()], tokens)
    problem = KernelProblem(
        train=train,
        x=x,
        formula=FORMULAS["sgd"],
        num_logits=model.num_logits,
        model=ModuleModel(logits_fn, model),
        params=params,
    )
    chosen = make_engine(problem, engine)
    plan = chosen.plan()
    found = assemble(chosen.blocks(plan), plan, problem)[0]
    assert found.shape == (size, 2, size, 2)
    assert oracle.relative_error(found, truth[:size, :, :size]) <= 2e-6
