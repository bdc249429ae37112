// Run model.mlpackage and compare its images with PyTorch's; exit 3 if they differ.
//
//   swift check.swift        in this folder, on a Mac
import CoreML
import Foundation

struct Input: Decodable { let shape: [Int]; let dtype: String }
struct Expected: Decodable {
  let output: String
  let shape: [Int]
  let inputs: [String: Input]
  let width: Double
  let max_abs: Double?
  let min_psnr_db: Double?
}

func numbers<T>(_ file: String, _ type: T.Type) throws -> [T] {
  let data = try Data(contentsOf: URL(fileURLWithPath: file))
  return data.withUnsafeBytes { Array($0.bindMemory(to: type)) }
}

let expected = try JSONDecoder().decode(Expected.self, from: Data(contentsOf: URL(fileURLWithPath: "expected.json")))
let compiled = try MLModel.compileModel(at: URL(fileURLWithPath: "model.mlpackage"))
let model = try MLModel(contentsOf: compiled)
let wanted = try numbers("images.bin", Float32.self)
let size = wanted.count / expected.shape[0]
var passed = true
for sample in 0..<expected.shape[0] {
  var feeds: [String: Any] = [:]
  for (name, input) in expected.inputs {
    let count = input.shape.reduce(1, *)
    let shape = ([1] + input.shape).map { NSNumber(value: $0) }
    let isLabel = input.dtype == "int64"
    let array = try MLMultiArray(shape: shape, dataType: isLabel ? .int32 : .float32)
    if isLabel {
      let values = try numbers("\(name).bin", Int64.self)
      for i in 0..<count { array[i] = NSNumber(value: Int32(values[sample * count + i])) }
    } else {
      let values = try numbers("\(name).bin", Float32.self)
      for i in 0..<count { array[i] = NSNumber(value: values[sample * count + i]) }
    }
    feeds[name] = MLFeatureValue(multiArray: array)
  }
  let result = try model.prediction(from: MLDictionaryFeatureProvider(dictionary: feeds))
  guard let images = result.featureValue(for: expected.output)?.multiArrayValue, images.count == size else {
    print("FAIL  the package returns no \(size) numbers of \(expected.output)")
    exit(3)
  }
  var largest = 0.0, square = 0.0
  for i in 0..<size {
    let gap = abs(images[i].doubleValue - Double(wanted[sample * size + i]))
    largest = gap.isNaN ? .infinity : max(largest, gap)
    square += gap * gap / Double(size)
  }
  let psnr = 10 * log10(expected.width * expected.width / max(square, 1e-30))
  let good = largest.isFinite && largest <= expected.max_abs ?? .infinity && psnr >= expected.min_psnr_db ?? -.infinity
  passed = passed && good
  print("\(good ? "pass" : "FAIL")  sample \(sample): largest difference \(largest), PSNR \(psnr) dB")
}
exit(passed ? 0 : 3)
