// Bounded least squares on a Gram matrix: argmin 1/2 w'Gw - c'w over lo <= w <= hi.
//
// The same problem, start and stopping rule as vllm_am/compaction/fit_bias.py (solve_box), written
// for one team of threads per problem. Two precisions share the work:
//
// - Outside, in fp64: the gradient of the given G, the optimality test, the decision which
// variables
//   a bound holds, and the check that the objective fell.
// - Inside, in fp32 on a gathered copy of the rows and columns that are free (face.cuh), scaled to
// a
//   unit diagonal: an eighth of the bytes of an fp64 G where half of the variables are held, and in
//   shared memory if it fits. Its rounding delays convergence but does not limit it: the next outer
//   iteration starts from an exact gradient, as in iterative refinement. Problems so nearly
//   singular that fp32 gets nowhere go on with products of G itself, in fp64.
//
// Why conjugate gradients and not Cholesky: the free blocks of attention fits have condition
// numbers of 10^2 to 10^3, and all outer iterations together read as much as 57 to 198 products
// with the full matrix in fp32 would (t = 100 to 1,200). The products are rows times a vector,
// which a block streams at full bandwidth; the faces of a Cholesky take n^3 / 3 operations in n
// dependent steps.
#pragma once

#include "box_workspace.cuh"
#include "face.cuh"

namespace vllm_am {

// The inner problem is solved to this share of the outer residual.
constexpr double BOX_INNER_SHARE = 0.1;
// ... or of the tolerance, where that is larger.
constexpr double BOX_INNER_TOLERANCE = 0.3;
// Outer iterations in fp32; ordinary fits need 3 to 7.
constexpr int BOX_SINGLE_ITERATIONS = 10;

template <class Real>
struct BoxProblem {
  const Real* gram;   // [size, size], symmetric
  const Real* rhs;    // [size]
  const Real* start;  // [size], a first guess, or nullptr
  int size;
  double lo;
  double hi;
  double tolerance;
  int max_iterations;
};

struct BoxResult {
  double kkt_residual;  // NaN: the problem has numbers that are not finite
  int iterations;       // outer ones
};

// One problem and where it stands. ``Real`` is the type of G.
template <class Team, class Real>
struct BoxSolver {
  const Team& team;
  const BoxProblem<Real>& p;
  const BoxWorkspace& w;
  int n;             // rows and columns from here on are padding and are not read
  double* norm;      // sqrt of the diagonal, 0 where the variable does not matter
  double* weight;    // the solution so far
  double* gradient;  // of the scaled variables norm * weight
  double* next;
  double* next_gradient;

  VLLM_AM_HD BoxSolver(const Team& team, const BoxProblem<Real>& p, const BoxWorkspace& w)
      : team(team), p(p), w(w), n(0) {
    const int pitch = box_pitch(p.size);
    norm = w.vectors;
    weight = norm + pitch;
    gradient = weight + pitch;
    next = gradient + pitch;
    next_gradient = next + pitch;
  }

  VLLM_AM_HD static bool finite(double x) { return x - x == 0.0; }

  VLLM_AM_HD bool used(int i) const { return norm[i] > 0.0; }

  // next_gradient = G next
  VLLM_AM_HD void multiply_next() const {
    team.multiply(p.gram, p.size, n, n, next, next_gradient);
  }

  // Start at the best multiple of the guess, or of (1, ..., 1): all kept keys weighted alike. False
  // if there are numbers that are not finite.
  VLLM_AM_HD bool start() {
    team.for_each(p.size, [&](int i) {
      const double diagonal = p.gram[(long long)i * p.size + i];
      norm[i] = diagonal > 0.0 ? sqrt(diagonal) : 0.0;
      next[i] = diagonal > 0.0 ? (p.start ? double(p.start[i]) : 1.0) : 0.0;
    });
    const int bad = team.largest(p.size, 0, [&](int i) {
      const double diagonal = p.gram[(long long)i * p.size + i];
      return finite(diagonal) && finite(p.rhs[i]) && finite(next[i]) ? 0 : 1;
    });
    n = team.largest(p.size, 0, [&](int i) { return used(i) ? i + 1 : 0; });
    multiply_next();
    const double target = team.sum(n, 0.0, [&](int i) { return next[i] * double(p.rhs[i]); });
    const double curvature = team.sum(n, 0.0, [&](int i) { return next[i] * next_gradient[i]; });
    if (bad || !finite(target) || !finite(curvature)) return false;
    const double level = curvature > 0.0 ? target / curvature : target;
    team.for_each(n, [&](int i) { next[i] = used(i) ? clip(level * next[i], p.lo, p.hi) : 0.0; });
    set_next_gradient();
    move_to_next();
    return true;
  }

  // Largest change of a single weight that would still descend, in units of the target.
  VLLM_AM_HD double kkt_residual() const {
    return team.largest(n, 0.0, [&](int i) {
      if (!used(i)) return 0.0;
      return norm[i] * absolute(weight[i] - clip(weight[i] - gradient[i] / norm[i], p.lo, p.hi));
    });
  }

  // Lists the variables that no bound holds; returns how many.
  VLLM_AM_HD int find_free() const {
    return team.select(
        n,
        [&](int i) {
          return used(i) && !(weight[i] <= p.lo && gradient[i] > 0.0) &&
                 !(weight[i] >= p.hi && gradient[i] < 0.0);
        },
        w.free);
  }

  VLLM_AM_HD void step_single(int size, double tolerance) const {
    const int pitch = box_pitch(size), first = team.first_row(size), own = team.own_rows(size);
    const bool near = (long long)own * pitch <= w.near_capacity;
    float* matrix = near ? w.near_matrix : w.far_matrix;
    team.for_each_own(own, pitch, [&](int a, int b) {
      float entry = 0.0f;
      if (b < size) {
        const int i = w.free[first + a], j = w.free[b];
        entry = float(double(p.gram[(long long)i * p.size + j]) / (norm[i] * norm[j]));
      }
      matrix[(long long)a * pitch + b] = entry;
    });
    const auto apply = [&](const float* x, float* y) {
      team.multiply_aligned(matrix, pitch, size, x, y);
    };
    const auto face = make_face(team, apply, size, w.face, box_pitch(p.size));
    // multiply_aligned reads its vector up to the pitch.
    team.for_each(pitch - size, [&](int i) { face.search[size + i] = 0.0f; });
    step_to_minimum(face, float(tolerance));
  }

  // The same without a copy of the matrix: ``next`` and ``next_gradient`` are free meanwhile.
  VLLM_AM_HD void step_double(int size, double tolerance) const {
    team.for_each(n, [&](int i) { next[i] = 0.0; });
    const auto apply = [&](const double* x, double* y) {
      team.for_each(size, [&](int a) { next[w.free[a]] = x[a] / norm[w.free[a]]; });
      multiply_next();
      team.for_each(size, [&](int a) { y[a] = next_gradient[w.free[a]] / norm[w.free[a]]; });
    };
    step_to_minimum(make_face(team, apply, size, w.double_face, box_pitch(p.size)), tolerance);
  }

  // Sets ``next`` to the minimum on the face of the free variables, roughly.
  template <class Face, class Scalar>
  VLLM_AM_HD void step_to_minimum(const Face& face, Scalar tolerance) const {
    team.for_each(face.size, [&](int a) {
      const int i = w.free[a];
      face.lower[a] = Scalar((p.lo - weight[i]) * norm[i]);
      face.upper[a] = Scalar((p.hi - weight[i]) * norm[i]);
      face.step[a] = 0;
      face.gradient[a] = Scalar(gradient[i]);
    });
    face.minimise(tolerance);
    team.for_each(n, [&](int i) { next[i] = used(i) ? weight[i] : 0.0; });
    team.for_each(face.size, [&](int a) {
      const int i = w.free[a];
      const double end = clip(weight[i] + double(face.step[a]) / norm[i], p.lo, p.hi);
      // Bounds are reached exactly, so that find_free can recognise them.
      next[i] = face.step[a] <= face.lower[a] ? p.lo : (face.step[a] >= face.upper[a] ? p.hi : end);
    });
  }

  VLLM_AM_HD void set_next_gradient() const {
    multiply_next();
    team.for_each(n, [&](int i) {
      next_gradient[i] = used(i) ? (next_gradient[i] - double(p.rhs[i])) / norm[i] : 0.0;
    });
  }

  VLLM_AM_HD void move_to_next() const {
    team.for_each(n, [&](int i) {
      weight[i] = next[i];
      gradient[i] = next_gradient[i];
    });
  }

  // f(next) - f(weight), in a form that does not cancel.
  VLLM_AM_HD double change() const {
    return team.sum(n, 0.0, [&](int i) {
      if (!used(i)) return 0.0;
      return 0.5 * (next[i] - weight[i]) * norm[i] * (gradient[i] + next_gradient[i]);
    });
  }

  // Writes the weights to ``solution`` [size], every block the same ones; variables with a zero
  // diagonal, and all of a problem with NaN or Inf, get 1 clipped to the bounds.
  VLLM_AM_HD BoxResult solve(Real* solution) {
    const double one = clip(1.0, p.lo, p.hi);
    if (!start()) {
      team.for_each(p.size, [&](int i) { solution[i] = Real(one); });
      return {not_a_number(), 0};
    }
    BoxResult result{kkt_residual(), 0};
    bool single = true;
    while (result.kkt_residual > p.tolerance && result.iterations < p.max_iterations) {
      const double share = BOX_INNER_SHARE * result.kkt_residual;
      const double least = BOX_INNER_TOLERANCE * p.tolerance;
      const double tolerance = share > least ? share : least;
      const int size = find_free();
      if (single) {
        step_single(size, tolerance);
      } else {
        step_double(size, tolerance);
      }
      ++result.iterations;
      set_next_gradient();
      const bool descended = change() < 0.0;
      if (descended) {
        move_to_next();
      } else if (!single) {
        break;  // the precision of fp64 is reached
      }
      single = single && descended && result.iterations < BOX_SINGLE_ITERATIONS;
      result.kkt_residual = kkt_residual();
    }
    team.for_each(p.size, [&](int i) {
      const double x = i < n && used(i) ? weight[i] : one;
      solution[i] = clip(Real(x), Real(p.lo), Real(p.hi));  // the bounds in the caller's type
    });
    return result;
  }
};

}  // namespace vllm_am
