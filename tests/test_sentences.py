"""Whole sentences that users read on the command line: the one file that holds them word by word.

Other tests assert an error's class, its data, and perhaps the flag or file in it; so a sentence is improved in one place
of the source and in one row here. To add a row, write the flags that provoke the error, run the test, and copy what it
shows. Run.py's flags are added to a command that works (`Workplace.argv`), and the last of two counts. A sentence says
WORKPLACE where the folder of the test stands.
"""

import contextlib

import pytest

from command_line import Workplace
from lmntk.commands.main import NAMES, main

# fmt: off
OF_RUN = [
    (["--task_name", "sst2"],
     "unknown task 'sst2': did you mean 'SST-2'? Available: SST-2, sst-5, mr, cr, mpqa, subj, trec, CoLA, MRPC, QQP, QNLI, RTE, MNLI, mnli-mm, SNLI, ag_news, STS-B, WNLI, custom"),
    (["--task_name", "custom"],
     "--task_name custom is for your own data: add --custom_columns, the names of the text columns and, last, of the label column, as in --custom_columns text,label"),
    (["--data_dir", "nowhere"],
     "there is no folder nowhere: make k-shot data with `python tools/generate_k_shot_data.py --mode k-shot-1k-test --k 16 --task SST-2` and give --data_dir data/k-shot-1k-test/SST-2/16-42"),
    (["--kernel_formulas", "sgd"],
     "unknown flag --kernel_formulas: did you mean --kernel_formula? run.py --help lists all flags"),
    (["--kernel_formula", "sdg"],
     "--kernel_formula: invalid choice: 'sdg' (choose from 'sgd', 'signgd', 'asymmetric_signgd')"),
    (["--kernel_solver", "ridge"],
     "--kernel_solver: invalid choice: 'ridge' (choose from 'lstsq', 'logistic', 'svr', 'svc', 'asym')"),
    (["--kernel_solver", "asym"],
     "--kernel_solver asym needs two classes: add --binary_classification, or take another (lstsq, logistic, svr, svc)"),
    (["--kernel_formula", "asymmetric_signgd"],
     "--kernel_formula asymmetric_signgd needs --binary_classification: add --binary_classification, or take another formula (sgd, signgd)"),
    (["--kernel_regularization", "-1"],
     "--kernel_regularization is -1.0, but it must be from 0 to 1000000000000.0"),
    (["--lstsq_method", "cg", "--kernel_variance"],
     "--kernel_variance needs the eigenvectors of the kernel, which --lstsq_method cg does not have: take --lstsq_method direct, or leave it out"),
    (["--cg_tolerance", "1e-6"],
     "--cg_tolerance 1e-06 is for --lstsq_method cg: add it, or leave this out"),
    (["--kernel_lambda", "2"],
     "--kernel_lambda is 2.0, but it must be from 0 to 1"),
    (["--f0_scaling", "-1"],
     "--f0_scaling is -1.0, but it must be 0, or from 1e-100 to 1e+100"),
    (["--kernel_memory_gb", "1e-9"],
     "--kernel_memory_gb: the tiles take 0.00 GB beside the model, but only 0.00 GB are allowed; give at least 0.01, smaller --per_device_train_batch_size and --per_device_eval_batch_size, or take --kernel_engine jvp"),
    (["--max_seq_length", "1000"],
     "--max_seq_length is 1000, but this model reads at most 298 tokens"),
    (["--max_seq_length", "8"],
     "the mask of example 1 of train was cut away, its prompt has 17 tokens: raise --max_seq_length (now 8), or lower --first_sent_limit (now none); its text is 'they said it was not for people'"),
    (["--template", "*cls**sent_0*"],
     "--template has no *mask*, but the label word needs exactly one place, as in *cls**sent_0*_It_was*mask*.*sep+*; the template is '*cls**sent_0*'"),
    (["--template", "*cls**sent_1*_It_was*mask*.*sep+*"],
     "--template uses sent_1, but SST-2 has one sentence (sent_0); the template is '*cls**sent_1*_It_was*mask*.*sep+*'"),
    (["--template", "*cls**sent0*_It_was*mask*.*sep+*"],
     "--template: unknown variable 'sent0': did you mean 'sent_0'? Available: cls, mask, sep, sep+, sent_0, sent-_0, sentl_0, sentl-_0, sentu_0, +sent_0, +sentl_0, +sentu_0, label_0, labelx_0; the template is '*cls**sent0*_It_was*mask*.*sep+*'"),
    (["--mapping", "{'0':'terrible'}"],
     "--mapping has no word for label '1': {'0':'terrible'}; the labels are 0, 1"),
    (["--mapping", "no"],
     "--mapping is not a Python dictionary: no; write for example \"{'0': 'word0', '1': 'word1'}\""),
    (["--mapping", "{'0':'great','1':'great'}"],
     "label words 'great' (label 0) and 'great' (label 1) are the same token for this model: give each class its own word with --mapping"),
    (["--mapping", "{'0':'terrible','1':'unheardof'}"],
     "label word 'unheardof' (label 1) is 10 pieces for this model (Ġ u n h e a r d o f): choose a word of one piece with --mapping"),
    (["--binary_classification", "--task_name", "mnli"],
     "--binary_classification needs two classes, but MNLI has 3; leave it out"),
    (["--task_name", "sts-b"],
     "--trainer kernel predicts classes, but STS-B is a regression task; take a task with classes"),
    (["--adjust_for_init", "--kernel_solver", "svc"],
     "--adjust_for_init does not work with --kernel_solver svc, only with lstsq, svr, asym"),
    (["--load_kernels", "nowhere"],
     "--load_kernels nowhere is not a folder: name an earlier run's output folder, or leave it out to compute the kernels"),
    (["--kernel_dtype", "bfloat16", "--kernel_formula", "signgd"],
     "--kernel_formula signgd takes signs of gradients, of which --kernel_dtype bfloat16 has one in some hundred wrong: take --kernel_dtype float32, or --kernel_formula sgd"),
    (["--kernel_dtype", "bfloat16", "--kernel_engine", "jvp"],
     "--kernel_engine jvp adds products inside the model, which --kernel_dtype bfloat16 rounds to 8 bits: take another engine, or --kernel_dtype float32"),
    (["--kernel_dtype", "bfloat16", "--trainer", "standard", "--do_train"],
     "--kernel_dtype bfloat16 is for kernels: --trainer standard changes weights by less than their rounding; take float32"),
    (["--kernel_per_layer", "--kernel_engine", "jvp"],
     "--kernel_per_layer does not work with --kernel_engine jvp, which takes all layers at once: take factored or jacobian"),
    (["--gpt3_in_context_head"],
     "--gpt3_in_context_head is for prompts with demonstrations: pass --few_shot_type prompt-demo, or leave it out"),
    (["--demo_filter", "--few_shot_type", "prompt-demo"],
     "--demo_filter needs --demo_filter_model, the name under which tools/get_sbert_embedding.py wrote sentence embeddings into --data_dir"),
    (["--lora_r", "4"],
     "--lora_r 4 configures LoRA: add --apply_lora, or leave it out"),
    (["--exclude_first_layers", "9"],
     "--exclude_first_layers 9: the model has 2 layers"),
    (["--template_id", "0"],
     "--template_id 0 needs --template_path, the file to choose from"),
    (["--gguf_file", "tiny.gguf"],
     "--gguf_file tiny.gguf: there is no such file in WORKPLACE/model; there is no GGUF file"),
    (["--seed", "-1"],
     "--seed is -1, but it must be from 0 to 4294967295"),
    (["--few_shot_type", "promt"],
     "--few_shot_type: invalid choice: 'promt' (choose from 'finetune', 'prompt', 'prompt-demo')"),
]
"""Flags of run.py, and the sentence after ``error: ``."""

FEATURES_OF = [
    *("--", "--trainer", "kernel", "--task_name", "SST-2", "--few_shot_type", "prompt", "--do_train", "--use_cpu"),
    *("--model_name_or_path", "model", "--data_dir", "data", "--output_dir", "features"),
]
OF_COMMANDS = [
    (["kernle"],
     f"unknown command 'kernle': did you mean 'kernel'? Available: {', '.join(NAMES)}"),
    (["tasks", "--format", "latx"],
     "argument --format: invalid choice: 'latx' (choose from 'text', 'csv', 'markdown', 'latex'); see --help"),
    (["gather", "--condition", "tag"],
     "--log log cannot be read (No such file or directory): run.py appends to a file log in its working directory"),
    (["gather", "--condition", "{'tag': 'x'}"],
     "--log log cannot be read (No such file or directory): run.py appends to a file log in its working directory"),
    (["splits", "--task", "sst2"],
     "unknown task 'sst2': did you mean 'SST-2'? Available: SST-2, sst-5, mr, cr, mpqa, subj, trec, CoLA, MRPC, QQP, QNLI, RTE, MNLI, mnli-mm, SNLI, ag_news, STS-B, WNLI, custom"),
    (["splits", "--task", "SST-2"],
     "data/original/SST-2 is missing: bash data/download_dataset.sh fetches the originals where there is a network; --data_dir says where they are"),
    (["compare", "a", "b"],
     "a does not exist: give the folder of a run, or a kernel file"),
    (["report", "nowhere"],
     "nowhere does not exist: give the folder of a run"),
    (["download", "--formula", "sdg"],
     "argument --formula: invalid choice: 'sdg' (choose from 'sgd', 'signgd', 'asymmetric_signgd'); see --help"),
    (["download", "--formula", "signgd", "--k", "512"],
     "--formula signgd --k 512: no such kernels were published; signgd kernels are those of 16 and 64 examples per label"),
    (["download", "--task", "CoLA"],
     "--task CoLA: no kernels of CoLA were published; available: SST-2, sst-5, mr, cr, mpqa, subj, trec, MRPC, QQP, QNLI, RTE, MNLI, SNLI, ag_news"),
    (["download", "--tag", "x", "--formula", "sgd", "signgd"],
     "--tag x: a tag is for the kernels of one --formula: leave it out to have one for each formula"),
    (["download", "--base_url", "file:///tmp"],
     "--base_url file:///tmp: it must be an address such as https://nlp.cs.princeton.edu/projects/LM-Kernel-FT/roberta-base"),
    (["drift", "nowhere"],
     "nowhere does not exist: give the folder of a run"),
    (["drift", "data", "--figure", "drift.pdf"],
     "--figure drift.pdf: pictures are PNG files, so give a name that ends with .png"),
    (["report", "data"],
     "data holds neither kernels nor results of a run (such as test_kernels_sst-2.pt, test_results_sst-2.txt): give the folder that --output_dir named"),
    (["compare", "data", "model"],
     "data holds neither kernels nor results of a run (such as test_kernels_sst-2.pt, test_results_sst-2.txt): give the folder that --output_dir named"),
    (["features", *FEATURES_OF, "--load_kernels", "data"],
     "--load_kernels data has no effect on features: it opens no model, which they need: leave it out"),
    (["features", *FEATURES_OF, "--kernel_solver", "svr"],
     "--kernel_solver svr has no effect on features: they are solved by least squares: leave it out, or predict with a kernel"),
    (["features", *FEATURES_OF, "--overwrite_kernels"],
     "--overwrite_kernels has no effect on features: --overwrite replaces them"),
    (["features", "--check", "1", *FEATURES_OF],
     "--check 1 is too few: the error of features is always measured, on 2 train examples or more"),
    (["features", "--solve", *FEATURES_OF],
     "--kernel_regularization is chosen on dev, which these features lack: give one number, or a run with --do_eval"),
    (["features", *FEATURES_OF, "--kernel_engine", "projected", "--kernel_memory_gb", "1e-6"],
     "--kernel_memory_gb: the longest prompt, with its features, takes 0.00 GB beside the model, but only 0.00 GB are allowed; give at least 0.01, or a smaller --width"),
]
"""Command lines of `lmntk`, run in an empty folder, and the sentence after ``error: ``."""
# fmt: on


def shown(err: str, place: Workplace) -> str:
    """The one sentence on stderr, without what differs from test to test."""
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    return line.removeprefix("error: ").replace(str(place.folder), "WORKPLACE")


@pytest.mark.parametrize(("flags", "sentence"), OF_RUN, ids=[" ".join(flags)[:60] for flags, _ in OF_RUN])
def test_run_py_refuses_with_this_sentence(place: Workplace, flags: list[str], sentence: str) -> None:
    outcome = place.call(place.argv(*flags))
    assert outcome.status == 2
    assert shown(outcome.err, place) == sentence


@pytest.mark.parametrize(("words", "sentence"), OF_COMMANDS, ids=[" ".join(words)[:60] for words, _ in OF_COMMANDS])
def test_a_command_refuses_with_this_sentence(
    place: Workplace, words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with contextlib.chdir(place.folder):
        assert main(words) == 2
    assert shown(capsys.readouterr().err, place) == sentence
