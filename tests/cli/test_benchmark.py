"""tools/benchmark_kernels.py: what it measures in its quick form, and what it refuses before it measures anything."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoTokenizer

import benchmark_kernels
from benchmarks import inputs as benchmark_inputs
from benchmarks import large_peers, run_times
from benchmarks.engines import errors_of_estimate
from benchmarks.run_times import sample_plan
from lmntk.kernels import MemoryBudget, assemble, make_engine
from lmntk.kernels.tiling import TileSize, make_plan
from tiny_models import save_tiny_checkpoint, tiny_config

KEYS = {
    "engine",
    "formula",
    "model",
    "n_train",
    "n_x",
    "logits",
    "seconds",
    "seconds_per_pair",
    "speedup_over_jvp",
    "relative_error",
    "peak_memory_gb",
    "matmul_gflops",
    "roofline_fraction",
    "seconds_by_stage",
}
SMALL = ["--quick", "--train_examples", "3", "--x_examples", "4", "--threads", "1"]


def jobs_of(flags):
    return benchmark_kernels.jobs_of(benchmark_kernels.make_parser().read(flags))


@pytest.mark.slow
def test_the_quick_form_measures_engines_against_the_published_method(tmp_path, capsys):
    file = tmp_path / "measurements.json"
    assert benchmark_kernels.main([*SMALL, "--engines", "factored", "jacobian", "--json", str(file)]) == 0
    rows = json.loads(file.read_text(encoding="utf-8"))
    assert [row["engine"] for row in rows] == ["published", "factored", "jacobian"]
    for row in rows:
        assert set(row) >= KEYS
        assert (row["formula"], row["model"], row["n_train"], row["n_x"], row["logits"]) == ("sgd", "quick", 3, 4, 2)
        assert row["relative_error"] <= 2e-6, "SPEC: the engines' float32 against float64"
        positive = ("seconds", "seconds_per_pair", "peak_memory_gb", "matmul_gflops", "roofline_fraction")
        assert all(row[name] > 0 for name in positive)
        assert row["seconds_per_pair"] == pytest.approx(row["seconds"] / 12)
        assert row["speedup_over_jvp"] == pytest.approx(rows[0]["seconds_per_pair"] / row["seconds_per_pair"])
    assert rows[1]["seconds_by_stage"]["propagation"] >= 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[2:5]] == ["published", "factored", "jacobian"]
    assert lines[-1] == f"measurements are in {file}"


@pytest.mark.parametrize("architecture", ["bert", "llama"])
@pytest.mark.parametrize("formula", ["sgd", "signgd", "asymmetric_signgd"])
def test_the_yardstick_of_errors_is_the_kernel_of_gradients_one_at_a_time(formula, architecture, monkeypatch):
    """Each side by its own precision, whatever part of the train examples' gradients the budget can hold."""
    config = tiny_config(architecture, vocab_size=30522)
    monkeypatch.setitem(benchmark_inputs.SHAPES, "quick", config)
    (job,) = jobs_of([*SMALL, "--formula", formula])
    inputs = benchmark_inputs.load_inputs(job)
    sides = [inputs.examples(inputs.train), inputs.examples(inputs.x)]

    def gradients(side, dtype):
        model = benchmark_inputs.load_model(job, inputs, dtype).requires_grad_(True)
        rows = []
        for index in range(len(side)):
            for logit in model(**side.batch([index]))[0]:
                parts = torch.autograd.grad(logit, list(model.parameters()), retain_graph=True, materialize_grads=True)
                rows.append(torch.cat([part.flatten() for part in parts]))
        return torch.stack(rows).reshape(len(side), -1, rows[0].numel())

    raw = [gradients(side, torch.float64) for side in sides]
    signs = [gradients(side, torch.float32).sign().double() for side in sides]
    pairs = {
        "sgd": [(raw[0], raw[1])],
        "signgd": [(signs[0], signs[1])],
        "asymmetric_signgd": [(signs[0], raw[1]), (raw[0], signs[1])],
    }[formula]
    expected = torch.stack([torch.einsum("iap,jbp->iajb", left, right) for left, right in pairs])
    for budget in (MemoryBudget(2**30), MemoryBudget(1)):
        monkeypatch.setattr(benchmark_inputs.Job, "budget", budget)
        torch.testing.assert_close(benchmark_inputs.true_kernel(job, inputs), expected, rtol=1e-12, atol=1e-12)


def test_sentences_are_cut_to_the_limits_of_the_task(tmp_path):
    """mr keeps 110 tokens of a sentence: without that limit the mask, at the end, would be cut away."""
    folder = save_tiny_checkpoint("roberta", tmp_path / "model")
    for split, number in (("train", 2), ("test", 3)):
        (tmp_path / f"{split}.csv").write_text(f"1,{'good ' * 400}\n" * number, encoding="utf-8")
    flags = ["--model", str(folder), "--data_dir", str(tmp_path), "--task_name", "mr"]
    (job,) = jobs_of([*flags, "--train_examples", "3", "--x_examples", "3"])
    inputs = benchmark_inputs.load_inputs(job)
    lengths = [[len(feature.input_ids) for feature in side.features] for side in (inputs.train, inputs.x)]
    assert lengths == [[116, 116, 116], [116, 116, 116]], "the third train prompt is random, of a length that is there"


def test_examples_beyond_the_k_shot_folder_come_from_the_original_file(tmp_path):
    folder = save_tiny_checkpoint("roberta", tmp_path / "model")
    for name, words in {"train": "good", "test": "bad", "original/train": "good fine bad nice fine great"}.items():
        rows = "".join(f"{word}\t1\n" for word in words.split())
        (tmp_path / f"{name}.tsv").parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.tsv").write_text(f"sentence\tlabel\n{rows}", encoding="utf-8")
    flags = ["--model", str(folder), "--data_dir", str(tmp_path), "--original_dir", str(tmp_path / "original")]
    (job,) = jobs_of([*flags, "--train_examples", "2", "--x_examples", "3"])
    inputs = benchmark_inputs.load_inputs(job)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [
        [tokenizer.decode(feature.input_ids).removeprefix("<s>") for feature in side.features]
        for side in (inputs.train, inputs.x)
    ]
    expected = [["good", "fine"], ["bad", "nice", "great"]]
    assert [[prompt.split()[0] for prompt in side] for side in prompts] == expected


@pytest.mark.parametrize(
    ("tiles", "rows", "columns"), [(1, (1,), (2,)), (2, (1,), (1, 3)), (4, (1,), (0, 1, 2, 3)), (6, (0, 2), (0, 2, 3))]
)
def test_sampled_tiles_are_spread_evenly_over_the_plan(tiles, rows, columns):
    plan = make_plan([3, 2, 1], [8, 7, 6, 5], TileSize(1, 1))
    sampled = sample_plan(plan, tiles)
    assert [row.train for row in sampled.tile_rows] == [(row,) for row in rows]
    assert {row.x_tiles for row in sampled.tile_rows} == {tuple((column,) for column in columns)}


def test_the_times_of_formulas_are_divided_by_the_first_ones(tmp_path, monkeypatch):
    file = tmp_path / "measurements.json"
    flags = ["--formula", "sgd", "signgd", "--sample_tiles", "1", "--times_only", "--json", str(file)]
    monkeypatch.setattr(benchmark_kernels, "in_own_process", lambda work, *arguments: work(*arguments))
    assert benchmark_kernels.main([*SMALL, "--engines", "factored", *flags]) == 0
    first, second = json.loads(file.read_text(encoding="utf-8"))
    assert (first["formula"], second["formula"]) == ("sgd", "signgd")
    assert first["seconds_over_first_formula"] == 1
    assert second["seconds_over_first_formula"] == pytest.approx(second["seconds"] / first["seconds"])
    assert first["relative_error"] is None and first["speedup_over_jvp"] is None


def test_a_causal_model_is_asked_behind_the_last_token_of_a_template_of_ones_own(tmp_path):
    folder = save_tiny_checkpoint("gpt2", tmp_path / "model")
    for split in ("train", "test"):
        (tmp_path / f"{split}.tsv").write_text("sentence\tlabel\na good movie\t1\n", encoding="utf-8")
    flags = ["--model", str(folder), "--data_dir", str(tmp_path), "--template", "*sent_0*_It_was*mask*.*sep+*"]
    (job,) = jobs_of([*flags, "--train_examples", "2", "--x_examples", "1"])
    inputs = benchmark_inputs.load_inputs(job)
    for feature in (*inputs.train.features, *inputs.x.features):
        assert feature.mask_position == len(feature.input_ids) - 1
    tokens = AutoTokenizer.from_pretrained(folder).convert_ids_to_tokens(inputs.x.features[0].input_ids)
    assert tokens == ["a", "Ġgood", "Ġmovie", "ĠIt", "Ġwas"]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([], "name either a checkpoint folder with --model or a shape with --shape, or pass --quick"),
        (["--shape", "minilm", "--model", "m"], "name either a checkpoint folder with --model or a shape with --shape"),
        (["--model", "no/such"], "--model: there is no folder no/such"),
        (["--shape", "minilm", "--data_dir", "d"], "--data_dir needs --model"),
        (["--shape", "minilm", "--template", "*sent_0**mask*"], "--template needs --model"),
        (["--quick", "--enginez", "factored"], "unknown flag '--enginez': did you mean '--engines'?"),
        (["--quick", "--engines", "fast"], "argument --engines: invalid choice: 'fast'"),
        (["--quick", "--train_examples", "0"], "--train_examples is 0, but it must be 1 or more"),
        (["--quick", "--x_examples", "-1"], "--x_examples is -1, but it must be 1 or more"),
        (["--quick", "--threads", "1", "0"], "--threads is 0, but it must be 1 or more"),
        (["--quick", "--memory_gb", "0"], "--memory_gb is 0.0, but it must be above 0"),
        (["--quick", "--memory_gb", "nan"], "--memory_gb is nan, but it must be above 0"),
        (["--quick", "--memory_gb", "inf"], "--memory_gb is inf, but it must be above 0"),
        (["--quick", "--sample_tiles", "-1"], "--sample_tiles is -1, but it must be 0 or more"),
        (["--quick", "--original_dir", "d"], "--original_dir needs --data_dir"),
        (["--quick", "--task_name", "sst2"], "unknown task 'sst2': did you mean 'SST-2'?"),
        (["--quick", "--task_name", "trec", "--formula", "asymmetric_signgd"], "takes tasks of two classes"),
        (["--quick", "--projection_width", "8"], "--projection_width is for the projected engine"),
        (["--quick", "--engines", "projected", "--projection_width", "0"], "--projection_width is 0, but it must be 1"),
        (["--quick", "--engines", "projected", "--formula", "signgd"], "--engines projected takes --formula sgd"),
        (["--quick", "--engines", "projected", "--kernel_lora_rank", "2"], "leave out --kernel_lora_rank"),
        (["--quick", "--train_kernel"], "--train_kernel takes the engines factored and projected: leave out jacobian"),
        (["--quick", "--json", "no/such/file.json"], "--json: there is no folder"),
    ],
)
def test_wrong_flags_are_told_in_a_sentence_before_anything_is_measured(flags, sentence, capsys, monkeypatch):
    monkeypatch.setattr(benchmark_kernels, "in_own_process", lambda *_: pytest.fail("measured"))
    assert benchmark_kernels.main(flags) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("error: ") and told.err.count("\n") == 1
    assert sentence in told.err


@pytest.mark.parametrize("published", [True, False])
def test_only_the_published_method_computes_all_positions_of_the_last_layer(published, monkeypatch):
    monkeypatch.setitem(benchmark_inputs.SHAPES, "quick", tiny_config("bert", vocab_size=30522))
    (job,) = jobs_of(SMALL)
    inputs = benchmark_inputs.load_inputs(job)
    model = benchmark_inputs.load_model(job, inputs, torch.float32)
    problem = benchmark_inputs.make_problem(job, model, inputs, published=published)
    positions = []
    last = model.lm.bert.encoder.layer[-1].output.dense
    last.register_forward_hook(lambda module, args, output: positions.append(output.shape[1]))
    problem.model.logits_fn(problem.params, problem.train.batch([0]))
    length = len(inputs.train.features[0].input_ids)
    assert positions == [length if published else 1] and length > 1


def rows_in_process(flags, folder, monkeypatch):
    """Return the measurements of a command line, all of which this process makes."""
    file = folder / "measurements.json"
    monkeypatch.setattr(benchmark_kernels, "in_own_process", lambda work, *arguments: work(*arguments))
    assert benchmark_kernels.main([*flags, "--threads", "1", "--json", str(file)]) == 0
    return json.loads(file.read_text(encoding="utf-8"))


def test_each_width_of_an_estimate_is_compared_with_the_exact_engine(tmp_path, monkeypatch, capsys):
    flags = ["--shape", "tiny-bert", "--train_examples", "3", "--x_examples", "4", "--times_only", "--train_kernel"]
    flags += ["--engines", "factored", "projected", "--projection_width", "2", "5"]
    rows = rows_in_process(flags, tmp_path, monkeypatch)
    assert [(row["engine"], row["projection_width"]) for row in rows] == [
        ("factored", None),
        ("projected", 2),
        ("projected", 5),
    ]
    for row in rows:
        assert row["seconds_per_pair"] == pytest.approx(row["seconds"] / (3 * 4 + 6)), "train × train is symmetric"
        assert row["speedup_over_factored"] == pytest.approx(rows[0]["seconds"] / row["seconds"])
        assert row["seconds_over_first_formula"] == 1, "of the same width"
    header, _, *lines = capsys.readouterr().out.splitlines()
    assert "× factored" in header and "median error" in header
    assert [line.split(" | ")[0].strip("| ") for line in lines[:3]] == ["factored", "projected 2", "projected 5"]


@pytest.mark.parametrize("width", [3, 99])
def test_the_error_of_an_estimate_is_against_the_exact_kernel(width):
    """A width above all sizes leaves the kernel exact."""
    flags = ["--shape", "tiny-bert", "--train_examples", "3", "--x_examples", "4", "--engines", "projected"]
    (job,) = jobs_of(flags)
    job = replace(job, projection_width=width)
    inputs = benchmark_inputs.load_inputs(job)
    model = benchmark_inputs.load_model(job, inputs, torch.float64)
    found = errors_of_estimate(job, "projected", model, inputs)
    truth = benchmark_inputs.true_kernel(job, inputs)
    engine = make_engine(benchmark_inputs.make_problem(job, model, inputs), "projected")
    plan = engine.plan()
    off = assemble(engine.blocks(plan), plan, engine.problem) - truth
    expected = {"relative_error": off.norm() / truth.norm(), "median_error": (off / truth).abs().median()}
    for name, value in expected.items():
        assert found[name] == pytest.approx(float(value), rel=1e-6, abs=1e-12)
        assert (found[name] < 1e-12) == (width == 99)


def test_a_run_is_timed_with_its_train_kernel_first(monkeypatch):
    """Both kernels, the second with what the first engine holds of the train examples."""
    (job,) = jobs_of(["--shape", "tiny-bert", "--train_examples", "3", "--x_examples", "4", "--train_kernel"])
    inputs = benchmark_inputs.load_inputs(job)
    problem = benchmark_inputs.make_problem(job, benchmark_inputs.load_model(job, inputs, torch.float64), inputs)
    seen, make = [], run_times.make_engine

    def remember(sides, engine, budget, earlier):
        seen.append((sides.x is None, earlier))
        return make(sides, engine, budget, earlier=earlier)

    monkeypatch.setattr(run_times, "make_engine", remember)
    times = run_times.time_run(job, "factored", problem)
    assert [train for train, _ in seen] == [True, False]
    assert seen[0][1] is None and seen[1][1] is not None
    assert times.seconds > 0 and times.by_stage["propagation"] > 0
    del seen[:]
    run_times.time_run(replace(job, train_kernel=False), "factored", problem)
    assert seen == [(False, None)]


def test_a_scale_is_taken_out_of_the_kernels_of_other_libraries():
    generator = torch.Generator().manual_seed(0)
    exact, off = torch.randn(2, 5, 4, generator=generator, dtype=torch.float64)
    off -= (off * exact).sum() / exact.pow(2).sum() * exact
    found = large_peers.errors_of(7 * (exact + off / off.norm() * exact.norm() / 10), exact)
    assert found.scale == pytest.approx(7)
    assert found.without_scale == pytest.approx(0.1)
    assert found.as_returned == pytest.approx((6**2 + 0.7**2) ** 0.5)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--task_name", "trec"], "--task_name takes a task of two classes"),
        (["--model", "no/such"], "--model: there is no folder no/such"),
        (["--width", "0"], "--width is 0, but it must be 1 or more"),
        ([], "--peers traker: traker is not installed: pip install traker, or leave it out"),
    ],
)
def test_other_libraries_are_missed_before_anything_is_measured(flags, sentence, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(large_peers, "find_spec", lambda name: None if flags == [] else name)
    monkeypatch.setattr(large_peers, "load_inputs", lambda _: pytest.fail("measured"))
    assert large_peers.main(["--model", str(tmp_path), "--data_dir", "d", "--peers", "traker", *flags]) == 2
    assert sentence in capsys.readouterr().err
