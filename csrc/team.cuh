// The threads that work on one problem, as the solvers see them.
//
// A solver is written once, as a sequence of parallel loops and reductions over a team: on the
// device some thread blocks, in tests without a GPU one host thread (tests/kernels/serial_team.h).
// Every member ends with all its effects visible to the whole team. Reductions add up in an order
// that only the size of a block determines, so a problem's result depends neither on the problems
// beside it nor on the number of blocks.
//
// No standard headers on the device side: NVRTC compiles this file too.
#pragma once

#if defined(__CUDACC__)
#define VLLM_AM_HD __host__ __device__ __forceinline__
#else
#include <cmath>
#define VLLM_AM_HD inline
#endif

namespace vllm_am {

// Two sums in one reduction.
template <class Scalar>
struct Sums {
  Scalar first;
  Scalar second;
};

template <class Scalar>
VLLM_AM_HD Sums<Scalar> operator+(Sums<Scalar> a, Sums<Scalar> b) {
  return {a.first + b.first, a.second + b.second};
}

// Larger of two numbers; NaN if either is.
template <class T>
VLLM_AM_HD T nan_max(T a, T b) {
  return (a > b || a != a) ? a : b;
}

// NaN stays NaN.
template <class T>
VLLM_AM_HD T clip(T x, T lo, T hi) {
  return x < lo ? lo : (x > hi ? hi : x);
}

template <class T>
VLLM_AM_HD T absolute(T x) {
  return x < 0 ? -x : x;
}

VLLM_AM_HD double not_a_number() {
  const double zero = 0.0;
  return zero / zero;
}

// What the blocks of a team tell each other, in global memory; zeros at first.
struct Exchange {
  unsigned arrived;  // blocks, at all meetings so far
  int unused;        // the products behind it are aligned to 16 bytes
  int problem[2];    // that the team works on: one is read while the next is written

  // Bytes with the products of two matrices of so many rows: one is read while the next is written.
  VLLM_AM_HD static long long bytes(int rows) {
    return sizeof(Exchange) + 2ll * rows * (long long)sizeof(double);
  }
};

// One thread block or several, all of a size that is a multiple of 32, at most 1024.
//
// Memory-bound work is divided: each block multiplies some rows of a matrix. All other work is done
// by every block, on vectors of its own, with the same numbers and therefore the same result, which
// costs nothing but the time it takes anyway. All blocks of a team must be resident together: they
// wait for each other.
class BlockTeam {
 public:
  static constexpr int WARP = 32;
  // Rows that a warp multiplies at once: what keeps enough loads in flight to stream from L2.
  static constexpr int ROWS = 4;

  // What a block has in shared memory, where it takes no registers.
  struct Shared {
    char scratch[WARP * 16];  // of reductions
    Exchange* exchange;
    int block;   // which of the team's blocks this is
    int blocks;  // of the team
    int rows;    // of the largest matrix
    unsigned meetings;
  };

  // shared: aligned to 16 bytes. Whoever makes a team is one of its threads.
  __device__ BlockTeam(Shared* shared, int block, int blocks, Exchange* exchange, int rows)
      : shared_(*shared) {
    if (threadIdx.x == 0) {
      shared->exchange = exchange;
      shared->block = block;
      shared->blocks = blocks;
      shared->rows = rows;
      shared->meetings = 0;
    }
    __syncthreads();
  }

  // The next of the problems that ``counter`` hands out, the same for all blocks of the team.
  __device__ int next_problem(int* counter) const {
    int* problem = &shared_.exchange->problem[shared_.meetings % 2];
    if (shared_.block == 0 && threadIdx.x == 0) *problem = atomicAdd(counter, 1);
    meet();
    return __ldcv(problem);
  }

  // The first of the rows of a matrix that this block multiplies, and how many.
  __device__ int first_row(int rows) const {
    const int first = shared_.block * stripe(rows);
    return first < rows ? first : rows;
  }
  __device__ int own_rows(int rows) const {
    const int left = rows - first_row(rows);
    return stripe(rows) < left ? stripe(rows) : left;
  }

  // f(i) for i < n.
  template <class F>
  __device__ void for_each(int n, F f) const {
    for (int i = threadIdx.x; i < n; i += blockDim.x) f(i);
    __syncthreads();
  }

  // f(row, column) for this block's rows, as many as own_rows says, and column < columns.
  template <class F>
  __device__ void for_each_own(int rows, int columns, F f) const {
    for (int i = warp(); i < rows; i += warps()) {
      for (int j = lane(); j < columns; j += WARP) f(i, j);
    }
    __syncthreads();
  }

  // Sum of f(i) over i < n; ``zero`` is the zero of its type.
  template <class T, class F>
  __device__ T sum(int n, T zero, F f) const {
    T total = zero;
    for (int i = threadIdx.x; i < n; i += blockDim.x) total = total + f(i);
    return reduce(total, zero, [](T a, T b) { return a + b; });
  }

  // The largest of f(i) over i < n and of ``least``; NaN if one is.
  template <class T, class F>
  __device__ T largest(int n, T least, F f) const {
    T top = least;
    for (int i = threadIdx.x; i < n; i += blockDim.x) top = nan_max(top, f(i));
    return reduce(top, least, [](T a, T b) { return nan_max(a, b); });
  }

  // The i < n that keep(i) holds for, in order; returns how many.
  template <class F>
  __device__ int select(int n, F keep, int* selected) const {
    int* counts = reinterpret_cast<int*>(shared_.scratch);
    int before = 0;  // selected in earlier rounds
    for (int start = 0; start < n; start += blockDim.x) {
      const int i = start + threadIdx.x;
      const bool kept = i < n && keep(i);
      const unsigned votes = __ballot_sync(~0u, kept);
      if (lane() == 0) counts[warp()] = __popc(votes);
      __syncthreads();
      int offset = before, total = before;
      for (int w = 0; w < warps(); ++w) {
        if (w < warp()) offset += counts[w];
        total += counts[w];
      }
      if (kept) selected[offset + __popc(votes & ((1u << lane()) - 1))] = i;
      before = total;
      __syncthreads();
    }
    return before;
  }

  // out = matrix vector, matrix [rows, columns] with ``pitch`` numbers per row, in fp64.
  template <class T>
  __device__ void multiply(const T* matrix, long long pitch, int rows, int columns,
                           const double* vector, double* out) const {
    const int first = first_row(rows), own = own_rows(rows);
    double* target = shared_.blocks == 1 ? out : products<double>() + first;
    matrix += first * pitch;
    for (int row = warp() * ROWS; row < own; row += warps() * ROWS) {
      const T* line[ROWS];
      double total[ROWS];
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        line[r] = matrix + (long long)(row + r < own ? row + r : row) * pitch;
        total[r] = 0.0;
      }
#pragma unroll 2
      for (int j = lane(); j < columns; j += WARP) {
        const double x = vector[j];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) total[r] += double(line[r][j]) * x;
      }
      store_rows(total, row, own, target);
    }
    gather(rows, out);
  }

  // The same in fp32 over all ``pitch`` columns, a multiple of 4; aligned to 16 bytes.
  //
  // own_matrix: this block's rows alone.
  __device__ void multiply_aligned(const float* own_matrix, int pitch, int rows,
                                   const float* vector, float* out) const {
    const int own = own_rows(rows);
    float* target = shared_.blocks == 1 ? out : products<float>() + first_row(rows);
    const float4* v = reinterpret_cast<const float4*>(vector);
    const int quads = pitch / 4;
    for (int row = warp() * ROWS; row < own; row += warps() * ROWS) {
      const float4* line[ROWS];
      float total[ROWS];
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        const long long at = (long long)(row + r < own ? row + r : row) * pitch;
        line[r] = reinterpret_cast<const float4*>(own_matrix + at);
        total[r] = 0.0f;
      }
#pragma unroll 2
      for (int j = lane(); j < quads; j += WARP) {
        const float4 x = v[j];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
          const float4 a = line[r][j];
          total[r] += a.x * x.x + a.y * x.y + a.z * x.z + a.w * x.w;
        }
      }
      store_rows(total, row, own, target);
    }
    gather(rows, out);
  }

 private:
  __device__ static int lane() { return threadIdx.x % WARP; }
  __device__ static int warp() { return threadIdx.x / WARP; }
  __device__ static int warps() { return blockDim.x / WARP; }

  // Rows of a block, but for the last ones: whole groups of ROWS.
  __device__ int stripe(int rows) const {
    return ((rows + shared_.blocks - 1) / shared_.blocks + ROWS - 1) / ROWS * ROWS;
  }

  // Waits until all blocks of the team have come here, with what they wrote before.
  __device__ void meet() const {
    __syncthreads();
    if (shared_.blocks == 1) return;
    if (threadIdx.x == 0) {
      const unsigned all = ++shared_.meetings * shared_.blocks;
      unsigned* arrived = &shared_.exchange->arrived;
      __threadfence();
      atomicAdd(arrived, 1u);
      // Not "<": the number may overflow. Neither __ldcg nor an empty body: compilers take such a
      // loop for one that ends, and leave it out.
      while (int(__ldcv(arrived) - all) < 0) __nanosleep(20);
      __threadfence();
    }
    __syncthreads();
  }

  // Where a product [rows] is put together: not where the last one still may be read.
  template <class T>
  __device__ T* products() const {
    double* both = reinterpret_cast<double*>(shared_.exchange + 1);
    return reinterpret_cast<T*>(both + (shared_.meetings % 2 ? shared_.rows : 0));
  }

  // out = the product that all blocks have written, where there are several.
  template <class T>
  __device__ void gather(int rows, T* out) const {
    const T* source = products<T>();
    meet();
    if (shared_.blocks > 1) for_each(rows, [&](int i) { out[i] = __ldcv(source + i); });
  }

  __device__ static float shuffle(float x, int lanes) { return __shfl_xor_sync(~0u, x, lanes); }
  __device__ static double shuffle(double x, int lanes) { return __shfl_xor_sync(~0u, x, lanes); }
  __device__ static int shuffle(int x, int lanes) { return __shfl_xor_sync(~0u, x, lanes); }
  template <class Scalar>
  __device__ static Sums<Scalar> shuffle(Sums<Scalar> x, int lanes) {
    return {shuffle(x.first, lanes), shuffle(x.second, lanes)};
  }

  // Over all threads of the block, returned to all.
  template <class T, class F>
  __device__ T reduce(T value, T zero, F combine) const {
    static_assert(sizeof(T) * WARP <= sizeof(Shared::scratch), "one scratch entry per warp");
    T* partial = reinterpret_cast<T*>(shared_.scratch);
    for (int lanes = WARP / 2; lanes > 0; lanes /= 2) {
      value = combine(value, shuffle(value, lanes));
    }
    if (lane() == 0) partial[warp()] = value;
    __syncthreads();
    value = lane() < warps() ? partial[lane()] : zero;
    for (int lanes = WARP / 2; lanes > 0; lanes /= 2) {
      value = combine(value, shuffle(value, lanes));
    }
    __syncthreads();  // the scratch is free again
    return value;
  }

  template <class T>
  __device__ static void store_rows(T (&total)[ROWS], int row, int rows, T* out) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      for (int lanes = WARP / 2; lanes > 0; lanes /= 2) total[r] += shuffle(total[r], lanes);
      if (lane() == r && row + r < rows) out[row + r] = total[r];
    }
  }

  Shared& shared_;
};

}  // namespace vllm_am
