"use strict";
(() => {
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const prefersDark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : prefersDark.matches);
  const nameTheme = () => {
    button.textContent = isDark() ? "Light" : "Dark";
    button.setAttribute("aria-pressed", String(isDark()));
  };
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    nameTheme();
  });
  prefersDark.addEventListener("change", nameTheme);
  nameTheme();

  // Tables: down, up, and back to the order of the document. Rows without a number stay last.
  const sortBy = (head, direction) => {
    const body = head.closest("table").tBodies[0];
    const value = (row) => parseFloat(row.cells[head.cellIndex].dataset.v);
    const rows = [...body.rows].sort((one, other) => {
      if (direction === "none") return one.dataset.at - other.dataset.at;
      const [a, b] = [value(one), value(other)];
      if (isNaN(a) || isNaN(b)) return isNaN(a) - isNaN(b) || one.dataset.at - other.dataset.at;
      return direction === "descending" ? b - a : a - b;
    });
    body.append(...rows);
  };
  const next = { none: "descending", descending: "ascending", ascending: "none" };
  for (const table of document.querySelectorAll("table.results")) {
    [...table.tBodies[0].rows].forEach((row, at) => { row.dataset.at = at; });
    const heads = [...table.querySelectorAll("th[aria-sort]")];
    for (const head of heads) {
      head.firstElementChild.addEventListener("click", () => {
        const direction = next[head.getAttribute("aria-sort")];
        heads.forEach((other) => other.setAttribute("aria-sort", "none"));
        head.setAttribute("aria-sort", direction);
        sortBy(head, direction);
      });
    }
  }

  // Texts: one stop for Tab per text, arrow keys within it; what the full model says appears by pointer, focus or tap.
  const tip = document.getElementById("tip");
  const hide = () => { tip.hidden = true; };
  const show = (token) => {
    const { n, f } = token.dataset;
    const said = f === undefined ? "the full model says the same" : `full model: ${f}`;
    tip.textContent = `${said}\n${n} of ${token.parentElement.dataset.l} layers`;
    tip.hidden = false;
    const place = token.getClientRects()[0] || token.getBoundingClientRect();
    const left = Math.min(place.left, innerWidth - tip.offsetWidth - 8);
    const above = place.top - tip.offsetHeight - 7;
    tip.style.left = `${Math.max(8, left)}px`;
    tip.style.top = `${above > 4 ? above : place.bottom + 7}px`;
  };
  for (const text of document.querySelectorAll(".text")) {
    const tokens = [...text.children];
    text.addEventListener("pointerover", (event) => { if (event.target !== text) show(event.target); });
    text.addEventListener("pointerleave", hide);
    text.addEventListener("focusin", (event) => {
      tokens.forEach((token) => { token.tabIndex = token === event.target ? 0 : -1; });
      show(event.target);
    });
    text.addEventListener("focusout", hide);
    text.addEventListener("keydown", (event) => {
      const at = tokens.indexOf(document.activeElement);
      const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: tokens.length - 1 }[event.key];
      if (event.key === "Escape") hide();
      if (to === undefined || !tokens[to]) return;
      event.preventDefault();
      tokens[to].focus();
    });
  }
  addEventListener("scroll", hide, { passive: true });
})();
