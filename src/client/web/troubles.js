/**
 * Everything that can go wrong, in words for the person in front of the page.
 * @typedef {{code: string, title: string, text: string, hint: string, fatal: boolean,
 *            retry_after_ms: number | null}} Trouble
 */

/** @type {Record<string, {title: string, text: string, hint: string, fatal: boolean}>} */
const TROUBLES = {
  mic_refused: {
    title: 'The microphone is blocked',
    text: 'This page may not use the microphone, so nobody would hear you.',
    hint: 'Allow it beside the address bar and start again, or go on by typing and test sounds.',
    fatal: true,
  },
  no_microphone: {
    title: 'No microphone',
    text: 'No microphone was found on this device.',
    hint: 'Plug one in and start again, or go on by typing and test sounds.',
    fatal: true,
  },
  mic_busy: {
    title: 'The microphone does not answer',
    text: 'Another program may be using it, or the system does not give it to the browser.',
    hint: 'Close other calls, look at the system’s privacy settings, and start again.',
    fatal: true,
  },
  mic_lost: {
    title: 'The microphone was unplugged',
    text: 'The default microphone takes its place.',
    hint: 'Choose another one in the list if that is the wrong one.',
    fatal: false,
  },
  insecure_context: {
    title: 'This address is not secure',
    text: 'Browsers give sound and microphone only to pages from https or from this machine.',
    hint: 'Open the page as https://…, or on the server’s own machine as http://localhost.',
    fatal: true,
  },
  autoplay: {
    title: 'Sound is switched off',
    text: 'The browser waits for a click before this page may make a sound.',
    hint: 'Click “Turn sound on”.',
    fatal: false,
  },
  no_server: {
    title: 'The server does not answer',
    text: 'There is no connection to the voice server.',
    hint: 'Check that it runs (just up) and that this device is online, then try again.',
    fatal: true,
  },
  unauthorized: {
    title: 'The key was not accepted',
    text: 'This server asks for an API key.',
    hint: 'Enter the key that its operator gave you, and start again.',
    fatal: true,
  },
  full: {
    title: 'All places are taken',
    text: 'As many people are talking as this server can serve.',
    hint: 'Try again in a moment.',
    fatal: true,
  },
  livekit_missing: {
    title: 'The LiveKit library is missing',
    text: 'The page was installed without livekit-client; WebSocket works without it.',
    hint: 'Run “just web-deps” on the server, or choose WebSocket.',
    fatal: true,
  },
  livekit_off: {
    title: 'Rooms are switched off',
    text: 'This server takes no LiveKit calls; WebSocket works without them.',
    hint: 'Start it with --livekit, or choose WebSocket.',
    fatal: true,
  },
  livekit_unreachable: {
    title: 'The LiveKit server does not answer',
    text: 'The call could not be set up through LiveKit.',
    hint: 'Check that livekit-server runs and can be reached from here, or choose WebSocket.',
    fatal: true,
  },
  no_agent: {
    title: 'Nobody picked up',
    text: 'The room is open, but no agent came into it.',
    hint: 'Try again; if it stays so, the server’s log says why.',
    fatal: true,
  },
  lost: {
    title: 'The connection was lost',
    text: 'The conversation has ended.',
    hint: 'Start again; the agent will not remember what was said.',
    fatal: true,
  },
  restarted: {
    title: 'Connected again',
    text: 'The connection was lost and a new conversation has begun.',
    hint: 'The agent does not remember what was said before.',
    fatal: false,
  },
  slow: {
    title: 'The network cannot keep up',
    text: 'Some of what you said did not get through.',
    hint: 'Say it again; if it happens often, move closer to the router.',
    fatal: false,
  },
  server: {
    title: 'Something went wrong',
    text: 'The server reported an error.',
    hint: 'Try again; the server’s log says more.',
    fatal: true,
  },
};

/**
 * @param {string} code
 * @param {{text?: string, fatal?: boolean, retryAfterMs?: number | null}} [more] what is known
 *     beyond the code
 * @returns {Trouble}
 */
export function trouble(code, { text, fatal, retryAfterMs = null } = {}) {
  const known = TROUBLES[code];
  const wait = retryAfterMs === null ? 0 : Math.max(1, Math.ceil(retryAfterMs / 1000));
  return {
    code,
    title: known.title,
    text: text ?? known.text,
    hint: wait ? `Try again in ${wait} s.` : known.hint,
    fatal: fatal ?? known.fatal,
    retry_after_ms: retryAfterMs,
  };
}

/** Thrown while a session starts; `trouble` is what the page shows. */
export class StartFailed extends Error {
  constructor(/** @type {Trouble} */ shown) {
    super(shown.title);
    this.trouble = shown;
  }
}

/** Codes of `error` events and HTTP answers (src/rpc/errors.py) that have words of their own. */
const SERVER_CODES = new Map([
  ['unauthenticated', 'unauthorized'],
  ['exhausted', 'full'],
]);

/**
 * @param {{code: string, message: string, retry_after_ms?: number | null}} error
 * @param {boolean} fatal
 * @returns {Trouble}
 */
export function fromServer(error, fatal) {
  const code = (fatal && SERVER_CODES.get(error.code)) || 'server';
  const text = sentence(error.message);
  return trouble(code, { text, fatal, retryAfterMs: error.retry_after_ms });
}

/** What getUserMedia threw. @returns {Trouble} */
export function fromMicrophone(/** @type {unknown} */ error) {
  const name = error instanceof Error ? error.name : '';
  if (name === 'NotAllowedError' || name === 'SecurityError') return trouble('mic_refused');
  if (name === 'NotFoundError' || name === 'OverconstrainedError') return trouble('no_microphone');
  return trouble('mic_busy');
}

function sentence(/** @type {string} */ message) {
  const text = message.trim();
  if (!text) return undefined;
  return text[0].toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? '' : '.');
}
