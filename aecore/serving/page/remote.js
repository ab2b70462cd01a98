// Restores pictures on the server that the page comes from.

import { decoded } from "./viewer.js";

const OFTEN = 300; // Milliseconds between two looks at how far the server is.

let limits = null;

export function about() {
  const code = document.createElement("code");
  const address = new URL("restore", location.href);
  code.textContent = `curl --data-binary @photo.jpg '${address}?strength=1' -o restored.jpg`;
  return ["Restored on the server, which keeps no copy. For programs: ", code];
}

export async function networks() {
  const known = await (await fetch("networks")).json();
  limits = known.limits;
  return known.networks;
}

async function sent(address, file, signal) {
  if (file.size > 1e6 * limits.megabytes) {
    throw new Error(
      `The file is too large; the most that this server takes are ${limits.megabytes} million bytes.`,
    );
  }
  let answer;
  try {
    answer = await fetch(address, { method: "POST", body: file, signal });
  } catch {
    throw new Error("The server can't be reached; try again later.");
  }
  if (!answer.ok) throw new Error(await answer.text());
  return answer;
}

export async function shown(file, signal) {
  const address = await decoded(file);
  if (address !== null) return address;
  // Browsers don't show TIFF and other formats that the server knows.
  const answer = await sent("preview", file, signal);
  return URL.createObjectURL(await answer.blob());
}

export async function restore(file, { network, strength, signal, progress }) {
  const visit = String(Math.random());
  const looking = setInterval(async () => {
    const answer = await fetch(`progress?visit=${visit}`).catch(() => null);
    if (!answer?.ok) return;
    const { share, ahead } = await answer.json();
    if (share > 0) progress(share, `Restoring … ${Math.round(100 * share)} %`);
    else progress(0, ahead > 0 ? `Waiting … ${ahead} pictures are ahead` : "Restoring …");
  }, OFTEN);
  try {
    const query = new URLSearchParams({ network, strength, visit });
    const answer = await sent(`restore?${query}`, file, signal);
    const ending = answer.headers.get("Content-Disposition").match(/\.\w+/)[0];
    const notes = JSON.parse(answer.headers.get("X-Notes"));
    return { file: await answer.blob(), ending, notes };
  } finally {
    clearInterval(looking);
  }
}
