"""The header against the package gguf: what it writes, and what its own reader says of files."""

import struct

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import quantize

from jaxscape.models.gguf_header import read_header
from jaxscape.models.sources import cache_folder

VALUES = {
    "uint8": 7, "int8": -7, "uint16": 60_000, "int16": -30_000, "uint32": 4_000_000_000, "int32": -2_000_000_000,
    "uint64": 2**63, "int64": -(2**62), "float32": 0.1, "float64": 0.1, "bool": True, "string": "naïve ▁ text",
}  # fmt: skip


def write(path, order=None):
    writer = GGUFWriter(path, "llama")
    for kind, value in VALUES.items():
        getattr(writer, f"add_{kind}")(f"a.{kind}", value)
    writer.add_array("an.array.of.texts", ["a", "", "▁b" * 50])
    writer.add_array("an.array.of.numbers", [1, 2, -3])
    writer.add_array("an.array.of.floats", [0.5, 1.5])
    rng = np.random.default_rng(0)
    writer.add_tensor("plain", rng.normal(size=(3, 5)).astype(np.float32))
    for kind in (GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q8_0):
        packed = quantize(rng.normal(size=(4, 64)).astype(np.float32), kind)
        writer.add_tensor(kind.name, packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def as_the_package_says(path) -> None:
    reader, header = GGUFReader(path), read_header(path)
    own = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert {name: field.value for name, field in header.fields.items()} == own
    assert list(header.tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        found = header.tensors[tensor.name]
        assert found.kind == tensor.tensor_type and found.shape == tuple(tensor.shape)
        assert (found.offset, found.size) == (tensor.data_offset, tensor.n_bytes)


def test_every_kind_of_value_and_tensor(tmp_path):
    path = write(tmp_path / "a.gguf")
    as_the_package_says(path)
    fields = read_header(path).fields
    for kind, value in VALUES.items():
        expected = float(np.float32(value)) if kind == "float32" else value
        assert fields[f"a.{kind}"] == (expected, "float32" if kind == "float32" else "other")
    assert fields["an.array.of.texts"] == (["a", "", "▁b" * 50], "array")


def test_a_model_as_converters_write_it(write_gguf, tmp_path):
    as_the_package_says(write_gguf(tmp_path / "tiny.gguf", quantization="Q8_0"))


@pytest.mark.parametrize("kept", [3, 20, 200, 500, -40])
def test_truncated_file_is_refused(kept, tmp_path):
    path = write(tmp_path / "a.gguf")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match="it ends"):
        read_header(path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"<html>" + bytes(40), "does not begin"),
        (b"GGUF\x00\x00\x00\x03" + bytes(40), "other byte order"),
        (b"GGUF\x01\x00\x00\x00" + bytes(40), "version 1"),
        (struct.pack("<4sIQQQcI", b"GGUF", 3, 0, 1, 1, b"k", 99) + bytes(40), "type 99"),
    ],
)
def test_other_files_are_refused(data, message, tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_header(path)


def test_packaged_model():
    path = cache_folder() / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not path.is_file():
        pytest.skip("the packaged model is not in the cache")
    as_the_package_says(path)
