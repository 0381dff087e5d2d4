/** Two lanes, the newest at the right: who was heard, and what the detector made of it. */

import { seconds, count } from './words.js';
import { tally } from './barge-ins.js';

const LEVELS_KEPT = 1500;
const QUIET_DBFS = -60;
const LOUD_DBFS = -8;
const LANES = { you: 0.27, agent: 0.73 };
const LABELS_PX = 38;
const FONT = '11px system-ui, sans-serif';
const KEYS = ['edge', 'voice', 'noise', 'agent', 'pause'];

/** How much of the past is shown, in ms: a phone has room for less. */
export const windowMs = (widthPx) => (widthPx < 560 ? 12_000 : 24_000);

/** The newest 60 s of both levels, in a ring. */
class Levels {
  #at = new Float64Array(LEVELS_KEPT).fill(-Infinity);
  #you = new Float32Array(LEVELS_KEPT);
  #agent = new Float32Array(LEVELS_KEPT);
  #next = 0;

  push(at, mic, agent) {
    this.#at[this.#next] = at;
    this.#you[this.#next] = mic;
    this.#agent[this.#next] = agent;
    this.#next = (this.#next + 1) % LEVELS_KEPT;
  }

  /** Calls back with (at, mic, agent), oldest first. */
  since(from, visit) {
    for (let i = 0; i < LEVELS_KEPT; i += 1) {
      const k = (this.#next + i) % LEVELS_KEPT;
      if (this.#at[k] >= from) visit(this.#at[k], this.#you[k], this.#agent[k]);
    }
  }

  clear() {
    this.#at.fill(-Infinity);
  }
}

export class Timeline {
  levels = new Levels();
  /** Pictures drawn so far. */
  drawn = 0;
  #canvas;
  #pen;
  #colours = {};
  #keys;

  /** The legend's swatches carry the colours, so that picture and legend never disagree. */
  constructor(canvas, legend) {
    this.#canvas = canvas;
    this.#pen = canvas.getContext('2d');
    this.#keys = new Map(KEYS.map((name) => [name, legend.querySelector(`.${name}`)]));
    this.refreshColours();
  }

  /** After a change of theme. */
  refreshColours() {
    for (const [name, key] of this.#keys) this.#colours[name] = getComputedStyle(key).color;
    this.#colours.ink = getComputedStyle(this.#canvas).color;
  }

  draw(state, now) {
    const { clientWidth: width, clientHeight: height } = this.#canvas;
    if (!width) return;
    this.#fit(width, height);
    this.drawn += 1;
    const span = windowMs(width);
    const view = {
      width,
      height,
      from: now - span,
      now,
      x: (at) => ((at - (now - span)) / span) * (width - 14),
      y: (lane) => Math.round(height * LANES[lane]),
      half: Math.round(height * 0.17),
    };
    this.#pen.clearRect(0, 0, width, height);
    if (state.startedAt !== null) this.#grid(view, state.startedAt);
    this.#lanes(view);
    this.#spans(view, state.spans);
    this.#waves(view, state.spans);
    this.#cursors(view, state.spans);
    this.#marks(view, state.marks);
  }

  #fit(width, height) {
    const scale = devicePixelRatio || 1;
    const [wide, high] = [Math.round(width * scale), Math.round(height * scale)];
    if (this.#canvas.width !== wide || this.#canvas.height !== high) {
      this.#canvas.width = wide;
      this.#canvas.height = high;
    }
    this.#pen.setTransform(scale, 0, 0, scale, 0, 0);
  }

  #grid({ width, height, from, now, x }, startedAt) {
    const pen = this.#pen;
    pen.font = FONT;
    pen.fillStyle = pen.strokeStyle = this.#colours.ink;
    pen.lineWidth = 1;
    const first = Math.ceil(Math.max(0, from - startedAt) / 5000) * 5000;
    for (let t = first; startedAt + t <= now; t += 5000) {
      const at = Math.round(x(startedAt + t)) + 0.5;
      pen.globalAlpha = 0.12;
      stroke(pen, [
        [at, 0],
        [at, height - 14],
      ]);
      pen.globalAlpha = 0.75;
      if (at > 4 && at < width - 34) pen.fillText(clock(t), at - 0.5, height - 3);
    }
    pen.globalAlpha = 1;
  }

  #lanes({ width, y, half }) {
    const pen = this.#pen;
    pen.font = FONT;
    pen.lineWidth = 1;
    pen.fillStyle = pen.strokeStyle = this.#colours.ink;
    for (const lane of Object.keys(LANES)) {
      pen.fillText(lane, 0, y(lane) - half - 4);
      pen.globalAlpha = 0.25;
      stroke(pen, [
        [0, y(lane) + 0.5],
        [width, y(lane) + 0.5],
      ]);
      pen.globalAlpha = 1;
    }
  }

  #spans(view, spans) {
    const pen = this.#pen;
    const { x, y, now, half } = view;
    for (const span of spans) {
      const [left, right] = [x(span.from), x(span.to ?? now)];
      if (right < 0) continue;
      const box = [left, y(span.lane) - half, Math.max(2, right - left), 2 * half];
      const { colour, fill, dash } = this.#look(span);
      pen.globalAlpha = fill;
      pen.fillStyle = pen.strokeStyle = colour;
      rounded(pen, box, 4);
      pen.fill();
      pen.globalAlpha = 0.9;
      pen.setLineDash(dash);
      if (dash.length) pen.stroke();
      pen.setLineDash([]);
    }
    pen.globalAlpha = 1;
  }

  #look({ lane, kind }) {
    if (lane === 'agent') return { colour: this.#colours.agent, fill: 0.2, dash: [] };
    if (kind === 'confirmed') return { colour: this.#colours.voice, fill: 0.2, dash: [] };
    if (kind === 'edge') return { colour: this.#colours.edge, fill: 0, dash: [3, 3] };
    return { colour: this.#colours.noise, fill: 0, dash: [1.5, 3] };
  }

  #waves({ from, x, y, half }, spans) {
    const pen = this.#pen;
    const voiced = spans.filter((span) => span.lane === 'you');
    const room = half - 3;
    this.levels.since(from, (at, mic, agent) => {
      const span = voiced.findLast(
        (known) => known.from - 120 <= at && at <= (known.to ?? Infinity),
      );
      const colour = { confirmed: 'voice', edge: 'edge', rejected: 'noise' }[span?.kind];
      bar(pen, x(at), y('you'), tall(mic) * room, this.#colours[colour] ?? this.#colours.noise);
      bar(pen, x(at), y('agent'), tall(agent) * room, this.#colours.agent);
    });
  }

  /** Where the ear was last: moving while it plays, left behind where it was cut. */
  #cursors({ x, y, half }, spans) {
    const pen = this.#pen;
    pen.fillStyle = this.#colours.agent;
    for (const span of spans) {
      if (span.lane !== 'agent' || span.heardAt === null) continue;
      const at = x(Math.min(span.heardAt, span.to ?? Infinity));
      const low = y('agent') + half;
      pen.fillRect(at - 0.75, low - 2 * half, 1.5, 2 * half);
      shape(pen, [
        [at - 5, low + 7],
        [at + 5, low + 7],
        [at, low],
      ]);
    }
  }

  #marks({ x, y, half }, marks) {
    const pen = this.#pen;
    const middle = (y('you') + y('agent')) / 2;
    pen.fillStyle = pen.strokeStyle = this.#colours.pause;
    for (const { kind, at } of marks) {
      const left = x(at);
      if (left < LABELS_PX) continue;
      if (kind === 'flush') {
        pen.lineWidth = 1.5;
        stroke(pen, [
          [left, y('agent') - half - 3],
          [left, y('agent') + half],
        ]);
      } else glyph(pen, kind, left, middle);
    }
  }
}

function glyph(pen, kind, x, y) {
  if (kind === 'pause') {
    pen.fillRect(x - 4, y - 5, 3, 10);
    pen.fillRect(x + 1, y - 5, 3, 10);
  } else if (kind === 'stop') pen.fillRect(x - 4.5, y - 4.5, 9, 9);
  else
    shape(pen, [
      [x - 4, y - 5.5],
      [x + 5.5, y],
      [x - 4, y + 5.5],
    ]);
}

const tall = (dbfs) => Math.min(1, Math.max(0, (dbfs - QUIET_DBFS) / (LOUD_DBFS - QUIET_DBFS)));

function bar(pen, x, y, height, colour) {
  if (height < 0.5) return;
  pen.fillStyle = colour;
  pen.fillRect(x - 0.75, y - height, 1.5, 2 * height);
}

function stroke(pen, points) {
  pen.beginPath();
  points.forEach(([x, y], i) => (i ? pen.lineTo(x, y) : pen.moveTo(x, y)));
  pen.stroke();
}

function shape(pen, points) {
  pen.beginPath();
  points.forEach(([x, y], i) => (i ? pen.lineTo(x, y) : pen.moveTo(x, y)));
  pen.fill();
}

function rounded(pen, [x, y, width, height], radius) {
  pen.beginPath();
  pen.roundRect(x, y, width, height, Math.min(radius, width / 2));
}

function clock(t_ms) {
  const s = Math.round(t_ms / 1000);
  return `${Math.floor(s / 60)}:${String(s % 60).padStart(2, '0')}`;
}

/** The picture in words, over the same stretch of time. */
export function describe(state, now, span_ms) {
  const spans = state.spans.filter((span) => (span.to ?? now) > now - span_ms);
  const of = (wanted) => {
    const found = spans.filter(wanted);
    const time = found.reduce((sum, s) => sum + (s.to ?? now) - Math.max(s.from, now - span_ms), 0);
    return found.length ? `${count(found.length, 'time')} (${seconds(time)})` : 'not at all';
  };
  if (!spans.length) return 'Nobody has spoken lately.';
  const you = of((span) => span.lane === 'you' && span.kind !== 'rejected');
  const agent = of((span) => span.lane === 'agent');
  const barges = tally(state.bargeIns.filter((barge) => barge.at > now - span_ms));
  const lately = `In the last ${Math.round(span_ms / 1000)} seconds`;
  return `${lately} you spoke ${you} and the agent ${agent}.${barges ? ` ${barges}.` : ''}`;
}
