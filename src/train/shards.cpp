#include "train/shards.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <fmt/format.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
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

  // shape_of(role): a LinearShape of the whole layer.
  template <typename ShapeOf>
  Layout(int size, const ShapeOf& shape_of) : size_(size) {
    for (const auto& roles : matrices()) {
      for (const Role role : roles) {
        const LinearShape shape = shape_of(role);
        parts_.push_back({role, each_, shape.d_out, shape.d_in});
        each_ += rows_each(shape.d_out, size_) * shape.d_in;
      }
    }
  }
  Layout(const StudentBlock& block)
      : Layout(block.ranks->size(), [&](Role role) {
          return LinearShape{block.rows[index_of(role)], block[role].shape.d_in};
        }) {}
  Layout(const ModelConfig& config, int size)
      : Layout(size, [&](Role role) { return linear_shape(config, role); }) {}

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

  // A process's part of a flat tensor, from its rows by part, as pieces to put together.
  void add_pieces(const std::vector<at::Tensor>& rows_by_part,
                  std::vector<at::Tensor>& pieces) const {
    for (size_t i = 0; i < parts_.size(); ++i) {
      const at::Tensor& rows = rows_by_part[i];
      pieces.push_back(rows.flatten());
      if (const int64_t missing = rows_each(parts_[i].rows, size_) - rows.size(0); missing > 0) {
        pieces.push_back(at::zeros({missing * parts_[i].d_in}, rows.options()));
      }
    }
  }
  at::Tensor flat(const std::vector<at::Tensor>& rows_by_part) const {
    std::vector<at::Tensor> pieces;
    add_pieces(rows_by_part, pieces);
    return at::cat(pieces);
  }

  // The matrices, from all processes' parts (all).
  std::vector<at::Tensor> whole(const at::Tensor& flat_of_all) const {
    std::vector<at::Tensor> out;
    for (const auto& roles : matrices()) {
      std::vector<at::Tensor> pieces;
      for (const Role role : roles) {
        for (int rank = 0; rank < size_; ++rank) {
          pieces.push_back(rows(flat_of_all.narrow(0, rank * each_, each_), part(role), rank));
        }
      }
      out.push_back(at::cat(pieces));
    }
    return out;
  }

  // Gives a block its weights from the matrices.
  void set(const std::vector<at::Tensor>& matrix, BlockWeights& weights) const {
    for (size_t i = 0; i < matrix.size(); ++i) {
      int64_t row = 0;
      for (const Role role : matrices()[i]) {
        const int64_t count = part(role).rows;
        weights.linear[index_of(role)] = matrix[i].narrow(0, row, count);
        row += count;
      }
    }
    weights.qkv = matrix[0];
    weights.gate_up = matrix[2];
  }

 private:
  int size_;
  int64_t each_ = 0;
  std::vector<Part> parts_;
};

// What a pass through the gathered weights leaves for its way back.
struct Pass : torch::CustomClassHolder {
  Pass(Ranks& given, Layout of, std::vector<at::Tensor> own)
      : ranks(&given),
        layout(std::move(of)),
        rows(std::move(own)),
        mine(layout.flat(rows)),
        all(at::empty({layout.all()}, mine.options())),
        gathered(ranks->gather(mine, all)) {}
  Ranks* ranks;  // of the block
  Layout layout;
  std::vector<at::Tensor> rows;  // this process's weights by part, with their graphs
  at::Tensor mine, all;          // until they are gathered
  Exchange gathered;
};

// The matrices of a block from every process's rows.
class GatherWeights : public torch::autograd::Function<GatherWeights> {
 public:
  // leaf: any that needs a gradient, so that there is a way back; it gets none from here.
  static variable_list forward(AutogradContext* context, const at::Tensor&,
                               const c10::intrusive_ptr<Pass>& pass) {
    pass->gathered.wait();
    variable_list out = pass->layout.whole(pass->all);
    pass->mine = pass->all = at::Tensor();
    context->saved_data["pass"] = c10::IValue::make_capsule(pass);
    return out;
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const auto capsule = context->saved_data["pass"].toCapsule();
    const auto pass = c10::intrusive_ptr<Pass>::reclaim_copy(static_cast<Pass*>(capsule.get()));
    const Layout& layout = pass->layout;
    std::vector<at::Tensor> pieces;
    for (int rank = 0; rank < layout.size(); ++rank) {
      std::vector<at::Tensor> rows;
      for (size_t i = 0; i < grads.size(); ++i) {
        int64_t row = 0;
        for (const Role role : matrices()[i]) {
          const Layout::Part& part = layout.part(role);
          const RowShare share = rows_of(part.rows, rank, layout.size());
          rows.push_back(grads[i].defined()
                             ? grads[i].narrow(0, row + share.begin, share.count)
                             : at::zeros({share.count, part.d_in}, pass->rows.front().options()));
          row += part.rows;
        }
      }
      layout.add_pieces(rows, pieces);
    }
    const at::Tensor all = at::cat(pieces).to(at::kFloat);
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
        share(sign_word_tensor(from.start_signs, from.shape).to(from.latent.device()), 1));
    to.shape.d_out = to.g.size(1);
    block.rows[index_of(role)] = d_out;
  }
  block.attn_norm = norm(whole.attn_norm);
  block.ffn_norm = norm(whole.ffn_norm);
  return block;
}

StudentBlock whole_block(const StudentBlock& block, bool gives_only) {
  if (!block.ranks) {
    return block;
  }
  StudentBlock whole;
  for (const Role role : kRoles) {
    const StudentLinear& from = block[role];
    StudentLinear& to = whole[role];
    to = from;
    to.shape.d_out = block.rows[index_of(role)];
    const auto all = [&](const at::Tensor& share, int64_t dim) {
      const at::Tensor gathered = whole_of(share, {dim, block.rows[index_of(role)]}, *block.ranks);
      return gives_only ? at::Tensor() : gathered.to(at::kCPU);
    };
    const at::Tensor latent = all(from.latent, from.latent.dim() - 2), g = all(from.g, 1);
    const at::Tensor signs =
        all(sign_word_tensor(from.start_signs, from.shape).to(from.latent.device()), 1);
    if (gives_only) {
      to = {};
      continue;
    }
    to.latent = leaf(latent, from.latent);
    to.g = leaf(g, from.g);
    to.h = on_host(from.h);
    to.start_signs = sign_words(signs);
  }
  whole.attn_norm = on_host(block.attn_norm);
  whole.ffn_norm = on_host(block.ffn_norm);
  return whole;
}

std::function<BlockWeights()> begin_weights(const StudentBlock& student,
                                            const BlockWeights& teacher, at::ScalarType compute) {
  if (!student.ranks) {
    return [&student, &teacher, compute] { return student_weights(student, teacher, compute); };
  }
  const Layout layout(student);
  std::vector<at::Tensor> rows;
  for (const Layout::Part& part : layout.parts()) {
    rows.push_back(fake_quant_weight(student[part.role], compute));
  }
  const at::NoGradGuard no_grad;  // of what is sent
  auto pass = c10::make_intrusive<Pass>(*student.ranks, layout, std::move(rows));
  return [&student, &teacher, pass = std::move(pass)] {
    BlockWeights weights{{},
                         student.attn_norm.defined() ? student.attn_norm : teacher.attn_norm,
                         student.ffn_norm.defined() ? student.ffn_norm : teacher.ffn_norm};
    pass->layout.set(GatherWeights::apply(student.linear.front().latent, pass), weights);
    return weights;
  };
}

std::function<BlockWeights()> begin_weights(const Network& network, int64_t layer) {
  const BlockWeights& block = network.blocks[static_cast<size_t>(layer)];
  if (!network.ranks) {
    return [&block] { return block; };
  }
  const Layout layout(network.config, network.ranks->size());
  const at::Tensor all = at::empty({layout.all()}, block.share.options());
  auto gathered = std::make_shared<Exchange>(network.ranks->gather(block.share, all));
  return [&block, layout, all, gathered] {
    gathered->wait();
    BlockWeights weights{{}, block.attn_norm, block.ffn_norm};
    layout.set(layout.whole(all), weights);
    return weights;
  };
}

void share_out(BlockWeights& block, const ModelConfig& config, const Ranks& ranks) {
  const Layout layout(config, ranks.size());
  std::vector<at::Tensor> rows;
  for (const Layout::Part& part : layout.parts()) {
    rows.push_back(share_of(block.linear[index_of(part.role)], {0, part.rows}, ranks));
  }
  block = {{}, block.attn_norm, block.ffn_norm, {}, {}, layout.flat(rows)};
}

SharedLeaves shared_leaves(std::span<const StudentBlock> blocks,
                           const std::vector<at::Tensor>& scales,
                           const std::shared_ptr<Ranks>& ranks) {
  SharedLeaves out{ranks, {}, {}};
  std::map<const at::TensorImpl*, LeafLayout> row_scales;
  for (const StudentBlock& block : blocks) {
    for (const Role role : kRoles) {
      const int64_t rows = block.rows[index_of(role)];
      const auto along = [&](int64_t dim) { return ranks ? LeafLayout{dim, rows} : LeafLayout{}; };
      out.latents.push_back(along(block[role].latent.dim() - 2));
      row_scales[block[role].g.unsafeGetTensorImpl()] = along(1);
    }
  }
  for (const at::Tensor& leaf : scales) {
    const auto rows = row_scales.find(leaf.unsafeGetTensorImpl());
    out.scales.push_back(rows != row_scales.end() ? rows->second : LeafLayout{});
  }
  return out;
}

}  // namespace rabit::train
