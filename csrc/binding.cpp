// The only file that knows torch, through its stable ABI: one binary serves every torch from 2.10
// on.
//
// Registers attention_forward_<D>, attention_backward_<D> and attention_splits_<D> under
// torch.ops.diffusion_fast_cuda for each head dim of this library. They allocate nothing, do not
// synchronise and launch on the stream passed in (a cudaStream_t as an integer), so that nothing
// here needs a CUDA build of torch. Checks with readable messages are made in Python; those here
// keep a wrong call from reading foreign memory.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>

#include "library.h"

namespace diffusion_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

void check(bool ok, const char* tensor, const char* expected) {
  STD_TORCH_CHECK(ok, "attention (CUDA): ", tensor, ": expected ", expected);
}

void check_dense(const Tensor& t, const char* name, ScalarType type) {
  check(t.is_cuda(), name, "a CUDA tensor");
  check(t.scalar_type() == type, name, "the documented dtype");
}

Strides strides_of(const Tensor& t, const char* name, const Tensor& like, int64_t rows) {
  check_dense(t, name, like.scalar_type());
  check(t.get_device_index() == like.get_device_index(), name, "the device of q");
  check(t.dim() == 4 && t.size(0) == like.size(0) && t.size(1) == rows &&
            t.size(2) == like.size(2) && t.size(3) == like.size(3),
        name, "shape [B, S, H, D]");
  auto stride = [&](int64_t d) {
    return t.size(d) == 1 ? int64_t{0} : t.stride(d);
  };  // of one element: arbitrary, unused
  const Strides s{stride(0), stride(1), stride(2)};
  constexpr int64_t kElements = 8;  // 16 bytes
  check(t.stride(3) == 1 && (s.batch | s.row | s.head) % kElements == 0, name,
        "last dim contiguous, strides of whole 16 bytes");
  check(reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0, name, "16-byte alignment");
  return s;
}

const float* floats(const Tensor& t, const char* name, int64_t count) {
  check_dense(t, name, ScalarType::Float);
  check(t.is_contiguous() && t.numel() == count, name,
        "a contiguous float32 tensor of the documented size");
  return static_cast<const float*>(t.const_data_ptr());
}
float* writable(const Tensor& t, const char* name, int64_t count) {
  return const_cast<float*>(floats(t, name, count));
}

// What forward and backward share.
template <typename Params>
void set_inputs(Params& p, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                const Tensor& lse, const Optional& bias, const Optional& key_lengths, double scale,
                int64_t head_dim) {
  check(q.is_cuda(), "q", "a CUDA tensor");
  check(q.dim() == 4 && q.size(3) == head_dim, "q", "shape [B, S, H, D] with this op's head dim");
  check(q.scalar_type() == ScalarType::Half || q.scalar_type() == ScalarType::BFloat16, "q",
        "float16 or bfloat16");
  check(q.numel() > 0, "q", "at least one row");
  check(k.dim() == 4 && k.size(1) > 0, "k", "at least one key");
  constexpr int64_t kMost = int64_t{1} << 30;  // int, with room to round up
  check(q.numel() / head_dim <= kMost, "q", "at most 2^30 rows");
  check(k.size(1) <= kMost, "k", "at most 2^30 keys");
  p.batch = static_cast<int>(q.size(0));
  p.queries = static_cast<int>(q.size(1));
  p.heads = static_cast<int>(q.size(2));
  p.keys = static_cast<int>(k.size(1));
  p.q_strides = strides_of(q, "q", q, p.queries);
  p.k_strides = strides_of(k, "k", q, p.keys);
  p.v_strides = strides_of(v, "v", q, p.keys);
  p.out_strides = strides_of(out, "out", q, p.queries);
  p.q = q.const_data_ptr();
  p.k = k.const_data_ptr();
  p.v = v.const_data_ptr();
  if (lse.numel() != 0)
    p.lse = writable(lse, "lse", static_cast<int64_t>(p.batch) * p.heads * p.queries);
  p.scale = static_cast<float>(scale);
  if (bias.has_value()) {
    check_dense(*bias, "bias", ScalarType::Float);
    check(bias->dim() == 3 && bias->size(0) == p.batch && bias->size(1) == p.heads &&
              bias->size(2) == p.keys && (p.keys == 1 || bias->stride(2) == 1),
          "bias", "shape [B, H, Sk], last dim contiguous");
    p.bias = static_cast<const float*>(bias->const_data_ptr());
    p.bias_batch = bias->stride(0);
    p.bias_head = bias->stride(1);
  }
  if (key_lengths.has_value()) {
    check_dense(*key_lengths, "key_lengths", ScalarType::Int);
    check(key_lengths->is_contiguous() && key_lengths->numel() == p.batch, "key_lengths",
          "a contiguous int32 tensor [B]");
    p.key_lengths = static_cast<const int*>(key_lengths->const_data_ptr());
  }
}

DeviceLimits limits_of(int device) {
  DeviceLimits limits;
  const char* error = device_limits(device, &limits);
  STD_TORCH_CHECK(error == nullptr, "attention (CUDA): ", error);
  return limits;
}

Type type_of(const Tensor& q) {
  return q.scalar_type() == ScalarType::Half ? Type::kHalf : Type::kBfloat16;
}

void started(const char* error) {
  STD_TORCH_CHECK(error == nullptr, "attention (CUDA): the kernels did not start: ", error);
}

template <int kHeadDim>
const AttentionEntry& entry();
#define DIFFUSION_FAST_ENTRY(D)      \
  template <>                        \
  const AttentionEntry& entry<D>() { \
    return attention_##D;            \
  }
DIFFUSION_FAST_HEAD_DIMS(DIFFUSION_FAST_ENTRY)
#undef DIFFUSION_FAST_ENTRY

template <int kHeadDim>
void forward(Tensor q, Tensor k, Tensor v, Optional bias, Optional key_lengths, Tensor out,
             Tensor lse, double scale, int64_t kernel, int64_t stream) {
  ForwardParams p{};
  set_inputs(p, q, k, v, out, lse, bias, key_lengths, scale, kHeadDim);
  p.out = out.mutable_data_ptr();
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  started(entry<kHeadDim>().forward(type_of(q), p, static_cast<ForwardKernel>(kernel),
                                    limits_of(q.get_device_index()),
                                    reinterpret_cast<void*>(stream)));
}

template <int kHeadDim>
void backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Optional bias,
              Optional key_lengths, Tensor delta, Tensor dq, Optional dk, Optional dv,
              Optional dk_parts, Optional dv_parts, Optional dbias_parts, double scale,
              int64_t splits, int64_t stream) {
  BackwardParams p{};
  set_inputs(p, q, k, v, out, lse, bias, key_lengths, scale, kHeadDim);
  check(splits >= 1, "splits", "at least 1");
  p.splits = static_cast<int>(splits);
  p.out = out.const_data_ptr();
  p.dout_strides = strides_of(dout, "dout", q, p.queries);
  p.dq_strides = strides_of(dq, "dq", q, p.queries);
  p.dout = dout.const_data_ptr();
  p.dq = dq.mutable_data_ptr();
  check(p.lse != nullptr, "lse", "the forward's log-sum-exp");
  p.delta = writable(delta, "delta", static_cast<int64_t>(p.batch) * p.heads * p.queries);
  const int64_t rows = splits * p.batch * p.heads * p.keys;
  check(dk.has_value() == dv.has_value() && dk.has_value() != dk_parts.has_value() &&
            dk_parts.has_value() == dv_parts.has_value(),
        "dk, dv", "either these or dk_parts and dv_parts");
  check(splits == 1 || dk_parts.has_value(), "dk_parts", "a tensor when splits > 1");
  if (dk.has_value()) {
    p.dk_strides = strides_of(*dk, "dk", q, p.keys);
    p.dv_strides = strides_of(*dv, "dv", q, p.keys);
    p.dk = dk->mutable_data_ptr();
    p.dv = dv->mutable_data_ptr();
  } else {
    p.dk_parts = writable(*dk_parts, "dk_parts", rows * kHeadDim);
    p.dv_parts = writable(*dv_parts, "dv_parts", rows * kHeadDim);
  }
  if (dbias_parts.has_value()) p.dbias_parts = writable(*dbias_parts, "dbias_parts", rows);
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  started(entry<kHeadDim>().backward(type_of(q), p, limits_of(q.get_device_index()),
                                     reinterpret_cast<void*>(stream)));
}

template <int kHeadDim>
int64_t splits(int64_t batch_heads, int64_t queries, int64_t keys, int64_t device) {
  return entry<kHeadDim>().splits(batch_heads, static_cast<int>(queries), static_cast<int>(keys),
                                  limits_of(static_cast<int>(device)));
}

}  // namespace
}  // namespace diffusion_fast

STABLE_TORCH_LIBRARY_FRAGMENT(diffusion_fast_cuda, m) {
#define DIFFUSION_FAST_DEFINE(D)                                                                  \
  m.def("attention_forward_" #D                                                                   \
        "(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? key_lengths, Tensor(a!) out, "      \
        "Tensor(b!) lse, float scale, "                                                           \
        "int kernel, int stream) -> ()");                                                         \
  m.def("attention_backward_" #D                                                                  \
        "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? bias, "      \
        "Tensor? key_lengths, "                                                                   \
        "Tensor(a!) delta, Tensor(b!) dq, Tensor(c!)? dk, Tensor(d!)? dv, Tensor(e!)? dk_parts, " \
        "Tensor(f!)? dv_parts, "                                                                  \
        "Tensor(g!)? dbias_parts, float scale, int splits, int stream) -> ()");                   \
  m.def("attention_splits_" #D "(int batch_heads, int queries, int keys, int device) -> int");
  DIFFUSION_FAST_HEAD_DIMS(DIFFUSION_FAST_DEFINE)
#undef DIFFUSION_FAST_DEFINE
}

// For every device, so that a tensor elsewhere meets the checks above and not a missing kernel.
STABLE_TORCH_LIBRARY_IMPL(diffusion_fast_cuda, CompositeExplicitAutograd, m) {
#define DIFFUSION_FAST_IMPLEMENT(D)                                            \
  m.impl("attention_forward_" #D, TORCH_BOX((&diffusion_fast::forward<D>)));   \
  m.impl("attention_backward_" #D, TORCH_BOX((&diffusion_fast::backward<D>))); \
  m.impl("attention_splits_" #D, TORCH_BOX((&diffusion_fast::splits<D>)));
  DIFFUSION_FAST_HEAD_DIMS(DIFFUSION_FAST_IMPLEMENT)
#undef DIFFUSION_FAST_IMPLEMENT
}
