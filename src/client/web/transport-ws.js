/** The WebSocket way: docs/protocol.md, spoken by a browser. One object is one connection. */

import { fromServer, trouble } from './troubles.js';

const PATH = '/v1/session';
const SUBPROTOCOL = 'duplex.v1';
const KEY_SUBPROTOCOL = 'bearer.';
/** What the server takes as a key (configs/orchestrator.yaml, server.api_keys). */
const KEY = /^[\w!#$%&'*+\-.^`|~]*$/;
const MAX_BEHIND_MS = 1000;
const GOODBYE_MS = 1000;
const NORMAL = 1000;
/** 44xx and 4500: the server said why, and would say it again. */
const isFinal = (/** @type {number} */ code) =>
  code === NORMAL || (code >= 4400 && code <= 4500);

/**
 * What a transport tells its session.
 * @typedef {object} Listener
 * @property {(event: any) => void} event a server event (docs/protocol.md)
 * @property {() => void} live the conversation may begin
 * @property {() => void} reconnecting the transport is mending itself; `live` follows, or `closed`
 * @property {(played: {utterance_id: string, seq: number, at: number}) => void} played
 * @property {(shown: import('./troubles.js').Trouble) => void} trouble
 * @property {(end: End) => void} closed once, after `live` or instead of it
 *
 * `mayRetry`: a new connection may succeed. `shown` is null when it ended as asked.
 * @typedef {{reason: string, shown: import('./troubles.js').Trouble | null, mayRetry: boolean}} End
 *
 * @typedef {{apiKey: string, mode: string, model: string, voice: string, language: string}} Wishes
 */

export class WsTransport {
  #audio;
  #listener;
  #wishes;
  /** @type {WebSocket | null} */
  #socket = null;
  #player;
  #opened = false;
  #closed = false;
  #behind = false;
  #endReason = '';
  /** @type {import('./troubles.js').Trouble | null} */
  #fatal = null;

  /**
   * @param {import('./audio/graph.js').AudioGraph} audio
   * @param {Wishes} wishes
   * @param {Listener} listener
   */
  constructor(audio, wishes, listener) {
    this.#audio = audio;
    this.#wishes = wishes;
    this.#listener = listener;
    this.#player = audio.createPlayer((message) => this.#onPlayer(message));
  }

  /** Open the socket; `live` or `closed` follows. */
  async connect() {
    const { apiKey } = this.#wishes;
    if (!KEY.test(apiKey)) {
      const shown = trouble('unauthorized', { text: 'There is a character in it that no key has.' });
      this.#closed = true;
      this.#listener.closed({ reason: shown.code, shown, mayRetry: false });
      return;
    }
    const url = new URL(PATH, location.href);
    url.protocol = url.protocol.replace('http', 'ws');
    const protocols = apiKey ? [SUBPROTOCOL, KEY_SUBPROTOCOL + apiKey] : [SUBPROTOCOL];
    const socket = (this.#socket = new WebSocket(url, protocols));
    socket.binaryType = 'arraybuffer';
    socket.onopen = () => this.#onOpen();
    socket.onmessage = ({ data }) => this.#onMessage(data);
    socket.onclose = ({ code, reason }) => void this.#onClose(code, reason);
  }

  sendText(/** @type {string} */ text, speak = false) {
    this.#send({ type: 'text', text, speak });
  }

  switchModel(/** @type {string} */ model, voice = '') {
    this.#send({ type: 'model.switch', model, voice });
  }

  /** The agent plays through the context, which has its speaker already. */
  async setSpeaker() {}

  /** Sound begins with the context. */
  async resume() {}

  /** Say goodbye and wait for the other side's, a moment. */
  async close() {
    const socket = this.#socket;
    this.#closed = true;
    this.#hangUp();
    if (!socket || socket.readyState >= WebSocket.CLOSING) return;
    const closed = new Promise((done) => socket.addEventListener('close', done));
    if (socket.readyState === WebSocket.OPEN) socket.send('{"type": "session.end"}');
    else socket.close();
    await Promise.race([closed, new Promise((done) => setTimeout(done, GOODBYE_MS))]);
    socket.close();
  }

  #send(/** @type {object} */ event) {
    if (this.#socket?.readyState === WebSocket.OPEN) this.#socket.send(JSON.stringify(event));
  }

  // --- the socket ---

  #onOpen() {
    this.#opened = true;
    const { mode, model, voice, language } = this.#wishes;
    const wishes = { mode: mode || 'default', model, voice, language };
    this.#send({ type: 'session.start', sample_rate: this.#audio.rate, ...wishes });
    this.#audio.onFrame = (pcm) => this.#sendMic(pcm);
  }

  /** A network that stalls for more than a second loses what is said in it, and nothing before. */
  #sendMic(/** @type {ArrayBuffer} */ pcm) {
    const socket = this.#socket;
    if (socket?.readyState !== WebSocket.OPEN) return;
    const behind = socket.bufferedAmount > (2 * this.#audio.rate * MAX_BEHIND_MS) / 1000;
    if (behind && !this.#behind) this.#listener.trouble(trouble('slow'));
    this.#behind = behind;
    if (!behind) socket.send(pcm);
  }

  #onMessage(/** @type {string | ArrayBuffer} */ data) {
    if (this.#closed) return;
    if (typeof data !== 'string') {
      this.#player.port.postMessage({ type: 'frame', pcm: data }, [data]);
      return;
    }
    const event = JSON.parse(data);
    this.#obey(event);
    this.#listener.event(event);
    if (event.type === 'session.started') this.#listener.live();
  }

  #obey(/** @type {any} */ event) {
    const utteranceId = event.utterance_id;
    if (event.type === 'audio.begin') this.#play({ type: 'begin', utteranceId, seq: event.seq });
    else if (event.type === 'audio.end') this.#play({ type: 'end' });
    else if (event.type === 'flush') this.#play({ type: 'flush', utteranceId });
    else if (event.type === 'session.ended') this.#endReason = event.reason;
    else if (event.type === 'error') this.#onError(event);
    if (event.type === 'flush') this.#audio.stopping();
  }

  #play(/** @type {object} */ message) {
    this.#player.port.postMessage(message);
  }

  #onError(/** @type {any} */ event) {
    const shown = fromServer(event, event.fatal);
    if (event.fatal) this.#fatal = shown;
    else this.#listener.trouble(shown);
  }

  async #onClose(/** @type {number} */ code, /** @type {string} */ reason) {
    this.#hangUp();
    if (this.#closed) return;
    this.#closed = true;
    if (!this.#opened) {
      const shown = await whyNot(this.#wishes.apiKey);
      const mayRetry = shown.code !== 'unauthorized';
      this.#listener.closed({ reason: shown.code, shown, mayRetry });
    } else if (code === NORMAL) {
      this.#listener.closed({ reason: this.#endReason || reason, shown: null, mayRetry: false });
    } else {
      const shown = this.#fatal ?? trouble('lost');
      this.#listener.closed({ reason: shown.code, shown, mayRetry: !isFinal(code) });
    }
  }

  #hangUp() {
    this.#audio.onFrame = () => {};
    this.#player.disconnect();
    this.#player.port.onmessage = null;
  }

  // --- the player ---

  #onPlayer(/** @type {any} */ { type, utteranceId, seq, at }) {
    if (type !== 'played' && type !== 'flushed') return;
    const flushed = type === 'flushed';
    this.#send({ type: 'playback', utterance_id: utteranceId, seq, flushed });
    const heardAt = this.#audio.heardAt(at);
    if (seq >= 0) this.#listener.played({ utterance_id: utteranceId, seq, at: heardAt });
  }
}

/** A browser does not say why a socket was refused; the HTTP API does. */
async function whyNot(/** @type {string} */ apiKey) {
  try {
    const headers = apiKey ? { Authorization: `Bearer ${apiKey}` } : undefined;
    const { status } = await fetch('/v1/protocol.json', { headers, cache: 'no-store' });
    return trouble(status === 401 ? 'unauthorized' : 'no_server');
  } catch {
    return trouble('no_server');
  }
}
