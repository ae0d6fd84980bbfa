// A table that is wider than its page becomes a list of cards: each cell stands under the title of its column. A table that
// a program printed gets a smaller font instead.
document.addEventListener("DOMContentLoaded", () => {
  const tables = [...document.querySelectorAll("article table:not(.highlighttable)")];
  for (const table of tables) {
    const titles = [...table.querySelectorAll("thead th")].map((th) => th.textContent.trim());
    for (const row of table.querySelectorAll("tbody tr"))
      [...row.cells].forEach((cell, i) => {
        if (titles[i] && cell.textContent.trim()) cell.dataset.title = titles[i];
      });
  }
  const printed = [...document.querySelectorAll("article .language-text pre > code")];
  const fit = () => {
    for (const code of printed) {
      code.style.fontSize = "";
      const size = parseFloat(getComputedStyle(code).fontSize);
      const share = code.clientWidth / code.scrollWidth;
      if (share < 1) code.style.fontSize = `${Math.max(5, size * share * 0.97)}px`;
    }
    for (const table of tables) {
      delete table.dataset.cards;
      const room = table.closest("article").clientWidth;
      if (Math.max(table.scrollWidth, table.offsetWidth) > room) table.dataset.cards = "";
    }
  };
  fit();
  addEventListener("resize", fit);
  document.fonts?.ready.then(fit);
});
