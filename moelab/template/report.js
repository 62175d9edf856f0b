"use strict";
(() => {
  const NUMBER = /^[-+−]?(\d[\d,]*\.?\d*|\.\d+)(e[-+]?\d+)?\s*[%×x]?$/i;
  const MISSING = new Set(["", "nan", "none", "<na>", "nat", "null", "-", "–", "—"]);
  const FILTER_FROM_ROWS = 15;

  const text = (cell) => (cell ? cell.textContent.trim() : "");
  const missing = (value) => MISSING.has(value.toLowerCase());
  const number = (value) => {
    if (/^[-+−]?inf(inity)?$/i.test(value)) return /^[-−]/.test(value) ? -Infinity : Infinity;
    return NUMBER.test(value)
      ? parseFloat(value.replace(/,/g, "").replace("−", "-"))
      : NaN;
  };

  // A cell over several rows or columns leaves no meaning to a sort.
  const simple = (table) =>
    table.tHead && table.tBodies.length === 1 && table.tBodies[0].rows.length > 1 &&
    !table.classList.contains("no-sort") &&
    ![...table.querySelectorAll("th, td")].some((c) => c.rowSpan > 1 || c.colSpan > 1);

  const align = (table, rows, column) => {
    const values = rows.map((row) => text(row.cells[column])).filter((v) => !missing(v));
    const numeric = values.length > 0 && values.every((v) => !Number.isNaN(number(v)));
    for (const row of table.rows) row.cells[column]?.classList.add(numeric ? "num" : "txt");
    if (!numeric && values.some((v) => v.length > 60)) {
      for (const row of rows) row.cells[column]?.classList.add("wide");
    }
    return numeric;
  };

  const sorter = (table, rows) => {
    const body = table.tBodies[0];
    return (header, column, numeric) => {
      const was = header.getAttribute("aria-sort");
      const now = was === "ascending" ? "descending" : was === "descending" ? null : "ascending";
      for (const other of table.tHead.querySelectorAll("[aria-sort]")) {
        other.removeAttribute("aria-sort");
      }
      let order = rows;
      if (now) {
        header.setAttribute("aria-sort", now);
        const sign = now === "ascending" ? 1 : -1;
        order = rows
          .map((row) => [row, text(row.cells[column])])
          .sort(([, a], [, b]) => {
            // What is missing stays at the end in both directions.
            if (missing(a) || missing(b)) return missing(a) - missing(b);
            const [x, y] = [number(a), number(b)];
            return sign * (numeric ? (x < y ? -1 : x > y ? 1 : 0)
              : a.localeCompare(b, undefined, { numeric: true }));
          })
          .map(([row]) => row);
      }
      body.append(...order);
    };
  };

  const addFilter = (table, rows) => {
    const bar = document.createElement("div");
    bar.className = "filter";
    const input = document.createElement("input");
    input.type = "search";
    input.placeholder = "Filter rows";
    input.setAttribute("aria-label", "Filter rows");
    const count = document.createElement("span");
    count.setAttribute("aria-live", "polite");
    const apply = () => {
      const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const row of rows) {
        const line = [...row.cells].map(text).join(" ").toLowerCase();
        row.hidden = !words.every((word) => line.includes(word));
        shown += row.hidden ? 0 : 1;
      }
      count.textContent = shown < rows.length ? `${shown} of ${rows.length} rows` : `${rows.length} rows`;
    };
    input.addEventListener("input", apply);
    bar.append(input, count);
    table.closest(".table-box").before(bar);
    apply();
  };

  for (const table of document.querySelectorAll(".table-box > table")) {
    if (!simple(table)) continue;
    const rows = [...table.tBodies[0].rows];
    const sort = sorter(table, rows);
    const columns = Math.max(...[...table.tHead.rows].map((row) => row.cells.length));
    for (let column = 0; column < columns; column++) {
      const numeric = align(table, rows, column);
      // pandas writes a named index's name into a second header row.
      const header = [...table.tHead.rows].map((row) => row.cells[column]).find((c) => text(c));
      if (!header) continue;
      const button = document.createElement("button");
      button.type = "button";
      button.className = "sort";
      button.append(...header.childNodes);
      header.append(button);
      button.addEventListener("click", () => sort(header, column, numeric));
    }
    if (rows.length > FILTER_FROM_ROWS) addFilter(table, rows);
  }

  const codes = [...document.querySelectorAll("details.code")];
  const toggle = document.getElementById("toggle-code");
  if (codes.length) {
    toggle.hidden = false;
    toggle.addEventListener("click", () => {
      const open = toggle.textContent === "Show code";
      for (const code of codes) code.open = open;
      toggle.textContent = open ? "Hide code" : "Show code";
    });
  }

  const parameters = [...document.querySelectorAll("details.parameters")];
  let folded = [];
  addEventListener("beforeprint", () => {
    folded = parameters.filter((box) => !box.open);
    for (const box of folded) box.open = true;
  });
  addEventListener("afterprint", () => {
    for (const box of folded) box.open = false;
  });

  const links = new Map(
    [...document.querySelectorAll(".toc-side a")].map((a) => [a.hash.slice(1), a]));
  const headings = [...links.keys()]
    .map((id) => document.getElementById(decodeURIComponent(id))).filter(Boolean);
  const mark = () => {
    // The heading last passed; at the foot of the page the last one.
    const foot = innerHeight + scrollY >= document.documentElement.scrollHeight - 2;
    const passed = headings.filter((h) => h.getBoundingClientRect().top < 120);
    const current = foot && scrollY > 0 ? headings.at(-1) : passed.at(-1) ?? headings[0];
    for (const link of links.values()) link.removeAttribute("aria-current");
    if (current) {
      [...links.values()][headings.indexOf(current)]?.setAttribute("aria-current", "location");
    }
  };
  if (headings.length) {
    addEventListener("scroll", mark, { passive: true });
    mark();
  }
  addEventListener("click", (event) => {
    const link = event.target.closest?.(".toc-top a");
    if (link) link.closest("details").open = false;
  });
})();
