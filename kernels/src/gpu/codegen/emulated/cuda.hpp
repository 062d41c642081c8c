// CUDA on threads of the CPU, as far as the kernels of attention need it: one block at a time, 128 threads in four warps.
// A fragment is whole in every thread; what a matrix load or store may assume of its address is checked.
#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

typedef _Float16 __half;
#define __device__
#define __grid_constant__
#define __restrict__

struct Position {
    unsigned x, y, z;
};
static thread_local Position threadIdx, blockIdx;
static const int warpSize = 32;
static const unsigned threads = 128;
static char* shared_memory;

static std::barrier<> of_block(threads);
static std::barrier<> of_warps[4] = {std::barrier<>(32), std::barrier<>(32), std::barrier<>(32), std::barrier<>(32)};
static void __syncthreads() { of_block.arrive_and_wait(); }
static void __syncwarp(unsigned = 0) { of_warps[threadIdx.x / 32].arrive_and_wait(); }

using std::exp;
using std::log;
using std::max;
using std::min;
using std::tanh;

template <typename T, size_t N>
struct array {
    T data[N];
    T& operator[](size_t i) { return data[i]; }
    const T& operator[](size_t i) const { return data[i]; }
};

static void refuse_unless(bool holds, const char* what) {
    if (!holds) {
        fprintf(stderr, "%s\n", what);
        abort();
    }
}

namespace nvcuda::wmma {
struct matrix_a {};
struct matrix_b {};
struct accumulator {};
struct row_major {};
struct col_major {};
enum layout_t { mem_row_major, mem_col_major };

template <class Use, int M, int N, int K, class T, class Layout = void>
struct fragment {
    float x[256];
};

static void check(const void* at, size_t stride_bytes) {
    refuse_unless((uintptr_t)at % 32 == 0, "a matrix does not begin at a multiple of 32 bytes");
    refuse_unless(stride_bytes % 16 == 0, "rows of a matrix are not multiples of 16 bytes apart");
}

template <class Use, class T, class Layout, class P>
void load_matrix_sync(fragment<Use, 16, 16, 16, T, Layout>& f, P const* p, unsigned stride) {
    check(p, stride * sizeof(T));
    const bool by_columns = std::is_same<Layout, col_major>::value;
    for (int i = 0; i < 256; i++) f.x[i] = (float)(by_columns ? p[i % 16 * stride + i / 16] : p[i / 16 * stride + i % 16]);
}

template <class P>
void load_matrix_sync(fragment<accumulator, 16, 16, 16, float>& f, P const* p, unsigned stride, layout_t) {
    check(p, stride * sizeof(float));
    for (int i = 0; i < 256; i++) f.x[i] = p[i / 16 * stride + i % 16];
}

// Each thread of a warp writes eight cells, so that a missing synchronisation shows.
template <class P>
void store_matrix_sync(P* p, fragment<accumulator, 16, 16, 16, float> const& f, unsigned stride, layout_t) {
    check(p, stride * sizeof(float));
    for (int i = threadIdx.x % 32; i < 256; i += 32) p[i / 16 * stride + i % 16] = f.x[i];
}

template <class A, class B>
void mma_sync(fragment<accumulator, 16, 16, 16, float>& d, A const& a, B const& b,
              fragment<accumulator, 16, 16, 16, float> const& c) {
    float sums[256];
    for (int i = 0; i < 256; i++) {
        sums[i] = c.x[i];
        for (int k = 0; k < 16; k++) sums[i] += a.x[i / 16 * 16 + k] * b.x[k * 16 + i % 16];
    }
    memcpy(d.x, sums, sizeof sums);
}

template <class F, class T>
void fill_fragment(F& f, T value) {
    for (float& x : f.x) x = value;
}
}  // namespace nvcuda::wmma

// All blocks of a grid, with garbage in shared memory before each.
template <class Kernel>
void launch(unsigned blocks_x, unsigned blocks_y, Kernel kernel) {
    const size_t bytes = 227 * 1024;
    if (!shared_memory) shared_memory = (char*)aligned_alloc(256, bytes + 256 - bytes % 256);
    for (unsigned block = 0; block < blocks_x * blocks_y; block++) {
        memset(shared_memory, 0xff, bytes);
        std::vector<std::thread> running;
        for (unsigned i = 0; i < threads; i++) {
            running.emplace_back([=] {
                threadIdx = {i, 0, 0};
                blockIdx = {block % blocks_x, block / blocks_x, 0};
                kernel();
            });
        }
        for (auto& thread : running) thread.join();
    }
}
