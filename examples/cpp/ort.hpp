// ONNX Runtime through its C ABI, so that the library alone is enough to build.
//
// OrtApi is a table of functions whose order never changes; each entry below is a position in it. A program that has the
// headers of a release package includes onnxruntime_cxx_api.h instead of this file.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "bundle.hpp"

struct OrtApiBase {
  const void* const* (*GetApi)(std::uint32_t version);
  const char* (*GetVersionString)();
};
extern "C" const OrtApiBase* OrtGetApiBase();

namespace scm {

struct Tensor {
  std::vector<std::int64_t> shape;
  const void* data;
  std::size_t bytes;
  int type;  // kFloat or kInt64
};
constexpr int kFloat = 1, kInt64 = 7;

class Session {
 public:
  Session(const std::string& graph, int num_threads) {
    if (!api_) throw Error("libonnxruntime is older than 1.20, expected 1.20 or later.");
    check(call<kCreateEnv>(3, "scm", &env_));
    check(call<kOut>(&options_));
    check(call<kSetIntraOpNumThreads>(options_, num_threads));
    check(call<kCreateSession>(env_, graph.c_str(), options_, &session_));
    check(call<kCreateCpuMemoryInfo>(0, 0, &memory_));
  }
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;
  ~Session() {
    release(95, session_);
    release(94, memory_);
    release(100, options_);
    release(92, env_);
  }

  // Runs the graph; `size` numbers of the output.
  std::vector<float> run(const std::map<std::string, Tensor>& feeds, const std::string& output, std::size_t size) {
    std::vector<const char*> names;
    std::vector<void*> values;
    for (const auto& [name, tensor] : feeds) {
      names.push_back(name.c_str());
      values.push_back(nullptr);
      check(call<kCreateTensor>(memory_, const_cast<void*>(tensor.data), tensor.bytes, tensor.shape.data(),
                                tensor.shape.size(), tensor.type, &values.back()));
    }
    const char* wanted = output.c_str();
    void *result = nullptr, *data = nullptr;
    void* failed = call<kRun>(session_, nullptr, names.data(), values.data(), values.size(), &wanted, std::size_t{1},
                              &result);
    for (void* value : values) release(96, value);
    check(failed);
    std::size_t count = 0;
    void* info = nullptr;
    check(call<kGetTensorTypeAndShape>(result, &info));
    check(call<kGetTensorShapeElementCount>(info, &count));
    release(99, info);
    check(call<kGetTensorMutableData>(result, &data));
    std::vector<float> images;
    if (count == size) images.assign(static_cast<float*>(data), static_cast<float*>(data) + size);
    release(96, result);
    if (images.empty()) throw Error("the graph returned " + std::to_string(count) + " numbers, expected " +
                                    std::to_string(size) + ". Export the bundle again.");
    return images;
  }

 private:
  enum Position : int {
    kGetErrorMessage = 2,
    kCreateEnv = 3,
    kCreateSession = 7,
    kRun = 9,
    kOut = 10,  // CreateSessionOptions
    kSetIntraOpNumThreads = 24,
    kCreateTensor = 49,  // CreateTensorWithDataAsOrtValue
    kGetTensorMutableData = 51,
    kGetTensorShapeElementCount = 64,
    kGetTensorTypeAndShape = 65,
    kCreateCpuMemoryInfo = 69,
    kReleaseStatus = 93,
  };

  template <Position position, typename... Args>
  void* call(Args... args) {
    return reinterpret_cast<void* (*)(Args...)>(const_cast<void*>(api_[position]))(args...);
  }
  void release(int position, void* object) {
    if (object) reinterpret_cast<void (*)(void*)>(const_cast<void*>(api_[position]))(object);
  }
  void check(void* status) {
    if (!status) return;
    const auto message = reinterpret_cast<const char* (*)(void*)>(const_cast<void*>(api_[kGetErrorMessage]));
    const std::string said = message(status);
    release(kReleaseStatus, status);
    throw Error("ONNX Runtime " + std::string(OrtGetApiBase()->GetVersionString()) + ": " + said);
  }

  const void* const* api_ = OrtGetApiBase()->GetApi(20);
  void *env_ = nullptr, *options_ = nullptr, *session_ = nullptr, *memory_ = nullptr;
};

}  // namespace scm
