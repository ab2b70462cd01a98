// Shows a picture before and after, under one divider; both move and grow together.

const FURTHER = 1.25; // How much one click or one notch of the wheel zooms.
const CLOSEST = 32; // Screen pixels for one of the picture, at most.
const PIXELATED = 3; // From here on, pixels are shown as squares.

export class Viewer {
  constructor(viewer) {
    const find = (name) => viewer.querySelector(name);
    this.pictures = find("#pictures");
    this.before = find("#before");
    this.after = find("#after");
    this.divider = find("#divider");
    this.line = find("#line");
    this.divider.addEventListener("input", () => this.draw());
    this.pictures.addEventListener("pointerdown", (event) => this.grab(event));
    this.pictures.addEventListener("wheel", (event) => {
      event.preventDefault();
      this.zoom(event.deltaY < 0 ? FURTHER : 1 / FURTHER, event.clientX, event.clientY);
    });
    this.pictures.addEventListener("dblclick", (event) => {
      const fits = this.factor === this.fitting();
      if (fits) this.zoom(1 / this.factor, event.clientX, event.clientY);
      else this.fit();
    });
    new ResizeObserver(() => this.fit()).observe(viewer);
  }

  // Both are addresses of images; `after` may be the larger one. If they are the same, there is
  // nothing to compare yet. Throws, and shows nothing, once the signal is aborted.
  async show(before, after, signal) {
    signal.throwIfAborted();
    const sameSize = this.after.naturalWidth;
    this.before.src = before;
    this.after.src = after;
    await Promise.all([this.before.decode(), this.after.decode()]);
    signal.throwIfAborted();
    this.pictures.hidden = false;
    this.pictures.classList.toggle("single", before === after);
    for (const image of [this.before, this.after]) {
      image.style.width = `${this.after.naturalWidth}px`;
      image.style.height = `${this.after.naturalHeight}px`;
    }
    // Where only the strength has changed, what was looked at stays where it is.
    if (this.after.naturalWidth === sameSize && this.factor) this.draw();
    else this.fit();
  }

  hide() {
    this.pictures.hidden = true;
    this.factor = 0;
  }

  get box() {
    return this.pictures.getBoundingClientRect();
  }

  fitting() {
    const { width, height } = this.box;
    return Math.min(width / this.after.naturalWidth, height / this.after.naturalHeight, 1);
  }

  fit() {
    if (this.pictures.hidden) return;
    const { width, height } = this.box;
    this.factor = this.fitting();
    this.left = (width - this.factor * this.after.naturalWidth) / 2;
    this.top = (height - this.factor * this.after.naturalHeight) / 2;
    this.draw();
  }

  // The point of the picture that is at (x, y) of the window stays there.
  zoom(by, x, y) {
    const box = this.box;
    x = (x ?? box.left + box.width / 2) - box.left;
    y = (y ?? box.top + box.height / 2) - box.top;
    const least = Math.min(this.fitting(), 1);
    const factor = Math.min(Math.max(this.factor * by, least), CLOSEST);
    this.left = x - ((x - this.left) * factor) / this.factor;
    this.top = y - ((y - this.top) * factor) / this.factor;
    this.factor = factor;
    if (factor === least) this.fit();
    else this.draw();
  }

  grab(event) {
    const onLine = event.target === this.line;
    const start = { x: event.clientX, y: event.clientY, left: this.left, top: this.top };
    const move = ({ clientX, clientY }) => {
      if (onLine) {
        this.divider.value = (100 * (clientX - this.box.left)) / this.box.width;
      } else {
        this.left = start.left + clientX - start.x;
        this.top = start.top + clientY - start.y;
      }
      this.draw();
    };
    this.pictures.setPointerCapture(event.pointerId);
    this.pictures.addEventListener("pointermove", move);
    this.pictures.addEventListener(
      "lostpointercapture",
      () => this.pictures.removeEventListener("pointermove", move),
      { once: true },
    );
  }

  draw() {
    const at = (this.divider.value / 100) * this.box.width;
    for (const image of [this.before, this.after]) {
      image.style.transform = `translate(${this.left}px, ${this.top}px) scale(${this.factor})`;
    }
    // Clipping is in pixels of the picture.
    const cut = Math.max(0, (at - this.left) / this.factor);
    this.after.style.clipPath = `inset(0 0 0 ${cut}px)`;
    this.before.style.clipPath = `inset(0 ${Math.max(0, this.after.naturalWidth - cut)}px 0 0)`;
    this.line.style.left = `${at}px`;
    this.pictures.classList.toggle("close", this.factor >= PIXELATED);
  }
}

// An address under which the browser shows a picture file; null if it can't read it.
export async function decoded(file) {
  const image = new Image();
  image.src = URL.createObjectURL(file);
  try {
    await image.decode();
    return image.src;
  } catch {
    URL.revokeObjectURL(image.src);
    return null;
  }
}
