// scm_generate BUNDLE [--steps N] [--precision P] [--seed S] [--label L] [--threads N] [-o image.ppm] [--raw image.f32]
//
// Writes the image of a seed as a PPM file, and with --raw its float32 numbers, channels first.
#include <cmath>
#include <cstdio>
#include <fstream>
#include <iostream>

#include "bundle.hpp"
#include "noise.hpp"
#include "ort.hpp"

namespace {

std::size_t product(const std::vector<std::int64_t>& shape) {
  std::size_t size = 1;
  for (const std::int64_t axis : shape) size *= static_cast<std::size_t>(axis);
  return size;
}

constexpr const char* kUsage =
    "usage: scm_generate BUNDLE [--steps N] [--precision P] [--seed S] [--label L] [--threads N] [-o image.ppm] "
    "[--raw image.f32]";

std::uint64_t whole(const std::string& option, const std::string& text, std::uint64_t most = ~std::uint64_t{0}) {
  std::size_t used = 0;
  std::uint64_t value = 0;
  try {
    if (!text.empty() && text[0] != '-') value = std::stoull(text, &used);
  } catch (const std::exception&) {
  }
  if (text.empty() || used != text.size() || value > most)
    throw scm::Error(option + " is " + text + ", expected a whole number of at most " + std::to_string(most) + ".");
  return value;
}

void write_ppm(const std::string& path, const std::vector<float>& image, const scm::Sampler& sampler) {
  const auto& shape = sampler.image_shape;
  if (shape.size() != 3 || shape[0] != 3) throw scm::Error("the image has no 3 channels: use --raw instead of -o.");
  const std::size_t pixels = static_cast<std::size_t>(shape[1] * shape[2]);
  std::ofstream file(path, std::ios::binary);
  file << "P6\n" << shape[2] << " " << shape[1] << "\n255\n";
  for (std::size_t at = 0; at < pixels; ++at)
    for (std::size_t channel = 0; channel < 3; ++channel) {
      const double unit = (image[channel * pixels + at] - sampler.low) / (sampler.high - sampler.low);
      file.put(static_cast<char>(static_cast<int>(std::nearbyint(std::min(std::max(unit, 0.0), 1.0) * 255.0))));
    }
  if (!file.flush()) throw scm::Error(path + " cannot be written.");
}

int run(int count, char** words) {
  std::string bundle, precision = "fp32", ppm, raw;
  std::uint64_t steps = 2, seed = 0, label = 0, threads = 0;
  for (int i = 1; i < count; ++i) {
    const std::string word = words[i];
    if (word.empty() || word[0] != '-') {
      bundle = word;
      continue;
    }
    if (word == "-h" || word == "--help") {
      std::cout << kUsage << "\n";
      return 0;
    }
    if (i + 1 == count) throw scm::Error(word + " has no value, expected " + word + " VALUE.");
    const std::string value = words[++i];
    if (word == "--steps") steps = whole(word, value, 64);
    else if (word == "--seed") seed = whole(word, value);
    else if (word == "--label") label = whole(word, value);
    else if (word == "--threads") threads = whole(word, value, 1024);
    else if (word == "--precision") precision = value;
    else if (word == "--raw") raw = value;
    else if (word == "-o") ppm = value;
    else throw scm::Error("unknown option " + word + ".");
  }
  if (bundle.empty() || (ppm.empty() && raw.empty()))
    throw scm::Error(kUsage);

  const scm::Sampler sampler = scm::open_sampler(bundle, precision, static_cast<int>(steps));
  const auto batch_of_one = [](std::vector<std::int64_t> shape) { return shape.insert(shape.begin(), 1), shape; };
  std::vector<std::vector<float>> noise;
  std::map<std::string, scm::Tensor> feeds;
  const std::size_t size = product(sampler.sample_shape);
  for (int i = 0; i < sampler.num_noise_inputs; ++i)
    noise.push_back(scm::standard_normal(seed, static_cast<std::uint32_t>(i), size));
  for (int i = 0; i < sampler.num_noise_inputs; ++i)
    feeds["noise_" + std::to_string(i)] = {batch_of_one(sampler.sample_shape), noise[i].data(),
                                           size * sizeof(float), scm::kFloat};
  const std::int64_t chosen = static_cast<std::int64_t>(label);
  if (label >= static_cast<std::uint64_t>(std::max<std::int64_t>(sampler.num_classes, 1)))
    throw scm::Error("--label is " + std::to_string(label) + ", the model has " + std::to_string(sampler.num_classes) +
                     " labels. Expected a number below.");
  if (sampler.num_classes) feeds["class_labels"] = {{1}, &chosen, sizeof(chosen), scm::kInt64};

  scm::Session session(sampler.graph, static_cast<int>(threads));
  const std::vector<float> image = session.run(feeds, sampler.output, product(sampler.image_shape));
  for (const float value : image)
    if (!std::isfinite(value)) throw scm::Error("the image holds NaN or infinity, expected numbers. Nothing is written.");
  if (!raw.empty()) {
    std::ofstream file(raw, std::ios::binary);
    file.write(reinterpret_cast<const char*>(image.data()), static_cast<std::streamsize>(image.size() * sizeof(float)));
    if (!file.flush()) throw scm::Error(raw + " cannot be written.");
  }
  if (!ppm.empty()) write_ppm(ppm, image, sampler);
  return 0;
}

}  // namespace

int main(int count, char** words) {
  try {
    return run(count, words);
  } catch (const std::exception& error) {
    std::cerr << "scm_generate: " << error.what() << "\n";
    return 1;
  }
}
