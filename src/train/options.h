// The settings of a run, in one table that the command line, the log, the checkpoint and the checks
// all read. Free of torch, so that the command line compiles without it.
#pragma once

#include <cstdint>
#include <filesystem>
#include <nlohmann/json_fwd.hpp>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "model/config.h"
#include "rabit/result.h"

namespace rabit::train {

/// How paths are trained; docs/training.md, "Methods".
enum class Method { kRabit, kStandard, kDbllm, kMbok, kOnebit };
/// What updates the latents.
enum class Optimizer { kMuon, kAdamW };
/// What the optimizer of the latents keeps its moments in.
enum class MomentumType { kF32, kBF16 };
enum class Compute { kAuto, kBF16, kF32 };
/// Columns as they stand, or those with the largest inputs first.
enum class ColumnOrder { kNatural, kDiagonal };
/// Whose activations are a layer's inputs in error feedback.
enum class EfInputs { kStudent, kTeacher };
/// What a layer is fitted to on those inputs: its own weight's output; the output of the teacher's
/// layer; and, where it adds to the stream, what the student's stream lacks as well.
enum class EfTarget { kWeight, kOutput, kStream };
/// What --gamma compares in teacher and student.
enum class GammaOn { kBlocks, kLayers };
enum class EmbeddingType { kQ8_0, kF16 };

/// Every setting of a run; settings() says what each means and may be.
struct QuantizeOptions {
  Method method = Method::kRabit;
  std::string bits = "2";
  double target_bpw = 0.0;

  double minutes = 0.0;
  int64_t tokens = -1;
  int64_t calib_tokens = 262144;
  double warm_epochs = 4.0;
  int64_t warm_blocks = 0;  // the last ones; 0: all

  std::string device = "cpu";
  int64_t threads = 0;
  Compute compute = Compute::kAuto;
  bool dry_run = false;
  bool resume = false;
  double checkpoint_minutes = 10.0;
  int64_t checkpoint_steps = 0;  // 0: by time alone
  int64_t keep_checkpoints = 1;

  bool error_feedback = true;
  double ef_damp = 0.1;
  ColumnOrder ef_order = ColumnOrder::kDiagonal;
  EfInputs ef_inputs = EfInputs::kStudent;
  EfTarget ef_target = EfTarget::kStream;
  int64_t ef_rounds = 2;
  int64_t ef_sweeps = 10;
  double alpha_in = 1.0;
  double alpha_out = 0.0;
  bool alpha_search = false;
  int64_t init_sweeps = 8;
  int64_t als_steps = 12;

  std::string data_field = "text";
  std::string data_weights;

  int64_t seq_len = 1024;
  int64_t seed = 1;
  Optimizer optimizer = Optimizer::kAdamW;
  MomentumType momentum = MomentumType::kF32;
  int64_t warm_batch = 4;
  double warm_latent_lr = 2e-3;
  double warm_scale_lr = 1e-3;
  int64_t batch = 16;
  int64_t micro_batch = 0;  // 0: all of a step
  bool recompute = false;
  bool share_original = false;
  double latent_lr = 3e-4;
  double scale_lr = 3e-5;
  double ema = 0.0;
  bool train_norms = false;
  double warmup = 0.03;
  double gamma = 0.0;
  GammaOn gamma_on = GammaOn::kBlocks;
  double reverse_kl = 0.0;
  double temperature = 1.0;
  double cross_entropy = 0.0;
  double clip = 1.0;

  EmbeddingType embedding = EmbeddingType::kQ8_0;
  int64_t diagnose_tokens = 4096;
};

/// Each path has a latent of its own.
constexpr bool has_independent_latents(Method method) {
  return method == Method::kStandard || method == Method::kMbok;
}

/// Paths of every linear layer: a default, and exceptions by block and role.
class PathPlan {
 public:
  /// "2", or items such as "2,ffn_down=3,0-3=4,29.attn=3": a number alone is the default; a role
  /// ("attn" and "ffn" stand for all of theirs), blocks (N or N-M) or BLOCKS.ROLE get their own; of
  /// items that meet, the last wins. Errors name the item.
  static Result<PathPlan> parse(const std::string& text);

  int64_t paths(int64_t layer, Role role) const;
  /// The last block that an item names, or -1.
  int64_t last_layer() const;
  /// What parse() takes.
  const std::string& text() const { return text_; }
  /// One layer's paths from now on.
  void set(int64_t layer, Role role, int64_t paths);

 private:
  struct Item {
    int64_t first_layer = 0, last_layer = -1;  // none named: all
    std::string roles;                         // a prefix of the names meant; empty: all
    int64_t paths = 0;
  };
  std::vector<Item> items_;
  std::string text_;
};

/// One setting: where it lives, what the command line and the log call it, what it may be.
struct Setting {
  /// One of an enumeration's values, by its number.
  struct Choice {
    int (*get)(const QuantizeOptions&);
    void (*set)(QuantizeOptions&, int);
    std::vector<std::string> names;
  };
  struct Integer {
    int64_t QuantizeOptions::*member;
    int64_t low, high;
  };
  struct Number {
    double QuantizeOptions::*member;
    double low, high;
  };
  /// A flag; given, it makes the member `when_given`.
  struct Flag {
    bool QuantizeOptions::*member;
    bool when_given;
  };
  struct Text {
    std::string QuantizeOptions::*member;
    Status (*check)(const std::string&);
  };

  std::string_view key;     // in the log, in checkpoints and in the packed file; empty: not there
  std::string_view option;  // on the command line
  std::string_view group;   // of the help; empty: none
  std::variant<Integer, Number, Flag, Choice, Text> value;
  std::string_view help;
  /// A continuation may have another value than the run that it continues.
  bool may_change = false;
};

/// Numbers with commas between, none for an empty text. Errors: what is no positive number.
Result<std::vector<double>> parse_weights(const std::string& text);

/// All settings, in the order of the help.
std::span<const Setting> settings();

/// Time kept back at the end of a bounded run for packing, checking and writing.
inline constexpr double kFinishSeconds = 15.0;

/// All settings that have a key, with their values.
nlohmann::json describe(const QuantizeOptions& options);
/// The settings that differ from their defaults, as on a command line: " --bits 3 --seed 2".
std::string arguments_of(const QuantizeOptions& options);
/// The reverse of describe(); settings that are not there keep their defaults. Errors: a value that
/// a setting cannot have.
Result<QuantizeOptions> from_description(const nlohmann::json& description);

/// Options that differ from their defaults and change nothing in a run with so many tokens of
/// distillation.
std::vector<std::string> idle_settings(const QuantizeOptions& options, int64_t distill_tokens);

/// Settings out of range, or that contradict each other.
Status check_options(const QuantizeOptions& options);

/// Everything that can be known to be wrong before anything is read: settings out of range or that
/// contradict each other, a device that is not there, an output that cannot be written or that
/// would replace one of `inputs`, a checkpoint that the run would overwrite.
Status check_run(const QuantizeOptions& options, const std::filesystem::path& out,
                 std::span<const std::filesystem::path> inputs);

}  // namespace rabit::train
