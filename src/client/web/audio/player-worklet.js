/* global AudioWorkletProcessor, registerProcessor, sampleRate, currentTime */
import { LevelMeter, VoiceEdges } from './meters.js';
import { RingPlayer } from './ring-player.js';

const REPORT_MS = 50;

/**
 * The agent's voice. Takes {type: 'begin', utteranceId, seq}, {type: 'frame', pcm}, {type: 'end'}
 * and {type: 'flush', utteranceId}; posts {type: 'played' | 'flushed', utteranceId, seq, at},
 * {type: 'level', dbfs}, {type: 'audible' | 'silent', at} and {type: 'underruns', count}.
 */
class Player extends AudioWorkletProcessor {
  #ring = new RingPlayer(sampleRate, (position) => this.#onPlayed(position));
  #level = new LevelMeter(sampleRate);
  #edges = new VoiceEdges(sampleRate);
  /** @type {import('./ring-player.js').Position | null} Played, and not told yet. */
  #untold = null;
  #toldAt = 0;
  #underruns = 0;

  constructor() {
    super();
    this.port.onmessage = ({ data }) => this.#obey(data);
  }

  #obey(/** @type {any} */ message) {
    if (message.type === 'frame') this.#ring.push(new Int16Array(message.pcm));
    else if (message.type === 'begin') this.#ring.begin(message.utteranceId, message.seq);
    else if (message.type === 'end') this.#ring.end();
    else if (message.type === 'flush') this.#flush(message.utteranceId);
  }

  #flush(/** @type {string} */ utteranceId) {
    const heard = this.#ring.flush();
    const seq = heard.utteranceId === utteranceId ? heard.seq : -1;
    if (this.#untold && this.#untold.utteranceId !== utteranceId) this.#tell(this.#untold);
    this.#untold = null;
    this.port.postMessage({ type: 'flushed', utteranceId, seq, at: currentTime });
  }

  /** @param {Float32Array[][]} _inputs @param {Float32Array[][]} outputs */
  process(_inputs, [[out]]) {
    this.#ring.pull(out);
    const edge = this.#edges.push(out, currentTime);
    if (edge) this.port.postMessage(edge);
    const dbfs = this.#level.push(out);
    if (dbfs !== null) this.port.postMessage({ type: 'level', dbfs });
    const due = currentTime - this.#toldAt >= REPORT_MS / 1000 || !this.#ring.playing;
    if (this.#untold && due) this.#tell(this.#untold);
    if (this.#ring.underruns !== this.#underruns) this.#tellUnderruns();
    return true;
  }

  #onPlayed(/** @type {import('./ring-player.js').Position} */ position) {
    const before = this.#untold;
    if (before && before.utteranceId !== position.utteranceId) this.#tell(before);
    this.#untold = position;
  }

  #tell(/** @type {import('./ring-player.js').Position} */ position) {
    this.port.postMessage({ type: 'played', ...position, at: currentTime });
    this.#untold = null;
    this.#toldAt = currentTime;
  }

  #tellUnderruns() {
    this.#underruns = this.#ring.underruns;
    this.port.postMessage({ type: 'underruns', count: this.#underruns });
  }
}

registerProcessor('player', Player);
