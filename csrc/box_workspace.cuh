// Where the vectors and the matrix of a box problem lie.
#pragma once

#include "team.cuh"

namespace vllm_am {

// Vectors of the outer problem (box_solver.cuh) and of the inner one (face.cuh).
constexpr int BOX_VECTORS = 5;
constexpr int FACE_VECTORS = 9;

// Numbers per row and vector: whole 16 bytes.
VLLM_AM_HD int box_pitch(int size) { return (size + 3) / 4 * 4; }

// All pointers are aligned to 16 bytes; pitch = box_pitch(size).
struct BoxWorkspace {
  double* vectors;      // [BOX_VECTORS, pitch]
  float* face;          // [FACE_VECTORS, pitch]
  double* double_face;  // [FACE_VECTORS, pitch]
  int* free;            // [pitch]
  // Two places for this block's rows of the gathered matrix: near, if they have at most
  // near_capacity floats, or far.
  float* near_matrix;
  long long near_capacity;
  float* far_matrix;  // [rows of a block, pitch]
};

// A piece of memory, handed out from its start in multiples of 16 bytes.
struct Arena {
  char* next;
  long long left;

  template <class T>
  VLLM_AM_HD bool has_room(long long count) const {
    return count * (long long)sizeof(T) <= left;
  }

  template <class T>
  VLLM_AM_HD T* take(long long count) {
    char* memory = next;
    next += count * (long long)sizeof(T);
    left -= count * (long long)sizeof(T);
    return reinterpret_cast<T*>(memory);
  }
};

template <class T>
VLLM_AM_HD T* take_first(Arena& shared, Arena& global, long long count) {
  return shared.has_room<T>(count) ? shared.take<T>(count) : global.take<T>(count);
}

// Vectors go to shared memory as long as there is room, in the order of their use: those of the
// inner problem first. What is left holds the matrix of small faces.
// global: has room for everything but near_matrix, see workspace_bytes in kernels/solve_box.py.
VLLM_AM_HD BoxWorkspace box_workspace(Arena shared, Arena global, int size) {
  const long long pitch = box_pitch(size);
  BoxWorkspace w;
  w.face = take_first<float>(shared, global, FACE_VECTORS * pitch);
  w.free = take_first<int>(shared, global, pitch);
  w.vectors = take_first<double>(shared, global, BOX_VECTORS * pitch);
  w.near_matrix = reinterpret_cast<float*>(shared.next);
  w.near_capacity = shared.left / (long long)sizeof(float);
  w.double_face = global.take<double>(FACE_VECTORS * pitch);
  w.far_matrix = reinterpret_cast<float*>(global.next);
  return w;
}

}  // namespace vllm_am
