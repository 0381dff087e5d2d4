/** A spoken session of this page, whichever way it travels. */

import { AudioGraph } from './audio/graph.js';
import { StartFailed, trouble } from './troubles.js';
import { LiveKitTransport } from './transport-livekit.js';
import { WsTransport } from './transport-ws.js';

export { available } from './livekit-access.js';

/** Ways to talk, best first. */
export const transports = ['livekit', 'ws'];

/** Pauses before each attempt to connect again, a minute in all. */
const RETRY_AFTER_MS = [250, 500, 1000, 2000, 4000, 5000, 5000, 5000, 10000, 10000, 15000];

/** @typedef {'idle' | 'connecting' | 'live' | 'reconnecting' | 'ended'} Phase */

/**
 * @typedef {object} StartOptions
 * @property {'ws' | 'livekit'} [transport]
 * @property {boolean} [mic] false: go on without a microphone, by text and injected sounds
 * @property {string} [micId]
 * @property {string} [speakerId]
 * @property {string} [apiKey]
 * @property {string} [mode]
 * @property {string} [model]
 * @property {string} [voice]
 * @property {string} [language]
 * @property {number} [rate] of the AudioContext, for tests
 * @property {number} [echoDb] for tests: the agent's voice comes back into the microphone so loud
 */

/**
 * Dispatches CustomEvents; `detail` is
 * `status` {phase, reason}, `event` {event: a server event, at: performance.now()},
 * `level` {mic, agent} in dBFS, 25 a second, `played` {utterance_id, seq, at},
 * `silence` {onset_to_silence_ms}, and `trouble` (troubles.js).
 */
export class VoiceSession extends EventTarget {
  /** @type {Phase} */
  phase = 'idle';
  /** @type {StartOptions} */
  #options = {};
  /** @type {AudioGraph | null} */
  #audio = null;
  /** @type {any} the transport that is connected, or on its way */
  #transport = null;
  /** Lets `start` return. */
  #settle = () => {};
  /** Of the newest start or stop: whatever awaits in an older one gives up. */
  #generation = 0;
  #retries = 0;
  /** Once it was live, a loss is mended instead of told. */
  #wasLive = false;
  #muted = false;
  #askedForClick = false;

  /**
   * Call it in a click's own turn. Resolves when the session is live or has ended; failures come as
   * `trouble` and `status`, never as an exception.
   * @param {StartOptions} [options]
   */
  async start(options = {}) {
    await this.stop();
    const generation = (this.#generation += 1);
    this.#options = { ...options };
    this.#retries = 0;
    this.#wasLive = this.#askedForClick = false;
    this.#status('connecting');
    try {
      const audio = await this.#openAudio();
      if (generation !== this.#generation) {
        await audio.close();
        return;
      }
      this.#audio = audio;
      audio.setMuted(this.#muted);
      await this.#connect(audio);
    } catch (error) {
      if (generation === this.#generation) await this.#fail(error);
    }
  }

  /** Hang up. Safe at any time, also while it starts. */
  async stop() {
    const running = this.phase !== 'idle' && this.phase !== 'ended';
    this.#generation += 1;
    await this.#release();
    if (running) this.#status('ended', 'stopped');
  }

  /** The user's turn, typed; with `speak` the agent's own words, verbatim. */
  sendText(/** @type {string} */ text, speak = false) {
    if (this.phase === 'live') this.#transport.sendText(text, speak);
  }

  /** Speak with another voice from the next utterance on. */
  switchModel(/** @type {string} */ model, voice = '') {
    this.#options = { ...this.#options, model, voice };
    if (this.phase === 'live') this.#transport.switchModel(model, voice);
  }

  /**
   * Say something into the microphone's way up, which the loudspeaker does not play.
   * @param {string | ArrayBuffer} sound 'cough', 'mm-hmm', 'stop', or a WAV file's bytes
   * @returns {Promise<void>} when it is over
   */
  async inject(sound) {
    await this.#audio?.inject(sound);
  }

  setMuted(/** @type {boolean} */ muted) {
    this.#muted = muted;
    this.#audio?.setMuted(muted);
  }

  /** @param {string} micId '' is the default one */
  async setMic(micId) {
    this.#options = { ...this.#options, mic: true, micId };
    try {
      await this.#audio?.setMic(micId);
    } catch (error) {
      const shown = error instanceof StartFailed ? error.trouble : trouble('mic_busy');
      this.#tell('trouble', { ...shown, fatal: false });
    }
  }

  /** @param {string} speakerId '' is the default one */
  async setSpeaker(speakerId) {
    this.#options = { ...this.#options, speakerId };
    await this.#audio?.setSpeaker(speakerId);
    await this.#transport?.setSpeaker(speakerId);
  }

  /** From a click, after `trouble` autoplay. */
  async resume() {
    // What is on its way until both have taken the click is no reason to ask for another one.
    this.#askedForClick = true;
    const audio = this.#audio;
    const begun = await audio?.resume();
    await this.#transport?.resume();
    this.#askedForClick = false;
    if (begun === false && audio === this.#audio) this.#show(trouble('autoplay'));
  }

  // --- parts ---

  #openAudio() {
    const { mic = true, micId = '', speakerId = '', rate, echoDb } = this.#options;
    return AudioGraph.open(
      { mic, micId, speakerId, rate, echoDb },
      {
        level: (micLevel, agent) => this.#tell('level', { mic: micLevel, agent }),
        silence: (ms) => this.#tell('silence', { onset_to_silence_ms: ms }),
        trouble: (shown) => this.#show(shown),
      },
    );
  }

  /** Resolves when it is live, or when the session has ended. */
  async #connect(/** @type {AudioGraph} */ audio) {
    const Transport = this.#options.transport === 'livekit' ? LiveKitTransport : WsTransport;
    const settled = new Promise((done) => (this.#settle = () => done(undefined)));
    this.#transport = new Transport(audio, this.#wishes(), this.#listener());
    await this.#transport.connect();
    await settled;
  }

  #wishes() {
    const { apiKey = '', mode = '', model = '', voice = '', language = '' } = this.#options;
    const { speakerId = '' } = this.#options;
    return { apiKey, mode, model, voice, language, speakerId };
  }

  /** @returns {import('./transport-ws.js').Listener} */
  #listener() {
    const generation = this.#generation;
    const ifCurrent =
      (/** @type {(...args: any[]) => void} */ act) =>
      (/** @type {any[]} */ ...args) => {
        if (generation === this.#generation) act(...args);
      };
    return {
      event: ifCurrent((event) => this.#tell('event', { event, at: performance.now() })),
      live: ifCurrent(() => this.#onLive()),
      reconnecting: ifCurrent(() => this.#status('reconnecting', 'lost')),
      played: ifCurrent((played) => this.#tell('played', played)),
      trouble: ifCurrent((shown) => this.#show(shown)),
      closed: ifCurrent((end) => void this.#onClosed(end)),
    };
  }

  #onLive() {
    const restarted = this.#retries > 0;
    this.#wasLive = true;
    this.#retries = 0;
    this.#status('live');
    this.#settle();
    if (restarted) this.#tell('trouble', trouble('restarted'));
  }

  /** A call that was lost is begun anew; one that never began, or was ended, is not. */
  async #onClosed(/** @type {import('./transport-ws.js').End} */ { reason, shown, mayRetry }) {
    if (this.#wasLive && mayRetry && this.#retries < RETRY_AFTER_MS.length) {
      await this.#retry(shown?.retry_after_ms ?? 0);
      return;
    }
    const gaveUp = this.#wasLive && mayRetry;
    await this.#end(gaveUp ? 'lost' : reason, gaveUp ? trouble('lost') : shown);
  }

  async #retry(/** @type {number} */ notBeforeMs) {
    const generation = this.#generation;
    const pause = Math.max(RETRY_AFTER_MS[this.#retries], notBeforeMs);
    this.#retries += 1;
    if (this.phase !== 'reconnecting') this.#status('reconnecting', 'lost');
    await new Promise((done) => setTimeout(done, pause));
    if (generation === this.#generation && this.#audio) await this.#connect(this.#audio);
  }

  async #fail(/** @type {unknown} */ error) {
    const known = error instanceof StartFailed;
    if (!known) console.error(error);
    const shown = known ? error.trouble : trouble('server', { text: String(error) });
    await this.#end(shown.code, shown);
  }

  /** @param {string} reason @param {import('./troubles.js').Trouble | null} shown */
  async #end(reason, shown) {
    this.#generation += 1;
    await this.#release();
    this.#status('ended', reason);
    if (shown) this.#tell('trouble', { ...shown, fatal: true });
  }

  async #release() {
    const [transport, audio] = [this.#transport, this.#audio];
    this.#transport = this.#audio = null;
    this.#settle();
    await Promise.all([transport?.close(), audio?.close()]);
  }

  /** What passes. One click is for all that waits for it. */
  #show(/** @type {import('./troubles.js').Trouble} */ shown) {
    if (shown.code === 'autoplay' && this.#askedForClick) return;
    this.#askedForClick ||= shown.code === 'autoplay';
    this.#tell('trouble', shown);
  }

  #status(/** @type {Phase} */ phase, reason = '') {
    this.phase = phase;
    this.#tell('status', { phase, reason });
  }

  #tell(/** @type {string} */ type, /** @type {object} */ detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }
}
