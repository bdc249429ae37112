/** The web worker of a `Generator`: runs an `Engine` and answers messages, so that the page stays responsive. */
import { Engine } from "./engine.js";
import { ScmError, messageOf } from "./errors.js";

/** @type {Engine | undefined} */
let engine;
/** @type {Map<number, AbortController>} */
const running = new Map();

addEventListener("message", ({ data }) => {
  if (data.abort) running.get(data.id)?.abort();
  else void answer(data);
});

/** @param {{ id: number, call: "open" | "prepare" | "generate" | "prove" | "close", args: any[] }} message */
async function answer({ id, call, args }) {
  const controller = new AbortController();
  running.set(id, controller);
  const onProgress = (/** @type {unknown} */ progress) => postMessage({ id, progress });
  const hooks = { signal: controller.signal, onProgress };
  try {
    let result;
    if (call === "open") {
      engine = await Engine.open(args[0], args[1], hooks);
      result = engine.info;
    } else if (!engine) {
      throw new ScmError("closed", "the worker has no open site.");
    } else if (call === "close") {
      await engine.close();
    } else {
      result = await engine[call](args[0], hooks);
    }
    postMessage({ id, result });
  } catch (error) {
    const code = error instanceof ScmError ? error.code : controller.signal.aborted ? "aborted" : "bug";
    postMessage({ id, error: { code, message: messageOf(error) } });
  } finally {
    running.delete(id);
  }
}
