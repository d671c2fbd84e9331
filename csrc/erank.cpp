// The ops red_csrc::… for CPU tensors, on PyTorch's stable ABI. red_kernels/extension.py is their only caller: it checks shapes and dtypes, and makes
// the results, which are written here.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

#include "erank_cpu.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Matrices up to this size are too small for the library's own threads.
constexpr int64_t kSmall = 128;

struct Parallel {
  bool threads;
  template <typename F>
  void operator()(int64_t count, const F& f) const {
    if (threads) torch::stable::parallel_for(0, count, 16, f);
    else f(0, count);
  }
};

template <typename In, typename T>
void run(const Tensor& x, const std::optional<Tensor>& mask, Tensor& eigenvalues, Tensor& value, Tensor& finite, Tensor& count, bool lapack) {
  const int64_t matrices = x.size(0), rows = x.size(1), width = x.size(2), most = std::min(rows, width);
  const In* in = static_cast<const In*>(x.const_data_ptr());
  const bool* valid = mask ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr;
  double *spectra = static_cast<double*>(eigenvalues.mutable_data_ptr()), *values = static_cast<double*>(value.mutable_data_ptr());
  bool* finites = static_cast<bool*>(finite.mutable_data_ptr());
  int64_t* counts = static_cast<int64_t*>(count.mutable_data_ptr());

  // A thread a matrix, or, of few and large ones, all threads on each.
  const bool over = most <= kSmall || matrices >= int64_t(torch::stable::get_num_threads());
  const Parallel inner{!over};
  const auto some = [&](int64_t begin, int64_t end) {
    const red::OneThread one(over);
    red::Worker<In, T, Parallel> worker(rows, width, inner, lapack);
    for (int64_t m = begin; m < end; ++m) {
      const red::Found found = worker(in + m * rows * width, valid ? valid + m * rows : nullptr, spectra + m * most);
      values[m] = found.value, finites[m] = found.finite, counts[m] = found.count;
    }
  };
  if (over) torch::stable::parallel_for(0, matrices, 1, some);
  else some(0, matrices);
}

// x [M, N, d] float32 or float64, mask [M, N] bool, both contiguous; see the schema for the rest.
void erank(Tensor x, std::optional<Tensor> mask, bool single, bool lapack, Tensor eigenvalues, Tensor value, Tensor finite, Tensor count) {
  lapack = lapack && red::has_lapack();
  if (x.scalar_type() == ScalarType::Double) {
    if (single) run<double, float>(x, mask, eigenvalues, value, finite, count, lapack);
    else run<double, double>(x, mask, eigenvalues, value, finite, count, lapack);
  } else {
    if (single) run<float, float>(x, mask, eigenvalues, value, finite, count, lapack);
    else run<float, double>(x, mask, eigenvalues, value, finite, count, lapack);
  }
}

template <typename T>
void run_jacobi(const Tensor& gram, Tensor& eigenvalues, Tensor& value, Tensor& sweeps) {
  const int64_t n = gram.size(1), even = n + n % 2;
  const T* in = static_cast<const T*>(gram.const_data_ptr());
  double *spectra = static_cast<double*>(eigenvalues.mutable_data_ptr()), *values = static_cast<double*>(value.mutable_data_ptr());
  int64_t* taken = static_cast<int64_t*>(sweeps.mutable_data_ptr());
  torch::stable::parallel_for(0, gram.size(0), 1, [&](int64_t begin, int64_t end) {
    std::vector<T> a(size_t(even * even));
    std::vector<red::Rotation<T>> turns(size_t(even / 2));
    for (int64_t m = begin; m < end; ++m) {
      std::fill(a.begin(), a.end(), T(0));
      for (int64_t i = 0; i < n; ++i) std::copy_n(in + (m * n + i) * n, n, a.data() + i * even);
      taken[m] = red::jacobi(a.data(), int(even), int(even), turns.data(), red::Alone{});
      red::sorted_diagonal(a.data(), int(n), int(even), spectra + m * n, red::Alone{});
      values[m] = red::effective_rank(spectra + m * n, n, red::Alone{});
    }
  });
}

// The algorithm of the CUDA kernel, run on a CPU: its mathematics is tested through this.
void jacobi(Tensor gram, Tensor eigenvalues, Tensor value, Tensor sweeps, int64_t /*stream*/) {
  if (gram.scalar_type() == ScalarType::Double) run_jacobi<double>(gram, eigenvalues, value, sweeps);
  else run_jacobi<float>(gram, eigenvalues, value, sweeps);
}

bool has_lapack() { return red::has_lapack(); }

#ifdef RED_CUDA
bool has_cuda() { return true; }
#else
bool has_cuda() { return false; }
#endif

}  // namespace

STABLE_TORCH_LIBRARY(red_csrc, m) {
  m.def(
      "erank(Tensor x, Tensor? mask, bool single, bool lapack, Tensor(a!) eigenvalues, Tensor(b!) value, Tensor(c!) finite, Tensor(d!) count) -> ()");
  m.def("jacobi(Tensor gram, Tensor(a!) eigenvalues, Tensor(b!) value, Tensor(c!) sweeps, int stream) -> ()");
  m.def(
      "normalised_rows(Tensor x, Tensor? mask, Tensor(a!) rows, Tensor(b!) finite, Tensor(c!) count, Tensor(d!) mean, Tensor(e!) norms, Tensor(f!) sizes, int stream) "
      "-> ()");
  m.def("has_lapack() -> bool");
  m.def("has_cuda() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(red_csrc, CPU, m) {
  m.impl("erank", TORCH_BOX(&erank));
  m.impl("jacobi", TORCH_BOX(&jacobi));
}

STABLE_TORCH_LIBRARY_IMPL(red_csrc, CompositeExplicitAutograd, m) {
  m.impl("has_lapack", TORCH_BOX(&has_lapack));
  m.impl("has_cuda", TORCH_BOX(&has_cuda));
}
