/**
 * From the user's first sound to the agent's last: what a barge-in takes, measured where it is
 * heard. Pure. All times are seconds of one AudioContext.
 */

const WINDOW_S = 2;

export class BargeInClock {
  #audible = false;
  #silentSince = -Infinity;
  /** @type {number | null} */
  #onset = null;
  #stopping = false;

  /** The user made a sound. */
  onset(/** @type {number} */ at) {
    this.#stopping = false;
    this.#onset = this.#audible ? at : null;
  }

  audible() {
    this.#audible = true;
  }

  /** @returns {number | null} ms from onset to silence, if this silence answers an onset */
  silent(/** @type {number} */ lastAudible) {
    this.#audible = false;
    this.#silentSince = lastAudible;
    return this.#verdict();
  }

  /**
   * The server silenced the agent. Without this a pause between two words would count.
   * @returns {number | null} as `silent`: the voice may have been silent already
   */
  stopping() {
    this.#stopping = true;
    return this.#verdict();
  }

  #verdict() {
    if (this.#onset === null || !this.#stopping || this.#audible) return null;
    const took = this.#silentSince - this.#onset;
    this.#onset = null;
    return took >= 0 && took <= WINDOW_S ? Math.round(took * 1000) : null;
  }
}
