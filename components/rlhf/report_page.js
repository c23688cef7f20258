"use strict";
(() => {
  const table = document.getElementById("samples"), body = table.tBodies[0], rows = [...body.rows];
  const filter = document.getElementById("filter"), choice = document.getElementById("choice");
  const texts = new Map(rows.map((row) => [row, row.textContent.toLowerCase()]));
  const show = () => {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const row of rows) {
      row.hidden = !((!choice.value || row.dataset.choice === choice.value) && words.every((word) => texts.get(row).includes(word)));
      count += !row.hidden;
    }
    document.getElementById("shown").textContent = `${count} of ${rows.length}`;
  };
  filter.addEventListener("input", show);
  choice.addEventListener("change", show);
  [...table.tHead.rows[0].cells].forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const key = (row) => row.cells[column].textContent;
    const number = (text) => (text.trim() === "" ? NaN : Number(text));
    rows.sort((a, b) => {
      const x = number(key(a)), y = number(key(b));
      const order = Number.isNaN(x) || Number.isNaN(y) ? key(a).localeCompare(key(b)) : x - y;
      return up ? order : -order;
    });
    body.append(...rows);
  }));
})();
