/** What the page calls things. */

export const STATES = {
  idle: ['Ready', 'Press start and say something.'],
  connecting: ['Connecting', 'One moment.'],
  reconnecting: ['Reconnecting', 'The line dropped; the conversation is kept.'],
  ended: ['Ended', 'Press start to talk again.'],
  listening: ['Listening', 'You have the floor.'],
  hearing: ['Listening', 'It hears you.'],
  thinking: ['Thinking', 'Looking for an answer.'],
  speaking: ['Speaking', 'Talk over it whenever you like.'],
  barged_in: ['Interrupted', 'You have the floor.'],
};

export const ENDED = {
  stopped: 'You hung up. Press start to talk again.',
  ended: 'The other side hung up. Press start to talk again.',
  draining: 'The server is going down.',
  lost: 'The line was lost. Press start to try again.',
};

export const STAGES = {
  endpoint: 'end of turn called',
  transcript: 'transcript',
  first_token: 'first token',
  first_clause: 'first clause',
  first_audio: 'first audio',
  heard: 'heard',
};

export const VERDICTS = { pending: 'Paused', real: 'Stopped', false: 'Went on' };

const REASONS = {
  stop_word: 'you told it to stop',
  words: 'you said something',
  sustained: 'you kept talking',
  typed: 'you wrote instead',
  not_speech: 'that was no voice',
  back_channel: 'you were only agreeing',
  no_words: 'a voice, but no words',
  short: 'too short to be meant',
};

/** Why it did so. */
export function reasonOf({ verdict, reason }) {
  if (verdict === 'pending') return 'do you mean it?';
  return REASONS[reason] ?? reason.replaceAll('_', ' ');
}

export const ms = (number) => (number === null ? '–' : `${Math.round(number)} ms`);
export const seconds = (number) => `${(number / 1000).toFixed(1)} s`;

/** '40 s', '5 min', '2 h': for a time that nobody counts along. */
export function roughly(duration_ms) {
  const s = Math.round(duration_ms / 1000);
  if (s < 90) return `${s} s`;
  return s < 5400 ? `${Math.round(s / 60)} min` : `${Math.round(s / 3600)} h`;
}

export const count = (n, one, many = `${one}s`) => `${n} ${n === 1 ? one : many}`;
