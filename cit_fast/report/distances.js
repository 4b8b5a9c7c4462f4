"use strict";
// Under the pointer: which pair a cell of the heat map is, and how far apart its tasks are.
(() => {
  const { names, distances, decimals, box } = JSON.parse(document.getElementById("data").textContent);
  const map = document.getElementById("map");
  const tip = document.getElementById("tip");
  const n = names.length;
  const [left, top, width, height] = box;
  const distance = (i, j) => (i > j ? distance(j, i) : distances[i * n - (i * (i + 1)) / 2 + j - i - 1]);
  map.addEventListener("pointermove", (event) => {
    const shown = map.getBoundingClientRect();
    const x = (event.clientX - shown.left) / shown.width;
    const y = (event.clientY - shown.top) / shown.height;
    const column = Math.floor(((x - left) / width) * n);
    const row = Math.floor(((y - top) / height) * n);
    const onRow = row >= 0 && row < n;
    if (!onRow || column >= n) {
      tip.hidden = true;
      return;
    }
    tip.hidden = false;
    tip.textContent = names[row];
    if (column >= 0 && column !== row) {
      tip.append(document.createElement("br"), names[column], document.createElement("br"));
      const value = document.createElement("strong");
      value.textContent = distance(row, column).toFixed(decimals);
      tip.append(value);
    }
    const space = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - space.width - 4))}px`;
    const below = event.clientY + 18;
    tip.style.top = `${below + space.height > innerHeight ? event.clientY - space.height - 10 : below}px`;
  });
  map.addEventListener("pointerleave", () => {
    tip.hidden = true;
  });
})();
