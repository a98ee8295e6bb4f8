"""Checks claims on a node with real NVIDIA GPUs; to be run as an ordinary user with an account.

    python3 bench/gpu_check.py /usr/local/bin/beaker

Shows that one GPU means one, none means none, that CUDA runs in the user namespace, and that a claim is free again
after its program was killed. Needs a CDI specification (`nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml`) and
nothing in the image: the driver's libraries come with the claim.
"""

from __future__ import annotations

import json
import subprocess
import sys

# The driver API through ctypes: allocates on the device, writes, and reads back.
CUDA = """
import ctypes
cuda = ctypes.CDLL("libcuda.so.1")
device, context, memory = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
for call in (
    lambda: cuda.cuInit(0),
    lambda: cuda.cuDeviceGet(ctypes.byref(device), 0),
    lambda: cuda.cuCtxCreate_v2(ctypes.byref(context), 0, device),
    lambda: cuda.cuMemAlloc_v2(ctypes.byref(memory), 1 << 20),
    lambda: cuda.cuMemsetD32_v2(memory, 42, 1 << 18),
):
    assert call() == 0, call
back = (ctypes.c_uint32 * 4)()
assert cuda.cuMemcpyDtoH_v2(back, memory, 16) == 0
print("cuda", list(back))
"""


def main(beaker: str) -> int:
    def session(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run([beaker, "session", *words], capture_output=True, text=True, timeout=300)

    def free() -> int:
        done = subprocess.run([beaker, "node", "list", "--format", "json"], capture_output=True, text=True, check=True)
        return sum(node.get("free", {}).get("gpuCount", 0) for node in json.loads(done.stdout))

    failures = 0

    def expect(what: str, true: bool, seen: object) -> None:
        nonlocal failures
        failures += not true
        print(f"{'ok  ' if true else 'FAIL'} {what}: {seen}")

    one = session("create", "--gpus", "1", "--", "nvidia-smi", "-L")
    expect("--gpus 1 lists one GPU", one.stdout.count("GPU ") == 1, one.stdout.strip() or one.stderr)
    none = session("create", "--gpus", "0", "--", "sh", "-c", "ls /dev | grep -c ^nvidia")
    expect("--gpus 0 has no device", none.stdout.strip() == "0", none.stdout.strip() or none.stderr)
    ran = session("create", "--gpus", "1", "--", "python3", "-c", CUDA)
    expect("CUDA runs", "cuda [42, 42, 42, 42]" in ran.stdout, ran.stdout.strip() or ran.stderr)
    before = free()
    killed = session("create", "--gpus", "1", "--", "sh", "-c", "kill -9 $$")
    again = session("create", "--gpus", "1", "--", "nvidia-smi", "-L")
    expect("a claim is free after kill -9", again.stdout.count("GPU ") == 1, f"exit {killed.returncode}, {before} free")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else "beaker"))
