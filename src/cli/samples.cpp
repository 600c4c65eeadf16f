#include "cli/samples.h"

#include <algorithm>

#include "cli/common.h"
#include "rabit/engine.h"

namespace rabit::cli {

Result<std::vector<std::string>> write_samples(const std::string& model,
                                               const std::vector<std::string>& prompts,
                                               int64_t count, int64_t threads,
                                               const std::function<void()>& done) {
  RABIT_ASSIGN(const auto file, GgufFile::open(model));
  RABIT_ASSIGN(const auto tokenizer, load_tokenizer(*file));
  RABIT_ASSIGN(const auto loaded, Model::load(model, {.threads = static_cast<int>(threads)}));
  std::vector<std::string> texts;
  for (const std::string& prompt : prompts) {
    const std::vector<int32_t> tokens = tokens_of_text(*tokenizer, prompt);
    const int64_t room =
        std::min(count, loaded->context_length() - static_cast<int64_t>(tokens.size()));
    std::vector<int32_t> written;
    if (!tokens.empty() && room > 0) {
      RABIT_ASSIGN(const auto session,
                   Session::create(loaded, static_cast<int64_t>(tokens.size()) + room));
      Sampler sampler({.temperature = static_cast<float>(kSampleTemperature), .seed = kSampleSeed});
      RABIT_ASSIGN(int32_t token, session->next(tokens, sampler));
      while (token != tokenizer->spec().eos_id) {
        written.push_back(token);
        if (static_cast<int64_t>(written.size()) == room) {
          break;
        }
        RABIT_ASSIGN(token, session->next(std::span(&token, 1), sampler));
      }
    }
    texts.push_back(tokenizer->decode(written, false));
    done();
  }
  return texts;
}

}  // namespace rabit::cli
