"""Random and mutated files: nothing but `CheckpointError`, and whatever is accepted the library reads the same.

A moderate number of examples runs with the fast tests, thousands with the slow ones.
"""

import json
import struct
import zipfile

import pytest
import safetensors
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sane_hf.checkpoints import CheckpointError, from_bytes, load_checkpoint, read_header, to_bytes
from sane_hf.checkpoints.header import DTYPE_BITS
from sane_hf.checkpoints.views import TORCH_DTYPES

from .checkpoint_files import edit_zip, small_network, torch_file
from .checkpoint_files import safetensors as raw
from .test_checkpoint_reading import same

FAST = settings(
    max_examples=150, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
SLOW = settings(FAST, max_examples=4000, derandomize=False)

BITS = {**DTYPE_BITS, "F6_E2M3": 6, "F6_E3M2": 6}
sizes = st.integers(0, 5) | st.sampled_from([-1, 2**31, 2**40, 2**62, 2**63, 2**64, 2**70])
mostly_small = st.lists(st.integers(0, 4), max_size=4) | st.lists(sizes, max_size=5)
names = st.text(max_size=6) | st.sampled_from(["w", "b", "a.weight", "__metadata__", "\ud800", "é" * 3])


@st.composite
def headers(draw):
    """Headers that are right more often than not, so that every check is reached."""
    tensors, end = {}, 0
    for name in draw(st.lists(names, max_size=4, unique=True)):
        dtype, shape = draw(st.sampled_from(list(BITS))), draw(mostly_small)
        count = 1
        for size in shape:
            count *= size
        length = (count * BITS[dtype] + 7) // 8
        begin = end + draw(st.sampled_from([0] * 12 + [1, -1]))
        end = begin + (length if 0 <= length < 4096 else 0) + draw(st.sampled_from([0] * 12 + [1, -1, 4]))
        tensors[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    items = draw(st.permutations(list(tensors.items())))
    header = dict(items)
    if draw(st.integers(0, 3)) == 0:
        header["__metadata__"] = draw(
            st.dictionaries(st.text(max_size=3), st.text(max_size=3) | st.none(), max_size=2)
        )
    text = json.dumps(header, ensure_ascii=draw(st.booleans()))
    if draw(st.integers(0, 5)) == 0:  # a name twice
        text = text[:-1] + (", " if header else "") + text[1:]
    padding = draw(st.sampled_from(["", "", " ", "    ", "\n", "\0", "x"]))
    trailing = draw(st.sampled_from([0] * 8 + [1, -1]))
    body = (text + padding).encode("utf-8", "surrogatepass")
    data = draw(st.binary(min_size=max(end + trailing, 0), max_size=max(end + trailing, 0))) if end < 9000 else b""
    return raw(body, data)


@st.composite
def mutations(draw, whole: bytes):
    """Some bytes with one to three changed, inserted or cut out."""
    content = bytearray(whole)
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        at = draw(st.integers(0, len(content)))
        kind = draw(st.integers(0, 4))
        if kind < 3:
            content[at : at + kind % 2] = bytes(
                [draw(st.integers(0, 255) | st.sampled_from(b'0123456789abw- {}[]",'))]
            )
        elif kind == 3:
            content[at:at] = draw(st.sampled_from([b"-0", b"\\ud800", b"1e5", b"\\u0000", b"NaN", b"{}", b'"x":1,']))
        else:
            del content[at : at + draw(st.integers(1, 30))]
    return bytes(content)


def library_reads(content: bytes) -> dict[str, tuple]:
    return {name: (t["dtype"], t["shape"], bytes(t["data"])) for name, t in safetensors.deserialize(content)}


def check_message(error: CheckpointError) -> None:
    assert str(error).isprintable()
    assert "weights_only=False" not in str(error)


def check(content: bytes, path) -> bool:
    """The oracle; true if the file was accepted."""
    try:
        tensors = from_bytes(content, allow_nonfinite=True)
    except CheckpointError as error:
        check_message(error)
        if error.code in ("E_QUANTISED", "E_NO_TENSORS"):
            library_reads(content)
        else:
            with pytest.raises(CheckpointError):
                read_header(content)
        return False
    header = read_header(content)
    expected = library_reads(content)
    assert header.tensors.keys() == expected.keys()
    assert len(tensors) == len(expected)
    for name, info in header.tensors.items():
        dtype, shape, data = expected[name]
        assert (info.dtype, list(info.shape)) == (dtype, list(shape))
        assert content[header.data_start + info.start : header.data_start + info.end] == data
        if name in tensors:  # else a prefix was stripped
            tensor = tensors[name]
            assert tensor.dtype == TORCH_DTYPES[dtype]
            assert tuple(tensor.shape) == info.packed_shape
            if data and dtype != "BOOL":
                assert bytes(tensor.reshape(-1).view(torch.uint8).tolist()) == data
    path.write_bytes(content)
    on_disk = load_checkpoint(path, allow_nonfinite=True)
    assert same(on_disk, tensors)
    assert list(on_disk) == list(tensors)
    again = from_bytes(to_bytes(tensors), allow_nonfinite=True)
    assert same(again, tensors)
    return True


def fuzz_headers(path):
    @given(headers())
    def run(content):
        counts[check(content, path)] += 1

    counts = {True: 0, False: 0}
    return run, counts


def fuzz_mutations(path):
    good = to_bytes({"a.w": torch.ones(2, 3), "b": torch.tensor(1), "c": torch.ones(4).bfloat16()}, {"k": "v"})

    length = struct.unpack("<Q", good[:8])[0]
    # mutated headers get a length that fits, or little else would be tested
    headers = mutations(good[8 : 8 + length]).map(lambda header: raw(header, good[8 + length :]))

    @given(headers | mutations(good))
    def run(content):
        counts[check(content, path)] += 1

    counts = {True: 0, False: 0}
    return run, counts


@pytest.mark.parametrize("fuzz", [fuzz_headers, fuzz_mutations])
def test_whatever_is_accepted_the_library_reads_the_same(fuzz, tmp_path):
    run, counts = fuzz(tmp_path / "model.safetensors")
    FAST(run)()
    assert counts[True]
    assert counts[False]


@pytest.mark.slow
@pytest.mark.parametrize("fuzz", [fuzz_headers, fuzz_mutations])
def test_whatever_is_accepted_the_library_reads_the_same_at_length(fuzz, tmp_path):
    run, counts = fuzz(tmp_path / "model.safetensors")
    SLOW(run)()
    assert counts[True] > 20
    assert counts[False] > 1000


@st.composite
def state_dicts(draw):
    result = {}
    for name in draw(
        st.lists(st.text(max_size=5).filter(lambda n: n.isprintable()), min_size=1, max_size=4, unique=True)
    ):
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        dtype = draw(
            st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool])
        )
        result[name] = torch.randn(shape).mul(3).to(dtype)
    if draw(st.booleans()):
        result["tied"] = next(iter(result.values()))
    return result


def round_trip(path):
    @given(state_dicts())
    def run(state_dict):
        try:
            content = to_bytes(state_dict)
        except CheckpointError as error:
            check_message(error)  # hypothesis does find names of quantisers' codes
            return
        assert same(from_bytes(content), state_dict)
        assert list(from_bytes(content)) == list(state_dict)
        assert to_bytes(from_bytes(content)) == content
        library_reads(content)

    return run


def test_every_state_dict_comes_back_bit_for_bit(tmp_path):
    FAST(round_trip(tmp_path))()


@pytest.mark.slow
def test_every_state_dict_comes_back_bit_for_bit_at_length(tmp_path):
    SLOW(round_trip(tmp_path))()


def fuzz_pickles(tmp_path, refreshed_sums: bool):
    """Change bytes of a PyTorch file; with fresh checksums the damage reaches the scan and torch."""
    source = torch_file(tmp_path / "good.pt", {"epoch": 1, "model": small_network()})
    with zipfile.ZipFile(source) as archive:
        main = archive.read("good/data.pkl")
    whole = source.read_bytes()
    path = tmp_path / "model.pt"

    @given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4))
    def run(changes):
        content = bytearray(main if refreshed_sums else whole)
        for at, value in changes:
            content[at % len(content)] = value
        if refreshed_sums:
            edit_zip(source, path, lambda name, data: bytes(content) if name.endswith("data.pkl") else data)
        else:
            path.write_bytes(content)
        try:
            loaded = load_checkpoint(path, allow_pickle=True, allow_nonfinite=True)
            assert all(isinstance(tensor, torch.Tensor) for tensor in loaded.values())
        except CheckpointError as error:
            check_message(error)

    return run


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("refreshed_sums", [False, True])
def test_damaged_pickles_raise_nothing_else(refreshed_sums, tmp_path):
    FAST(fuzz_pickles(tmp_path, refreshed_sums))()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("refreshed_sums", [False, True])
def test_damaged_pickles_raise_nothing_else_at_length(refreshed_sums, tmp_path):
    SLOW(fuzz_pickles(tmp_path, refreshed_sums))()


def fuzz_legacy(tmp_path):
    whole = torch_file(tmp_path / "good.pt", small_network(), legacy=True).read_bytes()
    path = tmp_path / "model.pt"

    @given(st.lists(st.tuples(st.integers(19, 10**6), st.integers(0, 255)), min_size=1, max_size=4))
    def run(changes):
        content = bytearray(whole)
        for at, value in changes:
            content[19 + at % (len(content) - 19)] = value
        path.write_bytes(content)
        try:
            load_checkpoint(path, allow_pickle=True, allow_nonfinite=True)
        except CheckpointError as error:
            check_message(error)

    return run


@pytest.mark.filterwarnings("ignore")
def test_damaged_legacy_files_raise_nothing_else(tmp_path):
    FAST(fuzz_legacy(tmp_path))()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_damaged_legacy_files_raise_nothing_else_at_length(tmp_path):
    SLOW(fuzz_legacy(tmp_path))()


def fuzz_indexes(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(to_bytes(small_network()))
    weight_map = dict.fromkeys(small_network(), "a.safetensors")
    good = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}).encode()
    values = st.recursive(
        st.none() | st.text(max_size=3) | st.integers(), lambda s: st.lists(s, max_size=2), max_leaves=3
    )
    maps = st.dictionaries(st.sampled_from([*small_network(), "x"]), st.text(max_size=8) | values, max_size=3)

    @given(mutations(good) | maps.map(lambda m: json.dumps({"weight_map": m}).encode()))
    def run(content):
        (tmp_path / "model.safetensors.index.json").write_bytes(content)
        try:
            assert same(load_checkpoint(tmp_path), small_network())
        except CheckpointError as error:
            check_message(error)

    return run


def test_damaged_indexes_raise_nothing_else(tmp_path):
    FAST(fuzz_indexes(tmp_path))()


@pytest.mark.slow
def test_damaged_indexes_raise_nothing_else_at_length(tmp_path):
    SLOW(fuzz_indexes(tmp_path))()
