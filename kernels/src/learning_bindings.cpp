// What learning needs as torch sees it: products of matrices in any layout, see products.h, and the optimiser's step, see ernie45/ops/optimise.py.
#include "products.h"
#include "tensors.h"

namespace {

using namespace ernie::torch_side;

const ernie::ProductKernels& products_of(const std::string& isa) {
  const ernie::ProductKernels* products = kernels(isa).products;
  STD_TORCH_CHECK(products, "the ", isa, " kernels multiply no matrices for learning");
  return *products;
}

// Items along `dim` of a matrix, each with the numbers of the other dimension.
ernie::Factor factor_of(const Tensor& t, const char* name, int64_t dim) {
  STD_TORCH_CHECK(t.is_cpu() && t.dim() == 2 && t.scalar_type() == ScalarType::BFloat16, name, " must be a bfloat16 matrix on the CPU");
  const int64_t other = 1 - dim;
  const bool along = t.stride(other) == 1 || t.size(other) == 1;
  STD_TORCH_CHECK(along || t.stride(dim) == 1 || t.size(dim) == 1, name, " must lie by rows or by columns");
  STD_TORCH_CHECK(t.size(0) <= (int64_t(1) << 31) && t.size(1) <= (int64_t(1) << 31), name, " is too large");
  return {static_cast<const uint16_t*>(t.data_ptr()), t.size(dim), t.stride(along ? dim : other), along};
}

void multiply(const Tensor& left, const Tensor& right, const Tensor& out, bool add, const std::string& isa) {
  STD_TORCH_CHECK(left.size(1) == right.size(0), "a matrix of ", left.size(1), " columns meets one of ", right.size(0), " rows");
  ernie::Product p{factor_of(left, "the left matrix", 0), factor_of(right, "the right matrix", 1), left.size(1), type_of(out, "the result"), out.data_ptr(),
                   out.size(1), add};
  STD_TORCH_CHECK(p.K > 0, "the matrices share no dimension");
  if (p.left.count && p.right.count) ernie::product(products_of(isa), threads(), p);
}

// left @ right; `wide`: the float32 sums as they are
Tensor matmul(const Tensor& left, const Tensor& right, bool wide, const std::string& isa) {
  STD_TORCH_CHECK(left.dim() == 2 && right.dim() == 2, "both must be matrices");
  const int32_t type = wide ? aoti_torch_dtype_float32() : aoti_torch_dtype_bfloat16();
  Tensor out = empty_of<2>(type, {left.size(0), right.size(1)});
  multiply(left, right, out, false, isa);
  return out;
}

void add_matmul(const Tensor& sums, const Tensor& left, const Tensor& right, const std::string& isa) {
  STD_TORCH_CHECK(left.dim() == 2 && right.dim() == 2 && sums.dim() == 2 && sums.is_cpu() && sums.is_contiguous() &&
                      sums.scalar_type() == ScalarType::Float && sums.size(0) == left.size(0) && sums.size(1) == right.size(1),
                  "the sums must be float32, contiguous, with the rows of the left matrix and the columns of the right one");
  multiply(left, right, sums, true, isa);
}

void* numbers(const Tensor& t, const char* name, int64_t count, std::initializer_list<ScalarType> types) {
  bool known = false;
  for (const ScalarType type : types) known |= t.scalar_type() == type;
  STD_TORCH_CHECK(known && t.is_cpu() && t.is_contiguous() && t.numel() == count, name, " must be ", count, " numbers of a known type, contiguous, on the CPU");
  return t.data_ptr();
}

void adamw(const Tensor& weight, const std::optional<Tensor>& low, const Tensor& gradient, const Tensor& mean, const Tensor& square, double scale,
           double mean_share, double square_rest, double rate, double root_scale, double eps, double decay, int64_t step, const std::string& isa) {
  const int64_t count = weight.numel();
  ernie::AdamwJob job{};
  job.weight = numbers(weight, "the weight", count, {low ? ScalarType::BFloat16 : ScalarType::Float});
  if (low) job.low = numbers(*low, "the low halves", count, {ScalarType::Short});
  job.gradient = numbers(gradient, "the gradient", count, {ScalarType::Float, ScalarType::BFloat16});
  job.mean = numbers(mean, "the mean", count, {ScalarType::Float, ScalarType::BFloat16});
  job.square = numbers(square, "the mean square", count, {mean.scalar_type()});
  job.gradient_type = type_of(gradient, "the gradient"), job.state_type = type_of(mean, "the mean");
  job.scale = float(scale), job.mean_share = float(mean_share), job.square_rest = float(square_rest), job.square_share = float(1.0 - square_rest);
  job.rate = float(rate), job.root_scale = float(root_scale), job.eps = float(eps), job.decay = float(decay), job.step = uint32_t(step);
  if (count) ernie::adamw(kernels(isa), threads(), job, count);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ernie45, m) {
  m.def("matmul(Tensor left, Tensor right, bool wide, str isa) -> Tensor");
  m.def("add_matmul(Tensor(a!) sums, Tensor left, Tensor right, str isa) -> ()");
  m.def("adamw(Tensor(a!) weight, Tensor(b!)? low, Tensor gradient, Tensor(c!) mean, Tensor(d!) square, float scale, float mean_share, "
        "float square_rest, float rate, float root_scale, float eps, float decay, int step, str isa) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ernie45, CPU, m) {
  m.impl("matmul", TORCH_BOX(&matmul));
  m.impl("add_matmul", TORCH_BOX(&add_matmul));
  m.impl("adamw", TORCH_BOX(&adamw));
}
