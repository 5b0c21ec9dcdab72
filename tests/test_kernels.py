"""The CUDA kernels and their launchers, run on the CPU by emulator.h, pass every test that the CPU's ops pass."""
import os
import platform
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths, library_paths

from csrc import ops

ROOT = Path(__file__).resolve().parent.parent
HEADERS = {"cuda_runtime_api.h": "", "cuda_bf16.h": "", "cuda_fp16.h": "",
           **{f"c10/cuda/{name}.h": "#define TORCH_EXTENSION\n" for name in
              ("CUDAException", "CUDAGuard", "CUDAStream")}}
LAUNCH = re.compile(r"(\w+(?:<[^<>;()]*>)?)<<<(.*?), 0, stream>>>\(([^;]*)\);", re.S)
SANITIZERS = "alignment,bounds,float-cast-overflow,integer-divide-by-zero,null,shift,signed-integer-overflow"


def emulated(path):
    """A source for a C++ compiler: launches are calls, and what is for CUDA tensors takes the CPU's."""
    text, count = LAUNCH.subn(r"emulator::launch(\2, [=] { \1(\3); });", path.read_text())
    assert count == text.count("emulator::launch") and "<<<" not in text
    return text.replace("(t2i, CPU, m)", "(t2i, XLA, m)").replace("(t2i, CUDA, m)", "(t2i, CPU, m)")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A folder where csrc/ops.py finds the kernels in place of the CPU's own ops."""
    folder = tmp_path_factory.mktemp("emulated")
    for name, first in HEADERS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f'{first}#include "{ROOT / "tests/emulator.h"}"\n')
    compiler, fma = os.environ.get("CXX", "c++"), ["-mfma"] * (platform.machine() == "x86_64")
    flags = ["-std=c++20", "-O1", "-fPIC", "-ffp-contract=off", *fma, "-w", f"-I{folder}", f"-fsanitize={SANITIZERS}",
             "-fno-sanitize-recover=all", *(f"-isystem{path}" for path in include_paths("cpu"))]
    objects, jobs = [], []
    for path in ops.sources():
        (folder / path.name).write_text(emulated(path))
        if path.suffix in (".cpp", ".cu"):
            kind = ["-DWITH_CUDA"] if path.suffix == ".cpp" else ["-D__CUDACC__"]
            objects.append(str(folder / f"{path.name}.o"))
            jobs.append([compiler, *flags, *kind, "-xc++", "-c", str(folder / path.name), "-o", objects[-1]])
    with ThreadPoolExecutor(2) as pool:
        for done in pool.map(lambda job: subprocess.run(job, capture_output=True, text=True), jobs):
            assert done.returncode == 0, done.stderr
    link = [compiler, "-shared", f"-fsanitize={SANITIZERS}", *objects,
            *(f"-L{path}" for path in library_paths("cpu")), "-lc10", "-ltorch_cpu", "-o",
            str(folder / ops.library("cpu").name)]
    done = subprocess.run(link, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_emulated_kernels_pass_the_tests_of_the_ops(cache):
    path = [folder for folder in os.environ["PATH"].split(os.pathsep) if not Path(folder, "nvcc").exists()]
    [library] = cache.glob("*.so")
    emulated = library.read_bytes()
    env = os.environ | {"T2I_OPS_CACHE": str(cache), "CUDA_HOME": str(cache), "PATH": os.pathsep.join(path)}
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "tests/test_csrc.py", "-k",
                           "not cuda and not nvcc and not library and not importing and not torch_compile"], cwd=ROOT,
                          capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert int(re.search(r"(\d+) passed", done.stdout).group(1)) > 200
    assert [*cache.glob("*.so")] == [library] and library.read_bytes() == emulated       # no CPU's own in its place
