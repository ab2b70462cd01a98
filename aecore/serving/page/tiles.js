// The windows in which a large picture is restored, as in aecore/restoring/tiling.py.
//
// Pixels are RGBA bytes, row by row, of a picture {pixels, width, height}. The network takes and
// gives floats (batch, rows, columns, channels) in [0, 1]. A network for gray gets the three
// channels of a colour picture as a batch of three.

// Along one axis: each window's start, and the first and last + 1 pixel kept of its result.
export function spans(length, tile, before, after) {
  if (tile >= length) return [{ start: 0, first: 0, last: length }];
  const found = [{ start: 0, first: 0, last: tile - after }];
  while (found.at(-1).last < length) {
    const first = found.at(-1).last;
    const start = Math.min(first - before, length - tile);
    found.push({ start, first, last: start + tile === length ? length : start + tile - after });
  }
  return found;
}

// Sides that are no multiples of the stride are extended by reflection.
export function windows({ width, height }, { stride, tile, before, after }) {
  const [rows, columns] = [height, width].map((side) => Math.ceil(side / stride) * stride);
  const size = [Math.min(tile ?? rows, rows), Math.min(tile ?? columns, columns)];
  return spans(rows, size[0], before, after).flatMap((row) =>
    spans(columns, size[1], before, after).map((column) => ({ row, column, size })),
  );
}

function reflected(index, length) {
  const around = index % Math.max(1, 2 * length - 2);
  return around < length ? around : 2 * length - 2 - around;
}

export function cut({ pixels, width, height }, { row, column, size }, channels, gray) {
  const batch = channels === 1 && !gray ? 3 : 1;
  const values = new Float32Array(batch * size[0] * size[1] * channels);
  const columns = Array.from({ length: size[1] }, (_, x) => 4 * reflected(column.start + x, width));
  let place = 0;
  for (let image = 0; image < batch; image++) {
    for (let y = 0; y < size[0]; y++) {
      const line = 4 * width * reflected(row.start + y, height);
      for (const at of columns) {
        for (let channel = 0; channel < channels; channel++) {
          values[place++] = pixels[line + at + image + channel] / 255;
        }
      }
    }
  }
  return { values, shape: [batch, ...size, channels] };
}

// Puts what is kept of a window's result into the restored picture.
export function paste(restored, values, { row, column, size }, channels, gray, scale) {
  const across = scale * size[1];
  const image = channels === 1 && !gray ? scale * size[0] * across : 0; // Values of one image.
  const [above, left] = [scale * row.start, scale * column.start];
  const bottom = Math.min(scale * row.last, restored.height);
  const right = Math.min(scale * column.last, restored.width);
  for (let y = scale * row.first; y < bottom; y++) {
    for (let x = scale * column.first; x < right; x++) {
      const from = channels * ((y - above) * across + x - left);
      const to = 4 * (y * restored.width + x);
      for (let channel = 0; channel < 3; channel++) {
        let value = values[from + channel * (channels === 1 ? image : 1)];
        // Of gray, the mean of the three channels that a network for colour gives.
        if (gray && channels === 3) {
          value = (values[from] + values[from + 1] + values[from + 2]) / 3;
        }
        restored.pixels[to + channel] = 255 * value; // Rounded and clipped, as these are bytes.
      }
    }
  }
}

export function isGray({ pixels }) {
  for (let at = 0; at < pixels.length; at += 4) {
    if (pixels[at] !== pixels[at + 1] || pixels[at] !== pixels[at + 2]) return false;
  }
  return true;
}
