// Arrow keys move from picture to picture, and from query to query.
for (const gallery of document.querySelectorAll(".gallery")) {
  const rows = [...gallery.querySelectorAll(".row")].map(
    (row) => [...row.querySelectorAll("figure")]);
  gallery.addEventListener("keydown", (event) => {
    const y = rows.findIndex((row) => row.includes(document.activeElement));
    if (y < 0) return;
    const x = rows[y].indexOf(document.activeElement);
    const [dy, dx] = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0],
      ArrowUp: [-1, 0], Home: [0, -x], End: [0, rows[y].length] }[event.key] ?? [];
    if (dx === undefined) return;
    event.preventDefault();
    const row = rows[Math.min(Math.max(y + dy, 0), rows.length - 1)];
    const next = row[Math.min(Math.max(x + dx, 0), row.length - 1)];
    document.activeElement.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });
}
