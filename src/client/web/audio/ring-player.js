/**
 * The jitter buffer: network frames in, an unbroken stream of samples out. Pure; whoever owns the
 * audio clock calls `pull`. A frame counts as heard once its last sample was pulled. The same rules
 * as the command line's player (src/client/player.py).
 */

export const WIRE_RATE = 48000;
export const FRAME_MS = 20;
const PREBUFFER_FRAMES = 2;
const MAX_WAIT_MS = 60;
const FADE_MS = 5;
// The server is about 160 ms ahead; more than 10 s means that it does not pace: the oldest go.
const MAX_FRAMES = 500;

/**
 * Every frame of the utterance up to `seq` was heard (-1: none).
 * @typedef {{utteranceId: string, seq: number}} Position
 */

export class RingPlayer {
  /** @type {{utteranceId: string, seq: number, samples: Float32Array}[]} */
  #frames = [];
  /** Samples already pulled from the first frame. */
  #taken = 0;
  /** @type {Position | null} What the next pushed frame is. */
  #receiving = null;
  #ended = false;
  #running = false;
  #waited = 0;
  #rise = false;
  #tail = new Float32Array(0);
  /** @type {{utteranceId: string, seq: number, taken: number} | null} */
  #brokenOff = null;
  #rate;
  #fade;
  #resampler;
  #onPlayed;

  /** @type {Position} */
  position = { utteranceId: '', seq: -1 };
  underruns = 0;
  dropped = 0;

  /**
   * @param {number} rate samples per second that `pull` is asked for
   * @param {(position: Position) => void} [onPlayed] after every frame
   */
  constructor(rate, onPlayed = () => {}) {
    this.#rate = rate;
    this.#fade = Math.round((rate * FADE_MS) / 1000);
    this.#resampler = new FrameResampler(rate);
    this.#onPlayed = onPlayed;
  }

  get playing() {
    return this.#running || this.#frames.length > 0;
  }

  // --- what the network brings ---

  /** `audio.begin`: the next pushed frame is `seq` of this utterance. */
  begin(/** @type {string} */ utteranceId, /** @type {number} */ seq) {
    this.#receiving = { utteranceId, seq };
    this.#ended = false;
    if (this.position.utteranceId !== utteranceId && !this.#frames.length) {
      this.position = { utteranceId, seq: seq - 1 };
    }
  }

  /**
   * One frame of 20 ms at 48 kHz. Dropped without a `begin` before it, and if we have it already.
   * @param {Int16Array} pcm
   */
  push(pcm) {
    if (!this.#receiving) {
      this.dropped += 1;
      return;
    }
    const { utteranceId, seq } = this.#receiving;
    this.#receiving = { utteranceId, seq: seq + 1 };
    const samples = this.#resampler.convert(pcm);
    if (seq <= this.#newest(utteranceId)) {
      this.dropped += 1;
      return;
    }
    if (this.#frames.length >= MAX_FRAMES) {
      this.#frames.shift();
      this.#taken = 0;
      this.dropped += 1;
    }
    this.#frames.push({ utteranceId, seq, samples });
  }

  /** `audio.end`: nothing follows, so what is buffered need not wait for more. */
  end() {
    this.#ended = true;
  }

  /**
   * Fade out and fall silent; audio is dropped until the next `begin`.
   * @returns {Position} what was heard
   */
  flush() {
    const head = this.#frames[0];
    if (head && this.#running) {
      this.#tail = fadeOut(head.samples.subarray(this.#taken, this.#taken + this.#fade), this.#fade);
      this.#brokenOff = { utteranceId: head.utteranceId, seq: head.seq, taken: this.#taken };
    }
    this.#frames = [];
    this.#taken = 0;
    this.#receiving = null;
    this.#running = false;
    this.#waited = 0;
    return this.position;
  }

  // --- what the audio clock takes ---

  /** Fill `out` with what comes next; silence where there is nothing to say. */
  pull(/** @type {Float32Array} */ out) {
    let filled = Math.min(out.length, this.#tail.length);
    out.fill(0);
    out.set(this.#tail.subarray(0, filled));
    this.#tail = this.#tail.subarray(filled);
    if (!this.#running && !this.#start(out.length)) return;
    while (filled < out.length && this.#frames.length) {
      filled += this.#pullHead(out.subarray(filled));
    }
    if (filled < out.length && this.#running) this.#runDry();
  }

  #newest(/** @type {string} */ utteranceId) {
    const last = this.#frames.at(-1);
    if (last?.utteranceId === utteranceId) return last.seq;
    return this.position.utteranceId === utteranceId ? this.position.seq : -1;
  }

  #start(/** @type {number} */ count) {
    if (!this.#frames.length) return false;
    const enough = this.#frames.length >= PREBUFFER_FRAMES || this.#ended;
    if (!enough && this.#waited < (this.#rate * MAX_WAIT_MS) / 1000) {
      this.#waited += count;
      return false;
    }
    this.#running = true;
    this.#waited = 0;
    this.#skipWhatWasHeard();
    return true;
  }

  /** A resumed frame that was broken off goes on at the sample where the fade began. */
  #skipWhatWasHeard() {
    const head = this.#frames[0];
    const broken = this.#brokenOff;
    if (broken && broken.utteranceId === head.utteranceId && broken.seq === head.seq) {
      this.#taken = broken.taken;
      this.#rise = true;
    }
    this.#brokenOff = null;
  }

  #pullHead(/** @type {Float32Array} */ out) {
    const head = this.#frames[0];
    const samples = head.samples.subarray(this.#taken, this.#taken + out.length);
    out.set(samples);
    if (this.#rise) {
      fadeIn(out.subarray(0, samples.length), this.#fade);
      this.#rise = false;
    }
    this.#taken += samples.length;
    if (this.#taken >= head.samples.length) {
      this.#frames.shift();
      this.#taken = 0;
      this.position = { utteranceId: head.utteranceId, seq: head.seq };
      this.#onPlayed(this.position);
    }
    return samples.length;
  }

  #runDry() {
    this.#running = false;
    if (!this.#ended) this.underruns += 1;
  }
}

/** Wire frames to the loudspeaker's rate, linearly, where a browser cannot run at 48 kHz. */
class FrameResampler {
  #size;
  #last = 0;

  constructor(/** @type {number} */ rate) {
    this.#size = (rate * FRAME_MS) / 1000;
  }

  /** @returns {Float32Array} */
  convert(/** @type {Int16Array} */ pcm) {
    const out = new Float32Array(this.#size);
    const step = pcm.length / this.#size;
    for (let i = 0; i < out.length; i += 1) {
      const at = (i + 1) * step - 1;
      const before = Math.floor(at);
      const left = before < 0 ? this.#last : pcm[before];
      const right = pcm[Math.min(before + 1, pcm.length - 1)];
      out[i] = (left + (right - left) * (at - before)) / 32768;
    }
    this.#last = pcm.length ? pcm[pcm.length - 1] : 0;
    return out;
  }
}

function fadeOut(/** @type {Float32Array} */ samples, /** @type {number} */ length) {
  return samples.map((sample, i) => sample * Math.max(0, 1 - (i + 1) / length));
}

function fadeIn(/** @type {Float32Array} */ samples, /** @type {number} */ length) {
  const size = Math.min(samples.length, length);
  for (let i = 0; i < size; i += 1) samples[i] *= i / length;
}
