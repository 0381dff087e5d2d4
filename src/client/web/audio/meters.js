/** What the worklets measure, on samples and nothing else. Times are seconds of the AudioContext. */

export const LEVEL_FLOOR_DBFS = -100;
const LEVELS_PER_S = 25;
const ONSET_DBFS = -35;
const ONSET_WINDOW_MS = 5;
const QUIET_BEFORE_MS = 300;
const AUDIBLE = 10 ** (-46 / 20);
const SILENT_AFTER_MS = 100;

/** @param {number} sum of squares @param {number} count @returns {number} dBFS */
function dbfs(sum, count) {
  return Math.max(LEVEL_FLOOR_DBFS, 10 * Math.log10(sum / count + 1e-12));
}

/** RMS level, 25 times a second. */
export class LevelMeter {
  #size;
  #sum = 0;
  #count = 0;

  constructor(/** @type {number} */ rate) {
    this.#size = Math.round(rate / LEVELS_PER_S);
  }

  /** @returns {number | null} dBFS when a window is full */
  push(/** @type {Float32Array} */ samples) {
    for (const sample of samples) this.#sum += sample * sample;
    this.#count += samples.length;
    if (this.#count < this.#size) return null;
    const level = dbfs(this.#sum, this.#count);
    this.#sum = this.#count = 0;
    return level;
  }
}

/** The first 5 ms above -35 dBFS after 300 ms in which there were none. */
export class OnsetDetector {
  #rate;
  #size;
  #needed;
  #quiet;
  #sum = 0;
  #count = 0;

  constructor(/** @type {number} */ rate) {
    this.#rate = rate;
    this.#size = Math.round((rate * ONSET_WINDOW_MS) / 1000);
    this.#needed = this.#quiet = QUIET_BEFORE_MS / ONSET_WINDOW_MS;
  }

  /** @param {Float32Array} samples @param {number} at time of the first one @returns {number | null} */
  push(samples, at) {
    let onset = null;
    for (let i = 0; i < samples.length; i += 1) {
      this.#sum += samples[i] * samples[i];
      this.#count += 1;
      if (this.#count === this.#size && this.#closeWindow()) {
        onset ??= at + (i + 1 - this.#size) / this.#rate;
      }
    }
    return onset;
  }

  /** True: this window is an onset. */
  #closeWindow() {
    const loud = dbfs(this.#sum, this.#count) > ONSET_DBFS;
    const onset = loud && this.#quiet >= this.#needed;
    this.#quiet = loud ? 0 : this.#quiet + 1;
    this.#sum = this.#count = 0;
    return onset;
  }
}

/**
 * When a voice becomes audible (-46 dBFS), and after 100 ms without, when its last such sample was.
 * @typedef {{type: 'audible' | 'silent', at: number}} VoiceEdge
 */
export class VoiceEdges {
  #rate;
  #last = -1;
  #audible = false;

  constructor(/** @type {number} */ rate) {
    this.#rate = rate;
  }

  /** @returns {VoiceEdge | null} */
  push(/** @type {Float32Array} */ samples, /** @type {number} */ at) {
    const end = samples.findLastIndex((sample) => Math.abs(sample) > AUDIBLE);
    if (end >= 0) {
      this.#last = at + end / this.#rate;
      if (this.#audible) return null;
      this.#audible = true;
      return { type: 'audible', at: this.#last };
    }
    const now = at + samples.length / this.#rate;
    if (!this.#audible || now - this.#last < SILENT_AFTER_MS / 1000) return null;
    this.#audible = false;
    return { type: 'silent', at: this.#last };
  }
}
