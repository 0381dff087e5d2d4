/** Writing instead of speaking, and sounds instead of a microphone. */

import { $ } from './dom.js';

const TALLEST_PX = 160;

/** `act`: sendText(text, speak), inject(sound). */
export class Composer {
  #field = $('#text');
  #act;

  constructor(act) {
    this.#act = act;
    $('#composer').addEventListener('submit', (event) => {
      event.preventDefault();
      this.#send();
    });
    this.#field.addEventListener('keydown', (event) => {
      if (event.key !== 'Enter' || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.#send();
    });
    this.#field.addEventListener('input', () => this.#fit());
    $('#sounds').addEventListener('click', ({ target }) => {
      if (target.dataset.sound) act.inject(target.dataset.sound);
    });
  }

  render({ phase }) {
    const live = phase === 'live';
    this.#field.disabled = $('#send').disabled = $('#sounds').disabled = !live;
    this.#field.placeholder = live ? 'Write instead of speaking' : 'Start, then write here';
  }

  #send() {
    const text = this.#field.value.trim();
    if (!text || this.#field.disabled) return;
    this.#act.sendText(text, $('#verbatim').checked);
    this.#field.value = '';
    this.#fit();
  }

  /** As tall as what is written. */
  #fit() {
    this.#field.style.height = 'auto';
    this.#field.style.height = `${Math.min(TALLEST_PX, this.#field.scrollHeight + 2)}px`;
  }
}
