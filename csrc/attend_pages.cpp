// Attention of the newest tokens of a batch over their pages, on the CPU: what decoding runs.
//
// The plain-torch reference, vllm_am/compaction/attend_pages.py, gathers all pages of a batch before
// it attends to them; here they are read where they lie, once. The pages of every (row, KV head) are
// cut into parts of about equal work, and the partial results are merged by their log-sum-exp.

#include <omp.h>

#include <algorithm>
#include <vector>

#include "cpu.h"

namespace {

// Fewest pages worth a part of their own.
constexpr int64_t kLeastPages = 8;

// Bytes that the CPU fetches at once.
constexpr int64_t kLine = 64;

struct BFloat16 {
  uint16_t bits;
};

inline float load(float x) { return x; }

inline float load(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Numbers to calculate with: in place, or converted into ``buffer``.
inline const float* floats(const float* from, float*, int64_t) { return from; }

inline const float* floats(const BFloat16* from, float* buffer, int64_t count) {
#pragma omp simd
  for (int64_t d = 0; d < count; ++d) buffer[d] = load(from[d]);
  return buffer;
}

inline void store(float* to, float x) { *to = x; }

inline void store(BFloat16* to, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  // To nearest, ties to even; what is not a number stays one.
  to->bits = x != x ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

}  // namespace

extern "C" {

// The same for all layers of a step. Pages are [num_pages, page_size, 2 * dim], keys then values.
struct Batch {
  const void* pages;
  const float* bias;  // [num_pages, page_size]
  int64_t page_size;
  int64_t pages_per_block;  // of one head
  int64_t dim;
  int64_t heads;  // KV heads
  int64_t group;  // query heads of each
  int64_t block_stride;  // pages from one block to the next
  int64_t rows;
  const int64_t* first;  // [rows], row of its oldest new token among the queries
  const int64_t* fresh;  // [rows], new tokens
  const int64_t* live_tokens;  // [rows]
  const int64_t* blocks_from;  // [rows + 1], into blocks
  const int64_t* blocks;
  const int64_t* const* compacted;  // [rows], null or [layers * heads, width], -1 behind the end
  const int64_t* width;  // [rows]
};

}  // extern "C"

namespace {

struct Part {
  int64_t row, head, from, to;  // pages
};

inline int64_t live_pages_of(const Batch& batch, int64_t row) {
  return (batch.live_tokens[row] + batch.page_size - 1) / batch.page_size;
}

// Of the query heads of a group over some pages: [queries][2 + dim], the largest score, the mass
// relative to it, and the values summed with it. kDim: of a head, where it is known in advance.
template <class T, int64_t kDim>
void attend_part(const Batch& batch, const Part& part, const T* queries, int64_t query_stride,
                 int64_t layer, int64_t layer_base, float scale, float* result) {
  const int64_t dim = kDim != 0 ? kDim : batch.dim;
  const int64_t size = batch.page_size, group = batch.group;
  const int64_t fresh = batch.fresh[part.row], count = fresh * group;
  const int64_t live_tokens = batch.live_tokens[part.row];
  const int64_t* blocks = batch.blocks + batch.blocks_from[part.row];
  const int64_t live_pages = live_pages_of(batch, part.row), per_block = batch.pages_per_block;
  const int64_t* more =
      batch.compacted[part.row] == nullptr
          ? nullptr
          : batch.compacted[part.row] + (layer * batch.heads + part.head) * batch.width[part.row];

  static thread_local std::vector<float> scratch;
  scratch.resize(count * (dim + size) + (size * 2 + 1) * dim);
  float* const q = scratch.data();  // [count, dim]
  float* const weights = q + count * dim;  // [count, size]: scores, then e^score
  float* const page_floats = weights + count * size;  // [size, 2 * dim]
  float* const spare = page_floats + size * 2 * dim;  // [dim]
  for (int64_t i = 0; i < count; ++i) {
    const T* from = queries + (batch.first[part.row] + i / group) * query_stride +
                    (part.head * group + i % group) * dim;
    for (int64_t d = 0; d < dim; ++d) q[i * dim + d] = scale * load(from[d]);
    float* record = result + i * (dim + 2);
    record[0] = kNone;
    std::fill(record + 1, record + dim + 2, 0.f);
  }

  const auto id_of = [&](int64_t page) {
    return page < live_pages ? layer_base + blocks[page / per_block] * batch.block_stride +
                                   part.head * per_block + page % per_block
                             : more[page - live_pages];
  };
  const T* const all = static_cast<const T*>(batch.pages);

  for (int64_t page = part.from; page < part.to; ++page) {
    const bool live = page < live_pages;
    const int64_t id = id_of(page);
    const T* const entries = all + id * size * 2 * dim;
    const T* const next = all + id_of(std::min(page + 1, part.to - 1)) * size * 2 * dim;
    const float* const bias = live ? nullptr : batch.bias + id * size;
    // Slots behind the newest token are not the sequence's.
    const int64_t slots = live ? std::min(size, live_tokens - page * size) : size;
    const float* const rows = floats(entries, page_floats, slots * 2 * dim);
    for (int64_t i = 0; i < count; ++i) {
      const float* const query = q + i * dim;
      for (int64_t s = 0; s < slots; ++s) {
        const float* const key = rows + s * 2 * dim;
        if (i == 0) {  // pages lie anywhere: the CPU cannot guess the next one
          for (int64_t d = 0; d < 2 * dim; d += kLine / sizeof(T)) {
            __builtin_prefetch(next + s * 2 * dim + d);
          }
        }
        float score = 0;
#pragma omp simd reduction(+ : score)
        for (int64_t d = 0; d < dim; ++d) score += query[d] * key[d];
        weights[i * size + s] = score;
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      float* const w = weights + i * size;
      if (bias != nullptr) {
        // A slot that is not used may hold anything.
        for (int64_t s = 0; s < slots; ++s) w[s] = bias[s] == kNone ? kNone : w[s] + bias[s];
      }
      if (live) {  // a token does not see those after it
        const int64_t seen = live_tokens - fresh + i / group + 1 - page * size;
        for (int64_t s = std::max<int64_t>(0, seen); s < slots; ++s) w[s] = kNone;
      }
      float* const record = result + i * (dim + 2);
      float most = record[0];
      for (int64_t s = 0; s < slots; ++s) most = w[s] > most ? w[s] : most;
      if (most == kNone) {  // nothing seen so far
        std::fill(w, w + slots, 0.f);
        continue;
      }
      if (most > record[0]) {
        const float shrink = exp_nonpositive(record[0] - most);
        for (int64_t d = 1; d < dim + 2; ++d) record[d] *= shrink;
        record[0] = most;
      }
      float mass = 0;
#pragma omp simd reduction(+ : mass)
      for (int64_t s = 0; s < slots; ++s) {
        w[s] = exp_nonpositive(w[s] - most);
        mass += w[s];
      }
      record[1] += mass;
    }
    for (int64_t i = 0; i < count; ++i) {
      float* const total = result + i * (dim + 2) + 2;
      float registers[kDim != 0 ? kDim : 1];
      float* const sum = kDim != 0 ? registers : spare;
      std::copy(total, total + dim, sum);
      for (int64_t s = 0; s < slots; ++s) {
        const float weight = weights[i * size + s];
        if (weight == 0.f) continue;  // what it weighs may be no number
        const float* const value = rows + s * 2 * dim + dim;
#pragma omp simd
        for (int64_t d = 0; d < dim; ++d) sum[d] += weight * value[d];
      }
      std::copy(sum, sum + dim, total);
    }
  }
}

// sinks: [heads * group], score of one more key of each query head, whose value is zero; or null.
template <class T>
void attend_pages(const Batch& batch, const T* queries, int64_t query_stride, T* out,
                  int64_t out_stride, int64_t layer, int64_t layer_base, float scale,
                  const float* sinks) {
  const auto attend = batch.dim == 64    ? attend_part<T, 64>
                      : batch.dim == 128 ? attend_part<T, 128>
                                         : attend_part<T, 0>;
  const int64_t pairs = batch.rows * batch.heads, record = batch.dim + 2;
  std::vector<int64_t> pages(pairs);
  int64_t total = 0;
  for (int64_t pair = 0; pair < pairs; ++pair) {
    const int64_t row = pair / batch.heads, head = pair % batch.heads;
    int64_t length = live_pages_of(batch, row);
    if (batch.compacted[row] != nullptr) {
      const int64_t width = batch.width[row];
      const int64_t* const more = batch.compacted[row] + (layer * batch.heads + head) * width;
      length += std::find_if(more, more + width, [](int64_t id) { return id < 0; }) - more;
    }
    pages[pair] = length;
    total += length;
  }
  // Several parts per thread, so that none waits long for the others.
  const int64_t most = std::max(kLeastPages, total / (4 * omp_get_max_threads()) + 1);
  std::vector<Part> parts;
  std::vector<int64_t> results_from, parts_from(pairs + 1);
  int64_t floats = 0;
  for (int64_t pair = 0; pair < pairs; ++pair) {
    const int64_t row = pair / batch.heads, head = pair % batch.heads;
    parts_from[pair] = static_cast<int64_t>(parts.size());
    for (int64_t from = 0; from < pages[pair]; from += most) {
      parts.push_back({row, head, from, std::min(pages[pair], from + most)});
      results_from.push_back(floats);
      floats += batch.fresh[row] * batch.group * record;
    }
  }
  parts_from[pairs] = static_cast<int64_t>(parts.size());
  std::vector<float> results(floats);

#pragma omp parallel if (parts.size() > 1)
  {
#pragma omp for schedule(dynamic, 1)
    for (size_t index = 0; index < parts.size(); ++index) {
      attend(batch, parts[index], queries, query_stride, layer, layer_base, scale,
             results.data() + results_from[index]);
    }
#pragma omp for schedule(static)
    for (int64_t pair = 0; pair < pairs; ++pair) {
      const int64_t row = pair / batch.heads, head = pair % batch.heads;
      for (int64_t i = 0; i < batch.fresh[row] * batch.group; ++i) {
        float largest = kNone, mass = 0;
        for (int64_t index = parts_from[pair]; index < parts_from[pair + 1]; ++index) {
          largest = std::max(largest, results[results_from[index] + i * record]);
        }
        if (sinks != nullptr) {
          const float sink = sinks[head * batch.group + i % batch.group];
          largest = std::max(largest, sink);
          mass = exp_nonpositive(sink - largest);
        }
        T* const to = out + (batch.first[row] + i / batch.group) * out_stride +
                      (head * batch.group + i % batch.group) * batch.dim;
        // The first part becomes the sum of all.
        float* const sum = results.data() + results_from[parts_from[pair]] + i * record;
        for (int64_t index = parts_from[pair]; index < parts_from[pair + 1]; ++index) {
          const float* const one = results.data() + results_from[index] + i * record;
          const float factor = exp_nonpositive(one[0] - largest);
          mass += factor * one[1];
          const bool own = one == sum;
          for (int64_t d = 2; d < record; ++d) sum[d] = factor * one[d] + (own ? 0.f : sum[d]);
        }
        for (int64_t d = 0; d < batch.dim; ++d) store(to + d, sum[d + 2] / mass);
      }
    }
  }
}

}  // namespace

extern "C" {

void attend_pages_float32(const Batch* batch, const void* queries, int64_t query_stride, void* out,
                          int64_t out_stride, int64_t layer, int64_t layer_base, float scale,
                          const float* sinks) {
  attend_pages(*batch, static_cast<const float*>(queries), query_stride, static_cast<float*>(out),
               out_stride, layer, layer_base, scale, sinks);
}

void attend_pages_bfloat16(const Batch* batch, const void* queries, int64_t query_stride, void* out,
                           int64_t out_stride, int64_t layer, int64_t layer_base, float scale,
                           const float* sinks) {
  attend_pages(*batch, static_cast<const BFloat16*>(queries), query_stride,
               static_cast<BFloat16*>(out), out_stride, layer, layer_base, scale, sinks);
}

}  // extern "C"
