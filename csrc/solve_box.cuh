// Kernels of the box solver: a team of thread blocks per problem, all problems in one launch, which
// has to be a cooperative one where a team has several blocks.
//
// Compiled by nvcc (binding.cu) or, at first use, by NVRTC (kernels/native.py): no host headers.
#pragma once

#include "box_solver.cuh"

namespace vllm_am {

// Teams pull problems from ``counter`` [1] (0 at first), so a batch of unequal problems balances
// itself, and a block's slice of the workspace [gridDim.x, workspace_bytes] is used again.
// exchange: [teams, Exchange::bytes(size)], zeros; gridDim.x is a multiple of team_blocks.
template <class Real>
__device__ void solve_box_batch(const Real* gram, const Real* rhs, const Real* start, int batch,
                                int size, double lo, double hi, double tolerance,
                                int max_iterations, Real* solution, double* kkt_residual,
                                long long* iterations, int* counter, char* exchange,
                                char* workspace_memory, long long workspace_bytes, int shared_bytes,
                                int team_blocks) {
  extern __shared__ __align__(16) char memory[];
  __shared__ __align__(16) char team_memory[sizeof(BlockTeam::Shared)];
  const int number = blockIdx.x / team_blocks, block = blockIdx.x % team_blocks;
  const BlockTeam team(reinterpret_cast<BlockTeam::Shared*>(team_memory), block, team_blocks,
                       reinterpret_cast<Exchange*>(exchange + number * Exchange::bytes(size)),
                       size);
  const Arena global{workspace_memory + blockIdx.x * workspace_bytes, workspace_bytes};
  const BoxWorkspace workspace = box_workspace({memory, shared_bytes}, global, size);
  for (;;) {
    const long long i = team.next_problem(counter);
    if (i >= batch) return;
    const BoxProblem<Real> problem{gram + i * size * size,
                                   rhs + i * size,
                                   start ? start + i * size : nullptr,
                                   size,
                                   lo,
                                   hi,
                                   tolerance,
                                   max_iterations};
    const BoxResult result =
        BoxSolver<BlockTeam, Real>(team, problem, workspace).solve(solution + i * size);
    if (block == 0 && threadIdx.x == 0) {
      kkt_residual[i] = result.kkt_residual;
      iterations[i] = result.iterations;
    }
  }
}

}  // namespace vllm_am

extern "C" {

__global__ void __launch_bounds__(1024, 1)
    solve_box_float32_kernel(const float* gram, const float* rhs, const float* start, int batch,
                             int size, double lo, double hi, double tolerance, int max_iterations,
                             float* solution, double* kkt_residual, long long* iterations,
                             int* counter, char* exchange, char* workspace,
                             long long workspace_bytes, int shared_bytes, int team_blocks) {
  vllm_am::solve_box_batch(gram, rhs, start, batch, size, lo, hi, tolerance, max_iterations,
                           solution, kkt_residual, iterations, counter, exchange, workspace,
                           workspace_bytes, shared_bytes, team_blocks);
}

__global__ void __launch_bounds__(1024, 1)
    solve_box_float64_kernel(const double* gram, const double* rhs, const double* start, int batch,
                             int size, double lo, double hi, double tolerance, int max_iterations,
                             double* solution, double* kkt_residual, long long* iterations,
                             int* counter, char* exchange, char* workspace,
                             long long workspace_bytes, int shared_bytes, int team_blocks) {
  vllm_am::solve_box_batch(gram, rhs, start, batch, size, lo, hi, tolerance, max_iterations,
                           solution, kkt_residual, iterations, counter, exchange, workspace,
                           workspace_bytes, shared_bytes, team_blocks);
}

}  // extern "C"
