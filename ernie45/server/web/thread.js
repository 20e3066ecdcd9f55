// The conversation on the page: which messages are shown, and where the view stands in them.

import { viewOf } from "./message.js";
import { path } from "./tree.js";

const NEAR = 90; // pixels from the end that still count as "at the end"

export class Thread {
  constructor(scroller, list, toEnd, actions) {
    Object.assign(this, { scroller, list, toEnd, actions, views: new Map(), conversation: null, follows: true });
    scroller.addEventListener("scroll", () => this.onScroll(), { passive: true });
    toEnd.addEventListener("click", () => this.end());
  }

  /** Draws the branch of `conversation` that is shown. Views of messages that stay are kept. */
  show(conversation) {
    if (this.conversation !== conversation) {
      this.views.clear();
      this.follows = true;
    }
    this.conversation = conversation;
    const nodes = path(conversation);
    const wanted = nodes.map((node) => {
      if (!this.views.has(node.id)) this.views.set(node.id, viewOf(conversation, node, this.actions));
      return this.views.get(node.id);
    });
    wanted.forEach((view, i) => {
      view.update();
      if (this.list.children[i] !== view.root) this.list.insertBefore(view.root, this.list.children[i] ?? null);
    });
    while (this.list.children.length > wanted.length) this.list.lastChild.remove();
    this.settle();
  }

  /** Draws one message again, soon: at most once a frame, and never more than a quarter of the time. */
  refresh(node) {
    if (this.pending) return;
    this.pending = true;
    const wait = Math.max(0, (this.resting ?? 0) - performance.now());
    setTimeout(() => requestAnimationFrame(() => {
      this.pending = false;
      const before = performance.now();
      this.views.get(node.id)?.update();
      this.settle();
      this.resting = performance.now() + 3 * (performance.now() - before);
    }), wait);
  }

  editLast() {
    const last = path(this.conversation).findLast((node) => node.role === "user");
    this.views.get(last?.id)?.edit();
    return Boolean(last);
  }

  settle() {
    if (this.follows) this.scroller.scrollTop = this.scroller.scrollHeight;
    this.toEnd.hidden = this.follows || this.distance() < NEAR;
  }

  distance() {
    return this.scroller.scrollHeight - this.scroller.scrollTop - this.scroller.clientHeight;
  }

  onScroll() {
    this.follows = this.distance() < NEAR;
    this.toEnd.hidden = this.follows;
  }

  end() {
    this.follows = true;
    this.settle();
  }
}
