// SPDX-License-Identifier: Apache-2.0
#include <cstdio>
#include <exception>
#include <fstream>
#include <string>

#include "attend/core/error.h"
#include "cli.h"

namespace attend::cli {

void add_json_option(CLI::App& command, std::string& path) {
  command.add_option("--json", path, "Write the result as JSON to FILE; - is standard output")
      ->type_name("FILE");
}

void write_json(const nlohmann::ordered_json& value, const std::string& path) {
  if (path.empty()) return;
  // Names of files may hold anything, JSON only UTF-8.
  constexpr auto kReplace = nlohmann::ordered_json::error_handler_t::replace;
  const std::string text = value.dump(2, ' ', false, kReplace) + "\n";
  if (path == "-") {
    std::fputs(text.c_str(), stdout);
    return;
  }
  std::ofstream file(path);
  file << text;
  file.flush();
  if (!file) throw Error("cannot write the JSON result to '" + path + "'");
}

}  // namespace attend::cli

int main(int argc, char** argv) {
  using namespace attend;
  CLI::App app{
      "attend: the attention layer of an LLM server. Start with 'attend replay --help' (run a "
      "serving "
      "trace) or 'attend select --help' (which back end, and why)."};
  app.require_subcommand(1);
  app.failure_message([](const CLI::App*, const CLI::Error& e) {
    return std::string("attend: ") + e.what() + " (--help shows the options)\n";
  });
#define ATTEND_COMMAND(name) cli::add_##name(app);
#include "commands.inc"
#undef ATTEND_COMMAND
  try {
    app.parse(argc, argv);
    return cli::kOk;
  } catch (const CLI::ParseError& e) {
    return app.exit(e) == 0 ? cli::kOk : cli::kBadUsage;
  } catch (const cli::Exit& e) {
    return e.code;
  } catch (const std::exception& e) {
    std::fprintf(stderr, "attend: %s\n", e.what());
    return cli::kBadUsage;
  }
}
