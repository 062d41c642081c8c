// Both passes of attention by the generated kernels, beside the equations in doubles. Prints for each result how far it is off at
// most, and its largest number. The kernels stand in kernels.hpp, which the test writes with the sizes of their tiles.
#include "cuda.hpp"
#include "kernels.hpp"

#include <random>

// Two sequences, whole and with a window; heads in two groups; no multiple of a tile; rows that see nothing or past the end.
static const unsigned B = 2, S = 70, H = 4, G = 2;
static const float SCALE = 0.3f, CAP = 2.0f;
static std::mt19937 numbers(1);

struct Halves {
    std::vector<double> want;
    __half* got;
    // Random, or not a number until a kernel writes it.
    Halves(size_t heads, bool is_input) : want(B * S * heads * WIDTH) {
        size_t bytes = want.size() * sizeof(__half);
        got = (__half*)aligned_alloc(256, (bytes + 255) / 256 * 256);
        memset(got, 0xff, bytes);
        std::uniform_real_distribution<float> uniform(-1, 1);
        for (size_t i = 0; is_input && i < want.size(); i++) want[i] = got[i] = (__half)uniform(numbers);
    }
};

template <class A, class W>
static void report(const char* name, const A& got, const W& want, size_t count) {
    double off = 0, largest = 0;
    for (size_t i = 0; i < count; i++) {
        if (want[i] < -1e29 && got[i] < -1e29) continue;  // a row that sees nothing
        double distance = fabs((double)got[i] - (double)want[i]);
        off = distance <= off ? off : distance;  // not a number counts
        if (std::isnan(off)) break;
        largest = std::max(largest, fabs((double)want[i]));
    }
    printf("%s %g %g\n", name, off, largest);
}

template <class Info>
static Info info() {
    Info info{};
    info.scalars_usize[0] = info.scalars_usize[1] = S;
    info.scalars_usize[2] = H;
    info.scalars_usize[3] = G;
    info.scalars_f32[0] = SCALE;
    info.scalars_f32[1] = CAP;
    return info;
}

static unsigned tiles(unsigned size) { return (S + size - 1) / size; }

int main() {
    Halves q(H, true), k(G, true), v(G, true), d_out(H, true), out(H, false), dq(H, false), dk(G, false), dv(G, false);
    std::vector<int32_t> ranges;
    for (unsigned i = 0; i < B * S; i++) {
        int row = i % S, first = i < S ? 0 : std::max(row / 9 * 9, row - 20), end = row + 1;
        if (i == S + 20) first = end = 20;
        if (i == S + 69) first = 70, end = 80;
        ranges.insert(ranges.end(), {first, end});
    }
    std::vector<double> lse(B * S * H), delta(B * S * H);
    for (unsigned row = 0; row < B * S * H; row++) {
        unsigned i = row / H, b = i / S, g = row % H / (H / G);
        int first = ranges[2 * i], end = std::min<int>(ranges[2 * i + 1], S);
        std::vector<double> score(S), slope(S);
        double largest = -1e30, sum = 0;
        auto key = [&](int j) { return ((b * S + j) * G + g) * WIDTH; };
        const size_t query = row * WIDTH;
        for (int j = first; j < end; j++) {
            double dot = 0;
            for (int c = 0; c < WIDTH; c++) dot += q.want[query + c] * k.want[key(j) + c];
            double turned = tanh(dot * SCALE / CAP);
            score[j] = turned * CAP, slope[j] = 1 - turned * turned;
            largest = std::max(largest, score[j]);
        }
        for (int j = first; j < end; j++) sum += exp(score[j] - largest);
        lse[row] = first < end ? largest + log(sum) : -1e30;
        for (int j = first; j < end; j++)
            for (int c = 0; c < WIDTH; c++) out.want[query + c] += exp(score[j] - lse[row]) * v.want[key(j) + c];
        for (int c = 0; c < WIDTH; c++) delta[row] += out.want[query + c] * d_out.want[query + c];
        for (int j = first; j < end; j++) {
            double weight = exp(score[j] - lse[row]), d_weight = 0;
            for (int c = 0; c < WIDTH; c++) d_weight += d_out.want[query + c] * v.want[key(j) + c];
            double d_score = weight * (d_weight - delta[row]) * slope[j] * SCALE;
            for (int c = 0; c < WIDTH; c++) {
                dq.want[query + c] += d_score * k.want[key(j) + c];
                dk.want[key(j) + c] += d_score * q.want[query + c];
                dv.want[key(j) + c] += weight * d_out.want[query + c];
            }
        }
    }
    std::vector<float> lse_got(lse.size(), NAN), lse_in(lse.begin(), lse.end()), delta_in(delta.begin(), delta.end());
    {
        using namespace forward;
        auto numbers = info<info_st>();
        launch(tiles(FORWARD_QUERIES), B * H, [&] {
            kernel((V*)q.got, (V*)k.got, (V*)v.got, ranges.data(), (V*)out.got, lse_got.data(), numbers);
        });
    }
    {
        using namespace query_gradient;
        auto numbers = info<info_st>();
        launch(tiles(BACKWARD_QUERIES), B * H, [&] {
            kernel((V*)q.got, (V*)k.got, (V*)v.got, (V*)d_out.got, lse_in.data(), delta_in.data(), ranges.data(), (V*)dq.got,
                   numbers);
        });
    }
    {
        using namespace key_gradient;
        auto numbers = info<info_st>();
        launch(tiles(BACKWARD_KEYS), B * G, [&] {
            kernel((V*)q.got, (V*)k.got, (V*)v.got, (V*)d_out.got, lse_in.data(), delta_in.data(), ranges.data(), (V*)dk.got,
                   (V*)dv.got, numbers);
        });
    }
    report("out", out.got, out.want, out.want.size());
    report("lse", lse_got, lse, lse.size());
    report("dq", dq.got, dq.want, dq.want.size());
    report("dk", dk.got, dk.want, dk.want.size());
    report("dv", dv.got, dv.want, dv.want.size());
}
