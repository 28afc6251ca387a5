"""Files of features: their layout as safetensors reads it, rows in any order, and files that were not finished."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lmntk.errors import FileError, KernelMismatchError
from lmntk.storage.feature_files import (
    FeatureTable,
    StoredFeatures,
    bytes_to_write,
    feature_differences,
    feature_writer,
    is_written,
    partial_path,
)

TABLE = FeatureTable(np.array([0, 2, 1, 2, 0]), 3, 7, {"layout": '[["a",0,4],["b",4,7]]', "seed": "ü"})
FEATURES = np.random.default_rng(0).standard_normal(TABLE.shape).astype(np.float32)
LOGITS = FEATURES[:, :, 0] + 1


def write(path, table=TABLE, rows=range(5), stop_after=None):
    with feature_writer(path, table) as writer:
        for number, row in enumerate(rows):
            if number == stop_after:
                raise KeyboardInterrupt
            writer.write([row], FEATURES[[row]], LOGITS[[row]])


def test_safetensors_reads_what_was_written_row_by_row(tmp_path):
    path = tmp_path / "features.safetensors"
    with feature_writer(path, TABLE) as writer:
        assert writer.missing() == [0, 1, 2, 3, 4]
        writer.write([3, 1], FEATURES[[3, 1]], LOGITS[[3, 1]])
        writer.write([4, 0, 2], FEATURES[[4, 0, 2]], LOGITS[[4, 0, 2]])
    found = load_file(path)
    assert torch.equal(found["features"], torch.from_numpy(FEATURES))
    assert found["labels"].tolist() == TABLE.labels.tolist() and found["labels"].dtype == torch.int64
    with safe_open(path, "pt") as file:
        assert file.metadata() == TABLE.metadata
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0, "numbers are aligned"
    assert path.stat().st_size == len(TABLE.header()) + TABLE.num_bytes
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_rows_are_read_where_they_are_asked_for(tmp_path):
    write(tmp_path / "x")
    stored = StoredFeatures(tmp_path / "x")
    assert stored.shape == (5, 3, 7) and stored.parts == {"a": (0, 4), "b": (4, 7)}
    assert np.array_equal(stored.rows(1, 4), FEATURES[1:4]) and np.array_equal(stored.logits, LOGITS)


def test_a_stopped_file_has_not_its_name_and_the_same_command_goes_on(tmp_path):
    path = tmp_path / "x"
    write(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        write(path, rows=[4, 2, 0], stop_after=2)
    assert not path.exists() and partial_path(path).is_file()
    with feature_writer(path, TABLE) as writer:
        assert writer.missing() == [0, 1, 3]
        writer.write([0, 1, 3], FEATURES[[0, 1, 3]], LOGITS[[0, 1, 3]])
    assert path.read_bytes() == (tmp_path / "whole").read_bytes()
    assert not partial_path(path).exists()


def test_a_file_with_missing_rows_is_kept_but_not_for_whole(tmp_path):
    write(tmp_path / "x", rows=[0, 1])
    assert not (tmp_path / "x").exists() and partial_path(tmp_path / "x").is_file()


@pytest.mark.parametrize("change", ["metadata", "labels", "dimension"])
def test_another_commands_features_finished_or_not_are_never_replaced(tmp_path, change):
    other = {
        "metadata": FeatureTable(TABLE.labels, 3, 7, {**TABLE.metadata, "seed": "1"}),
        "labels": FeatureTable(TABLE.labels[::-1].copy() + 1, 3, 7, TABLE.metadata),
        "dimension": FeatureTable(TABLE.labels, 3, 6, TABLE.metadata),
    }[change]
    write(tmp_path / "x", rows=[0, 1])
    write(tmp_path / "y")
    assert is_written(tmp_path / "y", TABLE) and not is_written(tmp_path / "y", other)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    told = {"metadata": "seed: stored ü, now 1", "labels": "its labels", "dimension": "its shape"}[change]
    for name in ("x", "y"):
        with pytest.raises(KernelMismatchError) as refused, feature_writer(tmp_path / name, other):
            raise AssertionError("nothing is opened")
        assert refused.value.data["differences"] == [told]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_features_go_on_under_another_version_and_another_name_of_the_model(tmp_path):
    path, longer = tmp_path / "x", {**TABLE.metadata, "lmntk": "0.1.10", "model": "../a/longer/name"}
    write(path, FeatureTable(TABLE.labels, 3, 7, {**TABLE.metadata, "lmntk": "1", "model": "a"}), rows=[0, 3])
    with feature_writer(path, FeatureTable(TABLE.labels, 3, 7, longer)) as writer:
        assert writer.missing() == [1, 2, 4]
        writer.write([1, 2, 4], FEATURES[[1, 2, 4]], LOGITS[[1, 2, 4]])
    found = StoredFeatures(path)
    assert found.metadata["model"] == "a" and np.array_equal(found.rows(0, 5), FEATURES)


def test_of_another_split_what_both_share_is_compared(tmp_path):
    def table(split, n=5, **changes):
        kernel = {"formula": "sgd", "dtype": "float32", "tokens_sha256": {split: split}} | changes
        return FeatureTable(TABLE.labels[:n], 3, 7, {**TABLE.metadata, "split": split, "kernel": json.dumps(kernel)})

    write(tmp_path / "train", table("train"))
    assert feature_differences(tmp_path / "train", table("dev", 3), same_split=False) == []
    other = feature_differences(tmp_path / "train", table("dev", 3, dtype="float64"), same_split=False)
    assert other == ["kernel.dtype: stored float32, now float64"]
    wide = FeatureTable(TABLE.labels, 3, 9, {**TABLE.metadata, "split": "dev", "layout": '[["a",0,9]]'})
    assert feature_differences(tmp_path / "train", wide) != []
    narrow = FeatureTable(TABLE.labels, 3, 9, {**table("train").metadata, "layout": '[["a",0,9]]'})
    assert feature_differences(tmp_path / "train", narrow) == ["layout: stored 7 columns, now 9 columns"]


def test_the_room_that_a_file_still_takes_is_counted(tmp_path):
    path = tmp_path / "x"
    whole = len(TABLE.header()) + TABLE.num_bytes
    assert bytes_to_write(path, TABLE) == whole
    write(path, rows=[0])
    assert 0 <= bytes_to_write(path, TABLE) <= whole
    write(path, rows=[1, 2, 3, 4])
    assert bytes_to_write(path, TABLE) == 0


def test_missing_damaged_and_other_files_are_refused_by_name(tmp_path):
    write(tmp_path / "x")
    (tmp_path / "cut").write_bytes((tmp_path / "x").read_bytes()[:-5])
    (tmp_path / "text").write_text("features")
    save_file({"kernel": torch.ones(2)}, tmp_path / "other")
    save_file({"features": torch.ones(2, 3), "labels": torch.ones(2), "logits": torch.ones(2, 1)}, tmp_path / "shapes")
    for name in ("gone", "cut", "text", "other", "shapes"):
        with pytest.raises(FileError) as refused:
            StoredFeatures(tmp_path / name)
        assert refused.value.data["path"] == tmp_path / name
    with pytest.raises(FileError, match="cannot write"):
        write(tmp_path / "gone" / "x")
