"""The strict check of safetensors headers, on files that each have one fault."""

import json
import struct

import pytest
import safetensors.torch
import torch

from sane_hf.checkpoints import CheckpointError, HeaderLimits, from_bytes, load_checkpoint, read_header, to_bytes

from .checkpoint_files import LFS_POINTER, WEB_PAGE, entry
from .checkpoint_files import safetensors as raw

GOOD = safetensors.torch.save({"a": torch.arange(4, dtype=torch.uint8)})
F32 = {"w": entry("F32", [2], 0, 8)}


def refused(content: bytes, code: str, tmp_path=None) -> CheckpointError:
    """Refused as bytes and as a file, with the same code and one line of text."""
    with pytest.raises(CheckpointError) as in_memory:
        from_bytes(content, name="row 7")
    assert in_memory.value.code == code
    assert str(in_memory.value).startswith("row 7: ")
    assert str(in_memory.value).isprintable()
    if tmp_path is not None:
        path = tmp_path / "model.safetensors"
        path.write_bytes(content)
        with pytest.raises(CheckpointError) as on_disk:
            load_checkpoint(path)
        assert on_disk.value.code == code
        assert str(on_disk.value).startswith(str(path))
    return in_memory.value


@pytest.mark.parametrize("size", [0, 1, 7])
def test_files_without_even_a_length_are_empty(size, tmp_path):
    assert f"{size} bytes" in str(refused(b"\x90\0\0\0\0\0\0"[:size], "E_EMPTY", tmp_path))


def test_a_cut_at_every_byte_is_told(tmp_path):
    content = to_bytes({"first": torch.zeros(6), "second": torch.zeros(5)})
    header = struct.unpack("<Q", content[:8])[0]
    for cut in range(len(content)):
        error = refused(content[:cut], "E_EMPTY" if cut < 8 else "E_TRUNCATED", tmp_path if cut % 20 == 0 else None)
        if 8 <= cut < 8 + header:
            assert f"{cut} bytes" in error.found
            assert f"{8 + header} bytes" in error.expected
        elif cut >= 8 + header:  # the first tensor that is not whole, and what is missing
            assert error.tensor == ("first" if cut < 8 + header + 24 else "second")
            assert f"{len(content) - cut} bytes" in error.found


@pytest.mark.parametrize("trailer", [b"\0", b"PK\x03\x04" + bytes(40)])
def test_trailing_bytes_are_refused(trailer, tmp_path):
    error = refused(GOOD + trailer, "E_TRAILING", tmp_path)
    assert f"{len(trailer)} bytes" in error.found


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 100_000_001, 30_000_000])
@pytest.mark.parametrize("rest", [b"", b'{"w":'])
def test_absurd_header_lengths_are_refused(length, rest, tmp_path):
    assert str(length) in refused(struct.pack("<Q", length) + rest, "E_HEADER_SIZE", tmp_path).found


def test_the_number_of_tensors_is_limited_before_parsing(tmp_path):
    many = {f"t{i}": entry("U8", [0], 0, 0) for i in range(101)}
    path = tmp_path / "many.safetensors"
    path.write_bytes(raw(many))
    with pytest.raises(CheckpointError, match="E_TOO_MANY_TENSORS"):
        load_checkpoint(path, limits=HeaderLimits(tensors=100))
    assert len(load_checkpoint(path)) == 101


@pytest.mark.parametrize(
    ("header", "byte"),
    [
        (b"\xff\xfe{}", 8),
        (b'{"w\xff": 1}', 11),
        (b"not json", 8),
        (b' {"w": 1}', 8),
        (b'{"w": }', 14),
        (b'{"w": 1', None),
        (b"[]", 8),
        (b'{"w": NaN}', None),
        (b"[" * 1000, 8),
        (b'{"a":' + b"[" * 100_000, None),
        (b'{"w": ' + b"1" * 5000 + b"}", None),
        (b'{"w": "\\ud800"}', None),
        (b'{"\\ud800": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}', None),
        (b'{"w": {"dtype": "U8", "shape": [-0], "data_offsets": [0, 0]}}', None),
        (b'{"w": {"dtype": "U8", "shape": [0.0], "data_offsets": [0, 0]}}', None),
        (b'{"w": {"dtype": "U8", "shape": [true], "data_offsets": [0, 1]}}', None),
        (b'{"w": {"dtype": "U8", "shape": 1, "data_offsets": [0, 1]}}', None),
        (b'{"w": {"dtype": 7, "shape": [], "data_offsets": [0, 1]}}', None),
        (b'{"w": {"dtype": "U8", "shape": [1], "data_offsets": [0]}}', None),
        (b'{"w": {"dtype": "U8", "shape": [1]}}', None),
        (b'{"w": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1], "more": 1}}', None),
        (b'{"w": null}', None),
        (b'{"__metadata__": {"a": 1}}', None),
        (b'{"__metadata__": []}', None),
    ],
)
def test_malformed_json_is_refused_with_its_place(header, byte, tmp_path):
    error = refused(raw(header, b"\0"), "E_HEADER_JSON", tmp_path)
    if byte is not None:
        assert f"at byte {byte}" in error.found


def test_padding_with_nul_names_the_known_fault():
    assert "known fault" in refused(raw(json.dumps(F32).encode() + b"\0\0", bytes(8)), "E_HEADER_JSON").found
    assert from_bytes(raw(json.dumps(F32).encode() + b"  ", bytes(8)))["w"].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ('{"w":{"dtype":"U8","shape":[8],"data_offsets":[0,8]},"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',"w"),
        ('{"__metadata__":{"a":"1","a":"2"},"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', "a"),
        ('{"w":{"dtype":"U8","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', "dtype"),
    ],
)  # fmt: skip
def test_names_given_twice_are_refused_with_both_entries(text, name, tmp_path):
    error = refused(raw(text, bytes(8)), "E_DUPLICATE_KEY", tmp_path)
    assert error.tensor == name
    if name == "w":  # the library takes the last without a word
        assert "U8" in error.found
        assert "F32" in error.found


@pytest.mark.parametrize(
    ("header", "tensor"),
    [
        ({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 2, 6)}, "b"),
        ({"a": entry("U8", [4], 0, 4), "b": entry("U8", [2], 6, 8)}, "b"),
        ({"a": entry("U8", [4], 4, 8)}, "a"),
        ({"a": entry("U8", [4], 8, 4)}, "a"),
        ({"a": entry("U8", [4], -4, 0), "b": entry("U8", [4], 0, 4)}, "a"),
        ({"a": entry("U8", [1], 0, 2**64)}, "a"),
    ],
)
def test_overlaps_holes_and_reversed_offsets_are_refused(header, tensor, tmp_path):
    assert refused(raw(header, bytes(8)), "E_OFFSETS", tmp_path).tensor == tensor


@pytest.mark.parametrize(
    ("dtype", "shape", "end"),
    [
        ("F32", [3], 8),
        ("F32", [], 8),
        ("F32", [-1, -2], 8),
        ("U8", [2**32, 2**32], 8),
        ("F64", [2**61], 8),
        ("U8", [2**64], 8),
        ("F4", [3], 1),
        ("F4", [2, 3], 3),
        ("F4", [], 1),
        # empty tensors whose strides would overflow, and ranks that torch cannot hold
        ("F32", [0, 2**62, 2**62], 0),
        ("F32", [2**41, 0], 0),
        ("F32", [0, 2**40, 2**40], 0),
        ("F32", [1] * 33, 4),
        ("F32", [1] * 1000, 4),
    ],
)
def test_shapes_that_are_not_the_stored_bytes_are_refused(dtype, shape, end, tmp_path):
    assert refused(raw({"w": entry(dtype, shape, 0, end)}, bytes(end)), "E_SHAPE", tmp_path).tensor == "w"


def test_empty_and_scalar_tensors_are_read_and_written_back(tmp_path):
    path = tmp_path / "model.safetensors"
    header = {"none": entry("F32", [0, 3], 0, 0), "one": entry("F32", [], 0, 4), "wide": entry("I8", [0, 2**40], 4, 4)}
    path.write_bytes(raw(header, struct.pack("<f", 2.5)))
    for tensors in (load_checkpoint(path), from_bytes(to_bytes(load_checkpoint(path)))):
        assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
            "none": (0, 3),
            "one": (),
            "wide": (0, 2**40),
        }
        assert tensors["one"].item() == 2.5
        assert tensors["wide"].dtype == torch.int8


@pytest.mark.parametrize("header", [{}, {"__metadata__": {"a": "b"}}])
def test_a_checkpoint_without_tensors_warns_alone_and_is_refused_in_a_zoo(header, tmp_path, caplog):
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw(header))
    assert load_checkpoint(path) == {}
    assert "no tensors" in caplog.text
    with pytest.raises(CheckpointError, match="E_NO_TENSORS"):
        from_bytes(raw(header))
    with pytest.raises(CheckpointError, match="E_NO_TENSORS"):
        to_bytes({})


@pytest.mark.parametrize("dtype", ["F6_E2M3", "F6_E3M2", "Q8", "float32", ""])
def test_unknown_dtypes_are_refused_by_name(dtype, tmp_path):
    error = refused(raw({"w": entry(dtype, [4], 0, 3)}, bytes(3)), "E_DTYPE", tmp_path)
    assert error.tensor == "w"
    assert repr(dtype) in error.found


def test_hostile_names_are_read_but_never_printed_raw(tmp_path):
    names = ["../../etc/passwd", "a\0b", "", "\u202egnp.exe", "<img onerror=alert(1)>", "line\nbreak", "x" * 4096]
    content = to_bytes({name: torch.tensor(float(i)) for i, name in enumerate(names)})
    assert {name: int(value) for name, value in from_bytes(content).items()} == {n: i for i, n in enumerate(names)}
    for name in names:
        text = str(CheckpointError("E_TEST", "a\nb", name, "x", "y", "z"))
        assert text.isprintable()
        assert len(text) < 300
    assert refused(raw({"x" * 4097: entry("U8", [1], 0, 1)}, b"\0"), "E_NAME", tmp_path).tensor == "x" * 4097
    assert refused(raw({"é" * 2049: entry("U8", [1], 0, 1)}, b"\0"), "E_NAME").code == "E_NAME"


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        (WEB_PAGE, "E_NOT_A_CHECKPOINT", "web page"),
        (b"\n  <html lang=en>" + bytes(20), "E_NOT_A_CHECKPOINT", "web page"),
        (b'{"error": "Repository not found"}', "E_NOT_A_CHECKPOINT", "JSON"),
        (b"Entry not found", "E_NOT_A_CHECKPOINT", "text"),
        (b"\x91\xa7\xff\x01\x99\xf3\xe2\x45\x12" * 9, "E_NOT_A_CHECKPOINT", "no format"),
        (LFS_POINTER, "E_LFS_POINTER", "44700000"),
        (b"\x89HDF\r\n\x1a\n" + bytes(20), "E_FORMAT", "HDF5"),
        (b"\x1f\x8b\x08" + bytes(20), "E_FORMAT", "gzip"),
    ],
)
def test_what_is_no_checkpoint_is_called_by_its_name(content, code, words):
    error = refused(content, code)
    assert words in str(error)


def test_the_pointer_error_names_object_and_size():
    error = refused(LFS_POINTER, "E_LFS_POINTER")
    assert "sha256:a1a1" in error.found
    assert "git lfs pull" in error.fix


def test_the_header_gives_shapes_dtypes_and_offsets(tmp_path):
    path = tmp_path / "any.name"
    path.write_bytes(raw({"__metadata__": {"a": "b"}, "w": entry("F4", [2, 4], 0, 4)}, bytes(4)))
    header = read_header(path)
    assert dict(header.metadata) == {"a": "b"}
    assert header.tensors["w"].shape == (2, 4)
    assert header.tensors["w"].packed_shape == (2, 2)
    assert header.data_bytes == 4
    assert header.data_start == path.stat().st_size - 4


@pytest.mark.parametrize(
    "names",
    [
        {"fc.qweight": "I32", "fc.qzeros": "I32", "fc.scales": "F16", "fc.g_idx": "I32"},
        {"qweight": "U8", "scales": "F32", "zeros": "F32"},
        {"fc.weight": "I8", "fc.weight_scale": "F32"},
        {"fc.weight": "F8_E4M3", "fc.weight_scale_inv": "F32"},
        {"fc.weight": "U8", "fc.weight.absmax": "F32", "fc.weight.quant_map": "F32"},
        {"fc.weight": "I8", "fc.SCB": "F32"},
        {"mlp.experts_blocks": "U8", "mlp.experts_scales": "U8"},
    ],
)
def test_codes_of_quantisers_are_refused(names, tmp_path):
    header, end = {}, 0
    for name, dtype in names.items():
        size = {"8": 1, "2": 4, "6": 2, "3": 1}[dtype[-1]]
        header[name] = entry(dtype, [1], end, end + size)
        end += size
    assert "dequantise" in refused(raw(header, bytes(end)), "E_QUANTISED", tmp_path).fix


def test_names_like_those_of_quantisers_do_no_harm_on_floats_and_counters():
    tensors = {"fc.weight": torch.zeros(2), "fc.scales": torch.ones(2), "bn.num_batches_tracked": torch.tensor(3)}
    assert list(from_bytes(to_bytes(tensors))) == ["fc.weight", "fc.scales", "bn.num_batches_tracked"]
