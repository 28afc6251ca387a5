"""--kernel_parts and --kernel_lora_rank: the files of a run, what they are refused with, and what serves them again."""

import json

import pytest
import torch

import oracle
from command_line import Workplace, read_kernel
from interrupted_runs import TILED, stop_after
from lmntk.analysis.saved_run import read_runs
from lmntk.errors import FileError, KernelMismatchError
from lmntk.storage.kernel_metadata import write_description
from lmntk.storage.paths import RunPaths

PARTS = ("--kernel_parts", "weight-or-bias,kind,layer")
LORA = ("--kernel_lora_rank", "2", "--kernel_lora_targets", "query,value")


def read_slices(folder, kind, split="test"):
    return torch.load(folder / f"{split}_{kind}_kernels_sst-2.pt", weights_only=True)


def test_a_run_keeps_parts_and_adapters_kernels_beside_the_same_kernel(place: Workplace) -> None:
    plain = place.run(output="plain")
    kept = place.run(*PARTS, *LORA, output="kept")
    for split in ("train", "dev", "test"):
        kernel, parts = read_kernel(kept, split), read_slices(kept, "part", split)
        assert oracle.relative_error(sum(parts.values()), kernel) < 1e-15, "sums of float64 in two orders"
        # Queries, keys and values are summed in float32 where they are not kept apart.
        assert oracle.relative_error(kernel, read_kernel(plain, split)) < 1e-7
        assert {"embeddings/embedding/weight", "layer.1/query/bias", "head/head/weight"} <= parts.keys()
        described = json.loads((kept / f"{split}_kernels_sst-2.json").read_text(encoding="utf-8"))
        assert list(described["parts"]["parameters"]) == list(parts)
        assert sum(described["parts"]["parameters"].values()) == described["grad_dim"]
        assert described["parts"]["matrices"]["layer.1/query/weight"] == [[16, 16]]
        lora = read_slices(kept, "lora", split)
        assert list(described["lora_kernels"]["parameters"]) == list(lora)
        assert list(described["lora_kernels"]["parameters"].values()) == [2 * (16 + 16)] * 4
        assert {part.untyped_storage().nbytes() for part in lora.values()} == {kernel.nbytes}, "no other slices"
    # A second command finds all that it needs; another set of parts, or other adapters, are refused.
    before = (kept / "test_kernels_sst-2.pt").stat().st_mtime_ns
    place.run("--kernel_parts", "kind", *LORA, output="kept")
    assert (kept / "test_kernels_sst-2.pt").stat().st_mtime_ns == before
    place.run("--kernel_lora_rank", "2", "--kernel_lora_targets", "value,query", output="kept")
    assert (kept / "test_kernels_sst-2.pt").stat().st_mtime_ns == before, "names of layers have no order"
    for flags, sentence in (
        (("--kernel_lora_rank", "3"), "with other adapters beside it (rank: stored 2, now 3)"),
        (("--kernel_lora_rank", "2"), "(targets: stored query,value, now all linear layers)"),
        (("--kernel_per_layer",), "was made without --kernel_per_layer"),
        (("--kernel_per_layer",), "its finer parts sum to them"),
    ):
        outcome = place.call(place.argv(*flags, output="kept"))
        assert outcome.status == 2
        assert sentence in outcome.err
    # Parts of another kernel of the same names and shape are not taken for this one's.
    paths, run = RunPaths(kept, "sst-2"), read_runs(kept)[0]
    assert run.part_kernels("train")
    own = paths.part_kernels("train").read_bytes()
    torch.save(
        {name: 2 * part for name, part in read_slices(kept, "part", "train").items()}, paths.part_kernels("train")
    )
    with pytest.raises(KernelMismatchError, match="does not hold the parts of the kernel beside it"):
        run.part_kernels("train")
    paths.part_kernels("train").write_bytes(own)
    # A description that says nonsense of parts is refused as such.
    described = json.loads((kept / "train_kernels_sst-2.json").read_text(encoding="utf-8"))
    write_description(paths.kernel("train"), {**described, "parts": "layer"})
    with pytest.raises(FileError, match="a value of the wrong type for parts"):
        run.part_kernels("train")
    place.run("--overwrite_kernels", output="kept")
    assert not [path for path in kept.iterdir() if "part_kernels" in path.name or "lora_kernels" in path.name]


def test_layers_as_parts_are_the_files_of_kernel_per_layer(place: Workplace) -> None:
    one, other = place.run("--kernel_per_layer", output="one"), place.run("--kernel_parts", "layer", output="other")
    for name in ("train_layer_kernels_sst-2.pt", "test_layer_kernels_sst-2.pt", "layer_results_sst-2.csv"):
        assert (one / name).read_bytes() == (other / name).read_bytes()
    assert not list(other.glob("*_part_kernels_*"))


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--kernel_parts", "colour"), "not told apart by 'colour'; give one or more of layer, kind, weight-or-bias"),
        ((*PARTS, "--kernel_per_layer"), "--kernel_per_layer keeps layers alone"),
        ((*PARTS, "--kernel_engine", "jvp"), "does not work with --kernel_engine jvp"),
        (("--kernel_lora_rank", "2", "--only_biases"), "adapts weights, which --only_biases leaves out"),
        (("--kernel_lora_rank", "2", "--apply_lora"), "is for a model without adapters"),
        (("--kernel_lora_rank", "0"), "--kernel_lora_rank is 0, but it must be 1 or more"),
        (("--kernel_lora_rank", "2", "--kernel_lora_targets", ","), "--kernel_lora_targets , names no layer"),
        (("--kernel_lora_targets", "query"), "names layers of --kernel_lora_rank"),
        (("--kernel_lora_rank", "2", "--kernel_lora_targets", "colour"), "colour names no linear layer"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_sentence(place: Workplace, flags: tuple[str, ...], sentence: str) -> None:
    outcome = place.call(place.argv(*flags, output="refused"))
    assert outcome.status == 2
    assert sentence in outcome.err


@pytest.mark.parametrize("flags", [("--kernel_parts", "kind"), LORA])
def test_tiles_of_a_stopped_run_with_slices_are_not_dropped_by_one_without(
    place: Workplace, flags: tuple[str, ...]
) -> None:
    folder = f"stopped{len(flags)}"
    with pytest.MonkeyPatch.context() as patched:
        stop_after(patched, 2)
        assert place.call(place.argv(*TILED, *flags, output=folder)).status == 143
    tiles = sorted((place.folder / folder).glob("*_tiles_*/*.tile"))
    outcome = place.call(place.argv(*TILED, output=folder))
    assert outcome.status == 2
    assert f"{flags[0]}: stored" in outcome.err and "give that command again to finish it" in outcome.err
    assert tiles and sorted((place.folder / folder).glob("*_tiles_*/*.tile")) == tiles
