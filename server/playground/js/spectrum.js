/** The spatial spectrum of a frame: 2-D Fourier transform, magnitude on a logarithmic scale, zero frequency amid. */

/**
 * Fourier transform in place. @param {Float64Array} real @param {Float64Array} imaginary Both of a power of two.
 */
export function fft(real, imaginary) {
  const n = real.length;
  for (let i = 1, j = 0; i < n; i += 1) {
    let bit = n >> 1;
    for (; j & bit; bit >>= 1) j ^= bit;
    j ^= bit;
    if (i < j) {
      [real[i], real[j]] = [real[j], real[i]];
      [imaginary[i], imaginary[j]] = [imaginary[j], imaginary[i]];
    }
  }
  for (let length = 2; length <= n; length *= 2) {
    const half = length / 2;
    for (let k = 0; k < half; k += 1) {
      const cos = Math.cos((-2 * Math.PI * k) / length);
      const sin = Math.sin((-2 * Math.PI * k) / length);
      for (let start = 0; start < n; start += length) {
        const even = start + k;
        const odd = even + half;
        const re = real[odd] * cos - imaginary[odd] * sin;
        const im = real[odd] * sin + imaginary[odd] * cos;
        real[odd] = real[even] - re;
        imaginary[odd] = imaginary[even] - im;
        real[even] += re;
        imaginary[even] += im;
      }
    }
  }
}

/**
 * Magnitudes of all frequencies, the mean taken away, edges softened (Hann), zero frequency at (side/2, side/2).
 *
 * @param {Float32Array} grey
 * @param {number} width
 * @param {number} height
 * @returns {{side: number, magnitudes: Float64Array}} Square, of a power of two that holds the frame.
 */
export function spectrum(grey, width, height) {
  const side = 2 ** Math.ceil(Math.log2(Math.max(width, height, 2)));
  const rows = Array.from({ length: side }, () => [new Float64Array(side), new Float64Array(side)]);
  const mean = grey.reduce((sum, value) => sum + value, 0) / grey.length;
  for (let y = 0; y < height; y += 1) {
    for (let x = 0; x < width; x += 1) {
      rows[y][0][x] = (grey[y * width + x] - mean) * hann(x, width) * hann(y, height);
    }
    fft(rows[y][0], rows[y][1]);
  }
  const magnitudes = new Float64Array(side * side);
  const real = new Float64Array(side);
  const imaginary = new Float64Array(side);
  for (let x = 0; x < side; x += 1) {
    for (let y = 0; y < side; y += 1) [real[y], imaginary[y]] = [rows[y][0][x], rows[y][1][x]];
    fft(real, imaginary);
    const column = (x + side / 2) % side;
    for (let y = 0; y < side; y += 1) {
      magnitudes[((y + side / 2) % side) * side + column] = Math.hypot(real[y], imaginary[y]);
    }
  }
  return { side, magnitudes };
}

/** @param {number} place @param {number} length */
function hann(place, length) {
  return length < 2 ? 1 : 0.5 - 0.5 * Math.cos((2 * Math.PI * place) / (length - 1));
}

/**
 * As a picture: 80 dB from black to white.
 *
 * @param {Float32Array} grey
 * @param {number} width
 * @param {number} height
 */
export function spectrumImage(grey, width, height) {
  const { side, magnitudes } = spectrum(grey, width, height);
  const image = new ImageData(side, side);
  let most = 1e-9;
  for (const value of magnitudes) most = Math.max(most, value);
  for (let i = 0; i < magnitudes.length; i += 1) {
    const decibels = 20 * Math.log10(magnitudes[i] / most + 1e-9);
    const level = Math.max(0, 1 + decibels / 80);
    image.data.set([255 * level ** 1.6, 255 * level ** 1.1, 255 * Math.min(1, level * 1.15), 255], 4 * i);
  }
  return image;
}
