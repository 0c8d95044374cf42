/* Attention of one new token of each row to its prompt's prefix and its own suffix, in one pass over memory.
 *
 * What is kept where, is cache.py's; how this is called, cpu_attention.py's. All arrays are dense, of
 * float32 or int64. A job is up to a block of rows of one prompt at one head: their queries meet the prefix a
 * tile at a time, and each row's suffix is read once, for all queries of the head.
 */

#include <stdint.h>

#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num(void) { return 0; }
#endif

/* One library for all processors of a kind: which of the versions runs, is decided when it is loaded. A compiler that
 * makes only the slowest of them shall make none: PyTorch's operations are faster. */
#ifndef __x86_64__
#define FOR_EACH_PROCESSOR
#elif defined(__GNUC__) && !defined(__clang__)
#define FOR_EACH_PROCESSOR __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#error "needs GCC on this processor"
#endif
#define ALWAYS_INLINE static inline __attribute__((always_inline))

enum { LANES = 16, TILE = 4 }; /* numbers in a vector; queries that meet the prefix together */
typedef float vector __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t integers __attribute__((vector_size(4 * LANES)));

typedef struct {
    int64_t heads, group; /* of keys and values; queries of each */
    int64_t key_size, value_size;
    int64_t longest, columns; /* tokens that a prefix, a suffix has room for; the first a multiple of LANES */
    int64_t window;           /* tokens that are seen, the newest included; 0: all */
    float scaling;
} Shape;

typedef struct {
    const float *query;                       /* [rows, heads, group, key_size] */
    const float *key, *value;                 /* [rows, heads, size]: the newest token's */
    const float *prefix_keys, *prefix_values; /* [places, heads, key_size, longest], [places, heads, longest, value_size] */
    float *keys, *values;                     /* [rows, heads, columns, size]: the suffixes, that of age a ends at column a */
    const int64_t *length, *age;              /* tokens of each place's prompt, and of each suffix before this one */
    float *out;                               /* [rows, heads, group, value_size] */
} Arrays;

ALWAYS_INLINE float sum_of(vector x)
{
    x += __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    x += __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    x += __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    return x[0] + x[1];
}

/* scores[i][t] = Σ_d queries[i][d] · keys[d][t] for a tile of queries and t from `from`, a multiple of LANES. */
ALWAYS_INLINE void score_prefix(Shape s, const float *queries, const float *keys, int64_t from, float *scores, int64_t width)
{
    int64_t t = from;
    for (; t + 2 * LANES <= s.longest; t += 2 * LANES) {
        vector sum[TILE][2] = {0};
        for (int64_t d = 0; d < s.key_size; d++) {
            const vector *k = (const vector *)(keys + d * s.longest + t);
            for (int i = 0; i < TILE; i++) {
                sum[i][0] += queries[i * s.key_size + d] * k[0];
                sum[i][1] += queries[i * s.key_size + d] * k[1];
            }
        }
        for (int i = 0; i < TILE; i++) {
            vector *to = (vector *)(scores + i * width + t);
            to[0] = sum[i][0], to[1] = sum[i][1];
        }
    }
    if (t < s.longest) {
        vector sum[TILE] = {0};
        for (int64_t d = 0; d < s.key_size; d++)
            for (int i = 0; i < TILE; i++)
                sum[i] += queries[i * s.key_size + d] * *(const vector *)(keys + d * s.longest + t);
        for (int i = 0; i < TILE; i++)
            *(vector *)(scores + i * width + t) = sum[i];
    }
}

/* out[i] = Σ_t weights[i][t] · values[t] for a tile of queries and t from `from`. */
ALWAYS_INLINE void gather_prefix(Shape s, const float *weights, int64_t width, const float *values, int64_t from, float *const *out)
{
    int64_t d = 0;
    for (; d + 2 * LANES <= s.value_size; d += 2 * LANES) {
        vector sum[TILE][2] = {0};
        for (int64_t t = from; t < s.longest; t++) {
            const vector *v = (const vector *)(values + t * s.value_size + d);
            for (int i = 0; i < TILE; i++) {
                sum[i][0] += weights[i * width + t] * v[0];
                sum[i][1] += weights[i * width + t] * v[1];
            }
        }
        for (int i = 0; i < TILE; i++) {
            vector *to = (vector *)(out[i] + d);
            to[0] = sum[i][0], to[1] = sum[i][1];
        }
    }
    for (; d < s.value_size; d++)
        for (int i = 0; i < TILE; i++) {
            float sum = 0;
            for (int64_t t = from; t < s.longest; t++)
                sum += weights[i * width + t] * values[t * s.value_size + d];
            out[i][d] = sum;
        }
}

ALWAYS_INLINE float dot(const float *a, const float *b, int64_t size)
{
    vector sum = {0};
    float total = 0;
    int64_t d = 0;
    for (; d + LANES <= size; d += LANES)
        sum += *(const vector *)(a + d) * *(const vector *)(b + d);
    for (; d < size; d++)
        total += a[d] * b[d];
    return total + sum_of(sum);
}

/* out = (out + Σ_c weights[c] · values[c]) / total. */
ALWAYS_INLINE void gather_suffix(Shape s, const float *weights, const float *values, int64_t from, int64_t to, float total, float *out)
{
    int64_t d = 0;
    for (; d + 2 * LANES <= s.value_size; d += 2 * LANES) {
        vector sum[2][2] = {0}; /* of even and odd columns: each sum waits for its last addition */
        vector *o = (vector *)(out + d);
        int64_t c = from;
        for (; c + 2 <= to; c += 2)
            for (int i = 0; i < 2; i++) {
                const vector *v = (const vector *)(values + (c + i) * s.value_size + d);
                sum[i][0] += weights[c + i] * v[0];
                sum[i][1] += weights[c + i] * v[1];
            }
        if (c < to) {
            const vector *v = (const vector *)(values + c * s.value_size + d);
            sum[0][0] += weights[c] * v[0];
            sum[0][1] += weights[c] * v[1];
        }
        o[0] = (o[0] + sum[0][0] + sum[1][0]) / total;
        o[1] = (o[1] + sum[0][1] + sum[1][1]) / total;
    }
    for (; d < s.value_size; d++) {
        for (int64_t c = from; c < to; c++)
            out[d] += weights[c] * values[c * s.value_size + d];
        out[d] /= total;
    }
}

/* e^x for -80 <= x <= 0, to the last bit or two: 2^n e^r with |r| <= ln 2 / 2, the polynomial being Cephes' expf. */
ALWAYS_INLINE vector exponential(vector x)
{
    const float round = 12582912; /* 1.5 · 2^23: what is added to it is rounded to a whole number, in its last bits */
    vector shifted = x * 1.44269504088896341f + round, n = shifted - round;
    vector r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vector e = r * 1.9875691500e-4f + 1.3981999507e-3f;
    e = e * r + 8.3334519073e-3f;
    e = e * r + 4.1665795894e-2f;
    e = e * r + 1.6666665459e-1f;
    e = e * r + 5.0000001201e-1f;
    e = e * r * r + r + 1;
    return e * (vector)(((integers)shifted + 127) << 23);
}

/* Turn scores into weights exp(score - largest), and return their sum. Up to LANES - 1 more are overwritten. */
ALWAYS_INLINE float weigh(float *scores, int64_t number)
{
    float most = scores[0];
#pragma omp simd reduction(max : most)
    for (int64_t t = 1; t < number; t++)
        most = scores[t] > most ? scores[t] : most;
#pragma omp simd
    for (int64_t t = 0; t < number; t++) { /* e^-80 is nothing; smaller numbers would be denormal, and slow */
        float below = scores[t] - most;
        scores[t] = below < -80 ? -80 : below;
    }
    for (int64_t t = number; t % LANES; t++)
        scores[t] = -80;
    vector sum = {0};
    for (int64_t t = 0; t < number; t += LANES)
        sum += *(vector *)(scores + t) = exponential(*(vector *)(scores + t));
    return sum_of(sum);
}

ALWAYS_INLINE void prefetch(const float *from, int64_t number)
{
    for (int64_t i = 0; i < number; i += LANES)
        __builtin_prefetch(from + i);
}

/* Scores of one query: prefix, suffix, and room for the rest of a vector. */
ALWAYS_INLINE int64_t row_of_scores(const Shape *s) { return s->longest + s->columns + LANES; }

/* How many numbers of scratch a thread needs: a tile of queries and their scores. */
int64_t scratch_of(const Shape *s) { return TILE * (s->key_size + row_of_scores(s)); }

/* The rows of one job. */
FOR_EACH_PROCESSOR
static void attend_job(const Shape *shape, const Arrays *arrays, int64_t place, int64_t head, const int64_t *rows, int64_t number, float *scratch)
{
    const Shape s = *shape;
    const Arrays a = *arrays;
    const int64_t length = a.length[place], padding = s.longest - length, width = row_of_scores(shape);
    const float *prefix_keys = a.prefix_keys + (place * s.heads + head) * s.key_size * s.longest;
    const float *prefix_values = a.prefix_values + (place * s.heads + head) * s.longest * s.value_size;
    float *queries = scratch, *scores = scratch + TILE * s.key_size;

    for (int64_t first = 0; first < number * s.group; first += TILE) {
        int64_t row[TILE], suffix[TILE], begin[TILE], earliest = s.longest;
        float *out[TILE];
        for (int i = 0; i < TILE; i++) { /* the last tile is filled up with the last query */
            int64_t query = first + i < number * s.group ? first + i : number * s.group - 1;
            row[i] = rows[query / s.group];
            suffix[i] = row[i] * s.heads + head;
            int64_t age = a.age[row[i]], unseen = s.window && length + age + 1 > s.window ? length + age + 1 - s.window : 0;
            begin[i] = padding + unseen; /* of what is seen, prefix and suffix being one */
            earliest = begin[i] < earliest ? begin[i] : earliest;
            int64_t at = suffix[i] * s.group + query % s.group;
            out[i] = a.out + at * s.value_size;
            for (int64_t d = 0; d < s.key_size; d++)
                queries[i * s.key_size + d] = a.query[at * s.key_size + d] * s.scaling;

            if (i == 0 || row[i] != row[i - 1]) {
                float *keys = a.keys + suffix[i] * s.columns * s.key_size, *values = a.values + suffix[i] * s.columns * s.value_size;
                prefetch(keys, age * s.key_size);
                prefetch(values, age * s.value_size);
                for (int64_t d = 0; d < s.key_size; d++)
                    keys[age * s.key_size + d] = a.key[suffix[i] * s.key_size + d];
                for (int64_t d = 0; d < s.value_size; d++)
                    values[age * s.value_size + d] = a.value[suffix[i] * s.value_size + d];
            }
        }

        score_prefix(s, queries, prefix_keys, earliest / LANES * LANES, scores, width);
        float total[TILE];
        for (int i = 0; i < TILE; i++) {
            float *own = scores + i * width;
            const float *keys = a.keys + suffix[i] * s.columns * s.key_size;
            int64_t end = a.age[row[i]] + 1;
            for (int64_t c = begin[i] > s.longest ? begin[i] - s.longest : 0; c < end; c++)
                own[s.longest + c] = dot(queries + i * s.key_size, keys + c * s.key_size, s.key_size);
            total[i] = weigh(own + begin[i], s.longest + end - begin[i]);
            for (int64_t t = earliest; t < begin[i] && t < s.longest; t++)
                own[t] = 0;
        }
        gather_prefix(s, scores, width, prefix_values, earliest, out);
        for (int i = 0; i < TILE; i++)
            if (i == 0 || out[i] != out[i - 1])
                gather_suffix(s, scores + i * width + s.longest, a.values + suffix[i] * s.columns * s.value_size,
                              begin[i] > s.longest ? begin[i] - s.longest : 0, a.age[row[i]] + 1, total[i], out[i]);
    }
}

/* blocks: [number, 3], place, first and end of its rows in `rows`. scratch: [threads, scratch_of(shape)]. */
void attend(const Shape *shape, const Arrays *arrays, const int64_t *blocks, int64_t number, const int64_t *rows, int threads, float *scratch)
{
    const int64_t each = scratch_of(shape);
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(threads)
    for (int64_t block = 0; block < number; block++)
        for (int64_t head = 0; head < shape->heads; head++) {
            const int64_t *of = blocks + 3 * block;
            attend_job(shape, arrays, of[0], head, rows + of[1], of[2] - of[1], scratch + omp_get_thread_num() * each);
        }
}
