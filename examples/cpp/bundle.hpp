// What a bundle's manifest says about one graph, and the check of its files against it.
#pragma once

#include <algorithm>
#include <array>
#include <cctype>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace scm {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream content;
  if (!file || !(content << file.rdbuf())) throw Error(path + " cannot be read. Copy the bundle again.");
  return content.str();
}

// SHA-256, FIPS 180-4.
inline std::string sha256(std::string data) {
  static const std::array<std::uint32_t, 64> k = [] {  // fractions of the cube roots of the first 64 primes
    std::array<std::uint32_t, 64> found{};
    for (std::uint64_t n = 2, i = 0; i < 64; ++n) {
      bool prime = true;
      for (std::uint64_t d = 2; d * d <= n; ++d) prime = prime && n % d;
      if (!prime) continue;
      unsigned __int128 low = 0, high = static_cast<unsigned __int128>(8) << 32;  // root * 2^32 in whole numbers
      while (high - low > 1) {
        const unsigned __int128 mid = (low + high) / 2;
        ((mid * mid * mid) >> 96 < n ? low : high) = mid;
      }
      found[i++] = static_cast<std::uint32_t>(low);
    }
    return found;
  }();
  std::array<std::uint32_t, 8> h = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                    0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  const std::uint64_t bits = data.size() * 8;
  data.push_back('\x80');
  data.resize((data.size() + 8 + 63) / 64 * 64);
  for (int i = 0; i < 8; ++i) data[data.size() - 1 - i] = static_cast<char>(bits >> (8 * i));
  const auto rotate = [](std::uint32_t x, int n) { return x >> n | x << (32 - n); };
  for (std::size_t at = 0; at < data.size(); at += 64) {
    std::uint32_t w[64];
    for (int i = 0; i < 16; ++i) {
      const auto* p = reinterpret_cast<const unsigned char*>(data.data()) + at + 4 * i;
      w[i] = std::uint32_t{p[0]} << 24 | p[1] << 16 | p[2] << 8 | p[3];
    }
    for (int i = 16; i < 64; ++i) {
      const std::uint32_t s0 = rotate(w[i - 15], 7) ^ rotate(w[i - 15], 18) ^ w[i - 15] >> 3;
      const std::uint32_t s1 = rotate(w[i - 2], 17) ^ rotate(w[i - 2], 19) ^ w[i - 2] >> 10;
      w[i] = w[i - 16] + s0 + w[i - 7] + s1;
    }
    auto v = h;
    for (int i = 0; i < 64; ++i) {
      const std::uint32_t s1 = rotate(v[4], 6) ^ rotate(v[4], 11) ^ rotate(v[4], 25);
      const std::uint32_t t1 = v[7] + s1 + ((v[4] & v[5]) ^ (~v[4] & v[6])) + k[i] + w[i];
      const std::uint32_t s0 = rotate(v[0], 2) ^ rotate(v[0], 13) ^ rotate(v[0], 22);
      const std::uint32_t t2 = s0 + ((v[0] & v[1]) ^ (v[0] & v[2]) ^ (v[1] & v[2]));
      v = {t1 + t2, v[0], v[1], v[2], v[3] + t1, v[4], v[5], v[6]};
    }
    for (int i = 0; i < 8; ++i) h[i] += v[i];
  }
  std::string hex;
  for (const std::uint32_t word : h)
    for (int shift = 28; shift >= 0; shift -= 4) hex += "0123456789abcdef"[word >> shift & 15];
  return hex;
}

// A JSON value: the manifest needs objects, lists, texts and numbers.
struct Json {
  std::string text;  // of a text, a number or a word
  std::vector<Json> list;
  std::map<std::string, Json> object;

  const Json& operator[](const std::string& name) const {
    const auto found = object.find(name);
    if (found == object.end()) throw Error("the manifest has no '" + name + "', expected one. Export the bundle again.");
    return found->second;
  }
  double number() const { return std::strtod(text.c_str(), nullptr); }

  static Json parse(const std::string& source) {
    std::size_t at = 0;
    Json value = read(source, at, 0);
    skip(source, at);
    if (at != source.size()) fail();
    return value;
  }

 private:
  [[noreturn]] static void fail() { throw Error("the manifest is no JSON. Copy the bundle again."); }
  static char skip(const std::string& s, std::size_t& at) {
    while (at < s.size() && std::isspace(static_cast<unsigned char>(s[at]))) ++at;
    return at < s.size() ? s[at] : '\0';
  }
  static void expect(const std::string& s, std::size_t& at, char c) {
    if (skip(s, at) != c) fail();
    ++at;
  }
  static std::string read_text(const std::string& s, std::size_t& at) {
    expect(s, at, '"');
    std::string text;
    for (; at < s.size() && s[at] != '"'; ++at) {
      if (s[at] == '\\') text += s[at++];  // escapes stay as they are: paths and digests have none
      if (at < s.size()) text += s[at];
    }
    if (at++ >= s.size()) fail();
    return text;
  }
  static Json read(const std::string& s, std::size_t& at, int depth) {
    Json value;
    const char first = skip(s, at);
    if (depth > 64) fail();
    if (first == '"') {
      value.text = read_text(s, at);
    } else if (first == '{' || first == '[') {
      const char last = first == '{' ? '}' : ']';
      ++at;
      for (bool more = skip(s, at) != last; more;) {
        std::string name;
        if (first == '{') {
          name = read_text(s, at);
          expect(s, at, ':');
        }
        Json item = read(s, at, depth + 1);
        if (first == '[') value.list.push_back(std::move(item));
        else if (!value.object.emplace(name, std::move(item)).second) fail();
        more = skip(s, at) == ',';
        if (more) ++at;
      }
      expect(s, at, last);
    } else {
      while (at < s.size() && !std::strchr(",]} \t\r\n", s[at])) value.text += s[at++];
      if (value.text.empty()) fail();
    }
    return value;
  }
};

// The sampler of one graph.
struct Sampler {
  std::string graph;  // path of the file
  std::vector<std::int64_t> sample_shape, image_shape;
  int num_noise_inputs = 1;
  std::int64_t num_classes = 0;
  double low = -1, high = 1;
  std::string output;
};

// A whole number, as a label count or an axis is.
inline std::int64_t whole(const Json& json, double low, double high) {
  const double value = json.number();
  if (!(value >= low && value <= high) || value != static_cast<double>(static_cast<std::int64_t>(value)))
    throw Error("the manifest has the number " + json.text.substr(0, 40) + " where one of " + std::to_string(low) + " to " +
                std::to_string(high) + " is expected. Export the bundle again.");
  return static_cast<std::int64_t>(value);
}

// A shape of at most 2^28 numbers, 1 GiB.
inline std::vector<std::int64_t> axes(const Json& json) {
  std::vector<std::int64_t> found;
  double size = 1;
  for (const Json& axis : json.list) {
    found.push_back(whole(axis, 1, 1 << 28));
    size *= static_cast<double>(found.back());
  }
  if (found.empty() || size > 1 << 28)
    throw Error("the manifest has a shape of " + std::to_string(size) + " numbers, expected at most 2^28.");
  return found;
}

// Finds the graph of a precision and a number of steps, and checks its files against the manifest.
inline Sampler open_sampler(const std::string& bundle, const std::string& precision, int steps) {
  const Json manifest = Json::parse(read_file(bundle + "/scm_manifest.json"));
  Sampler sampler;
  for (const Json& artifact : manifest["artifacts"].list)
    if (artifact["format"].text == "onnx" && artifact["precision"].text == precision &&
        artifact["num_inference_steps"].number() == steps)
      sampler.graph = artifact["path"].text;
  if (sampler.graph.empty() || sampler.graph.find("..") != std::string::npos || sampler.graph[0] == '/')
    throw Error(bundle + " has no " + precision + " graph of " + std::to_string(steps) +
                " steps. See what is there: scm-export inspect");
  int checked = 0;
  for (const Json& file : manifest["files"].list) {
    const std::string path = file["path"].text;
    if (path == "decoder/model.onnx")
      throw Error("this example runs one graph, and the decoder of " + bundle +
                  " is another one. Export the bundle without --split.");
    if (path != sampler.graph && path != sampler.graph + "_data") continue;
    const std::string found = sha256(read_file(bundle + "/" + path));
    if (found != file["sha256"].text)
      throw Error(path + " has sha256 " + found + ", expected " + file["sha256"].text + ". Copy the bundle again.");
    ++checked;
  }
  if (!checked) throw Error("the manifest does not list " + sampler.graph + ". Export the bundle again.");
  sampler.graph = bundle + "/" + sampler.graph;
  bool found = false;
  for (const Json& spec : manifest["samplers"].list) {
    if (spec["times"].list.size() != static_cast<std::size_t>(steps)) continue;
    if (spec["noise_contract"].text != "scm-noise-v1" || !spec["conditioning"].list.empty() ||
        spec["guidance_range"].text != "null")
      throw Error("this example knows noise scm-noise-v1 and labels; the sampler has other inputs.");
    sampler.sample_shape = axes(spec["sample_shape"]);
    sampler.image_shape = spec["output_shape"].list.empty() ? sampler.sample_shape : axes(spec["output_shape"]);
    const bool fresh = !spec.object.count("renoise") || spec["renoise"].text == "fresh";  // older bundles do not say
    sampler.num_noise_inputs = fresh ? steps : 1;
    sampler.num_classes = whole(spec["num_classes"], 0, 1 << 28);
    const std::vector<Json>& range = spec["value_range"].list;
    if (range.size() != 2 || !(range[0].number() < range[1].number()))
      throw Error("the manifest has no value_range of two rising numbers. Export the bundle again.");
    sampler.low = range[0].number();
    sampler.high = range[1].number();
    sampler.output = spec["output"].text == "pixels" ? "images" : "latents";
    found = true;
  }
  if (!found)
    throw Error("the manifest has no sampler of " + std::to_string(steps) + " steps. Export the bundle again.");
  return sampler;
}

}  // namespace scm
