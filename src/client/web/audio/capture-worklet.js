/* global AudioWorkletProcessor, registerProcessor, sampleRate, currentTime */
import { LevelMeter, OnsetDetector } from './meters.js';
import { FRAME_MS } from './ring-player.js';

/**
 * The microphone (mixed with injected sounds) as s16le frames of 20 ms at the context's rate.
 * Posts {type: 'frame', pcm}, {type: 'level', dbfs} and {type: 'onset', at}.
 */
class Capture extends AudioWorkletProcessor {
  #frame = new Int16Array((sampleRate * FRAME_MS) / 1000);
  #filled = 0;
  #silence = new Float32Array(128);
  #level = new LevelMeter(sampleRate);
  #onset = new OnsetDetector(sampleRate);

  /** @param {Float32Array[][]} inputs */
  process([[samples = this.#silence] = []]) {
    const onset = this.#onset.push(samples, currentTime);
    if (onset !== null) this.port.postMessage({ type: 'onset', at: onset });
    const dbfs = this.#level.push(samples);
    if (dbfs !== null) this.port.postMessage({ type: 'level', dbfs });
    for (const sample of samples) this.#push(sample);
    return true;
  }

  #push(/** @type {number} */ sample) {
    this.#frame[this.#filled] = Math.max(-32768, Math.min(32767, Math.round(sample * 32768)));
    this.#filled += 1;
    if (this.#filled < this.#frame.length) return;
    const pcm = this.#frame.slice().buffer;
    this.port.postMessage({ type: 'frame', pcm }, [pcm]);
    this.#filled = 0;
  }
}

registerProcessor('capture', Capture);
