"""Files of features: their layout as safetensors reads it, rows in any order, and files that were not finished."""

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lmntk.errors import FileError
from lmntk.storage.feature_files import FeatureTable, StoredFeatures, feature_writer, is_written, partial_path

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
def test_another_commands_partial_file_is_begun_anew(tmp_path, change):
    other = {
        "metadata": FeatureTable(TABLE.labels, 3, 7, {**TABLE.metadata, "seed": "1"}),
        "labels": FeatureTable(TABLE.labels[::-1].copy() + 1, 3, 7, TABLE.metadata),
        "dimension": FeatureTable(TABLE.labels, 3, 6, TABLE.metadata),
    }[change]
    write(tmp_path / "x", rows=[0, 1])
    with feature_writer(tmp_path / "x", other) as writer:
        assert writer.missing() == [0, 1, 2, 3, 4]
    write(tmp_path / "y")
    assert is_written(tmp_path / "y", TABLE) and not is_written(tmp_path / "y", other)


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
