// Effective rank of one matrix on a CPU: centre, normalise, Gram matrix, eigenvalues, entropy. Knows nothing of PyTorch.
//
// x is read twice, three times if wide or float64 (whose squares may leave its range, so that it is scaled by a power of two first). The normalised rows exist one block at a time, in
// the cache: the Gram matrix grows block by block, of which the lower triangle only is made.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <new>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "jacobi.h"
#include "lapack.h"

namespace red {

// Rows (columns, if wide) of a block: 256 x 512 float64 are 1 MiB, half of a second-level cache. The error bound of docs/kernels.md counts with it.
constexpr int64_t kBlock = 256;
// Columns of the Gram matrix that one product makes, from the diagonal down.
constexpr int64_t kPanel = 64;

// Memory on a cache line's border, so that a library's sums do not depend on where it lies. Not initialised.
template <typename T>
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { release(); }

  T* of(int64_t count) {
    if (count > size_) {
      release();
      data_ = static_cast<T*>(::operator new(size_t(count) * sizeof(T), std::align_val_t(64)));
      size_ = count;
    }
    return data_;
  }

 private:
  void release() {
    if (data_) ::operator delete(data_, std::align_val_t(64));
    data_ = nullptr, size_ = 0;
  }
  T* data_ = nullptr;
  int64_t size_ = 0;
};

struct Found {
  double value;  // NaN where there is no spectrum
  bool finite;
  int64_t count;  // valid rows
};

// Works matrix by matrix and keeps its memory. In: float or double; T: the type of rows, Gram matrix and eigenvalue solver; means and norms are double.
// loop(count, f) calls f(begin, end) on parts of 0 … count.
template <typename In, typename T, typename Loop>
class Worker {
 public:
  Worker(int64_t rows, int64_t width, const Loop& loop, bool lapack = has_lapack()) : rows_(rows), width_(width), loop_(loop), lapack_(lapack) {}

  // x [N, d]; mask [N] or null; eigenvalues [min(N, d)] come descending, zeros behind the last.
  Found operator()(const In* x, const bool* mask, double* eigenvalues) {
    valid_.clear();
    for (int64_t row = 0; row < rows_; ++row)
      if (!mask || mask[row]) valid_.push_back(x + row * width_);
    const int64_t count = int64_t(valid_.size()), most = std::min(rows_, width_);
    std::fill(eigenvalues, eigenvalues + most, 0.0);
    const bool finite = centre();
    if (!finite || count < 2) return {std::numeric_limits<double>::quiet_NaN(), finite, count};

    const int64_t n = std::min(count, width_);
    if (width_ <= count) tall();
    else wide();
    solve(n, eigenvalues);
    return {effective_rank(eigenvalues, n, Alone{}), true, count};
  }

 private:
  // mean_ [d] and size_, the largest norm of a row before centring, both times scale_. Whether all is finite.
  bool centre() {
    scale_ = 1;
    if (std::is_same<In, double>::value) {
      double most = 0, odd = 0;
      for (const In* row : valid_) {
#pragma omp simd reduction(max : most) reduction(+ : odd)
        for (int64_t c = 0; c < width_; ++c) most = std::max(most, std::fabs(double(row[c]))), odd += double(row[c]) * 0;
      }
      if (odd != 0 || !(most <= std::numeric_limits<double>::max())) return false;  // NaN · 0 and Inf · 0 are NaN, which differs from zero
      int exponent;
      std::frexp(most, &exponent);
      scale_ = std::ldexp(1.0, -std::clamp(exponent, -1000, 1000));
    }
    double* mean = mean_.of(width_);
    std::fill(mean, mean + width_, 0.0);
    double largest = 0, total = 0;
    for (const In* row : valid_) {
      double square = 0;
#pragma omp simd reduction(+ : square)
      for (int64_t c = 0; c < width_; ++c) {
        const double value = double(row[c]) * scale_;
        mean[c] += value, square += value * value;
      }
      largest = std::max(largest, square), total += square;
    }
    if (!std::isfinite(total)) return false;  // float32: its squares stay in float64
    size_ = std::sqrt(largest);
    for (int64_t c = 0; c < width_; ++c) mean[c] /= double(std::max<size_t>(valid_.size(), 1));
    return true;
  }

  // 1 / norm of a centred row. A row equal to the mean leaves the mean's rounding error, at most N ulp: that is a zero row, not a direction.
  double inverse_norm(const In* row) const {
    const double* mean = mean_.of(width_);
    double square = 0;
#pragma omp simd reduction(+ : square)
    for (int64_t c = 0; c < width_; ++c) {
      const double value = double(row[c]) * scale_ - mean[c];
      square += value * value;
    }
    const double norm = std::sqrt(square);
    return norm <= double(rows_) * std::numeric_limits<double>::epsilon() * size_ ? 0 : 1 / norm;
  }

  void write(const In* row, double factor, int64_t from, int64_t to, T* out) const {
    const double* mean = mean_.of(width_);
#pragma omp simd
    for (int64_t c = from; c < to; ++c) out[c - from] = T((double(row[c]) * scale_ - mean[c]) * factor);
  }

  // Xᵀ X, block by block of rows
  void tall() {
    T* block = block_.of(kBlock * width_);
    for (int64_t from = 0, count = int64_t(valid_.size()); from < count; from += kBlock) {
      const int64_t rows = std::min(kBlock, count - from);
      loop_(rows, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) write(valid_[from + row], inverse_norm(valid_[from + row]), 0, width_, block + row * width_);
      });
      add(block, width_, rows, true, from == 0);
    }
  }

  // X Xᵀ, block by block of columns
  void wide() {
    const int64_t count = int64_t(valid_.size());
    T* block = block_.of(kBlock * count);
    double* factor = factor_.of(count);
    loop_(count, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) factor[row] = inverse_norm(valid_[row]);
    });
    for (int64_t from = 0; from < width_; from += kBlock) {
      const int64_t columns = std::min(kBlock, width_ - from);
      loop_(count, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) write(valid_[row], factor[row], from, from + columns, block + row * columns);
      });
      add(block, count, columns, false, from == 0);
    }
  }

  // gram_ [n, n] (+)= Σ over k, lower triangle by columns; block is [k, n] if tall, else [n, k].
  void add(const T* block, int64_t n, int64_t k, bool tall, bool first) {
    T* gram = gram_.of(n * n);
    if (!lapack_) return add_plainly(block, n, k, tall, first);
    const int64_t panel = n <= 2 * kPanel ? n : kPanel;
    for (int64_t j = 0; j < n; j += panel) {
      const int64_t columns = std::min(panel, n - j);
      const T* part = block + (tall ? j : j * k);
      gemm(tall ? 'N' : 'T', tall ? 'T' : 'N', n - j, columns, k, part, tall ? n : k, part, tall ? n : k, first ? T(0) : T(1), gram + j * (n + 1), n);
    }
  }

  void add_plainly(const T* block, int64_t n, int64_t k, bool tall, bool first) {
    T* gram = gram_.of(n * n);
    if (first) std::fill(gram, gram + n * n, T(0));
    for (int64_t j = 0; j < n; ++j)
      for (int64_t at = 0; at < k; ++at) {
        const T factor = tall ? block[at * n + j] : block[j * k + at];
        for (int64_t i = j; i < n; ++i) gram[j * n + i] += factor * (tall ? block[at * n + i] : block[i * k + at]);
      }
  }

  void solve(int64_t n, double* eigenvalues) {
    T* gram = gram_.of(n * n);
    if (!lapack_) return solve_plainly(n, eigenvalues);
    T best = 0, *w = w_.of(n);
    double norm = 0, sum = 0;
    for (int64_t j = 0; j < n; ++j)
      for (int64_t i = j; i < n; ++i) norm += (i == j ? 1.0 : 2.0) * double(gram[j * n + i]) * double(gram[j * n + i]);
    int64_t info = syevd(n, gram, w, &best, -1);
    const int64_t length = std::max<int64_t>(int64_t(best), 2 * n + 1);
    if (info == 0) info = syevd(n, gram, w, work_.of(length), length);
    if (info != 0) throw std::runtime_error("erank: LAPACK's syevd failed to converge; RED_BACKEND=torch takes another path");
    for (int64_t i = 0; i < n; ++i) eigenvalues[n - 1 - i] = std::max(0.0, double(w[i])), sum += double(w[i]) * double(w[i]);
    // The squares add up to |gram|_F² whatever the solver's rounding: wrong eigenvalues have been seen (lapack.h), and shall not pass again.
    if (!(std::fabs(sum - norm) <= 32 * double(n) * double(std::numeric_limits<T>::epsilon()) * norm))
      throw std::runtime_error("erank: LAPACK's syevd gave eigenvalues that are not this matrix's; RED_BACKEND=torch takes another path");
  }

  void solve_plainly(int64_t n, double* eigenvalues) {
    const int64_t even = n + n % 2;
    T *gram = gram_.of(n * n), *full = work_.of(even * even);
    std::fill(full, full + even * even, T(0));
    for (int64_t j = 0; j < n; ++j)
      for (int64_t i = j; i < n; ++i) full[i * even + j] = full[j * even + i] = gram[j * n + i];
    turns_.resize(size_t(even / 2));
    if (jacobi(full, int(even), int(even), turns_.data(), Alone{}) < 0) throw std::runtime_error("erank: Jacobi rotations failed to converge; RED_BACKEND=torch takes another path");
    sorted_diagonal(full, int(n), int(even), eigenvalues, Alone{});
  }

  const int64_t rows_, width_;
  const Loop& loop_;
  const bool lapack_;
  double scale_ = 1, size_ = 0;
  std::vector<const In*> valid_;
  std::vector<Rotation<T>> turns_;
  mutable Buffer<double> mean_;
  Buffer<double> factor_;
  Buffer<T> block_, gram_, w_, work_;
};

}  // namespace red
