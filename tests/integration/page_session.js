/** What a test plays the session with: the contract of session.js, and no sound. */

export class VoiceSession extends EventTarget {
  phase = 'idle';
  calls = [];

  constructor() {
    super();
    window.fake = this;
  }

  async start(options) {
    this.calls.push(['start', options]);
    this.tell('status', { phase: 'connecting', reason: '' });
    if (window.refuse) {
      this.tell('status', { phase: 'ended', reason: window.refuse.code });
      this.tell('trouble', window.refuse);
    } else {
      this.say({ type: 'session.started', session_id: `s${this.calls.length}`, model: 'piper-en-joe',
        voice: 'joe', recogniser: 'whisper-tiny.en', llm: 'SmolLM2', fallback: false });
      this.tell('status', { phase: 'live', reason: '' });
    }
  }

  async stop() {
    this.calls.push(['stop']);
    this.tell('status', { phase: 'ended', reason: 'stopped' });
  }

  sendText(text, speak = false) { this.calls.push(['text', text, speak]); }
  switchModel(model, voice) { this.calls.push(['switch', model, voice]); }
  async inject(sound) { this.calls.push(['inject', sound]); }
  setMuted(muted) { this.calls.push(['muted', muted]); }
  async setMic(id) { this.calls.push(['mic', id]); }
  async setSpeaker(id) { this.calls.push(['speaker', id]); }
  async resume() { this.calls.push(['resume']); }

  tell(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }

  say(event, at = performance.now()) {
    this.tell('event', { event, at });
  }
}

export const transports = ['livekit', 'ws'];
export const available = async () => window.offered ?? { ws: true, livekit: false, why: 'Rooms are switched off: start the server with --livekit.' };
