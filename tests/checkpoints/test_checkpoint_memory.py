"""Files made to exhaust memory or time, read in one child process with limits on both."""

import json
import struct
import subprocess
import sys
import zipfile

import torch

from .checkpoint_files import edit_zip, entry, torch_file
from .checkpoint_files import safetensors as raw

CHILD = """
import json, resource, sys, time
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
import torch
from sane_hf.checkpoints import CheckpointError, load_checkpoint
# what is mapped so far (torch's libraries alone are gigabytes of addresses), and 1 GiB
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (1 << 30),) * 2)
def status(field):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(field))
for path in json.load(sys.stdin):
    open("/proc/self/clear_refs", "w").write("5")  # forget the peak so far
    before = status("VmRSS")
    start = time.perf_counter()
    try:
        load_checkpoint(path, allow_pickle=True)
        code = "read"
    except CheckpointError as error:
        code = error.code
    print(json.dumps([path, code, status("VmHWM") - before, time.perf_counter() - start]))
"""


def many_tensors(count):
    text = ",".join(f'"t{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(count))
    return raw("{" + text + "}")


def test_no_file_costs_more_than_its_size_says(root, tmp_path):
    cases = {
        "a million empty tensors": (many_tensors(1_000_000), "E_TOO_MANY_TENSORS"),
        "many in a header below the limit": (many_tensors(300_000), "E_TOO_MANY_TENSORS"),
        "much metadata": (raw({"__metadata__": {"a": "x" * 60_000_000}}), "E_HEADER_SIZE"),
        "a long list of numbers": (raw('{"w":{"dtype":"U8","shape":[' + "9," * 9_000_000 + "9]}}"), "E_HEADER_JSON"),
        "a product of many sizes": (raw({"w": entry("U8", [2**63] * 500_000, 0, 0)}), "E_SHAPE"),
        "a header longer than all memory": (struct.pack("<Q", 2**62) + b"{}", "E_HEADER_SIZE"),
        "a header that is not there": (struct.pack("<Q", 24_000_000) + b"{}", "E_TRUNCATED"),
        "deep JSON": (raw("{" + '"a":{' * 4_000_000), "E_HEADER_JSON"),
    }
    expected = {}
    for i, (content, code) in enumerate(cases.values()):
        path = tmp_path / f"{i}.safetensors"
        path.write_bytes(content)
        expected[str(path)] = code
    source = torch_file(tmp_path / "zeros.pt", {"w": torch.zeros(8_000_000)})
    bomb = edit_zip(source, tmp_path / "bomb.pt", compression=zipfile.ZIP_DEFLATED)
    source.unlink()
    assert bomb.stat().st_size < 100_000
    wide = torch.zeros(1).expand(2**40)
    tiny = torch_file(tmp_path / "wide.pt", {"w": wide})
    many = torch_file(tmp_path / "many.pt", {f"w{i}": wide[: 2**25 + i] for i in range(50)})
    old = torch_file(tmp_path / "wide_legacy.pt", {"w": wide}, legacy=True)
    expected |= {str(bomb): "E_COMPRESSED", str(tiny): "E_EXPANDED", str(many): "E_EXPANDED", str(old): "E_EXPANDED"}
    result = subprocess.run(
        [sys.executable, "-c", CHILD],
        input=json.dumps(list(expected)),
        capture_output=True,
        text=True,
        timeout=300,
        cwd=root,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert {path: code for path, code, _, _ in rows} == expected
    for path, _, grown, seconds in rows:
        assert grown < 2 * (tmp_path / path).stat().st_size + (300 << 20), path
        assert seconds < 5, path
    print(*rows, sep="\n")
