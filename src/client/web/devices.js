/** Microphones and loudspeakers: which there are, and opening one. */

import { StartFailed, fromMicrophone } from './troubles.js';

/** @typedef {{id: string, label: string}} Device */

/** True where the page may choose a loudspeaker; elsewhere hide the picker. */
export const canChooseSpeaker =
  typeof AudioContext !== 'undefined' && 'setSinkId' in AudioContext.prototype;

/**
 * Names are empty until the microphone was allowed once; then they read "Microphone 1" here.
 * @returns {Promise<{mics: Device[], speakers: Device[]}>}
 */
export async function listDevices() {
  const found = (await navigator.mediaDevices?.enumerateDevices()) ?? [];
  return {
    mics: named(found, 'audioinput', 'Microphone'),
    speakers: canChooseSpeaker ? named(found, 'audiooutput', 'Speaker') : [],
  };
}

/** @param {MediaDeviceInfo[]} found @param {string} kind @param {string} word @returns {Device[]} */
function named(found, kind, word) {
  return found
    .filter((device) => device.kind === kind && device.deviceId !== '')
    .map(({ deviceId, label }, i) => ({ id: deviceId, label: label || `${word} ${i + 1}` }));
}

/** Calls back when a device comes or goes. @returns {() => void} stops watching */
export function watchDevices(/** @type {() => void} */ changed) {
  navigator.mediaDevices?.addEventListener('devicechange', changed);
  return () => navigator.mediaDevices?.removeEventListener('devicechange', changed);
}

/**
 * One microphone with echo cancellation, noise suppression and gain control.
 * @param {string} id '' is the default one, which also takes the place of one that is gone
 * @returns {Promise<MediaStream>} rejects with StartFailed
 */
export async function openMicrophone(id) {
  /** @type {MediaTrackConstraints} */
  const audio = {
    echoCancellation: true,
    noiseSuppression: true,
    autoGainControl: true,
    channelCount: 1,
  };
  if (id) audio.deviceId = { exact: id };
  try {
    return await navigator.mediaDevices.getUserMedia({ audio });
  } catch (error) {
    if (id && error instanceof Error && error.name === 'OverconstrainedError') {
      return openMicrophone('');
    }
    throw new StartFailed(fromMicrophone(error));
  }
}
