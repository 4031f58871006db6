// SPDX-License-Identifier: Apache-2.0
// The story: a document comes, the model keeps what it needs of it, and every part of the page shows its own.

import * as boots from "./boots.js";
import * as budget from "./budget.js";
import { Connection } from "./connection.js";
import * as graphs from "./graphs.js";
import * as header from "./header.js";
import { History } from "./model.js";
import * as slots from "./slots.js";
import * as warmup from "./warmup.js";

const history = new History();
let latest = null;
let due = false;

const connection = new Connection({
  onDocument(document) {
    latest = document;
    history.add(document);
    drawSoon();
  },
  onState: (state) => header.connection(state, connection.silence),
});

function drawSoon() {
  if (due) return;
  due = true;
  requestAnimationFrame(draw);
}

/** Each part by itself: what one cannot show must not take the others away. */
function draw() {
  due = false;
  if (!latest) return;
  for (const part of [header, slots, boots, warmup, budget, graphs]) {
    try {
      part.update(latest, history);
    } catch (error) {
      console.error(error);
    }
  }
}

for (const part of [slots, boots, warmup, graphs]) part.start(drawSoon);
setInterval(() => header.connection(connection.state, connection.silence), 1000);
header.connection(connection.state, 0);
connection.open();
