// The `rabit` program: picks the subcommand and turns whatever goes wrong into one line on stderr
// and an exit code (ExitCode in common.h). Nothing below this file prints errors or exits.
#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <csignal>
#include <ctime>
#include <exception>
#include <new>
#include <sstream>

#include "base/files.h"
#include "base/interrupt.h"
#include "cli/common.h"

namespace rabit::cli {
namespace {

/// A program started with a closed stdin, stdout or stderr would get that number for the next file
/// it opens, and then print into its own model. Fill the gaps with something no write succeeds on.
void occupy_standard_streams() {
  for (int fd = STDIN_FILENO; fd <= STDERR_FILENO; ++fd) {
    if (fcntl(fd, F_GETFD) == -1) {
      // open() returns the lowest free number, which is fd: those below are open by now.
      [[maybe_unused]] const int got = open("/dev/null", O_RDONLY);
    }
  }
}

int64_t milliseconds() {
  timespec now{};
  clock_gettime(CLOCK_MONOTONIC, &now);
  return int64_t{now.tv_sec} * 1000 + now.tv_nsec / 1'000'000;
}

// Some senders signal the process and its group: signals so close together are one.
constexpr int64_t kOneSignal = 200;
std::atomic<int64_t> g_first_signal{0};

extern "C" void on_signal(int signal) {
  // The wish to stop may have come from elsewhere: from another process of a run.
  const bool wished = set_interrupted(true, signal == SIGTERM);
  if (!wished || g_first_signal == 0) {
    g_first_signal = milliseconds();
  } else if (milliseconds() - g_first_signal > kOneSignal) {
    // Only what is safe in a handler; nothing can be done if it fails.
    constexpr char kLastWords[] = "\nrabit: stopped at once, by a second signal\n";
    [[maybe_unused]] const auto written = ::write(STDERR_FILENO, kLastWords, sizeof kLastWords - 1);
    std::signal(signal, SIG_DFL);
    std::raise(signal);
  }
}

/// SIGINT, SIGTERM and SIGHUP: the first asks to stop, a second says so and ends the process.
void catch_interrupts() {
  struct sigaction action {};
  action.sa_handler = on_signal;
  sigemptyset(&action.sa_mask);
  sigaction(SIGINT, &action, nullptr);
  sigaction(SIGTERM, &action, nullptr);
  struct sigaction hangup {};
  if (sigaction(SIGHUP, nullptr, &hangup) == 0 && hangup.sa_handler != SIG_IGN) {  // nohup's
    sigaction(SIGHUP, &action, nullptr);
  }
  std::signal(SIGXFSZ, SIG_IGN);  // a file that grew too large is an error of its write
}

extern "C" void on_bus_error(int signal, siginfo_t* info, void* /*context*/) {
  const char* name = info->si_code > 0 ? MappedFile::name_at(info->si_addr) : nullptr;
  if (name == nullptr) {
    std::signal(signal, SIG_DFL);
    std::raise(signal);
    return;
  }
  static std::atomic_flag told;
  while (told.test_and_set()) {  // another thread has met it too, and ends the process
    ::pause();
  }
  // Only what is safe in a handler; nothing can be done if it fails.
  char line[4096];
  size_t size = 0;
  for (const char* part : {"rabit: ", name, " changed while it was in use"}) {
    for (; *part != 0 && size < sizeof line - 1; ++part) {
      line[size++] = static_cast<unsigned char>(*part) < 0x20 || *part == 0x7F ? ' ' : *part;
    }
  }
  line[size++] = '\n';
  [[maybe_unused]] const auto written = ::write(STDERR_FILENO, line, size);
  ::_exit(kFailure);
}

/// A mapped file that others cut short is an error like any other.
void catch_lost_files() {
  struct sigaction action {};
  action.sa_sigaction = on_bus_error;
  action.sa_flags = SA_SIGINFO;
  sigemptyset(&action.sa_mask);
  sigaction(SIGBUS, &action, nullptr);
}

int fail(int code, const std::string& message) {
  note(message);
  return code;
}

/// The command line up to the subcommand that was being read, for "see ... --help".
std::string help_command(const CLI::App& app) {
  const auto parsed = app.get_subcommands();
  return parsed.empty() ? "rabit --help" : "rabit " + parsed.front()->get_name() + " --help";
}

int usage_error(const CLI::App& app, const std::string& message) {
  return fail(kUsageError, one_line(message) + " (see " + help_command(app) + ")");
}

int run_program(int argc, char** argv) {
  CLI::App app{
      "rabit: 2-bit quantization of language models by residual binarization.\n"
      "Weights become a few matrices of +1 and -1 with scales per row and column, trained to "
      "behave\n"
      "like the original, in one GGUF file that runs without any framework."};
  app.name("rabit");
  app.set_version_flag("--version", "rabit " RABIT_VERSION, "Print the version and exit");
  app.get_formatter()->column_width(34);
  app.require_subcommand(0, 1);
  app.footer(
      "Examples:\n"
      "  rabit inspect model.gguf\n"
      "  rabit run -m model.gguf -p \"The capital of France is\" -n 32 --temp 0\n"
      "  rabit eval --help\n\n"
      "Exit codes: 0 success (also a quantize that SIGTERM stopped and that saved its work), 1 "
      "error,\n"
      "2 wrong usage, 130 interrupted.");
  const std::array commands = {add_quantize(app), add_diagnose(app), add_report(app), add_eval(app),
                               add_run(app),      add_bench(app),    add_inspect(app)};
  for (const Command& command : commands) {
    command.app->get_formatter()->column_width(34);
    refuse_options_as_values(command.app);
  }

  try {
    app.parse(argc, argv);
  } catch (const CLI::Success& request) {  // --help, --version
    std::ostringstream out, err;
    app.exit(request, out, err);
    if (const Status status = write_stdout(out.str()); !status) {
      return fail(kFailure, status.error().message);
    }
    return kSuccess;
  } catch (const CLI::RequiredError& error) {
    // What was misspelt is often what is missing.
    const auto unknown = app.remaining(true);
    return usage_error(app, (unknown.empty() ? "" : "unknown argument " + unknown.front() + "; ") +
                                std::string(error.what()));
  } catch (const CLI::ParseError& error) {
    return usage_error(app, error.what());
  }

  for (const Command& command : commands) {
    if (!command.app->parsed()) {
      continue;
    }
    try {
      const Status status = command.run();
      if (status) {
        return kSuccess;
      }
      const auto& [message, stopped] = status.error();
      const int code = stopped ? kInterrupted : kFailure;
      return message.empty() ? code : fail(code, message);  // others of a run may have told
    } catch (const CLI::ParseError& error) {                // options that contradict each other
      return usage_error(app, error.what());
    }
  }
  return usage_error(app,
                     "say what to do: quantize, diagnose, report, eval, run, bench or inspect");
}

}  // namespace
}  // namespace rabit::cli

int main(int argc, char** argv) {
  using namespace rabit;
  try {
    cli::occupy_standard_streams();
    std::signal(SIGPIPE, SIG_IGN);  // a reader that went away is a failed write, reported as such
    cli::catch_interrupts();
    cli::catch_lost_files();
    return cli::run_program(argc, argv);
  } catch (const std::bad_alloc&) {
    return cli::fail(cli::kFailure, "out of memory: take a smaller model, context or batch");
  } catch (const std::exception& error) {
    return cli::fail(cli::kFailure, std::string("internal error: ") + error.what());
  }
}
