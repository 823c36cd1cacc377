// The box solver of csrc/ on the host, for tests/kernels/test_csrc.py: with one thread per problem,
// or with a team of thread blocks imitated by coroutines.
#include "block_emulation.h"
#include "box_solver.cuh"
#include "serial_team.h"

namespace {

// Memory of a block, aligned to 16 bytes.
class Memory {
 public:
  explicit Memory(long long bytes) : numbers_(bytes / 8 + 2), bytes_(bytes) {}

  vllm_am::Arena arena() {
    const auto start = reinterpret_cast<unsigned long long>(numbers_.data());
    return {reinterpret_cast<char*>((start + 15) & ~15ull), bytes_};
  }

 private:
  std::vector<double> numbers_;
  long long bytes_;
};

// blocks, threads: of the imitated team, and of each block; 0 threads for a SerialTeam.
// shared_bytes, workspace_bytes: of the imitated shared and global memory of a block.
template <class Real>
void solve(const Real* gram, const Real* rhs, const Real* start, int batch, int size, double lo,
           double hi, double tolerance, int max_iterations, int blocks, int threads,
           long long shared_bytes, long long workspace_bytes, Real* x, double* kkt,
           long long* iterations) {
  using namespace vllm_am;
  std::vector<Memory> memory;
  std::vector<BoxWorkspace> workspaces;
  std::vector<BlockTeam::Shared> shared(blocks);
  for (int block = 0; block < blocks; ++block) {
    memory.emplace_back(shared_bytes);
    memory.emplace_back(workspace_bytes);
    workspaces.push_back(
        box_workspace(memory[2 * block].arena(), memory[2 * block + 1].arena(), size));
  }
  Memory exchange(Exchange::bytes(size));
  int counter = 0;
  const auto problem = [&](long long b) {
    return BoxProblem<Real>{gram + b * size * size,
                            rhs + b * size,
                            start ? start + b * size : nullptr,
                            size,
                            lo,
                            hi,
                            tolerance,
                            max_iterations};
  };
  const auto keep = [&](long long b, BoxResult result) {
    kkt[b] = result.kkt_residual;
    iterations[b] = result.iterations;
  };
  if (threads == 0) {
    const SerialTeam team;
    for (long long b = 0; b < batch; ++b) {
      const BoxProblem<Real> one = problem(b);
      keep(b, BoxSolver<SerialTeam, Real>(team, one, workspaces[0]).solve(x + b * size));
    }
    return;
  }
  emulation::run_blocks(blocks, threads, [&] {
    const int block = blockIdx.x;
    const BlockTeam team(&shared[block], block, blocks,
                         reinterpret_cast<Exchange*>(exchange.arena().next), size);
    for (;;) {
      const long long b = team.next_problem(&counter);
      if (b >= batch) return;
      const BoxProblem<Real> one = problem(b);
      const BoxResult own =
          BoxSolver<BlockTeam, Real>(team, one, workspaces[block]).solve(x + b * size);
      if (block == 0 && threadIdx.x == 0) keep(b, own);
    }
  });
}

}  // namespace

extern "C" {

void solve_box_float32(const float* gram, const float* rhs, const float* start, int batch, int size,
                       double lo, double hi, double tolerance, int max_iterations, int blocks,
                       int threads, long long shared_bytes, long long workspace_bytes, float* x,
                       double* kkt, long long* iterations) {
  solve(gram, rhs, start, batch, size, lo, hi, tolerance, max_iterations, blocks, threads,
        shared_bytes, workspace_bytes, x, kkt, iterations);
}

void solve_box_float64(const double* gram, const double* rhs, const double* start, int batch,
                       int size, double lo, double hi, double tolerance, int max_iterations,
                       int blocks, int threads, long long shared_bytes, long long workspace_bytes,
                       double* x, double* kkt, long long* iterations) {
  solve(gram, rhs, start, batch, size, lo, hi, tolerance, max_iterations, blocks, threads,
        shared_bytes, workspace_bytes, x, kkt, iterations);
}

}  // extern "C"
