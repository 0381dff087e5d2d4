/** One turn's waterfall against the medians of the session, and the turns before it. */

import { el, say, set } from './dom.js';
import { STAGES, isTyped, medians, timedTurns, waterfall } from './readings.js';
import { STAGES as NAMES, count, ms } from './words.js';

const TURNS_SHOWN = 24;

export class LatencyStrip {
  #figure = el('strong', {}, '–');
  #caption = el('span', { class: 'soft' });
  #history = el('div', { class: 'history', role: 'img' });
  #rows = new Map(STAGES.map((stage) => [stage, row(stage)]));
  #turns = null;

  constructor(box) {
    const heads = ['end of speech to', '', 'this turn', 'median'];
    const head = el('tr', {}, ...heads.map((text) => el('th', { scope: 'col' }, text)));
    head.children[1].append(el('span', { class: 'hidden' }, 'bar'));
    const rows = [...this.#rows.values()].map((parts) => parts.row);
    const table = el('table', {}, el('thead', {}, head), el('tbody', {}, ...rows));
    const number = el('p', { class: 'figure' }, this.#figure, this.#caption);
    box.append(el('div', { class: 'headline' }, number, this.#history), table);
    this.#draw([], { turns: [] });
  }

  render(state) {
    if (state.turns === this.#turns) return;
    this.#turns = state.turns;
    this.#draw(timedTurns(state), state);
  }

  #draw(turns, state) {
    const turn = turns.at(-1) ?? null;
    const figures = turn ? waterfall(turn) : {};
    const usual = turn ? medians(state, isTyped(turn)) : {};
    const longest = Math.max(1, ...Object.values(figures), ...Object.values(usual));
    for (const [stage, parts] of this.#rows) {
      fill(parts, figures[stage] ?? null, usual[stage] ?? null, longest);
    }
    this.#figure.className = turn ? '' : 'none';
    say(this.#figure, ms(figures.first_audio ?? null));
    say(
      this.#caption,
      turn ? captionOf(turn, usual, turns) : 'from your last word to its first sound',
    );
    this.#drawHistory(turns.slice(-TURNS_SHOWN));
  }

  #drawHistory(turns) {
    const figures = turns.map((turn) => turn.latency.first_audio_ms);
    const highest = Math.max(1, ...figures);
    this.#history.replaceChildren(
      ...figures.map((figure) => {
        const bar = el('i');
        bar.style.height = `${Math.max(8, (100 * figure) / highest)}%`;
        return bar;
      }),
    );
    set(
      this.#history,
      'aria-label',
      figures.length
        ? `First audio of the last ${count(figures.length, 'turn')}, in ms: ${figures.join(', ')}`
        : 'First audio turn by turn: none yet',
    );
  }
}

function captionOf(turn, usual, turns) {
  const kind = isTyped(turn) ? 'typed' : 'spoken';
  const alike = turns.filter((other) => isTyped(other) === isTyped(turn)).length;
  return `to the first sound; median ${ms(usual.first_audio)} of ${alike} ${kind}`;
}

function row(stage) {
  const bar = el('i');
  const tick = el('b');
  const now = el('td', { class: 'number' });
  const usual = el('td', { class: 'number soft' });
  const cell = el('td', { class: 'bar-cell', 'aria-hidden': 'true' }, el('div', {}, bar, tick));
  const name = el('th', { scope: 'row' }, NAMES[stage]);
  return { row: el('tr', {}, name, cell, now, usual), bar, tick, now, usual };
}

function fill(parts, figure, usual, longest) {
  parts.bar.style.width = figure === null ? '0' : `max(2px, ${(100 * figure) / longest}%)`;
  parts.tick.style.left = usual === null ? '-9px' : `${(100 * usual) / longest}%`;
  say(parts.now, ms(figure));
  say(parts.usual, ms(usual));
}
