/** The round button, microphone, speaker, mute and transport. */

import { canChooseSpeaker, listDevices, watchDevices } from './devices.js';
import { $, el, say, set } from './dom.js';
import { ENDED, STATES } from './words.js';
import { floor } from './readings.js';

const RUNNING = ['connecting', 'live', 'reconnecting'];
const QUIET_DBFS = -60;

/** `act`: start(), stop(), setMuted(on), setMic(id), setSpeaker(id). */
export class Controls {
  muted = false;
  #act;
  #phase = 'idle';

  constructor(act) {
    this.#act = act;
    $('#control').addEventListener('click', () => this.toggle());
    $('#mute').addEventListener('click', () => this.mute(!this.muted));
    $('#mic').addEventListener('change', (event) => act.setMic(event.target.value));
    $('#speaker').addEventListener('change', (event) => act.setSpeaker(event.target.value));
    $('#speaker').hidden = $('label[for=speaker]').hidden = !canChooseSpeaker;
    watchDevices(() => void this.#listDevices());
    void this.#listDevices();
  }

  get running() {
    return RUNNING.includes(this.#phase);
  }

  get wishes() {
    const transport = $('input[name=transport]:checked').value;
    return { transport, micId: $('#mic').value, speakerId: $('#speaker').value };
  }

  toggle() {
    if (this.running) this.#act.stop();
    else this.#act.start();
  }

  mute(muted) {
    this.muted = muted;
    set($('#mute'), 'aria-pressed', String(muted));
    say($('#mute'), muted ? 'Unmute' : 'Mute');
    document.body.dataset.muted = String(muted);
    this.#act.setMuted(muted);
  }

  /** `why`: why there is no LiveKit, or ''. */
  offer({ livekit, why }) {
    const room = $('input[value=livekit]');
    room.disabled = !livekit || this.running;
    room.dataset.missing = livekit ? '' : 'yes';
    say($('#transport-why'), livekit ? '' : why);
    if (livekit && !this.running) room.checked = true;
  }

  useWebSocket() {
    $('input[value=ws]').checked = true;
  }

  render(state, name) {
    const { body } = document;
    body.dataset.state = name;
    body.dataset.floor = floor(name);
    this.#show(state, name);
    if (state.phase === this.#phase) return;
    this.#phase = state.phase;
    say($('#control-word'), this.running ? 'Stop' : 'Start');
    for (const choice of document.querySelectorAll('input[name=transport]')) {
      choice.disabled = this.running || choice.dataset.missing === 'yes';
    }
    // The names of devices are told only to those whom a microphone was given.
    if (state.phase === 'live') void this.#listDevices();
  }

  #show(state, name) {
    const [word, hint] = STATES[name];
    say($('#state-word'), word);
    say($('#state-hint'), this.#hint(state, name, hint));
    say($('#facts'), state.session ? factsOf(state) : '');
  }

  #hint(state, name, hint) {
    if (name === 'ended') return ENDED[state.reason] ?? hint;
    const deaf = this.muted && (name === 'listening' || name === 'hearing');
    return deaf ? 'Your microphone is muted.' : hint;
  }

  /** dBFS of both sides. */
  level({ mic, agent }) {
    const share = (dbfs) => Math.min(1, Math.max(0, (dbfs - QUIET_DBFS) / -QUIET_DBFS));
    const own = this.muted ? 0 : share(mic);
    $('#level').value = this.muted ? QUIET_DBFS : Math.max(QUIET_DBFS, mic);
    $('#level-bar').style.transform = `scaleX(${own.toFixed(3)})`;
    const loud = document.body.dataset.floor === 'agent' ? share(agent) : own;
    $('#control').style.setProperty('--level', loud.toFixed(3));
  }

  async #listDevices() {
    const { mics, speakers } = await listDevices();
    choices($('#mic'), mics);
    choices($('#speaker'), speakers);
  }
}

function choices(select, devices) {
  const chosen = select.value;
  const named = devices.filter(({ id }) => id !== 'default');
  const options = [{ id: '', label: 'System default' }, ...named];
  select.replaceChildren(...options.map(({ id, label }) => el('option', { value: id }, label)));
  select.value = options.some(({ id }) => id === chosen) ? chosen : '';
}

function factsOf({ session, voice }) {
  const standIn = session.fallback && voice.model === session.model ? ' (stand-in)' : '';
  return [voice.model + standIn, session.recogniser, session.llm].filter(Boolean).join(' · ');
}
