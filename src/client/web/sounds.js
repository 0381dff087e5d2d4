/** The test sounds that anyone can say without a microphone (made by scripts/make_sounds.py). */

export const SOUNDS = ['cough', 'mm-hmm', 'stop'];

/**
 * @param {string | ArrayBuffer} sound a name of SOUNDS, or a WAV file's bytes
 * @param {BaseAudioContext} context
 * @returns {Promise<AudioBuffer>}
 */
export async function loadSound(sound, context) {
  if (typeof sound !== 'string') return context.decodeAudioData(sound.slice(0));
  if (!SOUNDS.includes(sound)) throw new RangeError(`no sound ${sound}; there are ${SOUNDS}`);
  const answer = await fetch(new URL(`./sounds/${sound}.wav`, import.meta.url));
  if (!answer.ok) throw new Error(`sounds/${sound}.wav: HTTP ${answer.status}`);
  return context.decodeAudioData(await answer.arrayBuffer());
}
