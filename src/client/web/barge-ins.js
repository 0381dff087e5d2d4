/** How fast it went quiet, and whether it was right to. */

import { el, say } from './dom.js';
import { median } from './readings.js';
import { VERDICTS, count, ms, reasonOf } from './words.js';

const SHOWN = 4;

export class BargeIns {
  #figure = el('strong', {}, '–');
  #caption = el('span', { class: 'soft' });
  #list = el('ol');
  #shown = null;

  constructor(box) {
    const number = el('p', { class: 'figure' }, this.#figure, this.#caption);
    box.append(el('div', { class: 'headline' }, number), this.#list);
    this.render({ bargeIns: [] });
  }

  render({ bargeIns }) {
    if (bargeIns === this.#shown) return;
    this.#shown = bargeIns;
    const quick = bargeIns.map((barge) => barge.silenceMs).filter((figure) => figure !== null);
    this.#figure.className = quick.length ? '' : 'none';
    say(this.#figure, ms(quick.at(-1) ?? null));
    say(
      this.#caption,
      quick.length
        ? `to silence, measured here; median ${ms(median(quick))} of ${quick.length}`
        : 'from your first sound to its silence, measured here',
    );
    const rows = bargeIns.slice(-SHOWN).reverse().map(item);
    const none = el('li', { class: 'soft' }, 'Speak while the agent does, or play it a cough.');
    this.#list.replaceChildren(...(rows.length ? rows : [none]));
  }
}

function item(barge) {
  const facts = [
    barge.silenceMs === null ? '' : `silent in ${ms(barge.silenceMs)}`,
    barge.verdictMs === null ? '' : `judged in ${ms(barge.verdictMs)}`,
    barge.injected ? 'test sound' : '',
  ];
  const why = reasonOf(barge);
  const line = facts.filter(Boolean).join(', ');
  return el(
    'li',
    { 'data-verdict': barge.verdict },
    el('i', { class: 'glyph', 'aria-hidden': 'true' }),
    el('span', {}, el('b', {}, VERDICTS[barge.verdict]), why ? `: ${why}` : ''),
    line ? el('span', { class: 'soft' }, line) : null,
  );
}

/** "2 interruptions, 1 false alarm" */
export function tally(bargeIns) {
  const of = (verdict) => bargeIns.filter((barge) => barge.verdict === verdict).length;
  const parts = [
    of('real') ? count(of('real'), 'interruption') : '',
    of('false') ? count(of('false'), 'false alarm') : '',
  ];
  return parts.filter(Boolean).join(', ');
}
