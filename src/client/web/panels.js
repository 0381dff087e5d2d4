/** Troubles in words, each with what can be done about it. */

import { el } from './dom.js';

const NEEDS_MIC = ['mic_refused', 'no_microphone', 'mic_busy'];
const NEEDS_ROOM = ['livekit_missing', 'livekit_off', 'livekit_unreachable', 'no_agent'];

export const HEADPHONES = {
  code: 'headphones',
  title: 'The agent interrupts itself',
  text: 'Its own voice seems to come back through your microphone.',
  hint: 'Take headphones, or turn the speaker down.',
  fatal: false,
};

/** `act`: retry, withoutMicrophone, useWebSocket, soundOn, useKey(key), dismiss(code). */
export class TroublePanels {
  #box;
  #act;
  /** code → {trouble, node}: a panel that stays keeps its focus and what was typed. */
  #shown = new Map();

  constructor(box, act) {
    this.#box = box;
    this.#act = act;
  }

  render(troubles) {
    for (const [code, { trouble, node }] of this.#shown) {
      if (troubles.includes(trouble)) continue;
      node.remove();
      this.#shown.delete(code);
    }
    for (const trouble of troubles) if (!this.#shown.has(trouble.code)) this.#add(trouble);
  }

  #add(trouble) {
    const node = this.#panel(trouble);
    this.#shown.set(trouble.code, { trouble, node });
    this.#box.append(node);
    node.querySelector('input[type=password]')?.focus();
  }

  #panel(trouble) {
    const { code, title, text, hint } = trouble;
    const dismiss = () => this.#act.dismiss(code);
    return el(
      'div',
      { class: 'trouble', role: 'alert', 'data-code': code },
      el(
        'div',
        { class: 'what' },
        el('h2', {}, title),
        el('p', {}, text),
        hint ? el('p', {}, hint) : null,
      ),
      el('div', { class: 'remedies' }, ...this.#remedies(trouble)),
      el(
        'button',
        { type: 'button', class: 'icon close', onclick: dismiss, 'aria-label': 'Dismiss' },
        '×',
      ),
    );
  }

  #remedies({ code, fatal }) {
    if (code === 'unauthorized') return [this.#keyForm()];
    const offers = [];
    if (code === 'autoplay') offers.push(['Turn sound on', this.#act.soundOn]);
    if (NEEDS_MIC.includes(code))
      offers.push(['Go on without a microphone', this.#act.withoutMicrophone]);
    if (NEEDS_ROOM.includes(code)) offers.push(['Use WebSocket', this.#act.useWebSocket]);
    if (fatal) offers.push(['Try again', this.#act.retry]);
    return offers.map(([label, onclick]) => el('button', { type: 'button', onclick }, label));
  }

  #keyForm() {
    const field = el('input', {
      type: 'password',
      id: 'api-key',
      autocomplete: 'off',
      required: true,
    });
    const onsubmit = (event) => {
      event.preventDefault();
      if (field.value.trim()) this.#act.useKey(field.value.trim());
    };
    return el(
      'form',
      { class: 'key-form', onsubmit },
      el('label', { for: 'api-key' }, 'API key, kept until you close this tab'),
      field,
      el('button', { type: 'submit' }, 'Use it'),
    );
  }
}
