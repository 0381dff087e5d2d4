/** Everything the page knows, as one pure function of what has happened.

   reduce(state, {event, at}) returns a new state and never changes the old one; parts that did not
   change keep their identity, so that a view may compare with ===. `at` is performance.now() in ms.
   `event` is an event of the server (docs/protocol.md) or one of the page's own:

   client.status   {phase, reason}              idle, connecting, live, reconnecting, ended
   client.played   {utterance_id, seq}          the last frame that has left the speaker
   client.silence  {onset_to_silence_ms}        measured in the page
   client.trouble  {code, title, text, hint, fatal}     client.dismiss {code}
   client.injected {sound}                      one of the test sounds went into the microphone
   client.wanted   {model, voice}               a voice was asked for; the server has not said more
*/

export const TURNS_KEPT = 100;
export const BARGE_INS_KEPT = 50;
const TROUBLES_KEPT = 3;
export const TIMELINE_KEPT_MS = 60_000;
const TIMELINE_KEPT = 400;
const FRAME_MS = 20;
// A flush is obeyed within some tens of ms, and its message may overtake the barge-in's.
const SAME_MOMENT_MS = 1_000;
// How long after a test sound a barge-in is still that sound's doing.
const SOUND_MS = 1_500;
const ECHO_WINDOW_MS = 60_000;

export const initial = deepFreeze({
  phase: 'idle',
  reason: '',
  mode: 'listening',
  talking: false,
  thinkingSince: null,
  session: null,
  voice: { model: '', voice: '', state: '', message: '' },
  turns: [],
  bargeIns: [],
  spans: [],
  marks: [],
  heard: null,
  silence: null,
  troubles: [],
  injectedAt: -Infinity,
  echoes: [],
  startedAt: null,
});

const HANDLERS = {
  'session.started': onStarted,
  'session.ended': (state, event, at) => ({ ...settled(state, at), reason: event.reason }),
  state: onState,
  speech: onSpeech,
  transcript: onTranscript,
  'reply.text': onReplyText,
  'audio.begin': onAudioBegin,
  'audio.end': onAudioEnd,
  flush: onFlush,
  barge_in: onBargeIn,
  heard: onHeard,
  latency: (state, event) =>
    withTurn(state, event.turn_id, (turn) => ({ ...turn, latency: event })),
  model: (state, event) => ({
    ...state,
    voice: {
      model: event.state === 'failed' ? state.voice.model : event.model,
      voice: event.state === 'failed' ? state.voice.voice : event.voice,
      state: event.state,
      message: event.message,
    },
  }),
  // The session turns it into a trouble with words.
  error: (state) => ({ ...state, thinkingSince: null }),
  'client.status': onStatus,
  'client.played': onPlayed,
  'client.silence': onSilence,
  'client.trouble': (state, event) => withTrouble(state, event),
  'client.dismiss': (state, event) => ({
    ...state,
    echoes: event.code === 'headphones' ? [] : state.echoes,
    troubles: state.troubles.filter((trouble) => trouble.code !== event.code),
  }),
  'client.injected': (state, _event, at) => ({ ...state, injectedAt: at }),
  'client.wanted': (state, event) => ({
    ...state,
    voice: { ...state.voice, state: 'loading', message: event.model },
  }),
};

export function reduce(state, { event, at }) {
  const handler = HANDLERS[event.type];
  return handler ? handler(state, event, at) : state;
}

// --- the conversation ---

function onState(state, event, at) {
  const next = { ...state, mode: event.state };
  if (event.state !== 'listening') return { ...next, thinkingSince: null };
  return { ...next, spans: closed(state.spans, isOpen('agent'), at) };
}

function onTranscript(state, event, at) {
  if (!event.text) return state;
  const you = { text: event.text, final: event.final, stable: event.stable_chars ?? 0 };
  const next = withTurn(state, event.turn_id, (turn) => ({
    ...turn,
    you,
    replies: event.final || state.mode !== 'listening' ? turn.replies : spoken(turn),
  }));
  if (!event.final) return next;
  return withEcho(
    { ...next, thinkingSince: state.mode === 'listening' ? at : null },
    event.text,
    at,
  );
}

function onReplyText(state, event) {
  return withReply(state, event.turn_id, event.utterance_id, (reply) =>
    reply.over ? reply : { ...reply, text: reply.text + event.text, written: Boolean(event.final) },
  );
}

function onHeard(state, event, at) {
  const next = withReply(state, event.turn_id, event.utterance_id, (reply) => ({
    ...reply,
    over: true,
    heard: event.heard,
    cut: event.cut ?? '',
    completed: event.completed,
    estimated: event.estimated ?? true,
  }));
  return {
    ...next,
    thinkingSince: null,
    spans: closed(state.spans, isOpen('agent', event.utterance_id), at),
  };
}

/** An answer that was begun too early is taken back without a word: nobody heard of it. */
const spoken = ({ replies }) => replies.filter((reply) => reply.over);

function withReply(state, turnId, utteranceId, change) {
  return withTurn(state, turnId, (turn) => {
    const known = turn.replies.some((reply) => reply.id === utteranceId);
    const fresh = { id: utteranceId, text: '', written: false, over: false, heard: '', cut: '' };
    const replies = known ? turn.replies : [...spoken(turn), fresh];
    return {
      ...turn,
      replies: replies.map((reply) => (reply.id === utteranceId ? change(reply) : reply)),
    };
  });
}

function withTurn(state, id, change) {
  const known = state.turns.findLastIndex((turn) => turn.id === id);
  const fresh = { id, you: null, replies: [], latency: null, heardLagMs: null };
  if (known < 0) return { ...state, turns: [...state.turns, change(fresh)].slice(-TURNS_KEPT) };
  return { ...state, turns: state.turns.with(known, change(state.turns[known])) };
}

// --- voices on the timeline ---

function onSpeech(state, event, at) {
  const open = isOpen('you');
  switch (event.phase) {
    case 'edge': {
      const span = { lane: 'you', kind: 'edge', from: at, to: null };
      const spans = [...closed(state.spans, open, at), span];
      return { ...state, talking: true, thinkingSince: null, spans: recent(spans, at) };
    }
    case 'confirmed':
      return { ...state, spans: changed(state.spans, open, { kind: 'confirmed' }) };
    case 'rejected':
      return {
        ...state,
        talking: false,
        spans: changed(state.spans, open, { kind: 'rejected', to: at }),
      };
    default: {
      const waiting = state.mode === 'listening' && state.turns.at(-1)?.you?.final === false;
      return {
        ...state,
        talking: false,
        thinkingSince: waiting ? at : state.thinkingSince,
        spans: closed(state.spans, open, at),
      };
    }
  }
}

function onAudioBegin(state, event, at) {
  const span = {
    lane: 'agent',
    kind: event.resumed ? 'resumed' : 'speech',
    id: event.utterance_id,
    from: at,
    to: null,
    frames: null,
    heardAt: null,
  };
  const spans = [...closed(state.spans, isOpen('agent'), at), span];
  return { ...state, spans: recent(spans, at) };
}

function onAudioEnd(state, event, at) {
  const open = isOpen('agent', event.utterance_id);
  const spans = changed(state.spans, open, { frames: event.frames });
  return { ...state, spans: finished(spans, state.heard, at) };
}

function onFlush(state, event, at) {
  return {
    ...state,
    spans: changed(state.spans, isOpen('agent', event.utterance_id), { to: at, flushed: true }),
    marks: recent([...state.marks, { kind: 'flush', at }], at),
  };
}

function onPlayed(state, { utterance_id: id, seq }, at) {
  if (seq < 0) return state;
  const heard = { utterance_id: id, seq, at };
  const mine = (span) => span.lane === 'agent' && span.id === id;
  const current = state.spans.findLast(mine);
  if (!current) return { ...state, heard };
  const spans =
    current.to === null ? changed(state.spans, isOpen('agent', id), { heardAt: at }) : state.spans;
  const next = { ...state, heard, spans: finished(spans, heard, at) };
  return current.kind === 'speech' ? withHeardLag(next, current, heard) : next;
}

/** The first frame was heard (seq + 1) frames before the last one ended. */
function withHeardLag(state, span, { utterance_id: id, seq, at }) {
  const turn = state.turns.findLast((known) => known.replies.some((reply) => reply.id === id));
  if (!turn || turn.heardLagMs !== null || turn.replies[0].id !== id) return state;
  const heardLagMs = Math.max(0, Math.round(at - (seq + 1) * FRAME_MS - span.from));
  return withTurn(state, turn.id, (known) => ({ ...known, heardLagMs }));
}

function finished(spans, heard, at) {
  const played = (span) =>
    isOpen('agent', heard?.utterance_id)(span) &&
    span.frames !== null &&
    heard.seq >= span.frames - 1;
  return heard ? closed(spans, played, at) : spans;
}

const isOpen = (lane, id) => (span) =>
  span.to === null && span.lane === lane && (id === undefined || span.id === id);

function changed(spans, which, change) {
  return spans.some(which)
    ? spans.map((span) => (which(span) ? { ...span, ...change } : span))
    : spans;
}

const closed = (spans, which, at) => changed(spans, which, { to: at });

function recent(things, at) {
  const since = at - TIMELINE_KEPT_MS;
  return things.filter((thing) => (thing.to ?? thing.at ?? at) >= since).slice(-TIMELINE_KEPT);
}

// --- barge-ins ---

function onBargeIn(state, event, at) {
  const { verdict, reason = '', utterance_id: id } = event;
  const last = state.bargeIns.at(-1);
  const open = last?.verdict === 'pending' ? last : null;
  if (verdict === 'pending' && open?.id === id) return state;
  const kind = { pending: 'pause', real: 'stop', false: 'resume' }[verdict];
  const marks = recent([...state.marks, { kind, at }], at);
  const change = { verdict, reason, verdictMs: open ? Math.round(at - open.at) : null };
  const barge = open && verdict !== 'pending' ? { ...open, ...change } : opened(state, event, at);
  const others = open && verdict !== 'pending' ? state.bargeIns.slice(0, -1) : state.bargeIns;
  const bargeIns = [...others, barge].slice(-BARGE_INS_KEPT);
  const next = { ...state, marks, bargeIns, silence: null };
  const phantom = verdict === 'false' && reason !== 'back_channel' && !barge.injected;
  return phantom ? { ...next, echoes: [...echoesOf(state, at), at] } : next;
}

function opened(state, event, at) {
  const silence = state.silence && at - state.silence.at < SAME_MOMENT_MS ? state.silence.ms : null;
  return {
    id: event.utterance_id,
    at,
    verdict: event.verdict,
    reason: event.reason ?? '',
    verdictMs: null,
    silenceMs: silence,
    injected: at - state.injectedAt < SOUND_MS,
  };
}

function onSilence(state, event, at) {
  const ms = event.onset_to_silence_ms;
  const last = state.bargeIns.at(-1);
  if (!last || last.silenceMs !== null || at - last.at > SAME_MOMENT_MS)
    return { ...state, silence: { ms, at } };
  return { ...state, bargeIns: state.bargeIns.with(-1, { ...last, silenceMs: ms }) };
}

/** The user's words are the agent's own, and they followed a barge-in: the microphone heard it. */
function withEcho(state, text, at) {
  const barge = state.bargeIns.at(-1);
  if (barge?.verdict !== 'real' || barge.injected || at - barge.at > 10_000) return state;
  const reply = state.turns.flatMap((turn) => turn.replies).find(({ id }) => id === barge.id);
  const own = new Set(words(reply?.text ?? ''));
  const said = words(text);
  const same = said.filter((word) => own.has(word)).length;
  if (said.length < 3 || same / said.length < 0.8) return state;
  return { ...state, echoes: [...echoesOf(state, at), at] };
}

const words = (text) => text.toLowerCase().match(/[\p{L}\p{N}']+/gu) ?? [];
const echoesOf = (state, at) => state.echoes.filter((then) => at - then < ECHO_WINDOW_MS);

// --- the session and its troubles ---

function onStatus(state, { phase, reason = '' }, at) {
  switch (phase) {
    case 'connecting':
      return { ...initial, injectedAt: state.injectedAt, phase, startedAt: at };
    case 'live':
      return { ...state, phase, reason: '', troubles: state.troubles.filter((t) => !t.fatal) };
    case 'reconnecting':
      return { ...state, phase, reason };
    default:
      return { ...settled(state, at), phase, reason: reason || state.reason };
  }
}

/** A connection that was lost and begun anew counts its turns and utterances from one again. */
function onStarted(state, event, at) {
  const past = (thing) => ({ ...thing, id: `${state.session?.session_id}/${thing.id}` });
  const turns = state.turns.map((turn) => ({ ...past(turn), replies: turn.replies.map(past) }));
  return {
    ...settled(state, at),
    turns,
    heard: null,
    session: event,
    voice: { model: event.model, voice: event.voice, state: 'ready', message: '' },
  };
}

/** Nobody talks any more. */
function settled(state, at) {
  const spans = closed(state.spans, (span) => span.to === null, at);
  return { ...state, mode: 'listening', talking: false, thinkingSince: null, spans };
}

function withTrouble(state, { code, title, text, hint, fatal = false }) {
  const others = state.troubles.filter((known) => known.code !== code);
  return {
    ...state,
    troubles: [...others, { code, title, text, hint, fatal }].slice(-TROUBLES_KEPT),
  };
}

function deepFreeze(value) {
  Object.values(value).forEach((part) => {
    if (part && typeof part === 'object') deepFreeze(part);
  });
  return Object.freeze(value);
}
