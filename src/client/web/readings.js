/** What the views ask of the state. Pure. */

export const STAGES = [
  'endpoint',
  'transcript',
  'first_token',
  'first_clause',
  'first_audio',
  'heard',
];
// A reply that never comes is not thought about for ever.
const THINKING_MS = 15_000;
const ECHO_TIMES = 3;

/** idle, connecting, reconnecting, ended; listening, hearing, thinking, speaking or barged_in. */
export function stateName(state, now) {
  if (state.phase !== 'live') return state.phase;
  if (state.mode !== 'listening') return state.mode;
  if (state.talking) return 'hearing';
  return state.thinkingSince !== null && now - state.thinkingSince < THINKING_MS
    ? 'thinking'
    : 'listening';
}

/** Whose colour the page takes: 'you', 'agent' or '' for nobody's. */
export function floor(name) {
  if (name === 'speaking') return 'agent';
  return ['listening', 'hearing', 'barged_in'].includes(name) ? 'you' : '';
}

/** {endpoint: ms, …} of one turn, counted from the end of the user's speech; null: not known. */
export function waterfall(turn) {
  const { latency, heardLagMs } = turn;
  const figures = Object.fromEntries(
    STAGES.map((stage) => [stage, latency?.[`${stage}_ms`] ?? null]),
  );
  if (latency && heardLagMs !== null) figures.heard = latency.first_audio_ms + heardLagMs;
  return figures;
}

/** A typed turn has no end of speech: its figures count from the key, and are another kind. */
export const isTyped = ({ latency }) =>
  latency !== null && latency.endpoint_ms === 0 && latency.transcript_ms === 0;

export const timedTurns = (state) => state.turns.filter((turn) => turn.latency !== null);

/** The median of each stage over the turns of one kind. */
export function medians(state, typed) {
  const figures = timedTurns(state)
    .filter((turn) => isTyped(turn) === typed)
    .map(waterfall);
  return Object.fromEntries(
    STAGES.map((stage) => [
      stage,
      median(figures.map((f) => f[stage]).filter((ms) => ms !== null)),
    ]),
  );
}

export function median(numbers) {
  if (!numbers.length) return null;
  const sorted = [...numbers].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

/** The agent keeps stopping at what only it has said: the microphone hears its voice. */
export const needsHeadphones = (state) => state.echoes.length >= ECHO_TIMES;
