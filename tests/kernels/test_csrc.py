"""``csrc/`` without a GPU: it compiles, in both of its ways, and the solver's own code solves.

The box solver is written over a "team" of threads. Here it runs as ordinary host code: with one
thread per problem, which is quick, and with a thread block that host threads imitate, warp
intrinsics and barriers included, which is the code that the GPU runs.
"""

from __future__ import annotations

import ctypes
import glob
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.compaction.test_fit_bias import (
    DESIGNS,
    HI,
    LO,
    normal_equations,
    objective,
    scipy_optimum,
    softmax_design,
)
from vllm_am.compaction import fit_bias
from vllm_am.compaction.fit_bias import MAX_ITERATIONS, TOLERANCE, BoxSolution
from vllm_am.kernels import cpu_library
from vllm_am.kernels.native import SOURCES, read_source
from vllm_am.kernels.solve_box import vector_bytes, workspace_bytes

HERE = Path(__file__).parent
NVCC = shutil.which("nvcc")

#: Of a thread, in bytes: what the compiler puts on the stack for want of registers. Both are from
#: outside the inner loops; more would be a regression to look at.
MAX_STACK_BYTES = 128


@pytest.fixture(scope="module")
def host_library(tmp_path_factory):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to compile csrc/ for the host")
    library = tmp_path_factory.mktemp("csrc") / "box_solver.so"
    flags = "-std=c++20 -O2 -Wall -Wextra -Wno-unknown-pragmas -Wno-clobbered -Werror -shared -fPIC"
    includes = [f"-I{SOURCES}", f"-I{HERE}"]
    source = HERE / "box_solver_host.cpp"
    subprocess.run([compiler, *flags.split(), *includes, source, "-o", library], check=True)
    return ctypes.CDLL(str(library))


@pytest.fixture(scope="module")
def solve(host_library):
    def solve_box(
        gram,
        rhs,
        lo=LO,
        hi=HI,
        *,
        tolerance=TOLERANCE,
        max_iterations=MAX_ITERATIONS,
        start=None,
        blocks=1,
        threads=0,
        shared_bytes=1 << 20,
    ):
        """As ``fit_bias.solve_box``; threads: of an imitated block, or 0 for a plain loop."""
        batch, size = rhs.shape
        gram, rhs, x = gram.contiguous(), rhs.contiguous(), torch.empty_like(rhs)
        kkt = torch.empty(batch, dtype=torch.float64)
        iterations = torch.empty(batch, dtype=torch.int64)
        function = host_library[f"solve_box_{str(gram.dtype).removeprefix('torch.')}"]
        pointer, number, size_t = ctypes.c_void_p, ctypes.c_double, ctypes.c_longlong
        function(
            pointer(gram.data_ptr()),
            pointer(rhs.data_ptr()),
            pointer(0 if start is None else start.data_ptr()),
            batch,
            size,
            number(lo),
            number(hi),
            number(tolerance),
            max_iterations,
            blocks,
            threads,
            size_t(shared_bytes),
            size_t(workspace_bytes(size, blocks)),
            pointer(x.data_ptr()),
            pointer(kkt.data_ptr()),
            pointer(iterations.data_ptr()),
        )
        return BoxSolution(x, kkt, iterations)

    return solve_box


@pytest.mark.parametrize("t", [1, 2, 7, 50, 150])
@pytest.mark.parametrize("design", DESIGNS)
def test_optimum_of_an_independent_solver(solve, design, t):
    A = DESIGNS[design](400, t)
    gram, rhs = normal_equations(A)
    solution = solve(gram[None], rhs[None])
    x = solution.x[0]
    assert (x >= LO).all() and (x <= HI).all()
    assert solution.kkt_residual[0] <= TOLERANCE
    assert objective(A, x) <= scipy_optimum(A, LO, HI) + 1e-10


@pytest.mark.parametrize(("lo", "hi"), [(0.0, math.inf), (1.0, 1.0), (0.5, 0.5001), (1e-12, 1e4)])
def test_other_bounds(solve, lo, hi):
    A = softmax_design(300, 40)
    gram, rhs = normal_equations(A)
    solution = solve(gram[None], rhs[None], lo, hi)
    assert (solution.x >= lo).all() and (solution.x <= hi).all()
    assert solution.kkt_residual[0] <= TOLERANCE
    if lo < hi:
        assert objective(A, solution.x[0]) <= scipy_optimum(A, lo, hi) + 1e-10


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    t=st.integers(1, 40),
    rows=st.integers(1, 160),
    rank=st.integers(1, 40),
    log_temperature=st.floats(-3, 3),
    seed=st.integers(0, 10_000),
    single=st.booleans(),
)
def test_always_converges(solve, t, rows, rank, log_temperature, seed, single):
    """Nearly singular and singular problems too, and Gram matrices that fp32 made indefinite."""
    A = softmax_design(rows, t, 2**log_temperature, rank, seed)
    gram, rhs = normal_equations(A.float() if single else A)
    solution = solve(gram.double()[None], rhs.double()[None])
    assert (solution.x >= LO).all() and (solution.x <= HI).all()
    assert solution.kkt_residual[0] <= 10 * TOLERANCE
    if not single:
        # What the residual guarantees: f(x) - f* <= g'(x - x*), and no |x - x*| exceeds the box.
        widths = gram.diagonal().sqrt().sum() * (HI - LO)
        gap = objective(A, solution.x[0]) - scipy_optimum(A, LO, HI)
        assert gap <= solution.kkt_residual[0] * widths + 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_residual_is_true(solve, dtype):
    """Computed here from its definition, in fp64 on the matrix as given."""
    gram, rhs = (part.to(dtype) for part in normal_equations(softmax_design(400, 90)))
    solution = solve(gram[None], rhs[None], max_iterations=2, tolerance=0.0)
    x, gradient = solution.x[0].double(), 0.0
    gradient = gram.double() @ x - rhs.double()
    diagonal = gram.double().diagonal()
    best = torch.clamp(x - gradient / diagonal, LO, HI)
    expected = (diagonal.sqrt() * (x - best).abs()).max()
    rounding = 1e-12 if dtype == torch.float64 else 1e-6  # of x as it is returned
    assert solution.kkt_residual[0] > rounding
    torch.testing.assert_close(solution.kkt_residual[0], expected, rtol=1e-6, atol=rounding)


def test_ordinary_fits_stay_in_single_precision(solve):
    """More than a handful of passes over the full matrix would mean a broken inner solver."""
    pairs = [normal_equations(softmax_design(600, 100, seed=seed)) for seed in range(8)]
    gram, rhs = (torch.stack(parts) for parts in zip(*pairs, strict=True))
    solution = solve(gram, rhs)
    assert (solution.kkt_residual <= TOLERANCE).all()
    assert solution.iterations.max() <= 8
    single = solve(gram.float(), rhs.float())
    assert (single.kkt_residual <= TOLERANCE).all()  # in fp64, on the rounded matrix


def test_same_optimum_as_the_reference(solve):
    gram, rhs = normal_equations(softmax_design(600, 120))
    expected = fit_bias.solve_box(gram[None], rhs[None], LO, HI, tolerance=1e-12)
    solution = solve(gram[None], rhs[None], tolerance=1e-12)
    assert solution.kkt_residual[0] <= 1e-12
    torch.testing.assert_close(solution.x, expected.x, rtol=1e-6, atol=1e-8)


def test_all_keys_alike(solve):
    gram, rhs = torch.full((1, 60, 60), 0.01).double(), torch.full((1, 60), 0.1).double()
    solution = solve(gram, rhs)
    torch.testing.assert_close(solution.x.sum(), torch.tensor(10.0).double())
    torch.testing.assert_close(solution.x, torch.full_like(rhs, 1 / 6))
    assert solve(gram, 10 * rhs).x.sum() == pytest.approx(100)


def test_a_start_is_used_and_does_not_move_the_optimum(solve):
    """Up to a factor: in a cone, as here, half of the optimum leads to all of it."""
    gram, rhs = (part[None] for part in normal_equations(softmax_design(400, 60)))
    cold = solve(gram, rhs, 0.0, 1e4, tolerance=1e-10)
    assert cold.iterations[0] > 0
    warm = solve(gram, rhs, 0.0, 1e4, tolerance=1e-9, start=0.5 * cold.x)
    assert warm.iterations[0] == 0
    torch.testing.assert_close(warm.x, cold.x, rtol=1e-7, atol=1e-7)
    other = solve(gram, rhs, 0.0, 1e4, tolerance=1e-10, start=torch.rand_like(cold.x))
    torch.testing.assert_close(other.x, cold.x, rtol=1e-5, atol=1e-6)


def test_unused_variables_are_one_and_touch_nothing(solve):
    gram, rhs = normal_equations(softmax_design(100, 10))
    padded_gram, padded_rhs = torch.zeros(1, 14, 14).double(), torch.zeros(1, 14).double()
    padded_gram[0, 2:12, 2:12], padded_rhs[0, 2:12] = gram, rhs
    padded, plain = solve(padded_gram, padded_rhs), solve(gram[None], rhs[None])
    torch.testing.assert_close(padded.x[0, 2:12], plain.x[0], rtol=1e-9, atol=1e-9)
    assert torch.equal(padded.x[0, [0, 1, 12, 13]], torch.ones(4).double())
    nothing = solve(torch.zeros(2, 3, 3).double(), torch.zeros(2, 3).double(), 2.0, 3.0)
    assert torch.equal(nothing.x, torch.full((2, 3), 2.0).double())
    assert torch.equal(nothing.kkt_residual, torch.zeros(2).double())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["diagonal", "off the diagonal", "rhs"])
def test_museum_13_numbers_that_are_not_finite_are_flagged(solve, bad, where):
    pair = normal_equations(softmax_design(100, 12))
    gram, rhs = torch.stack([pair[0]] * 3), torch.stack([pair[1]] * 3)
    if where == "rhs":
        rhs[1, 5] = bad
    else:
        row, column = (5, 5) if where == "diagonal" else (5, 6)
        gram[1, row, column] = gram[1, column, row] = bad
    solution = solve(gram, rhs)
    assert solution.kkt_residual.isnan().tolist() == [False, True, False]
    assert torch.equal(solution.x[1], torch.ones(12).double())
    assert torch.equal(solution.x[0], solve(*(part[None] for part in pair)).x[0])


@pytest.mark.parametrize("threads", [32, 96])
@pytest.mark.parametrize("shared", ["all", "vectors of the face", "none"])
@pytest.mark.parametrize("t", [1, 37])
def test_thread_block(solve, t, shared, threads):
    """The block's reductions, scans and products against the plain loop, wherever memory lies."""
    shared_bytes = {"all": 1 << 20, "vectors of the face": vector_bytes(t) // 2, "none": 0}[shared]
    gram, rhs = normal_equations(softmax_design(200, t))
    for dtype in (torch.float32, torch.float64):
        pair = gram.to(dtype)[None], rhs.to(dtype)[None]
        block = solve(*pair, threads=threads, shared_bytes=shared_bytes)
        assert block.kkt_residual[0] <= TOLERANCE
        torch.testing.assert_close(block.x, solve(*pair).x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("blocks", [2, 3, 5])
@pytest.mark.parametrize("shared", ["all", "vectors of the face", "none"])
def test_a_team_of_blocks_does_what_one_does(solve, blocks, shared):
    """To the bit, problem after problem; 37 rows are no multiple of anything, and 5 are fewer
    than the rows of two blocks."""
    for t in (5, 37):
        pairs = [normal_equations(softmax_design(200, t, seed=seed)) for seed in range(4)]
        gram, rhs = (torch.stack(parts) for parts in zip(*pairs, strict=True))
        for bad in (0, 3):  # blocks meet less often over these, and go on to the next
            gram[bad, 2, 3] = gram[bad, 3, 2] = math.nan
        sizes = {"all": 1 << 20, "vectors of the face": vector_bytes(t) // 2, "none": 0}
        one, team = (
            solve(gram, rhs, blocks=number, threads=64, shared_bytes=sizes[shared])
            for number in (1, blocks)
        )
        assert torch.equal(team.x, one.x) and torch.equal(team.iterations, one.iterations)
        assert torch.equal(team.kkt_residual[1:3], one.kkt_residual[1:3])
        assert one.kkt_residual[1:3].max() <= TOLERANCE
        assert team.kkt_residual.isnan().tolist() == [True, False, False, True]


def test_thread_block_in_double_precision(solve):
    """Hilbert's matrix is what fp32 gets nowhere with."""
    gram, rhs = normal_equations(DESIGNS["hilbert"](60, 12))
    block = solve(gram[None], rhs[None], 0.0, 100.0, tolerance=1e-9, threads=64)
    assert block.kkt_residual[0] <= 1e-9
    team = solve(gram[None], rhs[None], 0.0, 100.0, tolerance=1e-9, blocks=2, threads=64)
    assert torch.equal(team.x, block.x)


def run_cuobjdump(*arguments: object) -> str:
    from triton import knobs

    command = [knobs.nvidia.cuobjdump.path, *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def kernels_of(name: str) -> set[str]:
    text = re.sub(r"\s+", " ", (SOURCES / name).read_text())
    return set(re.findall(r"__global__ void __launch_bounds__\([^)]*\) (\w+)\(", text))


def check_waiting(cubin: Path) -> None:
    """Blocks wait for each other: behind every arrival there is a loop that reads anew.

    A compiler that takes the loop for one that ends leaves it out, as has happened on a device.
    """
    code = run_cuobjdump("--dump-sass", cubin)
    arrivals = re.findall(r"ATOM\.E\.ADD.*?BAR\.SYNC", code, flags=re.DOTALL)
    assert len(arrivals) >= 2 * len(kernels_of("solve_box.cuh"))
    for each in arrivals:
        assert re.search(r"NANOSLEEP.*LDG?\.E\.STRONG.*\bBRA\b", each, flags=re.DOTALL), each


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="no nvcc here")
@pytest.mark.parametrize("architecture", ["80", "90a"])
def test_nvcc_compiles_the_kernels_without_spills(tmp_path, architecture):
    cubin = tmp_path / "kernels.cubin"
    target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    source = tmp_path / "kernels.cu"  # nvcc goes by the name's ending
    source.write_text('#include "solve_box.cuh"\n')
    command = [NVCC, "-std=c++17", "-O3", target, "-cubin", f"-I{SOURCES}", source, "-o", cubin]
    subprocess.run(command, check=True)
    usage = dict(
        re.findall(r"Function (\w+):\n(.*)", run_cuobjdump("--dump-resource-usage", cubin))
    )
    assert set(usage) == kernels_of("solve_box.cuh") != set()
    for name, line in usage.items():
        print(architecture, name, line.strip())
        sizes = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
        assert sizes["LOCAL"] == 0 and sizes["STACK"] <= MAX_STACK_BYTES
        assert sizes["REG"] <= 64  # 1,024 threads on 65,536 registers
    check_waiting(cubin)


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="no nvcc here")
def test_binding_compiles_and_loads_beside_this_torch(tmp_path):
    """On the stable ABI, without libtorch_cuda: the CPU build of torch can load it and knows it."""
    library = tmp_path / "_native.so"
    torch_folder = Path(torch.__file__).parent
    from setup import NVCC_FLAGS  # those of the build ahead of time

    command = [NVCC, *NVCC_FLAGS, "-shared", "-Xcompiler", "-fPIC", "-cudart", "shared"]
    paths = [f"-I{SOURCES}", f"-I{torch_folder}/include", f"-L{torch_folder}/lib", "-ltorch_cpu"]
    target = "-gencode=arch=compute_80,code=compute_80"  # PTX: the cubins are another test's
    subprocess.run([*command, target, *paths, SOURCES / "binding.cu", "-o", library], check=True)
    script = (
        f"import torch; torch.ops.load_library({str(library)!r});"
        "print(torch.ops.vllm_am.solve_box.default._schema)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("vllm_am::solve_box(Tensor gram, Tensor rhs, Tensor? start,")


def nvrtc_library() -> ctypes.CDLL | None:
    """NVRTC, from the CUDA toolkit or from NVIDIA's wheels."""
    roots = [*sys.path, "/usr/local/cuda"]
    wheels = [f"{root}/nvidia/*/lib/libnvrtc.so.1?" for root in sys.path]
    for pattern in [*wheels, *(f"{root}/lib64/libnvrtc.so.1?" for root in roots)]:
        for path in glob.glob(pattern):
            return ctypes.CDLL(path, mode=os.RTLD_GLOBAL)
    return None


@pytest.mark.slow
def test_nvrtc_compiles_the_kernels(tmp_path):
    nvrtc = nvrtc_library()
    if nvrtc is None:
        pytest.skip("no NVRTC here (CUDA toolkit, or the package nvidia-cuda-nvrtc)")
    program = ctypes.c_void_p()
    source = read_source("solve_box.cuh").encode()
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, b"kernels", 0, None, None) == 0
    options = (ctypes.c_char_p * 2)(b"-std=c++17", b"--gpu-architecture=sm_90a")
    code = nvrtc.nvrtcCompileProgram(program, 2, options)
    length = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(length))
    log = ctypes.create_string_buffer(length.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    assert code == 0, log.value.decode()
    nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(length))
    cubin = ctypes.create_string_buffer(length.value)
    nvrtc.nvrtcGetCUBIN(program, cubin)
    for kernel in kernels_of("solve_box.cuh"):
        assert kernel.encode() in cubin.raw
    file = tmp_path / "kernels.cubin"
    file.write_bytes(cubin.raw)
    check_waiting(file)


def test_source_is_in_one_piece():
    source = read_source("solve_box.cuh")
    assert '#include "' not in source and "#pragma once" not in source
    assert source.count("class BlockTeam") == 1


@pytest.mark.parametrize("vectors", ["DEFAULT", *cpu_library.VECTOR_FLAGS])
def test_kernels_of_the_cpu_compile_without_a_warning(vectors, tmp_path):
    """For CPUs other than this one, too."""
    if (compiler := shutil.which("g++")) is None:
        pytest.skip("no g++")
    flags = [*cpu_library.FLAGS, *cpu_library.VECTOR_FLAGS.get(vectors, [])]
    warnings = ["-Wall", "-Wextra", "-Werror"]
    units = [SOURCES / name for name in cpu_library.UNITS]
    subprocess.run([compiler, *flags, *warnings, *units, "-o", tmp_path / "a.so"], check=True)
