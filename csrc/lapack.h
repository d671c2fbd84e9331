// The BLAS and LAPACK that PyTorch's CPU library brings, by their Fortran names: weak, so that the library loads where a build of PyTorch exports none.
//
// Integers are passed as 64 bits, of which a library with 32-bit integers reads the lower half: right for both on a little-endian machine.
#pragma once

#include <cstdint>

extern "C" {
#define RED_WEAK __attribute__((weak))
RED_WEAK void sgemm_(const char*, const char*, const int64_t*, const int64_t*, const int64_t*, const float*, const float*, const int64_t*, const float*,
                     const int64_t*, const float*, float*, const int64_t*);
RED_WEAK void dgemm_(const char*, const char*, const int64_t*, const int64_t*, const int64_t*, const double*, const double*, const int64_t*, const double*,
                     const int64_t*, const double*, double*, const int64_t*);
RED_WEAK void ssyevd_(const char*, const char*, const int64_t*, float*, const int64_t*, float*, float*, const int64_t*, int64_t*, const int64_t*, int64_t*);
RED_WEAK void dsyevd_(const char*, const char*, const int64_t*, double*, const int64_t*, double*, double*, const int64_t*, int64_t*, const int64_t*, int64_t*);
RED_WEAK int MKL_Set_Num_Threads_Local(int);
}

namespace red {

// While it lives, the library uses one thread in calls from this thread. MKL does so by itself inside a parallel region, but its blocked dsytrd then
// gives wrong eigenvalues (torch 2.13.0 for CPU, n = 512, 2 threads: the sum of their squares was 1.5 % off); told so, it gives the right ones.
class OneThread {
 public:
  explicit OneThread(bool wanted) : set_(wanted && MKL_Set_Num_Threads_Local) {
    if (set_) before_ = MKL_Set_Num_Threads_Local(1);
  }
  OneThread(const OneThread&) = delete;
  OneThread& operator=(const OneThread&) = delete;
  ~OneThread() {
    if (set_) MKL_Set_Num_Threads_Local(before_);
  }

 private:
  bool set_;
  int before_ = 0;
};

inline bool has_lapack() { return sgemm_ && dgemm_ && ssyevd_ && dsyevd_; }

inline void gemm(char ta, char tb, int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float beta, float* c, int64_t ldc) {
  const float alpha = 1;
  sgemm_(&ta, &tb, &m, &n, &k, &alpha, a, &lda, b, &ldb, &beta, c, &ldc);
}

inline void gemm(char ta, char tb, int64_t m, int64_t n, int64_t k, const double* a, int64_t lda, const double* b, int64_t ldb, double beta, double* c, int64_t ldc) {
  const double alpha = 1;
  dgemm_(&ta, &tb, &m, &n, &k, &alpha, a, &lda, b, &ldb, &beta, c, &ldc);
}

// Eigenvalues only, ascending, of the lower triangle of a [n, n]. With lwork = -1, work[0] becomes the length that is best.
inline int64_t syevd(int64_t n, float* a, float* w, float* work, int64_t lwork) {
  int64_t info = 0, one = 1, iwork[2] = {};
  ssyevd_("N", "L", &n, a, &n, w, work, &lwork, iwork, &one, &info);
  return info;
}

inline int64_t syevd(int64_t n, double* a, double* w, double* work, int64_t lwork) {
  int64_t info = 0, one = 1, iwork[2] = {};
  dsyevd_("N", "L", &n, a, &n, w, work, &lwork, iwork, &one, &info);
  return info;
}

}  // namespace red
