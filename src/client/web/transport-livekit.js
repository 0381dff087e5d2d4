/**
 * The LiveKit way: one room with the agent in it, the same events as data packets. livekit-client
 * mends a lost connection by itself. One object is one room.
 */

import { HeardEstimate } from './audio/heard-estimate.js';
import { askForToken, loadClient } from './livekit-access.js';
import { StartFailed, fromServer, trouble } from './troubles.js';

const EVENTS = 'duplex.events';
const CONTROL = 'duplex.control';
/** How long a room may be without the agent: at first, after it left, after we came back. */
const AGENT_COMES_MS = 15000;
const AGENT_GONE_MS = 3000;
const AGENT_RETURNS_MS = 20000;
/**
 * livekit-client 2.23 says "reconnected" two seconds before it is done after a restart; data
 * published until then is taken, and never sent.
 */
const SDK_SETTLES_MS = 2500;
/** Troubles that pass: a call that was lost is tried again in spite of them. */
const PASSING = ['no_server', 'livekit_unreachable', 'lost', 'full', 'no_agent'];

/** @typedef {import('./transport-ws.js').Wishes & {speakerId: string}} Wishes */

export class LiveKitTransport {
  #audio;
  #wishes;
  #listener;
  /** @type {any} livekit-client's Room */
  #room = null;
  #stopTap = () => {};
  #heard;
  #started = false;
  /** Started, but one of the two is not in the room now. */
  #apart = false;
  #restarting = false;
  #closed = false;
  #sendable = Promise.resolve();
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  #agentTimer;
  #endReason = '';
  /** @type {{code: string, shown: import('./troubles.js').Trouble} | null} */
  #fatal = null;

  /**
   * @param {import('./audio/graph.js').AudioGraph} audio
   * @param {Wishes} wishes
   * @param {import('./transport-ws.js').Listener} listener
   */
  constructor(audio, wishes, listener) {
    this.#audio = audio;
    this.#wishes = wishes;
    this.#listener = listener;
    this.#heard = new HeardEstimate((played) => listener.played(played));
  }

  /** Enter a room; `live` or `closed` follows. */
  async connect() {
    try {
      const [livekit, { server_url: url, participant_token: token }] = await Promise.all([
        loadClient(),
        askForToken(this.#wishes),
      ]);
      if (this.#closed) return;
      await this.#join(livekit, url, token);
    } catch (error) {
      if (this.#closed) return;
      const known = error instanceof StartFailed;
      this.#end(known ? error.trouble : trouble('livekit_unreachable'));
    }
  }

  sendText(/** @type {string} */ text, speak = false) {
    this.#control({ type: 'text', text, speak });
  }

  switchModel(/** @type {string} */ model, voice = '') {
    this.#control({ type: 'model.switch', model, voice });
  }

  /** @param {string} id '' is the default one */
  async setSpeaker(id) {
    await this.#room?.switchActiveDevice('audiooutput', id || 'default').catch(() => {});
  }

  /** From a click, when the browser did not let the agent be heard. */
  async resume() {
    await this.#room?.startAudio().catch(() => {});
  }

  async close() {
    this.#closed = true;
    await this.#leave();
  }

  async #control(/** @type {object} */ event) {
    const data = new TextEncoder().encode(JSON.stringify(event));
    const how = { reliable: true, topic: CONTROL };
    await this.#sendable;
    await this.#room?.localParticipant.publishData(data, how).catch(() => {});
  }

  // --- the room ---

  /** @param {any} livekit @param {string} url @param {string} token */
  async #join({ Room, RoomEvent, Track }, url, token) {
    const room = (this.#room = new Room({ adaptiveStream: false, dynacast: false }));
    this.#listenTo(room, RoomEvent);
    await room.connect(url, token);
    if (this.#closed) return;
    this.#expectAgent(AGENT_COMES_MS, 'no_agent');
    const how = { source: Track.Source.Microphone, dtx: true, red: true };
    const { track } = await room.localParticipant.publishTrack(this.#audio.track, how);
    this.#audio.onTrack = (now) => replaceTrack(track, now);
    await replaceTrack(track, this.#audio.track);
    if (this.#wishes.speakerId) await this.setSpeaker(this.#wishes.speakerId);
  }

  /** @param {any} room @param {any} RoomEvent */
  #listenTo(room, RoomEvent) {
    room
      .on(RoomEvent.DataReceived, this.#onData.bind(this))
      .on(RoomEvent.TrackSubscribed, this.#onTrack.bind(this))
      .on(RoomEvent.TrackUnsubscribed, (/** @type {any} */ track) => this.#onTrackGone(track))
      .on(RoomEvent.ParticipantConnected, () => this.#onTogether())
      .on(RoomEvent.ParticipantDisconnected, () => this.#onSomebodyLeft())
      .on(RoomEvent.SignalReconnecting, () => this.#onApart())
      .on(RoomEvent.Reconnecting, () => this.#onRestart())
      .on(RoomEvent.Reconnected, () => this.#onReconnected())
      .on(RoomEvent.Disconnected, () => !this.#closed && this.#end(trouble('lost')))
      .on(RoomEvent.AudioPlaybackStatusChanged, () => {
        if (!this.#closed && !room.canPlaybackAudio) this.#listener.trouble(trouble('autoplay'));
      });
    // What is too long for one packet comes as a text stream.
    room.registerTextStreamHandler(EVENTS, async (/** @type {any} */ reader) => {
      this.#onEvent(await reader.readAll());
    });
  }

  get #agentIsHere() {
    return [...this.#room.remoteParticipants.values()].some(({ isAgent }) => isAgent);
  }

  /** After so long without an agent in a room that stands, the call is over. */
  #expectAgent(/** @type {number} */ patienceMs, /** @type {string} */ code) {
    clearTimeout(this.#agentTimer);
    this.#agentTimer = setTimeout(() => {
      if (this.#room.state === 'connected' && !this.#agentIsHere) this.#end(trouble(code));
    }, patienceMs);
  }

  /** We or the agent have lost the room. */
  #onApart() {
    if (this.#closed || !this.#started || this.#apart) return;
    this.#apart = true;
    this.#listener.reconnecting();
  }

  /** The whole connection is made anew, not only the socket. */
  #onRestart() {
    this.#restarting = true;
    this.#onApart();
  }

  /** The call goes on when both are back: what is said into an empty room is lost. */
  #onTogether() {
    if (!this.#apart || this.#closed) return;
    if (this.#room.state !== 'connected' || !this.#agentIsHere) return;
    this.#apart = false;
    this.#listener.live();
  }

  #onSomebodyLeft() {
    if (this.#closed || this.#agentIsHere) return;
    this.#onApart();
    this.#expectAgent(AGENT_GONE_MS, 'lost');
  }

  /** When the server was restarted, everybody comes back one by one. */
  #onReconnected() {
    if (this.#closed) return;
    if (this.#restarting) this.#sendable = pause(SDK_SETTLES_MS);
    this.#restarting = false;
    this.#expectAgent(AGENT_RETURNS_MS, 'lost');
    this.#onTogether();
  }

  /** @param {any} track @param {any} _publication @param {any} participant */
  #onTrack(track, _publication, participant) {
    if (this.#closed || track.kind !== 'audio' || !participant.isAgent) return;
    // Chromium gives a remote track to WebAudio only while an element plays it too.
    document.body.append(track.attach());
    this.#stopTap();
    this.#stopTap = this.#audio.tap(track.mediaStreamTrack);
  }

  #onTrackGone(/** @type {any} */ track) {
    for (const element of track.detach()) element.remove();
  }

  /** @param {Uint8Array} payload @param {any} participant @param {any} _kind @param {string} topic */
  #onData(payload, participant, _kind, topic) {
    if (topic === EVENTS && participant?.isAgent) this.#onEvent(new TextDecoder().decode(payload));
  }

  #onEvent(/** @type {string} */ text) {
    if (this.#closed) return;
    const event = JSON.parse(text);
    this.#obey(event);
    this.#listener.event(event);
    if (event.type === 'session.started') {
      this.#started = true;
      this.#listener.live();
    } else if (event.type === 'session.ended') {
      this.#end(this.#fatal?.shown ?? null);
    }
  }

  #obey(/** @type {any} */ event) {
    this.#heard.on(event);
    if (event.type === 'flush') this.#audio.stopping();
    else if (event.type === 'session.ended') this.#endReason = event.reason;
    else if (event.type === 'error') this.#onError(event);
  }

  #onError(/** @type {any} */ event) {
    const shown = fromServer(event, event.fatal);
    if (event.fatal) this.#fatal = { code: event.code, shown };
    else this.#listener.trouble(shown);
  }

  /** @param {import('./troubles.js').Trouble | null} shown null: as asked */
  #end(shown) {
    if (this.#closed) return;
    this.#closed = true;
    void this.#leave();
    const told = shown && (this.#fatal?.shown ?? shown);
    const reason = told?.code ?? (this.#endReason || 'ended');
    const passing = this.#fatal ? this.#fatal.code === 'unavailable' : PASSING.includes(reason);
    this.#listener.closed({ reason, shown: told, mayRetry: passing });
  }

  async #leave() {
    clearTimeout(this.#agentTimer);
    this.#heard.stop();
    this.#stopTap();
    const room = this.#room;
    for (const { trackPublications } of room?.remoteParticipants.values() ?? []) {
      for (const { track } of trackPublications.values()) if (track) this.#onTrackGone(track);
    }
    this.#audio.onTrack = null;
    // The microphone is not the room's to stop: the next one may need it.
    await room?.disconnect(false);
  }
}

/** @param {any} published livekit-client's LocalAudioTrack @param {MediaStreamTrack} track */
async function replaceTrack(published, track) {
  if (published.mediaStreamTrack !== track) await published.replaceTrack(track, true);
  // It mutes itself when a device is unplugged.
  if (published.isMuted) await published.unmute();
}

/** @returns {Promise<void>} */
function pause(/** @type {number} */ ms) {
  return new Promise((done) => setTimeout(done, ms));
}
