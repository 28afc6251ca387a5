"""Files that anybody may have written: what is odd about them is told in a sentence, never by a traceback."""

import io
import json
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lmntk.data.tasks import find_task
from lmntk.errors import UsageError
from lmntk.prompts.sentence_embeddings import embedding_file, read_embeddings
from lmntk.storage import kernel_files, kernel_metadata, logits_files
from lmntk.storage.paths import RunPaths
from lmntk.storage.readers import read_json, read_npy
from saved_kernels import save_kernel

KERNEL = torch.arange(24, dtype=torch.float64).reshape(2, 2, 3, 2)
LABELS = torch.tensor([0, 1, 1])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return RunPaths(tmp_path, "sst-2").kernel("dev")


@pytest.mark.parametrize(
    "kernel",
    [
        KERNEL.clone().requires_grad_(),
        torch.nn.Parameter(KERNEL.clone()),
        KERNEL.half(),
        KERNEL.bfloat16(),
        KERNEL.to(torch.uint16),
        torch._neg_view(-KERNEL),
        KERNEL.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        torch.cat([KERNEL, KERNEL])[2:],
    ],
    ids=["gradient", "parameter", "half", "bfloat16", "uint16", "negative view", "strides", "slice"],
)
def test_kernels_in_another_form_of_the_same_numbers_are_read(path: Path, kernel: torch.Tensor) -> None:
    torch.save((kernel, LABELS.float().requires_grad_()), path)
    found, labels = kernel_files.load_kernel(path)
    assert np.array_equal(found.numpy(), KERNEL.numpy())
    assert labels.numpy().tolist() == [0, 1, 1]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "odd",
    [
        lambda numbers: numbers.to_sparse(),
        lambda numbers: numbers + 0j,
        lambda numbers: numbers > 0,
        lambda numbers: numbers.to("meta"),
        lambda numbers: torch.quantize_per_tensor(numbers.float(), 1.0, 0, torch.quint8),
        lambda numbers: torch.nested.nested_tensor([numbers[0], numbers[1]]),
    ],
    ids=["sparse", "complex", "bool", "meta", "quantised", "nested"],
)
def test_what_is_no_plain_array_of_numbers_is_told(path: Path, odd: Any) -> None:
    for content in ((odd(KERNEL), LABELS), (KERNEL, odd(LABELS))):
        torch.save(content, path)
        with pytest.raises(UsageError, match=r"dev_kernels_sst-2\.pt (holds|cannot be read)"):
            kernel_files.load_kernel(path)


def test_a_kernel_that_says_it_is_larger_than_memory_is_told(path: Path) -> None:
    torch.save((torch.ones(1, 1, 1, 1).expand(10**6, 2, 10**6, 2), LABELS), path)
    with pytest.raises(UsageError, match="does not fit into memory"):
        kernel_files.load_kernel(path)


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps((1, 2), 2),
        pickle.dumps(OrderedDict(a=1), 2),
        b"\x80\x02N.",
        b"\x80\x02]q\x00h\x00a.",
        b"\x80\x02ctorch\nTensor\nctorch\nTensor\n\x86.",
        b"\x80\x02ccollections\nOrderedDict\n)R}X\x06\x00\x00\x00valuesK\x01sb.",
        b"\x80\x02" + b"(" * 10**5 + b"t" * 10**5 + b".",
    ],
    ids=["numbers", "dict", "none", "itself", "classes", "attributes", "deep"],
)
def test_a_well_formed_pickle_of_something_else_is_told(path: Path, content: bytes) -> None:
    torch.save((KERNEL, LABELS), path)
    whole = zipfile.ZipFile(io.BytesIO(path.read_bytes()))
    with zipfile.ZipFile(path, "w") as archive:
        for name in whole.namelist():
            archive.writestr(name, content if name.endswith("data.pkl") else whole.read(name))
    for read in (kernel_files.load_kernel, logits_files.load_logits, kernel_files.load_layer_kernels):
        with pytest.raises(UsageError, match=r"dev_kernels_sst-2\.pt (does not hold|cannot be read)"):
            read(path)


@pytest.mark.parametrize(
    "text",
    ["[" * 10**5, '{"a": ' * 1000 + "1" + "}" * 1000, '{"a": ' * 30 + "1" + "}" * 30, '{"formula": "\\ud800"}'],
    ids=["broken", "thousand", "thirty", "half a letter"],
)
def test_json_that_cannot_be_worked_with_is_told(path: Path, text: str) -> None:
    save_kernel(path, KERNEL, LABELS, {})
    path.with_suffix(".json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError):
        read_json(path.with_suffix(".json"))
    with pytest.raises(UsageError, match=r"dev_kernels_sst-2\.json cannot be read \("):
        kernel_files.load_kernel(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [("model", [1]), ("template", [3]), ("mapping", "x"), ("data_files", []), ("data_sha256", 1),
     ("demonstrations", {"draws": 0}), ("formula", {}), ("labels", [None])],
)  # fmt: skip
def test_a_description_that_says_something_in_another_form_is_told(path: Path, key: str, value: Any) -> None:
    save_kernel(path, KERNEL, LABELS, {})
    path.with_suffix(".json").write_text(json.dumps({key: value}), encoding="utf-8")
    with pytest.raises(UsageError, match=rf"dev_kernels_sst-2\.json has a value of the wrong type for {key}"):
        kernel_metadata.read_description(path)


@pytest.mark.parametrize(
    "header",
    ["{'descr': '<f4', 'fortran_order': False, 'shape': " + shape + "}"
     for shape in ("(4, 3", "(True, 3)", "(99999999999999999999999,)", "(10**9, 3)", "4", "(1000000000000, 3)")]
    + ["{'descr': '|O', 'fortran_order': False, 'shape': (4, 3)}", "{" * 3000, "", "{'a'\n'b'"],
)  # fmt: skip
def test_an_array_whose_header_is_odd_is_told(tmp_path: Path, header: str) -> None:
    task = find_task("sst-2")
    path = embedding_file(tmp_path / "train.tsv", "m")
    text = header.encode() + b"\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(48))
    with pytest.raises(ValueError):
        read_npy(path)
    with pytest.raises(UsageError, match="train_m.npy.* is damaged, or not a plain numpy array"):
        read_embeddings(task, tmp_path, "train", "m", 4)
