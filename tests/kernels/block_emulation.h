// Thread blocks on the host: what csrc/ uses of CUDA, by as many coroutines that take turns.
//
// A thread runs until it has to wait at a barrier, or in a warp intrinsic, which all 32 threads of
// its warp must come to, or looks at what another block may write.
#pragma once

#include <ucontext.h>

#include <cstring>
#include <functional>
#include <vector>

#define __device__
#define __forceinline__ inline

struct Dim3 {
  unsigned x;
};
inline Dim3 threadIdx;
inline Dim3 blockIdx;
inline Dim3 blockDim;

struct float4 {
  float x, y, z, w;
};

namespace emulation {

struct Thread {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(64 << 10);
  bool done = false;
};

struct Barrier {
  unsigned arrived = 0;
  unsigned generation = 0;

  void wait(unsigned threads);
};

inline ucontext_t scheduler;
inline std::vector<Thread> grid;  // the threads of all blocks, block by block
inline std::function<void()> work;
inline std::vector<double> exchange;  // one entry per thread
inline std::vector<Barrier> block_barriers;
inline std::vector<Barrier> warp_barriers;

// Which of all threads is running.
inline unsigned current() { return blockIdx.x * blockDim.x + threadIdx.x; }

inline void let_others_run() { swapcontext(&grid[current()].context, &scheduler); }

inline void Barrier::wait(unsigned threads) {
  const unsigned mine = generation;
  if (++arrived == threads) {
    arrived = 0;
    ++generation;
  }
  while (generation == mine) let_others_run();
}

inline void wait_for_warp() { warp_barriers[current() / 32].wait(32); }

inline void run_thread() {
  work();
  grid[current()].done = true;
}

// Runs body() on every thread of some blocks, a multiple of 32 of them in each.
inline void run_blocks(unsigned blocks, unsigned threads, std::function<void()> body) {
  blockDim.x = threads;
  exchange.assign(blocks * threads, 0.0);
  block_barriers.assign(blocks, {});
  warp_barriers.assign(blocks * threads / 32, {});
  work = std::move(body);
  grid = std::vector<Thread>(blocks * threads);
  for (Thread& thread : grid) {
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.data();
    thread.context.uc_stack.ss_size = thread.stack.size();
    thread.context.uc_link = &scheduler;
    makecontext(&thread.context, run_thread, 0);
  }
  for (bool running = true; running;) {
    running = false;
    for (unsigned i = 0; i < grid.size(); ++i) {
      if (grid[i].done) continue;
      blockIdx.x = i / threads;
      threadIdx.x = i % threads;
      swapcontext(&scheduler, &grid[i].context);
      running = true;
    }
  }
}

template <class T>
T read(unsigned from) {
  T value;
  std::memcpy(&value, &exchange[from], sizeof(T));
  return value;
}

template <class T>
void write(T value) {
  static_assert(sizeof(T) <= sizeof(double));
  std::memcpy(&exchange[current()], &value, sizeof(T));
}

}  // namespace emulation

inline void __syncthreads() { emulation::block_barriers[blockIdx.x].wait(blockDim.x); }

inline void __threadfence() {}

template <class T>
T atomicAdd(T* number, T more) {
  const T before = *number;
  *number += more;
  return before;
}

template <class T>
T __ldcv(const T* from) {
  return *from;
}

inline void __nanosleep(unsigned) { emulation::let_others_run(); }

template <class T>
T __shfl_xor_sync(unsigned, T value, int lanes) {
  emulation::write(value);
  emulation::wait_for_warp();
  value = emulation::read<T>(emulation::current() ^ unsigned(lanes));
  emulation::wait_for_warp();
  return value;
}

inline unsigned __ballot_sync(unsigned, bool vote) {
  emulation::write(vote);
  emulation::wait_for_warp();
  unsigned votes = 0;
  for (unsigned lane = 0; lane < 32; ++lane) {
    votes |= unsigned(emulation::read<bool>(emulation::current() / 32 * 32 + lane)) << lane;
  }
  emulation::wait_for_warp();
  return votes;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
