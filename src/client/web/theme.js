/** A classic script in the head: the page never flashes in the other theme. */
(() => {
  const chosen = localStorage.getItem('duplex.theme');
  if (chosen === 'dark' || chosen === 'light') document.documentElement.dataset.theme = chosen;
})();
