// A click on a column heading sorts its table: figures as numbers, by their mean; cells that were not measured stay last.

const MISSING = new Set(["", "–", "not measured"]);

function figure(text) {
  const match = text.match(/^[<>≤≥]?\s*(-?[\d,]*\.?\d+(?:e[-+]?\d+)?)(?:$| ?[±[(,%])/i);
  return match ? Number(match[1].replaceAll(",", "")) : NaN;
}

function sort(table, column, descending) {
  const rows = [...table.tBodies[0].rows].map((row) => ({ row, text: row.cells[column].innerText.trim() }));
  const missing = rows.filter(({ text }) => MISSING.has(text));
  const present = rows.filter(({ text }) => !MISSING.has(text));
  const numeric = present.every(({ text }) => !Number.isNaN(figure(text)));
  const order = numeric
    ? (a, b) => figure(a.text) - figure(b.text)
    : (a, b) => a.text.localeCompare(b.text, "en", { numeric: true });
  present.sort((a, b) => (descending ? order(b, a) : order(a, b)));
  table.tBodies[0].append(...[...present, ...missing].map(({ row }) => row));
}

for (const table of document.querySelectorAll("article table")) {
  const heads = [...table.tHead.rows[table.tHead.rows.length - 1].cells];
  heads.forEach((head, column) => {
    if (head.classList.contains("unsorted")) return;
    const button = document.createElement("button");
    button.append(...head.childNodes);
    button.title = "Sort by this column";
    head.append(button);
    button.addEventListener("click", () => {
      const descending = head.ariaSort === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.ariaSort = descending ? "descending" : "ascending";
      sort(table, column, descending);
    });
  });
}
