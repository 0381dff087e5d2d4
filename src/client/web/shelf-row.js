/** One model on the shelf. */

import { el, say, set } from './dom.js';
import { count, roughly } from './words.js';

const LOADABLE = ['cold', 'failed'];

/** GB of GPU memory; 0 for what runs on the processor. */
export const vramOf = ({ measured_vram_gb: measured = 0, estimated_vram_gb: guess = 0 }) =>
  measured || guess;

export class ModelRow {
  #chip = el('span', { class: 'chip' });
  #tags = el('span', { class: 'tags soft' });
  #meta = el('p', { class: 'meta soft' });
  #idle = el('span', { class: 'gauge', 'aria-hidden': 'true' }, el('i'));
  #idleText = el('span', { class: 'soft' });
  #note = el('p', { class: 'note', role: 'status' });
  #use;
  #load;
  #unload;

  constructor(id, act) {
    this.#use = el('button', {
      type: 'button',
      onclick: act.use,
      'aria-label': `Speak with ${id}`,
    });
    this.#load = el(
      'button',
      { type: 'button', onclick: act.load, 'aria-label': `Load ${id}` },
      'Load',
    );
    this.#unload = el(
      'button',
      { type: 'button', onclick: act.unload, 'aria-label': `Unload ${id}` },
      'Unload',
    );
    this.element = el(
      'li',
      { class: 'model', 'data-model': id },
      el('p', { class: 'name' }, el('b', {}, id), this.#chip, this.#tags),
      this.#meta,
      el('p', { class: 'hold' }, this.#idle, this.#idleText),
      el('div', { class: 'actions' }, this.#use, this.#load, this.#unload),
      this.#note,
    );
  }

  update(model, { current, wanted, note }) {
    const cold = LOADABLE.includes(model.state);
    set(this.element, 'aria-current', current ? 'true' : null);
    set(this.#chip, 'data-state', model.state);
    say(this.#chip, chipOf(model));
    say(this.#tags, tagsOf(model));
    say(this.#meta, metaOf(model));
    this.#hold(model);
    say(this.#use, wanted ? 'Coming' : current ? 'In use' : 'Use');
    this.#use.disabled = current || wanted;
    this.#load.hidden = !cold;
    this.#unload.hidden = cold;
    this.#unload.disabled = model.state === 'loading' || Boolean(model.refcount);
    say(this.#note, note || model.error || '');
  }

  #hold({ state, refcount: leases = 0, idle_ms: idle = 0, ttl_left_ms: left = -1 }) {
    const counts = state === 'resident' && !leases && left >= 0;
    this.#idle.hidden = !counts;
    if (counts)
      this.#idle.firstElementChild.style.width = `${(100 * left) / Math.max(1, left + idle)}%`;
    say(this.#idleText, holdOf(state, leases, left));
  }
}

function chipOf({ state, load_progress: progress }) {
  return state === 'loading' && progress > 0 ? `loading ${Math.round(100 * progress)} %` : state;
}

function tagsOf({ default_of: defaults = [], fallback }) {
  return [defaults.length ? 'default' : '', fallback ? 'a stand-in speaks' : '']
    .filter(Boolean)
    .join(', ');
}

function metaOf({ family, languages = [], voices = [], licence, workers = {}, ...more }) {
  const gb = vramOf(more);
  const places = Object.keys(workers).length;
  const parts = [
    family,
    languages.slice(0, 3).join(' '),
    voices.length > 1 ? count(voices.length, 'voice') : '',
    places > 1 ? count(places, 'worker') : '',
    gb ? `${gb.toFixed(1)} GB` : '',
    licence || 'licence unknown',
  ];
  return parts.filter(Boolean).join(' · ');
}

function holdOf(state, leases, left) {
  if (state !== 'resident') return '';
  if (leases) return `held by ${count(leases, 'session')}`;
  return left < 0 ? 'stays' : `idle, leaves in ${roughly(left)}`;
}
