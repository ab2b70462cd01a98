// The page: takes a picture, has it restored, and shows what became of it.
//
// Who restores it is the matter of restore.js: a server, or the browser itself. It exports
//   about              what stands at the foot of the page
//   networks()         [{name, purpose, limits, scale, strength}]; whether a strength can be chosen
//   shown(file, signal)
//                      the address of an image that the browser can show
//   restore(file, {network, strength, signal, progress})
//                      {file, ending, notes}; progress is called with a share and some words
// What they throw has a message for visitors.

import { about, networks, restore, shown } from "./restore.js";
import { Viewer } from "./viewer.js";

const find = (id) => document.getElementById(id);
const viewer = new Viewer(find("viewer"));
const known = new Map();
let picture = null; // What was dropped, and what became of it: {file, address, restored}.
let leaving = new AbortController(); // Of what is being opened or restored.

function say(text, wrong = false) {
  find("message").textContent = text;
  find("message").classList.toggle("wrong", wrong);
}

function progress(share, words) {
  find("progress").value = share;
  say(words);
}

function offer(result) {
  const link = find("download");
  URL.revokeObjectURL(link.href);
  link.removeAttribute("href");
  link.setAttribute("aria-disabled", result === null);
  if (result === null) return;
  link.href = URL.createObjectURL(result.file);
  link.download = picture.file.name.replace(/\.[^.]*$/, "") + "-restored" + result.ending;
}

function enable(enabled) {
  for (const id of ["in", "out", "fit", "another"]) find(id).disabled = !enabled;
}

async function take(file) {
  another();
  const { signal } = (leaving = new AbortController());
  find("drop").hidden = true;
  find("another").disabled = false;
  say("Opening the picture …");
  let address = "";
  try {
    address = await shown(file, signal);
    await viewer.show(address, address, signal);
  } catch (error) {
    URL.revokeObjectURL(address);
    if (signal.aborted) return;
    another();
    say(error.message, true);
    return;
  }
  picture = { file, address, restored: "" };
  enable(true);
  await work();
}

async function work() {
  if (picture === null) return;
  leaving.abort();
  const { signal } = (leaving = new AbortController());
  offer(null);
  find("progress").hidden = false;
  progress(0, "Waiting …");
  try {
    const result = await restore(picture.file, {
      network: find("network").value,
      strength: Number(find("strength").value),
      signal,
      progress: (share, words) => signal.aborted || progress(share, words),
    });
    if (signal.aborted) return;
    offer(result);
    const address = await shown(result.file, signal);
    if (signal.aborted) return URL.revokeObjectURL(address);
    URL.revokeObjectURL(picture.restored);
    picture.restored = address;
    await viewer.show(picture.address, address, signal);
    say(result.notes.length ? `Note: ${result.notes.join("; ")}.` : "");
  } catch (error) {
    if (!signal.aborted) say(error.message, true);
  } finally {
    if (!signal.aborted) find("progress").hidden = true;
  }
}

function another() {
  leaving.abort();
  if (picture !== null) {
    URL.revokeObjectURL(picture.address);
    URL.revokeObjectURL(picture.restored);
  }
  picture = null;
  find("file").value = "";
  find("drop").hidden = false;
  find("progress").hidden = true;
  viewer.hide();
  enable(false);
  offer(null);
  say("");
}

function choose() {
  const { purpose, limits, strength } = known.get(find("network").value);
  find("purpose").textContent = purpose && `${purpose[0].toUpperCase()}${purpose.slice(1)}.`;
  find("purpose").title = limits && `Not for ${limits}.`;
  find("strengths").hidden = !strength;
}

find("file").addEventListener("change", (event) => {
  if (event.target.files.length) take(event.target.files[0]);
});
find("network").addEventListener("change", () => {
  choose();
  work();
});
find("strength").addEventListener("input", (event) => {
  find("strength-shown").textContent = `${Math.round(100 * event.target.value)} %`;
});
find("strength").addEventListener("change", work);
find("another").addEventListener("click", another);
find("in").addEventListener("click", () => viewer.zoom(2));
find("out").addEventListener("click", () => viewer.zoom(0.5));
find("fit").addEventListener("click", () => viewer.fit());
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  find("viewer").classList.add("over");
});
document.addEventListener("dragleave", (event) => {
  if (event.relatedTarget === null) find("viewer").classList.remove("over");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  find("viewer").classList.remove("over");
  if (event.dataTransfer.files.length) take(event.dataTransfer.files[0]);
});

for (const network of await networks()) {
  known.set(network.name, network);
  find("network").add(new Option(network.name));
}
choose();
find("about").append(...about());
document.body.dataset.ready = "yes";
