// One host thread as a team: the interface is that of BlockTeam in csrc/team.cuh.
#pragma once

#include "team.cuh"

namespace vllm_am {

class SerialTeam {
 public:
  template <class F>
  void for_each(int n, F f) const {
    for (int i = 0; i < n; ++i) f(i);
  }

  int first_row(int) const { return 0; }
  int own_rows(int rows) const { return rows; }

  template <class F>
  void for_each_own(int rows, int columns, F f) const {
    for (int i = 0; i < rows; ++i) {
      for (int j = 0; j < columns; ++j) f(i, j);
    }
  }

  template <class T, class F>
  T sum(int n, T zero, F f) const {
    for (int i = 0; i < n; ++i) zero = zero + f(i);
    return zero;
  }

  template <class T, class F>
  T largest(int n, T least, F f) const {
    for (int i = 0; i < n; ++i) least = nan_max(least, f(i));
    return least;
  }

  template <class F>
  int select(int n, F keep, int* selected) const {
    int count = 0;
    for (int i = 0; i < n; ++i) {
      if (keep(i)) selected[count++] = i;
    }
    return count;
  }

  template <class T>
  void multiply(const T* matrix, long long pitch, int rows, int columns, const double* vector,
                double* out) const {
    for (int i = 0; i < rows; ++i) {
      double total = 0.0;
      for (int j = 0; j < columns; ++j) total += double(matrix[i * pitch + j]) * vector[j];
      out[i] = total;
    }
  }

  void multiply_aligned(const float* matrix, int pitch, int rows, const float* vector,
                        float* out) const {
    for (int i = 0; i < rows; ++i) {
      float total = 0.0f;
      for (int j = 0; j < pitch; ++j) total += matrix[(long long)i * pitch + j] * vector[j];
      out[i] = total;
    }
  }
};

}  // namespace vllm_am
