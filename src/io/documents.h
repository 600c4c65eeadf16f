// Texts as documents: plain UTF-8 whose documents end at marker lines, or JSON Lines; as they are
// or compressed. A file is read as a stream and is hostile: what is wrong with it is said by place.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "rabit/result.h"

namespace rabit {

/// A line of a plain text that holds only this ends a document.
inline constexpr std::string_view kDocumentEnd = "<|endoftext|>";

/// The files of text that `path` stands for: itself, or, if it is a folder, all below it that are
/// called .txt, .text, .md, .jsonl or .ndjson, each also with .gz, .xz or .zst, in the order of
/// their paths; links to folders are not followed. Errors: nothing there, a folder that cannot be
/// read, one without such files.
Result<std::vector<std::filesystem::path>> text_files(const std::filesystem::path& path);

/// By its name, the file holds JSON Lines.
bool is_json_lines(const std::filesystem::path& path);

/// Takes a part of a document, never empty; `last`: the document ends with it.
using DocumentSink = std::function<Status(std::string_view part, bool last)>;

/// Gives the file's documents to `sink`, in order and in parts. Compression (gzip, xz, zstd) is
/// known by the content, JSON Lines by the name: one object a line, whose string `field` is a
/// document. Of anything else, documents end at marker lines and with the file. Empty documents
/// are left out. A part is about `part_bytes` long, or the last, and the next begins with a blank
/// after something else than white space, or a line feed after an ASCII letter or digit: there no
/// pre-tokenizer of byte-level BPE has a piece that crosses. A document without such a place is one
/// part.
/// Errors: a file that cannot be read or is damaged (as far as its compression tells), no text at
/// all, bytes that are not UTF-8 (with the offset in the text), a line of more than a gigabyte, one
/// that is no object or lacks the field (with its number); what `sink` returns.
Status read_documents(const std::filesystem::path& path, const std::string& field,
                      const DocumentSink& sink, size_t part_bytes = size_t{1} << 20);

}  // namespace rabit
