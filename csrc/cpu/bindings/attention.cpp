#include "cpu/attention.h"

#include <pybind11/stl.h>

#include <array>
#include <tuple>

#include "cpu/bindings/bindings.h"

namespace fasttune {
namespace {

using Rows = std::array<int64_t, 4>;  // address and strides of sequence, row and head

HeadRows head_rows(const Rows& rows) {
  return {pointer<void>(static_cast<Address>(rows[0])), rows[1], rows[2], rows[3]};
}

// Addresses of bias and buckets, rows of c2p and p2c, number of buckets, furthest distances of bias and
// buckets.
using Terms = std::tuple<Address, Address, Rows, Rows, int64_t, int64_t, int64_t>;

AttentionTerms attention_terms(const Terms& given) {
  const auto& [bias, buckets, c2p, p2c, width, bias_reach, buckets_reach] = given;
  AttentionTerms terms{};
  terms.bias = pointer<const float>(bias);
  terms.bias_reach = bias_reach;
  terms.c2p = head_rows(c2p);
  terms.p2c = head_rows(p2c);
  terms.buckets = pointer<const int32_t>(buckets);
  terms.width = width;
  terms.buckets_reach = buckets_reach;
  return terms;
}

using Offsets = std::array<Address, 3>;  // of the keys; of the queries and their positions, or 0 and 0

AttentionArgs make_args(int dtype, const std::array<int64_t, 5>& sizes, const Offsets& offsets,
                        const Terms& terms, bool causal, int64_t window, double scale, Address seed,
                        double dropout_p) {
  AttentionArgs args{};
  args.dtype = static_cast<DType>(dtype);
  args.sequences = sizes[0];
  args.queries = sizes[1];
  args.keys = sizes[2];
  args.heads = sizes[3];
  args.head_dim = sizes[4];
  args.offsets = pointer<const int64_t>(offsets[0]);
  args.query_offsets = pointer<const int64_t>(offsets[1]);
  args.positions = pointer<const int32_t>(offsets[2]);
  args.causal = causal;
  args.window = window;
  args.scale = static_cast<float>(scale);
  args.terms = attention_terms(terms);
  args.dropout = make_dropout(read_seed(seed), dropout_p);
  return args;
}

}  // namespace

void bind_attention(pybind11::module_& module) {
  const pybind11::call_guard<pybind11::gil_scoped_release> without_gil;
  module.def(
      "attention_forward",
      [](int dtype, const std::array<int64_t, 5>& sizes, const Rows& query, const Rows& key,
         const Rows& value, const Rows& out, Address lse, const Offsets& offsets, const Terms& terms,
         bool causal, int64_t window, double scale, Address seed, double dropout_p) {
        AttentionArgs args = make_args(dtype, sizes, offsets, terms, causal, window, scale, seed, dropout_p);
        args.query = head_rows(query);
        args.key = head_rows(key);
        args.value = head_rows(value);
        args.out = head_rows(out);
        args.lse = pointer<float>(lse);
        attention_forward(args);
      },
      without_gil);
  module.def(
      "attention_backward",
      [](int dtype, const std::array<int64_t, 5>& sizes, const Rows& query, const Rows& key,
         const Rows& value, const Rows& out, Address lse, const Rows& dout, const Rows& dquery,
         const Rows& dkey, const Rows& dvalue, Address dbias, const Rows& dc2p, const Rows& dp2c,
         const Offsets& offsets, const Terms& terms, bool causal, int64_t window, double scale, Address seed,
         double dropout_p) {
        AttentionArgs args = make_args(dtype, sizes, offsets, terms, causal, window, scale, seed, dropout_p);
        args.query = head_rows(query);
        args.key = head_rows(key);
        args.value = head_rows(value);
        args.out = head_rows(out);
        args.lse = pointer<float>(lse);
        args.dout = head_rows(dout);
        args.dquery = head_rows(dquery);
        args.dkey = head_rows(dkey);
        args.dvalue = head_rows(dvalue);
        args.terms.dbias = pointer<float>(dbias);
        args.terms.dc2p = head_rows(dc2p);
        args.terms.dp2c = head_rows(dp2c);
        attention_backward(args);
      },
      without_gil);
}

}  // namespace fasttune
