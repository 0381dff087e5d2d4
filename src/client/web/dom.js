/** Elements without markup: text is always text. */

export const $ = (selector, root = document) => root.querySelector(selector);

/** el('button', {type: 'button', onclick: stop, 'aria-label': 'Stop'}, 'text', childElement) */
export function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith('on')) element.addEventListener(name.slice(2), value);
    else set(element, name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== ''));
  return element;
}

/** An attribute; false and null remove it. */
export function set(element, name, value) {
  if (value === false || value === null || value === undefined) element.removeAttribute(name);
  else element.setAttribute(name, value === true ? '' : value);
}

/** Writes only what changed: a screen reader hears every write to a live region. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Read out once, and then gone: for a reader, nothing stays on the screen. */
export function announce(region, text) {
  region.append(el('p', {}, text));
  while (region.childElementCount > 5) region.firstElementChild.remove();
}
