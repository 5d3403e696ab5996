/* Forward passes of decoder blocks over pages of keys and values, for CPUs of any make.
 *
 * Values between operations are floats; where the model is bf16 they are rounded to bf16 wherever Transformers' own
 * operations would round, so results differ by the order of sums alone. Matrices stay bf16 in memory and are widened in
 * registers: products are those that fp32 units make, at half the memory traffic, on CPUs without bf16 units too.
 *
 * A matrix (out, in) is packed into panels of NR outputs: (out / NR, in, NR). In bf16, one 32-bit lane j of a panel's row
 * holds output j in its low half and output j + VL in its high half, so widening is one shift and one mask.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define VL 16
#define MR 12
#elif defined(__AVX2__)
#define VL 8
#define MR 6
#else
#define VL 4
#define MR 6
#endif
#define NR (2 * VL)
#define PAGE 32

typedef float vf __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef uint32_t vu __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef uint16_t vh __attribute__((vector_size(VL * 2), aligned(2), may_alias));
typedef uint8_t vb __attribute__((vector_size(VL), aligned(1), may_alias));

typedef struct {
    const void *weight; /* packed */
    const float *bias;  /* (out), or null */
    int64_t out, in;    /* out is a multiple of NR */
    int64_t bits;       /* 8 or 4: whole numbers; 0: of the model's format */
    int64_t group;      /* inputs that share a scale; divides in, and is a multiple of 4 */
    const void *scale;  /* of 8 bits: (out) fp32; of 4: (out / NR, groups, NR) fp16, above 0 */
    const void *zero;   /* of 4 bits: (out / NR, groups, NR), in sixteenths of a step */
    int64_t dynamic;    /* of 8 bits: whether activations are rounded to 8 bits too, each row by its largest */
    int64_t sparse;     /* not of 4 bits: whether two of each four inputs are kept, with indexes; in is a multiple of 16 */
} Linear;

/* One adapter's update of a matrix, in panels of fp32: y += up (out, rank) down (rank, in) x. */
typedef struct {
    Linear down, up; /* without weights where the adapter leaves the matrix as it is */
} LowRank;

/* Tokens of a step that have an adapter. */
typedef struct {
    int64_t groups;         /* adapters in this step */
    const int64_t *adapter; /* of each group */
    const int64_t *first;   /* (groups + 1): where its tokens begin */
    const int64_t *tokens;  /* by group */
} AdapterRows;

typedef struct {
    Linear qkv, o, gate_up, down;
    const LowRank *qkv_low, *o_low, *gate_up_low, *down_low; /* by adapter, or null */
    const float *norm1, *norm2;
    float eps1, eps2, scale;
    int32_t half; /* bf16, else fp32 */
    int64_t width, heads, kv_heads, dim, mlp;
} Block;

typedef struct {
    int64_t tokens;
    const int64_t *slot_mapping;  /* where the keys and values of each token go */
    const int64_t *seen;   /* tokens that each attends to, itself included; 0 where it belongs to no sequence */
    const int64_t *row;    /* of the block tables */
    const int64_t *block_tables;  /* (rows, table_width) */
    int64_t table_width;
    const void *cos, *sin; /* (tokens, dim), of the model's format */
} Step;

int native_panel(void) { return NR; }

static inline vf all(float x) { return x - (vf){0}; }

static inline vf rnd(vf x, int half) {
    if (!half) return x;
    vu u = (vu)x;
    vu r = (u + 0x7fff + ((u >> 16) & 1)) & 0xffff0000u;
    vu number = (vu)(x == x);
    return (vf)((r & number) | ((u | 0x400000u) & ~number));
}

static inline float rnd1(float x, int half) {
    uint32_t u;
    if (!half || x != x) return x;
    memcpy(&u, &x, 4);
    u = (u + 0x7fff + ((u >> 16) & 1)) & 0xffff0000u;
    memcpy(&x, &u, 4);
    return x;
}

static inline float get1(const void *from, int64_t i, int half) {
    float x;
    if (!half) return ((const float *)from)[i];
    uint32_t u = (uint32_t)((const uint16_t *)from)[i] << 16;
    memcpy(&x, &u, 4);
    return x;
}

static inline void put1(void *to, int64_t i, float x, int half) {
    uint32_t u;
    if (!half) {
        ((float *)to)[i] = x;
        return;
    }
    x = rnd1(x, 1);
    memcpy(&u, &x, 4);
    ((uint16_t *)to)[i] = (uint16_t)(u >> 16);
}

static inline vf get(const void *from, int64_t i, int half) {
    if (!half) return *(const vf *)((const float *)from + i);
    vh h = *(const vh *)((const uint16_t *)from + i);
    return (vf)(__builtin_convertvector(h, vu) << 16);
}

static inline float sum(vf x) {
    float s = 0;
    for (int i = 0; i < VL; i++) s += x[i];
    return s;
}

/* exp by range reduction and a polynomial of degree 6 (Cephes), within 2 ulp for x in [-87, 88]. */
static inline vf vexp(vf x) {
    vi low = x < -87.0f;
    vf y = (vf)(((vi)x & ~low) | ((vi)all(-87.0f) & low));
    vi high = y > 88.0f;
    y = (vf)(((vi)y & ~high) | ((vi)all(88.0f) & high));
    vf t = y * 1.44269504f;
    vi n = __builtin_convertvector(t + (vf)(((vi)all(0.5f)) | ((vi)t & (int32_t)0x80000000)), vi);
    vf m = __builtin_convertvector(n, vf);
    vf r = y - m * 0.693359375f + m * 2.12194440e-4f;
    vf p = ((((((1.9875691500e-4f * r + 1.3981999507e-3f) * r + 8.3334519073e-3f) * r + 4.1665795894e-2f) * r +
              1.6666665459e-1f) *
                 r +
             5.0000001201e-1f) *
                r * r +
            r + 1.0f);
    vf e = p * (vf)((n + 127) << 23);
    return (vf)((vi)e & ~low); /* what is below counts as nothing, and minus infinity is */
}

/* ---- matrices ---- */

#define ROWS(R)                                                                                                        \
    static void tile##R(const float *x, int64_t in, const void *panel, int half, float *y, int64_t ystride,            \
                        const float *bias) {                                                                           \
        vf a[R], b[R];                                                                                                 \
        for (int r = 0; r < R; r++) a[r] = b[r] = all(0.0f);                                                           \
        if (half) {                                                                                                    \
            const vu *w = (const vu *)panel;                                                                           \
            for (int64_t k = 0; k < in; k++) {                                                                         \
                vf low = (vf)(w[k] << 16), high = (vf)(w[k] & 0xffff0000u);                                            \
                _Pragma("GCC unroll 16") for (int r = 0; r < R; r++) {                                                 \
                    a[r] += x[r * in + k] * low;                                                                       \
                    b[r] += x[r * in + k] * high;                                                                      \
                }                                                                                                      \
            }                                                                                                          \
        } else {                                                                                                       \
            const vf *w = (const vf *)panel;                                                                           \
            for (int64_t k = 0; k < in; k++) {                                                                         \
                vf low = w[2 * k], high = w[2 * k + 1];                                                                \
                _Pragma("GCC unroll 16") for (int r = 0; r < R; r++) {                                                 \
                    a[r] += x[r * in + k] * low;                                                                       \
                    b[r] += x[r * in + k] * high;                                                                      \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
        for (int r = 0; r < R; r++) {                                                                                  \
            if (bias) a[r] += *(const vf *)bias, b[r] += *(const vf *)(bias + VL);                                     \
            *(vf *)(y + r * ystride) = rnd(a[r], half);                                                                \
            *(vf *)(y + r * ystride + VL) = rnd(b[r], half);                                                           \
        }                                                                                                              \
    }

ROWS(1)
ROWS(2)
ROWS(3)
ROWS(4)
ROWS(5)
ROWS(6)
#if MR > 6
ROWS(7)
ROWS(8)
ROWS(9)
ROWS(10)
ROWS(11)
ROWS(12)
#endif

typedef void (*Tile)(const float *, int64_t, const void *, int, float *, int64_t, const float *);
static const Tile tiles[] = {0, tile1, tile2, tile3, tile4, tile5, tile6,
#if MR > 6
                             tile7, tile8, tile9, tile10, tile11, tile12
#endif
};

#define SMALL (1 << 16) /* multiplications, or a quarter of that in copies, that are done before other threads are awake */
#define CHUNK 96 /* rows that stay in the second-level cache while panels pass by */

/* ---- matrices of whole numbers ----
 *
 * A 32-bit lane j of a panel's row holds 2 inputs (8 bits) or 4 (4 bits) of outputs j and j + VL in turn, least first.
 * Sums are of x times whole numbers, which floats hold exactly, and are scaled at their end: so it makes no difference to
 * the bits of a result whether a panel is widened on the way or, for many rows, once beforehand. */

#define WIDEN8(v, at) __builtin_convertvector((vi)((v) << (24 - 8 * (at))) >> 24, vf)
#define WIDEN4(v, at) __builtin_convertvector((vi)(((v) >> (4 * (at))) & 15), vf)
#define ADD(R, k, low, high)                                                                                           \
    do {                                                                                                               \
        vf l_ = low, h_ = high;                                                                                        \
        _Pragma("GCC unroll 16") for (int r = 0; r < R; r++) {                                                         \
            a[r] += x[r * stride + k] * l_;                                                                            \
            b[r] += x[r * stride + k] * h_;                                                                            \
        }                                                                                                              \
    } while (0)
#define SUM(NAME, R, BODY)                                                                                             \
    static void NAME##R(const float *x, int64_t stride, int64_t n, const void *panel, vf *s) {                         \
        vf a[R], b[R];                                                                                                 \
        for (int r = 0; r < R; r++) a[r] = b[r] = all(0.0f);                                                           \
        BODY                                                                                                           \
        for (int r = 0; r < R; r++) s[2 * r] = a[r], s[2 * r + 1] = b[r];                                              \
    }
#define SUMS(R)                                                                                                        \
    SUM(eight, R, for (int64_t k = 0; k < n; k += 2) {                                                                 \
        vu v = ((const vu *)panel)[k / 2];                                                                             \
        ADD(R, k, WIDEN8(v, 0), WIDEN8(v, 1));                                                                         \
        ADD(R, k + 1, WIDEN8(v, 2), WIDEN8(v, 3));                                                                     \
    })                                                                                                                 \
    SUM(four, R, for (int64_t k = 0; k < n; k += 4) {                                                                  \
        vu v = ((const vu *)panel)[k / 4];                                                                             \
        ADD(R, k, WIDEN4(v, 0), WIDEN4(v, 1));                                                                         \
        ADD(R, k + 1, WIDEN4(v, 2), WIDEN4(v, 3));                                                                     \
        ADD(R, k + 2, WIDEN4(v, 4), WIDEN4(v, 5));                                                                     \
        ADD(R, k + 3, WIDEN4(v, 6), WIDEN4(v, 7));                                                                     \
    })                                                                                                                 \
    SUM(wide, R, for (int64_t k = 0; k < n; k++) {                                                                     \
        ADD(R, k, ((const vf *)panel)[2 * k], ((const vf *)panel)[2 * k + 1]);                                         \
    })

SUMS(1)
SUMS(2)
SUMS(3)
SUMS(4)
SUMS(5)
SUMS(6)
#if MR > 6
SUMS(7)
SUMS(8)
SUMS(9)
SUMS(10)
SUMS(11)
SUMS(12)
#endif

/* ---- 2:4 matrices ----
 *
 * Of four inputs in a row an output has at most two weights that are not zero. A panel's 16 inputs are one row of lanes of
 * indexes and then the kept weights, two of each group of four, as if these were all inputs of a dense panel. The indexes
 * of a group take 8 bits of a lane: those of output j's first and second weight, then of output j + VL's, 2 bits each,
 * least first. What is left out of a sum are products with zero, so results are those of the dense matrix, bit for bit,
 * as long as activations are finite. */

/* Lane i of the result is number index[i] % 4 of the four in its 128 bits. */
static inline vf pick(vf four, vu index) {
#if defined(__AVX512F__)
    return (vf)_mm512_permutevar_ps((__m512)four, (__m512i)index);
#elif defined(__AVX2__)
    return (vf)_mm256_permutevar_ps((__m256)four, (__m256i)index);
#else
    vf picked;
    for (int i = 0; i < VL; i++) picked[i] = four[i / 4 * 4 + (index[i] & 3)];
    return picked;
#endif
}

/* Four activations, in every 128 bits. */
static inline vf quad(const float *x) {
#if defined(__AVX512F__)
    return (vf)_mm512_broadcast_f32x4(_mm_loadu_ps(x));
#elif defined(__AVX2__)
    return (vf)_mm256_broadcast_ps((const __m128 *)x);
#else
    return *(const vf *)x;
#endif
}

#define KEPT(R, k, bits, low, high, low2, high2)                                                                       \
    do {                                                                                                               \
        vf l_ = low, h_ = high, l2_ = low2, h2_ = high2;                                                               \
        vu i_ = bits, j_ = i_ >> 2, k_ = i_ >> 4, m_ = i_ >> 6;                                                        \
        _Pragma("GCC unroll 16") for (int r = 0; r < R; r++) {                                                         \
            vf four = quad(x + r * stride + (k));                                                                      \
            a[r] += pick(four, i_) * l_;                                                                               \
            b[r] += pick(four, k_) * h_;                                                                               \
            a[r] += pick(four, j_) * l2_;                                                                              \
            b[r] += pick(four, m_) * h2_;                                                                              \
        }                                                                                                              \
    } while (0)
#define LOW(v) (vf)((v) << 16)
#define HIGH(v) (vf)((v) & 0xffff0000u)
#define KEPT_SUM(NAME, R, LANES, GROUP)                                                                                \
    SUM(NAME, R, const vu *w = (const vu *)panel; for (int64_t k = 0; k < n; k += 16, w += 1 + 4 * LANES) {            \
        vu index = w[0];                                                                                               \
        _Pragma("GCC unroll 4") for (int g = 0; g < 4; g++) {                                                          \
            const vu *v = w + 1 + g * LANES;                                                                           \
            GROUP(R, k + 4 * g, index >> (8 * g), v);                                                                  \
        }                                                                                                              \
    })
#define FLOATS(R, k, i, v) KEPT(R, k, i, (vf)(v)[0], (vf)(v)[1], (vf)(v)[2], (vf)(v)[3])
#define HALVES(R, k, i, v) KEPT(R, k, i, LOW((v)[0]), HIGH((v)[0]), LOW((v)[1]), HIGH((v)[1]))
#define EIGHTS(R, k, i, v)                                                                                             \
    KEPT(R, k, i, WIDEN8((v)[0], 0), WIDEN8((v)[0], 1), WIDEN8((v)[0], 2), WIDEN8((v)[0], 3))
#define KEPT_SUMS(R)                                                                                                   \
    KEPT_SUM(kept_float, R, 4, FLOATS)                                                                                 \
    KEPT_SUM(kept_half, R, 2, HALVES)                                                                                  \
    KEPT_SUM(kept_eight, R, 1, EIGHTS)

#define SPARSE_ROWS 4 /* rows that share a pass over a packed panel */
KEPT_SUMS(1)
KEPT_SUMS(2)
KEPT_SUMS(3)
KEPT_SUMS(4)

typedef void (*Sum)(const float *, int64_t, int64_t, const void *, vf *);
#define EACH_KEPT(NAME) {0, NAME##1, NAME##2, NAME##3, NAME##4}
static const Sum kept_floats[] = EACH_KEPT(kept_float), kept_halves[] = EACH_KEPT(kept_half),
                 kept_eights[] = EACH_KEPT(kept_eight);
#if MR > 6
#define EACH(NAME)                                                                                                     \
    {0, NAME##1, NAME##2, NAME##3, NAME##4, NAME##5, NAME##6, NAME##7, NAME##8, NAME##9, NAME##10, NAME##11, NAME##12}
#else
#define EACH(NAME) {0, NAME##1, NAME##2, NAME##3, NAME##4, NAME##5, NAME##6}
#endif
static const Sum eights[] = EACH(eight), fours[] = EACH(four), wides[] = EACH(wide);

/* A panel's whole numbers as floats: (in, NR). */
static void widen(const void *panel, int64_t in, int64_t bits, float *to) {
    for (int64_t i = 0; i < in * bits / 16; i++) {
        vu v = ((const vu *)panel)[i];
        for (int n = 0; n < 32 / bits; n++)
            ((vf *)to)[i * 32 / bits + n] = bits == 8 ? WIDEN8(v, n) : WIDEN4(v, n);
    }
}

/* fp16 above 0 to fp32, subnormal ones too */
static inline vf scales(const void *from, int64_t i) {
    vh h = *(const vh *)((const uint16_t *)from + i);
    return (vf)(__builtin_convertvector(h, vu) << 13) * 0x1p112f;
}

static inline vf zeros(const void *from, int64_t i) {
    vb b = *(const vb *)((const uint8_t *)from + i);
    return __builtin_convertvector(__builtin_convertvector(b, vi), vf) * (1.0f / 16.0f);
}

/* A row of activations as whole numbers from -128 to 127, in floats; return what one of them stands for. */
static float round_row(const float *x, int64_t n, float *to) {
    float most = 0;
    for (int64_t k = 0; k < n; k++) most = fabsf(x[k]) > most ? fabsf(x[k]) : most;
    float step = most / 127.5f;
    step = step > 1.1920929e-7f ? step : 1.1920929e-7f;
    float many = 1.0f / step; /* torchao multiplies, too */
    for (int64_t k = 0; k < n; k++) {
        float q = rintf(x[k] * many);
        to[k] = q > 127 ? 127 : q;
    }
    return step;
}

static int64_t panel_bytes(const Linear *l, int half) {
    int64_t all = l->in * NR * (l->bits ? l->bits : half ? 16 : 32) / 8;
    return l->sparse ? all / 2 + l->in / 16 * VL * 4 : all;
}

static Sum sum_of(const Linear *l, int half, int64_t rows) {
    if (!l->sparse) return l->bits == 8 ? eights[rows] : fours[rows];
    return l->bits ? kept_eights[rows] : half ? kept_halves[rows] : kept_floats[rows];
}

/* R rows of y at one panel; sums (R, groups) of each group of x; steps (R), or null, that rows are scaled by at the end */
static void tile_of_few(const Linear *l, int64_t p, const float *x, int64_t rows, const void *panel, int is_wide,
                        const float *sums, const float *steps, float *y, int half) {
    int64_t groups = l->in / l->group, size = l->group * NR * (is_wide ? 32 : l->bits) / 8;
    Sum sum = is_wide ? wides[rows] : sum_of(l, half, rows);
    vf total[2 * MR], s[2 * MR];
    for (int r = 0; r < 2 * rows; r++) total[r] = all(0.0f);
    for (int64_t g = 0; g < groups; g++) {
        sum(x + g * l->group, l->in, l->group, (const char *)panel + g * size, s);
        for (int h = 0; h < 2; h++) {
            if (!l->bits) {
                for (int r = 0; r < rows; r++) total[2 * r + h] = s[2 * r + h];
            } else if (l->bits == 8) {
                vf scale = *(const vf *)((const float *)l->scale + p * NR + h * VL);
                for (int r = 0; r < rows; r++) total[2 * r + h] = s[2 * r + h] * scale;
            } else {
                int64_t at = (p * groups + g) * NR + h * VL;
                vf scale = scales(l->scale, at), zero = zeros(l->zero, at);
                for (int r = 0; r < rows; r++)
                    total[2 * r + h] += (s[2 * r + h] - sums[r * groups + g] * zero) * scale;
            }
        }
    }
    for (int r = 0; r < rows; r++)
        for (int h = 0; h < 2; h++) {
            vf found = total[2 * r + h];
            if (steps) found *= steps[r];
            if (l->bias) found += *(const vf *)(l->bias + p * NR + h * VL);
            *(vf *)(y + r * l->out + p * NR + h * VL) = rnd(found, half);
        }
}

static void multiply_few(const Linear *l, const float *x, int64_t rows, float *y, int half) {
    int64_t panels = l->out / NR, bytes = panel_bytes(l, half), groups = l->in / l->group;
    float *sums = 0, *steps = 0;
    if (l->dynamic) { /* products of whole numbers: floats add them up exactly, or nearly where there are thousands */
        steps = __builtin_malloc(sizeof(float) * rows * (l->in + 1));
        float *rounded = steps + rows;
#pragma omp parallel for schedule(static) if (rows * l->in > SMALL / 4)
        for (int64_t i = 0; i < rows; i++) steps[i] = round_row(x + i * l->in, l->in, rounded + i * l->in);
        x = rounded;
    }
    if (l->bits == 4) {
        sums = __builtin_malloc(sizeof(float) * rows * groups);
        for (int64_t i = 0; i < rows * groups; i++) {
            float s = 0;
            for (int64_t k = 0; k < l->group; k++) s += x[i / groups * l->in + i % groups * l->group + k];
            sums[i] = s;
        }
    }
    for (int64_t first = 0; first < rows; first += CHUNK) {
        int64_t end = first + CHUNK < rows ? first + CHUNK : rows;
        int is_wide = !l->sparse && end - first > 2 * MR; /* 2:4 panels are as fast as they are */
        int64_t step = l->sparse ? SPARSE_ROWS : MR;
#pragma omp parallel if ((end - first) * l->out * l->in > SMALL)
        {
            float *room = is_wide ? __builtin_malloc(sizeof(float) * l->in * NR + 64) : 0;
            float *aligned = (float *)(((uintptr_t)room + 63) / 64 * 64);
#pragma omp for schedule(static)
            for (int64_t p = 0; p < panels; p++) {
                const void *panel = (const char *)l->weight + p * bytes;
                if (is_wide) widen(panel, l->in, l->bits, aligned), panel = aligned;
                for (int64_t r = first; r < end; r += step)
                    tile_of_few(l, p, x + r * l->in, end - r < step ? end - r : step, panel, is_wide,
                                sums ? sums + r * groups : 0, steps ? steps + r : 0, y + r * l->out, half);
            }
            __builtin_free(room);
        }
    }
    __builtin_free(sums);
    __builtin_free(steps);
}

/* y (rows, out) = x (rows, in) of a packed matrix */
static void multiply(const Linear *l, const float *x, int64_t rows, float *y, int half) {
    if (l->bits || l->sparse) {
        multiply_few(l, x, rows, y, half);
        return;
    }
    int64_t panels = l->out / NR, bytes = l->in * NR * (half ? 2 : 4);
    for (int64_t first = 0; first < rows; first += CHUNK) {
        int64_t end = first + CHUNK < rows ? first + CHUNK : rows;
#pragma omp parallel for schedule(static) if ((end - first) * l->out * l->in > SMALL)
        for (int64_t p = 0; p < panels; p++)
            for (int64_t r = first; r < end; r += MR)
                tiles[end - r < MR ? end - r : MR](x + r * l->in, l->in, (const char *)l->weight + p * bytes, half,
                                                  y + r * l->out + p * NR, l->out, l->bias ? l->bias + p * NR : 0);
    }
}

/* y (rows, out) += the update of each row's adapter, of x (rows, in). The rows of an adapter are multiplied together; what
 * a row gets depends on itself alone, bit for bit. As in PEFT, sums are fp32 and the total is rounded. */
static void add_low_rank(const LowRank *all, const AdapterRows *s, const float *x, int64_t in, float *y, int64_t out,
                         int half) {
    for (int64_t g = 0; all && s && g < s->groups; g++) {
        const LowRank *l = all + s->adapter[g];
        if (!l->down.weight) continue;
        const int64_t *tokens = s->tokens + s->first[g], n = s->first[g + 1] - s->first[g];
        float *own = __builtin_malloc(sizeof(float) * n * (in + l->down.out + out));
        float *mid = own + n * in, *more = mid + n * l->down.out;
        for (int64_t i = 0; i < n; i++) memcpy(own + i * in, x + tokens[i] * in, sizeof(float) * in);
        multiply(&l->down, own, n, mid, 0);
        multiply(&l->up, mid, n, more, 0);
        for (int64_t i = 0; i < n; i++)
            for (int64_t k = 0; k < out; k += VL) {
                vf *to = (vf *)(y + tokens[i] * out + k);
                *to = rnd(*to + *(vf *)(more + i * out + k), half);
            }
        __builtin_free(own);
    }
}

/* out (rows, columns) = in (rows, in) of a packed matrix of at least as many columns, both of the model's format */
void native_linear(const Linear *l, const LowRank *low, const AdapterRows *adapters, const void *in, void *out,
                   int64_t rows, int64_t columns, float *scratch, int32_t half) {
    float *x = scratch, *y = scratch + rows * l->in;
#pragma omp parallel for schedule(static) if (rows * l->in > SMALL / 4)
    for (int64_t i = 0; i < rows; i++)
        for (int64_t k = 0; k < l->in; k++) x[i * l->in + k] = get1(in, i * l->in + k, half);
    multiply(l, x, rows, y, half);
    add_low_rank(low, adapters, x, l->in, y, l->out, half);
#pragma omp parallel for schedule(static) if (rows * columns > SMALL / 4)
    for (int64_t i = 0; i < rows; i++)
        for (int64_t k = 0; k < columns; k++) put1(out, i * columns + k, y[i * l->out + k], half);
}

/* ---- attention ---- */

/* Pages of one layer: keys (pages, kv_heads, dim, PAGE), so that scores of several keys come in one register; values
 * (pages, kv_heads, PAGE, dim). What a token gets depends on its own sequence alone, bit for bit: no sum's order
 * depends on what else is computed. */

#if VL > 8
#define AV 1 /* vectors in a tile's row: its width must divide that of any head and a page */
#else
#define AV 2
#endif
#define AW (AV * VL)
#define AROWS 24    /* rows that share a page while it is in the first-level cache */
#define ROOM 65536  /* scores that stay in the second-level cache */

/* s (R, AW of a page) = scale * q (R, dim) k (dim, AW of a page); out (R, AW of dim) += p (R, keys) v (keys, AW of dim) */
#define TILES(R)                                                                                                       \
    static void score##R(const float *q, const float *k, int64_t dim, float scale, float *s, int64_t sstride) {        \
        vf a[R][AV];                                                                                                   \
        for (int r = 0; r < R; r++)                                                                                    \
            for (int v = 0; v < AV; v++) a[r][v] = all(0.0f);                                                          \
        for (int64_t d = 0; d < dim; d++) {                                                                            \
            const vf *row = (const vf *)(k + d * PAGE);                                                                \
            _Pragma("GCC unroll 12") for (int r = 0; r < R; r++)                                                       \
                _Pragma("GCC unroll 2") for (int v = 0; v < AV; v++) a[r][v] += q[r * dim + d] * row[v];               \
        }                                                                                                              \
        for (int r = 0; r < R; r++)                                                                                    \
            for (int v = 0; v < AV; v++) *(vf *)(s + r * sstride + v * VL) = a[r][v] * scale;                          \
    }                                                                                                                  \
    static void mix##R(const float *p, int64_t pstride, const float *values, int64_t keys, int64_t dim, float *out) {  \
        vf a[R][AV];                                                                                                   \
        for (int r = 0; r < R; r++)                                                                                    \
            for (int v = 0; v < AV; v++) a[r][v] = *(const vf *)(out + r * dim + v * VL);                              \
        for (int64_t j = 0; j < keys; j++) {                                                                           \
            const vf *row = (const vf *)(values + j * dim);                                                            \
            _Pragma("GCC unroll 12") for (int r = 0; r < R; r++)                                                       \
                _Pragma("GCC unroll 2") for (int v = 0; v < AV; v++) a[r][v] += p[r * pstride + j] * row[v];           \
        }                                                                                                              \
        for (int r = 0; r < R; r++)                                                                                    \
            for (int v = 0; v < AV; v++) *(vf *)(out + r * dim + v * VL) = a[r][v];                                    \
    }

TILES(1)
TILES(2)
TILES(3)
TILES(4)
TILES(5)
TILES(6)
#if MR > 6
TILES(7)
TILES(8)
TILES(9)
TILES(10)
TILES(11)
TILES(12)
#endif

typedef void (*Score)(const float *, const float *, int64_t, float, float *, int64_t);
typedef void (*Mix)(const float *, int64_t, const float *, int64_t, int64_t, float *);
#if MR > 6
static const Score score[] = {0,      score1, score2, score3,  score4,  score5, score6,
                              score7, score8, score9, score10, score11, score12};
static const Mix mix[] = {0, mix1, mix2, mix3, mix4, mix5, mix6, mix7, mix8, mix9, mix10, mix11, mix12};
#else
static const Score score[] = {0, score1, score2, score3, score4, score5, score6};
static const Mix mix[] = {0, mix1, mix2, mix3, mix4, mix5, mix6};
#endif

/* Page `at` of `size` numbers as floats: as it stands, or widened into room. */
static inline const float *page_of(const void *arena, int64_t at, int64_t size, int half, float *room) {
    if (!half) return (const float *)arena + at * size;
    for (int64_t i = 0; i < size; i += VL) *(vf *)(room + i) = get(arena, at * size + i, 1);
    return room;
}

/* Turn the first n scores of a row into their exponentials, the others up to `end` into zeros; return their sum. */
static float exponentials(float *s, int64_t n, int64_t end) {
    for (int64_t j = n; j < end; j++) s[j] = -INFINITY;
    vf most = all(-INFINITY), total = all(0.0f);
    for (int64_t j = 0; j < n; j += VL) {
        vf x = *(vf *)(s + j);
        vi more = x > most;
        most = (vf)(((vi)x & more) | ((vi)most & ~more));
    }
    float top = most[0];
    for (int i = 1; i < VL; i++) top = most[i] > top ? most[i] : top;
    for (int64_t j = 0; j < end; j += VL) {
        vf e = vexp(*(vf *)(s + j) - top);
        *(vf *)(s + j) = e;
        total += e;
    }
    return sum(total);
}

/* Heads that share keys, of `count` consecutive tokens of one sequence, the first of which sees `seen`.
 * q: (count, group, dim) at a stride between tokens; out: likewise, dense between a token's heads.
 * room: AROWS * (scores + 2 dim) and a page, in floats. */
static void attend(const float *q, int64_t qstride, int64_t count, int64_t group, int64_t dim, const void *keys,
                   const void *values, int64_t kv_heads, int64_t head, const int64_t *pages, int64_t seen, float scale,
                   int half, float *room, float *out, int64_t ostride) {
    int64_t rows = count * group, last = seen + count - 1, used = (last + PAGE - 1) / PAGE, end = used * PAGE;
    float *asked = room, *mixed = asked + rows * dim, *page = mixed + rows * dim, *scores = page + PAGE * dim;
    for (int64_t i = 0; i < count; i++) memcpy(asked + i * group * dim, q + i * qstride, sizeof(float) * group * dim);
    memset(mixed, 0, sizeof(float) * rows * dim);
    for (int64_t p = 0; p < used; p++) {
        const float *k = page_of(keys, pages[p] * kv_heads + head, PAGE * dim, half, page);
        for (int64_t r = 0; r < rows; r += MR)
            for (int64_t j = 0; j < PAGE; j += AW)
                score[rows - r < MR ? rows - r : MR](asked + r * dim, k + j, dim, scale, scores + r * end + p * PAGE + j, end);
    }
    float total[AROWS];
    for (int64_t r = 0; r < rows; r++) total[r] = exponentials(scores + r * end, seen + r / group, end);
    for (int64_t p = 0; p < used; p++) {
        const float *v = page_of(values, pages[p] * kv_heads + head, PAGE * dim, half, page);
        int64_t there = last - p * PAGE < PAGE ? last - p * PAGE : PAGE;
        for (int64_t r = 0; r < rows; r += MR)
            for (int64_t d = 0; d < dim; d += AW)
                mix[rows - r < MR ? rows - r : MR](scores + r * end + p * PAGE, end, v + d, there, dim, mixed + r * dim + d);
    }
    for (int64_t r = 0; r < rows; r++)
        for (int64_t d = 0; d < dim; d += VL)
            *(vf *)(out + r / group * ostride + r % group * dim + d) = rnd(*(vf *)(mixed + r * dim + d) / total[r], half);
}

/* out (tokens, heads * dim) from q (tokens, heads * dim at a stride) */
static void attention(const Step *s, const float *q, int64_t qstride, int64_t heads, int64_t kv_heads, int64_t dim,
                      const void *keys, const void *values, float scale, int half, float *out) {
    int64_t group = heads / kv_heads, longest = 1, num = 0, work = 0;
    for (int64_t i = 0; i < s->tokens; i++) {
        longest = s->seen[i] > longest ? s->seen[i] : longest;
        work += s->seen[i];
    }
    longest = (longest + PAGE - 1) / PAGE * PAGE;
    int64_t most = ROOM / longest < AROWS ? ROOM / longest : AROWS;
    most = most / group ? most / group : 1;
    int64_t *first = __builtin_malloc(sizeof(int64_t) * (s->tokens + 1)); /* of tiles: tokens that share what they see */
    for (int64_t i = 0; i < s->tokens; i++)
        if (!i || i - first[num - 1] >= most || s->row[i] != s->row[i - 1] || s->seen[i] != s->seen[i - 1] + 1)
            first[num++] = i;
    first[num] = s->tokens;
#pragma omp parallel if (work * heads * dim > SMALL / 2)
    {
        float *room = __builtin_malloc(sizeof(float) * (most * group * (2 * dim + longest) + PAGE * dim));
#pragma omp for schedule(dynamic, 1)
        for (int64_t n = 0; n < num * kv_heads; n++) {
            int64_t i = first[n / kv_heads], count = first[n / kv_heads + 1] - i, h = n % kv_heads;
            float *to = out + i * heads * dim + h * group * dim;
            if (!s->seen[i])
                for (int64_t k = 0; k < count; k++) memset(to + k * heads * dim, 0, sizeof(float) * group * dim);
            else
                attend(q + i * qstride + h * group * dim, qstride, count, group, dim, keys, values, kv_heads, h,
                       s->block_tables + s->row[i] * s->table_width, s->seen[i], scale, half, room, to, heads * dim);
        }
        __builtin_free(room);
    }
    __builtin_free(first);
}

/* Write one token's keys and values, (kv_heads * dim) floats each. */
static void keep(void *keys, void *values, int64_t slot, int64_t kv_heads, int64_t dim, const float *k, const float *v,
                 int half) {
    int64_t page = slot / PAGE, at = slot % PAGE;
    for (int64_t h = 0; h < kv_heads; h++) {
        int64_t block = (page * kv_heads + h) * PAGE * dim;
        for (int64_t d = 0; d < dim; d++) {
            put1(keys, block + d * PAGE + at, k[h * dim + d], half);
            put1(values, block + at * dim + d, v[h * dim + d], half);
        }
    }
}

/* ---- a block ---- */

static void normalise(const float *x, const float *weight, float eps, int64_t rows, int64_t width, float *y, int half) {
#pragma omp parallel for schedule(static) if (rows > 4)
    for (int64_t i = 0; i < rows; i++) {
        const float *a = x + i * width;
        float *b = y + i * width;
        vf s = all(0.0f);
        for (int64_t k = 0; k < width; k += VL) s += *(const vf *)(a + k) * *(const vf *)(a + k);
        float r = 1.0f / sqrtf(sum(s) / (float)width + eps);
        for (int64_t k = 0; k < width; k += VL)
            *(vf *)(b + k) = rnd(*(const vf *)(weight + k) * rnd(*(const vf *)(a + k) * r, half), half);
    }
}

static void rotate(float *x, const Step *s, int64_t i, int64_t dim, int half) {
    for (int64_t d = 0; d < dim / 2; d++) {
        int64_t e = d + dim / 2;
        float a = x[d], b = x[e];
        x[d] = rnd1(rnd1(a * get1(s->cos, i * dim + d, half), half) + rnd1(-b * get1(s->sin, i * dim + d, half), half), half);
        x[e] = rnd1(rnd1(b * get1(s->cos, i * dim + e, half), half) + rnd1(a * get1(s->sin, i * dim + e, half), half), half);
    }
}

/* One block of Llama's make; in and out (tokens, width) of the model's format may be the same.
 * scratch: tokens * (2 width + qkv.out + heads * dim + gate_up.out) floats. */
void native_block(const Block *b, const Step *s, const AdapterRows *adapters, void *keys, void *values, const void *in,
                  void *out, float *scratch) {
    int64_t n = s->tokens, w = b->width, qw = b->heads * b->dim, kw = b->kv_heads * b->dim;
    int half = b->half;
    float *x = scratch, *y = x + n * w, *qkv = y + n * w, *att = qkv + n * b->qkv.out, *mid = att + n * qw;
    for (int64_t i = 0; i < n * w; i += VL) *(vf *)(x + i) = get(in, i, half);
    normalise(x, b->norm1, b->eps1, n, w, y, half);
    multiply(&b->qkv, y, n, qkv, half);
    add_low_rank(b->qkv_low, adapters, y, w, qkv, b->qkv.out, half);
#pragma omp parallel for schedule(static) if (n > 4)
    for (int64_t i = 0; i < n; i++) {
        float *row = qkv + i * b->qkv.out;
        for (int64_t h = 0; h < b->heads + b->kv_heads; h++) rotate(row + h * b->dim, s, i, b->dim, half);
        keep(keys, values, s->slot_mapping[i], b->kv_heads, b->dim, row + qw, row + qw + kw, half);
    }
    attention(s, qkv, b->qkv.out, b->heads, b->kv_heads, b->dim, keys, values, b->scale, half, att);
    multiply(&b->o, att, n, y, half);
    add_low_rank(b->o_low, adapters, att, qw, y, w, half);
    for (int64_t i = 0; i < n * w; i += VL) *(vf *)(x + i) = rnd(*(vf *)(x + i) + *(vf *)(y + i), half);
    normalise(x, b->norm2, b->eps2, n, w, y, half);
    multiply(&b->gate_up, y, n, mid, half);
    add_low_rank(b->gate_up_low, adapters, y, w, mid, b->gate_up.out, half);
#pragma omp parallel for schedule(static) if (n > 1)
    for (int64_t i = 0; i < n; i++)
        for (int64_t k = 0; k < b->mlp; k += VL) {
            float *g = mid + i * b->gate_up.out + k;
            vf a = *(vf *)g, up = *(vf *)(g + b->mlp);
            vf act = rnd(a / (1.0f + vexp(-a)), half);
            *(vf *)(mid + i * b->gate_up.out + k) = rnd(act * up, half);
        }
    /* the products stand at the stride of both halves: close the gaps for the last matrix */
    for (int64_t i = 1; i < n; i++) memmove(mid + i * b->mlp, mid + i * b->gate_up.out, sizeof(float) * b->mlp);
    multiply(&b->down, mid, n, y, half);
    add_low_rank(b->down_low, adapters, mid, b->mlp, y, w, half);
    for (int64_t i = 0; i < n * w; i++) put1(out, i, x[i] + y[i], half);
}

/* Attention alone: q and out (tokens, heads, dim), k and v (tokens, kv_heads, dim) of the model's format.
 * scratch: 2 * tokens * (heads + kv_heads) * dim floats. */
void native_attention(const Step *s, const void *q, const void *k, const void *v, void *out, void *keys, void *values,
                      int64_t heads, int64_t kv_heads, int64_t dim, float scale, int32_t half, float *scratch) {
    int64_t n = s->tokens * heads * dim, m = s->tokens * kv_heads * dim;
    float *asked = scratch, *found = asked + n, *new_keys = found + n, *new_values = new_keys + m;
    for (int64_t i = 0; i < n; i += VL) *(vf *)(asked + i) = get(q, i, half);
    for (int64_t i = 0; i < m; i += VL) {
        *(vf *)(new_keys + i) = get(k, i, half);
        *(vf *)(new_values + i) = get(v, i, half);
    }
    for (int64_t i = 0; i < s->tokens; i++)
        keep(keys, values, s->slot_mapping[i], kv_heads, dim, new_keys + i * kv_heads * dim, new_values + i * kv_heads * dim, half);
    attention(s, asked, heads * dim, heads, kv_heads, dim, keys, values, scale, half, found);
    for (int64_t i = 0; i < n; i++) put1(out, i, found[i], half);
}
