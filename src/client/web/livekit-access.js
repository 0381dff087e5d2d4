/** What a page needs before it can enter a room: the library, a server that has rooms, a token. */

import { StartFailed, fromServer, trouble } from './troubles.js';

const CLIENT = './vendor/livekit-client.esm.mjs';
const TOKEN = '/v1/livekit/token';
const TRANSPORTS = '/v1/transports';

/** livekit-client, which `just web-deps` fetches. Rejects with StartFailed. */
export async function loadClient() {
  try {
    const client = await import(CLIENT);
    client.setLogLevel('warn');
    return client;
  } catch {
    await ask(TRANSPORTS, '');
    throw new StartFailed(trouble('livekit_missing'));
  }
}

/**
 * Where to call, and with what: `server_url` and `participant_token`. Rejects with StartFailed.
 * @param {import('./transport-ws.js').Wishes} wishes
 * @returns {Promise<{server_url: string, participant_token: string}>}
 */
export async function askForToken({ apiKey, mode, model, voice, language }) {
  const query = new URLSearchParams({ events: '1' });
  for (const [name, value] of Object.entries({ mode, model, voice, language })) {
    if (value) query.set(name, value);
  }
  const answer = await ask(`${TOKEN}?${query}`, apiKey);
  const body = await answer.json();
  if (answer.ok) return body;
  const { error } = body;
  if (answer.status === 404) throw new StartFailed(trouble('livekit_off', { text: error.message }));
  if (answer.status === 503) {
    const more = { text: error.message, retryAfterMs: error.retry_after_ms };
    throw new StartFailed(trouble('livekit_unreachable', more));
  }
  throw new StartFailed(fromServer(error, true));
}

/** @param {string} path @param {string} apiKey @returns {Promise<Response>} */
async function ask(path, apiKey) {
  const headers = apiKey ? { Authorization: `Bearer ${apiKey}` } : undefined;
  try {
    return await fetch(path, { headers, cache: 'no-store' });
  } catch {
    throw new StartFailed(trouble('no_server'));
  }
}

/**
 * What the server offers, and whether this page could use it.
 * @returns {Promise<{ws: boolean, livekit: boolean, why: string, key: boolean}>} `why` there is no
 *     LiveKit; `key`: an API key is asked for
 */
export async function available() {
  try {
    const [offer, client] = await Promise.all([
      fetch(TRANSPORTS, { cache: 'no-store' }),
      fetch(new URL(CLIENT, import.meta.url), { method: 'HEAD' }),
    ]);
    const found = await offer.json();
    if (!found.livekit || client.ok) return found;
    const { text, hint } = trouble('livekit_missing');
    return { ...found, livekit: false, why: `${text} ${hint}` };
  } catch {
    return { ws: true, livekit: false, why: trouble('no_server').text, key: false };
  }
}
