#include "train/memory_plan.h"

#include <fmt/format.h>

#include <algorithm>
#include <numeric>

#include "train/kl_loss.h"

namespace rabit::train {
namespace {

constexpr int64_t kFloat = 4, kBf16 = 2;
// What torch's allocator holds for what it hands out, measured on an H200: in the first phases
// streams of one size come and go.
constexpr double kStartSlack = 1.18, kDistillSlack = 1.04;

struct Sizes {
  int64_t linear = 0;  // weights of all linear layers
  int64_t latents = 0;
  int64_t scales = 0;
  int64_t largest_block = 0;  // linear weights of one
  int64_t trained_block = 0;  // of these, what a process trains
  int64_t processes = 1;
  int64_t exchanged = 0;  // bytes of a block's weights and gradients on their way
  int64_t original = 0;   // bytes of the original, with its blocks under way
};

Sizes sizes_of(const ModelConfig& config, const PathPlan& bits, const QuantizeOptions& options,
               int64_t processes) {
  Sizes sizes;
  sizes.processes = processes;
  for (int64_t layer = 0; layer < config.layers; ++layer) {
    int64_t block = 0;
    for (const Role role : kRoles) {
      const LinearShape shape = linear_shape(config, role);
      const int64_t weights = shape.d_out * shape.d_in, paths = bits.paths(layer, role);
      block += weights;
      sizes.latents += weights * (has_independent_latents(options.method) ? paths : 1);
      sizes.scales += paths * (shape.d_out + shape.d_in);
    }
    sizes.linear += block;
    sizes.largest_block = std::max(sizes.largest_block, block);
  }
  const auto share = [&](int64_t values) { return (values + processes - 1) / processes; };
  sizes.latents = share(sizes.latents);
  sizes.scales = share(sizes.scales);
  sizes.trained_block = share(sizes.largest_block);
  sizes.original =
      kBf16 * (sizes.linear + config.vocab_size * config.d_model * (config.tied_head ? 1 : 2)) +
      kFloat * config.d_model * (2 * config.layers + 1);
  if (processes > 1) {
    // Gathered, put together and the next one on its way; gradients of the block under way and of
    // the one before it.
    sizes.exchanged = sizes.largest_block * (2 * kBf16 + 3 * kFloat);
    if (options.share_original) {
      sizes.original -= kBf16 * (sizes.linear - share(sizes.linear) - 3 * sizes.largest_block);
    }
  }
  return sizes;
}

// What a block keeps of a token for its gradients; see gpu_block_forward.
int64_t block_activations(const ModelConfig& config) {
  const int64_t d = config.d_model, d_q = config.d_q(), d_kv = config.d_kv();
  const int64_t norms = 2 * (kFloat * d + kFloat + kBf16 * d);  // stream, inverse, normed
  const int64_t attention = kBf16 * (d_q + 2 * d_kv) + kBf16 * d_q + kFloat * config.heads;
  const int64_t feed_forward = kBf16 * 2 * config.d_ff + kBf16 * config.d_ff;
  return norms + attention + feed_forward;
}

// What the head's loss holds for `tokens` at once.
int64_t head_bytes(const ModelConfig& config, int64_t tokens) {
  const int64_t hidden = 3 * kBf16 * config.d_model * tokens;  // both models', and the gradient
  return hidden + 2 * kBf16 * std::min(kChunkLogits, tokens * config.vocab_size);
}

void add_slack(MemoryPhase& phase, double factor) {
  const int64_t bytes = phase.bytes();
  phase.parts.push_back(
      {"allocator", static_cast<int64_t>((factor - 1.0) * static_cast<double>(bytes))});
}

MemoryPhase blocks_phase(const ModelConfig& config, const QuantizeOptions& options,
                         const Sizes& sizes, int64_t tokens) {
  const int64_t d = config.d_model;
  // In the fit both models' streams before and after the attention, and what the attention gave; in
  // training the block's input, and the teacher's before and after it.
  const int64_t trained_token = 3 * kFloat * d;
  const int64_t fitted_token =
      options.error_feedback ? 4 * kFloat * d + 2 * kBf16 * config.d_q() : trained_token;
  const int64_t trained = std::min(tokens, options.warm_batch * options.seq_len);
  const int64_t training = options.warm_epochs > 0.0
                               ? sizes.trained_block * 3 * kFloat + sizes.largest_block * kBf16 +
                                     sizes.exchanged +
                                     trained * (2 * block_activations(config) + 4 * kFloat * d) +
                                     head_bytes(config, trained)
                               : 0;
  const int64_t widest = std::max(config.d_ff, config.d_q());
  const int64_t fit = 6 * kFloat * widest * widest;  // moments of the widest layer's inputs
  const bool fits_more = tokens * fitted_token + fit > tokens * trained_token + training;
  const int64_t whole = sizes.processes > 1 ? sizes.largest_block : 0;  // the block under way
  MemoryPhase phase{
      "start and warm start",
      {{"original", sizes.original},
       {"latents and scales", kFloat * (sizes.latents + sizes.scales + whole)},
       {"streams of the text", tokens * (fits_more ? fitted_token : trained_token)},
       {fits_more ? "a layer's fit" : "a block's training", fits_more ? fit : training}}};
  add_slack(phase, kStartSlack);
  return phase;
}

MemoryPhase distill_phase(const ModelConfig& config, const QuantizeOptions& options,
                          const Sizes& sizes) {
  const int64_t windows =
      options.micro_batch > 0 ? std::min(options.micro_batch, options.batch) : options.batch;
  const int64_t tokens = windows * options.seq_len, d = config.d_model;
  const bool muon = options.optimizer == Optimizer::kMuon;
  const int64_t moments =
      (muon ? 1 : 2) * (options.momentum == MomentumType::kBF16 ? kBf16 : kFloat);
  const int64_t of_block = tokens * block_activations(config);
  int64_t kept = config.layers * of_block;
  if (options.recompute) {
    kept = config.layers * tokens * kFloat * d + of_block;
  }
  if (options.gamma > 0.0 && options.gamma_on == GammaOn::kBlocks) {
    kept += config.layers * tokens * kFloat * d;  // the teacher's
  }
  // Gradients come while a pass gives its activations back; from the second pass on they are there.
  const int64_t gradients = kFloat * (sizes.latents + sizes.scales);
  const bool one_pass = windows == options.batch;
  const int64_t working = std::max(of_block + 2 * tokens * kFloat * d, head_bytes(config, tokens));
  MemoryPhase phase{
      "distillation",
      {{"original", sizes.original},
       {"latents and scales", kFloat * (sizes.latents + sizes.scales)},
       {"optimizer", moments * sizes.latents + 2 * kFloat * sizes.scales},
       {"weights of the paths", kBf16 * (options.recompute ? sizes.largest_block : sizes.linear)}}};
  if (one_pass) {
    phase.parts.push_back({"activations, then gradients", std::max(kept, gradients)});
  } else {
    phase.parts.push_back({"gradients", gradients});
    phase.parts.push_back({"activations", kept});
  }
  phase.parts.push_back({"a block's gradients, or the head", working});
  if (sizes.exchanged > 0) {  // and the rows' weights, which wait for their gradients
    const int64_t rows = (options.recompute ? sizes.largest_block : sizes.linear) / sizes.processes;
    phase.parts.push_back({"exchanges", sizes.exchanged + kBf16 * rows});
  }
  if (options.ema > 0.0) {
    phase.parts.push_back({"average of the latents", kFloat * sizes.latents});
  }
  add_slack(phase, kDistillSlack);
  return phase;
}

}  // namespace

int64_t MemoryPhase::bytes() const {
  return std::accumulate(parts.begin(), parts.end(), int64_t{0},
                         [](int64_t sum, const MemoryPart& part) { return sum + part.bytes; });
}

std::string MemoryPhase::describe() const {
  const auto gigabytes = [](int64_t bytes) { return static_cast<double>(bytes) / 1e9; };
  std::string text = fmt::format("{} {:.2f} GB:", name, gigabytes(bytes()));
  const char* separator = " ";
  for (const MemoryPart& part : parts) {
    text += fmt::format("{}{} {:.2f}", separator, part.what, gigabytes(part.bytes));
    separator = ", ";
  }
  return text;
}

std::vector<MemoryPhase> plan_memory(const ModelConfig& config, const PathPlan& bits,
                                     const QuantizeOptions& given, int64_t calib_tokens,
                                     int64_t distill_tokens, int processes) {
  QuantizeOptions options = given;
  options.batch /= processes;
  options.warm_batch /= processes;
  calib_tokens /= processes;
  const Sizes sizes = sizes_of(config, bits, options, processes);
  std::vector<MemoryPhase> phases;
  if (calib_tokens > 0) {
    phases.push_back(blocks_phase(config, options, sizes, calib_tokens));
  }
  if (distill_tokens > 0) {
    phases.push_back(distill_phase(config, options, sizes));
  }
  return phases;
}

int64_t peak_bytes(const std::vector<MemoryPhase>& phases) {
  int64_t most = 0;
  for (const MemoryPhase& phase : phases) {
    most = std::max(most, phase.bytes());
  }
  return most;
}

namespace {

// With --share-original as it is.
std::optional<std::string> others_within(const ModelConfig& config, const PathPlan& bits,
                                         const QuantizeOptions& options, int64_t calib_tokens,
                                         int64_t distill_tokens, int64_t bytes, int processes) {
  QuantizeOptions tried = options;
  std::string written;
  const auto fits = [&] {
    return peak_bytes(plan_memory(config, bits, tried, calib_tokens, distill_tokens, processes)) <=
           bytes;
  };
  const auto start_fits = [&] {
    return peak_bytes(plan_memory(config, bits, tried, calib_tokens, 0, processes)) <= bytes;
  };
  const int64_t windows_needed =
      processes == 1 ? 1 : (options.warm_epochs > 0.0 ? options.warm_batch : processes);
  const int64_t least = windows_needed * options.seq_len;
  if (!start_fits() && options.calib_tokens > least) {
    while (!start_fits() && calib_tokens > least) {
      calib_tokens = std::max(least, calib_tokens / 2);
    }
    written += fmt::format(" --calib-tokens {}", calib_tokens);
  }
  const int64_t windows = options.micro_batch > 0 ? options.micro_batch : options.batch / processes;
  const auto smaller_batch = [&] {
    for (tried.micro_batch = windows; !fits() && tried.micro_batch > 1;) {
      tried.micro_batch = (tried.micro_batch + 1) / 2;
    }
    return fits();
  };
  const bool layers = options.gamma > 0.0 && options.gamma_on == GammaOn::kLayers;
  if (distill_tokens > 0 && !fits() && !layers) {
    tried.recompute = true;  // costs less time than small batches
    tried.micro_batch = options.micro_batch;
  }
  if (distill_tokens > 0 && !fits()) {
    (void)smaller_batch();
  }
  if (!fits() && tried.momentum != MomentumType::kBF16) {
    tried.momentum = MomentumType::kBF16;
    (void)smaller_batch();
  }
  if (!fits() && tried.optimizer != Optimizer::kMuon) {
    tried.optimizer = Optimizer::kMuon;
    (void)smaller_batch();
  }
  if (!fits()) {
    return std::nullopt;
  }
  if (tried.recompute != options.recompute) {
    written += " --recompute";
  }
  if (tried.micro_batch != options.micro_batch && tried.micro_batch < options.batch / processes) {
    written += fmt::format(" --micro-batch {}", tried.micro_batch);
  }
  if (tried.optimizer != options.optimizer) {
    written += " --optimizer muon";
  }
  if (tried.momentum != options.momentum) {
    written += " --momentum bf16";
  }
  return written.empty() ? written : written.substr(1);
}

}  // namespace

std::optional<std::string> options_within(const ModelConfig& config, const PathPlan& bits,
                                          const QuantizeOptions& options, int64_t calib_tokens,
                                          int64_t distill_tokens, int64_t bytes, int processes) {
  const auto others = [&](const QuantizeOptions& given) {
    return others_within(config, bits, given, calib_tokens, distill_tokens, bytes, processes);
  };
  if (processes == 1 || options.share_original) {
    return others(options);
  }
  QuantizeOptions shared = options;
  shared.share_original = true;
  const auto without = others(options), with = others(shared);
  if (with && with->empty() && !(without && without->empty())) {
    return "--share-original";
  }
  return without || !with ? without : "--share-original " + *with;
}

}  // namespace rabit::train
