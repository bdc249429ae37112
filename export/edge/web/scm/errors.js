/** Errors of scm.js. */

/**
 * An error that this module raises on purpose. Its message says what was found, what was expected and what to do;
 * `code` is one of the names in `ErrorCode` of scm.d.ts and does not change between versions.
 */
export class ScmError extends Error {
  /**
   * @param {import("../scm.js").ErrorCode} code
   * @param {string} message
   * @param {unknown} [cause]
   */
  constructor(code, message, cause) {
    super(message, cause === undefined ? undefined : { cause });
    this.name = "ScmError";
    this.code = code;
  }
}

/**
 * Return the text of whatever was thrown, on one line.
 * @param {unknown} error
 * @returns {string}
 */
export function messageOf(error) {
  const text = error instanceof Error ? error.message || error.name : String(error);
  return text.replace(/\s+/g, " ").trim().slice(0, 500);
}

/**
 * Translate what ONNX Runtime threw.
 * @param {unknown} error
 * @param {string} doing What failed, for example "opening model/fp32/1step/model.onnx on wasm".
 * @returns {ScmError}
 */
export function fromRuntime(error, doing) {
  if (error instanceof ScmError) return error;
  const text = messageOf(error);
  // "Integer overflow" is what it says of a tensor of 4 GiB or more.
  const full =
    error instanceof RangeError || /bad_alloc|out of memory|allocat|access out of bounds|integer overflow/i.test(text);
  return full
    ? new ScmError(
        "out-of-memory",
        `${doing} ran out of memory: ${text}. A WebAssembly program has at most 4 GiB. Ask for a smaller batchSize, ` +
          "take fp16, or close other tabs.",
        error,
      )
    : new ScmError(
        "runtime",
        `${doing} failed in ONNX Runtime: ${text}. Try the other device or precision; the model may use an operator ` +
          "that this device does not have.",
        error,
      );
}
