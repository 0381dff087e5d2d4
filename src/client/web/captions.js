/** What was said, as it is said: grey while it may change, struck through where nobody heard it. */

import { announce, el } from './dom.js';

const AT_THE_END_PX = 40;

export class Captions {
  #box;
  #spoken;
  /** id → {turn, node} */
  #shown = new Map();

  /** `spoken` is read out by screen readers: settled sentences only. */
  constructor(box, spoken) {
    this.#box = box;
    this.#spoken = spoken;
    this.render([]);
  }

  render(turns) {
    const { scrollTop, scrollHeight, clientHeight } = this.#box;
    const follows = scrollHeight - scrollTop - clientHeight < AT_THE_END_PX;
    if (!turns.length) this.#showEmpty();
    else if (!this.#shown.size) this.#box.replaceChildren();
    this.#forget(new Set(turns.map((turn) => turn.id)));
    for (const turn of turns) this.#update(turn);
    if (follows) this.#box.scrollTop = this.#box.scrollHeight;
  }

  #showEmpty() {
    this.#shown.clear();
    const text =
      'What you say appears here while you say it, grey as long as it may change. ' +
      'What the agent had to say and you did not hear is ';
    this.#box.replaceChildren(
      el('p', { class: 'empty' }, text, el('s', {}, 'struck through'), '.'),
    );
  }

  #forget(known) {
    for (const [id, { node }] of this.#shown) {
      if (known.has(id)) continue;
      node.remove();
      this.#shown.delete(id);
    }
  }

  #update(turn) {
    const shown = this.#shown.get(turn.id);
    if (shown?.turn === turn) return;
    const node = turnNode(turn);
    if (shown) shown.node.replaceWith(node);
    else this.#box.append(node);
    this.#shown.set(turn.id, { turn, node });
    for (const sentence of settledSince(shown?.turn, turn)) announce(this.#spoken, sentence);
  }
}

function turnNode({ you, replies }) {
  const lines = replies.filter((reply) => reply.text || reply.heard || reply.cut).map(replyNode);
  if (you)
    lines.unshift(line('you', 'You', el('span', { class: you.final ? '' : 'partial' }, you.text)));
  return el('div', { class: 'turn' }, ...lines);
}

function replyNode(reply) {
  if (!reply.over)
    return line('agent', 'Agent', el('span', { class: 'partial' }, reply.text.trim()));
  const cut = reply.cut
    ? el('s', {}, el('span', { class: 'hidden' }, 'not heard: '), reply.cut)
    : null;
  return line('agent', 'Agent', reply.heard && cut ? `${reply.heard} ` : reply.heard, cut);
}

const line = (who, name, ...parts) =>
  el('p', { class: who }, el('b', {}, name), el('span', { class: 'words' }, ...parts));

function settledSince(before, turn) {
  const sentences = [];
  if (turn.you?.final && !before?.you?.final) sentences.push(`You: ${turn.you.text}`);
  for (const reply of turn.replies) {
    if (!reply.over || before?.replies.find((known) => known.id === reply.id)?.over) continue;
    const cut = reply.cut ? ` Not heard: ${reply.cut}` : '';
    sentences.push(`Agent: ${reply.heard}${cut}`);
  }
  return sentences;
}
