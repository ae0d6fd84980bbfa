// A table that is wider than its page becomes a list of cards: each cell stands under the title of its column.
document.addEventListener("DOMContentLoaded", () => {
  const tables = [...document.querySelectorAll("article table:not(.highlighttable)")];
  for (const table of tables) {
    const titles = [...table.querySelectorAll("thead th")].map((th) => th.textContent.trim());
    for (const row of table.querySelectorAll("tbody tr"))
      [...row.cells].forEach((cell, i) => {
        if (titles[i] && cell.textContent.trim()) cell.dataset.title = titles[i];
      });
  }
  const fit = () => {
    for (const table of tables) {
      table.classList.remove("cards");
      const room = table.closest("article").clientWidth;
      table.classList.toggle("cards", table.scrollWidth > room || table.offsetWidth > room);
    }
  };
  fit();
  addEventListener("resize", fit);
  document.fonts?.ready.then(fit);
});
