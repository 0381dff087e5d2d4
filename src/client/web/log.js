/** The newest events, to look at and to copy; built only while somebody looks. */

import { el, say } from './dom.js';
import { count } from './words.js';

export const KEPT = 500;

export class EventLog {
  #entries = [];
  #details;
  #lines;
  #count;
  #note;
  /** Events not yet in the list. */
  #fresh = 0;

  constructor({ details, lines, count: counter, note, copy, clear }) {
    this.#details = details;
    this.#lines = lines;
    this.#count = counter;
    this.#note = note;
    details.addEventListener('toggle', () => this.render());
    copy.addEventListener('click', () => void this.#copy());
    clear.addEventListener('click', () => this.#clear());
    this.render();
  }

  add(event, at) {
    this.#entries.push({ t_ms: Math.round(at * 10) / 10, ...event });
    if (this.#entries.length > KEPT) this.#entries.shift();
    this.#fresh = Math.min(KEPT, this.#fresh + 1);
  }

  render() {
    say(this.#count, this.#entries.length ? count(this.#entries.length, 'event') : '');
    if (!this.#details.open || !this.#fresh) return;
    const { scrollTop, scrollHeight, clientHeight } = this.#lines;
    const follows = scrollHeight - scrollTop - clientHeight < 40;
    this.#lines.append(...this.#entries.slice(-this.#fresh).map(lineOf));
    while (this.#lines.childElementCount > KEPT) this.#lines.firstElementChild.remove();
    this.#fresh = 0;
    if (follows) this.#lines.scrollTop = this.#lines.scrollHeight;
  }

  jsonl() {
    return this.#entries.map((entry) => `${JSON.stringify(entry)}\n`).join('');
  }

  #clear() {
    this.#entries = [];
    this.#fresh = 0;
    this.#lines.replaceChildren();
    this.render();
  }

  async #copy() {
    const done = await copied(this.jsonl());
    say(this.#note, done ? 'Copied.' : 'The browser did not let the page copy.');
    setTimeout(() => say(this.#note, ''), 4000);
  }
}

function lineOf({ t_ms: at, type, ...rest }) {
  return el(
    'li',
    { class: type.startsWith('client.') ? 'ours' : 'theirs' },
    el('time', {}, (at / 1000).toFixed(2)),
    el('b', {}, type),
    el('code', {}, JSON.stringify(rest)),
  );
}

/** Without a secure context there is only the old way. */
async function copied(text) {
  if (navigator.clipboard) {
    return navigator.clipboard.writeText(text).then(
      () => true,
      () => false,
    );
  }
  const field = el('textarea', { class: 'hidden' });
  field.value = text;
  document.body.append(field);
  field.select();
  const done = document.execCommand('copy');
  field.remove();
  return done;
}
