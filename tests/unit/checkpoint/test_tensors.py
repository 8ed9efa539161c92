"""Our safetensors files are the library's, and two checkpoints are compared to the last bit."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import load_file, save

from model_foundry.checkpoint.compare import compare_checkpoints
from model_foundry.checkpoint.tensors import read_entries, read_metadata, read_tensors, write_tensors
from model_foundry.errors import CheckpointCorruptError, CheckpointError

DTYPES = [np.float64, np.float32, np.float16, np.int64, np.int32, np.int16, np.int8, np.uint8, np.uint32, np.bool_]
arrays = st.sampled_from(DTYPES).flatmap(lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, min_side=0)))


@pytest.mark.slow
@settings(deadline=None)
@given(tensors=st.dictionaries(st.text(min_size=1, max_size=8).filter(lambda n: n != "__metadata__"), arrays))
def test_files_hold_what_the_library_reads(
    tensors: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Prevents a writer of our own from making files that only we can read."""
    path = tmp_path_factory.mktemp("tensors") / "file.safetensors"
    tensors = {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in tensors.items()}
    try:
        write_tensors(path, tensors)
    except UnicodeEncodeError:  # a lone surrogate is no name for anyone
        return
    read = load_file(path)
    assert read.keys() == tensors.keys()
    for name, array in tensors.items():
        assert read[name].dtype == array.dtype
        assert read[name].shape == array.shape
        assert read[name].tobytes() == array.tobytes()


def test_bytes_equal_the_librarys(tmp_path: Path) -> None:
    tensors = {f"layer.{index}": np.arange(index).astype(dtype) for index, dtype in enumerate(DTYPES)}
    write_tensors(tmp_path / "a", tensors, metadata={"format": "pt"})
    assert (tmp_path / "a").read_bytes() == save(tensors, metadata={"format": "pt"})
    assert read_metadata(tmp_path / "a") == {"format": "pt"}
    assert read_tensors(tmp_path / "a", framework="numpy").keys() == tensors.keys()


def test_arrays_in_any_memory_order_are_written_in_row_order(tmp_path: Path) -> None:
    """Prevents a transposed view from being saved as the matrix that it views."""
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    write_tensors(tmp_path / "a", {"t": array.T, "big": array.astype(">f4"), "scalar": np.float32(3).reshape(())})
    read = load_file(tmp_path / "a")
    assert np.array_equal(read["t"], array.T)
    assert np.array_equal(read["big"], array)
    assert read["scalar"].shape == ()


def test_a_dtype_without_a_name_and_a_file_that_exists_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="'c' has dtype complex64"):
        write_tensors(tmp_path / "a", {"c": np.zeros(2, dtype=np.complex64)})
    assert not (tmp_path / "a").exists()
    write_tensors(tmp_path / "a", {})
    with pytest.raises(FileExistsError):
        write_tensors(tmp_path / "a", {})


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"short",
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 9) + b'{"a": 1}}',
        struct.pack("<Q", 8) + b'{"a": 1}',
    ],
)
def test_a_file_that_is_none_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    for read in (read_entries, lambda path: read_tensors(path, framework="numpy")):
        with pytest.raises(CheckpointCorruptError, match=r"bad\.safetensors"):
            read(path)


class TestCompare:
    @pytest.fixture
    def pair(self, tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
        def make(*sides: dict[str, np.ndarray]) -> tuple[Path, Path]:
            for name, tensors in zip("ab", sides, strict=True):
                (tmp_path / name / "state").mkdir(parents=True)
                write_tensors(tmp_path / name / "state" / "o.safetensors", tensors)
                (tmp_path / name / "manifest.json").write_text(name)  # has the clock in it, and is not compared
            return tmp_path / "a", tmp_path / "b"

        return make

    def test_equal_bits_are_equal_even_as_nan(self, pair: Callable[..., tuple[Path, Path]]) -> None:
        tensors = {"w": np.array([1.0, np.nan], dtype=np.float32)}
        assert compare_checkpoints(*pair(tensors, tensors)) == []

    def test_the_first_tensor_and_element_that_differ_are_named(self, pair: Callable[..., tuple[Path, Path]]) -> None:
        """Prevents "differs" without a place, which helps nobody to find the cause."""
        ours = {"a": np.zeros(3, dtype=np.int8), "w": np.zeros((4, 5), dtype=np.float32)}
        theirs = {"a": np.zeros(3, dtype=np.int8), "w": np.zeros((4, 5), dtype=np.float32)}
        theirs["w"][2, 3] = -0.0  # equal as a number, not as bits
        theirs["w"][3, 0] = 1.5
        (difference,) = compare_checkpoints(*pair(ours, theirs))
        assert difference == "state/o.safetensors: tensor w element [2, 3] is 0.0 and -0.0 (2 of 20 differ)"

    def test_other_names_shapes_and_files_are_named(self, pair: Callable[..., tuple[Path, Path]]) -> None:
        a, b = pair({"w": np.zeros(2, dtype=np.float32)}, {"w": np.zeros((2, 1), dtype=np.float32)})
        assert compare_checkpoints(a, b) == ["state/o.safetensors: tensor w is F32[2] and F32[2, 1]"]
        (a / "state" / "only.json").write_text("{}")
        (a / "state" / "both.json").write_text("abc")
        (b / "state" / "both.json").write_text("abcd")
        shapes = "state/o.safetensors: tensor w is F32[2] and F32[2, 1]"
        assert compare_checkpoints(a, b) == ["state/both.json: 3 and 4 bytes", shapes, f"state/only.json: only in {a}"]
        assert compare_checkpoints(b, a)[2] == f"state/only.json: only in {a}"
        (b / "state" / "both.json").write_text("aXc")
        assert compare_checkpoints(a, b)[0] == "state/both.json: byte 1 is 0x62 and 0x58"

    def test_bfloat16_and_scalars_are_shown_as_numbers(self, pair: Callable[..., tuple[Path, Path]]) -> None:
        a, b = pair({"s": np.array(3, dtype=np.uint16)}, {"s": np.array(4, dtype=np.uint16)})
        assert compare_checkpoints(a, b) == ["state/o.safetensors: tensor s element [] is 3 and 4 (1 of 1 differ)"]
        for folder in (a, b):  # numpy has no bfloat16: the same bits under its name, header padded as before
            path = folder / "state" / "o.safetensors"
            path.write_bytes(path.read_bytes().replace(b'"U16","shape":[]', b'"BF16","shape":[]').replace(b" ", b"", 1))
        (difference,) = compare_checkpoints(a, b)
        assert "e-" in difference

    def test_a_folder_that_is_no_checkpoint_is_an_error_not_equality(self, tmp_path: Path) -> None:
        """Prevents two empty folders, or a typing error, from counting as proof."""
        with pytest.raises(CheckpointError, match="no adapter, model or state"):
            compare_checkpoints(tmp_path, tmp_path)
