import { FRAME_MS } from './ring-player.js';

/** The server plays in real time; from `audio.begin` to the ear it takes about this long. */
const DOWNLINK_MS = 80;
const TELL_EVERY_MS = 50;

/** Which frame is being heard, by the clock: in a room only the server knows, and it does not say. */
export class HeardEstimate {
  #tell;
  #utteranceId = '';
  #from = 0;
  #last = Infinity;
  #beganAt = 0;
  #told = -1;
  /** @type {ReturnType<typeof setInterval> | undefined} */
  #timer;

  /** @param {(played: {utterance_id: string, seq: number, at: number}) => void} tell */
  constructor(tell) {
    this.#tell = tell;
  }

  on(/** @type {any} */ event) {
    if (event.type === 'audio.begin') this.#begin(event);
    else if (event.utterance_id !== this.#utteranceId) return;
    else if (event.type === 'audio.end') this.#last = event.frames - 1;
    else if (event.type === 'flush') this.#cut();
  }

  stop() {
    clearInterval(this.#timer);
  }

  #begin(/** @type {any} */ event) {
    this.stop();
    this.#utteranceId = event.utterance_id;
    this.#from = event.seq;
    this.#told = event.seq - 1;
    this.#last = Infinity;
    this.#beganAt = performance.now() + DOWNLINK_MS;
    this.#timer = setInterval(() => this.#tick(), TELL_EVERY_MS);
  }

  /** What is on its way to us is heard all the same. */
  #cut() {
    this.#hear(performance.now() + DOWNLINK_MS);
    this.stop();
  }

  #tick() {
    this.#hear(performance.now());
    if (this.#told >= this.#last) this.stop();
  }

  #hear(/** @type {number} */ at) {
    const due = this.#from + Math.floor((at - this.#beganAt) / FRAME_MS) - 1;
    const seq = Math.min(due, this.#last);
    if (seq <= this.#told) return;
    this.#told = seq;
    this.#tell({ utterance_id: this.#utteranceId, seq, at });
  }
}
