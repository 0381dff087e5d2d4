/** Automatic, dark, light, and automatic again. */

const ORDER = ['automatic', 'dark', 'light'];

export function wireTheme(button, changed) {
  const root = document.documentElement;
  const show = () => {
    button.setAttribute('aria-label', `Theme: ${root.dataset.theme ?? ORDER[0]}`);
    button.title = button.getAttribute('aria-label');
  };
  button.addEventListener('click', () => {
    const next = ORDER[(ORDER.indexOf(root.dataset.theme ?? ORDER[0]) + 1) % ORDER.length];
    if (next === ORDER[0]) delete root.dataset.theme;
    else root.dataset.theme = next;
    localStorage.setItem('duplex.theme', next);
    show();
    changed();
  });
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', changed);
  show();
}
