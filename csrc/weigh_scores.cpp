// From the scores of queries to their attention weights, on the CPU: what the statistics of a
// compaction spend their time on beside matrix products.
//
// The plain-torch reference, vllm_am/compaction/attend.py, reads and writes the scores six times;
// here a row is finished while it is in the first cache.

#include <algorithm>
#include <vector>

#include "cpu.h"

namespace {

// Rows whose squares are added up by one thread: a number of their own, so that sums come in the
// same order whatever the number of threads.
constexpr int64_t kRows = 64;

// One row of scores becomes weights; its log-sum-exp.
float weigh_row(float* scores, const float* bias, int64_t columns, float* squares) {
  float most = kNone;
  if (bias != nullptr) {
#pragma omp simd reduction(max : most)
    for (int64_t j = 0; j < columns; ++j) {
      scores[j] += bias[j];
      most = scores[j] > most ? scores[j] : most;
    }
  } else {
#pragma omp simd reduction(max : most)
    for (int64_t j = 0; j < columns; ++j) most = scores[j] > most ? scores[j] : most;
  }
  if (most == kNone) {  // sees no key, or what it sees is no number
    const bool blind = std::all_of(scores, scores + columns, [](float s) { return s == kNone; });
    const float nothing = blind ? 0.f : std::numeric_limits<float>::quiet_NaN();
    std::fill(scores, scores + columns, nothing);
    return blind ? kNone : nothing;
  }
  float total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t j = 0; j < columns; ++j) {
    scores[j] = exp_nonpositive(scores[j] - most);
    total += scores[j];
  }
  const float factor = 1.f / total;
  if (squares != nullptr) {
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j) {
      scores[j] *= factor;
      squares[j] += scores[j] * scores[j];
    }
  } else {
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j) scores[j] *= factor;
  }
  return most + std::log(total);
}

}  // namespace

extern "C" {

// scores: [heads, rows, columns], become weights. bias: [heads, columns] or null. lse: [heads,
// rows], written. squares: [heads, columns], sums over rows are added to it; or null.
void weigh_scores_float32(float* scores, const float* bias, float* lse, float* squares,
                          int64_t heads, int64_t rows, int64_t columns) {
  const int64_t parts = (rows + kRows - 1) / kRows;
  std::vector<float> sums(squares != nullptr ? heads * parts * columns : 0);
#pragma omp parallel for schedule(static) collapse(2) if (heads * parts > 1)
  for (int64_t head = 0; head < heads; ++head) {
    for (int64_t part = 0; part < parts; ++part) {
      float* const sum = squares != nullptr ? sums.data() + (head * parts + part) * columns : nullptr;
      for (int64_t i = part * kRows; i < std::min(rows, (part + 1) * kRows); ++i) {
        lse[head * rows + i] =
            weigh_row(scores + (head * rows + i) * columns,
                      bias != nullptr ? bias + head * columns : nullptr, columns, sum);
      }
    }
  }
  if (squares == nullptr) return;
#pragma omp parallel for schedule(static) if (heads > 1)
  for (int64_t head = 0; head < heads; ++head) {
    for (int64_t part = 0; part < parts; ++part) {
      const float* const sum = sums.data() + (head * parts + part) * columns;
#pragma omp simd
      for (int64_t j = 0; j < columns; ++j) squares[head * columns + j] += sum[j];
    }
  }
}

}  // extern "C"
