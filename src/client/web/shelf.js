/** The fleet's models: what is in memory, who holds it, and which voice speaks. */

import { el, say } from './dom.js';
import { ModelRow, vramOf } from './shelf-row.js';
import { count } from './words.js';

const POLL_MS = 2000;
const NO_VOICE = { model: '', state: '', message: '' };

/** `apiKey()` gives the key; `onUse(id)` picks a voice; `onUnauthorized()` asks for a key. */
export class Shelf {
  #box;
  #hooks;
  #rows = new Map();
  #models = [];
  #workers = [];
  #voice = NO_VOICE;
  #notes = new Map();
  #timer = 0;
  #seen = false;
  #list = el('ul');
  #memory = el('ul', { class: 'memory soft', 'aria-label': 'Workers' });
  #problem = el('p', { class: 'soft', role: 'status' });

  constructor(box, hooks) {
    this.#box = box;
    this.#hooks = hooks;
    box.append(this.#memory, this.#list, this.#problem);
    say(this.#problem, 'Asking which voices there are.');
    new IntersectionObserver(([entry]) => this.#watch(entry.isIntersecting)).observe(
      box.parentElement,
    );
    document.addEventListener('visibilitychange', () => this.#watch(this.#seen));
  }

  /** Which voice speaks, or is on its way. */
  render({ phase, voice }) {
    const speaking = phase === 'live' || phase === 'reconnecting' ? voice : NO_VOICE;
    if (speaking === this.#voice) return;
    this.#voice = speaking;
    this.#show();
  }

  async refresh() {
    const answer = await this.#ask('/v1/models');
    if (answer.models) this.#models = answer.models;
    this.#workers = answer.workers ?? this.#workers;
    say(
      this.#problem,
      answer.problem ?? (this.#models.length ? '' : 'No worker has announced itself yet.'),
    );
    this.#show();
  }

  /** Polls only while somebody could see it. */
  #watch(seen) {
    this.#seen = seen;
    clearTimeout(this.#timer);
    if (seen && document.visibilityState === 'visible') void this.#poll();
  }

  async #poll() {
    await this.refresh();
    clearTimeout(this.#timer);
    if (this.#seen && document.visibilityState === 'visible') {
      this.#timer = setTimeout(() => void this.#poll(), POLL_MS);
    }
  }

  /** The answer's JSON, or {problem: a sentence}. */
  async #ask(path, method = 'GET') {
    const key = this.#hooks.apiKey();
    const headers = key ? { Authorization: `Bearer ${key}` } : {};
    try {
      const response = await fetch(path, { method, headers, cache: 'no-store' });
      const body = await response.json();
      if (response.status === 401) this.#hooks.onUnauthorized();
      return response.ok ? body : { problem: body.error?.message ?? `HTTP ${response.status}` };
    } catch {
      return { problem: 'The server does not answer.' };
    }
  }

  async #change(id, verb) {
    this.#notes.set(id, verb === 'load' ? 'loading …' : 'unloading …');
    this.#show();
    const { problem } = await this.#ask(`/v1/models/${encodeURIComponent(id)}/${verb}`, 'POST');
    if (problem) this.#notes.set(id, problem);
    else this.#notes.delete(id);
    await this.refresh();
  }

  #show() {
    for (const [id, row] of this.#rows) {
      if (this.#models.some((model) => model.id === id)) continue;
      row.element.remove();
      this.#rows.delete(id);
    }
    for (const model of this.#models) this.#row(model).update(model, this.#facts(model));
    this.#memory.replaceChildren(
      ...this.#workers.map((worker) => workerNode(worker, this.#models)),
    );
  }

  #row(model) {
    const known = this.#rows.get(model.id);
    if (known) return known;
    const row = new ModelRow(model.id, {
      use: () => this.#hooks.onUse(model.id),
      load: () => void this.#change(model.id, 'load'),
      unload: () => void this.#change(model.id, 'unload'),
    });
    this.#rows.set(model.id, row);
    this.#list.append(row.element);
    return row;
  }

  #facts({ id }) {
    const { model, state, message } = this.#voice;
    const wanted = state === 'loading' && message === id;
    return { current: id === model, wanted, note: this.#notes.get(id) ?? '' };
  }
}

/** One worker: its memory, as far as its resident models fill it, and its sessions. */
function workerNode({ name, vram_gb: room = 0, sessions = 0, max_sessions: most = 0 }, models) {
  const resident = models.filter((model) => model.workers?.[name] === 'resident');
  const used = resident.reduce((sum, model) => sum + vramOf(model), 0);
  const bar = el('span', { class: 'gauge', 'aria-hidden': 'true' }, el('i'));
  bar.firstElementChild.style.width = room ? `${Math.min(100, (100 * used) / room)}%` : '0';
  const facts = [
    name,
    room ? `${used.toFixed(1)} of ${room.toFixed(0)} GB` : 'no GPU',
    `${count(resident.length, 'model')} in memory`,
    most ? `${sessions} of ${count(most, 'session')}` : count(sessions, 'session'),
  ];
  return el('li', {}, room ? bar : null, el('span', {}, facts.join(' · ')));
}
