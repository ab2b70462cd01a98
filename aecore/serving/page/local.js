// Restores pictures in the visitor's browser, so that none leaves it; worker.js does the work.

import { decoded } from "./viewer.js";

const worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
let latest = null; // The picture that the worker has restored last.
let visits = 0;

export function about() {
  return [
    "Everything is computed in this browser; no picture leaves it. ",
    "What is downloaded holds the pixels alone, without EXIF or other metadata.",
  ];
}

export async function networks() {
  return [await (await fetch("network.json")).json()];
}

export async function shown(file) {
  const address = await decoded(file);
  if (address === null) {
    throw new Error("This browser can't read the file; save it as PNG, JPEG or WebP first.");
  }
  return address;
}

export function restore(file, { strength, signal, progress }) {
  const visit = ++visits;
  return new Promise((resolve, reject) => {
    function hear({ data }) {
      if (data.visit !== visit) return;
      if (data.words) progress(data.share, data.words);
      else {
        worker.removeEventListener("message", hear);
        if (data.error) reject(new Error(data.error));
        else {
          latest = file;
          resolve(data.result);
        }
      }
    }
    worker.addEventListener("message", hear);
    worker.addEventListener("error", () =>
      reject(new Error("This browser can't run the network; try a newer one.")),
    );
    signal.addEventListener("abort", () => worker.postMessage({ stop: visit }));
    worker.postMessage({ visit, file: file === latest ? null : file, strength });
  });
}
