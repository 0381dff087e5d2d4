/**
 * The page's sound: microphone and injected sounds mixed into one way up, the agent's voice on its
 * way down, meters on both, all on one AudioContext clock.
 */

import { openMicrophone } from '../devices.js';
import { loadSound } from '../sounds.js';
import { StartFailed, trouble } from '../troubles.js';
import { BargeInClock } from './barge-in-clock.js';
import { LEVEL_FLOOR_DBFS } from './meters.js';
import { WIRE_RATE } from './ring-player.js';

const WORKLETS = ['capture', 'player', 'tap'];
/** Sample rates of the protocol. */
const RATES = [8000, 16000, 24000, 32000, 44100, 48000];
// How long sound may take to begin before a click is asked for, and after one.
const START_PATIENCE_MS = 500;
const CLICK_PATIENCE_MS = 3000;
/** A sound that has ended in the mixer is still on its way out of it. */
const MIXER_TAIL_MS = 200;

/**
 * @typedef {object} Listeners
 * @property {(mic: number, agent: number) => void} level dBFS
 * @property {(onsetToSilenceMs: number) => void} silence
 * @property {(shown: import('../troubles.js').Trouble) => void} trouble
 */

export class AudioGraph {
  /** @type {((track: MediaStreamTrack) => Promise<void>) | null} */
  onTrack = null;
  /** Frames of 20 ms, s16le at `rate`, for who wants them. @type {(pcm: ArrayBuffer) => void} */
  onFrame = () => {};
  #context;
  #listeners;
  #mix;
  #capture;
  #clock = new BargeInClock();
  /** @type {MediaStream | null} */
  #stream = null;
  /** @type {MediaStreamAudioSourceNode | null} */
  #source = null;
  /** The microphone's twin: who publishes a track may switch it on and off. @type {MediaStreamTrack | null} */
  #direct = null;
  /** @type {MediaStreamTrack | null} */
  #mixed = null;
  #injecting = 0;
  #muted = false;
  #closed = false;
  #level = { mic: LEVEL_FLOOR_DBFS, agent: LEVEL_FLOOR_DBFS };
  #echoDb;

  /**
   * Call it in a click's own turn: browsers let sound begin only there.
   * @param {{mic: boolean, micId: string, speakerId: string, rate?: number, echoDb?: number}} options
   *     `echoDb`, for tests: the agent's voice comes back into the microphone at this gain
   * @param {Listeners} listeners
   * @returns {Promise<AudioGraph>} rejects with StartFailed
   */
  static async open({ mic, micId, speakerId, rate = WIRE_RATE, echoDb }, listeners) {
    if (!window.isSecureContext) throw new StartFailed(trouble('insecure_context'));
    let context = new AudioContext({ sampleRate: rate, latencyHint: 'interactive' });
    /** @type {MediaStream | null} */
    let stream = null;
    try {
      stream = mic ? await openMicrophone(micId) : null;
      if (stream && !fits(stream, context)) {
        await context.close();
        context = nativeContext();
      }
      await loadWorklets(context);
      const graph = new AudioGraph(context, listeners, echoDb);
      if (stream) graph.#use(stream);
      if (speakerId) await graph.setSpeaker(speakerId);
      await graph.#begin();
      return graph;
    } catch (error) {
      stream?.getTracks().forEach((track) => track.stop());
      if (context.state !== 'closed') await context.close();
      throw error;
    }
  }

  /** @param {AudioContext} context @param {Listeners} listeners @param {number} [echoDb] */
  constructor(context, listeners, echoDb) {
    this.#context = context;
    this.#listeners = listeners;
    this.#echoDb = echoDb;
    this.#mix = context.createGain();
    this.#capture = new AudioWorkletNode(context, 'capture', {
      numberOfOutputs: 0,
      channelCount: 1,
      channelCountMode: 'explicit',
    });
    this.#capture.port.onmessage = ({ data }) => this.#onCapture(data);
    this.#mix.connect(this.#capture);
    context.onstatechange = () => this.#onState();
  }

  get context() {
    return this.#context;
  }

  get rate() {
    return this.#context.sampleRate;
  }

  /**
   * What a room should hear: the microphone itself, or the mixer while that has more to say. Through
   * the mixer it takes some 40 ms longer. `onTrack` is told when it changes.
   */
  get track() {
    const mixing = this.#muted || this.#injecting > 0 || this.#echoDb !== undefined;
    if (this.#direct && !mixing) return this.#direct;
    this.#mixed ??= this.#openMixed();
    return this.#mixed;
  }

  /**
   * A loudspeaker for the frames of the wire.
   * @param {(message: any) => void} onMessage what the player worklet posts
   * @returns {AudioWorkletNode}
   */
  createPlayer(onMessage) {
    const player = new AudioWorkletNode(this.#context, 'player', {
      numberOfInputs: 0,
      outputChannelCount: [1],
    });
    player.port.onmessage = ({ data }) => this.#onVoice(data) || onMessage(data);
    player.connect(this.#context.destination);
    this.#feedBack(player);
    return player;
  }

  /** Measure a remote track, which something else plays. @returns {() => void} stops */
  tap(/** @type {MediaStreamTrack} */ track) {
    const source = this.#context.createMediaStreamSource(new MediaStream([track]));
    const tap = new AudioWorkletNode(this.#context, 'tap', {
      numberOfOutputs: 0,
      channelCount: 1,
      channelCountMode: 'explicit',
    });
    tap.port.onmessage = ({ data }) => this.#onVoice(data);
    source.connect(tap);
    this.#feedBack(source);
    return () => source.disconnect();
  }

  /** The server has silenced the agent. */
  stopping() {
    this.#tellSilence(this.#clock.stopping());
  }

  /** When a moment of the AudioContext is heard, on performance.now()'s clock. */
  heardAt(/** @type {number} */ contextTime) {
    const { contextTime: at = 0, performanceTime = 0 } = this.#context.getOutputTimestamp();
    return performanceTime + (contextTime - at) * 1000;
  }

  /** @param {string | ArrayBuffer} sound a name, or a WAV file's bytes. Resolves when it is over. */
  async inject(sound) {
    const buffer = await loadSound(sound, this.#context);
    this.#injecting += 1;
    await this.#retrack();
    const source = new AudioBufferSourceNode(this.#context, { buffer });
    source.connect(this.#mix);
    source.start();
    await new Promise((done) => source.addEventListener('ended', done));
    setTimeout(() => this.#injected(), MIXER_TAIL_MS);
  }

  setMuted(/** @type {boolean} */ muted) {
    this.#muted = muted;
    const tracks = [...(this.#stream?.getAudioTracks() ?? []), ...(this.#direct ? [this.#direct] : [])];
    for (const track of tracks) track.enabled = !muted;
    void this.#retrack();
  }

  /** Change the microphone while it runs. Rejects with StartFailed; the old one then stays. */
  async setMic(/** @type {string} */ id) {
    const stream = await openMicrophone(id);
    if (this.#closed) stream.getTracks().forEach((track) => track.stop());
    else this.#use(stream);
  }

  /** Without the browser's support, and for a speaker that is gone, the default one stays. */
  async setSpeaker(/** @type {string} */ id) {
    const context = /** @type {AudioContext & {setSinkId?: (id: string) => Promise<void>}} */ (
      this.#context
    );
    await context.setSinkId?.(id === 'default' ? '' : id).catch(() => {});
  }

  /** From a click, when the browser did not let sound begin. Resolves to whether it has now. */
  async resume(patienceMs = CLICK_PATIENCE_MS) {
    const patience = new Promise((done) => setTimeout(done, patienceMs));
    await Promise.race([this.#context.resume(), patience]);
    return this.#context.state === 'running';
  }

  async close() {
    if (this.#closed) return;
    this.#closed = true;
    this.#release();
    this.#mixed?.stop();
    this.#capture.port.onmessage = null;
    await this.#context.close();
  }

  #openMixed() {
    const destination = new MediaStreamAudioDestinationNode(this.#context, { channelCount: 1 });
    this.#mix.connect(destination);
    return destination.stream.getAudioTracks()[0];
  }

  #injected() {
    this.#injecting -= 1;
    if (!this.#closed) void this.#retrack();
  }

  async #retrack() {
    await this.onTrack?.(this.track);
  }

  #use(/** @type {MediaStream} */ stream) {
    const source = this.#context.createMediaStreamSource(stream);
    this.#release();
    this.#stream = stream;
    this.#source = source;
    this.#direct = stream.getAudioTracks()[0].clone();
    this.setMuted(this.#muted);
    source.connect(this.#mix);
    stream.getAudioTracks()[0].addEventListener('ended', () => this.#onUnplugged(stream));
  }

  #release() {
    this.#source?.disconnect();
    this.#stream?.getTracks().forEach((track) => track.stop());
    this.#direct?.stop();
    this.#source = this.#stream = this.#direct = null;
  }

  async #onUnplugged(/** @type {MediaStream} */ stream) {
    if (this.#closed || stream !== this.#stream) return;
    this.#release();
    try {
      await this.setMic('');
      this.#listeners.trouble(trouble('mic_lost'));
    } catch {
      const text = 'The microphone is gone, and there is no other.';
      this.#listeners.trouble(trouble('no_microphone', { text, fatal: false }));
    }
  }

  /** A phone call or a sleeping machine stops the clock that everything here runs on. */
  #onState() {
    if (this.#closed || this.#context.state === 'running') return;
    void this.#begin();
  }

  async #begin() {
    const begun = await this.resume(START_PATIENCE_MS);
    if (!begun && !this.#closed) this.#listeners.trouble(trouble('autoplay'));
  }

  /** A test's own echo, which no echo canceller can see. */
  #feedBack(/** @type {AudioNode} */ voice) {
    if (this.#echoDb === undefined) return;
    const gain = new GainNode(this.#context, { gain: 10 ** (this.#echoDb / 20) });
    voice.connect(gain).connect(this.#mix);
  }

  #onCapture(/** @type {any} */ message) {
    if (message.type === 'frame') this.onFrame(message.pcm);
    else if (message.type === 'onset') this.#clock.onset(message.at);
    else if (message.type === 'level') {
      this.#level.mic = message.dbfs;
      this.#listeners.level(this.#level.mic, this.#level.agent);
    }
  }

  /** True: it was one of the meters' messages. */
  #onVoice(/** @type {any} */ message) {
    if (message.type === 'level') this.#level.agent = message.dbfs;
    else if (message.type === 'audible') this.#clock.audible();
    else if (message.type === 'silent') this.#tellSilence(this.#clock.silent(message.at));
    else return false;
    return true;
  }

  #tellSilence(/** @type {number | null} */ ms) {
    if (ms !== null) this.#listeners.silence(ms);
  }
}

/** They come from the server, and only now. Rejects with StartFailed. */
async function loadWorklets(/** @type {AudioContext} */ context) {
  const urls = WORKLETS.map((name) => new URL(`./${name}-worklet.js`, import.meta.url));
  try {
    await Promise.all(urls.map((url) => context.audioWorklet.addModule(url)));
  } catch {
    throw new StartFailed(trouble('no_server'));
  }
}

/** Firefox does not join a microphone to a context of another rate. */
function fits(/** @type {MediaStream} */ stream, /** @type {AudioContext} */ context) {
  try {
    context.createMediaStreamSource(stream).disconnect();
    return true;
  } catch {
    return false;
  }
}

/** A context at the sound card's own rate, if the server takes it. Throws StartFailed. */
function nativeContext() {
  const context = new AudioContext({ latencyHint: 'interactive' });
  if (RATES.includes(context.sampleRate)) return context;
  void context.close();
  const text = `The sound card runs at ${context.sampleRate} Hz, which the server does not take.`;
  throw new StartFailed(trouble('mic_busy', { text }));
}
