#include "train/shards.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <fmt/format.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <utility>

#include "train/host_tensor.h"

namespace rabit::train {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The matrices that a block's products read, and the layers that lie in each, one below the other.
const std::vector<std::vector<Role>>& matrices() {
  static const std::vector<std::vector<Role>> all = {{kJoinedQkv.begin(), kJoinedQkv.end()},
                                                     {Role::kAttnOutput},
                                                     {kJoinedGateUp.begin(), kJoinedGateUp.end()},
                                                     {Role::kFfnDown}};
  return all;
}

// A block's rows as one flat tensor: layers in the order of matrices(), each of a process's rows as
// long as the first process's.
class Layout {
 public:
  struct Part {
    Role role;
    int64_t offset, rows, d_in;  // in the flat tensor; whole rows
  };

  explicit Layout(const StudentBlock& block) : size_(block.ranks->size()) {
    for (const auto& roles : matrices()) {
      for (const Role role : roles) {
        const int64_t rows = block.rows[index_of(role)], d_in = block[role].shape.d_in;
        parts_.push_back({role, each_, rows, d_in});
        each_ += rows_each(rows, size_) * d_in;
      }
    }
  }

  const std::vector<Part>& parts() const { return parts_; }
  const Part& part(Role role) const {
    return *std::find_if(parts_.begin(), parts_.end(),
                         [role](const Part& part) { return part.role == role; });
  }
  int size() const { return size_; }
  int64_t each() const { return each_; }  // values of one process
  int64_t all() const { return each_ * size_; }

  // Rows of a layer that process r holds, in its part of a flat tensor. (count, d_in)
  at::Tensor rows(const at::Tensor& flat_of_rank, const Part& part, int rank) const {
    const RowShare share = rows_of(part.rows, rank, size_);
    return flat_of_rank.narrow(0, part.offset, share.count * part.d_in)
        .view({share.count, part.d_in});
  }

 private:
  int size_;
  int64_t each_ = 0;
  std::vector<Part> parts_;
};

// What a pass through the gathered weights leaves for its way back.
struct Pass : torch::CustomClassHolder {
  Pass(std::shared_ptr<Ranks> given, Layout of, std::vector<at::Tensor> own)
      : ranks(std::move(given)), layout(std::move(of)), rows(std::move(own)) {}
  std::shared_ptr<Ranks> ranks;
  Layout layout;
  std::vector<at::Tensor> rows;  // this process's weights by part, with their graphs
};

// The matrices of a block from every process's rows.
class GatherWeights : public torch::autograd::Function<GatherWeights> {
 public:
  // leaf: any that needs a gradient, so that there is a way back; it gets none from here.
  static variable_list forward(AutogradContext* context, const at::Tensor&,
                               const c10::intrusive_ptr<Pass>& pass) {
    const Layout& layout = pass->layout;
    const at::TensorOptions options = pass->rows.front().options().requires_grad(false);
    const at::Tensor mine = at::zeros({layout.each()}, options);
    const at::Tensor all = at::empty({layout.all()}, options);
    for (size_t i = 0; i < layout.parts().size(); ++i) {
      layout.rows(mine, layout.parts()[i], pass->ranks->rank()).copy_(pass->rows[i]);
    }
    pass->ranks->gather(mine, all).wait();
    variable_list out;
    for (const auto& roles : matrices()) {
      std::vector<at::Tensor> pieces;
      for (const Role role : roles) {
        for (int rank = 0; rank < layout.size(); ++rank) {
          pieces.push_back(layout.rows(all.narrow(0, rank * layout.each(), layout.each()),
                                       layout.part(role), rank));
        }
      }
      out.push_back(at::cat(pieces));
    }
    context->saved_data["pass"] = c10::IValue::make_capsule(pass);
    return out;
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const auto capsule = context->saved_data["pass"].toCapsule();
    const auto pass = c10::intrusive_ptr<Pass>::reclaim_copy(static_cast<Pass*>(capsule.get()));
    const Layout& layout = pass->layout;
    const at::Tensor all =
        at::zeros({layout.all()}, pass->rows.front().options().dtype(at::kFloat));
    for (size_t i = 0; i < grads.size(); ++i) {
      if (!grads[i].defined()) {
        continue;
      }
      int64_t row = 0;
      for (const Role role : matrices()[i]) {
        const Layout::Part& part = layout.part(role);
        for (int rank = 0; rank < layout.size(); ++rank) {
          const RowShare share = rows_of(part.rows, rank, layout.size());
          layout.rows(all.narrow(0, rank * layout.each(), layout.each()), part, rank)
              .copy_(grads[i].narrow(0, row + share.begin, share.count));
        }
        row += part.rows;
      }
    }
    const at::Tensor mine = at::empty({layout.each()}, all.options());
    auto exchange = std::make_shared<Exchange>(pass->ranks->sum_parts(all, mine));
    pass->ranks->later([pass, exchange, mine, all] {  // all: read until it was waited for
      exchange->wait();
      std::vector<at::Tensor> gradients;
      for (const Layout::Part& part : pass->layout.parts()) {
        gradients.push_back(pass->layout.rows(mine, part, pass->ranks->rank())
                                .to(pass->rows.front().scalar_type()));
      }
      torch::autograd::backward(pass->rows, gradients);
    });
    return {at::Tensor(), at::Tensor()};
  }
};

// A leaf of its own with these values.
at::Tensor leaf(const at::Tensor& values, const at::Tensor& like) {
  return values.detach().clone().set_requires_grad(like.requires_grad());
}

at::Tensor on_host(const at::Tensor& tensor) {
  return tensor.defined() ? leaf(tensor.to(at::kCPU), tensor) : tensor;
}

// (k, d_out, words), as integers that can be sent.
at::Tensor sign_tensor(const std::vector<uint32_t>& signs, const quant::Shape& shape) {
  const at::Tensor out = at::empty({shape.paths, shape.d_out, (shape.d_in + 31) / 32}, at::kInt);
  std::memcpy(out.mutable_data_ptr(), signs.data(), signs.size() * sizeof(uint32_t));
  return out;
}

std::vector<uint32_t> sign_words(const at::Tensor& signs) {
  const at::Tensor own = signs.contiguous();
  const auto* words = static_cast<const uint32_t*>(own.const_data_ptr());
  return {words, words + own.numel()};
}

}  // namespace

Status check_shares(const ModelConfig& config, int size) {
  for (const Role role : kRoles) {
    const int64_t rows = linear_shape(config, role).d_out;
    if (rows_of(rows, size - 1, size).count == 0) {
      return Error{
          fmt::format("{} processes are too many for the {} rows of {}: one would have "
                      "none",
                      size, rows, role_name(role))};
    }
  }
  return {};
}

StudentBlock shard_block(const StudentBlock& whole, const std::shared_ptr<Ranks>& ranks) {
  const at::NoGradGuard no_grad;
  const auto of_first = [&](const at::Tensor& tensor) {
    const at::Tensor values = tensor.detach().clone();
    ranks->broadcast(values);
    return values;
  };
  const auto norm = [&](const at::Tensor& own) {
    return own.defined() ? leaf(of_first(own), own) : own;
  };
  StudentBlock block;
  block.ranks = ranks;
  for (const Role role : kRoles) {
    const StudentLinear& from = whole[role];
    const int64_t d_out = from.shape.d_out;
    const auto share = [&](const at::Tensor& tensor, int64_t dim) {
      return share_of(of_first(tensor), {dim, d_out}, *ranks);
    };
    StudentLinear& to = block[role];
    to = from;
    to.latent = leaf(share(from.latent, from.latent.dim() - 2), from.latent);
    to.g = leaf(share(from.g, 1), from.g);
    to.h = leaf(of_first(from.h), from.h);
    to.start_signs = sign_words(
        share(sign_tensor(from.start_signs, from.shape).to(from.latent.device()), 1).to(at::kCPU));
    to.shape.d_out = to.g.size(1);
    block.rows[index_of(role)] = d_out;
  }
  block.attn_norm = norm(whole.attn_norm);
  block.ffn_norm = norm(whole.ffn_norm);
  return block;
}

StudentBlock whole_block(const StudentBlock& block) {
  if (!block.ranks) {
    return block;
  }
  Ranks& ranks = *block.ranks;
  StudentBlock whole;
  for (const Role role : kRoles) {
    const StudentLinear& from = block[role];
    const int64_t d_out = block.rows[index_of(role)];
    const at::Tensor latent = whole_of(from.latent, {from.latent.dim() - 2, d_out}, ranks);
    const at::Tensor g = whole_of(from.g, {1, d_out}, ranks);
    const at::Tensor signs = whole_of(
        sign_tensor(from.start_signs, from.shape).to(from.latent.device()), {1, d_out}, ranks);
    if (ranks.first()) {
      StudentLinear& to = whole[role];
      to = from;
      to.shape.d_out = d_out;
      to.latent = leaf(latent, from.latent);
      to.g = leaf(g, from.g);
      to.h = on_host(from.h);
      to.start_signs = sign_words(signs);
    }
  }
  if (ranks.first()) {
    whole.attn_norm = on_host(block.attn_norm);
    whole.ffn_norm = on_host(block.ffn_norm);
  }
  return whole;
}

BlockWeights gathered_weights(const StudentBlock& student, const BlockWeights& teacher,
                              at::ScalarType compute) {
  const Layout layout(student);
  std::vector<at::Tensor> rows;
  for (const Layout::Part& part : layout.parts()) {
    rows.push_back(fake_quant_weight(student[part.role], compute));
  }
  const variable_list all = GatherWeights::apply(
      student.linear.front().latent, c10::make_intrusive<Pass>(student.ranks, layout, rows));
  BlockWeights weights{{},
                       student.attn_norm.defined() ? student.attn_norm : teacher.attn_norm,
                       student.ffn_norm.defined() ? student.ffn_norm : teacher.ffn_norm};
  for (size_t i = 0; i < all.size(); ++i) {
    int64_t row = 0;
    for (const Role role : matrices()[i]) {
      const int64_t count = student.rows[index_of(role)];
      weights.linear[index_of(role)] = all[i].narrow(0, row, count);
      row += count;
    }
  }
  weights.qkv = all[0];
  weights.gate_up = all[2];
  return weights;
}

SharedLeaves shared_leaves(const Student& student, const std::shared_ptr<Ranks>& ranks) {
  SharedLeaves out{ranks, {}, {}};
  if (!ranks) {
    return out;
  }
  std::map<const at::TensorImpl*, int64_t> row_scales;
  for (const StudentBlock& block : student.blocks) {
    for (const Role role : kRoles) {
      const int64_t rows = block.rows[index_of(role)];
      out.latents.push_back({block[role].latent.dim() - 2, rows});
      row_scales[block[role].g.unsafeGetTensorImpl()] = rows;
    }
  }
  for (const at::Tensor& leaf : scales_and_norms(student)) {
    const auto rows = row_scales.find(leaf.unsafeGetTensorImpl());
    out.scales.push_back(rows != row_scales.end() ? LeafLayout{1, rows->second} : LeafLayout{});
  }
  return out;
}

}  // namespace rabit::train
