// The C interface of libqvgen_cpu, as qvgen/kernels/cpu/library.py declares it again with ctypes. Raw pointers only: the
// library knows neither Python nor libtorch, so one build serves every version of both.
#pragma once

#include <cstdint>

extern "C" {

enum qvgen_status : int {
  QVGEN_OK = 0,
  QVGEN_NOT_A_WEIGHT = 1,     // the bytes are not panels made by qvgen_pack_panels, or of another shape
  QVGEN_TIMESTEP_GROUP = 2,   // a timestep group without clips
  QVGEN_OUT_OF_MEMORY = 3,
  QVGEN_UNSUPPORTED_ISA = 4,
  QVGEN_TOO_MANY_LAYERS = 5,
};

// One linear layer and where its outputs go. Matrices are row-major and contiguous.
struct qvgen_layer {
  const uint8_t* weight;      // as qvgen_pack_panels makes it
  int64_t weight_bytes;       // what its header says is checked against this
  const float* clip_lower;    // (clips,)
  const float* clip_upper;
  const void* bias;           // (N,) or null
  void* out;                  // (M, N); for the first layer of qvgen_feed_forward: unused
  int64_t in_features, out_features, groups, clips;
  int32_t activation_bits, activation_symmetric;  // 0: inputs are not quantized, and the clips not read
  int32_t bias_dtype, out_dtype;  // 0 float32, 1 bfloat16
  int32_t gelu;                   // 1: GELU (tanh) after the bias
};

struct qvgen_input {
  const void* x;                  // (samples, tokens, K)
  int64_t samples, tokens;
  const int64_t* timestep_group;  // (samples,), or (1,) for all samples
  int64_t timestep_groups;        // its length
  int32_t dtype;                  // 0 float32, 1 bfloat16
};

// Instruction sets, best first; names end with null. A path may be asked for by name on any machine that supports it.
const char* const* qvgen_isas();
int qvgen_isa_supported(const char* name);
// Why this machine or process cannot run a path, where more is to be said than that the processor lacks it; else null.
const char* qvgen_isa_refusal(const char* name);
// Whether its instructions are emulated in plain C++ (QVGEN_AMX_EMULATED): for tests, never to be chosen for speed.
int qvgen_isa_emulated(const char* name);

// Run parallel regions in this OpenMP runtime's threads (its GOMP_parallel); null: in threads started for each call.
void qvgen_use_openmp(void* gomp_parallel);

// Strassen's algorithm: 0 never, 1 where it is faster (at the start), 2 wherever it is possible. Results are the same.
void qvgen_use_strassen(int mode);

// With "amx": from how many tokens on tiles are used, below it registers; 0: as at the start. Results are the same.
void qvgen_use_tiles(int64_t tokens);

int64_t qvgen_panel_bytes(int64_t n, int64_t k, int64_t groups, int weight_bits);
// words (N, row_bytes), scale, zero_point (null: symmetric, 2^(weight_bits - 1)) and row_sum (N, groups).
int qvgen_pack_panels(
    const uint8_t* words, int64_t row_bytes, const float* scale, const float* zero_point, const int32_t* row_sum, int64_t n,
    int64_t k, int64_t groups, int weight_bits, uint8_t* out, int threads);
int qvgen_unpack_panels(
    const uint8_t* weight, int64_t weight_bytes, uint8_t* words, int64_t n, int64_t row_bytes, int threads);

// `count` layers that read the same input.
int qvgen_linear(const char* isa, const qvgen_layer* layers, int count, const qvgen_input* input, int threads);
// layers[1](layers[0](x)); the wide intermediate, rounded to the dtype of x, exists for some hundred tokens at a time.
int qvgen_feed_forward(const char* isa, const qvgen_layer* layers, const qvgen_input* input, int threads);

// Row operations of a transformer block, (rows, features) of `dtype`, out may be the input. Null: that part is left out.
// `group_rows` consecutive rows share a row of scale and shift, or of gate; row r has position r % positions.
int qvgen_layer_norm(
    const char* isa, const void* x, int dtype, int64_t rows, int64_t features, float eps, const float* weight, const float* bias,
    const float* scale, const float* shift, int64_t group_rows, void* out, int threads);
int qvgen_rms_norm(
    const char* isa, const void* x, int dtype, int64_t rows, int64_t features, float eps, const float* weight,
    const float* cosine, const float* sine, int64_t positions, int64_t head_features, void* out, int threads);
int qvgen_add_gated(
    const char* isa, const void* x, const void* y, const float* gate, int dtype, int64_t rows, int64_t features,
    int64_t group_rows, void* out, int threads);

// Fake quantization in training, rows (rows, features) of float32 with a scale and a zero point (rows,) each; the zero point is
// added before rounding (float_zero_point) or after it.
int qvgen_fake_quantize(
    const char* isa, const float* x, const float* scale, const float* zero_point, int64_t rows, int64_t features, int max_code,
    int float_zero_point, float* out, int threads);
// Gradients of x (rows, features), scale and zero point (rows,), given that of the output.
int qvgen_fake_quantize_backward(
    const char* isa, const float* grad, const float* x, const float* scale, const float* zero_point, int64_t rows,
    int64_t features, int max_code, int float_zero_point, float* grad_x, float* grad_scale, float* grad_zero_point,
    int threads);

// softmax(q k^T * scale) v in bfloat16 with float32 sums: q, out (samples, queries, heads, features), k, v (samples, keys, ...).
// Kernels by the names of their instruction sets, end with null.
const char* const* qvgen_attention_kernels();
int qvgen_attention_supported(const char* kernel, int64_t features);
int qvgen_attention(
    const char* kernel, const void* q, const void* k, const void* v, int64_t samples, int64_t queries, int64_t keys, int64_t heads,
    int64_t features, float scale, void* out, int threads);

// The same for few keys (isa/isa.h says how many), float32 or bfloat16, in every instruction set.
int qvgen_short_attention(
    const char* isa, int dtype, const void* q, const void* k, const void* v, int64_t samples, int64_t queries, int64_t keys,
    int64_t heads, int64_t features, float scale, void* out, int threads);

// A step of a transformer block: x + gate * f(norm(x)), where f is attention to itself or to a text, or a feed-forward.
struct qvgen_block_step {
  int32_t normalized;                      // 0: f reads x itself
  float norm_eps;
  const float *norm_weight, *norm_bias;    // (features,) or null
  const float *scale, *shift, *gate;       // of the first token, (features,), or null
  int64_t modulation_samples, modulation_tokens;  // elements from a sample to the next, and from a token to the next
  int64_t gate_samples, gate_tokens;
  const qvgen_layer* layers;               // to q, k, v and out, or up and down; their `out` is not used
  int32_t heads;                           // 0: a feed-forward, and nothing below is read
  float query_eps, key_eps, attention_scale;
  const float *query_weight, *key_weight;  // of RMS norms over all heads, or null
  const float *cosine, *sine;              // (tokens, features of a head), or null
  const void* text;                        // (samples, text_tokens, K), which keys and values read; null: they read x
  int64_t text_tokens;
};
// `count` steps of x (samples, tokens, features); the same results as the functions above one after the other, with
// qvgen_short_attention, whose limits hold here.
int qvgen_transformer_block(
    const char* isa, const qvgen_block_step* steps, int count, int64_t features, const qvgen_input* x, void* out, int threads);

// Multiply-adds per cycle of one core, of the instruction this path is made of, by measurement; 0: not known.
double qvgen_peak(const char* isa);
// Clock rate of this thread's core right now, in Hz.
double qvgen_cycles_per_second();

// For tests: sum over k of a (q - offset of its field), offsets as in layout.h, for a weight with one group. a (m, k) holds codes
// up to max_code; out (m, n).
int qvgen_integer_part(
    const char* isa, const uint8_t* weight, int64_t weight_bytes, const uint8_t* a, int64_t m, int max_code, int32_t* out);
// For tests: codes (tokens, K), scale, zero point and sum of codes (tokens,) of each token, by the clips of layer.
int qvgen_quantize_tokens(
    const char* isa, const qvgen_layer* layer, const qvgen_input* input, uint8_t* codes, float* scale, int32_t* zero_point,
    int32_t* code_sum);
}
