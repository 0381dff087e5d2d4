/** Wires the session to the state, and the state to its views. */

import { BargeIns } from './barge-ins.js';
import { Captions } from './captions.js';
import { Composer } from './composer.js';
import { Controls } from './controls.js';
import { $, say } from './dom.js';
import { LatencyStrip } from './latency.js';
import { EventLog } from './log.js';
import { HEADPHONES, TroublePanels } from './panels.js';
import { needsHeadphones, stateName } from './readings.js';
import { VoiceSession, available } from './session.js';
import { Shelf } from './shelf.js';
import { initial, reduce } from './state.js';
import { wireTheme } from './theme-button.js';
import { Timeline, describe, windowMs } from './timeline.js';
import { trouble } from './troubles.js';

const KEY = 'duplex.key';
const FRAME_MS = 15;
const STILL_FRAME_MS = 500;
const SLOW_MS = 1000;
const still = matchMedia('(prefers-reduced-motion: reduce)');

let state = initial;
let wish = { model: '', voice: '' };
let drawnAt = -Infinity;
let slowAt = -Infinity;
let stale = true;

const session = new VoiceSession();
const apiKey = () => sessionStorage.getItem(KEY) ?? '';

// --- what happens ---

function happened(event, at = performance.now()) {
  state = reduce(state, { event, at });
  stale = true;
}

function local(type, detail) {
  const event = { type: `client.${type}`, ...detail };
  log.add(event, performance.now());
  happened(event);
}

for (const type of ['status', 'silence', 'trouble']) {
  session.addEventListener(type, ({ detail }) => local(type, detail));
}
session.addEventListener('event', ({ detail: { event, at } }) => {
  log.add(event, at);
  happened(event, at);
});
session.addEventListener('played', ({ detail: { at, ...played } }) => {
  happened({ type: 'client.played', ...played }, at);
});
session.addEventListener('level', ({ detail }) => {
  controls.level(detail);
  timeline.levels.push(performance.now(), controls.muted ? -100 : detail.mic, detail.agent);
});

// --- what one can do ---

function start(more = {}) {
  timeline.levels.clear();
  void session.start({
    ...controls.wishes,
    apiKey: apiKey(),
    mode: 'default',
    language: '',
    ...wish,
    ...more,
  });
}

function use(model) {
  wish = { model, voice: '' };
  if (state.phase === 'live') {
    local('wanted', wish);
    session.switchModel(model, '');
  } else start();
}

function inject(sound) {
  local('injected', { sound });
  void session.inject(sound);
}

function useKey(key) {
  const waiting = state.troubles.some(({ code, fatal }) => code === 'unauthorized' && fatal);
  sessionStorage.setItem(KEY, key);
  local('dismiss', { code: 'unauthorized' });
  void look();
  if (waiting) start();
}

function unauthorized() {
  if (state.troubles.some(({ code }) => code === 'unauthorized')) return;
  local(
    'trouble',
    trouble('unauthorized', { fatal: false, text: apiKey() ? 'The key was refused.' : undefined }),
  );
}

async function look() {
  await shelf.refresh();
  controls.offer(await available(apiKey()));
}

// --- the views ---

const log = new EventLog({
  details: $('#log'),
  lines: $('#log-lines'),
  count: $('#log-count'),
  note: $('#log-note'),
  copy: $('#log-copy'),
  clear: $('#log-clear'),
});
const timeline = new Timeline($('#canvas'), $('#legend'));
const captions = new Captions($('#captions'), $('#spoken'));
const latency = new LatencyStrip($('#latency'));
const bargeIns = new BargeIns($('#barge-ins'));
const controls = new Controls({
  start,
  stop: () => void session.stop(),
  setMuted: (muted) => {
    session.setMuted(muted);
    stale = true;
  },
  setMic: (id) => void session.setMic(id),
  setSpeaker: (id) => void session.setSpeaker(id),
});
const composer = new Composer({ sendText: (text, speak) => session.sendText(text, speak), inject });
const shelf = new Shelf($('#shelf'), { apiKey, onUse: use, onUnauthorized: unauthorized });
const panels = new TroublePanels($('#troubles'), {
  retry: () => start(),
  withoutMicrophone: () => start({ mic: false }),
  useWebSocket: () => {
    controls.useWebSocket();
    start();
  },
  soundOn: () => {
    void session.resume();
    local('dismiss', { code: 'autoplay' });
  },
  useKey,
  dismiss: (code) => local('dismiss', { code }),
});

function render(now) {
  controls.render(state, stateName(state, now));
  composer.render(state);
  captions.render(state.turns);
  latency.render(state);
  bargeIns.render(state);
  shelf.render(state);
  panels.render(needsHeadphones(state) ? [...state.troubles, HEADPHONES] : state.troubles);
  log.render();
}

/** What changes by itself: an answer that does not come, and the picture's description. */
function renderSlowly(now) {
  stale = true;
  say($('#timeline-text'), describe(state, now, windowMs($('#canvas').clientWidth)));
}

function frame(now) {
  const live = state.phase === 'live' || state.phase === 'reconnecting';
  if (live && now - slowAt >= SLOW_MS) {
    slowAt = now;
    renderSlowly(now);
  }
  const due = now - drawnAt >= (still.matches ? STILL_FRAME_MS : FRAME_MS);
  if ((live || stale) && due) {
    drawnAt = now;
    timeline.draw(state, live ? now : (lastMoment() ?? now));
  }
  if (stale) {
    stale = false;
    render(now);
  }
  requestAnimationFrame(frame);
}

/** After the end the picture stands still where it ended. */
function lastMoment() {
  const last = state.spans.at(-1);
  return last ? Math.max(...state.spans.map((span) => span.to ?? span.from)) + 500 : null;
}

function redraw() {
  timeline.refreshColours();
  drawnAt = -Infinity;
  stale = true;
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
  const writing = event.target.matches(
    'textarea, select, input:not([type=radio], [type=checkbox])',
  );
  if (event.key === 'Escape') {
    if (!$('#help').matches(':popover-open') && state.mode === 'speaking') inject('stop');
  } else if (writing) return;
  else if (event.key.toLowerCase() === 'm') controls.mute(!controls.muted);
  else if (event.key === '/') {
    event.preventDefault();
    $('#text').focus();
  }
}

document.addEventListener('keydown', onKey);
new ResizeObserver(redraw).observe($('#canvas'));
wireTheme($('#theme'), redraw);
requestAnimationFrame(frame);
void look();
