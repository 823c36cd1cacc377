// The operators of torch.ops.vllm_am, on torch's stable ABI: one build serves torch 2.11 and later.
//
// Thin on purpose. Grid, block and memory are planned in Python (kernels/solve_box.py) for this
// library and for NVRTC alike, tensors are allocated there, and the stream comes from there too, so
// that nothing of torch's CUDA library is needed here.
#include <cuda_runtime.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "solve_box.cuh"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

template <class Real, class Kernel>
void launch(Kernel kernel, const Tensor& gram, const Tensor& rhs,
            const std::optional<Tensor>& start, double lo, double hi, double tolerance,
            int64_t max_iterations, Tensor& solution, Tensor& kkt_residual, Tensor& iterations,
            Tensor& counter, Tensor& exchange, Tensor& workspace, int64_t threads,
            int64_t shared_bytes, int64_t stream) {
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           static_cast<int>(shared_bytes));
  STD_TORCH_CHECK(error == cudaSuccess, "solve_box: ", cudaGetErrorString(error));
  const auto* gram_data = static_cast<const Real*>(gram.data_ptr());
  const auto* rhs_data = static_cast<const Real*>(rhs.data_ptr());
  const auto* start_data = start ? static_cast<const Real*>(start->data_ptr()) : nullptr;
  int batch = static_cast<int>(rhs.size(0)), size = static_cast<int>(rhs.size(1));
  int iterations_at_most = static_cast<int>(max_iterations);
  auto* solution_data = static_cast<Real*>(solution.data_ptr());
  auto* residual_data = static_cast<double*>(kkt_residual.data_ptr());
  auto* iterations_data = static_cast<long long*>(iterations.data_ptr());
  auto* counter_data = static_cast<int*>(counter.data_ptr());
  auto* exchange_data = static_cast<char*>(exchange.data_ptr());
  auto* workspace_data = static_cast<char*>(workspace.data_ptr());
  long long workspace_bytes = workspace.size(1);
  int shared = static_cast<int>(shared_bytes);
  const int blocks = static_cast<int>(workspace.size(0));
  int team_blocks = blocks / static_cast<int>(exchange.size(0));
  void* arguments[] = {&gram_data,          &rhs_data,      &start_data,     &batch,
                       &size,               &lo,            &hi,             &tolerance,
                       &iterations_at_most, &solution_data, &residual_data,  &iterations_data,
                       &counter_data,       &exchange_data, &workspace_data, &workspace_bytes,
                       &shared,             &team_blocks};
  const auto* function = reinterpret_cast<const void*>(kernel);
  const dim3 grid(blocks), block(static_cast<unsigned>(threads));
  const auto queue = reinterpret_cast<cudaStream_t>(stream);
  // Blocks of a team wait for each other: all have to be resident, or none.
  error = team_blocks > 1
              ? cudaLaunchCooperativeKernel(function, grid, block, arguments, shared_bytes, queue)
              : cudaLaunchKernel(function, grid, block, arguments, shared_bytes, queue);
  STD_TORCH_CHECK(error == cudaSuccess, "solve_box: ", cudaGetErrorString(error));
}

void solve_box(const Tensor gram, const Tensor rhs, const std::optional<Tensor> start, double lo,
               double hi, double tolerance, int64_t max_iterations, Tensor solution,
               Tensor kkt_residual, Tensor iterations, Tensor counter, Tensor exchange,
               Tensor workspace, int64_t threads, int64_t shared_bytes, int64_t stream) {
  const auto run = [&](auto real, auto kernel) {
    launch<decltype(real)>(kernel, gram, rhs, start, lo, hi, tolerance, max_iterations, solution,
                           kkt_residual, iterations, counter, exchange, workspace, threads,
                           shared_bytes, stream);
  };
  if (gram.scalar_type() == ScalarType::Double) {
    run(double(), solve_box_float64_kernel);
  } else {
    STD_TORCH_CHECK(gram.scalar_type() == ScalarType::Float, "solve_box: gram is not float32");
    run(float(), solve_box_float32_kernel);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY(vllm_am, m) {
  m.def(
      "solve_box(Tensor gram, Tensor rhs, Tensor? start, float lo, float hi, float tolerance, "
      "int max_iterations, Tensor(a!) solution, Tensor(b!) kkt_residual, Tensor(c!) iterations, "
      "Tensor(d!) counter, Tensor(e!) exchange, Tensor(f!) workspace, int threads, "
      "int shared_bytes, int stream) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vllm_am, CUDA, m) { m.impl("solve_box", TORCH_BOX(&solve_box)); }
