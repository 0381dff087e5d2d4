/* global AudioWorkletProcessor, registerProcessor, sampleRate, currentTime */
import { LevelMeter, VoiceEdges } from './meters.js';

/** Listens to a remote track: {type: 'level', dbfs} and {type: 'audible' | 'silent', at}. */
class Tap extends AudioWorkletProcessor {
  #silence = new Float32Array(128);
  #level = new LevelMeter(sampleRate);
  #edges = new VoiceEdges(sampleRate);

  /** @param {Float32Array[][]} inputs */
  process([[samples = this.#silence] = []]) {
    const edge = this.#edges.push(samples, currentTime);
    if (edge) this.port.postMessage(edge);
    const dbfs = this.#level.push(samples);
    if (dbfs !== null) this.port.postMessage({ type: 'level', dbfs });
    return true;
  }
}

registerProcessor('tap', Tap);
