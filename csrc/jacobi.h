// Eigenvalues of a symmetric matrix by cyclic Jacobi rotations, and their entropy: one text for a block of GPU threads and for a CPU.
//
// Golub & Van Loan, "Matrix Computations", 8.5: a rotation in the plane (p, q) makes a_pq zero; a sweep visits every plane once. In the round-robin
// order below, the n/2 planes of a step share no index, so a step's rotations are made and applied at the same time, both sides at once: the
// 2x2 block where planes i and j meet depends on those two rotations only. The off-diagonal norm falls quadratically; n = 128 takes 8 to 10 sweeps.
//
// A Team has rank(), size(), sync() and sum(): threads that share `a`. Results are the same bits for every size of the team but for sum()'s order.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#ifdef __CUDACC__
#define RED_BOTH __host__ __device__
#else
#define RED_BOTH
#endif

namespace red {

constexpr int kJacobiSweeps = 40;

// A CPU thread is a team of one.
struct Alone {
  RED_BOTH int rank() const { return 0; }
  RED_BOTH int size() const { return 1; }
  RED_BOTH void sync() const {}
  RED_BOTH double sum(double value) const { return value; }
};

struct Plane {
  int p, q;
};

// Plane k of `m / 2` in step `step` of `m - 1`: a round-robin tournament of m (even) players, of whom m - 1 keeps its seat.
RED_BOTH inline Plane plane_of(int step, int k, int m) {
  const int p = k ? (step + k) % (m - 1) : m - 1;
  const int q = (step - k + m - 1) % (m - 1);
  return p < q ? Plane{p, q} : Plane{q, p};
}

// A plane and the rotation in it that makes a_pq zero, by the smaller of the two angles.
template <typename T>
struct Rotation {
  T c, s, t;  // cosine, sine, tangent
  int p, q;
};

template <typename T>
RED_BOTH inline Rotation<T> rotation(const T* a, int stride, Plane plane) {
  const T app = a[plane.p * (stride + 1)], aqq = a[plane.q * (stride + 1)], apq = a[plane.p * stride + plane.q];
  if (apq == T(0)) return {T(1), T(0), T(0), plane.p, plane.q};
  const T tau = (aqq - app) / (T(2) * apq);  // may be infinite: then t is zero
  const T t = (tau < T(0) ? T(-1) : T(1)) / (std::fabs(tau) + std::sqrt(T(1) + tau * tau));
  const T c = T(1) / std::sqrt(T(1) + t * t);
  return {c, t * c, t, plane.p, plane.q};
}

// Turn the block where planes i and j meet, and its mirror image below the diagonal.
template <typename T>
RED_BOTH inline void turn(T* a, int stride, Rotation<T> i, Rotation<T> j, bool diagonal) {
  const T pu = a[i.p * stride + j.p], pv = a[i.p * stride + j.q], qu = a[i.q * stride + j.p], qv = a[i.q * stride + j.q];
  if (diagonal) {  // what c² + s² lacks of one must not add up over a thousand steps: eigenvalues grow by differences
    a[i.p * (stride + 1)] = pu - i.t * pv, a[i.q * (stride + 1)] = qv + i.t * pv;
    a[i.p * stride + i.q] = a[i.q * stride + i.p] = T(0);
    return;
  }
  const T lpu = i.c * pu - i.s * qu, lpv = i.c * pv - i.s * qv, lqu = i.s * pu + i.c * qu, lqv = i.s * pv + i.c * qv;
  a[i.p * stride + j.p] = a[j.p * stride + i.p] = j.c * lpu - j.s * lpv;
  a[i.p * stride + j.q] = a[j.q * stride + i.p] = j.s * lpu + j.c * lpv;
  a[i.q * stride + j.p] = a[j.p * stride + i.q] = j.c * lqu - j.s * lqv;
  a[i.q * stride + j.q] = a[j.q * stride + i.q] = j.s * lqu + j.c * lqv;
}

// Make `a` [m, stride] diagonal; m even (pad with a row and column of zeros), `turns` [m / 2] is scratch of the team. Returns the sweeps taken, -1 if kJacobiSweeps
// did not do. It stops at an off-diagonal Frobenius norm of eps |A|_F, which is also the most that this moves any eigenvalue (Weyl).
template <typename T, typename Team>
RED_BOTH int jacobi(T* a, int m, int stride, Rotation<T>* turns, const Team& team) {
  const int half = m / 2;
  for (int sweep = 0;; ++sweep) {
    double off = 0, all = 0;
    for (int at = team.rank(); at < m * m; at += team.size()) {
      const double value = a[at / m * stride + at % m];
      all += value * value;
      if (at / m != at % m) off += value * value;
    }
    off = team.sum(off), all = team.sum(all);
    const double eps = std::numeric_limits<T>::epsilon();
    if (off <= eps * eps * all) return sweep;
    if (sweep == kJacobiSweeps || !(off < std::numeric_limits<double>::infinity())) return -1;
    for (int step = 0; step < m - 1; ++step) {
      for (int k = team.rank(); k < half; k += team.size()) turns[k] = rotation(a, stride, plane_of(step, k, m));
      team.sync();
      // Pairs i <= j in rows of equal length: row i, with half - i of them, is followed by row half - 1 - i.
      const int rows = (half + 1) / 2, length = half + 1;
      for (int at = team.rank(); at < rows * length; at += team.size()) {
        const int row = at / length, column = at % length;
        const bool first = column < half - row;
        if (!first && 2 * row == half - 1) continue;
        const int i = first ? row : half - 1 - row, j = first ? row + column : column - 1;
        turn(a, stride, turns[i], turns[j], i == j);
      }
      team.sync();
    }
  }
}

// Entropy of eigenvalues as effective rank, exp(-sum r ln r) with r = lambda / sum lambda; NaN where all are zero.
template <typename Team>
RED_BOTH double effective_rank(const double* eigenvalues, int64_t n, const Team& team) {
  double total = 0, entropy = 0;
  for (int64_t i = team.rank(); i < n; i += team.size()) total += eigenvalues[i];
  total = team.sum(total);
  for (int64_t i = team.rank(); i < n; i += team.size()) {
    const double r = eigenvalues[i] / total;
    if (r > 0) entropy -= r * std::log(r);
  }
  entropy = team.sum(entropy);
  return total > 0 ? std::exp(entropy) : std::numeric_limits<double>::quiet_NaN();
}

// The diagonal of `a`, descending and not below zero, into sorted [n].
template <typename T, typename Team>
RED_BOTH void sorted_diagonal(const T* a, int n, int stride, double* sorted, const Team& team) {
  for (int i = team.rank(); i < n; i += team.size()) {
    const T mine = a[i * (stride + 1)];
    int place = 0;
    for (int j = 0; j < n; ++j) {
      const T other = a[j * (stride + 1)];
      place += other > mine || (other == mine && j < i);
    }
    sorted[place] = mine > T(0) ? double(mine) : 0.0;
  }
  team.sync();
}

}  // namespace red
