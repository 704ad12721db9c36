"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const box = document.getElementById("plots"), readout = document.getElementById("readout");
  const clock = s => { s = Math.round(s); return Math.floor(s / 3600) + ":" + String(Math.floor(s / 60) % 60).padStart(2, "0") + ":" + String(s % 60).padStart(2, "0"); };
  box.addEventListener("pointermove", event => {
    const plot = box.querySelector("svg").getBoundingClientRect();
    const x = (event.clientX - plot.left) / plot.width * data.width;
    let at = 0, best = Infinity;
    for (let i = 0; i < data.x.length; i++) { const d = Math.abs(data.x[i] - x); if (d < best) { best = d; at = i; } }
    if (best > 20) { leave(); return; }
    box.classList.add("live"); readout.style.display = "block";
    for (const line of box.querySelectorAll(".cursor")) { line.setAttribute("x1", data.x[at]); line.setAttribute("x2", data.x[at]); }
    readout.replaceChildren();
    const head = document.createElement("b"); head.textContent = "mission time " + clock(data.mission[at]); readout.append(head);
    if (data.start_ms !== undefined) head.append(" · " + new Date(data.start_ms + data.mission[at] * 1000).toISOString().slice(0, 19) + "Z");
    const table = document.createElement("table"); readout.append(table);
    for (const item of data.series) {
      const row = table.insertRow(), name = document.createElement("th"); name.textContent = item.label; row.append(name);
      const value = item.v[at]; row.insertCell().textContent = value === null ? "–" : value + " " + item.unit;
    }
  });
  const leave = () => { box.classList.remove("live"); readout.style.display = "none"; };
  box.addEventListener("pointerleave", leave);
})();
