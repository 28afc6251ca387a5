"""GGUF files: what is converted, where it is kept, what is refused, and what is said where the flag is missing."""

import errno
import hashlib
import logging
import os
import resource
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Qwen2Config

from command_line import snapshot
from lmntk.errors import FileError, ModelError, NotFiniteError, UsageError
from lmntk.models import gguf as our_gguf
from lmntk.models.gguf import LEFT_OVER, SCRATCH, converted
from lmntk.models.loading import load_prompt_model
from lmntk.models.pretrained import load_config, load_tokenizer
from tiny_gguf import SHAPE, Made, make_gguf_files, random_lm, write_gguf

LOGITS = 1e-5
"""The tolerance of logits: the same float32 numbers in other places in memory, and products round by those."""
TEXTS = ("It was a great film", "the actor's 12 zebras\n  said <|endoftext|>it, it?", "  ")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_gguf_files(tmp_path_factory.mktemp("gguf"))


def as_quantised(weight: Tensor, kind: Kind) -> Tensor:
    """The numbers that a weight's quantised ones stand for; blocks lie within rows, whose order makes no difference."""
    found = gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), kind), kind)
    return torch.from_numpy(found.reshape(weight.shape))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache in which the files of `made` may be found converted."""
    return tmp_path_factory.mktemp("cache")


def logits_of(lm: PreTrainedModel) -> Tensor:
    ids = torch.randint(0, 528, (2, 13), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return lm.eval()(ids).logits


def refusal(kind: type[UsageError], name_or_path: Path | str, gguf_file: str, cache: Path) -> UsageError:
    with pytest.raises(kind) as error:
        converted(str(name_or_path), gguf_file, cache)
    assert "`gguf_file" in str(error.value)
    assert "\n" not in str(error.value)
    return error.value


def contents(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# What is converted.


def test_a_converted_file_is_the_model_that_it_was_made_of(made: Made, cache: Path) -> None:
    folder = converted(str(made.folder), "tiny-F32.gguf", cache)
    found, wanted = AutoModelForCausalLM.from_pretrained(folder), made.lm.state_dict()
    assert found.state_dict().keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.state_dict().items())
    torch.testing.assert_close(logits_of(found), logits_of(made.lm), atol=LOGITS, rtol=0)


def test_a_file_of_a_qwen_is_one_too(made: Made, tmp_path: Path) -> None:
    lm = random_lm(Qwen2Config)
    write_gguf(tmp_path / "qwen.gguf", lm, made.tokenizer)
    found = AutoModelForCausalLM.from_pretrained(converted(str(tmp_path), "qwen.gguf", tmp_path / "cache"))
    torch.testing.assert_close(found.state_dict(), lm.state_dict(), atol=0, rtol=0)
    torch.testing.assert_close(logits_of(found), logits_of(lm), atol=LOGITS, rtol=0)


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_1], ids=lambda kind: kind.name)
def test_a_quantised_file_becomes_the_model_of_the_numbers_that_it_stands_for(
    made: Made, cache: Path, kind: Kind
) -> None:
    found = AutoModelForCausalLM.from_pretrained(converted(str(made.folder), f"tiny-{kind.name}.gguf", cache))
    plain = random_lm()
    with torch.no_grad():
        for parameter in plain.parameters():
            if parameter.dim() == 2:
                parameter.copy_(as_quantised(parameter, kind))
    assert {tensor.dtype for tensor in found.state_dict().values()} == {torch.float32}
    torch.testing.assert_close(found.state_dict(), plain.state_dict(), atol=1e-7, rtol=0)  # scales are read as float32
    torch.testing.assert_close(logits_of(found), logits_of(plain), atol=LOGITS, rtol=0)
    assert (logits_of(found) - logits_of(made.lm)).abs().max() > 0.01, "quantising has changed nothing"


def test_a_tied_decoder_is_stored_once_and_starts_as_the_word_embeddings(made: Made, cache: Path) -> None:
    folder = converted(str(made.folder), "tiny-Q8_0.gguf", cache)
    stored = load_file(folder / "model.safetensors")
    assert stored.keys() == made.lm.state_dict().keys() - {"lm_head.weight"}
    model = load_prompt_model(str(folder), load_config(str(folder)), (300, 301))
    decoder, words = model.lm.get_output_embeddings().weight, model.lm.get_input_embeddings().weight
    assert torch.equal(decoder, words) and torch.equal(words, stored["model.embed_tokens.weight"])
    assert decoder.data_ptr() != words.data_ptr()


def test_a_decoder_of_the_file_s_own_is_kept(made: Made, tmp_path: Path) -> None:
    lm = random_lm(tied=False)
    write_gguf(tmp_path / "untied.gguf", lm, made.tokenizer)
    folder = converted(str(tmp_path), "untied.gguf", tmp_path / "cache")
    model = load_prompt_model(str(folder), load_config(str(folder)), (300, 301))
    assert torch.equal(model.lm.get_output_embeddings().weight, lm.lm_head.weight)
    assert torch.equal(model.lm.get_input_embeddings().weight, lm.model.embed_tokens.weight)
    assert not torch.equal(lm.lm_head.weight, lm.model.embed_tokens.weight)


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_the_configuration_is_the_model_s_and_says_nothing_of_quantisation(made: Made, cache: Path, kind: str) -> None:
    folder = converted(str(made.folder), f"tiny-{kind}.gguf", cache)
    assert "quant" not in (folder / "config.json").read_text(encoding="utf-8")
    found, wanted = AutoConfig.from_pretrained(folder), made.lm.config
    same = ("model_type", "vocab_size", "num_key_value_heads", "head_dim", "rope_parameters", "tie_word_embeddings")
    for name in (*same, *SHAPE, "rms_norm_eps", "bos_token_id", "hidden_act"):
        assert getattr(found, name) == getattr(wanted, name), name
    assert found.architectures == ["LlamaForCausalLM"]
    assert load_config(str(folder), family="causal").model_type == "llama"


def test_the_tokenizer_gives_the_same_tokens(made: Made, cache: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(converted(str(made.folder), "tiny-F32.gguf", cache))
    for text in TEXTS:
        assert tokenizer.encode(text, add_special_tokens=False) == made.tokenizer.encode(text, add_special_tokens=False)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "all_special_tokens"):
        assert getattr(tokenizer, name) == getattr(made.tokenizer, name), name
    assert len(tokenizer) == len(made.tokenizer)


def test_weights_that_a_file_lacks_are_named_whenever_it_is_loaded(
    made: Made, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lacking = "model.layers.1.mlp.up_proj.weight"
    write_gguf(tmp_path / "hole.gguf", made.lm, made.tokenizer, leave_out=[lacking])
    folder = converted(str(tmp_path), "hole.gguf", tmp_path / "cache")
    with caplog.at_level(logging.WARNING, logger="lmntk"):
        first, again = (load_prompt_model(str(folder), load_config(str(folder)), (300, 301)) for _ in range(2))
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert all("RANDOM" in message and f"\n  {lacking}\n" in message for message in said)
    # As random as a seed makes it.
    assert torch.equal(first.lm.get_parameter(lacking), again.lm.get_parameter(lacking))


# The scaling of positions.


LLAMA_3_2 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def factors_of_llama_3(base: float, factor: float, size: int) -> np.ndarray:
    """By how much each frequency is divided, as llama.cpp's converter stores it."""
    found = []
    for wavelength in 2 * np.pi * base ** (np.arange(size) / size):
        smooth = (8192 / wavelength - 1) / 3
        own = 1 / ((1 - smooth) / factor + smooth)
        found.append(1.0 if wavelength < 8192 / 4 else factor if wavelength > 8192 else own)
    return np.array(found, dtype=np.float32)


def test_the_scaling_of_positions_of_llama_3_is_kept(made: Made, tmp_path: Path) -> None:
    lm, unscaled = random_lm(rope_parameters=LLAMA_3_2), random_lm(rope_theta=LLAMA_3_2["rope_theta"])
    factors = factors_of_llama_3(5e5, 32.0, 4)
    assert factors[0] == 1 < factors[2] < factors[3] == 32, "there are not all three kinds of frequencies"
    also = lambda writer: writer.add_tensor("rope_freqs.weight", factors)  # noqa: E731
    write_gguf(tmp_path / "llama-3.gguf", lm, made.tokenizer, also=also)
    folder = converted(str(tmp_path), "llama-3.gguf", tmp_path / "cache")
    assert AutoConfig.from_pretrained(folder).rope_parameters == LLAMA_3_2
    found = logits_of(AutoModelForCausalLM.from_pretrained(folder))
    torch.testing.assert_close(found, logits_of(lm), atol=LOGITS, rtol=0)
    assert (found - logits_of(unscaled)).abs().max() > 100 * LOGITS


def test_a_scaling_of_positions_that_is_not_read_is_refused(made: Made, tmp_path: Path) -> None:
    factors = np.array([1.0, 1.5, 2.5, 7.0], dtype=np.float32)
    path = write_gguf(
        tmp_path / "a.gguf", made.lm, made.tokenizer, also=lambda w: w.add_tensor("rope_freqs.weight", factors)
    )
    error = refusal(ModelError, tmp_path, "a.gguf", tmp_path / "cache")
    assert error.data == {"path": path}
    assert "scales positions (by factors of its own)" in str(error)
    path = write_gguf(
        tmp_path / "b.gguf", made.lm, made.tokenizer, also=lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    )
    error = refusal(ModelError, tmp_path, "b.gguf", tmp_path / "cache")
    assert error.data == {"path": path}
    assert "scales positions (yarn)" in str(error)
    assert contents(tmp_path / "cache") == set()


# Where it is kept.


def test_the_second_call_finds_what_the_first_has_made(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = converted(str(made.folder), "tiny-Q4_1.gguf", tmp_path)
    before = snapshot(folder)
    assert before.keys() == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    monkeypatch.setattr(our_gguf, "_read", lambda source: pytest.fail("it was converted again"))
    assert converted(str(made.folder), "tiny-Q4_1.gguf", tmp_path) == folder
    assert snapshot(folder) == before
    assert contents(tmp_path) == {folder.name}


def test_the_name_tells_the_file_by_its_content(made: Made, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "files" / "model.gguf", made.lm, made.tokenizer)
    first = converted(str(path.parent), path.name, tmp_path / "cache")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert first.name.startswith(f"model-{digest[:16]}-transformers-")
    write_gguf(path, random_lm(rope_theta=100.0), made.tokenizer, Kind.Q8_0)
    assert converted(str(path.parent), path.name, tmp_path / "cache") != first
    assert len(contents(tmp_path / "cache")) == 2


def test_others_may_read_what_one_user_has_converted(made: Made, cache: Path) -> None:
    folder = converted(str(made.folder), "tiny-F32.gguf", cache)
    assert folder.stat().st_mode & 0o777 == 0o755
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o644}


def test_nothing_is_written_beside_the_file(made: Made, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "files" / "model.gguf", made.lm, made.tokenizer)
    before = snapshot(path.parent)
    path.parent.chmod(0o555)
    try:
        folder = converted(str(path.parent), path.name, tmp_path / "cache")
    finally:
        path.parent.chmod(0o755)
    assert folder.parent == tmp_path / "cache"
    assert snapshot(path.parent) == before


def test_a_run_that_is_overtaken_takes_what_the_faster_one_has_made(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, faster = our_gguf._write, []

    def write(folder: Path, *arguments: object) -> None:
        monkeypatch.setattr(our_gguf, "_write", real)
        faster.append(converted(str(made.folder), "tiny-F32.gguf", tmp_path))
        faster.append(snapshot(faster[0]))
        real(folder, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(our_gguf, "_write", write)
    assert converted(str(made.folder), "tiny-F32.gguf", tmp_path) == faster[0]
    assert snapshot(faster[0]) == faster[1]
    assert contents(tmp_path) == {faster[0].name}


def test_what_was_interrupted_is_not_taken_for_done(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(our_gguf, "save_file", stop)
        with pytest.raises(KeyboardInterrupt):
            converted(str(made.folder), "tiny-F32.gguf", tmp_path)
        assert contents(tmp_path) == set()
        patch.setattr(our_gguf.shutil, "rmtree", stop)  # killed: nobody tidies up
        with pytest.raises(KeyboardInterrupt):
            converted(str(made.folder), "tiny-F32.gguf", tmp_path)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(SCRATCH) and "config.json" in contents(left)
    folder = converted(str(made.folder), "tiny-F32.gguf", tmp_path)
    assert AutoModelForCausalLM.from_pretrained(folder).config.model_type == "llama"
    assert contents(tmp_path) == {left.name, folder.name}  # it might be another run's


def test_what_a_killed_run_left_a_day_ago_is_removed(made: Made, tmp_path: Path) -> None:
    old, young = tmp_path / f"{SCRATCH}old", tmp_path / f"{SCRATCH}young"
    for folder in (old, young):
        folder.mkdir()
        (folder / "config.json").write_text("{}", encoding="utf-8")
    long_ago = time.time() - LEFT_OVER - 60
    os.utime(old, (long_ago, long_ago))
    folder = converted(str(made.folder), "tiny-F32.gguf", tmp_path)
    assert contents(tmp_path) == {young.name, folder.name}


# What is refused.


def test_a_file_that_is_not_there_is_answered_with_those_that_are(made: Made, tmp_path: Path) -> None:
    error = refusal(FileError, made.folder, "tiny-Q9.gguf", tmp_path)
    assert error.data == {"path": made.folder / "tiny-Q9.gguf"}
    assert str(error).endswith("there is tiny-F32.gguf, tiny-Q4_1.gguf, tiny-Q8_0.gguf")
    assert str(refusal(FileError, tmp_path, "x.gguf", tmp_path)).endswith("there is no GGUF file")


def test_a_path_to_the_file_itself_is_answered_with_the_two_settings(made: Made, tmp_path: Path) -> None:
    path = made.folder / "tiny-F32.gguf"
    error = refusal(ModelError, path, "tiny-F32.gguf", tmp_path)
    assert error.data == {"path": path}
    assert "`model_name_or_path=" in str(error)
    assert str(error).endswith("`gguf_file=tiny-F32.gguf`")


def test_a_file_of_another_format_is_refused(made: Made, tmp_path: Path) -> None:
    for content in (b"", b"GG", b"PK\x03\x04 and so on"):
        path = tmp_path / "x.gguf"
        path.write_bytes(content)
        error = refusal(FileError, tmp_path, "x.gguf", tmp_path / "cache")
        assert error.data == {"path": path}
        assert "is not a GGUF file" in str(error)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("kept", [4, 50, 9000, 60_000, -1], ids=["magic", "header", "tokens", "weights", "last byte"])
def test_a_file_that_was_cut_off_is_refused(made: Made, tmp_path: Path, kept: int) -> None:
    (tmp_path / "cut.gguf").write_bytes((made.folder / "tiny-F32.gguf").read_bytes()[:kept])
    error = refusal(ModelError, tmp_path, "cut.gguf", tmp_path / "cache")
    assert error.data == {"path": tmp_path / "cut.gguf"}
    assert "check that the file is whole" in str(error)
    assert contents(tmp_path / "cache") == set()


def test_a_file_of_an_architecture_that_transformers_does_not_read_is_refused(made: Made, tmp_path: Path) -> None:
    data = (made.folder / "tiny-F32.gguf").read_bytes()
    (tmp_path / "x.gguf").write_bytes(data.replace(b"llama", b"alpac"))
    error = refusal(ModelError, tmp_path, "x.gguf", tmp_path / "cache")
    assert "GGUF model with architecture alpac is not supported yet" in str(error)


def test_weights_of_other_shapes_than_the_header_says_are_named(made: Made, tmp_path: Path) -> None:
    lm = random_lm()
    lm.config.intermediate_size = 32
    path = write_gguf(tmp_path / "x.gguf", lm, made.tokenizer)
    error = refusal(ModelError, tmp_path, "x.gguf", tmp_path / "cache")
    assert error.data == {"path": path}
    assert str(error).count("mlp") == 6


def test_a_weight_that_is_no_number_is_named_and_nothing_is_kept(made: Made, tmp_path: Path) -> None:
    lm = random_lm()
    with torch.no_grad():
        lm.get_submodule("model.layers.1.mlp.up_proj").weight[2, 1] = float("nan")
    path = write_gguf(tmp_path / "broken.gguf", lm, made.tokenizer)
    error = refusal(NotFiniteError, tmp_path, path.name, tmp_path / "cache")
    assert error.data == {"parameter": "model.layers.1.mlp.up_proj.weight"}
    assert str(path) in str(error)
    assert list((tmp_path / "cache").iterdir()) == []


def test_one_part_of_several_is_refused(made: Made, tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "x-00001-of-00002.gguf", made.lm, made.tokenizer, leave_out=["model.norm.weight"],
        also=lambda writer: writer.add_uint16("split.count", 2),
    )  # fmt: skip
    error = refusal(FileError, tmp_path, path.name, tmp_path / "cache")
    assert error.data == {"path": path}
    assert "one of 2 parts" in str(error)


def test_a_file_that_cannot_be_read_is_told(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(our_gguf.hashlib, "file_digest", fail)
    error = refusal(FileError, made.folder, "tiny-F32.gguf", tmp_path)
    assert error.data == {"path": made.folder / "tiny-F32.gguf"}
    assert "Input/output error" in str(error)


def test_a_cache_that_cannot_be_written_is_told(made: Made, tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    error = refusal(FileError, made.folder, "tiny-F32.gguf", tmp_path / "taken" / "cache")
    assert error.data == {"path": tmp_path / "taken" / "cache"}
    assert "Not a directory" in str(error)
    assert "`cache_dir`" in str(error)


@pytest.mark.parametrize(
    ("limit", "what"), [(100, "config"), (2000, "tokenizer"), (60_000, "weights")], ids=lambda value: str(value)
)
def test_a_disk_that_is_full_is_told_and_nothing_is_left(made: Made, tmp_path: Path, limit: int, what: str) -> None:
    """A limit on the size of files, that some fit below and one does not, stands for the full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        error = refusal(FileError, made.folder, "tiny-F32.gguf", tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert error.data["path"].parent == tmp_path
    assert "`cache_dir`" in str(error)
    assert "File too large" in str(error)
    assert ("tokenizer" in str(error)) == (what == "tokenizer")
    assert contents(tmp_path) == set()


def test_the_hub_is_asked_for_what_is_no_folder_and_its_files_go_where_downloads_go(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def give(*arguments: object, **options: object) -> str:
        asked.append((arguments, options))
        return str(made.folder / "tiny-F32.gguf")

    monkeypatch.setattr(our_gguf, "cached_file", give)
    folder = converted("somebody/tiny-GGUF", "tiny-F32.gguf", tmp_path, downloads="downloads")
    assert folder.name.startswith("tiny-F32-")
    assert asked == [(("somebody/tiny-GGUF", "tiny-F32.gguf"), {"cache_dir": "downloads"})]

    def refuse(*arguments: object, **options: object) -> str:
        raise OSError("somebody/tiny-GGUF does not appear to have a file named x.gguf. Checkout the hub.")

    monkeypatch.setattr(our_gguf, "cached_file", refuse)
    error = refusal(FileError, "somebody/tiny-GGUF", "x.gguf", tmp_path)
    assert error.data == {"path": "x.gguf"}
    assert str(error).endswith("(somebody/tiny-GGUF does not appear to have a file named x.gguf)")


# Without the setting.


def test_a_folder_of_gguf_files_alone_is_answered_with_the_setting(made: Made, tmp_path: Path) -> None:
    for load in (load_config, load_tokenizer):
        with pytest.raises(ModelError) as error:
            load(str(made.folder))
        assert str(error.value).endswith("`gguf_file`: tiny-F32.gguf, tiny-Q4_1.gguf, tiny-Q8_0.gguf")
    with pytest.raises(ModelError) as error:
        load_config(str(tmp_path))
    assert "GGUF" not in str(error.value)


def test_gguf_files_beside_a_configuration_without_weights_are_pointed_to(made: Made, tmp_path: Path) -> None:
    made.lm.config.save_pretrained(tmp_path)
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ModelError, match="`model_name_or_path`: .* holds no weights") as error:
        load_prompt_model(str(tmp_path), load_config(str(tmp_path)), (300, 301))
    assert error.value.data == {"path": str(tmp_path)}
    assert str(error.value).endswith("`gguf_file`: model.gguf")


def test_a_path_to_a_file_is_answered_with_its_folder(made: Made) -> None:
    path = made.folder / "tiny-F32.gguf"
    with pytest.raises(ModelError) as error:
        load_config(str(path))
    assert error.value.data == {"path": str(path)}
    assert str(error.value).endswith("name the folder it is in, and `gguf_file=tiny-F32.gguf`")
