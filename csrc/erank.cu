// The ops red_csrc::… for CUDA tensors. The Gram matrix between them, and eigenvalues of more than kMost, are PyTorch's (red_kernels/extension.py).
//
// normalised_rows reads x twice and writes the rows once: column_means (float64 sums in a fixed order), then normalise (a block a row). Which rows count as zero
// depends on the largest row, known only then: zero_rows clears them, and reads nothing but norms. float64 is read once more, for its power-of-two scale.
// jacobi keeps a matrix in shared memory, a block a matrix, entropy included. No sum meets another in an order that changes: repeats give the same bits.
#include <cuda_runtime.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "jacobi.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 256;  // of a block that makes one row, or turns one matrix
constexpr int kStrip = 32;     // columns of a block that makes means, kThreads / kStrip rows at a time
constexpr int kMost = 128;     // 128 x 129 float64 are 129 KiB of shared memory, of the 163 (sm_80) or 227 (sm_90) that a block can have

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("red_csrc: ") + what + ": " + cudaGetErrorString(error));
}

// This library has a CUDA runtime of its own: it is told the tensor's device for as long as one of these lives.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    check(cudaSetDevice(device), "cudaSetDevice");
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  ~OnDevice() { cudaSetDevice(before_); }

 private:
  int before_ = 0;
};

// The threads of a block as a red:: team.
struct Block {
  double* scratch;  // [33] shared
  __device__ int rank() const { return int(threadIdx.x); }
  __device__ int size() const { return int(blockDim.x); }
  __device__ void sync() const { __syncthreads(); }

  template <typename Join>
  __device__ double all(double value, Join join) const {
    for (int reach = 16; reach; reach /= 2) value = join(value, __shfl_xor_sync(0xffffffffu, value, reach));
    const int warp = int(threadIdx.x) / 32, warps = int(blockDim.x) / 32;
    __syncthreads();  // the last reader of scratch is done
    if (threadIdx.x % 32 == 0) scratch[warp] = value;
    __syncthreads();
    double joined = scratch[0];
    for (int other = 1; other < warps; ++other) joined = join(joined, scratch[other]);
    return joined;
  }
  __device__ double sum(double value) const {
    return all(value, [](double a, double b) { return a + b; });
  }
  __device__ double max(double value) const {  // NaN wins
    return all(value, [](double a, double b) { return a > b || isnan(a) ? a : b; });
  }
};

// sizes[m] becomes the power of two that brings the largest entry of matrix m near 1; 1 for float32, whose squares float64 holds. finite[m]: no NaN or Inf in valid rows.
template <typename In>
__global__ void __launch_bounds__(1024) prepare(const In* x, const bool* mask, int64_t rows, int64_t width, double* sizes, bool* finite, int64_t* count) {
  __shared__ double scratch[33];
  const Block block{scratch};
  const int64_t m = blockIdx.x;
  x += m * rows * width;
  double most = 0, valid = 0;
  for (int64_t row = 0; row < rows; ++row) {
    if (mask && !mask[m * rows + row]) continue;
    valid += 1;
    if (sizeof(In) == sizeof(double))
      for (int64_t c = threadIdx.x; c < width; c += blockDim.x) {
        const double size = fabs(double(x[row * width + c]));
        most = size > most || isnan(size) ? size : most;
      }
  }
  most = block.max(most);
  if (threadIdx.x == 0) {
    int exponent = 0;
    if (most > 0 && isfinite(most)) frexp(most, &exponent);
    sizes[m * 2] = ldexp(1.0, -min(max(exponent, -1000), 1000));
    sizes[m * 2 + 1] = 0;
    finite[m] = isfinite(most);
    count[m] = int64_t(valid);
  }
}

template <typename In>
__global__ void __launch_bounds__(kThreads) column_means(const In* x, const bool* mask, int64_t rows, int64_t width, const double* sizes, const int64_t* count, double* mean, bool* finite) {
  __shared__ double part[kThreads / kStrip][kStrip];
  const int64_t m = blockIdx.x, column = int64_t(blockIdx.y) * kStrip + threadIdx.x % kStrip;
  const int lane = int(threadIdx.x) / kStrip, lanes = kThreads / kStrip;
  const double scale = sizes[m * 2];
  double sum = 0;
  if (column < width)
    for (int64_t row = lane; row < rows; row += lanes)
      if (!mask || mask[m * rows + row]) sum += double(x[(m * rows + row) * width + column]) * scale;
  part[lane][threadIdx.x % kStrip] = sum;
  __syncthreads();
  if (lane || column >= width) return;
  for (int other = 1; other < lanes; ++other) sum += part[other][threadIdx.x];
  if (!isfinite(sum)) finite[m] = false;  // every writer writes the same
  mean[m * width + column] = sum / double(count[m] > 0 ? count[m] : 1);
}

// rows[m, row] = (x - mean) / its norm; norms[m, row] = that norm; sizes[m, 1] = the largest norm before centring, as the bits of a float64 that is not negative.
template <typename In, typename Out>
__global__ void __launch_bounds__(kThreads) normalise(const In* x, const bool* mask, int64_t rows, int64_t width, const double* mean, const bool* finite, double* sizes, double* norms, Out* out) {
  __shared__ double scratch[33];
  const Block block{scratch};
  const int64_t at = blockIdx.x, m = at / rows;
  const double scale = sizes[m * 2];
  x += at * width, out += at * width, mean += m * width;
  const bool wanted = finite[m] && (!mask || mask[at]);
  double square = 0, before = 0;
  if (wanted)
    for (int64_t c = threadIdx.x; c < width; c += blockDim.x) {
      const double value = double(x[c]) * scale, centred = value - mean[c];
      before += value * value, square += centred * centred;
    }
  before = block.sum(before), square = block.sum(square);
  const double norm = sqrt(square), factor = norm > 0 ? 1 / norm : 0;
  for (int64_t c = threadIdx.x; c < width; c += blockDim.x) out[c] = wanted ? Out((double(x[c]) * scale - mean[c]) * factor) : Out(0);
  if (threadIdx.x) return;
  norms[at] = norm;
  atomicMax(reinterpret_cast<unsigned long long*>(sizes + m * 2 + 1), static_cast<unsigned long long>(__double_as_longlong(sqrt(before))));
}

// A row equal to the mean leaves the mean's rounding error, at most N ulp: that is a zero row, not a direction.
template <typename Out>
__global__ void __launch_bounds__(kThreads) zero_rows(int64_t rows, int64_t width, const double* sizes, const double* norms, Out* out) {
  const int64_t m = blockIdx.x;
  const double least = double(rows) * 2.220446049250313e-16 * sizes[m * 2 + 1];
  for (int64_t row = 0; row < rows; ++row)
    if (norms[m * rows + row] <= least)
      for (int64_t c = threadIdx.x; c < width; c += blockDim.x) out[(m * rows + row) * width + c] = Out(0);
}

// A block a matrix, which lives in shared memory with an odd row length, so that a column's entries fall into different banks.
template <typename T>
__global__ void __launch_bounds__(kThreads) jacobi_kernel(const T* gram, int n, double* eigenvalues, double* value, int64_t* sweeps) {
  extern __shared__ __align__(16) unsigned char memory[];
  const int even = n + n % 2, stride = even + 1;
  double* scratch = reinterpret_cast<double*>(memory);
  red::Rotation<T>* turns = reinterpret_cast<red::Rotation<T>*>(scratch + 34);
  T* a = reinterpret_cast<T*>(turns + kMost / 2);
  const Block block{scratch};
  const int64_t m = blockIdx.x;
  for (int at = threadIdx.x; at < even * even; at += blockDim.x) {
    const int i = at / even, j = at % even;
    a[i * stride + j] = i < n && j < n ? gram[(m * n + i) * n + j] : T(0);
  }
  __syncthreads();
  const int taken = red::jacobi(a, even, stride, turns, block);
  red::sorted_diagonal(a, n, stride, eigenvalues + m * n, block);
  const double found = red::effective_rank(eigenvalues + m * n, n, block);
  if (threadIdx.x == 0) sweeps[m] = taken, value[m] = taken < 0 ? nan("") : found;
}

template <typename In, typename Out>
void run(const Tensor& x, const std::optional<Tensor>& mask, Tensor& rows, Tensor& finite, Tensor& count, Tensor& mean, Tensor& norms, Tensor& sizes, cudaStream_t stream) {
  const int64_t matrices = x.size(0), height = x.size(1), width = x.size(2);
  if (matrices * height > 0x7fffffff || width > 65535 * kStrip)
    throw std::runtime_error("red_csrc::normalised_rows: " + std::to_string(matrices * height) + " rows of " + std::to_string(width) + " exceed a grid of 2^31 - 1 rows or " +
                             std::to_string(65535 * kStrip) + " columns; split the batch");
  const In* in = static_cast<const In*>(x.const_data_ptr());
  const bool* valid = mask ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr;
  bool* finites = static_cast<bool*>(finite.mutable_data_ptr());
  int64_t* counts = static_cast<int64_t*>(count.mutable_data_ptr());
  double *means = static_cast<double*>(mean.mutable_data_ptr()), *lengths = static_cast<double*>(norms.mutable_data_ptr());
  double* scales = static_cast<double*>(sizes.mutable_data_ptr());
  Out* out = static_cast<Out*>(rows.mutable_data_ptr());
  prepare<In><<<unsigned(matrices), 1024, 0, stream>>>(in, valid, height, width, scales, finites, counts);
  const dim3 strips(unsigned(matrices), unsigned((width + kStrip - 1) / kStrip));
  column_means<In><<<strips, kThreads, 0, stream>>>(in, valid, height, width, scales, counts, means, finites);
  normalise<In, Out><<<unsigned(matrices * height), kThreads, 0, stream>>>(in, valid, height, width, means, finites, scales, lengths, out);
  zero_rows<Out><<<unsigned(matrices), kThreads, 0, stream>>>(height, width, scales, lengths, out);
  check(cudaGetLastError(), "normalised_rows");
}

// x [M, N, d] float32 or float64, rows [M, N, d] float32 or float64; scratch: mean [M, d], norms [M, N], sizes [M, 2], all float64.
void normalised_rows(Tensor x, std::optional<Tensor> mask, Tensor rows, Tensor finite, Tensor count, Tensor mean, Tensor norms, Tensor sizes, int64_t stream) {
  const OnDevice guard(x.get_device_index());
  const auto on = reinterpret_cast<cudaStream_t>(stream);
  const bool wide = x.scalar_type() == ScalarType::Double, single = rows.scalar_type() == ScalarType::Float;
  if (wide && single) run<double, float>(x, mask, rows, finite, count, mean, norms, sizes, on);
  else if (wide) run<double, double>(x, mask, rows, finite, count, mean, norms, sizes, on);
  else if (single) run<float, float>(x, mask, rows, finite, count, mean, norms, sizes, on);
  else run<float, double>(x, mask, rows, finite, count, mean, norms, sizes, on);
}

template <typename T>
void run_jacobi(const Tensor& gram, Tensor& eigenvalues, Tensor& value, Tensor& sweeps, cudaStream_t stream) {
  const int n = int(gram.size(1)), even = n + n % 2;
  const size_t bytes = 34 * sizeof(double) + kMost / 2 * sizeof(red::Rotation<T>) + size_t(even) * (even + 1) * sizeof(T);
  check(cudaFuncSetAttribute(jacobi_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)), "the shared memory of jacobi");
  jacobi_kernel<T><<<unsigned(gram.size(0)), kThreads, bytes, stream>>>(static_cast<const T*>(gram.const_data_ptr()), n, static_cast<double*>(eigenvalues.mutable_data_ptr()),
                                                                        static_cast<double*>(value.mutable_data_ptr()), static_cast<int64_t*>(sweeps.mutable_data_ptr()));
  check(cudaGetLastError(), "jacobi");
}

// gram [M, n, n] float32 or float64, n <= kMost.
void jacobi(Tensor gram, Tensor eigenvalues, Tensor value, Tensor sweeps, int64_t stream) {
  if (gram.size(1) > kMost) throw std::runtime_error("red_csrc::jacobi: n = " + std::to_string(gram.size(1)) + " exceeds the 128 that shared memory holds");
  const OnDevice guard(gram.get_device_index());
  const auto on = reinterpret_cast<cudaStream_t>(stream);
  if (gram.scalar_type() == ScalarType::Double) run_jacobi<double>(gram, eigenvalues, value, sweeps, on);
  else run_jacobi<float>(gram, eigenvalues, value, sweeps, on);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(red_csrc, CUDA, m) {
  m.impl("normalised_rows", TORCH_BOX(&normalised_rows));
  m.impl("jacobi", TORCH_BOX(&jacobi));
}
