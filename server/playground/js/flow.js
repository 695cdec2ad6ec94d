/** Motion from one frame to the next: blocks are looked for where they went, to a fraction of a pixel. */

const BLOCK = 8;
const STEP = 4;
const REACH = 6;
export const FULL_SPEED = 3; // pixels a frame that have the full colour

/**
 * @param {Float32Array} from Grey levels.
 * @param {Float32Array} to
 * @param {number} width
 * @param {number} height
 * @returns {{columns: number, rows: number, x: Float32Array, y: Float32Array}} Pixels to the right and down, by block;
 *   (0, 0) where a block shows nothing that could be followed.
 */
export function flow(from, to, width, height) {
  const columns = Math.max(1, Math.floor((width - BLOCK) / STEP) + 1);
  const rows = Math.max(1, Math.floor((height - BLOCK) / STEP) + 1);
  const x = new Float32Array(columns * rows);
  const y = new Float32Array(columns * rows);
  for (let row = 0; row < rows; row += 1) {
    for (let column = 0; column < columns; column += 1) {
      const found = follow(from, to, width, height, column * STEP, row * STEP);
      x[row * columns + column] = found[0];
      y[row * columns + column] = found[1];
    }
  }
  return { columns, rows, x, y };
}

/** Where a block went. @returns {[number, number]} */
function follow(from, to, width, height, left, top) {
  if (contrast(from, width, left, top) < 4) return [0, 0];
  let best = cost(from, to, width, height, left, top, 0, 0, Infinity);
  const still = best;
  let [bestX, bestY] = [0, 0];
  for (let dy = -REACH; dy <= REACH; dy += 1) {
    for (let dx = -REACH; dx <= REACH; dx += 1) {
      const value = cost(from, to, width, height, left, top, dx, dy, best);
      if (value < best) [best, bestX, bestY] = [value, dx, dy];
    }
  }
  if (best >= 0.9 * still) return [0, 0]; // standing still explains it as well
  const at = (dx, dy) => cost(from, to, width, height, left, top, dx, dy, Infinity);
  return [
    bestX + vertex(at(bestX - 1, bestY), best, at(bestX + 1, bestY)),
    bestY + vertex(at(bestX, bestY - 1), best, at(bestX, bestY + 1)),
  ];
}

/** Mean square difference of a block and the one at an offset; Infinity outside, or once it is above the limit. */
function cost(from, to, width, height, left, top, dx, dy, limit) {
  if (left + dx < 0 || top + dy < 0 || left + dx + BLOCK > width || top + dy + BLOCK > height) return Infinity;
  const most = limit * BLOCK * BLOCK;
  let sum = 0;
  for (let row = 0; row < BLOCK && sum < most; row += 1) {
    const one = (top + row) * width + left;
    const other = (top + row + dy) * width + left + dx;
    for (let column = 0; column < BLOCK; column += 1) sum += (from[one + column] - to[other + column]) ** 2;
  }
  return sum < most ? sum / (BLOCK * BLOCK) : Infinity;
}

/** Standard deviation of the grey levels of a block. */
function contrast(grey, width, left, top) {
  let sum = 0;
  let squares = 0;
  for (let row = 0; row < BLOCK; row += 1) {
    for (let column = 0; column < BLOCK; column += 1) {
      const value = grey[(top + row) * width + left + column] ?? 0;
      sum += value;
      squares += value * value;
    }
  }
  const n = BLOCK * BLOCK;
  return Math.sqrt(Math.max(0, squares / n - (sum / n) ** 2));
}

/** Where between three neighbours the least is, -0.5 to 0.5. */
function vertex(before, at, after) {
  const bend = before - 2 * at + after;
  if (!Number.isFinite(bend) || bend <= 0) return 0;
  return Math.max(-0.5, Math.min(0.5, (before - after) / (2 * bend)));
}

/**
 * Colour of a motion: the hue is its direction (red to the right, then round by yellow downwards), the strength its speed.
 *
 * @param {number} x
 * @param {number} y
 * @returns {[number, number, number]} 0 to 255; black stands still.
 */
export function colourOf(x, y) {
  const speed = Math.min(1, Math.hypot(x, y) / FULL_SPEED);
  const hue = (((Math.atan2(y, x) / (2 * Math.PI)) * 6) + 6) % 6;
  const channel = (shift) => 255 * speed * Math.max(0, Math.min(1, Math.abs(((hue + shift) % 6) - 3) - 1));
  return [channel(0), channel(4), channel(2)];
}

/**
 * As a picture of the frame's size, each block's colour where its middle is, and between them what is between.
 *
 * @param {ReturnType<typeof flow>} found
 * @param {number} width
 * @param {number} height
 */
export function flowPicture({ columns, rows, x, y }, width, height) {
  const image = new ImageData(columns, rows);
  for (let i = 0; i < x.length; i += 1) image.data.set([...colourOf(x[i], y[i]), 255], 4 * i);
  const blocks = new OffscreenCanvas(columns, rows);
  /** @type {any} */ (blocks.getContext("2d")).putImageData(image, 0, 0);
  const picture = new OffscreenCanvas(width, height);
  const context = /** @type {any} */ (picture.getContext("2d"));
  context.fillRect(0, 0, width, height); // at the rim nothing was measured
  context.drawImage(blocks, (BLOCK - STEP) / 2, (BLOCK - STEP) / 2, columns * STEP, rows * STEP);
  return picture;
}

/** The legend: which colour is which direction and speed. @param {number} side Pixels. */
export function wheelImage(side) {
  const image = new ImageData(side, side);
  const radius = side / 2;
  for (let row = 0; row < side; row += 1) {
    for (let column = 0; column < side; column += 1) {
      const [x, y] = [(column + 0.5 - radius) / radius, (row + 0.5 - radius) / radius];
      const distance = Math.hypot(x, y);
      const colour = colourOf(x * FULL_SPEED, y * FULL_SPEED);
      image.data.set([...colour, distance <= 1 ? 255 : 0], 4 * (row * side + column));
    }
  }
  return image;
}
