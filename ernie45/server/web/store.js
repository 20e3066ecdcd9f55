// What the browser keeps: conversations in IndexedDB, small choices in localStorage. Where a browser keeps nothing, memory has to do.

import { pack, unpack } from "./archive.js";

const NAME = "ernie45";
const TABLE = "conversations";

const promised = (request) => new Promise((resolve, reject) => {
  request.onsuccess = () => resolve(request.result);
  request.onerror = () => reject(request.error);
});

/** Opens the store. `lasting` says whether what it holds outlives the page. */
export async function openStore() {
  try {
    const request = indexedDB.open(NAME, 1);
    request.onupgradeneeded = () => request.result.createObjectStore(TABLE, { keyPath: "id" });
    return new Store(await promised(request));
  } catch {
    return new Store(null);
  }
}

class Store {
  constructor(database) {
    this.database = database;
    this.memory = new Map();
    this.channel = typeof BroadcastChannel === "function" ? new BroadcastChannel(NAME) : null;
  }

  get lasting() {
    return this.database !== null;
  }

  table(mode) {
    return this.database.transaction(TABLE, mode).objectStore(TABLE);
  }

  /** All conversations, the one used last first. A record that cannot be read is left alone and left out. */
  async all() {
    const records = this.database ? await promised(this.table("readonly").getAll()) : [...this.memory.values()];
    return records.flatMap(readable).sort((a, b) => b.updated - a.updated);
  }

  async get(id) {
    const record = this.database ? await promised(this.table("readonly").get(id)) : this.memory.get(id);
    return record ? readable(record)[0] ?? null : null;
  }

  async put(conversation) {
    const record = pack(conversation);
    if (this.database) await promised(this.table("readwrite").put(record));
    else this.memory.set(record.id, record);
    this.channel?.postMessage({ id: record.id });
  }

  async remove(id) {
    if (this.database) await promised(this.table("readwrite").delete(id));
    else this.memory.delete(id);
    this.channel?.postMessage({ id });
  }

  /** Calls back with the identity of a conversation that another tab changed. */
  onElsewhere(callback) {
    this.channel?.addEventListener("message", (event) => callback(event.data.id));
  }
}

function readable(record) {
  try {
    return [unpack(record)];
  } catch {
    return [];
  }
}

/** A small choice that lasts: text by name. */
export const choices = {
  read(name) {
    try {
      return localStorage.getItem(`${NAME}.${name}`);
    } catch {
      return null;
    }
  },
  write(name, value) {
    try {
      if (value === null) localStorage.removeItem(`${NAME}.${name}`);
      else localStorage.setItem(`${NAME}.${name}`, value);
    } catch {
      // A browser that keeps nothing: the choice holds until the page is left.
    }
  },
};

/** The key of the server: for this tab, or, when the person says so, for this browser. */
export const apiKey = {
  read() {
    try {
      return sessionStorage.getItem(`${NAME}.key`) ?? choices.read("key") ?? "";
    } catch {
      return "";
    }
  },
  write(key, lasting) {
    try {
      sessionStorage.setItem(`${NAME}.key`, key);
    } catch {
      // As above.
    }
    choices.write("key", lasting ? key : null);
  },
};
