// Runs the network, so that the page stays quick meanwhile: on WebGPU where there is one, else in
// WebAssembly.
//
// It is told {visit, file, strength}, where file is null for the latest picture with another
// strength, or {stop: visit}. It says {visit, share, words} meanwhile, and at last {visit, result}
// or {visit, error}.

import * as ort from "./runtime/ort.webgpu.min.mjs";
import { cut, isGray, paste, windows } from "./tiles.js";

const QUALITY = 0.95; // Of JPEG and WebP files.
const ENDINGS = { "image/jpeg": ".jpg", "image/webp": ".webp", "image/png": ".png" };

ort.env.wasm.wasmPaths = new URL("runtime/", import.meta.url).href;
// Threads need a site that is isolated from others, by two headers.
ort.env.wasm.numThreads = self.crossOriginIsolated ? navigator.hardwareConcurrency : 1;

let described = null; // What network.json says.
let session = null;
let latest = null; // {type, original, restored}
let stopped = 0; // Visits up to this one are over.
let working = Promise.resolve();

async function load() {
  if (session !== null) return;
  described = await (await fetch("network.json")).json();
  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  session = await ort.InferenceSession.create("network.onnx", {
    executionProviders: adapter ? ["webgpu"] : ["wasm"],
  });
}

async function decoded(file) {
  const bitmap = await createImageBitmap(file, { premultiplyAlpha: "none" });
  const { width, height } = bitmap;
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  return { pixels: context.getImageData(0, 0, width, height).data, width, height };
}

async function encoded({ pixels, width, height }, type) {
  const canvas = new OffscreenCanvas(width, height);
  canvas.getContext("2d").putImageData(new ImageData(pixels, width, height), 0, 0);
  const file = await canvas.convertToBlob({ type, quality: QUALITY });
  return { file, ending: ENDINGS[file.type], notes: [] };
}

async function restored(original, report) {
  const { channels, scale } = described;
  const gray = isGray(original);
  const [width, height] = [scale * original.width, scale * original.height];
  const result = { pixels: new Uint8ClampedArray(4 * width * height), width, height };
  for (let y = 0; y < height; y++) {
    const line = Math.floor(y / scale) * original.width;
    for (let x = 0; x < width; x++) {
      const from = 4 * (line + Math.floor(x / scale));
      result.pixels[4 * (y * width + x) + 3] = original.pixels[from + 3]; // Alpha.
    }
  }
  const all = windows(original, described);
  for (const [index, window] of all.entries()) {
    if (!(await report(index / all.length))) return null;
    const { values, shape } = cut(original, window, channels, gray);
    const outputs = await session.run({ images: new ort.Tensor("float32", values, shape) });
    paste(result, await outputs.restored.getData(), window, channels, gray, scale);
    outputs.restored.dispose();
  }
  return result;
}

function blended(original, restored, strength) {
  if (strength === 1) return restored;
  const pixels = restored.pixels.map(
    (value, at) => (1 - strength) * original.pixels[at] + strength * value,
  );
  return { ...restored, pixels };
}

async function work({ visit, file, strength }) {
  // Says how far it is, gives messages a chance to come in, and tells whether to go on.
  async function report(share, words = `Restoring … ${Math.round(100 * share)} %`) {
    postMessage({ visit, share, words });
    await new Promise((resolve) => setTimeout(resolve));
    return visit > stopped;
  }
  try {
    if (!(await report(0, session ? "Restoring …" : "Loading the network …"))) return;
    await load();
    if (file !== null) {
      latest = null;
      const original = await decoded(file);
      const result = await restored(original, report);
      if (result === null) return;
      latest = { type: file.type, original, restored: result };
    }
    const picture = blended(latest.original, latest.restored, strength);
    postMessage({ visit, result: await encoded(picture, latest.type) });
  } catch (error) {
    console.error(error);
    postMessage({ visit, error: "The picture can't be restored in this browser; try a smaller one." });
  }
}

onmessage = ({ data }) => {
  if (data.stop) stopped = Math.max(stopped, data.stop);
  else working = working.then(() => work(data)); // One after another.
};
